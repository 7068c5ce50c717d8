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

pub use health::{CheckResult, HealthPolicy};
use health::{HealthVerdict, ProcessHealth};

use super::manifest::Restart;
use super::protocol::AgentState;

/// When to restart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RestartPolicy {
    pub restart: Restart,
    /// Delay before the second restart in a row; the first comes at once.
    pub base: Duration,
    pub cap: Duration,
    /// Up for so long, and well by its checks where there are any, the next failure is a first one.
    pub healthy: Duration,
    /// Counts for processes that are started or adopted from then on.
    pub checks: Option<HealthPolicy>,
}

impl Default for RestartPolicy {
    fn default() -> RestartPolicy {
        RestartPolicy {
            restart: Restart::Always,
            base: Duration::from_secs(1),
            cap: Duration::from_secs(60),
            healthy: Duration::from_secs(30),
            checks: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum SupervisorPhase {
    /// Not running, nothing under way. `done`: it ended by itself and its restart policy says to leave it so.
    Down {
        done: bool,
    },
    /// Asked to be started.
    Starting,
    Up(ProcessState),
    /// Asked to be stopped: its process, or what a dead one left behind. `failed`: because of its health.
    Stopping {
        process: Option<ProcessState>,
        failed: bool,
    },
    /// To be started when the time has come.
    Waiting {
        until: Instant,
    },
}

#[derive(Debug, Clone, PartialEq)]
struct ProcessState {
    pid: u32,
    since: Instant,
    health: ProcessHealth,
}

/// What happened to the sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SupervisorEvent {
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
    Checked(CheckResult),
    /// The stop that was asked for is done: nothing of it is left.
    Stopped,
    /// Time passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SupervisorAction {
    Start,
    Stop,
    /// To ask after its health, and to tell with [`SupervisorEvent::Checked`].
    Check,
}

/// One sub-agent's supervisor.
#[derive(Debug, Clone)]
pub struct Supervisor {
    policy: RestartPolicy,
    wanted: bool,
    phase: SupervisorPhase,
    /// In a row, without a healthy time between.
    failures: u32,
    restarts: u64,
    last_error: Option<String>,
}

impl Supervisor {
    /// One that rests; `restarts` goes on counting from an earlier manager's.
    pub fn new(policy: RestartPolicy, restarts: u64) -> Supervisor {
        Supervisor {
            policy,
            wanted: false,
            phase: SupervisorPhase::Down { done: false },
            failures: 0,
            restarts,
            last_error: None,
        }
    }

    /// Takes charge of a process that another manager started, at `since`.
    pub fn adopt(&mut self, pid: u32, since: Instant, now: Instant, jitter: f64) {
        let health = ProcessHealth::of(self.policy.checks, since, now, jitter);
        self.phase = SupervisorPhase::Up(ProcessState { pid, since, health });
    }

    /// Takes note that another process took the place of the one that was up. Nothing changes where none was.
    pub fn replace(&mut self, pid: u32, now: Instant) {
        if let SupervisorPhase::Up(process) = &mut self.phase {
            (process.pid, process.since) = (pid, now);
        }
    }

    pub fn set_policy(&mut self, policy: RestartPolicy) {
        self.policy = policy;
    }

    pub fn wanted(&self) -> bool {
        self.wanted
    }

    /// Nothing of it runs and nothing is under way.
    pub fn is_down(&self) -> bool {
        matches!(self.phase, SupervisorPhase::Down { .. } | SupervisorPhase::Waiting { .. })
    }

    pub fn is_up(&self) -> bool {
        matches!(self.phase, SupervisorPhase::Up(_))
    }

    /// It was asked to be started, and neither has nor failed to.
    pub fn is_starting(&self) -> bool {
        self.phase == SupervisorPhase::Starting
    }

    pub fn is_stopping(&self) -> bool {
        matches!(self.phase, SupervisorPhase::Stopping { .. })
    }

    /// The process that runs, perhaps while it is being stopped.
    fn process(&self) -> Option<&ProcessState> {
        match &self.phase {
            SupervisorPhase::Up(process) | SupervisorPhase::Stopping { process: Some(process), .. } => Some(process),
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
        matches!(&self.phase, SupervisorPhase::Up(process) if process.health.is_well())
    }

    /// It ended by itself, and its restart policy leaves it so.
    pub fn is_done(&self) -> bool {
        self.phase == SupervisorPhase::Down { done: true }
    }

    /// When [`SupervisorEvent::Tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            SupervisorPhase::Waiting { until } => Some(*until),
            SupervisorPhase::Up(process) => process.health.due(),
            _ => None,
        }
    }

    /// When it is started again, where it waits for that.
    pub fn starts_at(&self) -> Option<Instant> {
        match self.phase {
            SupervisorPhase::Waiting { until } => Some(until),
            _ => None,
        }
    }

    /// As an operator reads it. What is being stopped is what it was until it is down: its process still runs.
    pub fn state(&self) -> AgentState {
        match &self.phase {
            SupervisorPhase::Down { done: false } if self.wanted => AgentState::Failed,
            SupervisorPhase::Down { .. } => AgentState::Stopped,
            SupervisorPhase::Starting => AgentState::Starting,
            SupervisorPhase::Up(process) | SupervisorPhase::Stopping { process: Some(process), .. } => {
                process.health.state()
            }
            SupervisorPhase::Stopping { process: None, .. } if self.wanted => AgentState::Starting,
            SupervisorPhase::Stopping { process: None, .. } => AgentState::Stopped,
            SupervisorPhase::Waiting { .. } => AgentState::Backoff,
        }
    }

    /// Takes in what happened and says what to do. `jitter` is from 0 to 1 and spreads the delays over a quarter of their length.
    ///
    /// An event that cannot come in the phase it comes in changes nothing.
    pub fn step(&mut self, event: SupervisorEvent, now: Instant, jitter: f64) -> Option<SupervisorAction> {
        match event {
            SupervisorEvent::Run => {
                self.wanted = true;
                matches!(self.phase, SupervisorPhase::Down { .. }).then(|| self.start())
            }
            SupervisorEvent::Rest => {
                self.wanted = false;
                self.forget();
                match &mut self.phase {
                    // Also of one whose main process is dead: what that started may not be.
                    SupervisorPhase::Up(_) | SupervisorPhase::Waiting { .. } | SupervisorPhase::Down { done: true } => {
                        Some(self.stop(false))
                    }
                    SupervisorPhase::Stopping { failed, .. } => {
                        *failed = false;
                        None
                    }
                    // A start under way is stopped when it is known what to stop.
                    SupervisorPhase::Starting | SupervisorPhase::Down { done: false } => None,
                }
            }
            SupervisorEvent::Again if self.wanted => match &mut self.phase {
                SupervisorPhase::Up(_) => {
                    self.forget();
                    Some(self.stop(false))
                }
                SupervisorPhase::Waiting { .. } | SupervisorPhase::Down { .. } => {
                    self.forget();
                    Some(self.start())
                }
                SupervisorPhase::Stopping { failed, .. } => {
                    *failed = false;
                    self.forget();
                    None
                }
                SupervisorPhase::Starting => None,
            },
            SupervisorEvent::Started { pid } if self.phase == SupervisorPhase::Starting => {
                self.adopt(pid, now, now, jitter);
                (!self.wanted).then(|| self.stop(false))
            }
            SupervisorEvent::StartFailed { why } if self.phase == SupervisorPhase::Starting => {
                // What is not wanted any more is not missed.
                if self.wanted {
                    self.last_error = Some(why);
                }
                self.fail(now, jitter)
            }
            SupervisorEvent::Exited { success, how } if self.is_up() => {
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
                    self.phase = SupervisorPhase::Down { done: true };
                    None
                }
            }
            SupervisorEvent::Checked(answer) => self.checked(answer, now),
            SupervisorEvent::Stopped => match self.phase {
                SupervisorPhase::Stopping { failed, .. } if self.wanted && failed => self.fail(now, jitter),
                SupervisorPhase::Stopping { .. } => {
                    self.phase = SupervisorPhase::Down { done: false };
                    self.wanted.then(|| self.start())
                }
                _ => None,
            },
            SupervisorEvent::Tick => match &mut self.phase {
                SupervisorPhase::Waiting { until } if now >= *until => Some(self.start()),
                SupervisorPhase::Up(process) => process.health.begin(now).then_some(SupervisorAction::Check),
                _ => None,
            },
            SupervisorEvent::Again
            | SupervisorEvent::Started { .. }
            | SupervisorEvent::StartFailed { .. }
            | SupervisorEvent::Exited { .. } => None,
        }
    }

    /// All that its further steps depend on, relative to `now`, for a search through the states.
    #[cfg(test)]
    pub fn outline(&self, now: Instant) -> Vec<i64> {
        // More failures than these make no delay longer.
        let failures = i64::from(self.failures.min(8));
        let RestartPolicy { restart, checks, .. } = &self.policy;
        let policy = *restart as i64 * 2 + i64::from(checks.is_some());
        let mut words = vec![policy, i64::from(self.wanted), failures];
        match &self.phase {
            SupervisorPhase::Down { done } => words.extend([0, i64::from(*done)]),
            SupervisorPhase::Starting => words.push(1),
            SupervisorPhase::Up(process) => {
                words.push(2);
                words.extend(process.health.outline(now, self.policy.healthy));
            }
            SupervisorPhase::Stopping { process, failed } => {
                words.extend([3, i64::from(*failed), i64::from(process.is_some())]);
            }
            SupervisorPhase::Waiting { until } => {
                words.extend([4, health::millis(until.saturating_duration_since(now))]);
            }
        }
        words
    }

    fn checked(&mut self, answer: CheckResult, now: Instant) -> Option<SupervisorAction> {
        self.settle(now);
        let SupervisorPhase::Up(process) = &mut self.phase else { return None };
        let verdict = process.health.take(answer, now);
        // Not to be started again, it is left as it is, and shown: stopping it would help nobody.
        if verdict == HealthVerdict::Bearable || self.policy.restart == Restart::Never {
            return None;
        }
        self.last_error = process.health.why().map(|why| format!("stopped to be started again: {why}"));
        Some(self.stop(true))
    }

    /// After a healthy time the failures of before count no more.
    fn settle(&mut self, now: Instant) {
        if let SupervisorPhase::Up(process) = &self.phase
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

    fn start(&mut self) -> SupervisorAction {
        self.phase = SupervisorPhase::Starting;
        SupervisorAction::Start
    }

    fn stop(&mut self, failed: bool) -> SupervisorAction {
        let process = match std::mem::replace(&mut self.phase, SupervisorPhase::Down { done: false }) {
            SupervisorPhase::Up(process) => Some(process),
            _ => None,
        };
        self.phase = SupervisorPhase::Stopping { process, failed };
        SupervisorAction::Stop
    }

    /// One failure more: at once the first time, later and later from then on.
    fn fail(&mut self, now: Instant, jitter: f64) -> Option<SupervisorAction> {
        if !self.wanted {
            // A start that failed may have started something all the same.
            self.phase = SupervisorPhase::Starting;
            return Some(self.stop(false));
        }
        self.failures = self.failures.saturating_add(1);
        self.restarts = self.restarts.saturating_add(1);
        if self.failures == 1 {
            return Some(self.start());
        }
        let doubled = self.policy.base.saturating_mul(1 << (self.failures - 2).min(20));
        let delay = doubled.min(self.policy.cap);
        self.phase = SupervisorPhase::Waiting { until: now + delay.mul_f64(1.0 - 0.25 * jitter.clamp(0.0, 1.0)) };
        None
    }
}

#[cfg(test)]
mod tests;
