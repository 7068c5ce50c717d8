//! The points at which the power may be cut, drawn at random from all of a recording.
//!
//! ```text
//! entry    0 ............ flush k .. write .. write .. discard .. flush k+1 ...
//! flush            ^ as of it: all before it, nothing after it
//! part             ^ all before it, and any part of what completed before the next one
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use super::super::block_log::{Change, Cut, Entry, Loss};

/// How many parts of what follows a flush are drawn, at least; the same one twice counts once.
const PARTS: usize = 6;

/// One point: a power cut in the window with that number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Point {
    pub(super) window: usize,
    pub(super) kind: Kind,
    pub(super) cut: Cut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// As of a flush.
    Flush,
    /// After a flush, with a part of what follows it.
    Part,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Flush => "as of a flush",
            Kind::Part => "a part of what followed a flush",
        })
    }
}

/// Draws `count` different points, as many from each window and a third of them as of a flush; fewer if there are no more. The same
/// arguments give the same points.
pub(super) fn points(entries: &[Entry], windows: &[Range<usize>], count: usize, seed: u64) -> Vec<Point> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut drawn = Vec::new();
    for (number, window) in windows.iter().enumerate() {
        // The first windows have one more where the count cannot be divided.
        let share = (count + windows.len() - 1 - number) / windows.len();
        let mut flushes = flushes(entries, window);
        let mut parts = parts(entries, window, &flushes, share, &mut random);
        random.shuffle(&mut flushes);
        random.shuffle(&mut parts);
        flushes.truncate((share / 3).max(share.saturating_sub(parts.len())));
        parts.truncate(share - flushes.len());
        let flush = |covered| Cut { covered, completed: covered, lost: BTreeMap::new() };
        drawn.extend(flushes.into_iter().map(|covered| Point {
            window: number,
            kind: Kind::Flush,
            cut: flush(covered),
        }));
        drawn.extend(parts.into_iter().map(|cut| Point { window: number, kind: Kind::Part, cut }));
    }
    random.shuffle(&mut drawn);
    drawn
}

/// The number of entries that are on the disk at the begin of a window and after each of its flushes.
fn flushes(entries: &[Entry], window: &Range<usize>) -> Vec<usize> {
    let flushes = window.clone().filter(|number| entries[*number].flushes).map(|number| number + 1);
    std::iter::once(window.start).chain(flushes).collect()
}

/// Different parts of what follows each flush: at least `least` in all where there are so many.
fn parts(
    entries: &[Entry],
    window: &Range<usize>,
    flushes: &[usize],
    least: usize,
    random: &mut fastrand::Rng,
) -> Vec<Cut> {
    let following = |covered: usize| {
        let next = (covered..window.end).find(|number| entries[*number].flushes);
        covered..next.unwrap_or(window.end)
    };
    let following: Vec<Range<usize>> =
        flushes.iter().map(|covered| following(*covered)).filter(|following| !following.is_empty()).collect();
    let tries = PARTS.max(2 * least / following.len().max(1));
    let mut parts = BTreeSet::new();
    for following in following {
        parts.extend((0..tries).map(|_| part(entries, &following, random)).filter(|cut| has_more(entries, cut)));
    }
    parts.into_iter().collect()
}

/// Whether the disk differs from that as of the flush.
fn has_more(entries: &[Entry], cut: &Cut) -> bool {
    let is_there =
        |number: usize| entries[number].change != Change::None && cut.lost.get(&number) != Some(&Loss::Whole);
    (cut.covered..cut.completed).any(is_there)
}

/// A random part of what follows a flush: each entry up to a random one is whole, torn, or lost.
fn part(entries: &[Entry], following: &Range<usize>, random: &mut fastrand::Rng) -> Cut {
    let completed = random.usize(following.start + 1..=following.end);
    let share_of_lost = [0.2, 0.5, 0.8][random.usize(..3)];
    let mut lost = BTreeMap::new();
    for (number, entry) in entries.iter().enumerate().take(completed).skip(following.start) {
        let change = entry.change;
        let is_durable = matches!(change, Change::Write { durable: true, .. });
        if change == Change::None || is_durable || random.f64() >= share_of_lost {
            continue;
        }
        let blocks = change.blocks();
        let loss = if blocks > 1 && random.bool() { Loss::Blocks(torn(blocks, random)) } else { Loss::Whole };
        lost.insert(number, loss);
    }
    Cut { covered: following.start, completed, lost }
}

/// Some of the blocks of a write, but not all.
fn torn(blocks: u64, random: &mut fastrand::Rng) -> BTreeSet<u64> {
    let kept = random.u64(..blocks);
    let one = (kept + random.u64(1..blocks)) % blocks;
    (0..blocks).filter(|block| *block == one || (*block != kept && random.bool())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(blocks: u64, durable: bool) -> Entry {
        Entry { flushes: false, change: Change::Write { offset: 0, length: blocks * 4096, data: 0, durable } }
    }

    const FLUSH: Entry = Entry { flushes: true, change: Change::None };

    fn entries() -> Vec<Entry> {
        let discard = Entry { flushes: false, change: Change::Discard { offset: 0, length: 4096 } };
        vec![
            write(1, false),
            FLUSH,
            FLUSH,
            write(3, false),
            write(1, true),
            discard,
            write(2, false),
            FLUSH,
            write(1, false),
        ]
    }

    #[test]
    fn the_same_seed_draws_the_same_points_and_another_one_others() {
        let draw = |seed| points(&entries(), &[0..5, 5..9], 20, seed);
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn every_window_has_its_share() {
        for count in [1, 2, 7, 11] {
            let drawn = points(&entries(), &[0..5, 5..9], count, 3);
            assert_eq!(drawn.len(), count);
            let first = drawn.iter().filter(|point| point.window == 0).count();
            assert_eq!(first, count.div_ceil(2));
            let flushes = drawn.iter().filter(|point| point.kind == Kind::Flush).count();
            assert_eq!(flushes, count.div_ceil(2) / 3 + count / 2 / 3);
        }
    }

    #[test]
    fn a_cut_loses_only_what_no_flush_covers() {
        let entries = entries();
        let mut kinds = BTreeSet::new();
        let window = 0..9;
        for point in points(&entries, std::slice::from_ref(&window), 500, 11) {
            let Cut { covered, completed, lost } = &point.cut;
            kinds.insert(point.kind);
            assert!(*covered == 0 || entries[covered - 1].flushes, "{point:?}");
            assert!(covered <= completed && *completed <= 9, "{point:?}");
            assert_eq!(point.kind == Kind::Flush, covered == completed);
            for (number, loss) in lost {
                assert!((*covered..*completed).contains(number) && !entries[*number].flushes, "{point:?}");
                assert!(!matches!(entries[*number].change, Change::Write { durable: true, .. }), "{point:?}");
                if let Loss::Blocks(blocks) = loss {
                    let all = entries[*number].change.blocks();
                    assert!(!blocks.is_empty() && (blocks.len() as u64) < all, "{point:?}");
                }
            }
            assert!((*covered..*completed).all(|number| !entries[number].flushes), "{point:?}");
            assert!(point.kind == Kind::Flush || has_more(&entries, &point.cut), "{point:?}");
        }
        assert_eq!(kinds.len(), 2);
    }

    #[test]
    fn every_loss_comes() {
        let window = 2..8;
        let drawn = points(&entries(), std::slice::from_ref(&window), 400, 5);
        let lost: BTreeSet<_> = drawn.iter().flat_map(|point| point.cut.lost.keys()).collect();
        assert_eq!(lost, [3, 5, 6].iter().collect());
        let torn = drawn.iter().flat_map(|point| point.cut.lost.values()).filter(|loss| **loss != Loss::Whole).count();
        assert!(torn > 10, "{torn}");
    }
}
