//! Locks in `run/`, held for the life of a process: at most one manager, one watchdog and one installation per home.
//!
//! A lock only excludes; to watch its holder, use the control connection. The system frees it when the holder dies, sometimes a moment
//! later, so it is acquired with a timeout. The file is not removed while it may be locked. In case it was removed anyway, the locked file
//! is compared with the file that has the name now.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fd_lock::RwLock;

use crate::platform;

/// Delays between two attempts: a dying holder frees the lock soon, and [`is_held`] holds it for an instant.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LAST_RETRY: Duration = Duration::from_millis(20);

/// A lock that is held until this is dropped or the process exits.
#[derive(Debug)]
pub struct LockGuard {
    _lock: RwLock<File>,
}

/// Acquires the lock at `path` within the timeout `deadline`; `None`: another process still holds it. Fails on a read-only disk, because
/// the work under the lock needs to write.
pub fn take(path: &Path, deadline: Duration) -> Result<Option<LockGuard>> {
    take_by(open_to_write, path, deadline)
}

/// Like [`take`], for work that does not need a writable disk. On a read-only disk the file must exist already.
pub fn take_on_read_only_disk(path: &Path, deadline: Duration) -> Result<Option<LockGuard>> {
    take_by(open_to_lock, path, deadline)
}

fn open_to_write(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// A file that is opened for reading only can be locked too.
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
        // The file was removed and created again between our open and our lock: we locked the old one.
        Ok(guard) if !platform::is_same_file(&guard, path)? => return Ok(None),
        // The lock belongs to the open file, which `LockGuard` keeps; dropping the guard would free it.
        Ok(guard) => std::mem::forget(guard),
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    Ok(Some(LockGuard { _lock: lock }))
}

/// Whether any process holds the lock at `path` now. For display and to decide whether to wait, never for exclusion.
pub fn is_held(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    matches!(RwLock::new(file).try_write(), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{self, OtherProcess, PATIENCE};

    const HOLDER: &str = "lock::tests::a_holder";

    /// Acquires the lock and keeps running.
    #[test]
    fn a_holder() {
        let Some(path) = testing::part(HOLDER) else { return };
        let held = take(Path::new(&path), Duration::ZERO).unwrap();
        testing::report(held.is_some());
        testing::block();
    }

    #[test]
    fn a_lock_of_another_process_excludes_this_one_until_that_process_dies() {
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
