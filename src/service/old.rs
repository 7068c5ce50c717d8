//! An installation of the system that aops replaces, in the home: recognized, stopped, set aside, and removed once the new one is in place.
//!
//! Nothing is known of its files but three that operators touch, so everything in its directory counts as its own. It is moved into one
//! directory, by renames, from which it can be moved back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{leftovers, progress};
use crate::command;
use crate::config::import::{OLD_AGENT_IDS, OLD_CONFIG};
use crate::home::Home;
use crate::platform;

/// What an old installation's `control` script may take.
const CONTROL: Duration = Duration::from_secs(60);

/// Whether what stands in the home is an installation of the old system. `exists` says whether it is one of ours.
pub(super) fn is_old(home: &Home) -> bool {
    let file = |name: &str| home.root().join(name).symlink_metadata().is_ok_and(|metadata| metadata.is_file());
    if home.install_made().symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        // An installation of ours was killed at work where nothing stood.
        return false;
    }
    // A `control` alone is what packages of sub-agents, and other systems, have too.
    let is_in_its_place = home.is_default();
    file(OLD_CONFIG) || OLD_AGENT_IDS.iter().any(|name| file(name)) || (is_in_its_place && has_control(home))
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

/// Moves everything in the home aside, but for the installation's own things and the running executable.
pub(super) fn set_aside(home: &Home, executable: &Path) -> Result<()> {
    let stays = |path: &Path| path == executable || path == home.install_work();
    move_entries(home.root(), &under_way(home), &stays, home)?;
    rename(&under_way(home), &aside(home))
}

/// Moves back what was set aside; what was put in its place meanwhile goes. Killed at any moment, it can be repeated.
pub(super) fn bring_back(home: &Home, executable: &Path) -> Result<()> {
    let aside = aside(home);
    let attempt = || -> Result<()> {
        if is_directory(&aside) {
            for entry in fs::read_dir(home.root())?.chain(fs::read_dir(home.run())?) {
                let path = entry?.path();
                let stays = [executable, &home.install_work(), &home.run(), &home.install_lock()];
                if !stays.contains(&path.as_path()) {
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
    if is_directory(path) { crate::store::remove_tree(path) } else { crate::store::remove(path) }
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
    fn an_old_installation_is_recognized_by_any_of_its_files() {
        for name in ["etc/conf.yml", "agentId", "etc/agentId"] {
            let directory = tempfile::tempdir().unwrap();
            let home = Home::new(directory.path());
            assert!(!is_old(&home));
            fs::create_dir(home.etc()).unwrap();
            fs::write(directory.path().join(name), "").unwrap();
            assert!(is_old(&home), "{name}");
        }
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::write(directory.path().join("control"), "#!/bin/sh\n").unwrap();
        platform::set_mode(&directory.path().join("control"), 0o755).unwrap();
        assert!(has_control(&home) && !is_old(&home), "many packages have one");
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

        set_aside(&home, &bootstrap).unwrap();
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
