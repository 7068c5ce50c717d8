//! An installation of the replaced system in the home: detects it, stops it, sets it aside, and restores it after a failure.
//!
//! It has no list of its files, so everything in its directory belongs to it. Its files are renamed into one directory, and back from it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{leftovers, progress};
use crate::command;
use crate::config::import;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::host_service::{self, ForeignUnit};
use crate::{platform, store};

/// Timeout of a call of the old installation's `control` script.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(60);

/// The markers of an old installation, for an error.
pub(super) const MARKERS: &str =
    "settings of the old system in etc/conf.yml, an agent id in agentId, and a control program";

/// Whether the home holds an installation of the old system. This takes two markers, because all of it will be removed: other products
/// have an agent id, too, and packages of sub-agents a `control`. An installation of aops may have the markers, too: check
/// [`installation::exists`](crate::installation::exists) first.
pub(super) fn is_old(home: &Home) -> bool {
    if home.install_journal().symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        // A first installation of aops was killed here.
        return false;
    }
    let [settings, id, control] = markers(home);
    [settings, id, control].into_iter().filter(|marker| *marker).count() >= 2
        || (home.is_default() && (settings || control))
}

/// Whether the home has at least one marker.
pub(super) fn is_perhaps_old(home: &Home) -> bool {
    markers(home).contains(&true)
}

fn markers(home: &Home) -> [bool; 3] {
    [import::has_settings(home.root()), import::has_agent_id(home.root()), has_control(home)]
}

fn has_control(home: &Home) -> bool {
    script(home).is_some()
}

/// The executable `control` script of the old installation; `None`: there is none, or it is the link of aops.
pub(super) fn script(home: &Home) -> Option<PathBuf> {
    let control = platform::find_program(home.root().join("control"));
    let is_file = control.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
    (is_file && platform::is_executable(&control)).then_some(control)
}

/// What a take-over has stopped, to start it again.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StopRecord {
    units: Vec<ForeignUnit>,
    /// Whether it also ran without its units.
    ran_without_units: bool,
}

/// Stops its units, then it with its own script, then the processes that still run from its directory. What ran is recorded first. `kind`:
/// the service manager of the new installation.
pub(super) fn stop(home: &Home, kind: ServiceManagerKind) -> Result<()> {
    let earlier = stop_record(home)?;
    let units = host_service::foreign_units(kind, home).context("cannot find the units of the old installation")?;
    let units: Vec<_> = units.into_iter().map(|unit| unit.or_recorded(&earlier.units)).collect();
    let names: Vec<_> = units.iter().map(ForeignUnit::name).collect();
    if !names.is_empty() {
        progress::say(format_args!("stopping the services of the existing installation: {}", names.join(", ")));
    }
    let mut record = StopRecord { units, ran_without_units: earlier.ran_without_units };
    store::save(&record_path(home), &record)?;
    host_service::stop_foreign(&record.units)?;
    if !record.ran_without_units && !leftovers::running_from(&home.bin()).is_empty() {
        record.ran_without_units = true;
        store::save(&record_path(home), &record)?;
    }
    if has_control(home) {
        // If the script fails, its processes are stopped below.
        if let Err(error) = control(home, "stop") {
            progress::warn(format_args!("{error:#}"));
        }
    }
    leftovers::stop_running_from(home.root()).context("cannot stop the old installation")
}

/// Restarts it after a failure: the units that were active, and with its own script what ran without them.
pub(super) fn start(home: &Home) -> Result<()> {
    let record = stop_record(home)?;
    let by_units = host_service::start_foreign(&record.units);
    let was_active = record.units.iter().any(ForeignUnit::is_active);
    if has_control(home) && (record.ran_without_units || !was_active || by_units.is_err()) {
        control(home, "start")?;
    }
    by_units
}

/// Gives its units the names back that ours have, where these took over their place.
pub(super) fn give_names_back(home: &Home) -> Result<()> {
    host_service::give_foreign_names_back(&stop_record(home)?.units)
}

/// Restarts it if an interrupted take-over had stopped it.
pub(super) fn start_if_interrupted(home: &Home) {
    if record_path(home).symlink_metadata().is_err() {
        return;
    }
    progress::say("starting the old installation, which an interrupted installation had stopped");
    if let Err(error) = start(home) {
        progress::warn(format_args!("cannot start it: {error:#}"));
    }
}

fn stop_record(home: &Home) -> Result<StopRecord> {
    Ok(store::load(&record_path(home))?.unwrap_or_default())
}

pub(super) fn record_path(home: &Home) -> PathBuf {
    home.install_work().join("stopped.json")
}

fn control(home: &Home, verb: &str) -> Result<()> {
    let path = platform::find_program(home.root().join("control"));
    let finished = command::run(Command::new(&path).arg(verb).current_dir(home.root()), CONTROL_TIMEOUT)?;
    finished.success().map(drop).with_context(|| format!("cannot run `{} {verb}`", path.display()))
}

/// The directory of an installation that is set aside completely.
pub(super) fn aside(home: &Home) -> PathBuf {
    home.install_work().join("aside")
}

/// The directory while its files are moved, in either direction: the others are in the home.
fn aside_part(home: &Home) -> PathBuf {
    home.install_work().join("aside.part")
}

/// Whether an installation is set aside, completely or in part.
pub(super) fn is_any_aside(home: &Home) -> bool {
    is_directory(&aside(home)) || is_part_aside(home)
}

/// Whether an installation is set aside in part: moving it was interrupted.
pub(super) fn is_part_aside(home: &Home) -> bool {
    is_directory(&aside_part(home))
}

/// Does not follow links.
fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
}

/// Whether a path is one of the directories for what is set aside, or the record of what was stopped.
pub(super) fn is_aside(home: &Home, path: &Path) -> bool {
    path == aside(home) || path == aside_part(home) || path == record_path(home)
}

/// The files that are set aside: those of which installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BackupOwner {
    /// Everything in the home: an old installation has no list of its files.
    Old,
    /// The files of an installation of aops; other files stay.
    Aops,
}

impl BackupOwner {
    /// Whether an entry of the home is set aside. The work directory and the running executable never are.
    fn has(self, home: &Home, path: &Path, executable: &Path) -> bool {
        path != executable && path != home.install_work() && (self == BackupOwner::Old || home.owns(path))
    }
}

/// Checks that every entry can be moved aside, without moving it.
pub(super) fn can_set_aside(home: &Home, owner: BackupOwner, executable: &Path) -> Result<()> {
    let blocker = home.install_work().join("blocker");
    fs::create_dir_all(blocker.join("full")).with_context(|| format!("cannot create {}", blocker.display()))?;
    let run = home.run();
    for directory in [home.root(), &run] {
        for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
            let path = entry?.path();
            if !owner.has(home, &path, executable) || path == run || path == home.install_lock() {
                continue;
            }
            if let Err(error) = platform::can_rename(&path, &blocker) {
                let shown = path.display();
                let advice = match error.kind() {
                    ErrorKind::NotFound => continue,
                    ErrorKind::CrossesDevices => format!(
                        "it is on the lower layer of an overlay: replace it with a copy (cp -a {shown} {shown}.new, rm -r {shown}, mv {shown}.new {shown})"
                    ),
                    ErrorKind::ResourceBusy => "it is a mount point: unmount it".to_owned(),
                    _ => "make it movable".to_owned(),
                };
                bail!("cannot set {shown} aside: {error}; {advice}");
            }
        }
    }
    store::remove_tree(&blocker)
}

/// Moves the files of an installation that is replaced aside, with the recorded units.
pub(super) fn set_aside(home: &Home, owner: BackupOwner, executable: &Path) -> Result<()> {
    let stays = |path: &Path| !owner.has(home, path, executable);
    move_entries(home.root(), &aside_part(home), &stays, home)?;
    rename(&aside_part(home), &aside(home))?;
    host_service::set_foreign_aside(&stop_record(home)?.units)
}

/// Removes what was set aside: the new installation is complete.
pub(super) fn remove_aside(home: &Home) -> Result<()> {
    host_service::remove_foreign(&stop_record(home)?.units)?;
    store::remove(&record_path(home))?;
    store::remove_tree(&aside(home))
}

/// Moves back what was set aside, with the recorded units, and removes what a new installation created instead. It can be repeated if it is
/// killed.
pub(super) fn restore(home: &Home, executable: &Path) -> Result<()> {
    let aside = aside(home);
    let attempt = || -> Result<()> {
        if is_directory(&aside) {
            for entry in fs::read_dir(home.root())?.chain(fs::read_dir(home.run())?) {
                let path = entry?.path();
                if BackupOwner::Aops.has(home, &path, executable) && path != home.run() && path != home.install_lock() {
                    remove(&path)?;
                }
            }
            rename(&aside, &aside_part(home))?;
        }
        if is_part_aside(home) {
            // Once its programs are in place: they are started at a boot.
            move_entries(&aside_part(home), home.root(), &|_| false, home)?;
            host_service::put_foreign_back(&stop_record(home)?.units)?;
            fs::remove_dir_all(aside_part(home))?;
        }
        Ok(())
    };
    attempt()
        .with_context(|| format!("cannot restore the previous installation, whose files are in {}", aside.display()))
}

/// Moves the entries of one directory into another; those of `run` one by one, because it holds the lock.
fn move_entries(from: &Path, to: &Path, stays: &dyn Fn(&Path) -> bool, home: &Home) -> Result<()> {
    let run = home.run();
    let lock = home.install_lock();
    fs::create_dir_all(to).with_context(|| format!("cannot create the directory {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if stays(&path) || path == lock {
            continue;
        }
        if entry.file_type()?.is_dir() && run.file_name() == Some(&entry.file_name()) && from != run {
            move_entries(&path, &target, &|path| path == lock, home)?;
        } else {
            // A file of this name may have been created meanwhile.
            remove(&target)?;
            rename(&path, &target)?;
        }
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    platform::rename(from, to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
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
    fn an_old_installation_is_detected_by_two_markers() {
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
        for (markers, old) in [
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
            markers.iter().for_each(|create| create(directory.path()));
            let home = Home::new(directory.path());
            assert_eq!(is_old(&home), old);
            assert_eq!(is_perhaps_old(&home), !markers.is_empty());
        }
    }

    type LegacyMarker = fn(&Path);

    #[test]
    fn foreign_files_are_not_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        for path in ["bin/aops", "run/pid", "data/customers.db"] {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let before = files(directory.path());
        let executable = Path::new("/nowhere");
        fs::create_dir(home.install_work()).unwrap();
        can_set_aside(&home, BackupOwner::Aops, executable).unwrap();
        set_aside(&home, BackupOwner::Aops, executable).unwrap();
        assert!(!home.bin().exists() && directory.path().join("data/customers.db").exists());
        fs::create_dir_all(home.run()).unwrap();
        fs::write(directory.path().join("new"), "").unwrap();
        restore(&home, executable).unwrap();
        fs::remove_file(directory.path().join("new")).unwrap();
        fs::remove_dir(home.install_work()).unwrap();
        assert_eq!(files(directory.path()), before);
    }

    #[test]
    fn an_installation_set_aside_is_restored_and_replaces_newer_files() {
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

        restore(&home, &bootstrap).unwrap();
        fs::remove_file(home.install_lock()).unwrap();
        fs::remove_dir(home.install_work()).unwrap();
        assert_eq!(files(directory.path()), before);
        restore(&home, &bootstrap).unwrap();
    }

    #[test]
    fn an_installation_set_aside_in_part_is_restored() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        for (path, content) in [
            (".install/aside.part/log/old.log", "old"),
            (".install/aside.part/run/pid", "old"),
            ("bin/old", "old"),
            // Created meanwhile by a process that was still running.
            ("log/old.log", "new"),
            ("run/lock", "new"),
        ] {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        assert!(is_any_aside(&home) && is_part_aside(&home));
        restore(&home, Path::new("/nowhere")).unwrap();
        fs::remove_dir(home.install_work()).unwrap();
        assert_eq!(files(directory.path()), ["bin", "bin/old", "log", "log/old.log", "run", "run/lock", "run/pid"]);
        assert_eq!(fs::read_to_string(directory.path().join("log/old.log")).unwrap(), "old");
        assert!(!is_any_aside(&home));
    }
}
