//! When a role is restarted because it uses too much memory. Each role checks the other.
//!
//! The limit may be lower than what the role needs, so that every restart exceeds it again. So each restart is followed by a longer wait.

use std::time::{Duration, Instant};

use crate::core::units::Size;

/// Checks above the limit in a row until a restart. Checks come with the pings, every 15 s.
const MAX_IN_A_ROW: u32 = 3;
/// The minimum time between two restarts. It doubles after each restart, up to [`MAX_INTERVAL`].
const MIN_INTERVAL: Duration = Duration::from_secs(300);
const MAX_INTERVAL: Duration = Duration::from_secs(3_600);

/// The memory checks of one role.
#[derive(Debug, Default)]
pub struct MemoryCheck {
    /// Checks above the limit, in a row.
    excesses: u32,
    restarts: u32,
    /// When it was last restarted for its memory.
    last_restart: Option<Instant>,
}

impl MemoryCheck {
    /// Records the memory that the role uses now, in bytes. Returns whether it is to be restarted.
    pub fn record(&mut self, used: u64, limit: u64, now: Instant) -> bool {
        self.excesses = if used > limit { self.excesses.saturating_add(1) } else { 0 };
        let since = self.last_restart.map(|last_restart| now.saturating_duration_since(last_restart));
        if since.is_some_and(|since| since > 2 * MAX_INTERVAL) {
            (self.restarts, self.last_restart) = (0, None);
        }
        if self.excesses < MAX_IN_A_ROW || since.is_some_and(|since| since < self.min_interval()) {
            return false;
        }
        (self.excesses, self.restarts, self.last_restart) = (0, self.restarts.saturating_add(1), Some(now));
        true
    }

    /// How long to wait after the last restart.
    fn min_interval(&self) -> Duration {
        let doubled = MIN_INTERVAL.saturating_mul(1 << self.restarts.saturating_sub(1).min(10));
        doubled.min(MAX_INTERVAL)
    }
}

/// The message for a role above its limit; `None` below it. `role`: its name for operators; `setting`: the configuration key of the limit.
pub fn excess(role: &str, used: u64, limit: u64, setting: &str) -> Option<String> {
    (used > limit).then(|| {
        format!(
            "{role} uses {} MiB of memory, more than {setting} ({}): it is restarted if this lasts, without effect on sub-agents; raise \
             {setting} if it needs more",
            used >> 20,
            Size(limit)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 100;

    #[test]
    fn a_role_is_restarted_after_three_excesses_in_a_row() {
        let (mut memory, start) = (MemoryCheck::default(), Instant::now());
        let restarts = [101, 101, 100, 101, 101, 101, 101].map(|used| memory.record(used, LIMIT, start));
        assert_eq!(restarts, [false, false, false, false, false, true, false]);
    }

    #[test]
    fn a_limit_that_is_too_low_restarts_less_often_over_time() {
        let (mut memory, start) = (MemoryCheck::default(), Instant::now());
        let seconds = (0..86_400).step_by(15);
        let restarts: Vec<u64> =
            seconds.filter(|at| memory.record(101, LIMIT, start + Duration::from_secs(*at))).collect();
        assert_eq!(restarts[..4], [30, 330, 930, 2_130]);
        assert!(restarts.windows(2).skip(4).all(|pair| pair[1] - pair[0] == 3_600), "{restarts:?}");
        // Two hours below the limit, and it counts as the first again.
        let later = start + Duration::from_secs(100_000);
        assert!(!memory.record(99, LIMIT, later));
        let restarts = [15, 30, 45].map(|at| memory.record(101, LIMIT, later + Duration::from_secs(at)));
        assert_eq!(restarts, [false, false, true]);
        assert_eq!(memory.min_interval(), MIN_INTERVAL);
    }

    #[test]
    fn the_message_of_an_excess_has_a_remedy() {
        assert_eq!(excess("the manager", 5 << 20, 5 << 20, "spmMaxMem"), None);
        let text = excess("the manager", 70 << 20, 64 << 20, "spmMaxMem").unwrap();
        assert!(text.starts_with("the manager uses 70 MiB of memory, more than spmMaxMem (64MiB)"), "{text}");
    }
}
