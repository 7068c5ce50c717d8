//! Reserves disk space for concurrent fetches, so that two fetches do not count on the same free space.
//!
//! Two packages may each fit alone but not together. Then one waits until the other completes, and fails only if no other fetch can release
//! space. A package of unknown size reserves more as it arrives, and so does a tree that is larger than estimated.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::core::units::Size;
use crate::platform;

/// Bytes left free for everything else on the host.
const RESERVE: u64 = 64 << 20;
/// Space for a package's archive and tree, as a multiple of the archive's size.
const PER_PACKAGE: u64 = 4;
/// Bytes reserved at a time for a package of unknown size, or a tree that is larger than estimated.
const STEP: u64 = 16 << 20;
/// How often a waiting fetch checks for cancellation.
const LOOK: Duration = Duration::from_millis(500);

/// Called while waiting; an error stops the wait.
type StillWanted<'a> = dyn FnMut() -> Result<()> + 'a;

/// The reservations of all fetches in progress.
#[derive(Debug, Default)]
pub(super) struct DiskReservations {
    promised: Mutex<Filesystem>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Filesystem {
    last: u64,
    claims: BTreeMap<u64, FetchReservation>,
}

#[derive(Debug, Default)]
struct FetchReservation {
    /// Bytes reserved and not yet written.
    to_write: u64,
    /// It has reserved space, which it releases when it completes.
    holds: bool,
    /// It waits for others to release space, and releases none before.
    waits: bool,
}

impl Filesystem {
    fn others(&self, number: u64) -> impl Iterator<Item = &FetchReservation> {
        self.claims.iter().filter(move |(other, _)| **other != number).map(|(_, claimed)| claimed)
    }
}

/// Not enough disk space, and no other fetch will release any. The cause is this host, not the package.
#[derive(Debug)]
pub(super) struct InsufficientSpace(String);

impl fmt::Display for InsufficientSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InsufficientSpace {}

impl DiskReservations {
    /// Registers a fetch, with nothing reserved yet.
    fn claim(&self) -> Reservation<'_> {
        let mut promised = self.lock();
        promised.last += 1;
        let number = promised.last;
        promised.claims.insert(number, FetchReservation::default());
        Reservation { space: self, number }
    }

    /// Bytes reserved and not yet written, of all fetches.
    #[cfg(test)]
    pub(super) fn promised(&self) -> u64 {
        self.lock().claims.values().map(|claimed| claimed.to_write).sum()
    }

    /// Held briefly; no code that holds it panics.
    fn lock(&self) -> MutexGuard<'_, Filesystem> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reservation of one fetch, released when this is dropped.
#[derive(Debug)]
struct Reservation<'a> {
    space: &'a DiskReservations,
    number: u64,
}

impl Reservation<'_> {
    /// Reserves `bytes` more. `free` returns the free space in `directory`. Waits until `until` for other fetches to release space; on
    /// failure, releases all that this fetch has reserved.
    fn grow(
        &self,
        bytes: u64,
        directory: &Path,
        free: &mut dyn FnMut() -> io::Result<u64>,
        until: Instant,
        still_wanted: &mut StillWanted<'_>,
    ) -> Result<()> {
        let grown = self.grown(bytes, directory, free, until, still_wanted);
        if grown.is_err() {
            self.give_back();
        }
        grown
    }

    fn grown(
        &self,
        bytes: u64,
        directory: &Path,
        free: &mut dyn FnMut() -> io::Result<u64>,
        until: Instant,
        still_wanted: &mut StillWanted<'_>,
    ) -> Result<()> {
        let mut promised = self.space.lock();
        loop {
            let there =
                free().with_context(|| format!("cannot determine the free space in {}", directory.display()))?;
            let others: u64 = promised.others(self.number).map(|claimed| claimed.to_write).sum();
            let own = promised.claims.get(&self.number).map_or(0, |claimed| claimed.to_write);
            let needed = own.saturating_add(bytes).saturating_add(RESERVE);
            if there >= needed.saturating_add(others) {
                let claimed = promised.claims.entry(self.number).or_default();
                *claimed = FetchReservation { to_write: own.saturating_add(bytes), holds: true, waits: false };
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            let is_hopeless = promised.others(self.number).all(|claimed| claimed.waits || !claimed.holds);
            if is_hopeless || left.is_zero() {
                let beside = match others {
                    0 => String::new(),
                    others => format!(", and {} for other downloads", rounded(others)),
                };
                let why = format!(
                    "not enough disk space in {}: {} free, {} needed{beside}; free some space there",
                    directory.display(),
                    rounded(there),
                    rounded(needed)
                );
                return Err(InsufficientSpace(why).into());
            }
            promised.claims.entry(self.number).or_default().waits = true;
            promised =
                self.space.changed.wait_timeout(promised, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
            still_wanted()?;
        }
    }

    /// Sets how many of the reserved bytes are not written yet.
    fn has_to_write(&self, bytes: u64) {
        if let Some(claimed) = self.space.lock().claims.get_mut(&self.number) {
            claimed.to_write = bytes;
        }
    }

    fn give_back(&self) {
        self.space.lock().claims.remove(&self.number);
        self.space.changed.notify_all();
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// The space for one package, from its first byte to its unpacked tree.
#[derive(Debug)]
pub(super) struct PackageSpace<'a> {
    claim: Reservation<'a>,
    directory: &'a Path,
    until: Instant,
    /// Total reserved.
    promised: u64,
    /// Bytes of the archive and of the tree that are written.
    archive: u64,
    tree: u64,
}

impl<'a> PackageSpace<'a> {
    /// Reserves nothing yet, on the file system of `directory`. Later reservations wait until `until` for others.
    pub(super) fn new(space: &'a DiskReservations, directory: &'a Path, until: Instant) -> PackageSpace<'a> {
        PackageSpace { claim: space.claim(), directory, until, promised: 0, archive: 0, tree: 0 }
    }

    /// Reserves space for a package of this size and its tree.
    pub(super) fn fit(&mut self, package: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        self.promise(package.saturating_mul(PER_PACKAGE), still_wanted)
    }

    /// Like [`PackageSpace::fit`], for a package of unknown size of which `come` bytes have arrived: reserves ahead.
    pub(super) fn fit_more(&mut self, come: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        let needed = come.saturating_mul(PER_PACKAGE);
        if needed > self.promised {
            self.promise(needed.saturating_add(STEP), still_wanted)?;
        }
        Ok(())
    }

    /// Sets how many bytes of the archive are written.
    pub(super) fn has_archive(&mut self, bytes: u64) {
        self.archive = bytes;
        self.tell();
    }

    /// Accounts for `bytes` of the tree that will be written next.
    pub(super) fn unpacks(&mut self, bytes: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        let there = self.archive.saturating_add(self.tree).saturating_add(bytes);
        if there > self.promised {
            self.promise(there.saturating_add(STEP), still_wanted)?;
        }
        self.tree = self.tree.saturating_add(bytes);
        self.tell();
        Ok(())
    }

    fn promise(&mut self, bytes: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        // Bytes that are already written need no reservation.
        let more = bytes.saturating_sub(self.promised.max(self.archive.saturating_add(self.tree)));
        if bytes > self.promised {
            let directory = self.directory;
            let mut free = || platform::free_space(directory);
            self.claim.grow(more, directory, &mut free, self.until, still_wanted)?;
            self.promised = bytes;
        }
        Ok(())
    }

    fn tell(&self) {
        self.claim.has_to_write(self.promised.saturating_sub(self.archive.saturating_add(self.tree)));
    }
}

fn rounded(bytes: u64) -> Size {
    Size(if bytes < 1 << 20 { bytes } else { bytes.div_ceil(1 << 20) << 20 })
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use anyhow::bail;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// The error for insufficient space.
    pub(in crate::package) fn short() -> anyhow::Error {
        claim(&DiskReservations::default(), 0, 1, soon()).unwrap_err()
    }

    /// Reserves all space for another fetch, until it is dropped.
    pub(in crate::package) fn all_taken(space: &DiskReservations) -> impl Drop + '_ {
        let claim = space.claim();
        space
            .lock()
            .claims
            .insert(claim.number, FetchReservation { to_write: u64::MAX / 2, holds: true, waits: false });
        claim
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn grow(claim: &Reservation<'_>, free: u64, bytes: u64, until: Instant) -> Result<()> {
        claim.grow(bytes, Path::new("/x"), &mut || Ok(free), until, &mut || Ok(()))
    }

    fn claim(space: &DiskReservations, free: u64, bytes: u64, until: Instant) -> Result<Reservation<'_>> {
        let claim = space.claim();
        grow(&claim, free, bytes, until).map(|()| claim)
    }

    /// Returns when that fetch waits.
    fn waits_for(space: &DiskReservations, number: u64) {
        while !space.lock().claims.get(&number).is_some_and(|claimed| claimed.waits) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_package_that_does_not_fit_alone_fails_at_once_with_the_sizes() {
        let space = DiskReservations::default();
        // A fetch without a reservation releases nothing, so it is not waited for.
        let (_idle, began) = (space.claim(), Instant::now());
        let error = claim(&space, 100 * MIB, 40 * MIB, soon()).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert!(error.is::<InsufficientSpace>());
        assert_eq!(error.to_string(), "not enough disk space in /x: 100MiB free, 104MiB needed; free some space there");
        claim(&space, 104 * MIB, 40 * MIB, soon()).unwrap();
        assert!(claim(&space, u64::MAX - 1, u64::MAX, soon()).is_err());
    }

    #[test]
    fn two_fetches_that_do_not_fit_together_run_one_after_the_other() {
        let (space, free) = (DiskReservations::default(), AtomicU64::new(120 * MIB));
        let first_is_done = AtomicBool::new(false);
        let first = claim(&space, 120 * MIB, 40 * MIB, soon()).unwrap();
        let error = claim(&space, 120 * MIB, 40 * MIB, Instant::now()).unwrap_err().to_string();
        assert!(error.contains("40MiB for other downloads"), "{error}");
        // Bytes that the first has written are no longer reserved, and not free either.
        first.has_to_write(10 * MIB);
        assert!(claim(&space, 90 * MIB, 40 * MIB, Instant::now()).is_err());
        let second = space.claim();
        std::thread::scope(|scope| {
            let number = second.number;
            let waiting = scope.spawn(|| {
                let mut free = || Ok(free.load(Ordering::SeqCst));
                let grown = second.grow(90 * MIB, Path::new("/x"), &mut free, soon(), &mut || Ok(()));
                assert!(first_is_done.load(Ordering::SeqCst));
                grown
            });
            waits_for(&space, number);
            free.store(160 * MIB, Ordering::SeqCst);
            first_is_done.store(true, Ordering::SeqCst);
            drop(first);
            waiting.join().unwrap().unwrap();
        });
        assert_eq!(space.promised(), 90 * MIB);
    }

    #[test]
    fn of_two_fetches_that_wait_for_each_other_one_fails_at_once() {
        let space = DiskReservations::default();
        let first = claim(&space, 200 * MIB, 60 * MIB, soon()).unwrap();
        let second = claim(&space, 200 * MIB, 60 * MIB, soon()).unwrap();
        std::thread::scope(|scope| {
            let number = first.number;
            let waiting = scope.spawn(|| grow(&first, 200 * MIB, 40 * MIB, soon()));
            waits_for(&space, number);
            let error = grow(&second, 200 * MIB, 40 * MIB, soon()).unwrap_err().to_string();
            assert!(error.contains("164MiB needed, and 60MiB for other downloads"), "{error}");
            // It has released its reservation already, so the other one continues.
            waiting.join().unwrap().unwrap();
        });
        assert_eq!(space.promised(), 100 * MIB);
    }

    #[test]
    fn a_cancelled_fetch_does_not_wait() {
        let space = DiskReservations::default();
        let _first = claim(&space, 120 * MIB, 40 * MIB, soon()).unwrap();
        let second = space.claim();
        let mut asked = 0;
        let mut still_wanted = || {
            asked += 1;
            if asked > 1 { bail!("not wanted") } else { Ok(()) }
        };
        let mut free = || Ok(120 * MIB);
        let error = second.grow(40 * MIB, Path::new("/x"), &mut free, soon(), &mut still_wanted).unwrap_err();
        assert_eq!((error.to_string().as_str(), asked), ("not wanted", 2));
        assert_eq!(space.promised(), 40 * MIB);
    }

    #[test]
    fn the_reservation_grows_with_the_package_and_its_tree() {
        let (space, place) = (DiskReservations::default(), std::env::temp_dir());
        let mut room = PackageSpace::new(&space, &place, soon());
        let wanted: &mut StillWanted<'_> = &mut || Ok(());
        // Known size, partly received.
        room.has_archive(100);
        room.fit(1000, wanted).unwrap();
        room.fit(1000, wanted).unwrap();
        assert_eq!(space.promised(), 3900);
        room.has_archive(1000);
        room.unpacks(2500, wanted).unwrap();
        assert_eq!(space.promised(), 500);
        // The tree is larger than estimated: reserve more.
        room.unpacks(600, wanted).unwrap();
        assert_eq!(space.promised(), STEP);
        // The download starts again.
        room.has_archive(0);
        assert_eq!(space.promised(), STEP + 1000);
        drop(room);
        assert_eq!(space.promised(), 0);

        // Unknown size.

        let mut room = PackageSpace::new(&space, &place, soon());
        for (come, promised) in [(1, 4 + STEP), (STEP / 4 + 1, 4 + STEP), (STEP / 4 + 2, 8 + 2 * STEP)] {
            room.fit_more(come, wanted).unwrap();
            assert_eq!(space.promised(), promised, "{come}");
        }
    }
}
