//! When silence means a hang.
//!
//! A process that was not scheduled received nothing because it did not read. So silence counts only while its checks ran on time.

use std::time::{Duration, Instant};

/// The interval of pings. Three unanswered pings in a row are a hang.
pub const PING: Duration = Duration::from_secs(15);
const MAX_UNANSWERED: u32 = 3;
/// A check that is later than this was delayed: the process or the machine was suspended.
const MAX_DELAY: Duration = Duration::from_secs(5);

/// The pings over one connection.
#[derive(Debug)]
pub struct Pings {
    unanswered: u32,
    due: Instant,
}

/// What is due now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PingAction {
    Wait,
    Send,
    /// The peer hangs: kill it and send another ping.
    Hung,
}

impl Pings {
    /// The greeting was just sent and awaits an answer too.
    pub fn new(now: Instant) -> Pings {
        Pings { unanswered: 1, due: now + PING }
    }

    pub fn due(&self) -> Instant {
        self.due
    }

    pub fn answered(&mut self) {
        self.unanswered = 0;
    }

    pub fn poll(&mut self, now: Instant) -> PingAction {
        if now < self.due {
            return PingAction::Wait;
        }
        let late = now - self.due > MAX_DELAY;
        self.due = now + PING;
        let hung = !late && self.unanswered >= MAX_UNANSWERED;
        self.unanswered = if late || hung { 1 } else { self.unanswered + 1 };
        if hung { PingAction::Hung } else { PingAction::Send }
    }
}

/// How long a condition has held without a gap in the checks.
#[derive(Debug, Default)]
pub struct ContinuousCondition {
    began: Option<Instant>,
    observed: Option<Instant>,
}

impl ContinuousCondition {
    /// Records whether the condition holds now. Returns for how long it has held without a gap.
    pub fn observe(&mut self, holds: bool, now: Instant) -> Duration {
        let missed = self.observed.is_some_and(|observed| now.saturating_duration_since(observed) > MAX_DELAY);
        self.observed = Some(now);
        if !holds {
            self.began = None;
            return Duration::ZERO;
        }
        if missed {
            self.began = Some(now);
        }
        now.saturating_duration_since(*self.began.get_or_insert(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn three_unanswered_pings_are_a_hang_and_an_answer_resets_the_count() {
        let start = Instant::now();
        let mut pings = Pings::new(start);
        assert_eq!(pings.poll(start + S(14)), PingAction::Wait);
        let actions = [15, 30, 45].map(|at| pings.poll(start + S(at)));
        assert_eq!(actions, [PingAction::Send, PingAction::Send, PingAction::Hung]);
        assert_eq!(pings.poll(start + S(60)), PingAction::Send);
        pings.answered();
        let actions = [75, 90, 105, 120].map(|at| pings.poll(start + S(at)));
        assert_eq!(actions, [PingAction::Send, PingAction::Send, PingAction::Send, PingAction::Hung]);
    }

    #[test]
    fn a_delayed_check_never_reports_a_hang() {
        let start = Instant::now();
        let mut pings = Pings::new(start);
        let actions = [15, 30, 51, 66, 81, 96].map(|at| pings.poll(start + S(at)));
        assert_eq!(
            actions,
            [
                PingAction::Send,
                PingAction::Send,
                PingAction::Send,
                PingAction::Send,
                PingAction::Send,
                PingAction::Hung
            ]
        );
        // Stopped again and again, it never does.
        let mut at = start + S(96);
        for _ in 0..20 {
            at += S(22);
            assert_eq!(pings.poll(at), PingAction::Send);
        }
    }

    #[test]
    fn a_gap_in_the_checks_restarts_the_period() {
        let start = Instant::now();
        let mut condition = ContinuousCondition::default();
        let mut observe = |holds, at| condition.observe(holds, start + S(at)).as_secs();
        assert_eq!([observe(true, 0), observe(true, 4), observe(true, 8)], [0, 4, 8]);
        assert_eq!([observe(false, 9), observe(true, 10), observe(true, 12)], [0, 0, 2]);
        assert_eq!([observe(true, 60), observe(true, 63)], [0, 3]);
    }
}
