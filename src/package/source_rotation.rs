//! The order and the time limits in which sources are tried. Pure: the caller reports the result of each attempt.
//!
//! A source that is slow, but not slow enough to count as stalled, must not use up the time of the sources after it, nor may damaged data
//! from one source use up the attempts of a good one. So each source has a share of the remaining time, and one more attempt after damaged
//! data. A source that timed out or sent damaged data is tried again after the others.

use std::collections::VecDeque;
use std::time::Duration;

/// The shortest useful share: a connection alone may take ten seconds.
const MIN_SHARE: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 15_000 });
/// Further attempts at a source that sent damaged data.
const MAX_REFETCHES: u32 = 1;
/// Limit for damaged downloads from all sources together; the fetch then stops.
const MAX_DAMAGED: u32 = 4;

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
    next_round: VecDeque<usize>,
    /// Damaged downloads of each source.
    damaged_counts: Vec<u32>,
}

impl SourceRotation {
    pub(super) fn new(sources: usize) -> SourceRotation {
        SourceRotation { queue: (0..sources).collect(), next_round: VecDeque::new(), damaged_counts: vec![0; sources] }
    }

    /// The next attempt, given the time left for all; the last of a round gets all of it.
    pub(super) fn next(&mut self, left: Duration) -> Option<SourceAttempt> {
        if left.is_zero() {
            return None;
        }
        if self.queue.is_empty() {
            std::mem::swap(&mut self.queue, &mut self.next_round);
        }
        let share = left / u32::try_from(self.queue.len()).ok().filter(|sources| *sources > 0)?;
        let source = self.queue.pop_front()?;
        Some(SourceAttempt { source, time: share.max(MIN_SHARE).min(left) })
    }

    /// The source timed out. `left`: the time left for all.
    pub(super) fn timed_out(&mut self, source: usize, left: Duration) {
        if left >= MIN_SHARE {
            self.next_round.push_back(source);
        }
    }

    /// The source sent damaged data. Returns whether any attempt is left.
    pub(super) fn damaged(&mut self, source: usize) -> bool {
        if let Some(damaged_counts) = self.damaged_counts.get_mut(source) {
            *damaged_counts += 1;
            if *damaged_counts <= MAX_REFETCHES {
                self.next_round.push_back(source);
            }
        }
        if self.damaged_counts.iter().sum::<u32>() >= MAX_DAMAGED {
            self.queue.clear();
            self.next_round.clear();
        }
        !(self.queue.is_empty() && self.next_round.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn attempt(source: usize, seconds: u64) -> Option<SourceAttempt> {
        Some(SourceAttempt { source, time: S(seconds) })
    }

    #[test]
    fn each_source_has_its_share_of_the_remaining_time_and_the_last_one_all_of_it() {
        let mut rotation = SourceRotation::new(3);
        assert_eq!(rotation.next(S(600)), attempt(0, 200));
        rotation.timed_out(0, S(400));
        // The third gets the time that the second did not use.
        assert_eq!(rotation.next(S(400)), attempt(1, 200));
        assert_eq!(rotation.next(S(390)), attempt(2, 390));
        // The source that timed out gets the time that the third did not use.
        assert_eq!(rotation.next(S(300)), attempt(0, 300));
        assert_eq!(rotation.next(S(200)), None);
        // Too little time is left for another attempt.
        rotation.timed_out(0, MIN_SHARE / 2);
        assert_eq!(rotation.next(MIN_SHARE / 2), None);
        rotation.timed_out(0, MIN_SHARE);
        assert_eq!(rotation.next(S(0)), None);
    }

    #[test]
    fn a_share_is_never_below_the_minimum() {
        let mut rotation = SourceRotation::new(2);
        assert_eq!(rotation.next(MIN_SHARE + MIN_SHARE / 2), Some(SourceAttempt { source: 0, time: MIN_SHARE }));
        assert_eq!(rotation.next(MIN_SHARE / 2), Some(SourceAttempt { source: 1, time: MIN_SHARE / 2 }));
    }

    #[test]
    fn damaged_data_from_one_source_takes_no_attempt_from_another() {
        // A single source is tried a second time.
        let mut rotation = SourceRotation::new(1);
        assert_eq!(rotation.next(S(9)), attempt(0, 9));
        assert!(rotation.damaged(0));
        assert_eq!(rotation.next(S(8)), attempt(0, 8));
        assert!(!rotation.damaged(0) && rotation.next(S(7)).is_none());

        // A bad source before a good one, whose package is damaged once in transit.
        let mut rotation = SourceRotation::new(2);
        for source in [0, 1, 0] {
            assert_eq!(rotation.next(S(9)).map(|attempt| attempt.source), Some(source));
            assert!(rotation.damaged(source));
        }
        assert_eq!(rotation.next(S(9)), attempt(1, 9));
        assert!(!rotation.damaged(1));

        // The number of damaged downloads is limited, however many sources there are.
        let mut rotation = SourceRotation::new(9);
        let mut attempts = 0;
        while let Some(attempt) = rotation.next(S(9)) {
            attempts += 1;
            rotation.damaged(attempt.source);
        }
        assert_eq!(attempts, MAX_DAMAGED);
    }

    proptest! {
        /// Every source is tried before any is tried again, no attempt exceeds the remaining time, and the rotation ends.
        #[test]
        fn every_source_is_tried_and_the_rotation_ends(sources in 1_usize..6, results in prop::collection::vec(0_u8..3, 50)) {
            let (mut rotation, mut left, mut order) = (SourceRotation::new(sources), S(600), Vec::new());
            for result in &results {
                let Some(attempt) = rotation.next(left) else { break };
                prop_assert!(attempt.time <= left && attempt.time >= MIN_SHARE.min(left));
                order.push(attempt.source);
                left = left.saturating_sub(if *result == 0 { attempt.time } else { S(1) });
                match result {
                    0 => rotation.timed_out(attempt.source, left),
                    1 => drop(rotation.damaged(attempt.source)),
                    _ => {}
                }
            }
            let damaged_counts = results.iter().take(order.len()).filter(|result| **result == 1).count();
            prop_assert!(damaged_counts <= MAX_DAMAGED as usize);
            let first: Vec<usize> = order.iter().take(sources).copied().collect();
            prop_assert!(first.iter().enumerate().all(|(at, source)| at == *source), "{order:?}");
        }
    }
}
