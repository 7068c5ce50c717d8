//! Room on the disk for packages that are fetched at the same time: what one was promised is not there for the next.
//!
//! Two packages may each fit alone and not together. The second one then waits until the first is done, and fails only where nobody is
//! left to wait for.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::core::units::Size;
use crate::platform;

/// Left free for everybody else on the host, bytes.
const RESERVE: u64 = 64 << 20;

/// What was promised to fetches that are under way.
#[derive(Debug, Default)]
pub(super) struct Space {
    promised: Mutex<Promised>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Promised {
    last: u64,
    /// Bytes that each has yet to write.
    to_write: BTreeMap<u64, u64>,
}

/// Room for one package; given back when this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    space: &'a Space,
    number: u64,
}

impl Space {
    /// Promises room for so many bytes more on the file system of `directory`; waits until `until` for others to be done.
    pub(super) fn claim(&self, directory: &Path, bytes: u64, until: Instant) -> Result<Claim<'_>> {
        self.claim_of(&mut || platform::free_space(directory), directory, bytes, until)
    }

    fn claim_of(
        &self,
        free: &mut dyn FnMut() -> io::Result<u64>,
        directory: &Path,
        bytes: u64,
        until: Instant,
    ) -> Result<Claim<'_>> {
        let mut promised = self.lock();
        loop {
            let there =
                free().with_context(|| format!("cannot see how much space is free in {}", directory.display()))?;
            let others = promised.to_write.values().sum::<u64>();
            let needed = bytes.saturating_add(RESERVE);
            if there >= needed.saturating_add(others) {
                promised.last += 1;
                let number = promised.last;
                promised.to_write.insert(number, bytes);
                return Ok(Claim { space: self, number });
            }
            let left = until.saturating_duration_since(Instant::now());
            if others == 0 || left.is_zero() {
                let beside = match others {
                    0 => String::new(),
                    others => format!(", and {} for others that are being fetched", rounded(others)),
                };
                bail!(
                    "there is not enough space in {}: {} free, {} needed{beside}; free some there",
                    directory.display(),
                    rounded(there),
                    rounded(needed)
                );
            }
            promised = self.changed.wait_timeout(promised, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Bytes that are promised and not yet written.
    #[cfg(test)]
    pub(super) fn promised(&self) -> u64 {
        self.lock().to_write.values().sum()
    }

    /// Held for a moment only, and nothing under it panics.
    fn lock(&self) -> MutexGuard<'_, Promised> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fails unless so many bytes more fit into `directory` now. Nothing is promised.
pub(super) fn ensure(directory: &Path, bytes: u64) -> Result<()> {
    Space::default().claim(directory, bytes, Instant::now()).map(drop)
}

impl Claim<'_> {
    /// So many of its bytes lie on the disk now.
    pub(super) fn written(&self, bytes: u64) {
        if let Some(left) = self.space.lock().to_write.get_mut(&self.number) {
            *left = left.saturating_sub(bytes);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.space.lock().to_write.remove(&self.number);
        self.space.changed.notify_all();
    }
}

fn rounded(bytes: u64) -> Size {
    Size(if bytes < 1 << 20 { bytes } else { bytes.div_ceil(1 << 20) << 20 })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn claim(space: &Space, free: u64, bytes: u64, until: Instant) -> Result<Claim<'_>> {
        space.claim_of(&mut || Ok(free), Path::new("/x"), bytes, until)
    }

    #[test]
    fn what_does_not_fit_alone_is_refused_at_once_with_the_figures() {
        let error = claim(&Space::default(), 100 * MIB, 40 * MIB, soon()).unwrap_err().to_string();
        assert_eq!(error, "there is not enough space in /x: 100MiB free, 104MiB needed; free some there");
        claim(&Space::default(), 104 * MIB, 40 * MIB, soon()).unwrap();
        assert!(claim(&Space::default(), u64::MAX - 1, u64::MAX, soon()).is_err());
    }

    #[test]
    fn two_that_fit_alone_but_not_together_take_turns() {
        let (space, free) = (Space::default(), AtomicU64::new(120 * MIB));
        let first_is_done = AtomicBool::new(false);
        let first = claim(&space, 120 * MIB, 40 * MIB, soon()).unwrap();
        let error = claim(&space, 120 * MIB, 40 * MIB, Instant::now()).unwrap_err().to_string();
        assert!(error.contains("40MiB for others"), "{error}");
        // What the first has written is not promised to it any more, and not free either.
        first.written(30 * MIB);
        assert!(claim(&space, 90 * MIB, 40 * MIB, Instant::now()).is_err());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let mut free = || Ok(free.load(Ordering::SeqCst));
                let claim = space.claim_of(&mut free, Path::new("/x"), 90 * MIB, soon());
                assert!(first_is_done.load(Ordering::SeqCst));
                claim.map(drop)
            });
            free.store(160 * MIB, Ordering::SeqCst);
            first_is_done.store(true, Ordering::SeqCst);
            drop(first);
            waiting.join().unwrap().unwrap();
        });
        assert_eq!(space.promised(), 0);
    }
}
