//! Read access to a sub-agent's state, for the plan, the manager and the operator.

use std::time::{Duration, Instant};

use super::probation::MAX_FAILURES;
use super::{Activity, Agent, HeldRelease, put_into_use};
use crate::core::ledger::LedgerEntry;
use crate::core::model::{AgentName, Version};
use crate::core::order::{Order, Run, Spec};
use crate::core::program::Program;
use crate::core::protocol::AgentState;
use crate::core::reconcile::Actual;
use crate::core::supervise::Supervisor;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};

/// The change of release that is under way.
#[derive(Debug, Clone, PartialEq)]
pub struct Upgrade {
    pub from: Option<Version>,
    pub to: Version,
    pub phase: &'static str,
    /// Until it is rolled back, if a time limit applies.
    pub left: Option<Duration>,
    /// Failures left before it is rolled back.
    pub tries_left: Option<u64>,
    pub reason: Option<String>,
}

impl Agent {
    pub fn name(&self) -> &AgentName {
        &self.name
    }

    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    pub fn ledger(&self) -> &LedgerEntry {
        &self.ledger
    }

    /// The ledger entry to write. During an activation it already includes the new release.
    pub fn to_record(&self) -> LedgerEntry {
        let mut recorded = self.ledger.clone();
        if let Activity::Recording(activation) | Activity::Stopping(activation) = &self.activity {
            put_into_use(&mut recorded, activation.ready.release.clone());
        }
        recorded
    }

    /// The release that runs or would run.
    pub fn current(&self) -> Option<&Version> {
        self.ledger.current().map(|release| &release.version)
    }

    /// The release of its process, by the process record; without a process, the one that would run.
    pub fn shown(&self) -> Option<&Version> {
        self.running.as_ref().or(self.current())
    }

    /// The current release, if its process belongs to a different one.
    pub fn differing_current(&self) -> Option<&Version> {
        self.current().filter(|current| self.running.as_ref().is_some_and(|running| running != *current))
    }

    pub fn program(&self) -> Option<&Program> {
        self.program.as_ref()
    }

    /// How it is run. `None`: its process was started with a spec other than the desired one.
    pub fn spec(&self) -> Option<&Spec> {
        self.spec.as_ref()
    }

    pub fn is_staging(&self, id: u64) -> bool {
        matches!(self.activity, Activity::Staging { id: staged, .. } if staged == id)
    }

    /// Whether a change of release is under way, so that no other operation may start.
    pub fn is_busy(&self) -> bool {
        match self.activity {
            Activity::Idle | Activity::Staging { .. } | Activity::Staged(_) | Activity::Held(_) => false,
            Activity::Admitting { .. }
            | Activity::Recording(_)
            | Activity::Stopping(_)
            | Activity::Switching { .. }
            | Activity::RollingBack(_)
            | Activity::SwitchingBack(_)
            | Activity::Uninstalling
            | Activity::Removing => true,
        }
    }

    fn held(&self) -> Option<&HeldRelease> {
        match &self.activity {
            Activity::Held(held) => Some(held),
            _ => None,
        }
    }

    /// The input of the plan. `order`: what the desired state orders for it.
    pub fn actual(&self, order: Option<&Order>, now: Instant) -> Actual {
        let asks_for = order.map(Order::asks_for);
        let skipped = asks_for.and_then(|(version, sha256, _)| self.ledger.skipped(version, sha256));
        let skipped = skipped.filter(|skipped| skipped.until.is_none()).map(|skipped| skipped.version.clone());
        let held = self.held().filter(|held| now < held.until).map(|held| held.version.clone());
        let staging = match &self.activity {
            Activity::Staging { version, .. } => Some(version.clone()),
            _ => None,
        };
        Actual {
            current: self.current().cloned(),
            running: self.running.clone(),
            kept: self.ledger.kept().cloned().collect(),
            releases: self.releases.clone(),
            leaving: self.removing.clone(),
            staging,
            held_back: held.or(skipped),
            stays: asks_for.is_some_and(|(version, sha256, retry)| self.ledger.overrules(version, sha256, retry)),
            upgrading: self.is_down_for_upgrade(),
            run: self.run,
            spec: self.spec.clone(),
            busy: self.is_busy(),
        }
    }

    /// Whether it is down, or is about to be, for a change of release.
    pub fn is_down_for_upgrade(&self) -> bool {
        let is_changing = match &self.activity {
            Activity::Admitting { .. }
            | Activity::Recording(_)
            | Activity::Stopping(_)
            | Activity::Switching { .. } => self.ledger.current().is_some(),
            Activity::RollingBack(_) | Activity::SwitchingBack(_) => true,
            _ => self.is_on_probation() || self.rolled_back.is_some(),
        };
        is_changing && (self.is_busy() || !self.supervisor.is_up())
    }

    /// Whether a held release is to be tried again.
    pub fn hold_is_over(&self, now: Instant) -> bool {
        self.held().is_some_and(|held| held.until <= now)
    }

    /// Whether [`super::AgentEvent::Tick`] is due.
    pub fn is_due(&self, now: Instant) -> bool {
        [self.supervisor.deadline(), self.probation_deadline()].into_iter().flatten().any(|deadline| deadline <= now)
    }

    /// When the next timed action is due.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let retry = self.held().map(|held| held.until).filter(|until| *until > now);
        [self.supervisor.deadline(), self.probation_deadline(), retry].into_iter().flatten().min()
    }

    /// The state that operators see.
    pub fn state(&self) -> AgentState {
        let is_updating = match self.activity {
            Activity::Staging { .. } | Activity::Staged(_) => true,
            Activity::Uninstalling | Activity::Removing => false,
            _ => self.is_busy() || self.is_on_probation() || self.rolled_back.is_some(),
        };
        match self.supervisor.state() {
            _ if is_updating => AgentState::Updating,
            AgentState::Stopped if self.current().is_none() => AgentState::Failed,
            AgentState::Stopped | AgentState::Backoff if self.program.is_none() && self.run == Run::Start => {
                AgentState::Failed
            }
            state => state,
        }
    }

    /// The problem to show, if there is one.
    pub fn last_error(&self) -> Option<String> {
        let skipped = self.ledger.permanently_skipped().last();
        let skipped = skipped.map(|skipped| format!("{} is skipped: {}", skipped.version, skipped.reason));
        let error = self.error.as_deref().or(self.refused_env.as_deref()).or(self.supervisor.last_error());
        let both = [error, skipped.as_deref()].into_iter().flatten().collect::<Vec<_>>().join("; ");
        (!both.is_empty()).then(|| cut(&both, MAX_MESSAGE_BYTES))
    }

    /// The change of release that is under way.
    pub fn upgrade(&self, now: Instant) -> Option<Upgrade> {
        let left = |until: Instant| until.saturating_duration_since(now);
        let current = || self.current().cloned();
        let new = |phase, to: &Version, from: Option<Version>| Upgrade {
            from,
            to: to.clone(),
            phase,
            left: None,
            tries_left: None,
            reason: None,
        };
        match &self.activity {
            Activity::Staging { version, .. } => Some(new("staging", version, current())),
            Activity::Admitting { order, .. } => Some(new("activating", &order.package.version, current())),
            Activity::Recording(activation) | Activity::Stopping(activation) => {
                Some(new("activating", &activation.ready.release.version, current()))
            }
            Activity::Switching { activation, before } => {
                let from = before.current().map(|release| release.version.clone());
                Some(new("activating", &activation.ready.release.version, from))
            }
            Activity::RollingBack(back) | Activity::SwitchingBack(back) => {
                let reason = Some(back.why.clone());
                Some(Upgrade { reason, ..new("rollingBack", &back.to, Some(back.from.clone())) })
            }
            _ if self.is_on_probation() => {
                let from = self.ledger.before_probation().map(|release| release.version.clone());
                let on_probation = self.ledger.probation().map(|release| new("probation", &release.version, from))?;
                Some(Upgrade {
                    left: self.rolls_back_at().map(left),
                    tries_left: Some(MAX_FAILURES.saturating_sub(self.ledger.probation_failures())),
                    reason: self.supervisor.last_error().map(str::to_owned),
                    ..on_probation
                })
            }
            _ => None,
        }
    }
}
