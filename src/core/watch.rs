//! How one role watches the other: when a silence is a hang, and when one that is gone is started again.
//!
//! Who was not scheduled himself has heard nothing because he did not listen: a silence counts only while he looked at it in time.

use std::time::{Duration, Instant};

use super::schedule::Backoff;
use super::service_manager::UnitStanding;

/// A ping every so often; three without an answer are a hang.
pub const PING: Duration = Duration::from_secs(15);
const UNANSWERED: u32 = 3;
/// A look that comes so late was held up: by a stop of the process, or of the machine.
const LATE: Duration = Duration::from_secs(5);
/// Up for so long, a role was healthy; its next death is a first one.
const HEALTHY: Duration = Duration::from_secs(60);
/// One that was just started gets so long to show itself.
const COMES: Duration = Duration::from_secs(2);
const PAUSE: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(60) };

/// The pings over one connection.
#[derive(Debug)]
pub struct Pings {
    unanswered: u32,
    due: Instant,
}

/// What the time asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Wait,
    Send,
    /// The other one hangs; it is to be killed, and asked once more.
    Hung,
}

impl Pings {
    /// A greeting was just sent, which is to be answered too.
    pub fn new(now: Instant) -> Pings {
        Pings { unanswered: 1, due: now + PING }
    }

    pub fn due(&self) -> Instant {
        self.due
    }

    pub fn answered(&mut self) {
        self.unanswered = 0;
    }

    pub fn look(&mut self, now: Instant) -> Next {
        if now < self.due {
            return Next::Wait;
        }
        let late = now - self.due > LATE;
        self.due = now + PING;
        let hung = !late && self.unanswered >= UNANSWERED;
        self.unanswered = if late || hung { 1 } else { self.unanswered + 1 };
        if hung { Next::Hung } else { Next::Send }
    }
}

/// A condition that counts only when it was seen without a break.
#[derive(Debug, Default)]
pub struct Lasting {
    began: Option<Instant>,
    seen: Option<Instant>,
}

impl Lasting {
    /// Takes in whether it holds now, and says for how long it has been seen to.
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

/// So often in a row the service manager may give no answer before it counts as none: it may be busy, or be renewed itself.
const NO_SERVICE_MANAGER: u32 = 6;

/// Questions in a row that the service manager did not answer.
#[derive(Debug, Default)]
pub struct Unanswered(u32);

impl Unanswered {
    /// What follows from an answer, or from its absence: at first nothing, since the unit may be masked or stopped.
    pub fn judge(&mut self, answer: Option<UnitStanding>) -> UnitStanding {
        match answer {
            Some(standing) => {
                self.0 = 0;
                standing
            }
            None => {
                self.0 = self.0.saturating_add(1);
                if self.0 < NO_SERVICE_MANAGER { UnitStanding::Coming } else { UnitStanding::Missing }
            }
        }
    }
}

/// When a role that is gone is started: the first time at once, then later and later.
#[derive(Debug)]
pub struct Revival {
    /// Deaths in a row, and starts that came to nothing.
    failures: u32,
    tried: bool,
    since: Instant,
}

impl Revival {
    /// Of one that was never seen.
    pub fn new(now: Instant) -> Revival {
        Revival { failures: 0, tried: false, since: now }
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// It died after it had lived for so long.
    pub fn died(&mut self, lived: Duration, now: Instant) {
        let before = if lived > HEALTHY { 0 } else { self.failures };
        *self = Revival { failures: before.saturating_add(1), tried: false, since: now };
    }

    /// It ended in order.
    pub fn left(&mut self, now: Instant) {
        *self = Revival::new(now);
    }

    /// It is there: what was tried came to something.
    pub fn came(&mut self) {
        self.failures -= u32::from(self.tried && self.failures > 0);
        self.tried = false;
    }

    /// It was started; until it is there, that is a failure more.
    pub fn tried(&mut self, now: Instant) {
        *self = Revival { failures: self.failures.saturating_add(1), tried: true, since: now };
    }

    /// When it is gone since, or was last started.
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
    fn three_pings_without_an_answer_are_a_hang_and_an_answer_begins_anew() {
        let start = Instant::now();
        let mut pings = Pings::new(start);
        assert_eq!(pings.look(start + S(14)), Next::Wait);
        let looks = [15, 30, 45].map(|at| pings.look(start + S(at)));
        assert_eq!(looks, [Next::Send, Next::Send, Next::Hung]);
        assert_eq!(pings.look(start + S(60)), Next::Send);
        pings.answered();
        let looks = [75, 90, 105, 120].map(|at| pings.look(start + S(at)));
        assert_eq!(looks, [Next::Send, Next::Send, Next::Send, Next::Hung]);
    }

    #[test]
    fn who_was_not_scheduled_takes_nobody_for_hung() {
        let start = Instant::now();
        let mut pings = Pings::new(start);
        let looks = [15, 30, 51, 66, 81, 96].map(|at| pings.look(start + S(at)));
        assert_eq!(looks, [Next::Send, Next::Send, Next::Send, Next::Send, Next::Send, Next::Hung]);
        // Stopped again and again, it never does.
        let mut at = start + S(96);
        for _ in 0..20 {
            at += S(22);
            assert_eq!(pings.look(at), Next::Send);
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

    #[test]
    fn the_first_revival_comes_at_once_and_later_ones_later_until_it_was_healthy() {
        let start = Instant::now();
        let mut revival = Revival::new(start);
        assert_eq!(revival.due(), start);
        let mut pauses = vec![];
        for _ in 0..9 {
            revival.died(S(1), start);
            pauses.push((revival.due() - start).as_secs());
            revival.tried(start);
            revival.came();
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        revival.died(S(61), start);
        assert_eq!(revival.due(), start);
        revival.died(S(1), start);
        revival.left(start);
        assert_eq!(revival.due(), start);
    }

    #[test]
    fn a_start_that_comes_to_nothing_is_a_failure_and_gets_its_time() {
        let start = Instant::now();
        let mut revival = Revival::new(start);
        let mut at = start;
        let mut pauses = vec![];
        for _ in 0..6 {
            revival.tried(at);
            pauses.push((revival.due() - at).as_secs());
            at = revival.due();
        }
        assert_eq!(pauses, [2, 2, 2, 4, 8, 16]);
    }
}
