//! What the manager's loop hears from what runs beside it.

use std::time::{Duration, SystemTime};

use crate::config::LoadedSettings;
use crate::control_socket::ControlReply;
use crate::core::agent::{Ready, ReleaseError};
use crate::core::ledger::LedgerRelease;
use crate::core::model::{AgentName, Version};
use crate::core::program::Program;
use crate::core::service_manager::UnitStanding;
use crate::core::supervise::CheckResult;
use crate::core::upgrade::{Evidence, UpgradeRecord, UpgradeStep};
use crate::platform::Child;
use crate::process::launch::StartSpec;
use crate::process::record::ProcessRecord;
use crate::uplink::sender::SendOutcome;
use anyhow::Result;
use tokio::sync::{mpsc, oneshot};

/// Where a task sends what came of it.
pub(super) type Inputs = mpsc::UnboundedSender<Input>;

/// What came of something.
#[derive(Debug)]
pub(super) enum Input {
    Launched {
        name: AgentName,
        serial: u64,
        result: Result<Box<StartedProcess>, ReleaseError>,
    },
    Exited {
        name: AgentName,
        serial: u64,
        success: Option<bool>,
        how: String,
    },
    /// Another process took the place of the one that was watched.
    Moved {
        name: AgentName,
        serial: u64,
        record: Box<ProcessRecord>,
    },
    /// A stop that was asked for came to its end.
    Ended {
        name: AgentName,
        serial: u64,
        result: Result<(), String>,
    },
    /// A health check came to its end.
    Checked {
        name: AgentName,
        serial: u64,
        answer: CheckResult,
    },
    Staged {
        id: u64,
        name: AgentName,
        version: Version,
        result: Result<Ready, ReleaseError>,
    },
    Admitted {
        name: AgentName,
        result: Result<(LedgerRelease, Option<Program>), ReleaseError>,
    },
    Switched {
        name: AgentName,
        result: Result<(), String>,
    },
    Discarded {
        name: AgentName,
        version: Version,
    },
    Inspected {
        name: AgentName,
        version: Version,
        result: Result<Program, String>,
    },
    /// All files of a sub-agent were removed.
    Removed {
        name: AgentName,
        result: Result<(), String>,
    },
    /// A state file was written.
    Saved {
        file: StateFileName,
        revision: u64,
        result: Result<(), String>,
    },
    /// Epochs of committed releases were raised.
    Raised(Result<(), String>),
    /// It is known whether the release that an operator wants back can be run; who asked is answered.
    MayRollBack {
        name: AgentName,
        to: Version,
        result: Result<(), String>,
        reply: oneshot::Sender<ControlReply>,
    },
    /// The manager's own upgrade, up to the switch, came to an end.
    Upgraded(UpgradeOutcome),
    /// The record of upgrades was looked at: which step is left, and how it is then.
    UpgradeSeen(Result<Box<(UpgradeStep, UpgradeObservation)>, String>),
    /// The installation was brought up to this release, or could not be.
    Migrated(Result<(), String>),
    /// The stop of the home was recorded, or could not be.
    StopRecorded,
    Looked(HomeProblems),
    Reloaded(MaintenanceResult),
    Heartbeat(SendOutcome),
    /// What the service manager says of the unit of a watchdog that is gone.
    WatchdogJudged(Result<UnitStanding>),
}

/// Which state file was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateFileName {
    Desired,
    Ledger,
    Events,
    History,
}

/// What came of an upgrade up to the switch.
#[derive(Debug)]
pub(super) enum UpgradeOutcome {
    /// The new release is in place, and this manager is to end.
    Switched,
    /// It is the release that runs.
    Nothing,
    NotSwitched(NotSwitched),
}

/// Why there was no switch.
#[derive(Debug)]
pub(super) struct NotSwitched {
    /// Where it is known.
    pub(super) version: Option<Version>,
    pub(super) why: String,
    /// The package or the release is at fault, and stays so.
    pub(super) is_final: bool,
    pub(super) is_skipped: bool,
    pub(super) retry_after: Option<Duration>,
}

/// The record of upgrades as it was found, and what it is judged by.
#[derive(Debug, Clone)]
pub(super) struct UpgradeObservation {
    pub(super) record: UpgradeRecord,
    pub(super) evidence: Evidence,
}

/// What is wrong with a home, by subject; `None`: nothing.
#[derive(Debug)]
pub(super) struct HomeProblems {
    pub(super) home: Option<String>,
    pub(super) files: Option<String>,
    /// Not looked at where the home is not sound: its contents may be anybody's.
    pub(super) keys: Option<Option<String>>,
}

/// What housekeeping found.
#[derive(Debug)]
pub(super) struct MaintenanceResult {
    /// When the settings were last changed, as far as that can be told.
    pub(super) seen: Option<SystemTime>,
    /// The settings, where they changed.
    pub(super) loaded: Option<Result<LoadedSettings>>,
    /// Whether others can see by the record which process the manager is.
    pub(super) is_recorded: bool,
}

/// A process that was started.
#[derive(Debug)]
pub(super) struct StartedProcess {
    pub(super) running: RunningProcess,
    /// Why its output does not go into its log.
    pub(super) output_lost: Option<String>,
}

/// A process that runs: started by us, so that its exit status comes to us, or adopted.
#[derive(Debug)]
pub(super) enum RunningProcess {
    Child(Child, ProcessRecord),
    Adopted(ProcessRecord),
    Script(Box<StartSpec>, ProcessRecord),
}

impl RunningProcess {
    pub(super) fn record(&self) -> &ProcessRecord {
        match self {
            RunningProcess::Child(_, record) | RunningProcess::Adopted(record) | RunningProcess::Script(_, record) => {
                record
            }
        }
    }
}
