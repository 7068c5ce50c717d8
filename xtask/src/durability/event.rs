//! What the checker reads: the calls of one recording in their order.

use crate::trace::{Call, Change};

/// One call.
#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) call: Call,
    /// The new content of a state file that is renamed into its place.
    pub(super) content: Option<String>,
    /// The sub-agent whose process gets a signal.
    pub(super) agent: Option<RunningAgent>,
    /// A call that did not return (an exit, a new program, a killed process) counts as carried out where that is the stricter reading.
    pub(super) outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Succeeded,
    Failed,
    NoReturn,
}

/// The release of a sub-agent's process, as its environment names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RunningAgent {
    pub(super) name: String,
    pub(super) version: String,
}

/// Threads run at the same time, so a call has two moments: what it does may happen any time between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Begin(usize),
    End(usize),
}

/// Everything that one home's processes did.
#[derive(Debug, Default)]
pub(super) struct Recording {
    pub(super) events: Vec<Event>,
    pub(super) moments: Vec<Moment>,
    /// The changes that the home went through, each with its first event.
    pub(super) changes: Vec<(usize, &'static str)>,
}

impl Recording {
    /// The change that an event belongs to.
    pub(super) fn change_of(&self, event: usize) -> &'static str {
        self.changes.iter().rev().find(|(first, _)| *first <= event).map_or("", |(_, change)| change)
    }
}

impl Event {
    pub(super) fn change(&self) -> &Change {
        &self.call.change
    }

    pub(super) fn may_have_happened(&self) -> bool {
        self.outcome != Outcome::Failed
    }

    /// Whether it is neither the manager's nor the watchdog's.
    pub(super) fn is_installer(&self) -> bool {
        !matches!(self.call.role.split(' ').next(), Some("spm" | "spa"))
    }

    pub(super) fn is_sync(&self) -> bool {
        matches!(self.call.change, Change::Sync(_) | Change::SyncFileSystem(_))
    }
}
