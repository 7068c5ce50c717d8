//! `uninstall`: stops and removes everything: processes, units, files and links.
//!
//! It works from the home's own executable, with a dead manager, and with a missing unit. It can be repeated if it is killed, because the
//! records of the installation are removed last.

use std::fs;
use std::io::{IsTerminal, stdin};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use super::install_root::{self, InstallRoot};
use super::{NOT_INSTALLED, WRONG_USAGE, leftovers, progress, roles};
use crate::config;
use crate::home::Home;
use crate::installation::executable::ExecutableName;
use crate::installation::packaged::{self, PackageManager, PackageRecord};
use crate::installation::{self, InstallRecord};
use crate::output::{self, message};
use crate::store::{self, Access};
use crate::{host_service, platform};

/// Removes the installation in `home`. Asks first, unless `yes`.
pub fn uninstall(home: &Home, yes: bool) -> Result<ExitCode> {
    let shown = home.root().display();
    if !installation::exists(home)
        && !install_root::is_incomplete(home)
        && host_service::find_registration(home).is_none()
    {
        message!("aops: nothing is installed in {shown}");
        return Ok(ExitCode::from(NOT_INSTALLED));
    }
    if !yes {
        if !stdin().is_terminal() {
            message!("error: cannot ask whether to remove {shown}: there is no terminal; give --yes");
            return Ok(ExitCode::from(WRONG_USAGE));
        }
        if !confirmed(home)? {
            progress::say("nothing was removed");
            return Ok(ExitCode::FAILURE);
        }
    }
    remove(home).with_context(|| {
        format!("cannot remove the installation in {shown}; fix the problem and repeat the command")
    })?;
    progress::say(format_args!("removed the installation in {shown}"));
    if let Ok(Some(packaged)) = PackageRecord::load(home) {
        progress::say(format_args!(
            "the files of the package aops stay; remove it with `{}`",
            packaged.package_manager.removal()
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn confirmed(home: &Home) -> Result<bool> {
    output::ask(format_args!(
        "Stop and remove everything in {}, including all sub-agents? [y/N] ",
        home.root().display()
    ));
    let mut answer = String::new();
    stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn remove(home: &Home) -> Result<()> {
    // Before any file in the home is read.
    install_root::check_permissions(home)?;
    if packaged::is_unenrolled(home) && !install_root::is_incomplete(home) {
        // Nothing but the units is ours: other files were there before the package.
        return host_service::purge(host_service::detect(), home);
    }
    // An unreadable record does not prevent the uninstallation.
    let installed = InstallRecord::load(home).unwrap_or_else(|error| {
        progress::warn(format_args!("{error:#}"));
        None
    });
    let incomplete = install_root::is_incomplete(home).then(|| install_root::recorded_directories(home));
    let known = installed.is_some() || incomplete.is_some();
    let existed = home.root().is_dir();
    let install_root = InstallRoot::open(home)?;
    // Detected, not read from the record, which may be wrong or missing.
    let kind = host_service::detect();
    let registered = host_service::is_known(kind, home);
    if registered {
        // Before anything is stopped.
        host_service::can_unregister(kind, home)?;
    }
    progress::say("stopping sub-agents and roles");
    roles::stop_all(home)?;
    // Only now: a sub-agent may unmount its file systems when it stops.
    for directory in home.directories().iter().map(|(path, _)| path).filter(|path| *path != home.root()) {
        store::ensure_nothing_mounted(directory)?;
    }
    if registered {
        progress::say("removing the registration with the service manager");
        host_service::purge(kind, home)?;
    }
    progress::say("removing files");
    let (linked, created) = match installed {
        Some(installed) => (installed.linked, installed.created_directories),
        None => (Vec::new(), incomplete.unwrap_or_default()),
    };
    let mut left = Vec::new();
    for link in &linked {
        if let Err(error) = remove_our_link(home, link) {
            left.push(format!("the dangling link {}; remove it by hand ({error:#})", link.display()));
        }
    }
    platform::leave_directory(home.root())
        .with_context(|| format!("cannot move the running executable out of {}", home.root().display()))?;
    install_root.commit();
    let packaged = PackageRecord::load(home)?;
    let kept = packaged.as_ref().map(|record| kept_for_package(home, record)).transpose()?.unwrap_or_default();
    remove_files(home, &kept)?;
    // Without a record it is unknown whether the installation created the home: it is removed if it is empty.
    let directories = if known && existed { created } else { vec![home.root().to_owned()] };
    for directory in directories.iter().rev() {
        // A directory with other files in it is kept.
        let _ = fs::remove_dir(directory);
    }
    verify(home, left, &kept)?;
    let others = entries(home.root())?;
    if packaged.is_none() && !others.is_empty() {
        let names: Vec<String> = others.iter().map(|path| path.display().to_string()).collect();
        progress::warn(format_args!("files that the installation did not create are kept: {}", names.join(", ")));
    }
    Ok(())
}

/// Before a package of the host removes its files: stops everything and removes the rest.
pub(super) fn remove_before_package(home: &Home) -> Result<()> {
    remove(home).with_context(|| format!("cannot remove the installation in {}", home.root().display()))
}

/// Removes a link to this home; a link that was changed to a different target is kept.
fn remove_our_link(home: &Home, link: &Path) -> Result<()> {
    match fs::read_link(link) {
        Ok(target) if platform::identity(&target).starts_with(home.root()) => store::remove(link),
        _ => Ok(()),
    }
}

/// Removes the files of the installation; last the executable and the records, which a repeated uninstallation needs.
/// `kept` stays.
fn remove_files(home: &Home, kept: &[PathBuf]) -> Result<()> {
    let mut paths = owned(home, kept)?;
    let program = [home.bin(), home.control_link()];
    paths.sort_by_key(|path| (*path == home.state(), program.contains(path), path.clone()));
    for path in paths {
        let is_directory = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
        if is_directory { store::remove_tree(&path)? } else { store::remove(&path)? }
    }
    Ok(())
}

/// The paths in the home that belong to a package of the host and stay. The settings are again those that the package brought.
fn kept_for_package(home: &Home, record: &PackageRecord) -> Result<Vec<PathBuf>> {
    let names = ExecutableName::ALL.iter().map(|name| name.path(home));
    let mut kept: Vec<_> = names.chain([home.bin(), home.executable()]).collect();
    if record.package_manager == PackageManager::Rpm && home.config().is_file() {
        store::replace(&home.config(), config::TEMPLATE.as_bytes(), Access::Public)?;
        kept.extend([home.etc(), home.config()]);
    }
    Ok(kept)
}

/// The paths of the installation without those in `kept`; of a kept directory, what is in it.
fn owned(home: &Home, kept: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut paths = entries(home.root())?;
    paths.retain(|path| home.owns(path));
    for directory in [home.bin(), home.etc()].iter().filter(|directory| kept.contains(directory)) {
        paths.extend(entries(directory)?);
    }
    paths.retain(|path| !kept.contains(path));
    Ok(paths)
}

/// The paths in a directory.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let attempt = || fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    match attempt() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found.with_context(|| format!("cannot list {}", directory.display())),
    }
}

/// Checks that no file, unit or process of the installation remains, except for `kept`. `left`: what is known to remain.
fn verify(home: &Home, mut left: Vec<String>, kept: &[PathBuf]) -> Result<()> {
    left.extend(owned(home, kept)?.iter().map(|path| path.display().to_string()));
    if let Some(kind) = host_service::find_registration(home) {
        left.push(format!("a unit of {kind}"));
    }
    for process in leftovers::running_from(home.root()) {
        left.push(format!("the process {} ({})", process.pid, process.executable.display()));
    }
    if left.is_empty() { Ok(()) } else { bail!("not removed: {}", left.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::service_manager::ServiceManagerKind;

    fn home_in(directory: &Path) -> Home {
        let home = Home::new(directory.join("made/home"));
        for (path, _) in home.directories() {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(home.executable(), "x").unwrap();
        home
    }

    fn code(result: Result<ExitCode>) -> String {
        format!("{:?}", result.unwrap())
    }

    #[test]
    fn an_uninstallation_leaves_nothing_and_a_second_one_finds_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        let mut installed = InstallRecord::new(ServiceManagerKind::None);
        installed.created_directories = vec![directory.path().join("made"), home.root().to_owned()];
        let (ours, theirs) = (directory.path().join("ours"), directory.path().join("theirs"));
        platform::replace_link(&home.executable(), &ours).unwrap();
        platform::replace_link(Path::new("/elsewhere"), &theirs).unwrap();
        installed.linked = vec![ours.clone(), theirs.clone()];
        installed.save(&home).unwrap();

        assert_eq!(code(uninstall(&home, true)), format!("{:?}", ExitCode::SUCCESS));
        assert!(!directory.path().join("made").exists());
        assert!(ours.symlink_metadata().is_err() && theirs.symlink_metadata().is_ok());
        assert_eq!(code(uninstall(&home, true)), format!("{:?}", ExitCode::from(NOT_INSTALLED)));
        assert!(!home.root().exists());
    }

    #[test]
    fn a_directory_that_existed_before_the_installation_is_emptied_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        InstallRecord::new(ServiceManagerKind::None).save(&home).unwrap();
        uninstall(&home, true).unwrap();
        assert_eq!(fs::read_dir(home.root()).unwrap().count(), 0);
    }

    #[test]
    fn an_unreadable_record_does_not_prevent_an_uninstallation() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        fs::write(home.install_record(), "{").unwrap();
        uninstall(&home, true).unwrap();
        assert!(!home.root().exists());
    }

    #[test]
    fn an_installation_in_progress_prevents_an_uninstallation() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        InstallRecord::new(ServiceManagerKind::None).save(&home).unwrap();
        let install_root = InstallRoot::open(&home).unwrap();
        let error = format!("{:#}", uninstall(&home, true).unwrap_err());
        assert!(error.contains("another installation"), "{error}");
        assert!(home.executable().exists() && home.install_lock().exists());
        drop(install_root);
        uninstall(&home, true).unwrap();
    }
}
