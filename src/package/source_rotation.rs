//! The order and the time limits in which sources are tried. Pure: the caller reports the result of each attempt.
//!
//! A source that is slow, but not slow enough to count as stalled, must not use up the time of the sources after it, nor may damaged data
//! from one source use up the attempts of a good one. So each source has a share of the remaining time, and one more attempt after damaged
//! data. A source that timed out or sent damaged data is tried again after the others.

use std::collections::VecDeque;
use std::time::Duration;

/// The shortest useful share: a connection alone may take ten seconds.
const LEAST: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 15_000 });
/// Further attempts at a source that sent damaged data.
const REFETCHES: u32 = 1;
/// Limit for damaged downloads from all sources together; the fetch then stops.
const MOST_DAMAGES: u32 = 4;

/// One attempt at one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SourceAttempt {
    /// Index in the list of sources.
    pub(super) source: usize,
    /// Time limit of the attempt.
    pub(super) time: Duration,
}

/// The sources still to try.
#[derive(Debug)]
pub(super) struct SourceRotation {
    /// The current round.
    queue: VecDeque<usize>,
    /// The next round.
    again: VecDeque<usize>,
    /// Damaged downloads of each source.
    damages: Vec<u32>,
}

impl SourceRotation {
    pub(super) fn new(sources: usize) -> SourceRotation {
        SourceRotation { queue: (0..sources).collect(), again: VecDeque::new(), damages: vec![0; sources] }
    }

    /// The next attempt, given the time left for all; the last of a round gets all of it.
    pub(super) fn next(&mut self, left: Duration) -> Option<SourceAttempt> {
        if left.is_zero() {
            return None;
        }
        if self.queue.is_empty() {
            std::mem::swap(&mut self.queue, &mut self.again);
        }
        let share = left / u32::try_from(self.queue.len()).ok().filter(|sources| *sources > 0)?;
        let source = self.queue.pop_front()?;
        Some(SourceAttempt { source, time: share.max(LEAST).min(left) })
    }

    /// The source timed out. `left`: the time left for all.
    pub(super) fn late(&mut self, source: usize, left: Duration) {
        if left >= LEAST {
            self.again.push_back(source);
        }
    }

    /// The source sent damaged data. Returns whether any attempt is left.
    pub(super) fn damaged(&mut self, source: usize) -> bool {
        if let Some(damages) = self.damages.get_mut(source) {
            *damages += 1;
            if *damages <= REFETCHES {
                self.again.push_back(source);
            }
        }
        if self.damages.iter().sum::<u32>() >= MOST_DAMAGES {
            self.queue.clear();
            self.again.clear();
        }
        !(self.queue.is_empty() && self.again.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn turn(source: usize, seconds: u64) -> Option<SourceAttempt> {
        Some(SourceAttempt { source, time: S(seconds) })
    }

    #[test]
    fn each_source_has_its_share_of_the_remaining_time_and_the_last_one_all_of_it() {
        let mut turns = SourceRotation::new(3);
        assert_eq!(turns.next(S(600)), turn(0, 200));
        turns.late(0, S(400));
        // The third gets the time that the second did not use.
        assert_eq!(turns.next(S(400)), turn(1, 200));
        assert_eq!(turns.next(S(390)), turn(2, 390));
        // The source that timed out gets the time that the third did not use.
        assert_eq!(turns.next(S(300)), turn(0, 300));
        assert_eq!(turns.next(S(200)), None);
        // Too little time is left for another attempt.
        turns.late(0, LEAST / 2);
        assert_eq!(turns.next(LEAST / 2), None);
        turns.late(0, LEAST);
        assert_eq!(turns.next(S(0)), None);
    }

    #[test]
    fn a_share_is_never_below_the_minimum() {
        let mut turns = SourceRotation::new(2);
        assert_eq!(turns.next(LEAST + LEAST / 2), Some(SourceAttempt { source: 0, time: LEAST }));
        assert_eq!(turns.next(LEAST / 2), Some(SourceAttempt { source: 1, time: LEAST / 2 }));
    }

    #[test]
    fn damaged_data_from_one_source_takes_no_attempt_from_another() {
        // A single source is tried a second time.
        let mut turns = SourceRotation::new(1);
        assert_eq!(turns.next(S(9)), turn(0, 9));
        assert!(turns.damaged(0));
        assert_eq!(turns.next(S(8)), turn(0, 8));
        assert!(!turns.damaged(0) && turns.next(S(7)).is_none());

        // A bad source before a good one, whose package is damaged once in transit.
        let mut turns = SourceRotation::new(2);
        for source in [0, 1, 0] {
            assert_eq!(turns.next(S(9)).map(|turn| turn.source), Some(source));
            assert!(turns.damaged(source));
        }
        assert_eq!(turns.next(S(9)), turn(1, 9));
        assert!(!turns.damaged(1));

        // The number of damaged downloads is limited, however many sources there are.
        let mut turns = SourceRotation::new(9);
        let mut asked = 0;
        while let Some(turn) = turns.next(S(9)) {
            asked += 1;
            turns.damaged(turn.source);
        }
        assert_eq!(asked, MOST_DAMAGES);
    }

    proptest! {
        /// Every source is tried before any is tried again, no attempt exceeds the remaining time, and the rotation ends.
        #[test]
        fn every_source_is_tried_and_the_rotation_ends(sources in 1_usize..6, brought in prop::collection::vec(0_u8..3, 50)) {
            let (mut turns, mut left, mut order) = (SourceRotation::new(sources), S(600), Vec::new());
            for what in &brought {
                let Some(turn) = turns.next(left) else { break };
                prop_assert!(turn.time <= left && turn.time >= LEAST.min(left));
                order.push(turn.source);
                left = left.saturating_sub(if *what == 0 { turn.time } else { S(1) });
                match what {
                    0 => turns.late(turn.source, left),
                    1 => drop(turns.damaged(turn.source)),
                    _ => {}
                }
            }
            let damages = brought.iter().take(order.len()).filter(|what| **what == 1).count();
            prop_assert!(damages <= MOST_DAMAGES as usize);
            let first: Vec<usize> = order.iter().take(sources).copied().collect();
            prop_assert!(first.iter().enumerate().all(|(at, source)| at == *source), "{order:?}");
        }
    }
}
