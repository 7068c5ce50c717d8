//! Upgrades of sub-agents: committed when the new release has proven itself, rolled back automatically otherwise, and without an effect on
//! other sub-agents.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::wait::{try_for, wait_for};

/// A complete roll back: three attempts, a grace period, and the start of the previous release.
const ROLLED_BACK: Duration = Duration::from_secs(90);

#[track_caller]
fn wait_for_release(host: &TestHost, name: &str, wanted: &str, deadline: Duration) -> Value {
    host.wait_for_status(&format!("{name} {wanted} to run"), deadline, |status| {
        agent(status, name).is_some_and(|agent| agent["version"] == wanted && agent["state"] == "running")
    })
}

fn history(host: &TestHost) -> Vec<Value> {
    let history = host.control(&["status", "--history", "--json"]).json();
    history["history"].as_array().expect("it is a list").clone()
}

/// Kind and outcome of each entry about a sub-agent.
fn outcomes(host: &TestHost, name: &str) -> Vec<String> {
    let history = history(host);
    let own = history.iter().filter(|changed| changed["agent"] == name);
    own.map(|changed| format!("{} {}", changed["kind"], changed["outcome"]).replace('"', "")).collect()
}

/// A gateway, and a host that runs release 1.0 of `one` and a second sub-agent. `next`: further releases that can be ordered.
fn host_with(next: &[&Package]) -> (Gateway, TestHost) {
    let (first, bystander) = (Package::sleeper("one", "1.0"), Package::sleeper("bystander", "1.0"));
    let packages: Vec<&Package> = [&first, &bystander].into_iter().chain(next.iter().copied()).collect();
    let gateway = Gateway::with(&packages, &[("one", "1.0", ""), ("bystander", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    wait_for_release(&host, "one", "1.0", SOON);
    host.wait_for_agent("bystander");
    (gateway, host)
}

fn order(gateway: &Gateway, version: &str, more: &str) {
    gateway.want(&[("one", version, more), ("bystander", "1.0", "")]);
}

/// The version of the skipped release of `one` in `status`.
fn skipped(status: &Value) -> Option<&str> {
    let skipped = agent(status, "one")?["skipped"].as_array()?.first()?;
    skipped["version"].as_str()
}

/// Orders a bad release, and waits until it is rolled back; nothing else may have changed.
#[track_caller]
fn is_rolled_back(bad: &Package) -> (Gateway, TestHost) {
    let (gateway, host) = host_with(&[bad]);
    let bystander = host.wait_for_agent("bystander");
    let manager = host.role_pid("spm");
    order(&gateway, "2.0", "");
    let status = host.wait_for_status("the bad release to be rolled back", ROLLED_BACK, |status| {
        skipped(status) == Some("2.0")
            && agent(status, "one").is_some_and(|agent| agent["version"] == "1.0" && agent["state"] == "running")
    });
    assert_eq!(status["state"], "degraded", "a skipped release is a problem: {status:#}");
    assert!(status["problems"].to_string().contains("one 2.0 failed and is skipped"), "{status:#}");
    let one = agent(&status, "one").expect("it exists");
    assert!(one["lastError"].as_str().is_some_and(|error| error.contains("2.0 is skipped")), "{one:#}");
    assert_eq!((host.wait_for_agent("bystander"), host.role_pid("spm")), (bystander, manager));
    assert_eq!(outcomes(&host, "one"), ["upgrade failed", "skip ok", "rollback ok"]);
    wait_for("the gateway to receive it", SOON, || {
        let status = gateway.status().to_string();
        ["\"upgrade\"", "\"skip\"", "\"rollback\""].iter().all(|kind| status.contains(kind)).then_some(())
    });
    let left = host.processes().into_iter().filter(|process| process.command.contains("one/2.0")).count();
    assert_eq!(left, 0, "processes of the bad release are left");
    (gateway, host)
}

#[test]
fn a_release_that_exits_at_once_is_rolled_back_and_not_tried_again_by_the_next_manager() {
    let (_gateway, host) = is_rolled_back(&Package::script("one", "2.0", "exit 3", ""));
    let one = host.wait_for_agent("one");
    let manager = host.role_pid("spm").expect("it runs");
    host.kill(manager);
    wait_for("another manager", SOON, || host.role_pid("spm").filter(|pid| *pid != manager));
    let heartbeats = |status: &Value| status["gateway"]["lastHeartbeat"].as_str().map(str::to_owned);
    let first = heartbeats(&host.wait_for_status("a heartbeat", SOON, |status| heartbeats(status).is_some()));
    let status = host.wait_for_status("a later one", SOON, |status| heartbeats(status) > first);
    assert_eq!((skipped(&status), host.wait_for_agent("one")), (Some("2.0"), one));
    assert_eq!(outcomes(&host, "one").len(), 3, "it was not tried again");
}

#[test]
fn a_release_that_cannot_be_executed_is_rolled_back() {
    is_rolled_back(&Package::native("one", "2.0", &["bin/missing"], "").with_file(
        "bin/missing",
        "#!/no/such/interpreter\n",
        0o755,
    ));
}

#[test]
fn a_release_that_runs_and_is_unhealthy_is_rolled_back() {
    let health = "[health]\nexec = [\"bin/check\"]\ninterval = 1\nfailures = 2\nstartPeriod = 1";
    let bad = Package::script("one", "2.0", "exec sleep 1000000", health);
    is_rolled_back(&bad.with_program("bin/check", "echo no database\nexit 1"));
}

#[test]
fn a_release_that_daemonizes_is_rolled_back_and_leaves_nothing() {
    is_rolled_back(&Package::script("one", "2.0", "setsid sleep 1000000 & exit 0", ""));
}

#[test]
fn a_release_that_ignores_its_stop_is_rolled_back_after_its_grace_period() {
    let health = "gracePeriod = 1\n[health]\nexec = [\"bin/check\"]\ninterval = 1\nfailures = 1\nstartPeriod = 1";
    let bad = Package::script("one", "2.0", "trap '' TERM; while :; do sleep 1; done", health);
    is_rolled_back(&bad.with_program("bin/check", "exit 1"));
}

#[test]
fn a_release_that_fills_its_log_and_dies_is_rolled_back() {
    let (_gateway, host) =
        is_rolled_back(&Package::script("one", "2.0", "head -c 20000000 /dev/zero | tr '\\0' x; exit 1", ""));
    wait_for("its log to be cut to its limit", SOON + SOON, || {
        let size = fs::metadata(host.home().join("log/agents/one.log")).map_or(0, |metadata| metadata.len());
        (size <= 16 << 20).then_some(())
    });
}

#[test]
fn a_release_whose_control_script_reports_stopped_is_rolled_back() {
    is_rolled_back(&Package::control("one", "2.0", "exit 1"));
}

#[test]
fn a_release_that_is_slow_to_become_healthy_keeps_its_start_period() {
    let health = "[health]\nexec = [\"bin/check\"]\ninterval = 2\nfailures = 2\nstartPeriod = \"30s\"";
    // It is healthy 25 seconds after its start.
    let script = "rm -f ready; (sleep 25; : > ready) & exec sleep 1000000";
    let slow =
        Package::script("one", "2.0", script, health).with_file("bin/check", "#!/bin/sh\ntest -e ready\n", 0o755);
    let (gateway, host) = host_with(&[&slow]);
    order(&gateway, "2.0", "");
    let status = host.wait_for_status("its probation", SOON, |status| {
        agent(status, "one").is_some_and(|agent| agent["upgrade"]["phase"] == "probation" && agent["pid"].is_u64())
    });
    let one = agent(&status, "one").expect("it exists");
    assert_eq!((&one["state"], &one["version"]), (&"updating".into(), &"2.0".into()));
    let upgrade = &one["upgrade"];
    assert_eq!((&upgrade["from"], &upgrade["to"], &upgrade["triesLeft"]), (&"1.0".into(), &"2.0".into(), &3.into()));
    assert!(upgrade["deadline"].as_str().is_some_and(|at| at.ends_with('Z')), "{upgrade}");
    let started = pid(&one["pid"]);
    let status = wait_for_release(&host, "one", "2.0", SOON + SOON);
    assert_eq!(agent(&status, "one").and_then(|agent| pid(&agent["pid"])), started, "it was not restarted");
    assert_eq!(outcomes(&host, "one"), ["upgrade ok"]);
    assert!(history(&host)[0]["seconds"].as_u64() >= Some(30), "{:?}", history(&host));
    let shown = host.control(&["status", "--history"]).expect_success();
    assert!(shown.contains("upgrade") && shown.contains("1.0") && shown.contains("2.0"), "{shown}");
}

#[test]
fn a_bad_release_is_not_committed_by_a_manager_restart_during_its_probation() {
    let bad = Package::script("one", "2.0", "sleep 4; exit 1", "probation = \"20s\"");
    let (gateway, host) = host_with(&[&bad]);
    order(&gateway, "2.0", "");
    host.wait_for_status("its probation", SOON, |status| {
        agent(status, "one").is_some_and(|agent| agent["upgrade"]["phase"] == "probation" && agent["pid"].is_u64())
    });
    // Both roles are killed; the gateway does not run either, so no new order arrives.
    host.crash();
    assert_eq!(ledger_version(&host, "active"), Some("1.0".to_owned()), "what is on probation is not active");
    assert_eq!(ledger_version(&host, "probation"), Some("2.0".to_owned()));
    host.control(&["start"]).expect_success();
    wait_for_release(&host, "one", "1.0", ROLLED_BACK);
    assert_eq!(skipped(&host.status()), Some("2.0"));
}

fn ledger_version(host: &TestHost, place: &str) -> Option<String> {
    let text = fs::read(host.home().join("state/releases.json")).expect("there is a ledger");
    let ledger: Value = serde_json::from_slice(&text).expect("it is JSON");
    ledger["agents"]["one"][place]["version"].as_str().map(str::to_owned)
}

#[test]
fn a_skipped_release_is_retried_by_an_operator_or_a_higher_retry_number() {
    // It fails until the host is corrected.
    let fickle = |host: &TestHost| host.beside("corrected");
    let (first, bystander) = (Package::sleeper("one", "1.0"), Package::sleeper("bystander", "1.0"));
    let host = TestHost::new();
    let corrected = fickle(&host);
    let script = |corrected: &Path| format!("test -e {} && exec sleep 1000000; exit 1", corrected.display());
    let next = Package::script("one", "2.0", &script(&corrected), "");
    let gateway = Gateway::with(&[&first, &bystander, &next], &[("one", "1.0", ""), ("bystander", "1.0", "")]);
    host.join(&gateway, &[]).expect_success();
    wait_for_release(&host, "one", "1.0", SOON);
    order(&gateway, "2.0", "");
    let is_back = |status: &Value| {
        skipped(status) == Some("2.0")
            && agent(status, "one").is_some_and(|agent| agent["version"] == "1.0" && agent["state"] == "running")
    };
    host.wait_for_status("the first try to fail", ROLLED_BACK, is_back);
    host.control(&["retry", "one"]).expect_success();
    wait_for("the second try to fail", ROLLED_BACK, || {
        (outcomes(&host, "one").len() == 6 && is_back(&host.status())).then_some(())
    });
    fs::write(&corrected, "").expect("a temporary directory can be written");
    order(&gateway, "2.0", "retry = 1");
    let status = wait_for_release(&host, "one", "2.0", SOON);
    assert_eq!((skipped(&status), &status["state"]), (None, &"running".into()));
    let nobody = host.control(&["retry", "nobody"]).expect_code(1);
    assert!(nobody.stderr.contains("there is no such sub-agent"), "{nobody}");
}

#[test]
fn an_operators_rollback_holds_until_another_release_is_ordered() {
    let packages = ["2.0", "3.0"].map(|version| Package::sleeper("one", version));
    let (gateway, host) = host_with(&packages.each_ref());
    let refused = host.control(&["rollback", "one"]).expect_code(1);
    assert!(refused.stderr.contains("no previous release"), "{refused}");
    order(&gateway, "2.0", "");
    wait_for_release(&host, "one", "2.0", SOON);
    host.control(&["rollback", "one"]).expect_success();
    let status = wait_for_release(&host, "one", "1.0", SOON);
    let one = agent(&status, "one").expect("it exists");
    assert_eq!((&one["heldByOperator"], skipped(&status)), (&true.into(), None));
    // Another desired state with the same order changes nothing, nor does a new manager.
    gateway.want(&[("one", "2.0", ""), ("bystander", "1.0", "cmd = \"stop\"")]);
    host.wait_for_status("the bystander to be stopped", SOON, |status| {
        agent(status, "bystander").is_some_and(|agent| agent["state"] == "stopped")
    });
    let pid = host.wait_for_agent("one");
    host.control(&["restart"]).expect_success();
    assert_eq!(host.wait_for_agent("one"), pid);
    wait_for_release(&host, "one", "1.0", SOON);
    gateway.want(&[("one", "3.0", ""), ("bystander", "1.0", "cmd = \"stop\"")]);
    let status = wait_for_release(&host, "one", "3.0", SOON);
    assert_eq!(agent(&status, "one").expect("it exists")["heldByOperator"], Value::Null);
}

/// `AOPS_UPGRADE_SEED` selects the moments; it is printed at the start and with a failure.
#[test]
fn an_upgrade_completes_when_roles_are_killed_at_any_moment() {
    const POINTS: usize = 40;
    let seed = std::env::var("AOPS_UPGRADE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("AOPS_UPGRADE_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let good = ["1.0", "2.0"].map(|version| Package::sleeper("one", version));
    let bad = Package::script("one", "3.0", "sleep 0.3; exit 1", "");
    let gateway = Gateway::with(&[&good[0], &good[1], &bad], &[("one", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    wait_for_release(&host, "one", "1.0", SOON);
    let mut current = "1.0";
    for point in 0..POINTS {
        let other = if current == "1.0" { "2.0" } else { "1.0" };
        let ordered = if point % 4 == 3 { "3.0" } else { other };
        let pids = ["spm", "spa"].map(|role| wait_for("both roles", SOON, || host.role_pid(role)));
        gateway.want(&[("one", ordered, "")]);
        // A moment of the upgrade, from the order to some time after its end.
        let moment = Duration::from_millis(rng.u64(0..3500));
        let _ = try_for(moment, || None::<()>);
        let killed = match rng.u32(0..3) {
            0 => &pids[..1],
            1 => &pids[1..],
            _ => &pids[..],
        };
        killed.iter().for_each(|pid| host.kill(*pid));
        host.control(&["start"]).expect_success();
        if ordered != "3.0" {
            current = ordered;
        }
        let told = || format!("AOPS_UPGRADE_SEED={seed}, point {point}: {current} to run after {ordered} was ordered");
        let status = host.wait_for_status(&told(), ROLLED_BACK, |status| {
            let is_skipped = skipped(status) == Some("3.0");
            is_skipped == (ordered == "3.0")
                && agent(status, "one").is_some_and(|agent| agent["version"] == current && agent["state"] == "running")
        });
        let own = agent(&status, "one").and_then(|agent| pid(&agent["pid"]));
        let runs: Vec<u32> = host
            .processes()
            .iter()
            .filter(|process| process.command.contains("sleep"))
            .map(|process| process.pid)
            .collect();
        assert_eq!(runs, own.into_iter().collect::<Vec<_>>(), "{}", told());
    }
}

#[test]
fn a_large_batch_of_upgrades_has_few_sub_agents_down_at_the_same_time() {
    const AGENTS: usize = 30;
    /// The manager's limit.
    const AT_ONCE: i64 = 5;
    let host = TestHost::new();
    let log = host.beside("times");
    // It logs its start and its stop signal.
    let script = format!(
        "note() {{ echo \"$(date +%s%N) $1 $AOPS_AGENT_NAME\" >> {log}; }}\ntrap 'note down; exit 0' TERM\nnote up\n\
         while :; do sleep 1000000 & wait $!; done",
        log = log.display()
    );
    let names: Vec<String> = (0..AGENTS).map(|number| format!("a{number:02}")).collect();
    let packages: Vec<Package> = ["1.0", "2.0"]
        .iter()
        .flat_map(|version| names.iter().map(|name| Package::script(name, version, &script, "")))
        .collect();
    let wanted = |version: &'static str| names.iter().map(|name| (name.as_str(), version, "")).collect::<Vec<_>>();
    let gateway = Gateway::with(&packages.iter().collect::<Vec<_>>(), &wanted("1.0"));
    host.join(&gateway, &[]).expect_success();
    let run_all = |version: &str| {
        host.wait_for_status(&format!("all to run {version}"), SOON * 4, |status| {
            let agents = status["agents"].as_array().expect("a list");
            let as_wanted = |agent: &&Value| agent["version"] == version && agent["state"] == "running";
            agents.iter().filter(as_wanted).count() == AGENTS
        })
    };
    // A script is "running" before it has executed its first line.
    let noted = |lines: usize| {
        wait_for(&format!("{lines} lines of the scripts"), SOON * 4, || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            (text.lines().count() >= lines).then_some(text)
        })
    };
    run_all("1.0");
    noted(AGENTS);
    fs::write(&log, "").expect("it can be written");
    let manager_log = host.home().join("log/spm.log");
    let logged = fs::read_to_string(&manager_log).expect("it can be read").len();
    gateway.want(&wanted("2.0"));
    run_all("2.0");
    let lines = noted(2 * AGENTS);
    let count = |what: &str| lines.lines().filter(|line| line.split(' ').nth(1) == Some(what)).count();
    assert_eq!((count("down"), count("up")), (AGENTS, AGENTS), "each was down once");
    // By the manager's log: a script executes its first line some time after it has been started.
    let (mut down, mut most) = (0, 0);
    for line in fs::read_to_string(&manager_log).expect("it can be read")[logged..].lines() {
        if line.contains("a sub-agent's state changed") {
            down += i64::from(line.contains("from=\"running\"")) - i64::from(line.contains("to=\"running\""));
            most = most.max(down);
        }
    }
    assert!(down == 0 && most > 0, "{down} are down at the end, and at most {most} were");
    assert!(most <= AT_ONCE, "{most} were down at the same time");
}
