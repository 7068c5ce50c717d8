//! An installation of the system that aops replaces, in the home: recognized, stopped, set aside, and removed once the new one is in place.
//!
//! Nothing is known of its files but three that operators touch, so everything in its directory counts as its own. It is moved into one
//! directory, by renames, from which it can be moved back.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{leftovers, progress};
use crate::command;
use crate::config::import;
use crate::home::Home;
use crate::{platform, store};

/// What an old installation's `control` script may take.
const CONTROL: Duration = Duration::from_secs(60);

/// What marks an old installation, as an operator is told.
pub(super) const MARKS: &str =
    "settings of the old system in etc/conf.yml, an agent id in agentId, and a control program";

/// Whether what stands in the home is an installation of the old system, by several marks: all of it will be removed. Each alone is what
/// others have too: many products keep an agent id, and packages of sub-agents have a `control`. `exists` says whether it is one of ours.
pub(super) fn is_old(home: &Home) -> bool {
    if home.install_made().symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        // An installation of ours was killed at work where nothing stood.
        return false;
    }
    let [settings, id, control] = marks(home);
    let is_in_its_place = home.is_default();
    [settings, id, control].into_iter().filter(|mark| *mark).count() >= 2 || (is_in_its_place && (settings || control))
}

/// Whether there is one mark at least.
pub(super) fn is_perhaps_old(home: &Home) -> bool {
    marks(home).contains(&true)
}

fn marks(home: &Home) -> [bool; 3] {
    [import::has_settings(home.root()), import::has_agent_id(home.root()), has_control(home)]
}

/// Whether there is a `control` that can be run and is no link of ours.
fn has_control(home: &Home) -> bool {
    script(home).is_some()
}

/// The `control` script, where there is one that can be run and is no link of ours.
pub(super) fn script(home: &Home) -> Option<PathBuf> {
    let control = home.old_control();
    let is_file = control.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
    (is_file && platform::is_executable(&control)).then_some(control)
}

/// Stops it: through its own script, then whoever still runs from its directory.
pub(super) fn stop(home: &Home) -> Result<()> {
    if has_control(home) {
        // A script that fails is no reason to keep what it failed to stop.
        if let Err(error) = control(home, "stop") {
            progress::warn(format_args!("{error:#}"));
        }
    }
    leftovers::end_running_from(home.root()).context("cannot stop the old installation")
}

/// Starts it again after a failure.
pub(super) fn start(home: &Home) -> Result<()> {
    if has_control(home) { control(home, "start") } else { Ok(()) }
}

fn control(home: &Home, verb: &str) -> Result<()> {
    let path = home.old_control();
    let finished = command::run(Command::new(&path).arg(verb).current_dir(home.root()), CONTROL)?;
    finished.success().map(drop).with_context(|| format!("cannot have {} do `{verb}`", path.display()))
}

/// Where what is set aside lies, once all of it does.
pub(super) fn aside(home: &Home) -> PathBuf {
    home.install_work().join("aside")
}

/// Where it lies while it is moved, there or back: the rest is still, or again, in the home.
fn under_way(home: &Home) -> PathBuf {
    home.install_work().join("aside.part")
}

/// Whether something is set aside, or was being.
pub(super) fn is_any_aside(home: &Home) -> bool {
    is_directory(&aside(home)) || is_under_way(home)
}

/// Whether somebody was killed while something was moved.
pub(super) fn is_under_way(home: &Home) -> bool {
    is_directory(&under_way(home))
}

/// Not one behind a link.
fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
}

/// Whether a file is, or holds, what is set aside.
pub(super) fn is_aside(home: &Home, path: &Path) -> bool {
    path == aside(home) || path == under_way(home)
}

/// Whose things are set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BackupOwner {
    /// All that lies in the home: of an old installation nobody knows what it made.
    Old,
    /// What an installation of aops made; whatever else lies there stays.
    Ours,
}

impl BackupOwner {
    /// Whether what lies in the home is moved; the installation's own things and the running executable are not.
    fn has(self, home: &Home, path: &Path, executable: &Path) -> bool {
        path != executable && path != home.install_work() && (self == BackupOwner::Old || home.owns(path))
    }
}

/// Finds out whether everything can be moved aside, while nothing is: each entry is tried by itself.
pub(super) fn can_set_aside(home: &Home, whose: BackupOwner, executable: &Path) -> Result<()> {
    let blocker = home.install_work().join("blocker");
    fs::create_dir_all(blocker.join("full")).with_context(|| format!("cannot make {}", blocker.display()))?;
    let run = home.run();
    for directory in [home.root(), &run] {
        for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
            let path = entry?.path();
            if !whose.has(home, &path, executable) || path == run || path == home.install_lock() {
                continue;
            }
            if let Err(error) = platform::can_rename(&path, &blocker) {
                let shown = path.display();
                let advice = match error.kind() {
                    ErrorKind::NotFound => continue,
                    ErrorKind::CrossesDevices => format!(
                        "it is of the lower layer of an overlay: put a copy in its place (cp -a {shown} {shown}.new, rm -r {shown}, mv {shown}.new {shown})"
                    ),
                    ErrorKind::ResourceBusy => "something is mounted there: unmount it".to_owned(),
                    _ => "make it movable".to_owned(),
                };
                bail!("cannot set {shown} aside: {error}; {advice}");
            }
        }
    }
    store::remove_tree(&blocker)
}

/// Moves everything aside that is to be replaced.
pub(super) fn set_aside(home: &Home, whose: BackupOwner, executable: &Path) -> Result<()> {
    let stays = |path: &Path| !whose.has(home, path, executable);
    move_entries(home.root(), &under_way(home), &stays, home)?;
    rename(&under_way(home), &aside(home))
}

/// Moves back what was set aside; what an installation put in its place meanwhile goes. Killed at any moment, it can be repeated.
pub(super) fn bring_back(home: &Home, executable: &Path) -> Result<()> {
    let aside = aside(home);
    let attempt = || -> Result<()> {
        if is_directory(&aside) {
            for entry in fs::read_dir(home.root())?.chain(fs::read_dir(home.run())?) {
                let path = entry?.path();
                if BackupOwner::Ours.has(home, &path, executable) && path != home.run() && path != home.install_lock() {
                    remove(&path)?;
                }
            }
            rename(&aside, &under_way(home))?;
        }
        if is_under_way(home) {
            move_entries(&under_way(home), home.root(), &|_| false, home)?;
            fs::remove_dir_all(under_way(home))?;
        }
        Ok(())
    };
    attempt().with_context(|| format!("cannot bring back what was set aside in {}", aside.display()))
}

/// Moves the entries of one directory into another; those of `run` one by one, as our lock lies there.
fn move_entries(from: &Path, to: &Path, stays: &dyn Fn(&Path) -> bool, home: &Home) -> Result<()> {
    let run = home.run();
    let lock = home.install_lock();
    fs::create_dir_all(to).with_context(|| format!("cannot make the directory {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if stays(&path) || path == lock {
            continue;
        }
        if entry.file_type()?.is_dir() && run.file_name() == Some(&entry.file_name()) && from != run {
            move_entries(&path, &target, &|path| path == lock, home)?;
        } else {
            // Something may have been made anew in the place of what is on its way back.
            remove(&target)?;
            rename(&path, &target)?;
        }
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
}

fn remove(path: &Path) -> Result<()> {
    if is_directory(path) { store::remove_tree(path) } else { store::remove(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(root: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut directories = vec![root.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && !path.is_symlink() {
                    directories.push(path.clone());
                }
                found.push(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
        found.sort();
        found
    }

    #[test]
    fn an_old_installation_is_recognized_by_several_of_its_marks() {
        let settings: LegacyMarker = |home| fs::write(home.join("etc/conf.yml"), "a: 1\nheartbeatSrv: x\n").unwrap();
        let others: LegacyMarker =
            |home| fs::write(home.join("etc/conf.yml"), "listen: 80\nx: heartbeatSrv\n").unwrap();
        let id: LegacyMarker = |home| fs::write(home.join("agentId"), "af31\n").unwrap();
        let our_id: LegacyMarker = |home| fs::write(home.join("etc/agent-id"), "af31\n").unwrap();
        let no_id: LegacyMarker = |home| fs::write(home.join("etc/agentId"), "two words\n").unwrap();
        let control: LegacyMarker = |home| {
            fs::write(home.join("control"), "#!/bin/sh\n").unwrap();
            platform::set_mode(&home.join("control"), 0o755).unwrap();
        };
        for (marks, old) in [
            (&[][..], false),
            (&[settings], false),
            (&[id], false),
            (&[id, our_id], false),
            (&[control], false),
            (&[others, no_id, control], false),
            (&[settings, id], true),
            (&[settings, control], true),
            (&[our_id, control], true),
        ] {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("etc")).unwrap();
            marks.iter().for_each(|mark| mark(directory.path()));
            let home = Home::new(directory.path());
            assert_eq!(is_old(&home), old);
            assert_eq!(is_perhaps_old(&home), !marks.is_empty());
        }
    }

    type LegacyMarker = fn(&Path);

    #[test]
    fn what_is_not_of_an_installation_stays_where_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        for path in ["bin/aops", "run/pid", "data/customers.db"] {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let before = files(directory.path());
        let nobody = Path::new("/nowhere");
        fs::create_dir(home.install_work()).unwrap();
        can_set_aside(&home, BackupOwner::Ours, nobody).unwrap();
        set_aside(&home, BackupOwner::Ours, nobody).unwrap();
        assert!(!home.bin().exists() && directory.path().join("data/customers.db").exists());
        fs::create_dir_all(home.run()).unwrap();
        fs::write(directory.path().join("came"), "").unwrap();
        bring_back(&home, nobody).unwrap();
        fs::remove_file(directory.path().join("came")).unwrap();
        fs::remove_dir(home.install_work()).unwrap();
        assert_eq!(files(directory.path()), before);
    }

    #[test]
    fn what_is_set_aside_comes_back_in_place_of_what_came_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        for path in ["bin/old", "run/pid", "control"] {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "old").unwrap();
        }
        let bootstrap = directory.path().join("bootstrap");
        fs::write(&bootstrap, "").unwrap();
        let before = files(directory.path());
        fs::write(home.install_lock(), "").unwrap();

        set_aside(&home, BackupOwner::Old, &bootstrap).unwrap();
        assert!(bootstrap.exists() && home.install_lock().exists());
        assert!(!home.bin().exists() && !home.run().join("pid").exists());
        fs::create_dir(home.bin()).unwrap();
        fs::write(home.executable(), "new").unwrap();
        fs::write(home.role_record("spm"), "new").unwrap();

        bring_back(&home, &bootstrap).unwrap();
        fs::remove_file(home.install_lock()).unwrap();
        fs::remove_dir(home.install_work()).unwrap();
        assert_eq!(files(directory.path()), before);
        bring_back(&home, &bootstrap).unwrap();
    }

    #[test]
    fn what_was_only_being_set_aside_comes_back_and_what_was_not_moved_yet_stays() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        for (path, content) in [
            (".install/aside.part/log/old.log", "old"),
            (".install/aside.part/run/pid", "old"),
            ("bin/old", "old"),
            // Made anew by one that was still running.
            ("log/old.log", "new"),
            ("run/lock", "new"),
        ] {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        assert!(is_any_aside(&home) && is_under_way(&home));
        bring_back(&home, Path::new("/nowhere")).unwrap();
        fs::remove_dir(home.install_work()).unwrap();
        assert_eq!(files(directory.path()), ["bin", "bin/old", "log", "log/old.log", "run", "run/lock", "run/pid"]);
        assert_eq!(fs::read_to_string(directory.path().join("log/old.log")).unwrap(), "old");
        assert!(!is_any_aside(&home));
    }
}
