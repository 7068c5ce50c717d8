//! What a role observes before it decides about an upgrade, and the limits that it decides by.

use std::time::Duration;

use super::record::{Trial, UpgradePhase};
use crate::core::model::Digest;

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decider {
    /// The manager. It prepares and makes the switch.
    Manager,
    /// The watchdog. It judges.
    Watchdog,
    /// The installer, with both roles stopped.
    Installer,
}

/// A program, by its bytes; where both releases have the same, by the file that it was started from (the watchdog) or the release that
/// it reports (the manager).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WhichRelease {
    From,
    To,
    Other,
}

/// Which executable `bin/aops` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InstalledExecutable {
    From,
    To,
    /// Both releases have the same bytes, and it is them.
    Both,
    /// Another: a package manager, or an operator, put it there.
    Neither,
    Missing,
}

impl InstalledExecutable {
    /// `executable`: the SHA-256 of `bin/aops`, where it is there.
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

/// Where the role links lead that a self-upgrade moves: all but the manager's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoleLinks {
    /// All to `bin/aops`.
    Executable,
    /// All to `bin/aops.prev`.
    Backup,
    Mixed,
}

/// The manager that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManagerEvidence {
    pub image: WhichRelease,
    /// How long it has lived without interruption since its first answer; `None`: it has not answered.
    pub answered: Option<Duration>,
    /// It is in charge of every sub-agent that ran when it started.
    pub adopted: bool,
    /// One of its heartbeats has succeeded.
    pub heartbeat: bool,
    /// It uses more than `spmMaxMem`, at several looks in a row.
    pub over_memory: bool,
}

/// A heartbeat sent by the old program, as a one-shot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    NotAsked,
    Running,
    /// It was answered, so long ago.
    Works(Duration),
    /// It was not answered, so long ago.
    Fails(Duration),
}

/// `bin/aops spa --prove`, the proof of the new watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    NotBegun,
    Running,
    Passed,
    /// And the failure is not yet in the record. Once it is, the next proof has not begun.
    Failed,
}

/// Everything that is observed. What concerns the new manager alone is of the process that runs: it begins anew with each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evidence {
    pub asker: Decider,
    /// The record is as it was read or written; otherwise an upgrade has begun in memory alone.
    pub recorded: bool,
    /// Without a record: [`InstalledExecutable::Missing`] or [`InstalledExecutable::Neither`].
    pub executable: InstalledExecutable,
    /// `bin/aops.prev` is the old executable, whole; without a record, any executable that runs.
    pub backup_whole: bool,
    pub links: RoleLinks,
    /// The release that `state/manager.json` names.
    pub installed: WhichRelease,
    /// The new executable is in `staging`, and this manager can switch to it.
    pub staged: bool,
    pub manager: Option<ManagerEvidence>,
    /// The watchdog that runs; of a watchdog that asks, its own program.
    pub watchdog: Option<WhichRelease>,
    /// The new manager has died, or was killed because it hung, and the record does not count it yet.
    pub died: bool,
    /// This watchdog found the new manager running when it started, and the record does not count the watchdog before it as lost yet.
    pub took_over: bool,
    pub probe: Probe,
    pub proof: Proof,
    /// A stop of the home is recorded.
    pub stopped: bool,
}

impl Evidence {
    /// What a manager takes for granted that has just started, and has looked at nothing but the record.
    pub fn of(trial: &Trial) -> Evidence {
        let (executable, image) = match trial.phase {
            UpgradePhase::Switching | UpgradePhase::RollingBack => (InstalledExecutable::From, WhichRelease::From),
            UpgradePhase::Trial | UpgradePhase::Committing => (InstalledExecutable::To, WhichRelease::To),
        };
        Evidence {
            asker: Decider::Manager,
            recorded: true,
            executable,
            backup_whole: true,
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
            took_over: false,
            probe: Probe::NotAsked,
            proof: Proof::NotBegun,
            stopped: false,
        }
    }
}

/// What a new release is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrialLimits {
    /// `upgradeTrial`: it lives this long after its first answer, without interruption, before it is committed.
    pub minimum_life: Duration,
    /// Of judged time, until it has answered and adopted.
    pub first_answer: Duration,
    /// After the old program's heartbeat has succeeded, the new manager gets this long to send one: its retry may be due only then.
    pub heartbeat_grace: Duration,
    /// Between two heartbeats of the old program while neither succeeds.
    pub probe_pause: Duration,
    pub deaths: u32,
    pub failed_proofs: u32,
    pub lost_watchdogs: u32,
}

impl TrialLimits {
    /// With this `upgradeTrial`; it may take twice as long until something is first heard of the new manager.
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
