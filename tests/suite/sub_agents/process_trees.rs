//! A stop ends the whole process tree, however it tries to escape: in cgroup v2, in v1, and without cgroups.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::aops;
use crate::support::command::{LIMIT, run};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::package::Package;
use crate::support::processes::{groups, is_alive, signal};
use crate::support::wait::wait_for;

/// The cgroup hierarchy that a host's manager sees, as a script that then runs its arguments.
const V2: &str = r#"exec "$@""#;
const V1: &str = r#"mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/freezer \
    && mount -t cgroup -o freezer none /sys/fs/cgroup/freezer && exec "$@""#;
pub(crate) const NONE: &str = r#"mount -t tmpfs none /sys/fs/cgroup && exec "$@""#;

/// Escapes with a new session, an exited parent, an empty environment and ignored signals.
const DAEMON: &str = "setsid env -i /bin/sh -c \"cd /; trap '' TERM; (trap '' TERM; exec /bin/sleep @N@) & exit 0\"";
/// The same with its environment, the only marker without cgroups.
const MARKED: &str = "setsid /bin/sh -c \"cd /; trap '' TERM; (trap '' TERM; exec /bin/sleep @N@) & exit 0\"";

#[test]
fn a_process_tree_in_a_v2_cgroup_is_stopped_completely() {
    a_tree_is_stopped_completely(V2, DAEMON, "::/aops-agents-", 3_000_000);
}

#[test]
fn a_process_tree_in_a_v1_cgroup_is_stopped_completely() {
    a_tree_is_stopped_completely(V1, DAEMON, ":freezer:/aops-agents-", 3_100_000);
}

#[test]
fn a_process_tree_without_cgroups_is_stopped_by_its_environment_marker() {
    a_tree_is_stopped_completely(NONE, MARKED, "", 3_200_000);
}

fn a_tree_is_stopped_completely(place: &str, escape: &str, cgroup: &str, number: u32) {
    // Identified by the time that they sleep.
    let (number, stranger) = (number + std::process::id() % 50_000, number + 50_000 + std::process::id() % 50_000);
    let _guard = Sleepers(vec![number, stranger]);
    let script = format!("{}; trap '' TERM; while :; do sleep 1; done", escape.replace("@N@", &number.to_string()));
    let package = Package::script("hydra", "1.0", &script, "gracePeriod = \"1s\"");
    let gateway = Gateway::with(&[&package], &[("hydra", "1.0", "")]);
    let host = joined_in(place, &gateway);
    let mut other = Command::new("sleep").arg(stranger.to_string()).spawn().expect("sleep runs");

    let first = host.wait_for_agent("hydra");
    let found = fs::read_to_string(format!("/proc/{first}/cgroup")).expect("it runs");
    assert_eq!(found.contains("aops-agents-"), !cgroup.is_empty(), "{found}");
    assert!(found.contains(cgroup), "{found}");
    let escaped = wait_for("its daemon", SOON, || sleeping(number).first().copied());

    // Leftovers of a dead main process do not run beside the next one.
    host.kill(first);
    let second = host.wait_for_new_pid("hydra", first);
    assert!(!is_alive(escaped));
    let escaped = wait_for("its next daemon", SOON, || sleeping(number).first().copied());
    assert_eq!(sleeping(number), [escaped]);

    // The next manager stops all of it too.
    host.kill(host.role_pid("spm").expect("it runs"));
    host.wait_for_status("the next manager", SOON, |status| status["state"] == "running");
    assert!(is_alive(second) && is_alive(escaped));

    let began = Instant::now();
    host.control(&["stop"]).expect_success();
    assert!(began.elapsed() >= Duration::from_secs(1), "its grace period was not waited for");
    assert_eq!((is_alive(second), sleeping(number)), (false, vec![]));
    assert_eq!(groups(&host.home()), [] as [std::path::PathBuf; 0]);
    assert!(is_alive(other.id()), "a stranger is left alone");
    other.kill().expect("it can be killed");
    other.wait().expect("it can be waited for");
}

/// A host that has joined the gateway's fleet, whose manager sees the cgroups of `place`.
#[track_caller]
pub(crate) fn joined_in(place: &str, gateway: &Gateway) -> TestHost {
    let host = TestHost::new();
    let home = host.home().display().to_string();
    let mut install = Command::new("unshare");
    install.args(["--mount", "--propagation", "private", "--", "bash", "-c", place, "bash"]).arg(aops());
    install.args(["install", "--service", "none", "--home", &home, "--agent-id", host.agent_id()]);
    install.args(["--endpoint", gateway.url()]).args(gateway.trust()).env("NO_COLOR", "1");
    run(&mut install, LIMIT).expect_success();
    host
}

#[test]
fn roles_that_a_sub_agent_started_outlive_it() {
    // It starts them on a signal.
    let script = "at=$AOPS_HOME/..; while [ ! -e $at/go ]; do sleep 0.1; done
[ -e $at/done ] || { touch $at/done; $AOPS_HOME/bin/aops control restart; }
exec sleep 1000000";
    let package = Package::script("deploy", "1.0", script, "");
    let gateway = Gateway::with(&[&package], &[("deploy", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    host.wait_for_agent("deploy");
    fs::write(host.beside("go"), "").expect("it is ours");
    wait_for("the roles that it started", SOON, || {
        let log = fs::read_to_string(host.home().join("log/spm.log")).ok()?;
        log.contains("has left that sub-agent's cgroup").then_some(())
    });
    host.wait_for_status("both roles", SOON, |status| status["state"] == "running");
    let deploy = host.wait_for_agent("deploy");
    let roles = || ["spm", "spa"].map(|role| host.role_pid(role));
    let before = roles();
    for pid in before {
        let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", pid.expect("it runs"))).expect("it runs");
        assert!(!cgroup.contains("agent-deploy"), "{cgroup}");
    }
    host.kill(deploy);
    host.wait_for_new_pid("deploy", deploy);
    assert_eq!(roles(), before);
    host.control(&["restart", "deploy"]).expect_success();
    host.wait_for_agent("deploy");
    assert_eq!(roles(), before);
}

/// The live processes that sleep for this number of seconds.
pub(crate) fn sleeping(seconds: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let words = |pid: &u32| fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    pids.filter(|pid| words(pid).ends_with(format!("sleep\0{seconds}\0").as_bytes()))
        .filter(|pid| is_alive(*pid))
        .collect()
}

/// Kills the leftovers of a failed test.
pub(crate) struct Sleepers(pub(crate) Vec<u32>);

impl Drop for Sleepers {
    fn drop(&mut self) {
        self.0.iter().flat_map(|seconds| sleeping(*seconds)).for_each(|pid| signal(pid, Signal::KILL));
    }
}
