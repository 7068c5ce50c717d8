//! The steps on a real directory, with files of a few bytes in the place of executables.

use std::fs;

use super::*;
use crate::core::model::Digest;
use crate::core::upgrade::TrialEndReason;

struct Made {
    _directory: tempfile::TempDir,
    home: Home,
    from: Image,
    to: Image,
}

fn digest(path: &Path) -> Digest {
    Programs::default().at(path).unwrap().unwrap()
}

/// A home with release 1 in place, and the executable of release 2 in `staging`.
fn made() -> Made {
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
    Epochs::begin(&home).unwrap();
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
    Made { _directory: directory, home, from, to }
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

/// Takes a step and looks, each twice: an interrupted step is taken again.
fn take(session: &mut UpgradeSession, step: UpgradeStep) -> Placement {
    for _ in 0..2 {
        assert!(session.carry_out(step, None).unwrap());
    }
    session.look(&mut Programs::default()).unwrap()
}

fn switched() -> (Made, UpgradeSession) {
    let made = made();
    let mut session = session(&made.home);
    session.begin(made.from.clone(), made.to.clone(), 7).unwrap();
    assert!(!session.is_recorded && load(&made.home).unwrap().trial().is_none());
    take(&mut session, UpgradeStep::Save);
    assert_eq!(load(&made.home).unwrap().trial().map(|trial| trial.began), Some(7));
    let backed_up = take(&mut session, UpgradeStep::BackUp);
    assert!(
        backed_up.backup_whole
            && backed_up.executable == InstalledExecutable::From
            && backed_up.links == RoleLinks::Executable
    );
    assert_eq!(take(&mut session, UpgradeStep::LinkToBackup).links, RoleLinks::Backup);
    session.carry_out(UpgradeStep::Swap, Some(&staged(&made.home))).unwrap();
    take(&mut session, UpgradeStep::Record(RecordChange::BeginTrial));
    (made, session)
}

#[test]
fn in_a_trial_the_manager_runs_the_new_program_and_everybody_else_the_old_one() {
    let (made, session) = switched();
    let home = &made.home;
    let seen = session.look(&mut Programs::default()).unwrap();
    let expected = Placement {
        executable: InstalledExecutable::To,
        backup_whole: true,
        links: RoleLinks::Backup,
        installed: WhichRelease::From,
        stopped: false,
    };
    assert_eq!(seen, expected);
    assert_eq!(
        [ExecutableName::Spm, ExecutableName::Spa, ExecutableName::AgentService, ExecutableName::Control]
            .map(|name| content(home, name)),
        ["two", "one", "one", "one"]
    );
    assert!(!staged(home).exists() && home.upgrade_reserve().exists());
    assert!(UpgradeSession::open(home, Duration::ZERO).unwrap().is_none(), "one looks or acts at a time");
}

#[test]
fn a_roll_back_leaves_the_old_program_everywhere_and_a_skip() {
    let (made, mut session) = switched();
    let Made { home, to, .. } = &made;
    take(&mut session, UpgradeStep::Record(RecordChange::RollBack { reason: TrialEndReason::Died, skips: true }));
    assert_eq!(take(&mut session, UpgradeStep::Restore).executable, InstalledExecutable::From);
    assert_eq!(take(&mut session, UpgradeStep::LinkToExecutable).links, RoleLinks::Executable);
    take(&mut session, UpgradeStep::Record(RecordChange::FinishAndSkip));
    assert!(ExecutableName::ALL.iter().all(|name| content(home, *name) == "one"));
    let record = load(home).unwrap();
    assert!(record.trial().is_none() && record.skipped(&to.version, &to.sha256).is_some());
    assert_eq!(record.ended().len(), 1, "{:?}", record.ended());
    assert!(!home.upgrade_reserve().exists() && !home.next_executable().exists());
    assert_eq!(ManagerRecord::load(home).unwrap().unwrap().version.as_str(), "1");
}

#[test]
fn a_commit_leaves_the_new_program_everywhere_and_a_way_back() {
    let (made, mut session) = switched();
    let Made { home, from, .. } = &made;
    take(&mut session, UpgradeStep::Record(RecordChange::Commit(None)));
    assert_eq!(take(&mut session, UpgradeStep::RecordRelease(WhichRelease::To)).installed, WhichRelease::To);
    assert_eq!(take(&mut session, UpgradeStep::LinkToExecutable).links, RoleLinks::Executable);
    take(&mut session, UpgradeStep::Record(RecordChange::Finish));
    assert!(ExecutableName::ALL.iter().all(|name| content(home, *name) == "two"));
    assert_eq!(Epochs::load(home).unwrap().least(MANAGER_PACKAGE), 2);
    assert_eq!(load(home).unwrap().previous().map(|image| &image.version), Some(&from.version));
    // The next upgrade's backup takes its place, and is never made of two halves.
    let to = Image { version: "3".parse().unwrap(), ..from.clone() };
    let now = Image { version: "2".parse().unwrap(), executable: digest(&home.executable()), ..to.clone() };
    session.begin(now, to, 8).unwrap();
    take(&mut session, UpgradeStep::Save);
    assert!(take(&mut session, UpgradeStep::BackUp).backup_whole);
    assert_eq!(fs::read_to_string(home.backup_executable()).unwrap(), "two");
    assert!(load(home).unwrap().previous().is_none());
}

#[test]
fn a_program_is_known_by_its_bytes_however_often_it_changes() {
    let made = made();
    let mut programs = Programs::default();
    let path = made.home.executable();
    assert_eq!(programs.at(&path).unwrap(), Some(made.from.executable));
    executable::replace(&made.home, &staged(&made.home)).unwrap();
    assert_eq!(programs.at(&path).unwrap(), Some(made.to.executable));
    assert_eq!(programs.at(&made.home.backup_executable()).unwrap(), None);
    assert!(programs.at(made.home.root()).is_err(), "a directory is no program");
}

#[test]
fn a_record_that_cannot_be_understood_is_none_and_one_that_cannot_be_read_is_an_error() {
    let made = made();
    fs::write(made.home.upgrade_record(), "{").unwrap();
    assert_eq!(load(&made.home).unwrap(), UpgradeRecord::default());
    fs::remove_file(made.home.upgrade_record()).unwrap();
    fs::create_dir(made.home.upgrade_record()).unwrap();
    assert!(load(&made.home).is_err());
}
