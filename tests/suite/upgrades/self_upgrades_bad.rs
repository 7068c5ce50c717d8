//! Bad releases of the manager: each is rolled back, or never activated, automatically. Sub-agents keep their processes, and nothing of the
//! release is left.

use std::fs;

use serde_json::Value;

use crate::support::host::{FORKING, SOON};
use crate::support::package::Package;
use crate::support::release;
use crate::support::wait::{try_for, wait_for};
use crate::upgrades::self_upgrades::{ENDED, agents_of, expect_in_place, expect_outcomes, host_with, order, runs};

const ROLLED_BACK: &[&str] = &["rollback ok 1.0.0", "skip ok 2.0.0"];
/// It was never activated.
const SKIPPED: &[&str] = &["skip ok 2.0.0"];

/// Orders the release, and waits until the previous one runs and this one is skipped; `why` is a part of the displayed reason.
#[track_caller]
fn ends(name: &str, bad: &Package, outcomes: &[&str], why: &str) {
    let (gateway, host) = host_with(&[bad]);
    let before = agents_of(&host);
    let executable = fs::read(host.home().join("bin/aops")).expect("it exists");
    order(&gateway, "2.0.0");
    let status = host.wait_for_status(&format!("the release that {name} to be skipped"), ENDED, |status| {
        runs(status, "1.0.0") && status["problems"].to_string().contains("aops-spm 2.0.0 failed and is skipped")
    });
    assert!(status["problems"].to_string().contains(why), "{name}: {:#}", status["problems"]);
    expect_outcomes(&host, outcomes);
    expect_in_place(&host, &executable);
    assert_eq!(agents_of(&host), before, "{name}");
    wait_for("the gateway to receive it", SOON, || {
        let status = gateway.status().to_string();
        (status.contains("is skipped from now on") || status.contains("\"skip\"")).then_some(())
    });
    // Both roles and the two sub-agents.
    let roles = ["spm", "spa"].map(|role| status[role]["pid"].clone());
    let left = || -> Vec<_> {
        let mut found = host.processes();
        found.retain(|process| {
            let is_known = before.contains(&process.pid) || roles.contains(&Value::from(process.pid));
            !is_known && !process.command.contains("sleep 1000000")
        });
        found
    };
    // Until it executes its program, a child that a role has forked has the role's command line.
    assert!(try_for(FORKING, || left().is_empty().then_some(())).is_some(), "{name}: {:?}", left());
}

/// The path of a good program, quoted for a shell.
fn real() -> String {
    release::real().display().to_string()
}

/// A name, the behaviour of the manager, and a part of the reason for the roll back.
pub(crate) const BAD_MANAGERS: &[(&str, &str, &str)] = &[
    ("exits at once", "exit 1", "died repeatedly"),
    ("hangs before it answers", "exec sleep 1000001", "did not answer in time"),
    (
        "takes the lock and sleeps",
        "exec 9>>\"$2/run/spm.lock\"; flock -x 9; exec sleep 1000001",
        "did not answer in time",
    ),
    ("cannot send a heartbeat", "exec unshare --net $A spm \"$@\"", "could not send a heartbeat"),
    (
        "dies of a fault after a while",
        "(sleep 3; kill -SEGV $$; sleep 0.2; kill -SEGV $$) & exec $A spm \"$@\"",
        "died repeatedly",
    ),
    (
        "eats memory",
        "(head -c 200000000 /dev/zero | tail -c 200000000 | sleep 1000001) & exec $A spm \"$@\"",
        "too many resources",
    ),
    (
        "starts processes without end",
        "(while :; do sleep 1000001 & sleep 0.01; done) & exec $A spm \"$@\"",
        "too many resources",
    ),
    (
        "ends the watchdog",
        "(while :; do sleep 0.5; kill -9 $(sed -n 's/.*\"pid\": \\([0-9]*\\),/\\1/p' \"$2/run/spa.json\"); done) & exec $A spm \"$@\"",
        "the watchdog exited repeatedly",
    ),
    ("says that it is another version", "exec \"$2/bin/aops.prev\" spm \"$@\"", "did not answer in time"),
];

/// Each on its own host, in parallel: they mostly wait.
fn at_once<T: Sync>(cases: &[T], check: impl Fn(&T) + Sync) {
    std::thread::scope(|scope| {
        for case in cases {
            scope.spawn(|| check(case));
        }
    });
}

#[test]
fn a_release_with_a_bad_manager_is_rolled_back() {
    at_once(BAD_MANAGERS, |(name, manager, why)| {
        ends(name, &release::bad_manager("2.0.0", &real(), manager), ROLLED_BACK, why);
    });
}

/// Releases that are rejected before anything is changed: a name, the package, and a part of the reason. `real`: as for
/// [`release::bad_manager`].
pub(crate) fn unfit(version: &str, real: &str) -> [(&'static str, Package, &'static str); 3] {
    let without_state =
        release::bad(version, real, "exec $A spm \"$@\"", "echo 'error: no such form of state' >&2; exit 1");
    let whole = release::executable(version);
    let mut foreign = whole.clone();
    // The machine in the header of an ELF file: RISC-V.
    foreign[18] = 0xF3;
    let truncated = &whole[..whole.len() / 2];
    [
        ("cannot read the state", without_state, "no such form of state"),
        ("is for another architecture", release::with_executable(version, &foreign), "does not run on this host"),
        ("is truncated though signed", release::with_executable(version, truncated), "does not run on this host"),
    ]
}

#[test]
fn a_release_that_cannot_run_on_this_host_is_never_activated() {
    at_once(&unfit("2.0.0", &real()), |(name, bad, why)| {
        ends(name, bad, SKIPPED, why);
    });
}
