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
const HOST_RESERVE: u64 = 64 << 20;
/// Space for a package's archive and tree, as a multiple of the archive's size.
const PER_PACKAGE: u64 = 4;
/// Bytes reserved at a time for a package of unknown size, or a tree that is larger than estimated.
const STEP: u64 = 16 << 20;
/// How often a waiting fetch checks for cancellation.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Called while waiting; an error stops the wait.
type StillWanted<'a> = dyn FnMut() -> Result<()> + 'a;

/// The reservations of all fetches in progress.
#[derive(Debug, Default)]
pub(super) struct DiskReservations {
    table: Mutex<ReservationTable>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ReservationTable {
    last: u64,
    fetches: BTreeMap<u64, FetchReservation>,
}

#[derive(Debug, Default)]
struct FetchReservation {
    /// Bytes reserved and not yet written.
    unwritten: u64,
    /// It has reserved space, which it releases when it completes.
    holds_space: bool,
    /// It waits for others to release space, and releases none before.
    is_waiting: bool,
}

impl ReservationTable {
    fn others(&self, number: u64) -> impl Iterator<Item = &FetchReservation> {
        self.fetches.iter().filter(move |(other, _)| **other != number).map(|(_, fetch)| fetch)
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
    fn register(&self) -> Reservation<'_> {
        let mut table = self.lock();
        table.last += 1;
        let number = table.last;
        table.fetches.insert(number, FetchReservation::default());
        Reservation { reservations: self, number }
    }

    /// Bytes reserved and not yet written, of all fetches.
    #[cfg(test)]
    pub(super) fn reserved(&self) -> u64 {
        self.lock().fetches.values().map(|fetch| fetch.unwritten).sum()
    }

    /// Held briefly; no code that holds it panics.
    fn lock(&self) -> MutexGuard<'_, ReservationTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reservation of one fetch, released when this is dropped.
#[derive(Debug)]
struct Reservation<'a> {
    reservations: &'a DiskReservations,
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
        let result = self.try_grow(bytes, directory, free, until, still_wanted);
        if result.is_err() {
            self.release();
        }
        result
    }

    fn try_grow(
        &self,
        bytes: u64,
        directory: &Path,
        free: &mut dyn FnMut() -> io::Result<u64>,
        until: Instant,
        still_wanted: &mut StillWanted<'_>,
    ) -> Result<()> {
        let mut table = self.reservations.lock();
        loop {
            let available =
                free().with_context(|| format!("cannot determine the free space in {}", directory.display()))?;
            let others: u64 = table.others(self.number).map(|fetch| fetch.unwritten).sum();
            let own = table.fetches.get(&self.number).map_or(0, |fetch| fetch.unwritten);
            let needed = own.saturating_add(bytes).saturating_add(HOST_RESERVE);
            if available >= needed.saturating_add(others) {
                let fetch = table.fetches.entry(self.number).or_default();
                *fetch =
                    FetchReservation { unwritten: own.saturating_add(bytes), holds_space: true, is_waiting: false };
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            let is_hopeless = table.others(self.number).all(|fetch| fetch.is_waiting || !fetch.holds_space);
            if is_hopeless || left.is_zero() {
                let for_others = match others {
                    0 => String::new(),
                    others => format!(", and {} for other downloads", rounded(others)),
                };
                let why = format!(
                    "not enough disk space in {}: {} free, {} needed{for_others}; free some space there",
                    directory.display(),
                    rounded(available),
                    rounded(needed)
                );
                return Err(InsufficientSpace(why).into());
            }
            table.fetches.entry(self.number).or_default().is_waiting = true;
            table = self
                .reservations
                .changed
                .wait_timeout(table, left.min(CHECK_INTERVAL))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            still_wanted()?;
        }
    }

    /// Sets how many of the reserved bytes are not written yet.
    fn set_unwritten(&self, bytes: u64) {
        if let Some(fetch) = self.reservations.lock().fetches.get_mut(&self.number) {
            fetch.unwritten = bytes;
        }
    }

    fn release(&self) {
        self.reservations.lock().fetches.remove(&self.number);
        self.reservations.changed.notify_all();
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

/// The space for one package, from its first byte to its unpacked tree.
#[derive(Debug)]
pub(super) struct PackageSpace<'a> {
    reservation: Reservation<'a>,
    directory: &'a Path,
    until: Instant,
    /// Total reserved.
    reserved: u64,
    /// Bytes of the archive and of the tree that are written.
    archive: u64,
    tree: u64,
}

impl<'a> PackageSpace<'a> {
    /// Reserves nothing yet, on the file system of `directory`. Later reservations wait until `until` for others.
    pub(super) fn new(reservations: &'a DiskReservations, directory: &'a Path, until: Instant) -> PackageSpace<'a> {
        PackageSpace { reservation: reservations.register(), directory, until, reserved: 0, archive: 0, tree: 0 }
    }

    /// Reserves space for a package of this size and its tree.
    pub(super) fn reserve(&mut self, package: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        self.reserve_total(package.saturating_mul(PER_PACKAGE), still_wanted)
    }

    /// Like [`PackageSpace::reserve`], for a package of unknown size of which `received` bytes have arrived: reserves ahead.
    pub(super) fn reserve_more(&mut self, received: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        let needed = received.saturating_mul(PER_PACKAGE);
        if needed > self.reserved {
            self.reserve_total(needed.saturating_add(STEP), still_wanted)?;
        }
        Ok(())
    }

    /// Sets how many bytes of the archive are written.
    pub(super) fn set_archive(&mut self, bytes: u64) {
        self.archive = bytes;
        self.update();
    }

    /// Accounts for `bytes` of the tree that will be written next.
    pub(super) fn reserve_tree(&mut self, bytes: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        let written = self.archive.saturating_add(self.tree).saturating_add(bytes);
        if written > self.reserved {
            self.reserve_total(written.saturating_add(STEP), still_wanted)?;
        }
        self.tree = self.tree.saturating_add(bytes);
        self.update();
        Ok(())
    }

    fn reserve_total(&mut self, bytes: u64, still_wanted: &mut StillWanted<'_>) -> Result<()> {
        // Bytes that are already written need no reservation.
        let more = bytes.saturating_sub(self.reserved.max(self.archive.saturating_add(self.tree)));
        if bytes > self.reserved {
            let directory = self.directory;
            let mut free = || platform::free_space(directory);
            self.reservation.grow(more, directory, &mut free, self.until, still_wanted)?;
            self.reserved = bytes;
        }
        Ok(())
    }

    fn update(&self) {
        self.reservation.set_unwritten(self.reserved.saturating_sub(self.archive.saturating_add(self.tree)));
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
    pub(in crate::package) fn insufficient_space() -> anyhow::Error {
        reservation(&DiskReservations::default(), 0, 1, soon()).unwrap_err()
    }

    /// Reserves all space for another fetch, until it is dropped.
    pub(in crate::package) fn reserve_everything(reservations: &DiskReservations) -> impl Drop + '_ {
        let reservation = reservations.register();
        reservations.lock().fetches.insert(
            reservation.number,
            FetchReservation { unwritten: u64::MAX / 2, holds_space: true, is_waiting: false },
        );
        reservation
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn grow(reservation: &Reservation<'_>, free: u64, bytes: u64, until: Instant) -> Result<()> {
        reservation.grow(bytes, Path::new("/x"), &mut || Ok(free), until, &mut || Ok(()))
    }

    fn reservation(reservations: &DiskReservations, free: u64, bytes: u64, until: Instant) -> Result<Reservation<'_>> {
        let reservation = reservations.register();
        grow(&reservation, free, bytes, until).map(|()| reservation)
    }

    /// Returns when that fetch waits.
    fn wait_until_waiting(reservations: &DiskReservations, number: u64) {
        while !reservations.lock().fetches.get(&number).is_some_and(|fetch| fetch.is_waiting) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_package_that_does_not_fit_alone_fails_at_once_with_the_sizes() {
        let reservations = DiskReservations::default();
        // A fetch without a reservation releases nothing, so it is not waited for.
        let (_idle, start) = (reservations.register(), Instant::now());
        let error = reservation(&reservations, 100 * MIB, 40 * MIB, soon()).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert!(error.is::<InsufficientSpace>());
        assert_eq!(error.to_string(), "not enough disk space in /x: 100MiB free, 104MiB needed; free some space there");
        reservation(&reservations, 104 * MIB, 40 * MIB, soon()).unwrap();
        assert!(reservation(&reservations, u64::MAX - 1, u64::MAX, soon()).is_err());
    }

    #[test]
    fn two_fetches_that_do_not_fit_together_run_one_after_the_other() {
        let (reservations, free) = (DiskReservations::default(), AtomicU64::new(120 * MIB));
        let first_is_done = AtomicBool::new(false);
        let first = reservation(&reservations, 120 * MIB, 40 * MIB, soon()).unwrap();
        let error = reservation(&reservations, 120 * MIB, 40 * MIB, Instant::now()).unwrap_err().to_string();
        assert!(error.contains("40MiB for other downloads"), "{error}");
        // Bytes that the first has written are no longer reserved, and not free either.
        first.set_unwritten(10 * MIB);
        assert!(reservation(&reservations, 90 * MIB, 40 * MIB, Instant::now()).is_err());
        let second = reservations.register();
        std::thread::scope(|scope| {
            let number = second.number;
            let waiting = scope.spawn(|| {
                let mut free = || Ok(free.load(Ordering::SeqCst));
                let result = second.grow(90 * MIB, Path::new("/x"), &mut free, soon(), &mut || Ok(()));
                assert!(first_is_done.load(Ordering::SeqCst));
                result
            });
            wait_until_waiting(&reservations, number);
            free.store(160 * MIB, Ordering::SeqCst);
            first_is_done.store(true, Ordering::SeqCst);
            drop(first);
            waiting.join().unwrap().unwrap();
        });
        assert_eq!(reservations.reserved(), 90 * MIB);
    }

    #[test]
    fn of_two_fetches_that_wait_for_each_other_one_fails_at_once() {
        let reservations = DiskReservations::default();
        let first = reservation(&reservations, 200 * MIB, 60 * MIB, soon()).unwrap();
        let second = reservation(&reservations, 200 * MIB, 60 * MIB, soon()).unwrap();
        std::thread::scope(|scope| {
            let number = first.number;
            let waiting = scope.spawn(|| grow(&first, 200 * MIB, 40 * MIB, soon()));
            wait_until_waiting(&reservations, number);
            let error = grow(&second, 200 * MIB, 40 * MIB, soon()).unwrap_err().to_string();
            assert!(error.contains("164MiB needed, and 60MiB for other downloads"), "{error}");
            // It has released its reservation already, so the other one continues.
            waiting.join().unwrap().unwrap();
        });
        assert_eq!(reservations.reserved(), 100 * MIB);
    }

    #[test]
    fn a_cancelled_fetch_does_not_wait() {
        let reservations = DiskReservations::default();
        let _first = reservation(&reservations, 120 * MIB, 40 * MIB, soon()).unwrap();
        let second = reservations.register();
        let mut calls = 0;
        let mut still_wanted = || {
            calls += 1;
            if calls > 1 { bail!("not wanted") } else { Ok(()) }
        };
        let mut free = || Ok(120 * MIB);
        let error = second.grow(40 * MIB, Path::new("/x"), &mut free, soon(), &mut still_wanted).unwrap_err();
        assert_eq!((error.to_string().as_str(), calls), ("not wanted", 2));
        assert_eq!(reservations.reserved(), 40 * MIB);
    }

    #[test]
    fn the_reservation_grows_with_the_package_and_its_tree() {
        let (reservations, directory) = (DiskReservations::default(), std::env::temp_dir());
        let mut space = PackageSpace::new(&reservations, &directory, soon());
        let wanted: &mut StillWanted<'_> = &mut || Ok(());
        // Known size, partly received.
        space.set_archive(100);
        space.reserve(1000, wanted).unwrap();
        space.reserve(1000, wanted).unwrap();
        assert_eq!(reservations.reserved(), 3900);
        space.set_archive(1000);
        space.reserve_tree(2500, wanted).unwrap();
        assert_eq!(reservations.reserved(), 500);
        // The tree is larger than estimated: reserve more.
        space.reserve_tree(600, wanted).unwrap();
        assert_eq!(reservations.reserved(), STEP);
        // The download restarts.
        space.set_archive(0);
        assert_eq!(reservations.reserved(), STEP + 1000);
        drop(space);
        assert_eq!(reservations.reserved(), 0);

        // Unknown size.
        let mut space = PackageSpace::new(&reservations, &directory, soon());
        for (received, reserved) in [(1, 4 + STEP), (STEP / 4 + 1, 4 + STEP), (STEP / 4 + 2, 8 + 2 * STEP)] {
            space.reserve_more(received, wanted).unwrap();
            assert_eq!(reservations.reserved(), reserved, "{received}");
        }
    }
}
