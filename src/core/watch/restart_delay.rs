//! When a role that exited is restarted: at once, then with a delay that grows with each failure in a row.

use std::time::{Duration, Instant};

use crate::core::schedule::Backoff;

/// After this uptime a role was healthy, and its next exit counts as the first failure.
const HEALTHY: Duration = Duration::from_secs(60);
/// The time that a started role has to connect.
const COMES: Duration = Duration::from_secs(2);
const PAUSE: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(60) };

/// The delay before the next start of a role that exited.
#[derive(Debug)]
pub struct RestartDelay {
    /// Exits and unsuccessful starts in a row.
    failures: u32,
    tried: bool,
    since: Instant,
}

impl RestartDelay {
    /// For a role that was never connected.
    pub fn new(now: Instant) -> RestartDelay {
        RestartDelay { failures: 0, tried: false, since: now }
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// It died after an uptime of `lived`.
    pub fn died(&mut self, lived: Duration, now: Instant) {
        let before = if lived > HEALTHY { 0 } else { self.failures };
        *self = RestartDelay { failures: before.saturating_add(1), tried: false, since: now };
    }

    /// It exited cleanly.
    pub fn left(&mut self, now: Instant) {
        *self = RestartDelay::new(now);
    }

    /// It responded: the last start succeeded.
    pub fn came(&mut self) {
        self.failures -= u32::from(self.tried && self.failures > 0);
        self.tried = false;
    }

    /// It was started. This counts as a failure until it responds.
    pub fn tried(&mut self, now: Instant) {
        *self = RestartDelay { failures: self.failures.saturating_add(1), tried: true, since: now };
    }

    /// When it exited or was last started.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When it is to be started.
    pub fn due(&self) -> Instant {
        let pause = if self.failures <= 1 { Duration::ZERO } else { PAUSE.delay(self.failures - 1, 1.0) };
        self.since + if self.tried { pause.max(COMES) } else { pause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn the_first_revival_comes_at_once_and_later_ones_later_until_it_was_healthy() {
        let start = Instant::now();
        let mut delay = RestartDelay::new(start);
        assert_eq!(delay.due(), start);
        let mut pauses = vec![];
        for _ in 0..9 {
            delay.died(S(1), start);
            pauses.push((delay.due() - start).as_secs());
            delay.tried(start);
            delay.came();
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        delay.died(S(61), start);
        assert_eq!(delay.due(), start);
        delay.died(S(1), start);
        delay.left(start);
        assert_eq!(delay.due(), start);
    }

    #[test]
    fn a_start_that_comes_to_nothing_is_a_failure_and_gets_its_time() {
        let start = Instant::now();
        let mut delay = RestartDelay::new(start);
        let mut at = start;
        let mut pauses = vec![];
        for _ in 0..6 {
            delay.tried(at);
            pauses.push((delay.due() - at).as_secs());
            at = delay.due();
        }
        assert_eq!(pauses, [2, 2, 2, 4, 8, 16]);
    }
}
