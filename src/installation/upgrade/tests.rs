//! The steps on a real directory, with small files instead of executables.

use std::fs;

use super::*;
use crate::core::model::Digest;
use crate::core::upgrade::TrialEndReason;

struct TestHome {
    _directory: tempfile::TempDir,
    home: Home,
    from: Image,
    to: Image,
}

fn digest(path: &Path) -> Digest {
    Programs::default().at(path).unwrap().unwrap()
}

/// A home with release 1 installed, and the executable of release 2 in `staging`.
fn test_home() -> TestHome {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path());
    for (path, _) in home.directories() {
        fs::create_dir_all(path).unwrap();
    }
    for (path, content) in [(home.executable(), "one"), (staged(&home), "two")] {
        fs::write(&path, content).unwrap();
        platform::set_mode(&path, 0o755).unwrap();
    }
    executable::point(&home, ExecutableName::ALL, &home.executable()).unwrap();
    Epochs::create(&home, []).unwrap();
    let image = |version: &str, digit: &str, path: &Path, epoch| Image {
        version: version.parse().unwrap(),
        sha256: digit.repeat(64).parse().unwrap(),
        executable: digest(path),
        epoch,
        file: format!("aops-spm-{version}"),
        brings: vec![],
        revokes: vec![],
        endpoint: None,
        unknown: Default::default(),
    };
    let (from, to) = (image("1", "1", &home.executable(), 1), image("2", "2", &staged(&home), 2));
    let Image { version, sha256, epoch, file, .. } = from.clone();
    ManagerRecord { version, sha256, epoch, file, unknown: Default::default() }.save(&home).unwrap();
    TestHome { _directory: directory, home, from, to }
}

fn staged(home: &Home) -> std::path::PathBuf {
    home.staging().join("aops")
}

fn session(home: &Home) -> UpgradeSession {
    UpgradeSession::open(home, Duration::ZERO).unwrap().unwrap()
}

fn content(home: &Home, name: ExecutableName) -> String {
    fs::read_to_string(name.path(home)).unwrap()
}

/// Executes a step twice, since an interrupted step is repeated, and reads the result.
fn execute(session: &mut UpgradeSession, step: UpgradeStep) -> Placement {
    for _ in 0..2 {
        assert!(session.carry_out(step, None).unwrap());
    }
    session.placement(&mut Programs::default()).unwrap()
}

fn switched() -> (TestHome, UpgradeSession) {
    let test = test_home();
    let mut session = session(&test.home);
    session.begin(test.from.clone(), test.to.clone(), 7).unwrap();
    assert!(!session.is_recorded && load(&test.home).unwrap().trial().is_none());
    execute(&mut session, UpgradeStep::Save);
    assert_eq!(load(&test.home).unwrap().trial().map(|trial| trial.began), Some(7));
    let backed_up = execute(&mut session, UpgradeStep::BackUp);
    assert!(
        backed_up.backup_intact
            && backed_up.executable == InstalledExecutable::From
            && backed_up.links == RoleLinks::Executable
    );
    assert_eq!(execute(&mut session, UpgradeStep::LinkToBackup).links, RoleLinks::Backup);
    session.carry_out(UpgradeStep::Swap, Some(&staged(&test.home))).unwrap();
    execute(&mut session, UpgradeStep::Record(RecordChange::BeginTrial));
    (test, session)
}

#[test]
fn in_a_trial_the_manager_runs_the_new_executable_and_the_other_roles_the_old_one() {
    let (test, session) = switched();
    let home = &test.home;
    let actual = session.placement(&mut Programs::default()).unwrap();
    let expected = Placement {
        executable: InstalledExecutable::To,
        backup_intact: true,
        links: RoleLinks::Backup,
        installed: WhichRelease::From,
        stopped: false,
    };
    assert_eq!(actual, expected);
    assert_eq!(
        [ExecutableName::Spm, ExecutableName::Spa, ExecutableName::AgentService, ExecutableName::Control]
            .map(|name| content(home, name)),
        ["two", "one", "one", "one"]
    );
    assert!(!staged(home).exists() && home.upgrade_reserve().exists());
    assert!(UpgradeSession::open(home, Duration::ZERO).unwrap().is_none(), "only one session at a time");
}

#[test]
fn a_roll_back_restores_the_old_executable_and_skips_the_new_release() {
    let (test, mut session) = switched();
    let TestHome { home, to, .. } = &test;
    execute(&mut session, UpgradeStep::Record(RecordChange::RollBack { reason: TrialEndReason::Died, skips: true }));
    assert_eq!(execute(&mut session, UpgradeStep::Restore).executable, InstalledExecutable::From);
    assert_eq!(execute(&mut session, UpgradeStep::LinkToExecutable).links, RoleLinks::Executable);
    execute(&mut session, UpgradeStep::Record(RecordChange::FinishAndSkip));
    assert!(ExecutableName::ALL.iter().all(|name| content(home, *name) == "one"));
    let record = load(home).unwrap();
    assert!(record.trial().is_none() && record.skipped(&to.version, &to.sha256).is_some());
    assert_eq!(record.ended().len(), 1, "{:?}", record.ended());
    assert!(!home.upgrade_reserve().exists() && !home.next_executable().exists());
    assert_eq!(ManagerRecord::load(home).unwrap().unwrap().version.as_str(), "1");
}

#[test]
fn a_commit_keeps_the_new_executable_and_the_backup() {
    let (test, mut session) = switched();
    let TestHome { home, from, .. } = &test;
    execute(&mut session, UpgradeStep::Record(RecordChange::Commit(None)));
    assert_eq!(execute(&mut session, UpgradeStep::RecordRelease(WhichRelease::To)).installed, WhichRelease::To);
    assert_eq!(execute(&mut session, UpgradeStep::LinkToExecutable).links, RoleLinks::Executable);
    execute(&mut session, UpgradeStep::Record(RecordChange::Finish));
    assert!(ExecutableName::ALL.iter().all(|name| content(home, *name) == "two"));
    assert_eq!(Epochs::load(home).unwrap().least(MANAGER_PACKAGE), 2);
    assert_eq!(load(home).unwrap().previous().map(|image| &image.version), Some(&from.version));
    // The next upgrade replaces the backup.
    let to = Image { version: "3".parse().unwrap(), ..from.clone() };
    let now = Image { version: "2".parse().unwrap(), executable: digest(&home.executable()), ..to.clone() };
    session.begin(now, to, 8).unwrap();
    execute(&mut session, UpgradeStep::Save);
    assert!(execute(&mut session, UpgradeStep::BackUp).backup_intact);
    assert_eq!(fs::read_to_string(home.backup_executable()).unwrap(), "two");
    assert!(load(home).unwrap().previous().is_none());
}

#[test]
fn a_program_is_identified_by_its_bytes_after_every_change() {
    let test = test_home();
    let mut programs = Programs::default();
    let path = test.home.executable();
    assert_eq!(programs.at(&path).unwrap(), Some(test.from.executable));
    executable::replace(&test.home, &staged(&test.home)).unwrap();
    assert_eq!(programs.at(&path).unwrap(), Some(test.to.executable));
    assert_eq!(programs.at(&test.home.backup_executable()).unwrap(), None);
    assert!(programs.at(test.home.root()).is_err(), "a directory is not a program");
}

#[test]
fn an_unparsable_record_counts_as_empty_and_an_unreadable_one_is_an_error() {
    let test = test_home();
    fs::write(test.home.upgrade_record(), "{").unwrap();
    assert_eq!(load(&test.home).unwrap(), UpgradeRecord::default());
    fs::remove_file(test.home.upgrade_record()).unwrap();
    fs::create_dir(test.home.upgrade_record()).unwrap();
    assert!(load(&test.home).is_err());
}
