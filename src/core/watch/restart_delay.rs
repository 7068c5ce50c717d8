//! When a role that exited is restarted: at once, then with a delay that grows with each failure in a row.

use std::time::{Duration, Instant};

use crate::core::schedule::Backoff;

/// After this uptime a role was healthy, and its next exit counts as the first failure.
const HEALTHY_UPTIME: Duration = Duration::from_secs(60);
/// The time that a started role has to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const BACKOFF: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(60) };

/// The delay before the next start of a role that exited.
#[derive(Debug)]
pub struct RestartDelay {
    /// Exits and unsuccessful starts in a row.
    failures: u32,
    awaits_response: bool,
    since: Instant,
}

impl RestartDelay {
    /// For a role that was never connected.
    pub fn new(now: Instant) -> RestartDelay {
        RestartDelay { failures: 0, awaits_response: false, since: now }
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// It died after an uptime of `uptime`.
    pub fn died(&mut self, uptime: Duration, now: Instant) {
        let before = if uptime > HEALTHY_UPTIME { 0 } else { self.failures };
        *self = RestartDelay { failures: before.saturating_add(1), awaits_response: false, since: now };
    }

    /// It exited cleanly.
    pub fn exited_cleanly(&mut self, now: Instant) {
        *self = RestartDelay::new(now);
    }

    /// It responded: the last start succeeded.
    pub fn responded(&mut self) {
        self.failures -= u32::from(self.awaits_response && self.failures > 0);
        self.awaits_response = false;
    }

    /// It was started. This counts as a failure until it responds.
    pub fn started(&mut self, now: Instant) {
        *self = RestartDelay { failures: self.failures.saturating_add(1), awaits_response: true, since: now };
    }

    /// When it exited or was last started.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When it is to be started.
    pub fn due(&self) -> Instant {
        let backoff = if self.failures <= 1 { Duration::ZERO } else { BACKOFF.delay(self.failures - 1, 1.0) };
        self.since + if self.awaits_response { backoff.max(CONNECT_TIMEOUT) } else { backoff }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn the_first_restart_is_immediate_and_later_ones_back_off_until_a_healthy_uptime() {
        let start = Instant::now();
        let mut delay = RestartDelay::new(start);
        assert_eq!(delay.due(), start);
        let mut delays = vec![];
        for _ in 0..9 {
            delay.died(S(1), start);
            delays.push((delay.due() - start).as_secs());
            delay.started(start);
            delay.responded();
        }
        assert_eq!(delays, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        delay.died(S(61), start);
        assert_eq!(delay.due(), start);
        delay.died(S(1), start);
        delay.exited_cleanly(start);
        assert_eq!(delay.due(), start);
    }

    #[test]
    fn an_unsuccessful_start_is_a_failure_and_has_time_to_connect() {
        let start = Instant::now();
        let mut delay = RestartDelay::new(start);
        let mut at = start;
        let mut delays = vec![];
        for _ in 0..6 {
            delay.started(at);
            delays.push((delay.due() - at).as_secs());
            at = delay.due();
        }
        assert_eq!(delays, [2, 2, 2, 4, 8, 16]);
    }
}
