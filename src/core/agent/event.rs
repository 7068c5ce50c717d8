//! What a sub-agent's state hears, and what it asks for.

use std::time::{Duration, Instant};

use crate::core::ledger::LedgerRelease;
use crate::core::model::Version;
use crate::core::order::{Order, Package, Run, Spec};
use crate::core::program::Program;
use crate::core::supervise::CheckResult;

/// When something happens. `jitter` is from 0 to 1.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub now: Instant,
    /// For what must be compared after a restart of the manager.
    pub unix_seconds: u64,
    pub jitter: f64,
}

/// Why a release could not be staged, activated or started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseError {
    pub why: String,
    /// It was looked at and not trusted, as opposed to not available.
    pub refused: bool,
    /// Its source asks for this pause.
    pub retry_after: Option<Duration>,
    /// It was downloaded before it was refused, and would be again.
    pub costly: bool,
    /// It was accepted when it was staged, and is not any more: it is to be fetched anew.
    pub withdrawn: bool,
    /// The host, or the manager itself, has too few descriptors, processes or too little memory.
    pub of_host: bool,
}

impl ReleaseError {
    pub fn failed(why: impl Into<String>) -> ReleaseError {
        ReleaseError {
            why: why.into(),
            refused: false,
            retry_after: None,
            costly: false,
            withdrawn: false,
            of_host: false,
        }
    }

    /// Whether it says something about the release, and not about the home or the host.
    pub fn is_of_release(&self) -> bool {
        !self.refused && !self.of_host
    }

    /// As an event has it.
    pub fn outcome(&self) -> &'static str {
        if self.refused { "refused" } else { "failed" }
    }
}

/// A release that lies on disk and may be run, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    pub release: LedgerRelease,
    pub program: Program,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentEvent {
    /// The plan wants this release on disk.
    Stage(Package),
    /// The plan wants this release, which lies on disk, to be the active one.
    Activate(Order),
    /// The plan wants it run so. `runs_so`: its process was started with just this; `sound`: whether it could be started again.
    Configure {
        spec: Spec,
        runs_so: bool,
        sound: Result<(), ReleaseError>,
    },
    /// The plan wants it to run, or not.
    Set(Run),
    /// The plan wants it gone.
    Uninstall,
    /// The plan does not want this release on disk.
    Discard(Version),
    /// Another desired state is in force; `None`: it does not name this sub-agent.
    Ordered(Option<Order>),
    /// An operator wants the release before the current one, against this order.
    Return {
        overruled: Option<Order>,
    },
    /// An operator wants it tried again, whatever was skipped or held back.
    Retry,
    /// Its home is being stopped.
    HomeStops,
    /// An operator wants it restarted.
    Restart,

    /// `id`: of [`AgentAction::Stage`], each of which is answered, also a cancelled one.
    Staged {
        id: u64,
        version: Version,
        result: Result<Ready, ReleaseError>,
    },
    /// The release that lies on disk, and how it is run where that was asked for.
    Admitted(Result<(LedgerRelease, Option<Program>), ReleaseError>),
    /// What the ledger says of it is durable, or cannot be made so.
    Recorded(Result<(), String>),
    Switched(Result<(), String>),
    /// The files of a release were removed, or could not be.
    Discarded(Version),
    /// How a release is run, read anew.
    Inspected {
        version: Version,
        result: Result<Program, String>,
    },

    Launched {
        pid: u32,
        version: Version,
        runs_so: bool,
    },
    NotLaunched(ReleaseError),
    /// Its process ended by itself.
    Exited {
        success: Option<bool>,
        how: String,
    },
    /// Another process took the place of the one that was watched.
    Moved {
        pid: u32,
    },
    /// The stop that was asked for came to its end.
    Stopped(Result<(), String>),
    Checked(CheckResult),
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentAction {
    /// To be answered with [`AgentEvent::Staged`].
    Stage {
        id: u64,
        package: Package,
    },
    /// The release that is being staged is not wanted any more.
    CancelStaging,
    /// To look whether a release that lies on disk may be run; [`AgentEvent::Admitted`]. `inspect`: how it is run is not known either.
    Admit {
        version: Version,
        inspect: bool,
    },
    /// To write the ledger; `wait`: [`AgentEvent::Recorded`] is waited for.
    Record {
        wait: bool,
    },
    /// A release was committed: its epoch counts from now on.
    RaiseEpoch(LedgerRelease),
    /// To make the link `current` name this version; [`AgentEvent::Switched`].
    Switch(Version),
    /// To remove all of its files.
    Remove,
    /// To remove a release's files; [`AgentEvent::Discarded`].
    Discard(Version),
    /// To read how a release is run; [`AgentEvent::Inspected`].
    Inspect(Version),
    Start,
    Stop,
    Check,
    /// The answer to a check that is under way would say nothing.
    CancelCheck,
    Note(JournalNote),
}

/// Something for the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct JournalNote {
    pub kind: &'static str,
    pub outcome: &'static str,
    pub version: Option<Version>,
    pub message: String,
    /// It may recur, so the journal limits its rate.
    pub repeats: bool,
    /// The change of release whose outcome it is; it belongs into the history.
    pub change: Option<ReleaseChange>,
}

/// From which release to which, and how long that took.
#[derive(Debug, Clone, PartialEq)]
pub struct ReleaseChange {
    pub from: Option<Version>,
    pub to: Version,
    pub seconds: u64,
}

impl JournalNote {
    pub(super) fn once(
        kind: &'static str,
        outcome: &'static str,
        version: Option<Version>,
        message: String,
    ) -> JournalNote {
        JournalNote { kind, outcome, version, message, repeats: false, change: None }
    }

    pub(super) fn change(
        kind: &'static str,
        outcome: &'static str,
        change: ReleaseChange,
        message: String,
    ) -> JournalNote {
        JournalNote { kind, outcome, version: Some(change.to.clone()), message, repeats: false, change: Some(change) }
    }
}
