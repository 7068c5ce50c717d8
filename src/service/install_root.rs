//! The home during an installation: the lock, the work directory, and the directories that were created.
//!
//! If it is dropped without [`InstallRoot::commit`], everything that was created is removed.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{legacy, undo};
use crate::home::Home;
use crate::installation::{self, permissions};
use crate::lock::{self, LockGuard};
use crate::platform::{self, ExpectedPath};
use crate::store;

/// Timeout for the lock. The lock of a process that has just died may be held a moment longer.
const LOCK_DEADLINE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct InstallRoot {
    home: Home,
    /// The created directories, parents first.
    created: Vec<PathBuf>,
    lock: Option<LockGuard>,
    committed: bool,
    /// An earlier installation was killed here before it was complete.
    resumes: bool,
}

impl InstallRoot {
    /// Creates the home if it does not exist, and takes its lock. Rejects a home that other users can change, before anything in it is
    /// touched.
    pub(super) fn open(home: &Home) -> Result<InstallRoot> {
        let mut install_root =
            InstallRoot { home: home.clone(), created: Vec::new(), lock: None, committed: false, resumes: false };
        check_permissions(home)?;
        install_root.create_directory(home.root(), 0o755)?;
        install_root.create_directory(&home.run(), 0o700)?;
        // Again: the directories may have been created by another process meanwhile.
        check_permissions(home)?;
        install_root.lock = lock::take(&home.install_lock(), LOCK_DEADLINE)?;
        if install_root.lock.is_none() {
            bail!("another installation is in progress in {}; wait until it has finished", home.root().display());
        }
        install_root.sweep()?;
        installation::temporaries::sweep(home);
        install_root.create_directory(&install_root.work(), 0o700)?;
        check_permissions(home)?;
        Ok(install_root)
    }

    /// For a first installation, records the directories that it creates, so that the next run can remove them if this one is killed.
    /// Takes over the record of a killed run.
    pub(super) fn record_created(&mut self) -> Result<()> {
        let stands = installation::exists(&self.home) || legacy::is_old(&self.home) || legacy::is_any_aside(&self.home);
        if stands && !is_incomplete(&self.home) {
            return store::remove(&self.home.install_journal());
        }
        match store::load::<Vec<PathBuf>>(&self.home.install_journal())? {
            Some(interrupted) => {
                self.resumes = true;
                let own = self.created.split_off(0).into_iter().filter(|path| !interrupted.contains(path));
                self.created = interrupted.iter().cloned().chain(own).collect();
                Ok(())
            }
            None => {
                let to_be = self.home.directories().into_iter().map(|(path, _)| path);
                let missing = to_be.filter(|path| path.symlink_metadata().is_err());
                let noted: Vec<PathBuf> = self.created.iter().cloned().chain(missing).collect();
                // The work directory, in which the record is.
                sync(self.home.root())?;
                store::save(&self.home.install_journal(), &noted)
            }
        }
    }

    /// Removes what a killed installation left in the work directory, except for what it had set aside, its record of created directories,
    /// and what could not be restored.
    fn sweep(&self) -> Result<()> {
        let work = self.work();
        let Ok(entries) = fs::read_dir(&work) else { return Ok(()) };
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", work.display()))?.path();
            if legacy::is_aside(&self.home, &path) || path == self.home.install_journal() || undo::is_retained(&path) {
                continue;
            }
            if path.is_dir() && !path.is_symlink() { store::remove_tree(&path)? } else { store::remove(&path)? }
        }
        Ok(())
    }

    /// The work directory of an installation, on the home's file system.
    pub(super) fn work(&self) -> PathBuf {
        self.home.install_work()
    }

    /// Creates a directory and its parents if they do not exist, and records them as created.
    pub(super) fn create_directory(&mut self, path: &Path, mode: u32) -> Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|path| path.symlink_metadata().is_err()).collect();
        for directory in missing.into_iter().rev() {
            match fs::create_dir(directory) {
                Ok(()) => {
                    self.created.push(directory.to_owned());
                    if directory == self.home.root() {
                        platform::protect_new_home(directory)
                            .with_context(|| format!("cannot set the access list of {}", directory.display()))?;
                    }
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot create the directory {}", directory.display()));
                }
            }
            let mode = if directory == path { mode } else { 0o755 };
            platform::set_mode(directory, mode)
                .with_context(|| format!("cannot set the mode of {}", directory.display()))?;
            // The names in the home are synced with its links.
            if let Some(parent) = directory.parent().filter(|parent| !parent.starts_with(self.home.root())) {
                sync(parent)?;
            }
        }
        if !path.is_dir() {
            bail!("cannot create the directory {}: a file of this name exists; remove it", path.display());
        }
        Ok(())
    }

    /// The created directories that are the home or above it, parents first.
    pub(super) fn created_for_home(&self) -> Vec<PathBuf> {
        self.created.iter().filter(|path| self.home.root().starts_with(path)).cloned().collect()
    }

    /// Drops the created directories inside the home: the restored installation owns them again.
    pub(super) fn forget_inside(&mut self) {
        let (root, run) = (self.home.root().to_owned(), self.home.run());
        self.created.retain(|path| *path == run || root.starts_with(path));
    }

    /// Drops the record of all created directories: none is removed.
    pub(super) fn forget_all(&mut self) {
        self.created.clear();
    }

    /// Keeps what was created, even if the installation fails.
    pub(super) fn keep_created(&mut self) {
        self.committed = true;
    }

    /// Commits: keeps what was created, and removes the lock and the work directory.
    pub(super) fn commit(mut self) {
        self.keep_created();
    }
}

fn sync(directory: &Path) -> Result<()> {
    platform::sync_directory(directory).with_context(|| format!("cannot sync {}", directory.display()))
}

/// Rejects a home that other users can change, also the files that an installation reads or runs there.
pub(super) fn check_permissions(home: &Home) -> Result<()> {
    let work = home.install_work();
    let made = (home.install_journal(), ExpectedPath::File);
    let stopped = (legacy::record_path(home), ExpectedPath::File);
    let script = legacy::script(home).map(|script| (script, ExpectedPath::File));
    let also: Vec<_> = [(work, ExpectedPath::Directory), made, stopped].into_iter().chain(script).collect();
    permissions::install_paths(home, &also)
}

/// Whether a first installation was killed here before it was complete.
pub(super) fn is_incomplete(home: &Home) -> bool {
    let is_there = |path: PathBuf| path.symlink_metadata().is_ok();
    is_there(home.install_journal()) && !is_there(home.install_record())
}

/// The directories that this one had created or was about to create.
pub(super) fn recorded_directories(home: &Home) -> Vec<PathBuf> {
    store::load(&home.install_journal()).ok().flatten().unwrap_or_default()
}

impl Drop for InstallRoot {
    fn drop(&mut self) {
        // What was set aside and not restored exists nowhere else.
        let keeps_work = legacy::is_any_aside(&self.home) || (!self.committed && undo::has_retained(&self.work()));
        let was_locked = self.lock.is_some();
        if let Some(lock) = self.lock.take() {
            if !keeps_work {
                let _ = store::remove_tree(&self.work());
            }
            // Removed while it is held: a waiting process then sees that its file is no longer the lock.
            let _ = store::remove(&self.home.install_lock());
            // On Windows, its directory can be removed when no process has it open.
            drop(lock);
        }
        if self.committed {
            return;
        }
        if self.resumes && self.home.control_link().is_symlink() {
            let _ = store::remove(&self.home.control_link());
        }
        let work = self.work();
        for path in self.created.iter().rev().filter(|path| !(keeps_work && **path == work)) {
            // Without the lock, the files inside belong to another process.
            if was_locked && path.starts_with(self.home.root()) && path != self.home.root() {
                let _ = store::remove_tree(path);
            } else {
                let _ = fs::remove_dir(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_run_takes_over_what_a_killed_installation_created() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("made/home"));
        let killed = || {
            let mut install_root = InstallRoot::open(&home).unwrap();
            install_root.record_created().unwrap();
            for (path, mode) in home.directories() {
                install_root.create_directory(&path, mode).unwrap();
            }
            // Everything except for the last record.
            for path in [home.agent_id(), home.executable(), home.role_link("aops-spm")] {
                fs::write(path, "1").unwrap();
            }
            platform::replace_link(Path::new("bin/aops"), &home.control_link()).unwrap();
            install_root.lock = None;
            std::mem::forget(install_root);
        };
        killed();
        assert!(is_incomplete(&home) && installation::exists(&home) && !legacy::is_old(&home));
        killed();
        let mut install_root = InstallRoot::open(&home).unwrap();
        install_root.record_created().unwrap();
        assert_eq!(install_root.created_for_home(), [directory.path().join("made"), home.root().to_owned()]);
        drop(install_root);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_existing_installation_is_not_incomplete() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::write(directory.path().join("agentId"), "1").unwrap();
        fs::create_dir(home.etc()).unwrap();
        fs::write(home.etc().join("conf.yml"), "heartbeatSrv: https://old:1\n").unwrap();
        for _ in 0..2 {
            let mut install_root = InstallRoot::open(&home).unwrap();
            install_root.record_created().unwrap();
            install_root.lock = None;
            std::mem::forget(install_root);
            assert!(!is_incomplete(&home) && legacy::is_old(&home));
        }
    }

    #[test]
    fn a_dropped_installation_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("a/b/home"));
        let install_root = InstallRoot::open(&home).unwrap();
        fs::write(install_root.work().join("x"), "x").unwrap();
        let created = install_root.created_for_home();
        assert_eq!(created, ["a", "a/b", "a/b/home"].map(|path| directory.path().join(path)));
        drop(install_root);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_that_cannot_be_restored_are_retained_until_an_installation_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("home"));
        let install_root = InstallRoot::open(&home).unwrap();
        let retained = install_root.work().join("kept-1");
        fs::create_dir(&retained).unwrap();
        drop(install_root);
        assert!(retained.is_dir());
        drop(InstallRoot::open(&home).unwrap());
        assert!(retained.is_dir());
        InstallRoot::open(&home).unwrap().commit();
        assert!(!retained.exists() && !home.install_work().exists());
    }

    #[test]
    fn existing_directories_and_committed_ones_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::create_dir(home.run()).unwrap();
        fs::write(home.run().join("x"), "x").unwrap();
        drop(InstallRoot::open(&home).unwrap());
        assert!(home.run().join("x").exists() && !home.install_lock().exists() && !home.install_work().exists());

        let mut install_root = InstallRoot::open(&home).unwrap();
        install_root.create_directory(&home.bin(), 0o755).unwrap();
        install_root.commit();
        assert!(home.bin().is_dir() && !home.install_work().exists());
    }

    #[test]
    fn a_concurrent_installation_is_rejected_and_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("home"));
        let first = InstallRoot::open(&home).unwrap();
        let error = InstallRoot::open(&home).unwrap_err().to_string();
        assert!(error.contains("another installation"), "{error}");
        assert!(first.work().is_dir() && home.install_lock().exists());
        drop(first);
        assert!(!home.root().exists());
    }

    #[test]
    fn a_file_instead_of_a_directory_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        for (path, words) in [("file", "it is not a directory"), ("file/home", "cannot create the directory")] {
            let error = format!("{:#}", InstallRoot::open(&Home::new(directory.path().join(path))).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }
}
