//! The inputs of the manager's event loop: results of its background tasks.

use std::time::{Duration, SystemTime};

use crate::config::LoadedSettings;
use crate::control_socket::ControlReply;
use crate::core::agent::{Ready, ReleaseError};
use crate::core::ledger::LedgerRelease;
use crate::core::model::{AgentName, Version};
use crate::core::program::Program;
use crate::core::service_manager::UnitCondition;
use crate::core::supervise::CheckResult;
use crate::core::upgrade::{Evidence, UpgradeRecord, UpgradeStep};
use crate::platform::Child;
use crate::process::launch::StartSpec;
use crate::process::record::ProcessRecord;
use crate::uplink::sender::SendOutcome;
use anyhow::Result;
use tokio::sync::{mpsc, oneshot};

/// Where a background task sends its results.
pub(super) type Inputs = mpsc::UnboundedSender<Input>;

/// The result of a background task.
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
    /// The watched process was replaced by another one, of the same sub-agent.
    Moved {
        name: AgentName,
        serial: u64,
        record: Box<ProcessRecord>,
    },
    /// A requested stop completed or failed.
    Stopped {
        name: AgentName,
        serial: u64,
        result: Result<(), String>,
    },
    /// A health check completed.
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
    /// All files of a sub-agent were removed, or could not be.
    Removed {
        name: AgentName,
        result: Result<(), String>,
    },
    /// A state file was written, or could not be.
    Saved {
        file: StateFileName,
        revision: u64,
        result: Result<(), String>,
    },
    /// The epochs of committed releases were raised, or could not be.
    Raised(Result<(), String>),
    /// Whether the release that an operator wants to roll back to can be run. `reply` is the operator's request.
    RollBackChecked {
        name: AgentName,
        to: Version,
        result: Result<(), String>,
        reply: oneshot::Sender<ControlReply>,
    },
    /// The manager's own upgrade completed up to the switch, or failed.
    Upgraded(UpgradeOutcome),
    /// The record of upgrades was read: the next step, and the record with its evidence.
    UpgradeRecordRead(Result<Box<(UpgradeStep, UpgradeObservation)>, String>),
    /// The installation was migrated to this release, or could not be.
    Migrated(Result<(), String>),
    /// The stop of the home was recorded, or could not be.
    StopRecorded,
    HomeChecked(HomeProblems),
    MaintenanceDone(MaintenanceResult),
    Heartbeat(SendOutcome),
    /// The state of the watchdog's unit, as the service manager reports it.
    WatchdogUnitState(Result<UnitCondition>),
}

/// The state files that the manager writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateFileName {
    Desired,
    Ledger,
    Events,
    History,
}

/// The result of an upgrade up to the switch.
#[derive(Debug)]
pub(super) enum UpgradeOutcome {
    /// The new release is in place, and this manager must exit.
    Switched,
    /// The requested release is running already.
    Nothing,
    NotSwitched(NotSwitched),
}

/// Why the switch did not happen.
#[derive(Debug)]
pub(super) struct NotSwitched {
    /// Where known.
    pub(super) version: Option<Version>,
    pub(super) why: String,
    /// The package or the release is at fault; a retry does not help.
    pub(super) is_final: bool,
    pub(super) is_skipped: bool,
    pub(super) retry_after: Option<Duration>,
}

/// The record of upgrades, and the evidence that the next step was decided on.
#[derive(Debug, Clone)]
pub(super) struct UpgradeObservation {
    pub(super) record: UpgradeRecord,
    pub(super) evidence: Evidence,
}

/// The problems of a home, by subject; `None`: no problem.
#[derive(Debug)]
pub(super) struct HomeProblems {
    pub(super) home: Option<String>,
    pub(super) files: Option<String>,
    /// `None`: not checked, because the home is unsafe and anyone could have written its contents.
    pub(super) keys: Option<Option<String>>,
}

/// The result of housekeeping.
#[derive(Debug)]
pub(super) struct MaintenanceResult {
    /// Modification time of the settings, where it can be read.
    pub(super) modified: Option<SystemTime>,
    /// The settings, if they changed.
    pub(super) loaded: Option<Result<LoadedSettings>>,
    /// Whether the record on disk names this manager process.
    pub(super) is_recorded: bool,
}

/// A started process.
#[derive(Debug)]
pub(super) struct StartedProcess {
    pub(super) running: RunningProcess,
    /// Why its output is not written to its log.
    pub(super) output_lost: Option<String>,
}

/// A running process: started by this manager, which receives its exit status, or adopted.
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
