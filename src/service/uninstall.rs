//! `uninstall`: everything stops, and nothing stays: no process, no unit, no file, no link.
//!
//! It works from the home's own executable, with a dead manager, and with a unit that is already gone; killed half-way, it can be
//! repeated, because the records of the installation go last.

use std::fs;
use std::io::{IsTerminal, stdin};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use super::install_root::{self, InstallRoot};
use super::{NOT_INSTALLED, WRONG_USAGE, leftovers, progress, roles};
use crate::home::Home;
use crate::installation::{self, InstallRecord};
use crate::output::{self, message};
use crate::{host_service, platform, store};

/// Removes the installation in `home`. Asks first, unless `yes`.
pub fn uninstall(home: &Home, yes: bool) -> Result<ExitCode> {
    let shown = home.root().display();
    if !installation::exists(home)
        && !install_root::is_half_made(home)
        && host_service::find_registration(home).is_none()
    {
        message!("aops: nothing is installed in {shown}");
        return Ok(ExitCode::from(NOT_INSTALLED));
    }
    if !yes {
        if !stdin().is_terminal() {
            message!("error: cannot ask whether to remove {shown}: there is no terminal; say --yes");
            return Ok(ExitCode::from(WRONG_USAGE));
        }
        if !confirmed(home)? {
            progress::say("nothing was removed");
            return Ok(ExitCode::FAILURE);
        }
    }
    remove(home).with_context(|| {
        format!("cannot remove the installation in {shown}; correct what is wrong and repeat the command")
    })?;
    progress::say(format_args!("the installation in {shown} is removed"));
    Ok(ExitCode::SUCCESS)
}

fn confirmed(home: &Home) -> Result<bool> {
    output::ask(format_args!(
        "Stop and remove everything in {}, all sub-agents included? [y/N] ",
        home.root().display()
    ));
    let mut answer = String::new();
    stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn remove(home: &Home) -> Result<()> {
    // Before a word of what lies there is believed.
    install_root::sound(home)?;
    // A record that can't be read must not keep the rest here.
    let installed = InstallRecord::load(home).unwrap_or_else(|error| {
        progress::warn(format_args!("{error:#}"));
        None
    });
    let half_made = install_root::is_half_made(home).then(|| install_root::half_made(home));
    let known = installed.is_some() || half_made.is_some();
    let stood = home.root().is_dir();
    let at_work = InstallRoot::open(home)?;
    // By the host, not by the record: that may say none, or be gone.
    let kind = host_service::detect();
    let registered = host_service::is_known(kind, home);
    if registered {
        // Before anything is stopped.
        host_service::can_unregister(kind, home)?;
    }
    progress::say("stopping sub-agents and roles");
    roles::stop_all(home)?;
    // Not earlier: what a sub-agent has mounted it may have unmounted by now.
    for directory in home.directories().iter().map(|(path, _)| path).filter(|path| *path != home.root()) {
        store::ensure_nothing_mounted(directory)?;
    }
    if registered {
        progress::say("taking the units away");
        host_service::purge(kind, home)?;
    }
    progress::say("removing files");
    let (linked, created) = match installed {
        Some(installed) => (installed.linked, installed.created_directories),
        None => (Vec::new(), half_made.unwrap_or_default()),
    };
    let mut left = Vec::new();
    for link in &linked {
        if let Err(error) = remove_our_link(home, link) {
            left.push(format!("the link {}, which leads nowhere now; remove it by hand ({error:#})", link.display()));
        }
    }
    platform::leave_directory(home.root())
        .with_context(|| format!("cannot move the running executable out of {}", home.root().display()))?;
    at_work.keep();
    empty(home)?;
    // Without a record nobody knows who made the home; an empty directory is nothing to keep.
    let directories = if known && stood { created } else { vec![home.root().to_owned()] };
    for directory in directories.iter().rev() {
        // One that holds something else by now stays.
        let _ = fs::remove_dir(directory);
    }
    verify(home, left)?;
    let others = entries(home)?;
    if !others.is_empty() {
        let names: Vec<String> = others.iter().map(|path| path.display().to_string()).collect();
        progress::warn(format_args!("what the installation did not make stays: {}", names.join(", ")));
    }
    Ok(())
}

/// A link that somebody has pointed elsewhere since is theirs.
fn remove_our_link(home: &Home, link: &Path) -> Result<()> {
    match fs::read_link(link) {
        Ok(target) if platform::identity(&target).starts_with(home.root()) => store::remove(link),
        _ => Ok(()),
    }
}

/// Removes what the installation made in the home: at last the program that a repetition takes, and the records by which that recognizes it.
fn empty(home: &Home) -> Result<()> {
    let mut paths = entries(home)?;
    paths.retain(|path| home.owns(path));
    let program = [home.bin(), home.control_link()];
    paths.sort_by_key(|path| (*path == home.state(), program.contains(path), path.clone()));
    for path in paths {
        let is_directory = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
        if is_directory { store::remove_tree(&path)? } else { store::remove(&path)? }
    }
    Ok(())
}

/// What lies in the home.
fn entries(home: &Home) -> Result<Vec<PathBuf>> {
    let attempt = || fs::read_dir(home.root())?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    match attempt() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found.with_context(|| format!("cannot list {}", home.root().display())),
    }
}

/// Makes sure that nothing is left but what is known to be.
fn verify(home: &Home, mut left: Vec<String>) -> Result<()> {
    left.extend(entries(home)?.iter().filter(|path| home.owns(path)).map(|path| path.display().to_string()));
    if let Some(kind) = host_service::find_registration(home) {
        left.push(format!("a unit of {kind}"));
    }
    for process in leftovers::running_from(home.root()) {
        left.push(format!("the process {} ({})", process.pid, process.executable.display()));
    }
    if left.is_empty() { Ok(()) } else { bail!("there is still {}", left.join(", ")) }
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
    fn nothing_is_left_and_the_second_time_there_is_nothing_to_remove() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        let mut installed = InstallRecord::by(ServiceManagerKind::None);
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
    fn a_directory_that_was_there_before_stays_and_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        InstallRecord::by(ServiceManagerKind::None).save(&home).unwrap();
        uninstall(&home, true).unwrap();
        assert_eq!(fs::read_dir(home.root()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_that_cannot_be_read_keeps_nothing_here() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        fs::write(home.install_record(), "{").unwrap();
        uninstall(&home, true).unwrap();
        assert!(!home.root().exists());
    }

    #[test]
    fn one_at_work_in_the_home_is_not_disturbed() {
        let directory = tempfile::tempdir().unwrap();
        let home = home_in(directory.path());
        InstallRecord::by(ServiceManagerKind::None).save(&home).unwrap();
        let site = InstallRoot::open(&home).unwrap();
        let error = format!("{:#}", uninstall(&home, true).unwrap_err());
        assert!(error.contains("another installation"), "{error}");
        assert!(home.executable().exists() && home.install_lock().exists());
        drop(site);
        uninstall(&home, true).unwrap();
    }
}
