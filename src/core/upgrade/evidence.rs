//! What a role observes before it decides about an upgrade, and the limits of the trial.

use std::time::Duration;

use super::record::{Trial, UpgradePhase};
use crate::core::model::Digest;

/// The program that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decider {
    /// The manager. It prepares and performs the switch.
    Manager,
    /// The watchdog. It evaluates the trial.
    Watchdog,
    /// The installer, with both roles stopped.
    Installer,
}

/// A release, identified by its executable; if both releases have the same bytes, by the file from which it was started (the watchdog) or by
/// the version that it reports (the manager).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WhichRelease {
    From,
    To,
    Other,
}

/// The executable at `bin/aops`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InstalledExecutable {
    From,
    To,
    /// Both releases have the same bytes, and it is this file.
    Both,
    /// A different file, from a package manager or an operator.
    Neither,
    Missing,
}

impl InstalledExecutable {
    /// `executable`: the SHA-256 of `bin/aops`, if it exists.
    pub fn of(trial: &Trial, executable: Option<&Digest>) -> InstalledExecutable {
        let Some(executable) = executable else { return InstalledExecutable::Missing };
        match (*executable == trial.from.executable, *executable == trial.to.executable) {
            (true, true) => InstalledExecutable::Both,
            (true, false) => InstalledExecutable::From,
            (false, true) => InstalledExecutable::To,
            (false, false) => InstalledExecutable::Neither,
        }
    }
}

/// The target of the role links that a self-upgrade changes: all except the manager's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoleLinks {
    /// All to `bin/aops`.
    Executable,
    /// All to `bin/aops.prev`.
    Backup,
    Mixed,
}

/// The running manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManagerEvidence {
    pub image: WhichRelease,
    /// How long it has run since its first answer. `None`: it has not answered.
    pub answered: Option<Duration>,
    /// It has adopted every sub-agent that ran when it started.
    pub adopted: bool,
    /// One of its heartbeats succeeded.
    pub heartbeat: bool,
    /// It used more than `spmMaxMem` at several checks in a row.
    pub over_memory: bool,
}

/// A heartbeat that the old program sends, as a one-shot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    NotAsked,
    Running,
    /// It succeeded, this long ago.
    Works(Duration),
    /// It failed, this long ago.
    Fails(Duration),
}

/// `bin/aops spa --prove`, the proof of the new watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    NotBegun,
    Running,
    Passed,
    /// It failed, and the record does not count this yet. Once it does, the state is [`Proof::NotBegun`].
    Failed,
}

/// All that a role observes. Facts about the new manager are those of its current process and are reset with each new process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    pub decider: Decider,
    /// The record on disk is current; otherwise an upgrade has begun in memory only.
    pub recorded: bool,
    /// Without a record: [`InstalledExecutable::Missing`] or [`InstalledExecutable::Neither`].
    pub executable: InstalledExecutable,
    /// `bin/aops.prev` is the complete old executable; without a record, any executable that runs.
    pub backup_intact: bool,
    pub links: RoleLinks,
    /// The release that `state/manager.json` names.
    pub installed: WhichRelease,
    /// The new executable is in `staging`, and this manager can switch to it.
    pub staged: bool,
    pub manager: Option<ManagerEvidence>,
    /// The running watchdog; if a watchdog decides, its own program.
    pub watchdog: Option<WhichRelease>,
    /// The new manager died, or was killed because it hung, and the record does not count this yet.
    pub died: bool,
    /// The new manager already ran when this watchdog started, and the record does not count the lost watchdog yet.
    pub found_running_manager: bool,
    pub probe: Probe,
    pub proof: Proof,
    /// A stop of the home is recorded.
    pub stopped: bool,
}

impl Evidence {
    /// The assumptions of a manager that has just started and has only read the record.
    pub fn of(trial: &Trial) -> Evidence {
        let (executable, image) = match trial.phase {
            UpgradePhase::Switching | UpgradePhase::RollingBack => (InstalledExecutable::From, WhichRelease::From),
            UpgradePhase::Trial | UpgradePhase::Committing => (InstalledExecutable::To, WhichRelease::To),
        };
        Evidence {
            decider: Decider::Manager,
            recorded: true,
            executable,
            backup_intact: true,
            links: RoleLinks::Backup,
            installed: WhichRelease::From,
            staged: false,
            manager: Some(ManagerEvidence {
                image,
                answered: None,
                adopted: false,
                heartbeat: false,
                over_memory: false,
            }),
            watchdog: Some(WhichRelease::From),
            died: false,
            found_running_manager: false,
            probe: Probe::NotAsked,
            proof: Proof::NotBegun,
            stopped: false,
        }
    }
}

/// The limits of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrialLimits {
    /// `upgradeTrial`: how long the new manager must run after its first answer before it is committed.
    pub minimum_life: Duration,
    /// The time, without pauses, until it must have answered and adopted.
    pub first_answer: Duration,
    /// After the old program's heartbeat has succeeded, the new manager has this long to send one: its retry may be due only then.
    pub heartbeat_grace: Duration,
    /// Between two heartbeats of the old program while neither program succeeds.
    pub probe_pause: Duration,
    pub deaths: u32,
    pub failed_proofs: u32,
    pub lost_watchdogs: u32,
}

impl TrialLimits {
    /// The limits for this `upgradeTrial`; the first answer may take twice as long.
    pub fn of(trial: Duration) -> TrialLimits {
        TrialLimits {
            minimum_life: trial,
            first_answer: trial * 2,
            heartbeat_grace: trial * 2,
            ..TrialLimits::default()
        }
    }
}

impl Default for TrialLimits {
    fn default() -> TrialLimits {
        TrialLimits {
            minimum_life: Duration::from_secs(30),
            first_answer: Duration::from_secs(60),
            heartbeat_grace: Duration::from_secs(60),
            probe_pause: Duration::from_secs(60),
            deaths: 3,
            failed_proofs: 2,
            lost_watchdogs: 5,
        }
    }
}
