//! The events that a sub-agent's state machine handles and the actions that it returns.

use std::time::{Duration, Instant};

use crate::core::ledger::LedgerRelease;
use crate::core::model::Version;
use crate::core::order::{Order, Package, Run, Spec};
use crate::core::program::Program;
use crate::core::supervise::CheckResult;

/// When an event happens. `jitter` is from 0 to 1.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub now: Instant,
    /// For times that are compared after a restart of the manager.
    pub unix_seconds: u64,
    pub jitter: f64,
}

/// Why a release could not be staged, activated or started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseError {
    pub why: String,
    /// The release was rejected, as opposed to unavailable.
    pub refused: bool,
    /// The pause that its source requests.
    pub retry_after: Option<Duration>,
    /// It was downloaded before it was rejected, so another try repeats the download.
    pub costly: bool,
    /// It was accepted when it was staged and is rejected now: it must be fetched again.
    pub withdrawn: bool,
    /// The host or the manager is short of descriptors, processes or memory.
    pub host_shortage: bool,
}

impl ReleaseError {
    pub fn failed(why: impl Into<String>) -> ReleaseError {
        ReleaseError {
            why: why.into(),
            refused: false,
            retry_after: None,
            costly: false,
            withdrawn: false,
            host_shortage: false,
        }
    }

    /// Whether the release is at fault, and not the home or the host.
    pub fn is_release_fault(&self) -> bool {
        !self.refused && !self.host_shortage
    }

    /// The outcome in the event.
    pub fn outcome(&self) -> &'static str {
        if self.refused { "refused" } else { "failed" }
    }
}

/// A release that is on disk and allowed to run, and how it is run.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    pub release: LedgerRelease,
    pub program: Program,
}

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentEvent {
    /// The plan requires this release on disk.
    Stage(Package),
    /// The plan requires this release, which is on disk, to be active.
    Activate(Order),
    /// The plan requires this spec. `spec_matches`: its process was started with exactly this spec. `sound`: whether a start with it would succeed.
    Configure {
        spec: Spec,
        spec_matches: bool,
        sound: Result<(), ReleaseError>,
    },
    /// The plan requires it to run or to be stopped.
    Set(Run),
    /// The plan requires its removal.
    Uninstall,
    /// The plan does not need this release on disk.
    Discard(Version),
    /// Another desired state is in effect. `None`: it does not include this sub-agent.
    OrderChanged(Option<Order>),
    /// An operator requests the previous release, against this order.
    RollBack {
        overruled: Option<Order>,
    },
    /// An operator requests another try of every release that is skipped or held.
    Retry,
    /// The home is being stopped.
    HomeStopping,
    /// An operator requests a restart.
    Restart,

    /// `id`: of [`AgentAction::Stage`]. Each staging is answered, including cancelled ones.
    Staged {
        id: u64,
        version: Version,
        result: Result<Ready, ReleaseError>,
    },
    /// The release on disk, and how it is run if that was requested.
    Admitted(Result<(LedgerRelease, Option<Program>), ReleaseError>),
    /// The ledger is durable, or cannot be written.
    Recorded(Result<(), String>),
    Switched(Result<(), String>),
    /// The files of a release were removed, or could not be.
    Discarded(Version),
    /// How a release is run, read again.
    Inspected {
        version: Version,
        result: Result<Program, String>,
    },

    Launched {
        pid: u32,
        version: Version,
        spec_matches: bool,
    },
    LaunchFailed(ReleaseError),
    /// Its process exited without a request to stop.
    Exited {
        success: Option<bool>,
        how: String,
    },
    /// The supervised process was replaced by another.
    ProcessReplaced {
        pid: u32,
    },
    /// The requested stop is complete.
    Stopped(Result<(), String>),
    Checked(CheckResult),
    Tick,
}

/// An action for the manager.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentAction {
    /// Stage a release; answered with [`AgentEvent::Staged`].
    Stage {
        id: u64,
        package: Package,
    },
    /// The release that is being staged is not needed any more.
    CancelStaging,
    /// Verify that a release on disk may run; answered with [`AgentEvent::Admitted`]. `inspect`: also read how it is run.
    Admit {
        version: Version,
        inspect: bool,
    },
    /// Write the ledger. `wait`: answered with [`AgentEvent::Recorded`].
    Record {
        wait: bool,
    },
    /// A release was committed: releases with a lower epoch are rejected from now on.
    RaiseEpoch(LedgerRelease),
    /// Point the link `current` at this version; answered with [`AgentEvent::Switched`].
    Switch(Version),
    /// Remove all files of the sub-agent.
    Remove,
    /// Remove the files of a release; answered with [`AgentEvent::Discarded`].
    Discard(Version),
    /// Read how a release is run; answered with [`AgentEvent::Inspected`].
    Inspect(Version),
    Start,
    Stop,
    Check,
    /// The result of the check that is under way does not matter any more.
    CancelCheck,
    Note(JournalNote),
}

/// An entry for the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct JournalNote {
    pub kind: &'static str,
    pub outcome: &'static str,
    pub version: Option<Version>,
    pub message: String,
    /// The entry can recur, so the journal limits its rate.
    pub repeats: bool,
    /// The change of release whose outcome this is; it goes into the history.
    pub change: Option<ReleaseChange>,
}

/// A change from one release to another, and how long it took.
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
