//! The supervisor of one sub-agent: what to do next, from what is wanted and what happened.
//!
//! ```text
//!            Start                 Started
//!   Down ───────────▶ Starting ─────────────▶ Up ──┬──┐ Exited
//!    ▲                 ▲ │ StartFailed             │  │
//!    │ Stopped         │ ▼                         │  ▼
//!    ├─────────────────┤ ┌─────────────────────────│──┘
//!    │                 │ ▼                         │ Rest, Again,
//!  Stopping ─────────▶ Waiting                     │ unhealthy too often
//!    ▲                   │ Rest                    │
//!    └───────────────────┴─────────────────────────┘
//! ```
//!
//! It never gives up on a sub-agent that should run, and never spins: the first restart comes at once, each further one after a delay that
//! doubles up to a cap, and a healthy time begins the count anew. A start that failed and one that was unhealthy for too long are failures
//! as an exit is. While wanted there is always a process, an action under way or a [`Supervisor::deadline`]; and never a second process
//! before the first is known to be gone.

mod health;

use std::time::{Duration, Instant};

pub use health::{Answer, Checks};
use health::{Health, Verdict};

use super::manifest::Restart;
use super::protocol::AgentState;

/// When to restart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    pub restart: Restart,
    /// Delay before the second restart in a row; the first comes at once.
    pub base: Duration,
    pub cap: Duration,
    /// Up for so long, and well by its checks where there are any, the next failure is a first one.
    pub healthy: Duration,
    /// Counts for processes that are started or adopted from then on.
    pub checks: Option<Checks>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            restart: Restart::Always,
            base: Duration::from_secs(1),
            cap: Duration::from_secs(60),
            healthy: Duration::from_secs(30),
            checks: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    /// Not running, nothing under way. `done`: it ended by itself and its restart policy says to leave it so.
    Down {
        done: bool,
    },
    /// Asked to be started.
    Starting,
    Up(Process),
    /// Asked to be stopped: its process, or what a dead one left behind. `failed`: because of its health.
    Stopping {
        process: Option<Process>,
        failed: bool,
    },
    /// To be started when the time has come.
    Waiting {
        until: Instant,
    },
}

#[derive(Debug, Clone, PartialEq)]
struct Process {
    pid: u32,
    since: Instant,
    health: Health,
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
    /// The check that was asked for came to this.
    Checked(Answer),
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
    /// To ask after its health, and to tell with [`Event::Checked`].
    Check,
}

/// One sub-agent's supervisor.
#[derive(Debug, Clone)]
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

    /// Takes charge of a process that another manager started, at `since`.
    pub fn adopt(&mut self, pid: u32, since: Instant, now: Instant, jitter: f64) {
        let health = Health::of(self.policy.checks, since, now, jitter);
        self.phase = Phase::Up(Process { pid, since, health });
    }

    /// Takes note that another process took the place of the one that was up. Nothing changes where none was.
    pub fn replace(&mut self, pid: u32, now: Instant) {
        if let Phase::Up(process) = &mut self.phase {
            (process.pid, process.since) = (pid, now);
        }
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

    pub fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Up(_))
    }

    /// It was asked to be started, and neither has nor failed to.
    pub fn is_starting(&self) -> bool {
        self.phase == Phase::Starting
    }

    pub fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping { .. })
    }

    /// The process that runs, perhaps while it is being stopped.
    fn process(&self) -> Option<&Process> {
        match &self.phase {
            Phase::Up(process) | Phase::Stopping { process: Some(process), .. } => Some(process),
            _ => None,
        }
    }

    pub fn pid(&self) -> Option<u32> {
        self.process().map(|process| process.pid)
    }

    pub fn up_since(&self) -> Option<Instant> {
        self.process().map(|process| process.since)
    }

    /// Restarts that nobody asked for.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Failures in a row, without a healthy time between.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// What is wrong with its health, else why it was last started again or cannot be.
    pub fn last_error(&self) -> Option<&str> {
        self.process().and_then(|process| process.health.why()).or(self.last_error.as_deref())
    }

    /// Whether its process runs and is well: by its last check, where there are checks.
    pub fn is_well(&self) -> bool {
        matches!(&self.phase, Phase::Up(process) if process.health.is_well())
    }

    /// It ended by itself, and its restart policy leaves it so.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Down { done: true }
    }

    /// When [`Event::Tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Waiting { until } => Some(*until),
            Phase::Up(process) => process.health.due(),
            _ => None,
        }
    }

    /// When it is started again, where it waits for that.
    pub fn starts_at(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting { until } => Some(until),
            _ => None,
        }
    }

    /// As an operator reads it. What is being stopped is what it was until it is down: its process still runs.
    pub fn state(&self) -> AgentState {
        match &self.phase {
            Phase::Down { done: false } if self.wanted => AgentState::Failed,
            Phase::Down { .. } => AgentState::Stopped,
            Phase::Starting => AgentState::Starting,
            Phase::Up(process) | Phase::Stopping { process: Some(process), .. } => process.health.state(),
            Phase::Stopping { process: None, .. } if self.wanted => AgentState::Starting,
            Phase::Stopping { process: None, .. } => AgentState::Stopped,
            Phase::Waiting { .. } => AgentState::Backoff,
        }
    }

    /// Takes in what happened and says what to do. `jitter` is from 0 to 1 and spreads the delays over a quarter of their length.
    ///
    /// An event that cannot come in the phase it comes in changes nothing.
    pub fn step(&mut self, event: Event, now: Instant, jitter: f64) -> Option<Action> {
        match event {
            Event::Run => {
                self.wanted = true;
                matches!(self.phase, Phase::Down { .. }).then(|| self.start())
            }
            Event::Rest => {
                self.wanted = false;
                self.forget();
                match &mut self.phase {
                    // Also of one whose main process is dead: what that started may not be.
                    Phase::Up(_) | Phase::Waiting { .. } | Phase::Down { done: true } => Some(self.stop(false)),
                    Phase::Stopping { failed, .. } => {
                        *failed = false;
                        None
                    }
                    // A start under way is stopped when it is known what to stop.
                    Phase::Starting | Phase::Down { done: false } => None,
                }
            }
            Event::Again if self.wanted => match &mut self.phase {
                Phase::Up(_) => {
                    self.forget();
                    Some(self.stop(false))
                }
                Phase::Waiting { .. } | Phase::Down { .. } => {
                    self.forget();
                    Some(self.start())
                }
                Phase::Stopping { failed, .. } => {
                    *failed = false;
                    self.forget();
                    None
                }
                Phase::Starting => None,
            },
            Event::Started { pid } if self.phase == Phase::Starting => {
                self.adopt(pid, now, now, jitter);
                (!self.wanted).then(|| self.stop(false))
            }
            Event::StartFailed { why } if self.phase == Phase::Starting => {
                // What is not wanted any more is not missed.
                if self.wanted {
                    self.last_error = Some(why);
                }
                self.fail(now, jitter)
            }
            Event::Exited { success, how } if self.is_up() => {
                self.settle(now);
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
            Event::Checked(answer) => self.checked(answer, now),
            Event::Stopped => match self.phase {
                Phase::Stopping { failed, .. } if self.wanted && failed => self.fail(now, jitter),
                Phase::Stopping { .. } => {
                    self.phase = Phase::Down { done: false };
                    self.wanted.then(|| self.start())
                }
                _ => None,
            },
            Event::Tick => match &mut self.phase {
                Phase::Waiting { until } if now >= *until => Some(self.start()),
                Phase::Up(process) => process.health.begin(now).then_some(Action::Check),
                _ => None,
            },
            Event::Again | Event::Started { .. } | Event::StartFailed { .. } | Event::Exited { .. } => None,
        }
    }

    /// All that its further steps depend on, relative to `now`, for a search through the states.
    #[cfg(test)]
    pub fn outline(&self, now: Instant) -> Vec<i64> {
        // More failures than these make no delay longer.
        let failures = i64::from(self.failures.min(8));
        let Policy { restart, checks, .. } = &self.policy;
        let policy = *restart as i64 * 2 + i64::from(checks.is_some());
        let mut words = vec![policy, i64::from(self.wanted), failures];
        match &self.phase {
            Phase::Down { done } => words.extend([0, i64::from(*done)]),
            Phase::Starting => words.push(1),
            Phase::Up(process) => {
                words.push(2);
                words.extend(process.health.outline(now, self.policy.healthy));
            }
            Phase::Stopping { process, failed } => {
                words.extend([3, i64::from(*failed), i64::from(process.is_some())]);
            }
            Phase::Waiting { until } => {
                words.extend([4, health::millis(until.saturating_duration_since(now))]);
            }
        }
        words
    }

    fn checked(&mut self, answer: Answer, now: Instant) -> Option<Action> {
        self.settle(now);
        let Phase::Up(process) = &mut self.phase else { return None };
        let verdict = process.health.take(answer, now);
        // Not to be started again, it is left as it is, and shown: stopping it would help nobody.
        if verdict == Verdict::Bearable || self.policy.restart == Restart::Never {
            return None;
        }
        self.last_error = process.health.why().map(|why| format!("stopped to be started again: {why}"));
        Some(self.stop(true))
    }

    /// After a healthy time the failures of before count no more.
    fn settle(&mut self, now: Instant) {
        if let Phase::Up(process) = &self.phase
            && process.health.well_for(now) >= self.policy.healthy
        {
            self.failures = 0;
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

    fn stop(&mut self, failed: bool) -> Action {
        let process = match std::mem::replace(&mut self.phase, Phase::Down { done: false }) {
            Phase::Up(process) => Some(process),
            _ => None,
        };
        self.phase = Phase::Stopping { process, failed };
        Action::Stop
    }

    /// One failure more: at once the first time, later and later from then on.
    fn fail(&mut self, now: Instant, jitter: f64) -> Option<Action> {
        if !self.wanted {
            // A start that failed may have started something all the same.
            self.phase = Phase::Starting;
            return Some(self.stop(false));
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
mod tests;
