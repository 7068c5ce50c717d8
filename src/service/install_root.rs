//! The place where an installation is at work: its lock, its own directory, and the directories that it had to make.
//!
//! Dropped without [`InstallRoot::keep`], it leaves nothing behind that was not there before.

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

/// A holder that has just died may be seen a moment longer.
const LOCK_DEADLINE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct InstallRoot {
    home: Home,
    /// What was made, parents first.
    created: Vec<PathBuf>,
    lock: Option<LockGuard>,
    kept: bool,
    /// An installation was killed here before it was whole.
    resumes: bool,
}

impl InstallRoot {
    /// Takes the lock of the home, which is made where it is not there. Nothing is touched where somebody else could change what is found
    /// there, or lead elsewhere what is done there.
    pub(super) fn open(home: &Home) -> Result<InstallRoot> {
        let mut site = InstallRoot { home: home.clone(), created: Vec::new(), lock: None, kept: false, resumes: false };
        sound(home)?;
        site.make(home.root(), 0o755)?;
        site.make(&home.run(), 0o700)?;
        // What came there in between was made by us, or by whoever may.
        sound(home)?;
        site.lock = lock::take(&home.install_lock(), LOCK_DEADLINE)?;
        if site.lock.is_none() {
            bail!("another installation is at work there; wait until it has ended");
        }
        site.sweep()?;
        site.make(&site.work(), 0o700)?;
        sound(home)?;
        Ok(site)
    }

    /// Where nothing stands, notes what is made here, also what will be, for the one that comes after a kill; what an interrupted one noted
    /// is ours now.
    pub(super) fn note(&mut self) -> Result<()> {
        let stands = installation::exists(&self.home) || legacy::is_old(&self.home) || legacy::is_any_aside(&self.home);
        if stands && !is_half_made(&self.home) {
            return store::remove(&self.home.install_made());
        }
        match store::load::<Vec<PathBuf>>(&self.home.install_made())? {
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
                store::save(&self.home.install_made(), &noted)
            }
        }
    }

    /// Removes what an installation that was killed left in its directory, but for what it had set aside, its note, and what one that failed
    /// could not put back.
    fn sweep(&self) -> Result<()> {
        let work = self.work();
        let Ok(entries) = fs::read_dir(&work) else { return Ok(()) };
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", work.display()))?.path();
            if legacy::is_aside(&self.home, &path) || path == self.home.install_made() || undo::is_kept(&path) {
                continue;
            }
            if path.is_dir() && !path.is_symlink() { store::remove_tree(&path)? } else { store::remove(&path)? }
        }
        Ok(())
    }

    /// The directory for what is needed meanwhile, on the home's own file system.
    pub(super) fn work(&self) -> PathBuf {
        self.home.install_work()
    }

    /// Makes a directory and its parents, where they are not there, and remembers that.
    pub(super) fn make(&mut self, path: &Path, mode: u32) -> Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|path| path.symlink_metadata().is_err()).collect();
        for directory in missing.into_iter().rev() {
            match fs::create_dir(directory) {
                Ok(()) => self.created.push(directory.to_owned()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot make the directory {}", directory.display()));
                }
            }
            let mode = if directory == path { mode } else { 0o755 };
            platform::set_mode(directory, mode)
                .with_context(|| format!("cannot set the mode of {}", directory.display()))?;
        }
        if !path.is_dir() {
            bail!("cannot make the directory {}: a file is in the way", path.display());
        }
        Ok(())
    }

    /// The directories that were made for the home: itself and what leads there, parents first.
    pub(super) fn created_for_home(&self) -> Vec<PathBuf> {
        self.created.iter().filter(|path| self.home.root().starts_with(path)).cloned().collect()
    }

    /// What stands in the home is another's again: it is not taken for what was made.
    pub(super) fn forget_inside(&mut self) {
        let (root, run) = (self.home.root().to_owned(), self.home.run());
        self.created.retain(|path| *path == run || root.starts_with(path));
    }

    /// Nothing of what was made is taken away again.
    pub(super) fn forget_all(&mut self) {
        self.created.clear();
    }

    /// What was made stays, whatever becomes of the rest.
    pub(super) fn stay(&mut self) {
        self.kept = true;
    }

    /// What was made stays; only the lock and the directory for the time between go.
    pub(super) fn keep(mut self) {
        self.stay();
    }
}

/// Refuses a home, or an older installation in it, that cannot be relied on.
pub(super) fn sound(home: &Home) -> Result<()> {
    let work = home.install_work();
    let made = (home.install_made(), ExpectedPath::File);
    let script = legacy::script(home).map(|script| (script, ExpectedPath::File));
    let also: Vec<_> = [(work, ExpectedPath::Directory), made].into_iter().chain(script).collect();
    permissions::grounds(home, &also)
}

/// Whether an installation was killed here before it was whole, where nothing had stood.
pub(super) fn is_half_made(home: &Home) -> bool {
    let is_there = |path: PathBuf| path.symlink_metadata().is_ok();
    is_there(home.install_made()) && !is_there(home.install_record())
}

/// What that one had made, or was about to.
pub(super) fn half_made(home: &Home) -> Vec<PathBuf> {
    store::load(&home.install_made()).ok().flatten().unwrap_or_default()
}

impl Drop for InstallRoot {
    fn drop(&mut self) {
        // What was set aside and not brought back is all there is of it, and so is what could not be put back.
        let keeps_work = legacy::is_any_aside(&self.home) || (!self.kept && undo::is_any_kept(&self.work()));
        if self.lock.is_some() {
            if !keeps_work {
                let _ = store::remove_tree(&self.work());
            }
            // Still held: whoever waits for it sees that the file is another's.
            let _ = store::remove(&self.home.install_lock());
        }
        if self.kept {
            return;
        }
        if self.resumes && self.home.control_link().is_symlink() {
            let _ = store::remove(&self.home.control_link());
        }
        let work = self.work();
        for path in self.created.iter().rev().filter(|path| !(keeps_work && **path == work)) {
            // Without the lock, what lies inside is somebody else's.
            if self.lock.is_some() && path.starts_with(self.home.root()) && path != self.home.root() {
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
    fn what_one_that_was_killed_had_made_is_the_next_ones() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("made/home"));
        let killed = || {
            let mut site = InstallRoot::open(&home).unwrap();
            site.note().unwrap();
            for (path, mode) in home.directories() {
                site.make(&path, mode).unwrap();
            }
            // As far as it may come without its last record.
            for path in [home.agent_id(), home.executable(), home.role_link("aops-spm")] {
                fs::write(path, "1").unwrap();
            }
            platform::replace_link(Path::new("bin/aops"), &home.control_link()).unwrap();
            site.lock = None;
            std::mem::forget(site);
        };
        killed();
        assert!(is_half_made(&home) && installation::exists(&home) && !legacy::is_old(&home));
        killed();
        let mut site = InstallRoot::open(&home).unwrap();
        site.note().unwrap();
        assert_eq!(site.created_for_home(), [directory.path().join("made"), home.root().to_owned()]);
        drop(site);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_stands_is_not_taken_for_half_made() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::write(directory.path().join("agentId"), "1").unwrap();
        fs::create_dir(home.etc()).unwrap();
        fs::write(home.etc().join("conf.yml"), "heartbeatSrv: https://old:1\n").unwrap();
        for _ in 0..2 {
            let mut site = InstallRoot::open(&home).unwrap();
            site.note().unwrap();
            site.lock = None;
            std::mem::forget(site);
            assert!(!is_half_made(&home) && legacy::is_old(&home));
        }
    }

    #[test]
    fn what_was_not_kept_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("a/b/home"));
        let site = InstallRoot::open(&home).unwrap();
        fs::write(site.work().join("x"), "x").unwrap();
        let created = site.created_for_home();
        assert_eq!(created, ["a", "a/b", "a/b/home"].map(|path| directory.path().join(path)));
        drop(site);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_could_not_be_put_back_stays_until_an_installation_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path().join("home"));
        let site = InstallRoot::open(&home).unwrap();
        let kept = site.work().join("kept-1");
        fs::create_dir(&kept).unwrap();
        drop(site);
        assert!(kept.is_dir());
        drop(InstallRoot::open(&home).unwrap());
        assert!(kept.is_dir());
        InstallRoot::open(&home).unwrap().keep();
        assert!(!kept.exists() && !home.install_work().exists());
    }

    #[test]
    fn what_was_there_before_stays_and_what_was_kept_too() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::create_dir(home.run()).unwrap();
        fs::write(home.run().join("x"), "x").unwrap();
        drop(InstallRoot::open(&home).unwrap());
        assert!(home.run().join("x").exists() && !home.install_lock().exists() && !home.install_work().exists());

        let mut site = InstallRoot::open(&home).unwrap();
        site.make(&home.bin(), 0o755).unwrap();
        site.keep();
        assert!(home.bin().is_dir() && !home.install_work().exists());
    }

    #[test]
    fn a_second_one_is_kept_out_and_harms_nothing() {
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
    fn a_file_in_the_way_is_told() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        for (path, words) in [("file", "it is not a directory"), ("file/home", "cannot make the directory")] {
            let error = format!("{:#}", InstallRoot::open(&Home::new(directory.path().join(path))).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }
}
