//! The block level of `cargo xtask power-cut`: every point between two writes at which the power may be cut, not only those that a killed
//! machine happens to come to.
//!
//! ```text
//! recording   one machine: a home is installed, upgrades itself, and upgrades a sub-agent; QEMU logs each write of the home's drive
//! points      the drive as of a flush, or with any part of what was written after it      drawn at random, by a seed
//! checks      many points in one machine: mounted, so that its kernel replays the journal; the home is started
//!             -> old or new release, both roles, every sub-agent, reported to a gateway of its own
//!             then the order is carried out: the new release, whole
//! ```
//!
//! A home is known by its path and a host by its id, so the points of one machine are hosts of their own: each in its namespaces, with the
//! same path. The machines that check are booted after the one that recorded: what the drive says of running processes is of an earlier boot.
#![allow(clippy::print_stdout, reason = "the report is its output")]

mod check;
mod draw;
mod hosts;
mod recording;
mod setup;

use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result};

use self::check::{AT_ONCE, Outcome, Tallies};
use self::draw::Point;
use self::hosts::Wanted;
use self::recording::Recording;
use self::setup::{MANAGERS, RELEASES, Setup};
use super::block_log::Change;
use super::host::Parts;
use crate::command::say;
use crate::{apt, fleet};

/// The programs that this needs beside those of a machine.
const NEEDS: &[apt::Need] = &[("strip", "binutils"), ("cmp", "diffutils")];
const NEEDS_OF_XFS: &[apt::Need] = &[("mkfs.xfs", "xfsprogs")];

/// What is on the drive of a home.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    /// Mebibytes of a home's drive.
    fn size(self) -> u64 {
        match self {
            FileSystem::Ext4 => 256,
            // mkfs.xfs refuses smaller ones.
            FileSystem::Xfs => 320,
        }
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        })
    }
}

/// An upgrade whose writes are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Upgrade {
    Manager,
    SubAgent,
}

/// In the order in which they are recorded.
const UPGRADES: [Upgrade; 2] = [Upgrade::Manager, Upgrade::SubAgent];

impl Upgrade {
    /// The releases of a host after an upgrade, or before any.
    fn wanted(upgrade: Option<Upgrade>) -> Wanted {
        match upgrade {
            None => Wanted { manager: MANAGERS[0], release: RELEASES[0] },
            Some(Upgrade::Manager) => Wanted { manager: MANAGERS[1], release: RELEASES[0] },
            Some(Upgrade::SubAgent) => Wanted { manager: MANAGERS[1], release: RELEASES[1] },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Upgrade::Manager => "self-upgrade",
            Upgrade::SubAgent => "sub-agent upgrade",
        }
    }
}

/// Checks so many points, and prints what they came to; returns the number of stranded hosts.
pub(super) fn run(parts: &Parts<'_>, count: usize, seed: u64, file_system: FileSystem) -> Result<usize> {
    let started = Instant::now();
    apt::install(NEEDS)?;
    if file_system == FileSystem::Xfs {
        apt::install(NEEDS_OF_XFS)?;
    }
    let directory =
        tempfile::Builder::new().prefix("aops-blocks-").tempdir().context("cannot create a temporary directory")?;
    fleet::clean_up_when_interrupted(directory.path())?;
    let setup = Setup::new(directory.path(), parts, file_system)?;
    let recording = recording::record(&setup, file_system)?;
    println!("{}", summary(&recording, file_system));
    let points = draw::points(recording.log.entries(), &recording.windows, count, seed);
    if points.len() < count {
        say(&format!("there are only {} different points", points.len()));
    }
    let mut tallies = Tallies::new();
    let (mut stranded, mut checked, mut retried, mut replayed) = (0, 0, 0, 0);
    for batch in points.chunks(AT_ONCE) {
        let begun = Instant::now();
        let result = check::check(&setup, &recording, batch)?;
        for (point, outcome) in batch.iter().zip(&result.outcomes) {
            checked += 1;
            tallies.entry((point.window, point.kind)).or_default().count(outcome);
            if let Outcome::Stranded(why) = outcome {
                stranded += 1;
                report_stranded(&recording, point, checked, why)?;
            }
        }
        retried += result.retried;
        replayed += result.replayed;
        say(&format!(
            "{checked} of {} points checked, {stranded} stranded; this batch took {} s, {} s of them the boot",
            points.len(),
            begun.elapsed().as_secs(),
            result.booted_in.as_secs()
        ));
    }
    print!("{}", table(&tallies));
    println!(
        "{checked} points on {file_system}: {stranded} stranded, {retried} releases rolled back and retried, {replayed} journals replayed, in \
         {} s; again with: cargo xtask power-cut --cuts 0 --points {count} --filesystem {file_system} --seed {seed}",
        started.elapsed().as_secs()
    );
    Ok(stranded)
}

/// What was recorded.
fn summary(recording: &Recording, file_system: FileSystem) -> String {
    let lines = recording.windows.iter().zip(UPGRADES).map(|(window, upgrade)| {
        let entries = &recording.log.entries()[window.clone()];
        let count = |is: fn(&Change) -> bool| entries.iter().filter(|entry| is(&entry.change)).count();
        format!(
            "{}: {} flushes, {} writes and {} discards recorded on {file_system}",
            upgrade.name(),
            entries.iter().filter(|entry| entry.flushes).count(),
            count(|change| matches!(change, Change::Write { .. })),
            count(|change| matches!(change, Change::Discard { .. })),
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn report_stranded(recording: &Recording, point: &Point, number: usize, why: &str) -> Result<()> {
    let kept = check::keep(recording, point, number)?;
    println!(
        "\nSTRANDED at point {number}, {}, {}: {}\nThe drive as the power cut left it: {}\n{why}",
        UPGRADES[point.window].name(),
        point.kind,
        point.cut,
        kept.display()
    );
    Ok(())
}

fn table(tallies: &Tallies) -> String {
    let mut text = format!("\n{:<52} {:>7} {:>9} {:>9} {:>9}\n", "", "points", "left old", "left new", "stranded");
    for ((window, kind), tally) in tallies {
        let name = format!("{}, {kind}", UPGRADES[*window].name());
        text += &format!("{name:<52} {:>7} {:>9} {:>9} {:>9}\n", tally.points(), tally.old, tally.new, tally.stranded);
    }
    text
}
