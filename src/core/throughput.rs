//! The rate of a byte stream: too slow to keep waiting ([`MinimumRate`]) or limited to a maximum ([`Throttle`]). The rate of events is
//! limited by `RateLimiter` in `core/schedule.rs`, which allows bursts; a throttle allows none.

use std::time::{Duration, Instant};

/// Measures a byte stream in consecutive windows of time. The stream is too slow if one window has too few bytes, however regularly they
/// arrive.
#[derive(Debug, Clone)]
pub struct MinimumRate {
    window: Duration,
    /// The minimum number of bytes in each window.
    minimum: u64,
    began: Option<Instant>,
    bytes: u64,
}

impl MinimumRate {
    /// At least `per_second` bytes per second, on average over each `window`.
    pub fn new(window: Duration, per_second: u64) -> MinimumRate {
        MinimumRate { window, minimum: per_second.saturating_mul(window.as_secs().max(1)), began: None, bytes: 0 }
    }

    /// A request was sent: time before it does not count.
    pub fn begin(&mut self, now: Instant) {
        (self.began, self.bytes) = (Some(now), 0);
    }

    /// Records received bytes. Returns whether the stream is fast enough.
    #[must_use]
    pub fn is_fast_enough(&mut self, bytes: u64, now: Instant) -> bool {
        let began = *self.began.get_or_insert(now);
        self.bytes = self.bytes.saturating_add(bytes);
        if now.saturating_duration_since(began) < self.window {
            return true;
        }
        let enough = self.bytes >= self.minimum;
        self.begin(now);
        enough
    }
}

/// Spreads bytes over time so that all users of it together stay below a rate.
#[derive(Debug, Clone)]
pub struct Throttle {
    per_second: u64,
    /// Until when the bytes taken so far use up the rate.
    due: Option<Instant>,
}

impl Throttle {
    pub fn new(per_second: u64) -> Throttle {
        Throttle { per_second: per_second.max(1), due: None }
    }

    pub fn per_second(&self) -> u64 {
        self.per_second
    }

    /// Takes bytes. Returns how long to wait before the next are taken.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let begin = self.due.map_or(now, |due| due.max(now));
        let due = begin + Duration::from_secs_f64(bytes as f64 / self.per_second as f64);
        self.due = Some(due);
        due.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn a_steady_trickle_is_too_slow_and_a_late_burst_is_not() {
        let start = Instant::now();
        let mut drip = MinimumRate::new(S(100), 1024);
        let fast: Vec<bool> = (0..250).map(|second| drip.is_fast_enough(1000, start + S(second))).collect();
        assert_eq!(fast.iter().position(|fast| !fast), Some(100));
        assert_eq!(fast.iter().filter(|fast| !**fast).count(), 2);
        let mut burst = MinimumRate::new(S(100), 1024);
        assert!(
            burst.is_fast_enough(1, start)
                && burst.is_fast_enough(200_000, start + S(150))
                && burst.is_fast_enough(1, start + S(249))
        );
        assert!(!burst.is_fast_enough(1, start + S(251)));
    }

    #[test]
    fn a_pause_between_two_requests_does_not_count() {
        let start = Instant::now();
        let mut rate = MinimumRate::new(S(100), 1024);
        assert!(rate.is_fast_enough(500_000, start));
        rate.begin(start + S(1000));
        assert!(rate.is_fast_enough(1, start + S(1001)));
    }

    #[test]
    fn all_users_of_a_throttle_together_stay_below_its_rate() {
        let start = Instant::now();
        let mut throttle = Throttle::new(1000);
        assert_eq!([500, 500, 1000].map(|bytes| throttle.take(bytes, start).as_millis()), [500, 1000, 2000]);
        // Unused capacity is not saved up.
        assert_eq!(throttle.take(1000, start + S(100)), S(1));
    }
}
