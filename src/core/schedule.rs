//! When to try again: growing delays, jitter, the times of heartbeats, and a limit on repeated events.

use std::time::{Duration, Instant};

/// How the delay between two tries grows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    pub base: Duration,
    pub cap: Duration,
}

impl Backoff {
    /// The delay after `failures` in a row (from 1): doubled each time, capped, and spread over its upper half by `jitter` from 0 to 1.
    pub fn delay(self, failures: u32, jitter: f64) -> Duration {
        let doubled = self.base.saturating_mul(1 << failures.saturating_sub(1).min(20));
        doubled.min(self.cap).mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
    }
}

/// The longest wait that a gateway may request.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// The longest interval between two tries to reach a gateway.
const LONGEST_HEARTBEAT_BACKOFF: Duration = Duration::from_secs(300);

/// The result of the last heartbeat.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HeartbeatOutcome {
    Answered,
    /// The number of failures in a row, from 1, and the wait that the gateway requested, if it did.
    Failed {
        times: u32,
        retry_after: Option<Duration>,
    },
}

/// How long to wait before the next heartbeat. `jitter` is from 0 to 1.
pub fn next_heartbeat(interval: Duration, outcome: HeartbeatOutcome, jitter: f64) -> Duration {
    match outcome {
        HeartbeatOutcome::Answered => interval.mul_f64(0.9 + 0.2 * jitter.clamp(0.0, 1.0)),
        HeartbeatOutcome::Failed { times, retry_after } => {
            let backoff = Backoff { base: interval, cap: LONGEST_HEARTBEAT_BACKOFF.max(interval) };
            let ours = backoff.delay(times, jitter);
            // Spreads hosts that received the same wait.
            let spread = interval.mul_f64(jitter.clamp(0.0, 1.0));
            retry_after.map_or(ours, |theirs| (theirs.min(LONGEST_RETRY_AFTER) + spread).max(ours))
        }
    }
}

/// How long to wait before the first heartbeat: not at all, but after a boot a random part of the interval, so that a site that regains power
/// does not send all heartbeats at once.
pub fn first_heartbeat(interval: Duration, after_boot: bool, jitter: f64) -> Duration {
    if after_boot { interval.mul_f64(jitter.clamp(0.0, 1.0)) } else { Duration::ZERO }
}

/// A limit on a repeated event: `most` at once, and one more per `every`.
///
/// Every limit on how often something happens uses this: the journal, each sub-agent's events, and unauthenticated clients of the control
/// socket. The rate of bytes is handled in `core/throughput.rs`.
#[derive(Debug, Clone)]
pub struct RateLimiter {
    burst: u32,
    every: Duration,
    permits: u32,
    /// Until when permits were added.
    refilled_until: Option<Instant>,
    /// Events suppressed since the last permitted one.
    suppressed: u64,
}

impl RateLimiter {
    pub fn new(burst: u32, every: Duration) -> RateLimiter {
        RateLimiter { burst, every, permits: burst, refilled_until: None, suppressed: 0 }
    }

    /// Whether all permits are available again, as in a new limiter.
    pub fn is_full(&self, now: Instant) -> bool {
        let all = self.every * (self.burst - self.permits);
        self.refilled_until.is_none_or(|given| now.saturating_duration_since(given) >= all)
    }

    /// Requests a permit for one event. `Some`: the number of events suppressed since the last permitted one. `None`: suppressed.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let given = *self.refilled_until.get_or_insert(now);
        let due = now.saturating_duration_since(given).as_nanos() / self.every.as_nanos().max(1);
        let due = u32::try_from(due).unwrap_or(u32::MAX);
        self.permits = self.permits.saturating_add(due).min(self.burst);
        self.refilled_until = Some(if self.permits == self.burst { now } else { given + self.every * due });
        if self.permits == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.permits -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn heartbeats_keep_their_interval_within_a_tenth() {
        assert_eq!(next_heartbeat(S(30), HeartbeatOutcome::Answered, 0.0), S(27));
        assert_eq!(next_heartbeat(S(30), HeartbeatOutcome::Answered, 1.0), S(33));
    }

    #[test]
    fn failures_back_off_to_a_cap_and_the_gateways_retry_after_is_followed() {
        let failed = |times, retry_after| next_heartbeat(S(30), HeartbeatOutcome::Failed { times, retry_after }, 1.0);
        assert_eq!(failed(1, None), S(30));
        assert_eq!(failed(2, None), S(60));
        assert_eq!(failed(30, None), S(300));
        assert_eq!(failed(1, Some(S(120))), S(150));
        assert_eq!(failed(1, Some(S(86_400))), S(3630));
        let first = HeartbeatOutcome::Failed { times: 1, retry_after: Some(S(120)) };
        assert_eq!(next_heartbeat(S(30), first, 0.0), S(120));
        assert_eq!(failed(3, Some(S(1))), S(120));
    }

    #[test]
    fn permits_are_used_up_and_refilled_and_suppressed_events_are_counted() {
        let start = Instant::now();
        let mut limiter = RateLimiter::new(3, S(60));
        let permit = |limiter: &mut RateLimiter, seconds| limiter.take(start + S(seconds));
        assert_eq!([0, 0, 1, 1, 2].map(|at| permit(&mut limiter, at)), [Some(0), Some(0), Some(0), None, None]);
        assert_eq!([59, 60, 61, 119, 120].map(|at| permit(&mut limiter, at)), [None, Some(3), None, None, Some(2)]);
        assert_eq!([9000; 4].map(|at| permit(&mut limiter, at)), [Some(0), Some(0), Some(0), None]);
        assert_eq!([9_179, 9_180].map(|at| limiter.is_full(start + S(at))), [false, true]);
        let day = (0..86_400).filter(|second| permit(&mut limiter, 10_000 + second).is_some()).count();
        assert!((1_439..=1_443).contains(&day), "{day}");
    }

    #[test]
    fn the_first_heartbeat_is_immediate_except_after_a_boot() {
        assert_eq!(first_heartbeat(S(30), false, 0.7), Duration::ZERO);
        assert_eq!(first_heartbeat(S(30), true, 0.5), S(15));
    }
}
