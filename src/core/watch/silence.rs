//! When silence means a hang.
//!
//! A process that was not scheduled received nothing because it did not read. So silence counts only while its checks ran on time.

use std::time::{Duration, Instant};

/// The interval of pings. Three unanswered pings in a row are a hang.
pub const PING: Duration = Duration::from_secs(15);
const UNANSWERED: u32 = 3;
/// A check that is later than this was delayed: the process or the machine was suspended.
const LATE: Duration = Duration::from_secs(5);

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

    pub fn look(&mut self, now: Instant) -> PingAction {
        if now < self.due {
            return PingAction::Wait;
        }
        let late = now - self.due > LATE;
        self.due = now + PING;
        let hung = !late && self.unanswered >= UNANSWERED;
        self.unanswered = if late || hung { 1 } else { self.unanswered + 1 };
        if hung { PingAction::Hung } else { PingAction::Send }
    }
}

/// How long a condition has held without a gap in the checks.
#[derive(Debug, Default)]
pub struct Lasting {
    began: Option<Instant>,
    seen: Option<Instant>,
}

impl Lasting {
    /// Records whether the condition holds now. Returns for how long it has held without a gap.
    pub fn look(&mut self, holds: bool, now: Instant) -> Duration {
        let missed = self.seen.is_some_and(|seen| now.saturating_duration_since(seen) > LATE);
        self.seen = Some(now);
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
    fn three_pings_without_an_answer_are_a_hang_and_an_answer_begins_anew() {
        let start = Instant::now();
        let mut pings = Pings::new(start);
        assert_eq!(pings.look(start + S(14)), PingAction::Wait);
        let looks = [15, 30, 45].map(|at| pings.look(start + S(at)));
        assert_eq!(looks, [PingAction::Send, PingAction::Send, PingAction::Hung]);
        assert_eq!(pings.look(start + S(60)), PingAction::Send);
        pings.answered();
        let looks = [75, 90, 105, 120].map(|at| pings.look(start + S(at)));
        assert_eq!(looks, [PingAction::Send, PingAction::Send, PingAction::Send, PingAction::Hung]);
    }

    #[test]
    fn who_was_not_scheduled_takes_nobody_for_hung() {
        let start = Instant::now();
        let mut pings = Pings::new(start);
        let looks = [15, 30, 51, 66, 81, 96].map(|at| pings.look(start + S(at)));
        assert_eq!(
            looks,
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
            assert_eq!(pings.look(at), PingAction::Send);
        }
    }

    #[test]
    fn what_was_not_looked_at_does_not_last() {
        let start = Instant::now();
        let mut lasting = Lasting::default();
        let mut look = |holds, at| lasting.look(holds, start + S(at)).as_secs();
        assert_eq!([look(true, 0), look(true, 4), look(true, 8)], [0, 4, 8]);
        assert_eq!([look(false, 9), look(true, 10), look(true, 12)], [0, 0, 2]);
        assert_eq!([look(true, 60), look(true, 63)], [0, 3]);
    }
}
