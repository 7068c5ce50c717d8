//! Sub-agents in the desired state: run, restarted, changed, stopped, removed; each by its own rules, and independent of the others.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::aops;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::processes::environment;
use crate::support::wait::wait_for;

/// The deadline for a fleet of 25 to start on a busy machine.
const ALL_UP: Duration = Duration::from_secs(90);
/// Two housekeeping runs of the manager, in which it checks logs and settings.
const LOOKED_AFTER: Duration = Duration::from_secs(60);

#[test]
fn twenty_native_and_five_classic_sub_agents_run_and_restart_also_without_the_gateway() {
    let native: Vec<Package> = (0..20).map(|n| Package::sleeper(&format!("native-{n}"), "1.0")).collect();
    let classic: Vec<Package> = (0..5).map(|n| Package::control_sleeper(&format!("classic-{n}"), "2.0")).collect();
    let packages: Vec<&Package> = native.iter().chain(&classic).collect();
    let wanted: Vec<_> = packages.iter().map(|package| (package.name(), package.version(), "")).collect();
    let mut gateway = Gateway::with(&packages, &wanted);
    let host = TestHost::joined(&gateway);
    let before = all_run(&host, 25);
    assert_eq!(host.status()["state"], "running");

    for name in ["native-7", "classic-3"] {
        host.kill(before[name]);
        host.wait_for_new_pid(name, before[name]);
        let status = host.status();
        assert_eq!(agent(&status, name).expect("it exists")["restarts"], 1, "{status:#}");
    }
    let restarted = all_run(&host, 25);
    for (name, pid) in &before {
        assert_eq!(restarted[name] == *pid, !["native-7", "classic-3"].contains(&name.as_str()), "{name}");
    }
    wait_for("both exits to be reported to the gateway", SOON, || {
        (events(&gateway).iter().filter(|event| event["kind"] == "exit").count() == 2).then_some(())
    });

    gateway.stop();
    let cut_off = host.wait_for_status("the loss of the gateway to show", SOON, |status| {
        status["gateway"]["connected"] == false && status["gateway"]["lastHeartbeat"].is_string()
    });
    assert_eq!(pids(&cut_off), restarted, "losing the gateway changes nothing");

    host.crash();
    host.control(&["status"]).expect_code(3);
    host.control(&["start"]).expect_success();
    let again = all_run(&host, 25);
    assert!(again.iter().all(|(name, pid)| restarted[name] != *pid));
    for name in again.keys() {
        assert_eq!(host.processes_of_agent(name).len(), 1, "one process of {name}");
    }
    assert_eq!(host.status()["gateway"]["connected"], false);

    gateway.run();
    host.wait_for_status("the gateway to be found again", SOON, |status| status["gateway"]["connected"] == true);
    assert_eq!(all_run(&host, 25), again, "finding it again changes nothing either");
}

#[test]
fn a_sub_agent_is_stopped_started_and_removed_as_ordered() {
    let packages = [
        Package::script("kept", "1.0", "echo up; exec sleep 1000000", ""),
        Package::script("paused", "1.0", "echo up; exec sleep 1000000", ""),
        Package::script("dropped", "1.0", "echo up; sleep 1000000 & exec sleep 1000000", ""),
        Package::control("classic", "1.0", "echo up; exec sleep 1000000"),
    ];
    let all = packages.each_ref();
    let gateway = Gateway::with(&all, &all.map(|package| (package.name(), "1.0", "")));
    let host = TestHost::joined(&gateway);
    let before = all_run(&host, 4);

    gateway.want(&[("kept", "1.0", ""), ("paused", "1.0", "cmd = \"stop\"")]);
    let status = host.wait_for_status("two to go and one to stop", SOON, |status| {
        agent(status, "dropped").is_none()
            && agent(status, "classic").is_none()
            && agent(status, "paused").is_some_and(|agent| agent["state"] == "stopped" && agent["pid"].is_null())
    });
    assert_eq!(status["state"], "running", "a stop that is wanted is no trouble: {status:#}");
    for name in ["dropped", "classic"] {
        assert_eq!(host.processes_of_agent(name), Vec::<u32>::new());
        for left in ["agents/NAME", "run/agents/NAME.json", "log/agents/NAME.log"] {
            let path = host.home().join(left.replace("NAME", name));
            assert!(fs::symlink_metadata(&path).is_err(), "{} is left", path.display());
        }
    }
    assert!(host.home().join("agents/paused/1.0/.complete").exists());
    assert!(!host.is_alive(before["paused"]));
    assert_eq!(pids(&status)["kept"], before["kept"]);

    gateway.want(&[("kept", "1.0", ""), ("paused", "1.0", "")]);
    host.wait_for_agent("paused");
    assert_eq!(pids(&host.status())["kept"], before["kept"]);
}

#[test]
fn a_changed_environment_restarts_the_sub_agent_and_a_rejected_variable_is_reported() {
    let packages = [
        Package::script(
            "native",
            "1.0",
            "exec sleep 1000000",
            "envAllow = [\"PYTHONPATH\"]\n[env]\nOWN = \"1\"\nCOLOUR = \"own\"",
        ),
        Package::control_sleeper("classic", "1.0"),
    ];
    let env = |text: &str| format!("env = {{ {text} }}");
    let first = env(r#"COLOUR = "red", LD_PRELOAD = "/tmp/evil.so", PYTHONPATH = "/x", AOPS_HOME = "/y""#);
    let gateway = Gateway::with(
        &packages.each_ref(),
        &[("native", "1.0", &first), ("classic", "1.0", &env(r#"COLOUR = "red""#))],
    );
    let host = TestHost::joined(&gateway);
    let before = all_run(&host, 2);
    let native = environment(before["native"]);
    let home = format!("AOPS_HOME={}", host.home().display());
    for set in ["COLOUR=red", "OWN=1", "PYTHONPATH=/x", "AOPS_AGENT_NAME=native", "AOPS_AGENT_VERSION=1.0", &home] {
        assert!(native.iter().any(|variable| variable == set), "{set} of {native:?}");
    }
    let endpoint = format!("AOPS_ENDPOINT={}", gateway.url());
    assert!(native.contains(&format!("AOPS_AGENT_ID={}", host.agent_id())) && native.contains(&endpoint), "{native:?}");
    assert!(!native.iter().any(|variable| variable.starts_with("LD_")), "{native:?}");
    let status = host.status();
    let error = agent(&status, "native").expect("it exists")["lastError"].to_string();
    assert!(error.contains("LD_PRELOAD") && error.contains("AOPS_HOME") && !error.contains("PYTHONPATH"), "{error}");
    wait_for("the gateway to receive it", SOON, || {
        events(&gateway).iter().any(|event| event["kind"] == "env" && event["outcome"] == "refused").then_some(())
    });

    let blue = env(r#"COLOUR = "blue""#);
    gateway.want(&[("native", "1.0", &blue), ("classic", "1.0", &blue)]);
    for name in ["native", "classic"] {
        let new = host.wait_for_new_pid(name, before[name]);
        assert!(environment(new).contains(&"COLOUR=blue".to_owned()), "{:?}", environment(new));
        assert_eq!(host.processes_of_agent(name), [new]);
    }
    let status = host.status();
    for name in ["native", "classic"] {
        let agent = agent(&status, name).expect("it exists");
        assert_eq!((&agent["restarts"], &agent["lastError"]), (&0.into(), &Value::Null), "{status:#}");
    }
}

#[test]
fn a_new_version_is_staged_before_the_old_one_is_stopped() {
    // When the old release is stopped, it logs whether the new one is already unpacked.
    let tells = "trap 'ls ../2.0/.complete >>\"$AOPS_HOME/../seen-$AOPS_AGENT_NAME\" 2>&1; exit 0' TERM\nwhile :; do sleep 1000000 & wait; done";
    let packages = [
        Package::script("native", "1.0", tells, "gracePeriod = \"20s\""),
        Package::sleeper("native", "2.0"),
        Package::control("classic", "1.0", tells),
        Package::control_sleeper("classic", "2.0"),
        Package::sleeper("other", "1.0"),
    ];
    let other = ("other", "1.0", "");
    let gateway = Gateway::with(&packages.each_ref(), &[("native", "1.0", ""), ("classic", "1.0", ""), other]);
    let host = TestHost::joined(&gateway);
    let before = all_run(&host, 3);

    gateway.want(&[("native", "2.0", ""), ("classic", "2.0", ""), other]);
    host.wait_for_status("the new versions to run", SOON * 4, |status| {
        ["native", "classic"].iter().all(|name| {
            agent(status, name).is_some_and(|agent| agent["version"] == "2.0" && agent["state"] == "running")
        })
    });
    let after = all_run(&host, 3);
    for name in ["native", "classic"] {
        assert!(!host.is_alive(before[name]));
        assert_eq!(host.processes_of_agent(name), [after[name]]);
        assert!(environment(after[name]).contains(&"AOPS_AGENT_VERSION=2.0".to_owned()));
        let seen = fs::read_to_string(host.beside(&format!("seen-{name}"))).expect("the old one was asked to stop");
        assert_eq!(seen.trim(), "../2.0/.complete");
        assert_eq!(
            fs::read_link(host.home().join(format!("agents/{name}/current"))).expect("a link"),
            PathBuf::from("2.0")
        );
    }
    assert_eq!(after["other"], before["other"]);
}

#[test]
fn a_stop_kills_the_whole_tree_even_processes_that_ignore_it() {
    let stubborn =
        "trap '' TERM; (trap '' TERM; while :; do sleep 1; done) & setsid sleep 1000000 & while :; do sleep 1; done";
    let packages = [
        Package::script("stubborn", "1.0", stubborn, "gracePeriod = \"1s\""),
        Package::script("left", "1.0", "setsid sleep 1000000 & exit 0", "restart = \"never\""),
        Package::script(
            "signalled",
            "1.0",
            "trap 'echo TERM >>../../../../signals' TERM\ntrap 'echo USR1 >>../../../../signals; exit 0' USR1\nwhile :; do sleep 1000000 & wait; done",
            "stopSignal = \"USR1\"",
        ),
    ];
    let wanted = |more| [("stubborn", "1.0", more), ("left", "1.0", more), ("signalled", "1.0", more)];
    let gateway = Gateway::with(&packages.each_ref(), &wanted(""));
    let host = TestHost::joined(&gateway);
    let old = host.wait_for_agent("stubborn");
    host.wait_for_agent("signalled");
    wait_for("their children", SOON, || {
        (host.processes_of_agent("stubborn").len() >= 4 && host.processes_of_agent("left").len() == 1).then_some(())
    });

    // The next manager does not adopt leftovers of a dead one.
    let spm = host.role_pid("spm");
    host.control(&["restart"]).expect_success();
    let status = host.wait_for_status("the next manager", SOON, |status| {
        status["state"] == "running" && pid(&status["spm"]["pid"]).is_some() && pid(&status["spm"]["pid"]) != spm
    });
    let left = agent(&status, "left").expect("it exists");
    assert_eq!((pid(&left["pid"]), left["state"] == "running"), (None, false), "{status:#}");
    assert_eq!(host.processes_of_agent("left").len(), 1);

    // The next process starts after the last leftover has ended.
    let of_old = host.processes_of_agent("stubborn");
    host.kill(old);
    host.wait_for_new_pid("stubborn", old);
    assert!(of_old.iter().all(|pid| !host.is_alive(*pid)));

    gateway.want(&wanted("cmd = \"stop\""));
    let began = Instant::now();
    host.wait_for_status("all to be stopped", SOON, |status| {
        status["agents"]
            .as_array()
            .is_some_and(|all| all.len() == 3 && all.iter().all(|agent| agent["state"] == "stopped"))
            && host.processes_of_agent("left").is_empty()
            && host.processes_of_agent("stubborn").is_empty()
    });
    assert!(began.elapsed() >= Duration::from_secs(1), "its grace period was not waited for");
    assert_eq!(fs::read_to_string(host.beside("signals")).expect("it had its signal"), "USR1\n");
}

#[test]
fn programs_started_by_a_deployment_agent_are_neither_stopped_nor_adopted() {
    // One that is identified only by its cgroup, and one with every marker.
    let script = "env -i setsid sleep 1000001 & sleep 1000002 & while :; do sleep 1; done";
    let package = Package::script("deploy", "1.0", script, "killMode = \"process\"");
    let gateway = Gateway::with(&[&package], &[("deploy", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    let others = |count: usize| {
        wait_for("the programs of others", SOON, || {
            let found: Vec<u32> = host
                .processes()
                .iter()
                .filter(|process| ["sleep 1000001", "sleep 1000002"].contains(&process.command.as_str()))
                .map(|process| process.pid)
                .collect();
            (found.len() == count).then_some(found)
        })
    };
    let first = host.wait_for_agent("deploy");
    let customers = others(2);

    gateway.want(&[("deploy", "1.0", "cmd = \"stop\"")]);
    host.wait_for_status("its stop", SOON, |status| {
        agent(status, "deploy").is_some_and(|agent| agent["state"] == "stopped" && agent["pid"].is_null())
    });
    assert!(!host.is_alive(first));
    // A manager that finds them adopts none of them.
    host.kill(host.role_pid("spm").expect("it runs"));
    host.wait_for_status("the next manager", SOON, |status| {
        status["spm"]["restarts"] == 1 && agent(status, "deploy").is_some_and(|agent| agent["state"] == "stopped")
    });
    assert_eq!(others(2), customers);
    host.control(&["stop"]).expect_success();
    host.control(&["status"]).expect_code(3);
    assert_eq!(others(2), customers);

    host.control(&["start"]).expect_success();
    gateway.want(&[("deploy", "1.0", "")]);
    let second = host.wait_for_agent("deploy");
    let customers = others(4);
    // Found by its marker if the record is lost, among all processes with that marker.
    without_manager(&host, || {
        fs::remove_file(host.home().join("run/agents/deploy.json")).expect("its record");
    });
    assert_eq!(host.wait_for_agent("deploy"), second);
    assert!(host.home().join("run/agents/deploy.json").exists(), "the record is written again");
    host.kill(second);
    let third = host.wait_for_new_pid("deploy", second);
    assert!(customers.iter().all(|pid| host.is_alive(*pid)));

    // A stop without manager and record does not kill them either.
    let customers = others(6);
    let spm = host.role_pid("spm").expect("a manager");
    host.kill(host.role_pid("spa").expect("a watchdog"));
    host.kill(spm);
    wait_for("the manager's end", SOON, || (!host.is_alive(spm)).then_some(()));
    fs::remove_file(host.home().join("run/agents/deploy.json")).expect("its record");
    host.control(&["stop"]).expect_success();
    assert!(!host.is_alive(third));
    assert_eq!(others(6), customers);
}

#[test]
fn the_restart_policy_survives_a_manager_restart() {
    let counts = "echo run >>../../../../runs-$AOPS_AGENT_NAME\n";
    let script = |rest: &str| format!("{counts}{rest}");
    let packages = [
        Package::script("never", "1.0", &script("exit 3"), "restart = \"never\""),
        Package::script("once", "1.0", &script("exit 0"), "restart = \"on-failure\""),
        Package::script(
            "retried",
            "1.0",
            &script("[ $(wc -l <../../../../runs-retried) -gt 1 ] || exit 5"),
            "restart = \"on-failure\"",
        ),
        Package::script("lasting", "1.0", &script("exec sleep 1000000"), "restart = \"never\""),
    ];
    let all = packages.each_ref();
    let gateway = Gateway::with(&all, &all.map(|package| (package.name(), "1.0", "")));
    let host = TestHost::joined(&gateway);
    let runs =
        |name: &str| fs::read_to_string(host.beside(&format!("runs-{name}"))).map_or(0, |text| text.lines().count());
    let at_rest = |restarts: u64| {
        move |status: &Value| {
            let is = |name: &str, restarts: u64, how: &str| {
                agent(status, name).is_some_and(|agent| {
                    agent["state"] == "stopped"
                        && agent["restarts"] == restarts
                        && agent["lastError"].to_string().contains(how)
                })
            };
            is("never", 0, "exited with 3")
                && is("once", 0, "exited with 0")
                && is("retried", restarts, "exited with 0")
        }
    };
    host.wait_for_status("three to stay stopped", SOON, at_rest(1));
    let lasting = host.wait_for_agent("lasting");
    let count = || ["never", "once", "retried"].map(runs);
    assert_eq!(count(), [1, 1, 2]);

    // The next manager knows their exits and does not report them again; a process that exited unobserved has exited too.
    let told = || events(&gateway).iter().filter(|event| event["kind"] == "exit").count();
    wait_for("the exits to be reported to the gateway", SOON, || (told() == 4).then_some(()));
    without_manager(&host, || host.kill(lasting));
    host.wait_for_status("the next manager", SOON, |status| status["spm"]["restarts"] == 1);
    host.wait_for_status("the unobserved exit", SOON, |status| {
        at_rest(1)(status) && agent(status, "lasting").is_some_and(|agent| agent["state"] == "stopped")
    });
    wait_for("the gateway to receive it", SOON, || {
        let unseen = events(&gateway).into_iter().any(|event| {
            event["agent"] == "lasting" && event["message"].to_string().contains("while no manager was running")
        });
        unseen.then_some(())
    });
    assert_eq!(told(), 5);
    assert_eq!((count(), runs("lasting")), ([1, 1, 2], 1));

    // An explicit start is different.
    host.control(&["stop"]).expect_success();
    host.control(&["start"]).expect_success();
    host.wait_for_agent("lasting");
    wait_for("one run more of each", SOON, || (count() == [2, 2, 3]).then_some(()));
}

#[test]
fn a_sub_agent_runs_as_the_user_that_it_names() {
    let packages = [
        Package::script("nobodys", "1.0", "id -un; exec sleep 1000000", "user = \"nobody\""),
        Package::script("strangers", "1.0", "exec sleep 1000000", "user = \"no-such-user\""),
    ];
    let gateway = Gateway::with(&packages.each_ref(), &[("nobodys", "1.0", ""), ("strangers", "1.0", "")]);
    let host = TestHost::new();
    // A temporary directory is not accessible to other users.
    fs::set_permissions(host.beside("."), fs::Permissions::from_mode(0o711)).expect("it is ours");
    host.join(&gateway, &[]).expect_success();
    let running = host.wait_for_agent("nobodys");
    assert_eq!(fs::metadata(format!("/proc/{running}")).expect("it runs").uid(), 65534);
    assert!(environment(running).contains(&"USER=nobody".to_owned()));
    wait_for("its output", SOON, || {
        host.control(&["logs", "nobodys"]).expect_success().lines().any(|line| line == "nobody").then_some(())
    });
    host.wait_for_status("the other's failure to show", SOON, |status| {
        agent(status, "strangers")
            .is_some_and(|agent| agent["state"] == "backoff" && agent["lastError"].to_string().contains("no-such-user"))
    });
}

#[test]
fn the_output_log_can_be_shown_and_followed_and_is_capped() {
    let chatty = "n=0; while :; do n=$((n+1)); echo \"line $n of some length so that a log fills up before the end of the day\"; \
                  [ $((n % 200)) -ne 0 ] || sleep 0.2; done";
    let packages = [Package::script("chatty", "1.0", chatty, ""), Package::control("classic", "1.0", "echo from its program >>/proc/self/fd/1; exec sleep 1000000")
        .with_file("control", "#!/bin/sh\ncase $1 in\nstart) echo starting; setsid sh -c 'echo its program; exec sleep 1000000' & ;;\nstatus) echo started ;;\nstop) ;;\nesac\n", 0o755)];
    let gateway = Gateway::with(&packages.each_ref(), &[("chatty", "1.0", ""), ("classic", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    let running = all_run(&host, 2)["chatty"];
    let log = host.home().join("log/agents/chatty.log");
    assert!(log.exists());
    wait_for("what the classic one says", SOON, || {
        let shown = host.control(&["logs", "classic"]).expect_success();
        (shown.contains("starting\n") && shown.contains("its program\n")).then_some(())
    });
    wait_for("two hundred lines", SOON, || {
        let shown = host.control(&["logs", "chatty", "-n", "50"]).expect_success();
        (shown.lines().count() == 50 && shown.lines().all(|line| line.starts_with("line "))).then_some(())
    });
    host.control(&["logs", "nobody-knows"]).expect_code(1);

    let mut follower = host
        .command(&aops())
        .args(["control", "logs", "chatty", "-f", "-n", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("cannot run aops");
    let (sender, numbers) = mpsc::channel();
    let stdout = follower.stdout.take().expect("it is piped");
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let number = line.split(' ').nth(1).and_then(|word| word.parse::<u64>().ok());
            let _ = sender.send(number);
        }
    });
    numbers.recv_timeout(SOON).expect("the last line");

    let conf = host.home().join("etc/conf.toml");
    let settings = fs::read_to_string(&conf).expect("the settings");
    fs::write(&conf, format!("logMaxSize = \"64KiB\"\n{settings}")).expect("the settings can be written");
    let older = host.home().join("log/agents/chatty.log.1");
    wait_for("the log to be rotated", LOOKED_AFTER, || older.exists().then_some(()));
    let inode = fs::metadata(&log).expect("the log").ino();
    wait_for("the log to be rotated again", LOOKED_AFTER, || {
        let first = fs::read_to_string(&older).ok()?;
        let number: u64 = first.split(' ').nth(1)?.parse().ok()?;
        (number > 1).then_some(())
    });
    assert_eq!(fs::metadata(&log).expect("the log").ino(), inode);
    assert_eq!(host.wait_for_agent("chatty"), running, "the sub-agent is not restarted for it");
    // `logs -f` continues across the rotation.
    let newest = || {
        let shown = host.control(&["logs", "chatty", "-n", "1"]).stdout;
        shown.split(' ').nth(1).and_then(|word| word.parse::<u64>().ok())
    };
    let target = wait_for("a line after the rotation", SOON, newest);
    wait_for("the follower to come by there", SOON, || {
        numbers.try_iter().flatten().any(|number| number >= target).then_some(())
    });
    follower.kill().expect("it is our child");
    follower.wait().expect("it is our child");
}

#[test]
fn a_sub_agent_that_crashes_or_cannot_run_does_not_affect_others() {
    let packages = [
        Package::script("crashing", "1.0", "exit 7", ""),
        Package::native("unrunnable", "1.0", &["bin/run"], "").with_file("bin/run", "#!/no/such/interpreter\n", 0o755),
        Package::control_sleeper("refusing", "1.0").with_file("control", "#!/bin/sh\nexit 9\n", 0o755),
        Package::sleeper("fine", "1.0"),
    ];
    let all = packages.each_ref();
    let gateway = Gateway::with(&all, &all.map(|package| (package.name(), "1.0", "")));
    let host = TestHost::joined(&gateway);
    let fine = host.wait_for_agent("fine");
    for (name, error) in [("crashing", "exited with 7"), ("unrunnable", "cannot run"), ("refusing", "exited with 9")] {
        let status = host.wait_for_status(&format!("{name} to wait"), SOON, |status| {
            agent(status, name).is_some_and(|agent| {
                agent["state"] == "backoff"
                    && agent["lastError"].to_string().contains(error)
                    && agent["restarts"].as_u64() >= Some(2)
            })
        });
        assert_eq!(status["state"], "degraded");
    }
    // The delays grow: there are at most six attempts within a minute.
    let status = host.wait_for_status("further tries", SOON, |status| {
        agent(status, "crashing").is_some_and(|agent| agent["restarts"].as_u64() >= Some(4))
    });
    assert_eq!(pid(&agent(&status, "fine").expect("it exists")["pid"]), Some(fine));
    assert_eq!(agent(&status, "fine").expect("it exists")["restarts"], 0);
    host.control(&["stop"]).expect_success();
    host.control(&["status"]).expect_code(3);
}

/// Waits until that many sub-agents run, and returns their pids.
#[track_caller]
fn all_run(host: &TestHost, count: usize) -> BTreeMap<String, u32> {
    let status = host.wait_for_status(&format!("{count} sub-agents to run"), ALL_UP, |status| {
        let all = status["agents"].as_array();
        all.is_some_and(|all| all.len() == count && all.iter().all(|agent| agent["state"] == "running"))
    });
    let pids = pids(&status);
    assert_eq!(pids.len(), count, "{status:#}");
    pids
}

fn pids(status: &Value) -> BTreeMap<String, u32> {
    let agents = status["agents"].as_array().into_iter().flatten();
    agents.filter_map(|agent| Some((agent["name"].as_str()?.to_owned(), pid(&agent["pid"])?))).collect()
}

/// The events that the host has reported to the gateway.
fn events(gateway: &Gateway) -> Vec<Value> {
    gateway.status()["hosts"][0]["events"].as_array().cloned().unwrap_or_default()
}

/// Runs `meanwhile` while the manager is dead; then the watchdog restarts it.
#[track_caller]
pub(crate) fn without_manager(host: &TestHost, meanwhile: impl FnOnce()) {
    use crate::support::processes::signal;
    use rustix::process::Signal;
    let (spm, spa) = (host.role_pid("spm").expect("a manager"), host.role_pid("spa").expect("a watchdog"));
    signal(spa, Signal::STOP);
    host.kill(spm);
    wait_for("the manager's end", SOON, || (!host.is_alive(spm)).then_some(()));
    meanwhile();
    signal(spa, Signal::CONT);
    host.wait_for_status("the next manager", SOON, |status| {
        pid(&status["spm"]["pid"]).is_some_and(|pid| pid != spm)
            && pid(&status["spa"]["pid"]) == Some(spa)
            && status["agents"].as_array().is_some_and(|agents| !agents.is_empty())
    });
}
