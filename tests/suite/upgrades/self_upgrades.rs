//! Upgrades of the manager: on trial under the watchdog of the previous release, committed when proven. Sub-agents keep their processes,
//! whatever the result.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, pid};
use crate::support::package::Package;
use crate::support::processes::{signal, zombies};
use crate::support::release::{self, NAME};
use crate::support::wait::{try_for, wait_for};

/// A trial of five seconds, the watchdog's checks, and the delays of a busy machine.
pub(crate) const ENDED: Duration = Duration::from_secs(180);

/// A gateway that offers these releases and 1.0.0, and a host that runs 1.0.0 and two sub-agents.
pub(crate) fn host_with(releases: &[&Package]) -> (Gateway, TestHost) {
    let agents = [Package::sleeper("one", "1"), Package::control_sleeper("two", "1")];
    let gateway = Gateway::with(&agents.iter().chain(releases.iter().copied()).collect::<Vec<_>>(), &[]);
    order(&gateway, "1.0.0");
    let host = TestHost::new();
    host.join(&gateway, &["--version", "1.0.0"]).expect_success();
    shorten_trial(&host);
    agents_of(&host);
    (gateway, host)
}

fn shorten_trial(host: &TestHost) {
    let path = host.home().join("etc/conf.toml");
    let text = fs::read_to_string(&path).expect("it exists");
    // The time for the first answer is twice as long; programs start slowly under Wine.
    let trial = if host.is_windows() { "20s" } else { "5s" };
    fs::write(&path, format!("{text}\nupgradeTrial = \"{trial}\"\n")).expect("the home is ours");
}

/// Orders a release of the manager.
pub(crate) fn order(gateway: &Gateway, version: &str) {
    gateway.fleet(&format!(
        "heartbeatInterval = \"1s\"\nmanager.version = {version:?}\nagents.one.version = \"1\"\nagents.two.version = \"1\"\n"
    ));
}

/// The pids of both sub-agents.
pub(crate) fn agents_of(host: &TestHost) -> [u32; 2] {
    ["one", "two"].map(|name| host.wait_for_agent(name))
}

/// A manager of that release runs, and no upgrade is in progress.
pub(crate) fn runs(status: &Value, version: &str) -> bool {
    status["version"] == version
        && pid(&status["spm"]["pid"]).is_some()
        && pid(&status["spa"]["pid"]).is_some()
        && status["upgrade"] == Value::Null
}

#[track_caller]
pub(crate) fn wait_for_release(host: &TestHost, version: &str) -> Value {
    host.wait_for_status(&format!("the manager's release {version}"), ENDED, |status| runs(status, version))
}

#[track_caller]
fn wait_for_trial(host: &TestHost, version: &str) -> Value {
    host.wait_for_status(&format!("the trial of {version}"), ENDED, |status| {
        // The deadline counts from the new manager's first answer to the watchdog.
        let upgrade = &status["upgrade"];
        let is_on_trial = upgrade["to"] == version && upgrade["phase"] == "trial" && status["version"] == version;
        is_on_trial && upgrade["deadline"].is_string()
    })
}

/// Kind, outcome and release of each entry of the manager's history.
pub(crate) fn outcomes(host: &TestHost) -> Vec<String> {
    let history = host.control(&["status", "--history", "--json"]).json();
    let own = history["history"].as_array().expect("a list").iter().filter(|changed| changed["agent"] == NAME);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    own.map(|changed| format!("{} {} {}", text(&changed["kind"]), text(&changed["outcome"]), text(&changed["to"])))
        .collect()
}

/// Waits until the history has these entries: the manager writes them after it has read the record.
#[track_caller]
pub(crate) fn expect_outcomes(host: &TestHost, expected: &[&str]) {
    let found = try_for(SOON, || (outcomes(host) == expected).then_some(()));
    assert!(found.is_some(), "{:?}", outcomes(host));
}

/// A program of the home.
fn read(host: &TestHost, name: &str) -> Vec<u8> {
    fs::read(host.program(name)).expect("it exists")
}

/// Every link of the executable leads to `bin/aops`, which has the bytes of this release.
#[track_caller]
pub(crate) fn expect_in_place(host: &TestHost, executable: &[u8]) {
    let home = host.home();
    assert!(read(host, "bin/aops") == executable, "bin/aops belongs to another release");
    for (name, target) in [
        ("bin/aops-spm", "aops"),
        ("bin/aops-spa", "aops"),
        ("bin/aops-agent-service", "aops"),
        ("control", "bin/aops"),
    ] {
        if host.is_windows() {
            assert!(read(host, name) == executable, "{name} belongs to another release");
        } else {
            assert_eq!(fs::read_link(home.join(name)).expect("a link"), std::path::Path::new(target), "{name}");
        }
    }
    let left: Vec<_> =
        fs::read_dir(home.join("staging")).expect("a directory").flatten().map(|entry| entry.file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!home.join("state/upgrade.reserve").exists());
}

#[test]
fn a_good_release_is_committed_and_can_be_rolled_back() {
    let (gateway, host) = host_with(&[&release::good("2.0.0")]);
    let before = agents_of(&host);
    let first = read(&host, "bin/aops");
    order(&gateway, "2.0.0");
    let status = wait_for_trial(&host, "2.0.0");
    assert_eq!(
        (&status["upgrade"]["from"], &status["upgrade"]["triesLeft"]),
        (&"1.0.0".into(), &3.into()),
        "{status:#}"
    );
    wait_for_release(&host, "2.0.0");
    expect_in_place(&host, &release::executable("2.0.0"));
    assert!(read(&host, "bin/aops.prev") == first);
    expect_outcomes(&host, &["upgrade ok 2.0.0"]);
    wait_for("the gateway to receive it", SOON, || {
        let status = gateway.status().to_string();
        (status.contains("upgraded from 1.0.0 to 2.0.0")).then_some(())
    });
    assert_eq!(agents_of(&host), before);

    // The operator's rollback holds until the gateway orders another release.
    host.control(&["rollback"]).expect_success();
    let status = wait_for_release(&host, "1.0.0");
    assert_eq!(status["heldByOperator"], true, "{status:#}");
    expect_in_place(&host, &first);
    expect_outcomes(&host, &["upgrade ok 2.0.0", "upgrade ok 1.0.0"]);
    let last = |status: &Value| status["gateway"]["lastHeartbeat"].as_str().map(str::to_owned);
    let then = last(&status);
    host.wait_for_status("later heartbeats", SOON, |status| last(status) > then);
    wait_for_release(&host, "1.0.0");
    host.control(&["upgrade"]).expect_success();
    let status = wait_for_release(&host, "2.0.0");
    assert_eq!(status["heldByOperator"], Value::Null, "{status:#}");
    assert_eq!(agents_of(&host), before);

    // Each manager exited on purpose, and the watchdog, which keeps its pid, has waited for each.
    assert_eq!((&status["spm"]["restarts"], &status["spa"]["restarts"]), (&0.into(), &0.into()), "{status:#}");
    let watchdog = pid(&status["spa"]["pid"]).expect("it runs");
    wait_for("the watchdog to reap the managers that it started", SOON, || zombies(watchdog).is_empty().then_some(()));
}

#[test]
fn a_release_with_identical_bytes_is_a_separate_release() {
    let (gateway, host) = host_with(&[&release::with_executable("1.0.1", release::tested())]);
    let before = agents_of(&host);
    order(&gateway, "1.0.1");
    wait_for_release(&host, "1.0.1");
    expect_outcomes(&host, &["upgrade ok 1.0.1"]);
    order(&gateway, "1.0.0");
    wait_for_release(&host, "1.0.0");
    assert_eq!(agents_of(&host), before);
}

#[test]
fn an_operator_commits_or_rolls_back_a_trial_and_upgrades_from_a_file() {
    let (gateway, host) = host_with(&[&release::good("2.0.0"), &release::good("3.0.0")]);
    let before = agents_of(&host);
    let refused = host.control(&["upgrade", "--abort"]).expect_code(1);
    assert!(refused.stderr.contains("no upgrade of the manager is under way"), "{refused}");
    order(&gateway, "2.0.0");
    wait_for_trial(&host, "2.0.0");
    host.control(&["upgrade", "--abort"]).expect_success();
    let status = host.wait_for_status("the roll back", ENDED, |status| {
        runs(status, "1.0.0") && status["problems"].to_string().contains("2.0.0 failed and is skipped")
    });
    assert_eq!(status["state"], "degraded");
    expect_outcomes(&host, &["rollback ok 1.0.0", "skip ok 2.0.0"]);

    host.control(&["retry", NAME]).expect_success();
    wait_for_trial(&host, "2.0.0");
    host.control(&["upgrade", "--commit"]).expect_success();
    wait_for_release(&host, "2.0.0");
    let again = host.control(&["upgrade", "--commit"]).expect_code(1);
    assert!(again.stderr.contains("no upgrade of the manager is under way"), "{again}");

    // Offline, from a file with its signature beside it.
    let package = fs::read_dir(gateway.path("depot")).expect("a directory").flatten().map(|entry| entry.path());
    let package = package.into_iter().find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("aops-spm-3.0.0") && name.ends_with(".tar.zst")
    });
    let package = package.expect("it was published").display().to_string();
    host.control(&["upgrade", "--package", &package]).expect_success();
    let status = wait_for_release(&host, "3.0.0");
    assert_eq!((&status["heldByOperator"], agents_of(&host)), (&true.into(), before));
    let missing = host.control(&["upgrade", "--package", "/nowhere/aops-spm-4.tar.zst"]).expect_code(1);
    assert!(missing.stderr.contains("/nowhere/aops-spm-4.tar.zst"), "{missing}");
}

#[test]
fn an_installation_during_a_trial_ends_the_trial_first() {
    let (gateway, host) = host_with(&[&release::good("2.0.0"), &release::good("3.0.0")]);
    let before = agents_of(&host);
    order(&gateway, "2.0.0");
    wait_for_trial(&host, "2.0.0");
    order(&gateway, "3.0.0");
    let output = host.install(&["--version", "3.0.0"]);
    assert!(output.success() && output.text().contains("finishing the manager's upgrade to 2.0.0"), "{output}");
    wait_for_release(&host, "3.0.0");
    expect_in_place(&host, &release::executable("3.0.0"));
    assert_eq!(agents_of(&host), before);
}

#[test]
fn a_trial_is_paused_by_a_stop_and_continues_after_a_start() {
    let (gateway, host) = host_with(&[&release::good("2.0.0")]);
    order(&gateway, "2.0.0");
    wait_for_trial(&host, "2.0.0");
    host.control(&["stop"]).expect_success();
    assert!(host.processes().is_empty(), "{:?}", host.processes());
    host.control(&["start"]).expect_success();
    wait_for_release(&host, "2.0.0");
    expect_outcomes(&host, &["upgrade ok 2.0.0"]);
    agents_of(&host);
}

#[test]
fn a_trial_without_a_gateway_stays_unproven_until_the_gateway_is_back() {
    let (mut gateway, host) = host_with(&[&release::good("2.0.0")]);
    let before = agents_of(&host);
    order(&gateway, "2.0.0");
    host.wait_for_status("the upgrade to begin", ENDED, |status| status["upgrade"]["to"] == "2.0.0");
    // It may already have received an answer to a heartbeat; a new manager has to receive its own.
    wait_for_trial(&host, "2.0.0");
    gateway.stop();
    let manager = host.role_pid("spm").expect("it runs");
    host.kill(manager);
    let status = host.wait_for_status("the trial to be unproven", ENDED, |status| {
        pid(&status["spm"]["pid"]).is_some_and(|pid| pid != manager) && status["upgrade"]["phase"] == "unproven"
    });
    assert_eq!(status["version"], "2.0.0", "{status:#}");
    assert_eq!(outcomes(&host), Vec::<String>::new());
    gateway.run();
    wait_for_release(&host, "2.0.0");
    expect_outcomes(&host, &["upgrade ok 2.0.0"]);
    assert_eq!(agents_of(&host), before);
}

/// The random seed of a scenario: `AOPS_UPGRADE_SEED`, or a new one each time.
#[allow(clippy::print_stderr, reason = "a failure is to be repeated by it")]
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("AOPS_UPGRADE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("AOPS_UPGRADE_SEED={seed}");
    seed
}

/// Kills both roles at moments counted from the order.
#[track_caller]
fn killed_at_points(points: usize, number: u64) {
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(number));
    let bad = release::bad_manager("3.0.0", &release::real().display().to_string(), "exit 1");
    let (gateway, host) = host_with(&[&release::good("2.0.0"), &bad]);
    let before = agents_of(&host);
    let mut current = "1.0.0";
    for point in 0..points {
        let other = if current == "1.0.0" { "2.0.0" } else { "1.0.0" };
        let ordered = if point % 2 == 1 { "3.0.0" } else { other };
        wait_for("both roles", SOON, || host.role_pid("spm").and(host.role_pid("spa")));
        order(&gateway, ordered);
        // The switch takes a second, the trial of a good release fifteen.
        let most = if rng.bool() { 3_000 } else { 18_000 };
        let moment = Duration::from_millis(rng.u64(0..most));
        let _ = try_for(moment, || None::<()>);
        let roles = ["spm", "spa"].map(|role| running(&host, role));
        let killed = match rng.u32(0..3) {
            0 => &roles[..1],
            1 => &roles[1..],
            _ => &roles[..],
        };
        killed.iter().flatten().for_each(|pid| host.kill(*pid));
        host.control(&["start"]);
        if ordered != "3.0.0" {
            current = ordered;
        }
        let told =
            format!("AOPS_UPGRADE_SEED={seed}, number {number}, point {point}, {moment:?}: {current} after {ordered}");
        host.wait_for_status(&told, ENDED, |status| {
            let is_skipped = status["problems"].to_string().contains("3.0.0 failed and is skipped");
            runs(status, current) && is_skipped == (ordered == "3.0.0")
        });
        assert_eq!(agents_of(&host), before, "{told}");
        // It may be retried once.
        host.control(&["retry", NAME]).expect_success();
        order(&gateway, current);
        host.wait_for_status(&told, ENDED, |status| runs(status, current) && status["state"] == "running");
    }
}

/// The pid in a role's record: `status` needs a running manager.
fn running(host: &TestHost, role: &str) -> Option<u32> {
    let text = fs::read_to_string(host.home().join(format!("run/{role}.json"))).ok()?;
    let record: Value = serde_json::from_str(&text).ok()?;
    let pid = pid(&record["pid"])?;
    host.processes().iter().any(|process| process.pid == pid).then_some(pid)
}

/// On four hosts in parallel: each mostly waits for a trial.
#[test]
fn a_self_upgrade_completes_when_roles_are_killed_at_any_moment() {
    std::thread::scope(|scope| {
        for number in 0..4 {
            scope.spawn(move || killed_at_points(10, number));
        }
    });
}

#[test]
fn a_watchdog_that_is_killed_while_no_manager_runs_strands_no_host() {
    let (gateway, host) = host_with(&[&release::good("2.0.0")]);
    let before = agents_of(&host);
    let (manager, watchdog) = (running(&host, "spm").expect("it runs"), running(&host, "spa").expect("it runs"));
    // So that it does not start the next manager.
    signal(watchdog, Signal::STOP);
    order(&gateway, "2.0.0");
    wait_for("the manager to exit", ENDED, || (running(&host, "spm") != Some(manager)).then_some(()));
    host.kill(watchdog);
    wait_for_release(&host, "2.0.0");
    expect_in_place(&host, &release::executable("2.0.0"));
    assert_eq!(agents_of(&host), before);
}

#[test]
fn a_new_endpoint_is_on_trial_with_its_release() {
    let other = Gateway::with(&[], &[]);
    let ca = fs::read_to_string(other.path("tls/cert.pem")).expect("it was created");
    let moving = |version: &str, url: &str| {
        let settings = format!("heartbeatSrv = {url:?}\ncaCert = \"etc/other.pem\"\n");
        release::good(version).with_file("etc/endpoint.toml", settings, 0o644).with_file("etc/other.pem", &ca, 0o644)
    };
    let nobody = "https://127.0.0.1:1";
    let (gateway, host) = host_with(&[&moving("2.0.0", nobody), &moving("3.0.0", other.url())]);
    let before = agents_of(&host);
    let settings = || fs::read_to_string(host.home().join("etc/conf.toml")).expect("it exists");
    let unmoved = settings();
    order(&gateway, "2.0.0");
    let status = host.wait_for_status("the release with an unreachable endpoint to be rolled back", ENDED, |status| {
        runs(status, "1.0.0") && status["problems"].to_string().contains("could not send a heartbeat")
    });
    assert_eq!(status["gateway"]["endpoint"], gateway.url(), "{status:#}");
    assert_eq!(settings(), unmoved);
    order(&gateway, "3.0.0");
    wait_for_release(&host, "3.0.0");
    let is_moved =
        |status: &Value| status["gateway"]["endpoint"] == other.url() && status["gateway"]["connected"] == true;
    host.wait_for_status("the other gateway", SOON, is_moved);
    assert!(settings().contains(other.url()) && settings().contains("upgradeTrial"), "{}", settings());
    host.control(&["restart"]).expect_success();
    host.wait_for_status("the other gateway after a restart", SOON, is_moved);
    // Its list is empty, which removes nothing.
    assert_eq!(agents_of(&host), before);
}
