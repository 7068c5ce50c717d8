//! The two roles without a service manager: each restarts the other, sub-agents survive both, a stop is final until a start, and each role
//! has one process.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::sub_agents::supervision::without_manager;
use crate::support::command;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::processes::signal;
use crate::support::wait::{try_for, wait_for};

/// A restart would happen within this time: a role restarts the other at once, and a dead sub-agent is restarted at once.
const QUIET: Duration = Duration::from_secs(3);
/// Three unanswered pings of 15 s, and the one before them.
const HANG: Duration = Duration::from_secs(120);
/// Longer than a hung role lives.
const STANDSTILL: Duration = Duration::from_secs(70);
/// The deadline of a stop whose roles have to be killed one after the other.
const HARD_STOP: Duration = Duration::from_secs(60);

const NAMES: [&str; 3] = ["native", "stubborn", "classic"];

/// A gateway that orders three sub-agents: one, one that ignores its stop signal for 3 s, and one with a `control` script.
fn gateway() -> Gateway {
    let packages = [
        Package::sleeper("native", "1.0"),
        Package::script("stubborn", "1.0", "trap '' TERM; while :; do sleep 1; done", "gracePeriod = \"3s\""),
        Package::control_sleeper("classic", "1.0"),
    ];
    Gateway::with(&packages.each_ref(), &NAMES.map(|name| (name, "1.0", "")))
}

#[test]
fn a_killed_manager_is_restarted_and_adopts_every_sub_agent() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (spm, spa) = roles(&host);
    host.kill(spm);
    let status = host.wait_for_status("the next manager", SOON, |status| {
        status["spm"]["restarts"] == 1 && status["state"] == "running"
    });
    assert_ne!(pid(&status["spm"]["pid"]), Some(spm));
    assert_eq!(pid(&status["spa"]["pid"]), Some(spa));
    assert_eq!(status["spa"]["restarts"], 0);
    assert_eq!(up(&host), before);

    // An adopted sub-agent is supervised like any other.
    for name in ["native", "classic"] {
        host.kill(before[name]);
        host.wait_for_new_pid(name, before[name]);
        let status = host.status();
        assert_eq!(agent(&status, name).expect("it exists")["restarts"], 1, "{status:#}");
    }

    // One loses its record and one dies while no manager runs.
    let before = up(&host);
    without_manager(&host, || {
        fs::remove_file(host.home().join("run/agents/native.json")).expect("its record");
        host.kill(before["stubborn"]);
    });
    host.wait_for_new_pid("stubborn", before["stubborn"]);
    let after = up(&host);
    assert_eq!((after["native"], after["classic"]), (before["native"], before["classic"]));
    let status = host.status();
    assert_eq!(agent(&status, "stubborn").expect("it exists")["restarts"], 1, "{status:#}");
    wait_for("the death to be reported to the gateway", SOON, || {
        let status = gateway.status();
        let events = status["hosts"][0]["events"].as_array()?;
        let told = events.iter().any(|event| {
            event["agent"] == "stubborn" && event["message"].to_string().contains("while no manager was running")
        });
        told.then_some(())
    });
    one_of_each(&host);
}

#[test]
fn a_killed_watchdog_is_restarted() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (spm, spa) = roles(&host);
    for restarts in 1..=2 {
        host.kill(host.role_pid("spa").expect("a watchdog"));
        host.wait_for_status("the next watchdog", SOON, |status| {
            status["spa"]["restarts"] == restarts && status["state"] == "running"
        });
    }
    assert_eq!(roles(&host).0, spm);
    assert_ne!(roles(&host).1, spa);
    assert_eq!(up(&host), before);
    // The restarted watchdog restarts the manager.
    host.kill(spm);
    host.wait_for_status("the next manager", SOON, |status| status["spm"]["restarts"] == 1);
    assert_eq!(up(&host), before);
    one_of_each(&host);
}

#[test]
fn a_start_after_both_roles_died_adopts_every_sub_agent_once() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (spm, spa) = roles(&host);
    signal(spa, Signal::STOP);
    host.kill(spm);
    host.kill(spa);
    wait_for("the end of both", SOON, || (!host.is_alive(spm) && !host.is_alive(spa)).then_some(()));
    assert_eq!(host.status()["state"], "degraded");
    // Two operators at the same time.
    std::thread::scope(|scope| {
        let starts = [0, 1].map(|_| scope.spawn(|| host.control(&["start"])));
        for start in starts {
            start.join().expect("it does not panic").expect_success();
        }
    });
    assert_eq!(up(&host), before);
    one_of_each(&host);
}

#[test]
fn a_stop_signal_or_restart_replaces_the_roles_and_keeps_the_sub_agents() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (mut spm, mut spa) = roles(&host);
    for (role, number) in [("spm", spm), ("spa", spa)] {
        signal(number, Signal::TERM);
        host.wait_for_status(&format!("{role} to be back"), SOON, |status| {
            pid(&status[role]["pid"]).is_some_and(|new| new != number) && status["state"] == "running"
        });
    }
    for _ in 0..2 {
        (spm, spa) = roles(&host);
        let began = Instant::now();
        host.control(&["restart"]).expect_success();
        assert!(began.elapsed() < Duration::from_secs(12), "a role had to be killed: {:?}", began.elapsed());
        let new = roles(&host);
        assert!(new.0 != spm && new.1 != spa, "{new:?}");
    }
    assert_eq!(up(&host), before);
    let status = host.status();
    for role in ["spm", "spa"] {
        assert_eq!(status[role]["restarts"], 0, "nothing died: {status:#}");
    }
    for name in NAMES {
        assert_eq!(agent(&status, name).expect("it exists")["restarts"], 0, "{status:#}");
    }
    one_of_each(&host);
    // One sub-agent alone.
    host.control(&["restart", "native"]).expect_success();
    host.wait_for_new_pid("native", before["native"]);
    host.control(&["restart", "nobody"]).expect_code(1);
}

#[test]
fn a_restart_that_is_killed_leaves_a_role_that_restarts_the_other() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (_, spa) = roles(&host);
    // When the watchdog has exited, before the next manager is started.
    let mut command = host.command("strace".as_ref());
    command.args(["-qq", "-o", "/dev/null", "--inject=clone,clone3,fork,vfork:signal=KILL:when=1", "--"]);
    command.arg(host.home().join("bin/aops")).args(["control", "restart", "--home"]).arg(host.home());
    let status = command.status().expect("cannot run strace");
    assert!(!status.success(), "{status}");
    host.wait_for_status("both roles", SOON, |status| {
        pid(&status["spm"]["pid"]).is_some() && pid(&status["spa"]["pid"]).is_some_and(|new| new != spa)
    });
    assert_eq!(up(&host), before);
    one_of_each(&host);
}

#[test]
fn a_hung_role_is_killed_and_restarted_by_the_other() {
    let gateway = gateway();
    let hosts = ["spm", "spa"].map(|role| {
        let host = TestHost::joined(&gateway);
        let before = up(&host);
        let hung = host.role_pid(role).expect("it runs");
        signal(hung, Signal::STOP);
        (host, role, hung, before)
    });
    let output = hosts[0].0.control(&["status", "--json"]).expect_code(0);
    assert_eq!(output.json()["state"], "degraded", "{output}");
    for (host, role, hung, before) in &hosts {
        wait_for(&format!("the hung {role} to be killed"), HANG, || (!host.is_alive(*hung)).then_some(()));
        let status = host.wait_for_status(&format!("{role} to be back"), SOON, |status| status["state"] == "running");
        assert_eq!(status[role]["restarts"], 1, "{status:#}");
        assert_eq!(&up(host), before);
        one_of_each(host);
    }
}

#[test]
fn a_simultaneous_pause_of_both_roles_kills_neither() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (spm, spa) = roles(&host);
    for role in [spm, spa] {
        signal(role, Signal::STOP);
    }
    let ended = try_for(STANDSTILL, || (!host.is_alive(spm) || !host.is_alive(spa)).then_some(()));
    assert_eq!(ended, None);
    // The watchdog is the one that would treat the other's silence as a hang first.
    for role in [spm, spa] {
        signal(role, Signal::CONT);
    }
    let ended = try_for(QUIET, || (!host.is_alive(spm) || !host.is_alive(spa)).then_some(()));
    assert_eq!(ended, None, "{:#}", host.status());
    assert_eq!((roles(&host), up(&host)), ((spm, spa), before));
    // They supervise again.
    host.kill(spm);
    host.wait_for_status("the next manager", SOON, |status| status["spm"]["restarts"] == 1);
    one_of_each(&host);
}

#[test]
fn a_repeatedly_killed_watchdog_is_restarted_with_back_off() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    up(&host);
    let mut pauses = vec![];
    for _ in 0..4 {
        let (_, spa) = roles(&host);
        host.wait_for_status("the watchdog's connection", SOON, |status| status["state"] == "running");
        let killed = Instant::now();
        host.kill(spa);
        wait_for("the next watchdog", SOON, || {
            processes_of(&host, "aops-spa").iter().any(|pid| *pid != spa).then_some(())
        });
        pauses.push(killed.elapsed());
    }
    // Almost at once; then after 1, 2 and 4 s.
    assert!(pauses[0] < Duration::from_secs(1), "{pauses:?}");
    assert!(pauses[1..].is_sorted(), "{pauses:?}");
    for (pause, seconds) in pauses[1..].iter().zip([1, 2, 4]) {
        let pause = pause.as_secs_f64();
        assert!(pause > f64::from(seconds) * 0.95 && pause < f64::from(seconds) + 3.0, "{pauses:?}");
    }
    one_of_each(&host);
}

#[test]
fn one_death_of_the_manager_is_counted_once() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let mut pauses = vec![];
    for _ in 0..20 {
        // Roles that have seen no death yet.
        host.control(&["restart"]).expect_success();
        up(&host);
        host.wait_for_status("the check", SOON, |status| status["state"] == "running");
        let (spm, _) = roles(&host);
        let killed = Instant::now();
        host.kill(spm);
        wait_for("the next manager", SOON, || role_holder(&host, "spm").filter(|pid| *pid != spm));
        pauses.push(killed.elapsed());
    }
    // The delay after a second death is 1 s longer than a restart takes on this machine, which may be slow once.
    pauses.sort();
    let usual = pauses[2];
    let late = pauses.iter().filter(|pause| **pause > usual + Duration::from_millis(900)).count();
    assert!(late < 2, "{pauses:?}");
    up(&host);
    one_of_each(&host);
}

#[test]
fn a_manager_that_hangs_before_it_opens_its_control_socket_is_killed() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (spm, spa) = roles(&host);
    signal(spa, Signal::STOP);
    host.kill(spm);
    wait_for("its end", SOON, || (!host.is_alive(spm)).then_some(()));
    // A process that has the role's lock and no control socket, as far as the watchdog can see.
    let mut mute = role_by_hand(&host, "aops-spm");
    let socket = host.home().join("run/spm.sock");
    wait_for("its role", SOON, || role_holder(&host, "spm").filter(|pid| *pid == mute.id()));
    signal(mute.id(), Signal::STOP);
    let _ = fs::remove_file(&socket);
    signal(spa, Signal::CONT);
    let code = command::wait(&mut mute, HANG);
    assert_eq!(code, Some(128 + 9));
    host.wait_for_status("the next manager", SOON, |status| status["state"] == "running");
    assert_eq!(up(&host), before);
    one_of_each(&host);
}

#[test]
fn after_a_stop_nothing_runs_until_a_start() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    // With a sub-agent that was just killed and is being restarted.
    host.kill(before["native"]);
    host.control(&["stop"]).expect_success();
    stays_stopped(&host);
    host.control(&["stop"]).expect_success();
    // Not even a manually started role.
    let mut by_hand = role_by_hand(&host, "aops-spm");
    assert_eq!(command::wait(&mut by_hand, SOON), Some(100));
    stays_stopped(&host);

    host.control(&["start"]).expect_success();
    let after = up(&host);
    assert!(after.iter().all(|(name, pid)| before[name] != *pid));
    // A start of a running home changes nothing.
    let old = roles(&host);
    host.control(&["start"]).expect_success();
    assert_eq!((roles(&host), up(&host)), (old, after));
}

#[test]
fn removed_directories_do_not_prevent_a_start() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    up(&host);
    host.control(&["stop"]).expect_success();
    for directory in ["log", "run", "cache", "staging"] {
        fs::remove_dir_all(host.home().join(directory)).expect("it is ours");
    }
    host.control(&["start"]).expect_success();
    up(&host);
    for (directory, mode) in [("log", 0o700), ("log/agents", 0o700), ("run", 0o700), ("cache", 0o700)] {
        let metadata = fs::metadata(host.home().join(directory)).expect("it is created again");
        assert_eq!(metadata.permissions().mode() & 0o7777, mode, "{directory}");
    }
}

#[test]
fn a_stop_during_a_restart_is_honoured() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    for n in 0..6 {
        up(&host);
        let (spm, spa) = roles(&host);
        // Both, either, and at moments before and after the restart begins.
        if n % 3 != 1 {
            host.kill(spm);
        }
        if n % 3 != 0 {
            host.kill(spa);
        }
        if n > 2 {
            try_for(Duration::from_millis(30 * n), || {
                (host.role_pid("spm").is_some_and(|pid| pid != spm)).then_some(())
            });
        }
        host.control(&["stop"]).expect_success();
        stays_stopped(&host);
        host.control(&["start"]).expect_success();
    }
    up(&host);
    one_of_each(&host);
}

#[test]
fn a_stop_works_with_hung_and_dead_roles() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let stop = |what: &str| {
        let began = Instant::now();
        host.control(&["stop"]).expect_success();
        assert!(began.elapsed() < HARD_STOP, "{what}: {:?}", began.elapsed());
        stays_stopped(&host);
        host.control(&["start"]).expect_success();
        up(&host);
    };

    up(&host);
    let (spm, spa) = roles(&host);
    signal(spa, Signal::STOP);
    host.kill(spm);
    wait_for("the manager's end", SOON, || (!host.is_alive(spm)).then_some(()));
    stop("a dead manager and a hung watchdog");

    let (spm, spa) = roles(&host);
    signal(spm, Signal::STOP);
    host.kill(spa);
    stop("a hung manager and a dead watchdog");

    let (spm, spa) = roles(&host);
    signal(spa, Signal::STOP);
    host.kill(spm);
    host.kill(spa);
    wait_for("the end of both", SOON, || (!host.is_alive(spm) && !host.is_alive(spa)).then_some(()));
    stop("nothing but sub-agents");
}

#[test]
fn a_stop_is_completed_when_the_manager_dies_during_it() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (spm, _) = roles(&host);
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| host.control(&["stop"]));
        // One sub-agent has exited, and one takes its 3 s.
        wait_for("the stop to be under way", SOON, || (!host.is_alive(before["native"])).then_some(()));
        assert!(host.is_alive(before["stubborn"]));
        host.kill(spm);
        stop.join().expect("it does not panic").expect_success();
    });
    stays_stopped(&host);
    host.control(&["start"]).expect_success();
    up(&host);
    one_of_each(&host);
}

#[test]
fn a_download_does_not_delay_a_stop() {
    let packages = [
        Package::script("slow", "1.0", "trap '' TERM; while :; do sleep 1; done", "gracePeriod = \"4s\""),
        Package::sleeper("slow", "2.0"),
        Package::sleeper("other", "1.0"),
    ];
    let other = ("other", "1.0", "");
    let gateway = Gateway::with(&packages.each_ref(), &[("slow", "1.0", ""), other]);
    let host = TestHost::joined(&gateway);
    host.wait_for_agent("slow");
    gateway.want(&[("slow", "2.0", ""), other]);
    host.wait_for_status("the old one to be ending", SOON, |status| {
        agent(status, "slow").is_some_and(|agent| agent["state"] == "updating" && agent["version"] == "1.0")
            && host.home().join("agents/slow/2.0/.complete").exists()
    });
    host.control(&["stop"]).expect_success();
    stays_stopped(&host);
    host.control(&["start"]).expect_success();
    host.wait_for_status("the new version", SOON, |status| {
        agent(status, "slow").is_some_and(|agent| agent["state"] == "running" && agent["version"] == "2.0")
    });
}

#[test]
fn a_second_manager_or_watchdog_changes_nothing() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let old = roles(&host);
    let mut seconds = ["aops-spm", "aops-spa"].map(|role| role_by_hand(&host, role));
    for second in &mut seconds {
        assert_eq!(command::wait(second, SOON), Some(1));
    }
    assert_eq!((roles(&host), up(&host)), (old, before));

    // Two at the same instant, without a running one.
    host.crash();
    let mut both = [0, 1].map(|_| role_by_hand(&host, "aops-spm"));
    up(&host);
    let mut lost = None;
    wait_for("one of the two to give up", SOON, || {
        lost = both.iter_mut().position(|child| child.try_wait().expect("it is our child").is_some());
        lost
    });
    let won = &both[1 - lost.expect("it was waited for")];
    assert_eq!(roles(&host).0, won.id());
    one_of_each(&host);
    host.control(&["stop"]).expect_success();
    for child in &mut both {
        command::wait(child, SOON);
    }
}

#[test]
fn a_second_endpoint_is_used_when_the_first_fails() {
    let mut gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let (url, conf) = (gateway.url().to_owned(), host.home().join("etc/conf.toml"));
    let settings = fs::read_to_string(&conf).expect("the settings");
    let changed: String = settings
        .lines()
        .map(|line| match line.starts_with("heartbeatSrv") {
            true => format!("heartbeatSrv = [\"https://127.0.0.1:1\", \"{url}\"]\n"),
            false => format!("{line}\n"),
        })
        .collect();
    assert_ne!(settings, changed);
    gateway.stop();
    host.wait_for_status("the loss to show", SOON, |status| status["gateway"]["connected"] == false);
    fs::write(&conf, changed).expect("the settings can be written");
    gateway.run();
    let status = host.wait_for_status("the second endpoint", SOON, |status| status["gateway"]["connected"] == true);
    assert_eq!(status["gateway"]["endpoint"].as_str().map(|shown| shown.trim_end_matches('/')), Some(&*url));
    // From then on the desired state comes from the second endpoint.
    gateway.want(&[("native", "1.0", ""), ("stubborn", "1.0", ""), ("classic", "1.0", "cmd = \"stop\"")]);
    host.wait_for_status("a new desired state", SOON, |status| {
        agent(status, "classic").is_some_and(|agent| agent["state"] == "stopped")
    });
    assert_eq!(host.wait_for_agent("native"), before["native"]);
}

/// Waits until all three sub-agents run, and returns their pids.
#[track_caller]
fn up(host: &TestHost) -> BTreeMap<&'static str, u32> {
    let running = |status: &Value, name: &str| {
        agent(status, name).filter(|agent| agent["state"] == "running").and_then(|agent| pid(&agent["pid"]))
    };
    let status = host.wait_for_status("the three to run", SOON, |status| {
        NAMES.iter().all(|name| running(status, name).is_some()) && pid(&status["spa"]["pid"]).is_some()
    });
    NAMES.iter().filter_map(|name| Some((*name, running(&status, name)?))).collect()
}

/// The pids of manager and watchdog, once both run.
#[track_caller]
fn roles(host: &TestHost) -> (u32, u32) {
    let status = host.wait_for_status("both roles", SOON, |status| {
        pid(&status["spm"]["pid"]).is_some() && pid(&status["spa"]["pid"]).is_some()
    });
    (pid(&status["spm"]["pid"]).expect("a pid"), pid(&status["spa"]["pid"]).expect("a pid"))
}

/// No role and no sub-agent runs twice. A process that lost a role's lock takes some seconds to give up.
#[track_caller]
fn one_of_each(host: &TestHost) {
    let mut seen = BTreeMap::new();
    let single = try_for(SOON, || {
        seen.clear();
        for role in ["spm", "spa"] {
            seen.insert(role, host.processes_of_role(role).len());
        }
        for name in NAMES {
            let leads = |pid: u32| {
                rustix::process::getsid(rustix::process::Pid::from_raw(pid as i32))
                    .map(|sid| sid.as_raw_nonzero().get() as u32)
                    == Ok(pid)
            };
            let own = host.processes_of_agent(name);
            // A `control` sub-agent is not a session leader, and has one process.
            let has_one = name == "classic" || host.is_windows();
            seen.insert(name, if has_one { own.len() } else { own.into_iter().filter(|pid| leads(*pid)).count() });
        }
        (seen.len() == 5 && seen.values().all(|count| *count == 1)).then_some(())
    });
    assert!(single.is_some(), "not one of each: {seen:?} of {:?}", host.processes());
}

/// Nothing runs, `status` reports it, and it stays so for a while.
#[track_caller]
fn stays_stopped(host: &TestHost) {
    let output = host.control(&["status", "--json"]).expect_code(3);
    assert_eq!(output.json()["state"], "stopped", "{output}");
    let back = try_for(QUIET, || Some(host.processes()).filter(|left| !left.is_empty()));
    assert_eq!(back, None);
}

/// Starts a role by its name in `bin`, as an operator might.
fn role_by_hand(host: &TestHost, role: &str) -> Child {
    let mut command = host.command(&host.home().join("bin").join(role));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("cannot run it")
}

/// The processes that run a role's program.
fn processes_of(host: &TestHost, role: &str) -> Vec<u32> {
    let program = host.home().join("bin").join(role).display().to_string();
    let all = host.processes().into_iter();
    all.filter(|process| process.command.starts_with(&program)).map(|process| process.pid).collect()
}

/// The pid in a role's record.
fn role_holder(host: &TestHost, role: &str) -> Option<u32> {
    let record = fs::read(host.home().join(format!("run/{role}.json"))).ok()?;
    pid(&serde_json::from_slice::<Value>(&record).ok()?["pid"])
}
