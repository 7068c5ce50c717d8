//! A manager that exits for its upgrade: when the watchdog waits for it, and when it kills it.

use serde_json::json;

use super::*;
use crate::core::status::HomeState;
use crate::core::upgrade::UpgradeRecord;
use crate::platform::testing::{self, OtherProcess};
use crate::store;

const MANAGER: &str = "spa::trial::tests::a_manager";

/// A manager that has not exited yet.
#[test]
fn a_manager() {
    if testing::part(MANAGER).is_some() {
        testing::report("runs");
        testing::block();
    }
}

/// A monitor in a trial whose previous release has the program of `manager`, which holds the role.
fn monitor(home: &Home, manager: &OtherProcess) -> TrialMonitor {
    assert_eq!(manager.line(), "runs");
    std::fs::create_dir_all(home.role_record("spm").parent().unwrap()).unwrap();
    let pid = manager.pid();
    let holder = RoleHolder {
        pid,
        start_time: platform::start_time(pid).unwrap(),
        boot_id: platform::boot_id().to_owned(),
        restarts: 0,
        ended: false,
        program: None,
    };
    store::save(&home.role_record("spm"), &holder).unwrap();
    TrialMonitor::new(home, true, false, Instant::now())
}

/// A trial of version 2 after version 1, with these programs.
fn trial(from: &Digest, to: &Digest) -> Trial {
    let image = |version: &str, executable: &Digest| json!({ "version": version, "sha256": version.repeat(64), "executable": executable });
    serde_json::from_value(json!({ "from": image("1", from), "to": image("2", to), "phase": "trial" })).unwrap()
}

fn another_program() -> Digest {
    "e".repeat(64).parse().unwrap()
}

/// The upgrade is noticed, and its step is to kill the manager of the previous release.
fn kills(monitor: &mut TrialMonitor, manager: &OtherProcess, now: Instant) -> bool {
    let program = Programs::default().of_process(manager.pid(), None).unwrap();
    monitor.trial = Some(trial(&program, &another_program()));
    monitor.update_manager();
    assert_eq!(monitor.manager.as_ref().map(|manager| manager.image), Some(WhichRelease::From));
    let has_time = monitor.is_exiting(now);
    monitor.act(UpgradeStep::KillManager, &UpgradeRecord::default(), now);
    let is_killed = || platform::start_time(manager.pid()).is_none().then_some(true);
    if has_time { is_killed().unwrap_or(false) } else { testing::wait_for("its end", is_killed) }
}

#[test]
fn a_manager_that_announced_its_exit_before_the_upgrade_was_noticed_has_time_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path());
    let manager = OtherProcess::start(MANAGER, "");
    let mut monitor = monitor(&home, &manager);
    monitor.disconnected(false);
    let now = Instant::now();
    assert!(!kills(&mut monitor, &manager, now));
    assert!(kills(&mut monitor, &manager, now + EXIT_TIMEOUT));
}

#[test]
fn a_manager_that_connects_late_can_still_report_its_status() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path());
    let manager = OtherProcess::start(MANAGER, "");
    let mut monitor = monitor(&home, &manager);
    let program = Programs::default().of_process(manager.pid(), None).unwrap();
    monitor.trial = Some(trial(&another_program(), &program));
    monitor.is_in_progress = true;

    let now = Instant::now();
    monitor.next_check = now;
    monitor.connected(now);
    assert_eq!(monitor.due(), now + REPORT_TIMEOUT);
    let mut status = Status::silent(String::new(), Some("2".parse().unwrap()), HomeState::Running);
    status.spm.pid = Some(manager.pid());
    monitor.status_received(&status, now);
    assert_eq!((monitor.due(), monitor.manager.unwrap().answered), (now, Some(now)));
}

#[test]
fn a_manager_that_lost_its_connection_without_a_goodbye_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path());
    let manager = OtherProcess::start(MANAGER, "");
    let mut monitor = monitor(&home, &manager);
    monitor.disconnected(true);
    assert!(kills(&mut monitor, &manager, Instant::now()));
}
