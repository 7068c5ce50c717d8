//! The supervisor of one sub-agent: what to do next, from what is wanted and what happened.
//!
//! ```text
//!            Start                 Started
//!   Down ───────────▶ Starting ─────────────▶ Up ──┐ Exited
//!    ▲                   │ StartFailed             │
//!    │ Stopped           ▼                         ▼
//!  Stopping ◀──────── Waiting ◀────────────────────┘
//!             (rest)     │ its time has come: Start
//! ```
//!
//! It never gives up on a sub-agent that should run, and never spins: the first restart comes at once, each further one after a delay that
//! doubles up to a cap, and a healthy time begins the count anew.

use std::time::{Duration, Instant};

use super::manifest::Restart;
use super::protocol::AgentState;

/// When to restart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    pub restart: Restart,
    /// Delay before the second restart in a row; the first comes at once.
    pub base: Duration,
    pub cap: Duration,
    /// Up for so long, the next failure is a first one.
    pub healthy: Duration,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            restart: Restart::Always,
            base: Duration::from_secs(1),
            cap: Duration::from_secs(60),
            healthy: Duration::from_secs(30),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not running, nothing under way. `done`: it ended by itself and its restart policy says to leave it so.
    Down {
        done: bool,
    },
    /// Asked to be started.
    Starting,
    Up {
        since: Instant,
        pid: u32,
    },
    /// Asked to be stopped.
    Stopping {
        pid: Option<u32>,
    },
    /// To be started when the time has come.
    Waiting {
        until: Instant,
    },
}

/// What happened to the sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It is to run.
    Run,
    /// It is to rest.
    Rest,
    /// It is to be stopped and started, because somebody asked.
    Again,
    Started {
        pid: u32,
    },
    StartFailed {
        why: String,
    },
    /// It ended by itself; `success` is unknown for one that was adopted, which counts as a failure.
    Exited {
        success: Option<bool>,
        how: String,
    },
    /// The stop that was asked for is done: nothing of it is left.
    Stopped,
    /// Time passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Start,
    Stop,
}

/// One sub-agent's supervisor.
#[derive(Debug)]
pub struct Supervisor {
    policy: Policy,
    wanted: bool,
    phase: Phase,
    /// In a row, without a healthy time between.
    failures: u32,
    restarts: u64,
    last_error: Option<String>,
}

impl Supervisor {
    /// One that rests; `restarts` goes on counting from an earlier manager's.
    pub fn new(policy: Policy, restarts: u64) -> Supervisor {
        Supervisor {
            policy,
            wanted: false,
            phase: Phase::Down { done: false },
            failures: 0,
            restarts,
            last_error: None,
        }
    }

    /// Takes charge of a process that another manager started.
    pub fn adopt(&mut self, pid: u32, since: Instant) {
        self.phase = Phase::Up { since, pid };
    }

    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    pub fn wanted(&self) -> bool {
        self.wanted
    }

    /// Nothing of it runs and nothing is under way.
    pub fn is_down(&self) -> bool {
        matches!(self.phase, Phase::Down { .. } | Phase::Waiting { .. })
    }

    pub fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping { .. })
    }

    pub fn pid(&self) -> Option<u32> {
        match self.phase {
            Phase::Up { pid, .. } => Some(pid),
            Phase::Stopping { pid } => pid,
            _ => None,
        }
    }

    pub fn up_since(&self) -> Option<Instant> {
        match self.phase {
            Phase::Up { since, .. } => Some(since),
            _ => None,
        }
    }

    /// Restarts that nobody asked for.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// When [`Event::Tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting { until } => Some(until),
            _ => None,
        }
    }

    pub fn state(&self) -> AgentState {
        match self.phase {
            Phase::Down { done: false } if self.wanted => AgentState::Failed,
            Phase::Down { .. } | Phase::Stopping { .. } => AgentState::Stopped,
            Phase::Starting => AgentState::Starting,
            Phase::Up { .. } => AgentState::Running,
            Phase::Waiting { .. } => AgentState::Backoff,
        }
    }

    /// Takes in what happened and says what to do. `jitter` is from 0 to 1 and spreads the delays over a quarter of their length.
    ///
    /// An event that cannot come in the phase it comes in changes nothing.
    pub fn step(&mut self, event: Event, now: Instant, jitter: f64) -> Option<Action> {
        match (event, self.phase) {
            (Event::Run, phase) => {
                self.wanted = true;
                matches!(phase, Phase::Down { .. }).then(|| self.start())
            }
            (Event::Rest, phase) => {
                self.wanted = false;
                self.forget();
                match phase {
                    Phase::Up { pid, .. } => Some(self.stop(Some(pid))),
                    // Its main process is dead; what that started may not be.
                    Phase::Waiting { .. } | Phase::Down { done: true } => Some(self.stop(None)),
                    Phase::Down { done: false } => None,
                    // A start under way is stopped when it is known what to stop.
                    Phase::Starting | Phase::Stopping { .. } => None,
                }
            }
            (Event::Again, Phase::Up { pid, .. }) => {
                self.forget();
                Some(self.stop(Some(pid)))
            }
            (Event::Again, Phase::Waiting { .. } | Phase::Down { .. }) if self.wanted => {
                self.forget();
                Some(self.start())
            }
            (Event::Started { pid }, Phase::Starting) => {
                self.phase = Phase::Up { since: now, pid };
                (!self.wanted).then(|| self.stop(Some(pid)))
            }
            (Event::StartFailed { why }, Phase::Starting) => {
                self.last_error = Some(why);
                self.fail(now, jitter)
            }
            (Event::Exited { success, how }, Phase::Up { since, .. }) => {
                if now.saturating_duration_since(since) >= self.policy.healthy {
                    self.failures = 0;
                }
                let again = match self.policy.restart {
                    Restart::Always => true,
                    Restart::OnFailure => success != Some(true),
                    Restart::Never => false,
                };
                self.last_error = Some(how);
                if again {
                    self.fail(now, jitter)
                } else {
                    self.phase = Phase::Down { done: true };
                    None
                }
            }
            (Event::Stopped, Phase::Stopping { .. }) => {
                self.phase = Phase::Down { done: false };
                self.wanted.then(|| self.start())
            }
            (Event::Tick, Phase::Waiting { until }) if now >= until => Some(self.start()),
            _ => None,
        }
    }

    /// What comes next was asked for: another release, perhaps, for which the troubles of the last one count nothing.
    fn forget(&mut self) {
        self.failures = 0;
        self.restarts = 0;
        self.last_error = None;
    }

    fn start(&mut self) -> Action {
        self.phase = Phase::Starting;
        Action::Start
    }

    fn stop(&mut self, pid: Option<u32>) -> Action {
        self.phase = Phase::Stopping { pid };
        Action::Stop
    }

    /// One failure more: at once the first time, later and later from then on.
    fn fail(&mut self, now: Instant, jitter: f64) -> Option<Action> {
        if !self.wanted {
            // A start that failed may have started something all the same.
            return Some(self.stop(None));
        }
        self.failures = self.failures.saturating_add(1);
        self.restarts = self.restarts.saturating_add(1);
        if self.failures == 1 {
            return Some(self.start());
        }
        let doubled = self.policy.base.saturating_mul(1 << (self.failures - 2).min(20));
        let delay = doubled.min(self.policy.cap);
        self.phase = Phase::Waiting { until: now + delay.mul_f64(1.0 - 0.25 * jitter.clamp(0.0, 1.0)) };
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn running(policy: Policy, now: Instant) -> Supervisor {
        let mut supervisor = Supervisor::new(policy, 0);
        assert_eq!(supervisor.step(Event::Run, now, 0.0), Some(Action::Start));
        assert_eq!(supervisor.step(Event::Started { pid: 7 }, now, 0.0), None);
        supervisor
    }

    fn exited() -> Event {
        Event::Exited { success: Some(false), how: "exited with 1".into() }
    }

    #[test]
    fn the_first_restart_is_immediate_the_next_ones_wait_longer_and_longer() {
        let now = Instant::now();
        let mut supervisor = running(Policy::default(), now);
        assert_eq!(supervisor.step(exited(), now, 0.0), Some(Action::Start));
        let mut delays = vec![];
        for _ in 0..8 {
            supervisor.step(Event::Started { pid: 8 }, now, 0.0);
            assert_eq!(supervisor.step(exited(), now, 0.0), None);
            let until = supervisor.deadline().unwrap();
            delays.push((until - now).as_secs());
            assert_eq!(supervisor.step(Event::Tick, now, 0.0), None);
            assert_eq!(supervisor.step(Event::Tick, until, 0.0), Some(Action::Start));
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(supervisor.restarts(), 9);
    }

    #[test]
    fn a_healthy_time_begins_the_count_anew() {
        let now = Instant::now();
        let mut supervisor = running(Policy::default(), now);
        supervisor.step(exited(), now, 0.0);
        supervisor.step(Event::Started { pid: 8 }, now, 0.0);
        let later = now + Duration::from_secs(31);
        assert_eq!(supervisor.step(exited(), later, 0.0), Some(Action::Start));
    }

    #[test]
    fn a_start_that_fails_is_tried_again() {
        let now = Instant::now();
        let mut supervisor = Supervisor::new(Policy::default(), 0);
        supervisor.step(Event::Run, now, 0.0);
        assert_eq!(supervisor.step(Event::StartFailed { why: "x".into() }, now, 0.0), Some(Action::Start));
        assert_eq!(supervisor.step(Event::StartFailed { why: "x".into() }, now, 0.0), None);
        assert_eq!(supervisor.state(), AgentState::Backoff);
    }

    #[test]
    fn rest_in_any_phase_ends_down() {
        let now = Instant::now();
        let mut starting = Supervisor::new(Policy::default(), 0);
        starting.step(Event::Run, now, 0.0);
        assert_eq!(starting.step(Event::Rest, now, 0.0), None);
        assert_eq!(starting.step(Event::Started { pid: 1 }, now, 0.0), Some(Action::Stop));
        assert_eq!(starting.step(Event::Stopped, now, 0.0), None);
        assert_eq!(starting.state(), AgentState::Stopped);

        let mut waiting = running(Policy::default(), now);
        waiting.step(exited(), now, 0.0);
        waiting.step(Event::StartFailed { why: "x".into() }, now, 0.0);
        assert_eq!(waiting.state(), AgentState::Backoff);
        // Its main process is dead; what that left behind is ended.
        assert_eq!(waiting.step(Event::Rest, now, 0.0), Some(Action::Stop));
        assert_eq!(waiting.step(Event::Stopped, now, 0.0), None);
        assert_eq!(waiting.state(), AgentState::Stopped);
        assert_eq!(waiting.step(Event::Rest, now, 0.0), None);
        assert_eq!(waiting.deadline(), None);
    }

    #[test]
    fn a_restart_that_was_asked_for_is_not_counted() {
        let now = Instant::now();
        let mut supervisor = running(Policy::default(), now);
        assert_eq!(supervisor.step(Event::Again, now, 0.0), Some(Action::Stop));
        assert_eq!(supervisor.step(Event::Stopped, now, 0.0), Some(Action::Start));
        assert_eq!(supervisor.restarts(), 0);
    }

    #[test]
    fn the_troubles_of_before_are_forgotten_by_a_start_that_was_asked_for() {
        let now = Instant::now();
        for word in [Event::Rest, Event::Again] {
            let mut supervisor = running(Policy::default(), now);
            supervisor.step(exited(), now, 0.0);
            supervisor.step(Event::Started { pid: 8 }, now, 0.0);
            assert_eq!((supervisor.restarts(), supervisor.last_error()), (1, Some("exited with 1")));
            supervisor.step(word, now, 0.0);
            assert_eq!((supervisor.restarts(), supervisor.last_error()), (0, None));
        }
    }

    #[test]
    fn the_restart_policy_is_honoured() {
        let now = Instant::now();
        let with = |restart| Policy { restart, ..Policy::default() };
        let clean = Event::Exited { success: Some(true), how: "exited with 0".into() };
        let unknown = Event::Exited { success: None, how: "ended".into() };
        let mut never = running(with(Restart::Never), now);
        assert_eq!(never.step(exited(), now, 0.0), None);
        assert_eq!(never.state(), AgentState::Stopped);
        let mut on_failure = running(with(Restart::OnFailure), now);
        assert_eq!(on_failure.step(clean, now, 0.0), None);
        let mut adopted = running(with(Restart::OnFailure), now);
        assert_eq!(adopted.step(unknown, now, 0.0), Some(Action::Start));
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Run),
            Just(Event::Rest),
            Just(Event::Again),
            Just(Event::Started { pid: 1 }),
            Just(Event::StartFailed { why: String::new() }),
            Just(exited()),
            Just(Event::Stopped),
            Just(Event::Tick),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order: wanted and answered truthfully from then on, it comes up; not wanted, it ends down.
        #[test]
        fn it_always_gets_where_it_is_wanted(events in proptest::collection::vec(any_event(), 0..40), wanted: bool) {
            let mut now = Instant::now();
            let mut supervisor = Supervisor::new(Policy::default(), 0);
            for event in events {
                supervisor.step(event, now, 0.5);
            }
            let mut next = supervisor.step(if wanted { Event::Run } else { Event::Rest }, now, 0.5);
            for _ in 0..4 {
                let event = match (next.take(), supervisor.phase) {
                    (Some(Action::Start), _) | (None, Phase::Starting) => Event::Started { pid: 2 },
                    (Some(Action::Stop), _) | (None, Phase::Stopping { .. }) => Event::Stopped,
                    (None, Phase::Waiting { until }) => { now = until; Event::Tick }
                    (None, _) => break,
                };
                next = supervisor.step(event, now, 0.5);
            }
            prop_assert_eq!(supervisor.pid().is_some(), wanted);
        }
    }
}
