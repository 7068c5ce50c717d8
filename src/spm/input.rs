//! What the manager's loop hears from what runs beside it.

use std::time::{Duration, SystemTime};

use crate::config::Loaded;
use crate::control_socket::Reply;
use crate::core::agent::{Ready, Refusal};
use crate::core::ledger::Release;
use crate::core::model::{AgentName, Version};
use crate::core::program::Program;
use crate::core::service_manager::UnitStanding;
use crate::core::supervise::Answer;
use crate::core::upgrade::{Evidence, Record as UpgradeRecord, Step};
use crate::platform::Child;
use crate::process::launch::Start;
use crate::process::record::Record;
use crate::uplink::sender::Outcome;
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
        result: Result<Box<Started>, Refusal>,
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
        record: Box<Record>,
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
        answer: Answer,
    },
    Staged {
        id: u64,
        name: AgentName,
        version: Version,
        result: Result<Ready, Refusal>,
    },
    Admitted {
        name: AgentName,
        result: Result<(Release, Option<Program>), Refusal>,
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
        file: File,
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
        reply: oneshot::Sender<Reply>,
    },
    /// The manager's own upgrade, up to the switch, came to an end.
    Upgraded(Upgraded),
    /// The record of upgrades was looked at: which step is left, and how it is then.
    UpgradeSeen(Result<Box<(Step, UpgradeSeen)>, String>),
    /// The installation was brought up to this release, or could not be.
    Migrated(Result<(), String>),
    /// The stop of the home was recorded, or could not be.
    StopRecorded,
    Looked(Looked),
    Reloaded(Reloaded),
    Heartbeat(Outcome),
    /// What the service manager says of the unit of a watchdog that is gone.
    WatchdogJudged(Result<UnitStanding>),
}

/// Which state file was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum File {
    Desired,
    Ledger,
    Events,
    History,
}

/// What came of an upgrade up to the switch.
#[derive(Debug)]
pub(super) enum Upgraded {
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
pub(super) struct UpgradeSeen {
    pub(super) record: UpgradeRecord,
    pub(super) evidence: Evidence,
}

/// What is wrong with a home, by subject; `None`: nothing.
#[derive(Debug)]
pub(super) struct Looked {
    pub(super) home: Option<String>,
    pub(super) files: Option<String>,
    /// Not looked at where the home is not sound: its contents may be anybody's.
    pub(super) keys: Option<Option<String>>,
}

/// What housekeeping found.
#[derive(Debug)]
pub(super) struct Reloaded {
    /// When the settings were last changed, as far as that can be told.
    pub(super) seen: Option<SystemTime>,
    /// The settings, where they changed.
    pub(super) loaded: Option<Result<Loaded>>,
    /// Whether others can see by the record which process the manager is.
    pub(super) is_recorded: bool,
}

/// A process that was started.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) running: Running,
    /// Why its output does not go into its log.
    pub(super) output_lost: Option<String>,
}

/// A process that runs: started by us, so that its exit status comes to us, or adopted.
#[derive(Debug)]
pub(super) enum Running {
    Child(Child, Record),
    Adopted(Record),
    Script(Box<Start>, Record),
}

impl Running {
    pub(super) fn record(&self) -> &Record {
        match self {
            Running::Child(_, record) | Running::Adopted(record) | Running::Script(_, record) => record,
        }
    }
}
