//! A disk that blocks: the manager's event loop waits for no disk and no lock.
//!
//! strace(1) records the system calls of the manager's main thread, and delays those of its other threads that write to the disk.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::command;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::processes::signal;
use crate::support::wait::wait_for;

/// The deadline for ten upgrades of sub-agents under strace on a busy machine.
const ALL_DONE: Duration = Duration::from_secs(90);
/// The watchdog kills a manager that does not reply for 45 seconds.
const LONGER_THAN_A_HANG: Duration = Duration::from_secs(75);
/// System calls that wait for a disk, or for the holder of a lock.
const WAITING: &str =
    "fsync,fdatasync,sync,syncfs,unlink,unlinkat,rmdir,link,linkat,sendfile,copy_file_range,flock,truncate,ftruncate";

#[test]
fn the_managers_event_loop_makes_no_blocking_disk_or_lock_call() {
    let names: Vec<String> = (0..10).map(|number| format!("agent-{number}")).collect();
    let versions = ["1.0", "2.0", "3.0"];
    let packages: Vec<Package> =
        versions.iter().flat_map(|version| names.iter().map(move |name| Package::sleeper(name, version))).collect();
    let wanted = |count: usize, version: &'static str| -> Vec<(&str, &str, &str)> {
        names.iter().take(count).map(|name| (name.as_str(), version, "")).collect()
    };
    let gateway = Gateway::with(&packages.iter().collect::<Vec<_>>(), &wanted(10, "1.0"));
    let host = TestHost::joined(&gateway);
    all_run(&host, 10, "1.0");
    let manager = host.role_pid("spm").expect("it runs");
    let calls = host.beside("calls");
    // Only the main thread.
    let traced = Traced::attach(manager, &["-e", &format!("trace={WAITING},clone,clone3"), "-o"], &calls);
    for version in &versions[1..] {
        gateway.want(&wanted(10, version));
        all_run(&host, 10, version);
    }
    gateway.want(&wanted(8, "3.0"));
    all_run(&host, 8, "3.0");
    for name in &names[8..] {
        wait_for("its files to go", SOON, || {
            fs::symlink_metadata(host.home().join("agents").join(name)).is_err().then_some(())
        });
    }
    traced.end();
    assert_eq!(host.role_pid("spm"), Some(manager));
    let calls = fs::read_to_string(&calls).expect("strace wrote it");
    let (starts, waiting): (Vec<&str>, Vec<&str>) =
        calls.lines().filter(|line| line.contains('(')).partition(|line| line.starts_with("clone"));
    assert!(starts.len() >= 20, "it was not the main thread that was traced: {starts:?}");
    assert_eq!(waiting, Vec::<&str>::new(), "the main thread waits for a disk");
}

#[test]
fn slow_syncs_delay_only_writes() {
    let packages =
        [Package::sleeper("changed", "1.0"), Package::sleeper("changed", "2.0"), Package::sleeper("untouched", "1.0")];
    let gateway = Gateway::with(&packages.each_ref(), &[("changed", "1.0", ""), ("untouched", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    let (changed, untouched) = (host.wait_for_agent("changed"), host.wait_for_agent("untouched"));
    let manager = host.role_pid("spm").expect("it runs");
    let calls = host.beside("calls");
    let slow = ["-f", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_enter=20s", "-o"];
    let traced = Traced::attach(manager, &slow, &calls);
    gateway.want(&[("changed", "2.0", ""), ("untouched", "1.0", "")]);
    let (began, mut answers) = (Instant::now(), vec![]);
    while began.elapsed() < LONGER_THAN_A_HANG {
        let asked = Instant::now();
        let status = host.status();
        answers.push(asked.elapsed());
        // A manager that does not reply has neither a pid in its status nor sub-agents.
        assert_eq!(pid(&status["spm"]["pid"]), Some(manager), "{status:#}");
        let agent = agent(&status, "untouched").unwrap_or_else(|| panic!("the manager does not answer: {status:#}"));
        assert_eq!(pid(&agent["pid"]), Some(untouched));
    }
    // Some replies may be late on a busy machine; a loop that waits for the disk would delay all of them.
    answers.sort();
    assert!(answers[answers.len() / 2] < Duration::from_secs(1), "{answers:?}");
    wait_for("a sync to be delayed", SOON, || {
        fs::read_to_string(&calls).ok().filter(|calls| calls.contains("DELAYED")).map(drop)
    });
    traced.end();
    host.wait_for_new_pid("changed", changed);
    assert_eq!(host.wait_for_agent("untouched"), untouched);
}

#[track_caller]
fn all_run(host: &TestHost, count: usize, version: &str) {
    host.wait_for_status(&format!("{count} to run {version}"), ALL_DONE, |status| {
        let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
        agents.len() == count
            && agents
                .iter()
                .all(|agent| agent["version"] == version && agent["state"] == "running" && pid(&agent["pid"]).is_some())
    });
}

/// A process under strace, until this is dropped.
struct Traced(Child);

impl Traced {
    #[track_caller]
    fn attach(pid: u32, arguments: &[&str], output: &std::path::Path) -> Traced {
        let mut command = Command::new("strace");
        command.args(["-qq"]).args(arguments).arg(output).arg("-p").arg(pid.to_string());
        let strace = command.stdout(Stdio::null()).spawn().expect("cannot run strace: apt-get install strace");
        wait_for("strace to attach", SOON, || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().to_owned();
            (tracer == strace.id().to_string()).then_some(())
        });
        Traced(strace)
    }

    /// Detaches from the process.
    fn end(mut self) {
        signal(self.0.id(), Signal::TERM);
        assert!(command::wait(&mut self.0, SOON).is_some(), "strace does not end");
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
