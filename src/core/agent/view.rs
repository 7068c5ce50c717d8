//! What can be seen of a sub-agent: by the plan, by the manager, by an operator.

use std::time::Instant;

use super::{Agent, Held, Work, put_into_use};
use crate::core::ledger::Entry;
use crate::core::model::{AgentName, Version};
use crate::core::order::{Run, Spec};
use crate::core::program::Program;
use crate::core::protocol::AgentState;
use crate::core::reconcile::Actual;
use crate::core::supervise::Supervisor;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};

impl Agent {
    pub fn name(&self) -> &AgentName {
        &self.name
    }

    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    pub fn ledger(&self) -> &Entry {
        &self.ledger
    }

    /// What the file is to say: of an activation that is to follow, what will be true then.
    pub fn to_record(&self) -> Entry {
        let mut recorded = self.ledger.clone();
        if let Work::Recording(activation) | Work::Stopping(activation) = &self.work {
            put_into_use(&mut recorded, activation.ready.release.clone());
        }
        recorded
    }

    /// The release that runs, or would.
    pub fn current(&self) -> Option<&Version> {
        self.ledger.current().map(|release| &release.version)
    }

    /// The release of its process, by its record; without a process, the one that would run.
    pub fn shown(&self) -> Option<&Version> {
        self.running.as_ref().or(self.current())
    }

    /// The current release, where its process is one of another.
    pub fn differing_current(&self) -> Option<&Version> {
        self.current().filter(|current| self.running.as_ref().is_some_and(|running| running != *current))
    }

    pub fn program(&self) -> Option<&Program> {
        self.program.as_ref()
    }

    /// How it is run; `None`: its process was started with something else than is wanted.
    pub fn spec(&self) -> Option<&Spec> {
        self.spec.as_ref()
    }

    pub fn is_staging(&self, id: u64) -> bool {
        matches!(self.work, Work::Staging { id: staged, .. } if staged == id)
    }

    /// Its releases are being changed: nothing else is to be begun.
    pub(super) fn is_busy(&self) -> bool {
        match self.work {
            Work::Idle | Work::Staging { .. } | Work::Staged(_) | Work::Held(_) => false,
            Work::Admitting { .. }
            | Work::Recording(_)
            | Work::Stopping(_)
            | Work::Switching { .. }
            | Work::Uninstalling
            | Work::Removing => true,
        }
    }

    fn held(&self) -> Option<&Held> {
        match &self.work {
            Work::Held(held) => Some(held),
            _ => None,
        }
    }

    /// What the plan goes by.
    pub fn actual(&self, now: Instant) -> Actual {
        let staging = match &self.work {
            Work::Staging { version, .. } => Some(version.clone()),
            _ => None,
        };
        Actual {
            current: self.current().cloned(),
            running: self.running.clone(),
            kept: self.ledger.kept().cloned().collect(),
            releases: self.releases.clone(),
            leaving: self.leaving.clone(),
            staging,
            held_back: self.held().filter(|held| now < held.until).map(|held| held.version.clone()),
            run: self.run,
            spec: self.spec.clone(),
            busy: self.is_busy(),
        }
    }

    /// Whether a release that was held back is to be tried again.
    pub fn hold_is_over(&self, now: Instant) -> bool {
        self.held().is_some_and(|held| held.until <= now)
    }

    /// Whether its supervisor waits for [`super::Event::Tick`].
    pub fn is_due(&self, now: Instant) -> bool {
        self.supervisor.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// When there is something to do for it without anything happening.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let retry = self.held().map(|held| held.until).filter(|until| *until > now);
        [self.supervisor.deadline(), retry].into_iter().flatten().min()
    }

    /// As an operator reads it.
    pub fn state(&self) -> AgentState {
        let is_updating = match self.work {
            Work::Staging { .. } | Work::Staged(_) => true,
            Work::Uninstalling | Work::Removing => false,
            _ => self.is_busy(),
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

    /// What is wrong with it, if there is something to know.
    pub fn last_error(&self) -> Option<String> {
        let error = self.error.as_deref().or(self.refused_env.as_deref()).or(self.supervisor.last_error());
        error.map(|error| cut(error, MAX_MESSAGE_BYTES))
    }
}
