//! Adoption: a manager that dies at any point leaves every sub-agent running; the next one finds each, duplicates none and loses none.
//!
//! strace(1) delays, fails or kills at a system call, in the manager and in the child that becomes a sub-agent.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::sub_agents::supervision::without_manager as without_manager_for_a_while;
use crate::support::command;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::processes::{children, groups, is_alive, marked, signal};
use crate::support::wait::{try_for, wait_for};

const NAMES: [&str; 3] = ["one", "two", "three"];
/// The delay, in microseconds, in which a child is found between fork and exec.
const DELAY: &str = "delay_enter=1500000";
/// A manager under strace that lives this long after it is ready will not be killed.
const SURVIVED: Duration = Duration::from_secs(2);
/// More steps than any start has.
const MOST_STEPS: u32 = 40;

#[test]
fn a_manager_killed_at_any_step_of_a_start_neither_duplicates_nor_loses_a_sub_agent() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let mut before = up(&host);
    let mut died = 0;
    // The fork of a child, renames, every write of a log line and of a part of a record, in the manager and in the child.
    for (call, most) in [("clone3", 1), ("rename", MOST_STEPS), ("write", MOST_STEPS)] {
        for n in 1..=most {
            let kill = format!("{call}:signal=KILL:when={n}");
            let spa = without_manager(&host, || host.kill(before["one"]));
            let mut traced = trace(&host, &[&kill]);
            let survived = wait_for("its end, or the start of all", SOON, || {
                let ended = command::wait(&mut traced.strace, Duration::ZERO).map(|_| false);
                ended
                    .or_else(|| traced.manager().is_none().then_some(false))
                    .or_else(|| all_run(&host.status()).then_some(true))
            });
            let survived = survived && try_for(SURVIVED, || traced.manager().is_none().then_some(())).is_none();
            if let Some(manager) = traced.manager() {
                host.kill(manager);
            }
            died += u32::from(!survived);
            signal(spa, Signal::CONT);
            let after = up(&host);
            for name in ["two", "three"] {
                assert_eq!(after[name], before[name], "{name} after {kill}");
            }
            assert_ne!(after["one"], before["one"], "{kill}");
            traced.end();
            assert_eq!(up(&host), after, "{kill}");
            before = after;
            if survived {
                break;
            }
        }
    }
    assert!(died >= 8, "it died at {died} steps alone");
}

#[test]
fn a_child_between_fork_and_exec_is_adopted_and_not_duplicated() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let mut before = up(&host);
    // Before its first call; before its record is renamed into place; before it executes its program.
    for step in ["setsid", "umask", "dup2,dup3", "chdir", "execve"] {
        let spa = without_manager(&host, || host.kill(before["one"]));
        let mut traced = trace(&host, &[&format!("{step}:{DELAY}")]);
        let (manager, child) = wait_for("the child", SOON, || {
            let manager = traced.manager()?;
            Some((manager, children(manager).into_iter().next()?))
        });
        host.kill(manager);
        // The watchdog starts the next manager while the child has not executed its program.
        signal(spa, Signal::CONT);
        let after = up(&host);
        assert_eq!(after["one"], child, "at {step}");
        assert_eq!((after["two"], after["three"]), (before["two"], before["three"]), "at {step}");
        traced.end();
        assert_eq!(up(&host), after, "at {step}");
        before = after;
    }
}

#[test]
fn a_child_that_dies_before_exec_leaves_nothing() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let mut before = up(&host);
    for step in ["setsid", "chdir"] {
        let spa = without_manager(&host, || host.kill(before["one"]));
        let mut traced = trace(&host, &[&format!("{step}:signal=KILL")]);
        host.wait_for_status("the failed start to show", SOON, |status| {
            agent(status, "one").is_some_and(|agent| agent["lastError"].to_string().contains("killed before"))
        });
        assert_eq!(marked(&host.home(), "one"), Vec::<u32>::new());
        host.kill(traced.manager().expect("it lives"));
        signal(spa, Signal::CONT);
        let after = up(&host);
        assert_eq!((after["two"], after["three"]), (before["two"], before["three"]), "at {step}");
        traced.end();
        before = after;
    }
}

#[test]
fn without_pidfd_and_clone3_deaths_adoption_and_stops_are_handled() {
    let gateway = gateway();
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let spa = without_manager(&host, || host.kill(before["one"]));
    let old = ["pidfd_open:error=ENOSYS", "pidfd_send_signal:error=ENOSYS", "clone3:error=ENOSYS"];
    let mut traced = trace(&host, &old);
    // Otherwise the watchdog would start another.
    wait_for("its role", SOON, || traced.manager().filter(|_| answers(&host, &traced)));
    signal(spa, Signal::CONT);
    let after = up(&host);
    assert_eq!((after["two"], after["three"]), (before["two"], before["three"]));
    assert_eq!(host.role_pid("spm"), traced.manager());
    // One was started without them, and one was adopted.
    for name in ["one", "two"] {
        host.kill(after[name]);
        host.wait_for_new_pid(name, after[name]);
    }
    let last = up(&host);
    assert_eq!(last["three"], after["three"]);
    host.control(&["restart", "three"]).expect_success();
    host.wait_for_new_pid("three", last["three"]);
    up(&host);
    host.control(&["stop"]).expect_success();
    assert_eq!(command::wait(&mut traced.strace, SOON), Some(100));
    assert_eq!(host.processes(), []);
}

#[test]
fn after_both_roles_died_running_sub_agents_are_kept_and_dead_ones_are_reported_and_restarted() {
    let packages = [
        Package::script("one", "1.0", "trap 'echo told; exit 0' TERM; while :; do echo tick; sleep 0.1; done", ""),
        Package::sleeper("two", "1.0"),
        Package::sleeper("three", "1.0"),
    ];
    let gateway = Gateway::with(&packages.each_ref(), &NAMES.map(|name| (name, "1.0", "")));
    let host = TestHost::joined(&gateway);
    let before = up(&host);
    let spa = without_manager(&host, || host.kill(before["two"]));
    host.kill(spa);
    wait_for("the watchdog's end", SOON, || (!is_alive(spa)).then_some(()));
    let log = host.home().join("log/agents/one.log");
    let lines = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    // Its log needs no manager.
    let first = lines();
    wait_for("its output to go on", SOON, || (lines() > first + 5).then_some(()));

    host.control(&["start"]).expect_success();
    let after = up(&host);
    assert_eq!((after["one"], after["three"]), (before["one"], before["three"]));
    assert_ne!(after["two"], before["two"]);
    wait_for("the death to be reported to the gateway", SOON, || {
        let status = gateway.status();
        let events = status["hosts"][0]["events"].as_array()?;
        let exits: Vec<_> = events.iter().filter(|event| event["kind"] == "exit").collect();
        (exits.len() == 1 && exits[0]["agent"] == "two").then_some(())
    });
    let second = lines();
    wait_for("its output to go on", SOON, || (lines() > second + 5).then_some(()));
    // Supervised: it is restarted at once.
    host.kill(after["three"]);
    host.wait_for_new_pid("three", after["three"]);
    // Stopped with its own script.
    host.control(&["stop"]).expect_success();
    assert_eq!(host.processes(), []);
    assert!(fs::read_to_string(&log).unwrap_or_default().ends_with("told\n"));
}

#[test]
fn a_process_moved_out_of_its_cgroup_is_neither_lost_nor_duplicated() {
    let packages = [
        Package::script("one", "1.0", "sleep 1000003 & sleep 1000000", ""),
        Package::control_sleeper("two", "1.0"),
        Package::sleeper("three", "1.0"),
    ];
    let gateway = Gateway::with(&packages.each_ref(), &NAMES.map(|name| (name, "1.0", "")));
    let host = TestHost::joined(&gateway);
    let before = up_each(&host);
    // As the session of `su -` and `systemd-run --scope` do.
    let elsewhere = ForeignCgroup::beside(&groups(&host.home())[0]);
    let all = |name| wait_for("its processes", SOON, || Some(marked(&host.home(), name)).filter(|all| !all.is_empty()));
    let first = wait_for("its tree", SOON, || Some(all("one")).filter(|all| all.len() == 3));
    elsewhere.take(&first);
    elsewhere.take(&all("two"));
    without_manager_for_a_while(&host, || {});
    assert_eq!(up_each(&host), before);

    host.control(&["restart", "one"]).expect_success();
    host.wait_for_new_pid("one", before["one"]);
    assert!(first.iter().all(|pid| !is_alive(*pid)), "{first:?}");
    host.kill(before["two"]);
    host.wait_for_new_pid("two", before["two"]);
    let status = host.wait_for_status("all three", SOON, all_run);
    assert_eq!(agent(&status, "two").expect("it exists")["restarts"], 1, "by its death alone: {status}");

    elsewhere.take(&all("one"));
    elsewhere.take(&all("two"));
    host.control(&["stop"]).expect_success();
    assert_eq!(host.processes(), []);
}

#[test]
fn a_running_process_of_another_release_is_replaced_by_the_ordered_one() {
    let script = "trap 'echo told; exit 0' TERM; while :; do sleep 0.1; done";
    let packages = ["1.0", "2.0"].map(|version| Package::script("one", version, script, ""));
    let gateway = Gateway::with(&packages.each_ref(), &[("one", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    host.wait_for_agent("one");
    gateway.want(&[("one", "2.0", "")]);
    host.wait_for_status("the update", SOON, |status| {
        agent(status, "one").is_some_and(|agent| agent["version"] == "2.0" && agent["state"] == "running")
    });
    let second = host.wait_for_agent("one");
    let told = || {
        fs::read_to_string(host.home().join("log/agents/one.log"))
            .unwrap_or_default()
            .lines()
            .filter(|line| *line == "told")
            .count()
    };
    assert_eq!(told(), 1);
    without_manager_for_a_while(&host, || {
        fs::remove_file(host.home().join("run/agents/one.json")).expect("its record");
        // Without the ledger the link names the active release.
        fs::remove_file(host.home().join("state/releases.json")).expect("the ledger");
        fs::remove_file(host.home().join("agents/one/current")).expect("its link");
        std::os::unix::fs::symlink("1.0", host.home().join("agents/one/current")).expect("another link");
    });
    let third = host.wait_for_new_pid("one", second);
    assert!(!is_alive(second));
    assert_eq!(told(), 2, "it was stopped as it asks for");
    let status = host.status();
    assert_eq!(agent(&status, "one").expect("it exists")["version"], "2.0", "{status}");
    assert_eq!(marked(&host.home(), "one").into_iter().filter(|pid| leads(*pid)).collect::<Vec<_>>(), [third]);
}

#[test]
fn a_reinstalled_sub_agent_starts_after_its_leftover_processes_have_ended() {
    let host = TestHost::new();
    let last_words = host.beside("last-words");
    let script =
        format!("trap 'sleep 1; echo told >>{}; exit 0' TERM; while :; do sleep 0.1; done", last_words.display());
    let package = Package::script("one", "1.0", &script, "gracePeriod = \"10s\"");
    let gateway = Gateway::with(&[&package], &[("one", "1.0", "")]);
    host.join(&gateway, &[]).expect_success();
    let first = host.wait_for_agent("one");
    without_manager_for_a_while(&host, || {
        fs::remove_dir_all(host.home().join("agents/one")).expect("its releases");
        fs::remove_file(host.home().join("state/desired.json")).expect("what was wanted");
    });
    let second = host.wait_for_new_pid("one", first);
    assert!(!is_alive(first));
    assert_eq!(fs::read_to_string(last_words).expect("it was stopped as it asks for"), "told\n");
    let record = fs::read(host.home().join("run/agents/one.json")).expect("its record is the new one's");
    let record: Value = serde_json::from_slice(&record).expect("a record");
    assert_eq!(record["pid"], second);
}

fn gateway() -> Gateway {
    let packages = NAMES.map(|name| Package::sleeper(name, "1.0"));
    Gateway::with(&packages.each_ref(), &NAMES.map(|name| (name, "1.0", "")))
}

/// Kills the manager while a new watchdog, which has seen no death of a manager, is stopped. Runs `meanwhile` without a manager.
#[track_caller]
fn without_manager(host: &TestHost, meanwhile: impl FnOnce()) -> u32 {
    host.control(&["restart"]).expect_success();
    up(host);
    let (spm, spa) = (host.role_pid("spm").expect("a manager"), host.role_pid("spa").expect("a watchdog"));
    signal(spa, Signal::STOP);
    host.kill(spm);
    wait_for("the manager's end", SOON, || (!is_alive(spm)).then_some(()));
    meanwhile();
    spa
}

/// The pid of each of the three, when all run.
#[track_caller]
fn up_each(host: &TestHost) -> BTreeMap<&'static str, u32> {
    NAMES.into_iter().map(|name| (name, host.wait_for_agent(name))).collect()
}

/// A cgroup that is not ours.
pub(crate) struct ForeignCgroup(pub(crate) PathBuf);

impl ForeignCgroup {
    pub(crate) fn beside(group: &Path) -> ForeignCgroup {
        let name = group.file_name().and_then(OsStr::to_str).expect("a cgroup has a name");
        let path = group.with_file_name(format!("elsewhere-{name}"));
        fs::create_dir(&path).expect("a cgroup can be created");
        ForeignCgroup(path)
    }

    fn take(&self, pids: &[u32]) {
        for pid in pids {
            fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("a process can be moved");
        }
    }
}

impl Drop for ForeignCgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        try_for(SOON, || fs::remove_dir(&self.0).ok());
    }
}

fn all_run(status: &Value) -> bool {
    NAMES.iter().all(|name| agent(status, name).is_some_and(|agent| agent["state"] == "running"))
}

/// Waits until all three run, each once and as its own session leader, and returns their pids.
#[track_caller]
fn up(host: &TestHost) -> BTreeMap<&'static str, u32> {
    let status =
        host.wait_for_status("all three to run", SOON, |status| status["state"] == "running" && all_run(status));
    let one = |name: &'static str| Some((name, pid(&agent(&status, name)?["pid"])?));
    let pids: BTreeMap<_, _> = NAMES.into_iter().filter_map(one).collect();
    for (name, pid) in &pids {
        let leaders: Vec<u32> = marked(&host.home(), name).into_iter().filter(|pid| leads(*pid)).collect();
        assert_eq!(leaders, [*pid], "{name}");
    }
    pids
}

fn leads(pid: u32) -> bool {
    let session = rustix::process::Pid::from_raw(pid as i32).and_then(|pid| rustix::process::getsid(Some(pid)).ok());
    session.is_some_and(|session| session.as_raw_nonzero().get() as u32 == pid)
}

/// A manager under strace.
struct Traced {
    strace: Child,
}

fn trace(host: &TestHost, injections: &[&str]) -> Traced {
    let mut command = host.command("strace".as_ref());
    command.args(["-f", "-qq", "-I2", "-o", "/dev/null"]);
    for injection in injections {
        command.arg(format!("--inject={injection}"));
    }
    let strace = command
        .arg("--")
        .arg(host.home().join("bin/aops-spm"))
        .arg("--home")
        .arg(host.home())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("cannot run strace");
    Traced { strace }
}

impl Traced {
    fn manager(&self) -> Option<u32> {
        children(self.strace.id()).into_iter().next()
    }

    /// Detaches from processes that it still traces.
    fn end(&mut self) {
        signal(self.strace.id(), Signal::TERM);
        assert!(command::wait(&mut self.strace, SOON).is_some(), "strace does not end");
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// Whether the manager under strace replies on its control socket.
fn answers(host: &TestHost, traced: &Traced) -> bool {
    let status = host.status();
    status["spm"]["uptimeSeconds"].is_u64() && pid(&status["spm"]["pid"]) == traced.manager()
}
