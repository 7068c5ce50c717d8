//! Locks in `run/`, held for a process's life: at most one manager, one watchdog, one installation at a time in a home.
//!
//! A lock excludes and says nothing else: who watches its holder uses the control connection. The system frees it at the holder's death,
//! sometimes a moment later, so it is taken with a deadline. The file is never removed while somebody may hold it; as somebody may
//! remove it all the same, the file that was locked is compared with the one that has the name now.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fd_lock::RwLock;

use crate::platform;

/// Between two tries at a lock that somebody else holds: who is dying frees it soon, who looks whether it is held holds it for an instant.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LAST_RETRY: Duration = Duration::from_millis(20);

/// A lock that is held until this is dropped or the process ends.
#[derive(Debug)]
pub struct LockGuard {
    _lock: RwLock<File>,
}

/// Takes the lock at `path`, trying until `deadline` has passed; `None`: somebody else still holds it. On a read-only disk that fails, before
/// anything is done under the lock that a disk is needed for.
pub fn take(path: &Path, deadline: Duration) -> Result<Option<LockGuard>> {
    take_by(open_to_write, path, deadline)
}

/// As [`take`], for what can do without a disk that can be written. The file must be there from before then.
pub fn take_on_any_disk(path: &Path, deadline: Duration) -> Result<Option<LockGuard>> {
    take_by(open_to_lock, path, deadline)
}

fn open_to_write(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// A file locks no less when it can only be read.
fn open_to_lock(path: &Path) -> io::Result<File> {
    match open_to_write(path) {
        Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => File::open(path).map_err(|_| error),
        opened => opened,
    }
}

fn take_by(open: impl Fn(&Path) -> io::Result<File>, path: &Path, deadline: Duration) -> Result<Option<LockGuard>> {
    let started = Instant::now();
    loop {
        if let Some(held) = attempt(&open, path).with_context(|| format!("cannot take the lock {}", path.display()))? {
            return Ok(Some(held));
        }
        if started.elapsed() >= deadline {
            return Ok(None);
        }
        platform::pause((started.elapsed() / 4).clamp(FIRST_RETRY, LAST_RETRY));
    }
}

fn attempt(open: impl Fn(&Path) -> io::Result<File>, path: &Path) -> Result<Option<LockGuard>> {
    let mut lock = RwLock::new(open(path)?);
    match lock.try_write() {
        // Somebody removed the file and made it again between our opening and our locking: ours locks nothing.
        Ok(guard) if !platform::is_same_file(&guard, path)? => return Ok(None),
        // The lock belongs to the open file, which `Held` keeps; the guard would only free it early.
        Ok(guard) => std::mem::forget(guard),
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    Ok(Some(LockGuard { _lock: lock }))
}

/// Whether somebody holds the lock at `path` now. For display and for deciding whom to wait for, never for exclusion.
pub fn is_held(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    matches!(RwLock::new(file).try_write(), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{self, OtherProcess, PATIENCE};

    const HOLDER: &str = "lock::tests::a_holder";

    /// Takes the lock, and stays.
    #[test]
    fn a_holder() {
        let Some(path) = testing::part(HOLDER) else { return };
        let held = take(Path::new(&path), Duration::ZERO).unwrap();
        testing::report(held.is_some());
        testing::block();
    }

    #[test]
    fn a_lock_of_another_process_excludes_us_until_its_death() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spm.lock");
        let mut holder = OtherProcess::start(HOLDER, &path);
        assert_eq!(holder.line(), "true");
        assert!(is_held(&path));
        assert!(take(&path, Duration::ZERO).unwrap().is_none());
        assert_eq!(OtherProcess::start(HOLDER, &path).line(), "false");
        holder.kill();
        let held = take(&path, PATIENCE).unwrap();
        assert!(held.is_some());
        drop(held);
        assert!(!is_held(&path));
    }
}
