//! The supervisor of one sub-agent: decides the next action from the desired state and the events of its process.
//!
//! ```text
//!            Start                 Started
//!   Down ───────────▶ Starting ─────────────▶ Up ──┬──┐ Exited
//!    ▲                 ▲ │ StartFailed             │  │
//!    │ Stopped         │ ▼                         │  ▼
//!    ├─────────────────┤ ┌─────────────────────────│──┘
//!    │                 │ ▼                         │ Stop, Restart,
//!  Stopping ─────────▶ Waiting                     │ unhealthy too often
//!    ▲                   │ Stop                    │
//!    └───────────────────┴─────────────────────────┘
//! ```
//!
//! A sub-agent that should run is always restarted, but never in a tight loop: the first restart is immediate, each further one waits for a
//! delay that doubles up to a cap, and a healthy period resets the count. A failed start and being unhealthy for too long count as failures,
//! as an exit does. While it should run there is a process, an action under way or a [`Supervisor::deadline`]; and a second process is never
//! started before the first is known to have exited.

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
    /// The delay before the second restart in a row; the first restart is immediate.
    pub base: Duration,
    pub cap: Duration,
    /// After this uptime, healthy by its checks where it has some, the failure count starts at zero.
    pub healthy: Duration,
    /// A change applies to processes that are started or adopted later.
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
    /// Not running, no action under way. `done`: it exited, and its restart policy does not restart it.
    Down {
        done: bool,
    },
    /// A start is under way.
    Starting,
    Up(ProcessState),
    /// A stop of its process, or of its leftover processes, is under way. `failed`: it is stopped for its health.
    Stopping {
        process: Option<ProcessState>,
        failed: bool,
    },
    /// Waits for its back-off to end.
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

/// An event of the sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SupervisorEvent {
    /// It is to run.
    Run,
    /// It is to be stopped.
    Stop,
    /// It is to be restarted, by request.
    Restart,
    Started {
        pid: u32,
    },
    StartFailed {
        why: String,
    },
    /// It exited without a request. `success`: unknown for an adopted process, which counts as a failure.
    Exited {
        success: Option<bool>,
        how: String,
    },
    /// The result of the requested check.
    Checked(CheckResult),
    /// The requested stop is complete: no process is left.
    Stopped,
    /// A deadline has passed.
    Tick,
}

/// The next action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SupervisorAction {
    Start,
    Stop,
    /// Check its health; answered with [`SupervisorEvent::Checked`].
    Check,
}

/// The supervisor of one sub-agent.
#[derive(Debug, Clone)]
pub struct Supervisor {
    policy: RestartPolicy,
    wanted: bool,
    phase: SupervisorPhase,
    /// Failures in a row, without a healthy period between.
    failures: u32,
    restarts: u64,
    last_error: Option<String>,
}

impl Supervisor {
    /// A stopped sub-agent. `restarts`: the count of a previous manager, which is continued.
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

    /// Adopts a process that another manager started at `since`.
    pub fn adopt(&mut self, pid: u32, since: Instant, now: Instant, jitter: f64) {
        let health = ProcessHealth::new(self.policy.checks, since, now, jitter);
        self.phase = SupervisorPhase::Up(ProcessState { pid, since, health });
    }

    /// Replaces the pid of the running process. Without a running process, nothing changes.
    pub fn replace_pid(&mut self, pid: u32, now: Instant) {
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

    /// No process runs and no action is under way.
    pub fn is_down(&self) -> bool {
        matches!(self.phase, SupervisorPhase::Down { .. } | SupervisorPhase::Waiting { .. })
    }

    pub fn is_up(&self) -> bool {
        matches!(self.phase, SupervisorPhase::Up(_))
    }

    /// A start is under way.
    pub fn is_starting(&self) -> bool {
        self.phase == SupervisorPhase::Starting
    }

    pub fn is_stopping(&self) -> bool {
        matches!(self.phase, SupervisorPhase::Stopping { .. })
    }

    /// The running process, including one that is being stopped.
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

    /// Restarts after failures, without those that were requested.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Failures in a row, without a healthy period between.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The current health problem, or else the reason for the last restart or failed start.
    pub fn last_error(&self) -> Option<&str> {
        self.process().and_then(|process| process.health.problem()).or(self.last_error.as_deref())
    }

    /// Whether its process runs and is healthy: by the last check, where there are checks.
    pub fn is_healthy(&self) -> bool {
        matches!(&self.phase, SupervisorPhase::Up(process) if process.health.is_healthy())
    }

    /// It exited, and its restart policy does not restart it.
    pub fn is_done(&self) -> bool {
        self.phase == SupervisorPhase::Down { done: true }
    }

    /// When the next [`SupervisorEvent::Tick`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            SupervisorPhase::Waiting { until } => Some(*until),
            SupervisorPhase::Up(process) => process.health.due(),
            _ => None,
        }
    }

    /// When its back-off ends, if it waits for that.
    pub fn starts_at(&self) -> Option<Instant> {
        match self.phase {
            SupervisorPhase::Waiting { until } => Some(until),
            _ => None,
        }
    }

    /// The state that operators see. A sub-agent that is being stopped keeps its state until its process has exited.
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

    /// Handles an event and returns the next action. `jitter` is from 0 to 1 and shortens delays by up to a quarter.
    ///
    /// An event that does not fit the phase changes nothing.
    pub fn step(&mut self, event: SupervisorEvent, now: Instant, jitter: f64) -> Option<SupervisorAction> {
        match event {
            SupervisorEvent::Run => {
                self.wanted = true;
                matches!(self.phase, SupervisorPhase::Down { .. }).then(|| self.start())
            }
            SupervisorEvent::Stop => {
                self.wanted = false;
                self.clear_failures();
                match &mut self.phase {
                    // Stop it even if its main process exited: child processes may still run.
                    SupervisorPhase::Up(_) | SupervisorPhase::Waiting { .. } | SupervisorPhase::Down { done: true } => {
                        Some(self.stop(false))
                    }
                    SupervisorPhase::Stopping { failed, .. } => {
                        *failed = false;
                        None
                    }
                    // A start under way is stopped once its pid is known.
                    SupervisorPhase::Starting | SupervisorPhase::Down { done: false } => None,
                }
            }
            SupervisorEvent::Restart if self.wanted => match &mut self.phase {
                SupervisorPhase::Up(_) => {
                    self.clear_failures();
                    Some(self.stop(false))
                }
                SupervisorPhase::Waiting { .. } | SupervisorPhase::Down { .. } => {
                    self.clear_failures();
                    Some(self.start())
                }
                SupervisorPhase::Stopping { failed, .. } => {
                    *failed = false;
                    self.clear_failures();
                    None
                }
                SupervisorPhase::Starting => None,
            },
            SupervisorEvent::Started { pid } if self.phase == SupervisorPhase::Starting => {
                self.adopt(pid, now, now, jitter);
                (!self.wanted).then(|| self.stop(false))
            }
            SupervisorEvent::StartFailed { why } if self.phase == SupervisorPhase::Starting => {
                // The error of a start that is no longer needed is dropped.
                if self.wanted {
                    self.last_error = Some(why);
                }
                self.count_failure(now, jitter)
            }
            SupervisorEvent::Exited { success, how } if self.is_up() => {
                self.reset_if_healthy(now);
                let restarts = match self.policy.restart {
                    Restart::Always => true,
                    Restart::OnFailure => success != Some(true),
                    Restart::Never => false,
                };
                self.last_error = Some(how);
                if restarts {
                    self.count_failure(now, jitter)
                } else {
                    self.phase = SupervisorPhase::Down { done: true };
                    None
                }
            }
            SupervisorEvent::Checked(answer) => self.record_check(answer, now),
            SupervisorEvent::Stopped => match self.phase {
                SupervisorPhase::Stopping { failed, .. } if self.wanted && failed => self.count_failure(now, jitter),
                SupervisorPhase::Stopping { .. } => {
                    self.phase = SupervisorPhase::Down { done: false };
                    self.wanted.then(|| self.start())
                }
                _ => None,
            },
            SupervisorEvent::Tick => match &mut self.phase {
                SupervisorPhase::Waiting { until } if now >= *until => Some(self.start()),
                SupervisorPhase::Up(process) => process.health.begin_check(now).then_some(SupervisorAction::Check),
                _ => None,
            },
            SupervisorEvent::Restart
            | SupervisorEvent::Started { .. }
            | SupervisorEvent::StartFailed { .. }
            | SupervisorEvent::Exited { .. } => None,
        }
    }

    /// A digest of all state that future steps depend on, relative to `now`, for a search through the states.
    #[cfg(test)]
    pub fn outline(&self, now: Instant) -> Vec<i64> {
        // More failures do not lengthen the delay.
        let failures = i64::from(self.failures.min(8));
        let RestartPolicy { restart, checks, .. } = &self.policy;
        let policy = *restart as i64 * 2 + i64::from(checks.is_some());
        let mut digest = vec![policy, i64::from(self.wanted), failures];
        match &self.phase {
            SupervisorPhase::Down { done } => digest.extend([0, i64::from(*done)]),
            SupervisorPhase::Starting => digest.push(1),
            SupervisorPhase::Up(process) => {
                digest.push(2);
                digest.extend(process.health.outline(now, self.policy.healthy));
            }
            SupervisorPhase::Stopping { process, failed } => {
                digest.extend([3, i64::from(*failed), i64::from(process.is_some())]);
            }
            SupervisorPhase::Waiting { until } => {
                digest.extend([4, health::millis(until.saturating_duration_since(now))]);
            }
        }
        digest
    }

    fn record_check(&mut self, answer: CheckResult, now: Instant) -> Option<SupervisorAction> {
        self.reset_if_healthy(now);
        let SupervisorPhase::Up(process) = &mut self.phase else { return None };
        let verdict = process.health.record(answer, now);
        // With the policy `never` it keeps running and is shown as unhealthy: a stop would not help.
        if verdict == HealthVerdict::Continue || self.policy.restart == Restart::Never {
            return None;
        }
        self.last_error = process.health.problem().map(|why| format!("restarted: {why}"));
        Some(self.stop(true))
    }

    /// Resets the failure count after a healthy period.
    fn reset_if_healthy(&mut self, now: Instant) {
        if let SupervisorPhase::Up(process) = &self.phase
            && process.health.healthy_for(now) >= self.policy.healthy
        {
            self.failures = 0;
        }
    }

    /// Clears the counts and errors: the next start was requested and may be of another release.
    fn clear_failures(&mut self) {
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

    /// Counts a failure: the first restart is immediate, later ones wait.
    fn count_failure(&mut self, now: Instant, jitter: f64) -> Option<SupervisorAction> {
        if !self.wanted {
            // A failed start may still have left processes.
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
