//! `state/upgrade.json`: the manager's upgrade that is under way, and the releases that are not to be tried again.
//!
//! It is loaded, changed by these verbs, which touch no disk, and written. Every part keeps the fields that a later version added, so that
//! both programs of a trial can write it. A count only grows while a trial lasts: a record that is written back late loses a count, and
//! cannot grant a release more than it has.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::model::{Digest, Version};
use crate::core::unknown::UnknownFields;

/// The number of skipped releases that are remembered.
const MAX_SKIPPED: usize = 16;
/// The number of upgrades whose end is kept until it is reported.
const MAX_ENDED: usize = 16;
/// A release whose switch was interrupted this often is skipped.
const MAX_INTERRUPTIONS: u32 = 3;

/// One release of the manager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    pub version: Version,
    /// Of the package.
    pub sha256: Digest,
    /// SHA-256 of the executable file. Two releases may have the same.
    pub executable: Digest,
    /// Of the package's signed comment.
    #[serde(default)]
    pub epoch: u64,
    /// The package's file name.
    #[serde(default)]
    pub file: String,
    /// Public keys that the package brings. They count once it is committed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub brings: Vec<String>,
    /// Public keys that the package revokes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revokes: Vec<String>,
    /// Another gateway that the package brings. It is on trial with it, and is kept once it is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<NewEndpoint>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// Another gateway for a host: a few of the settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NewEndpoint {
    /// As `etc/endpoint.toml` of the package says it.
    pub settings: String,
    /// The certificates that it names, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_cert: Option<String>,
}

impl Image {
    /// Whether both are the same release: the same version of the same package.
    pub fn is(&self, other: &Image) -> bool {
        self.version == other.version && self.sha256 == other.sha256
    }
}

/// How far an upgrade is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UpgradePhase {
    /// `bin/aops` is about to be switched. Whether it was, the file tells; where both releases have the same bytes, it was not.
    Switching,
    /// The new release is in place and on trial.
    Trial,
    /// It is accepted.
    Committing,
    /// It is given up for the old one.
    RollingBack,
}

/// What the operator decided about a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OperatorDecision {
    Commit,
    Abort,
}

/// The upgrade that is under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trial {
    pub from: Image,
    pub to: Image,
    pub phase: UpgradePhase,
    /// When it began, in seconds since 1970; for the report alone.
    #[serde(default)]
    pub began: u64,
    /// Seconds of judged time in which the new manager was not in charge: it had not answered, or not adopted the sub-agents.
    #[serde(default)]
    pub spent_seconds: u64,
    /// How often the new manager died.
    #[serde(default)]
    pub deaths: u32,
    /// How often the new watchdog failed its proof.
    #[serde(default)]
    pub failed_proofs: u32,
    /// How often the watchdog ended while the new manager ran.
    #[serde(default)]
    pub lost_watchdogs: u32,
    /// Why it is rolled back, or committed without having passed; for an operator to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The roll back skips the new release.
    #[serde(default)]
    pub condemned: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<OperatorDecision>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// A release that is not to be tried again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SkippedImage {
    pub version: Version,
    /// Of the package: another package of the same version is not skipped.
    pub sha256: Digest,
    /// Why, for an operator to read.
    pub reason: String,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// How often in a row the switch to one release was interrupted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interruptions {
    pub version: Version,
    pub sha256: Digest,
    pub count: u32,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// What an operator's change of the manager overrules: the order of then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverruledUpgrade {
    /// `None`: nothing was ordered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Version>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// How an upgrade ended, until it is reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FinishedUpgrade {
    pub from: Version,
    pub to: Version,
    /// As [`Trial::began`].
    #[serde(default)]
    pub began: u64,
    pub end: UpgradeEnd,
    /// Why it was rolled back, or committed without having passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The new release is skipped from now on.
    #[serde(default)]
    pub skipped: bool,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// To which end an upgrade came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UpgradeEnd {
    Committed,
    RolledBack,
    /// Given up before the switch, or because somebody else replaced `bin/aops`.
    GivenUp,
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeRecord {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) trial: Option<Trial>,
    /// The release before the current one, of which `bin/aops.prev` is a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<Image>,
    /// An operator changed the manager: this order does not count any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    overruled: Option<OverruledUpgrade>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ended: Vec<FinishedUpgrade>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<SkippedImage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interruptions: Option<Interruptions>,
    #[serde(flatten)]
    unknown: UnknownFields,
}

/// Why an upgrade does not begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpgradeRefusal {
    /// Another upgrade is under way.
    UnderWay,
    /// It is the release that runs.
    Running,
    /// It is skipped, for this reason.
    Skipped(String),
}

/// Why a trial ends otherwise than by passing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TrialEndReason {
    /// The new manager died too often.
    Died,
    NoAnswer,
    NotAdopted,
    NoHeartbeat,
    Memory,
    /// The new watchdog failed its proof too often.
    Proof,
    /// The watchdog ended too often while the new manager ran.
    WatchdogEnded,
    /// `bin/aops` is missing.
    Vanished,
    Aborted,
    /// The installer puts another release in place.
    Installer,
    Forced,
    NoBackup,
}

impl fmt::Display for TrialEndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrialEndReason::Died => "the new manager died repeatedly",
            TrialEndReason::NoAnswer => "the new manager did not answer in time",
            TrialEndReason::NotAdopted => "the new manager did not adopt the sub-agents in time",
            TrialEndReason::NoHeartbeat => "the new manager sent no heartbeat while the old program could",
            TrialEndReason::Memory => {
                "the new manager used too much: memory beyond spmMaxMem, or hundreds of processes"
            }
            TrialEndReason::Proof => "the new watchdog failed its proof",
            TrialEndReason::WatchdogEnded => "the watchdog ended repeatedly while the new manager ran",
            TrialEndReason::Vanished => "bin/aops disappeared",
            TrialEndReason::Aborted => "aborted by the operator",
            TrialEndReason::Installer => "replaced by the installer",
            TrialEndReason::Forced => "committed by the operator",
            TrialEndReason::NoBackup => "no whole backup to roll back to",
        })
    }
}

/// A change of the record that [`next`](super::next) asks for. [`UpgradeRecord::apply`] makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecordChange {
    /// The switch has happened.
    BeginTrial,
    /// The new manager died.
    LoseTry,
    LoseWatchdog,
    FailProof,
    /// The new manager is in charge: the time that it needed no longer counts.
    ResetTime,
    Commit(Option<TrialEndReason>),
    RollBack {
        reason: TrialEndReason,
        condemns: bool,
    },
    /// The end of a commit.
    Forget,
    /// The end of a roll back that condemns the release.
    SkipAndForget,
    /// The upgrade is given up; no release is condemned.
    Drop,
    /// The switch was interrupted, and the upgrade is given up until the release is staged again.
    Interrupt,
}

impl UpgradeRecord {
    pub fn trial(&self) -> Option<&Trial> {
        self.trial.as_ref()
    }

    /// An upgrade is about to begin. It counts from when the record is on disk.
    pub fn begin(&mut self, from: Image, to: Image) -> Result<(), UpgradeRefusal> {
        if self.trial.is_some() {
            return Err(UpgradeRefusal::UnderWay);
        }
        if from.is(&to) {
            return Err(UpgradeRefusal::Running);
        }
        if let Some(skipped) = self.skipped(&to.version, &to.sha256) {
            return Err(UpgradeRefusal::Skipped(skipped.reason.clone()));
        }
        self.interruptions.take_if(|other| other.version != to.version || other.sha256 != to.sha256);
        self.trial = Some(Trial {
            from,
            to,
            phase: UpgradePhase::Switching,
            began: 0,
            spent_seconds: 0,
            deaths: 0,
            failed_proofs: 0,
            lost_watchdogs: 0,
            reason: None,
            condemned: false,
            forced: None,
            unknown: UnknownFields::new(),
        });
        Ok(())
    }

    /// Notes when the trial began, for the report.
    pub fn begun_at(&mut self, unix_seconds: u64) {
        if let Some(trial) = &mut self.trial {
            trial.began = unix_seconds;
        }
    }

    /// As [`UpgradeRecord::apply`]; if the change ends the upgrade, its outcome is kept until it is reported.
    pub fn apply_and_keep(&mut self, change: RecordChange) -> bool {
        let before = self.trial.clone();
        let skips =
            |record: &UpgradeRecord, trial: &Trial| record.skipped(&trial.to.version, &trial.to.sha256).is_some();
        let done = self.apply(change);
        let Some(trial) = before.filter(|_| done && self.trial.is_none()) else { return done };
        let (end, skipped) = match change {
            RecordChange::Forget => (UpgradeEnd::Committed, false),
            _ if trial.phase == UpgradePhase::RollingBack => (UpgradeEnd::RolledBack, skips(self, &trial)),
            _ => (UpgradeEnd::GivenUp, skips(self, &trial)),
        };
        if end == UpgradeEnd::Committed {
            self.previous = Some(trial.from.clone());
        }
        self.keep(FinishedUpgrade {
            from: trial.from.version,
            to: trial.to.version,
            began: trial.began,
            end,
            reason: trial.reason,
            skipped,
            unknown: UnknownFields::new(),
        });
        done
    }

    /// Keeps the end of an upgrade until it is reported.
    pub fn keep(&mut self, ended: FinishedUpgrade) {
        self.ended.push(ended);
        let surplus = self.ended.len().saturating_sub(MAX_ENDED);
        self.ended.drain(..surplus);
    }

    /// Ends that are not reported yet.
    pub fn ended(&self) -> &[FinishedUpgrade] {
        &self.ended
    }

    /// These are reported.
    pub fn forget_ended(&mut self, reported: &[FinishedUpgrade]) {
        self.ended.retain(|ended| !reported.contains(ended));
    }

    /// The release that `bin/aops.prev` is.
    pub fn previous(&self) -> Option<&Image> {
        self.previous.as_ref()
    }

    /// The backup is being made anew.
    pub fn forget_previous(&mut self) {
        self.previous = None;
    }

    /// An operator has put this release in place by the installer: it may run, and the backup is none of it.
    pub fn replaced(&mut self, version: &Version) {
        self.skipped.retain(|skipped| skipped.version != *version);
        (self.previous, self.interruptions, self.overruled) = (None, None, None);
    }

    /// An operator changes the manager, against this order.
    pub fn overrule(&mut self, order: Option<(&Version, Option<&Digest>)>) {
        let (version, sha256) = order.map_or((None, None), |(version, sha256)| (Some(version), sha256));
        self.overruled = Some(OverruledUpgrade {
            version: version.cloned(),
            sha256: sha256.cloned(),
            unknown: UnknownFields::new(),
        });
    }

    /// Whether an operator's change holds against this order.
    pub fn overrules(&self, version: &Version, sha256: Option<&Digest>) -> bool {
        self.overruled.as_ref().is_some_and(|overruled| {
            overruled.version.as_ref() == Some(version) && (overruled.sha256.as_ref() == sha256)
        })
    }

    pub fn is_held(&self) -> bool {
        self.overruled.is_some()
    }

    /// The gateway's order counts again. Whether it did not.
    pub fn release_hold(&mut self) -> bool {
        self.overruled.take().is_some()
    }

    /// Makes a change that was asked for. Whether it applies to the phase; otherwise nothing is changed.
    pub fn apply(&mut self, change: RecordChange) -> bool {
        match change {
            RecordChange::BeginTrial => self.begin_trial(),
            RecordChange::LoseTry => self.count(|trial| trial.deaths = trial.deaths.saturating_add(1)),
            RecordChange::LoseWatchdog => {
                self.count(|trial| trial.lost_watchdogs = trial.lost_watchdogs.saturating_add(1))
            }
            RecordChange::FailProof => self.count(|trial| trial.failed_proofs = trial.failed_proofs.saturating_add(1)),
            RecordChange::ResetTime => self.count(|trial| trial.spent_seconds = 0),
            RecordChange::Commit(reason) => self.commit(reason),
            RecordChange::RollBack { reason, condemns } => self.roll_back(reason, condemns),
            RecordChange::Forget => self.forget(),
            RecordChange::SkipAndForget => self.skip_and_forget(),
            RecordChange::Drop => self.trial.take().is_some(),
            RecordChange::Interrupt => self.interrupt(),
        }
    }

    /// `bin/aops` was switched.
    pub fn begin_trial(&mut self) -> bool {
        self.enter(UpgradePhase::Trial, &[UpgradePhase::Switching], None).is_some()
    }

    /// Counts judged time in which the new manager was not in charge. It is added in pieces, because a judge may end at any time.
    pub fn spend(&mut self, seconds: u64) -> bool {
        self.count(|trial| trial.spent_seconds = trial.spent_seconds.saturating_add(seconds))
    }

    /// The new release is accepted. `reason`: why, where it has not passed its trial.
    pub fn commit(&mut self, reason: Option<TrialEndReason>) -> bool {
        self.enter(UpgradePhase::Committing, &[UpgradePhase::Trial, UpgradePhase::RollingBack], reason).is_some()
    }

    /// The new release is given up. `condemns`: it is skipped then.
    pub fn roll_back(&mut self, reason: TrialEndReason, condemns: bool) -> bool {
        match self.enter(UpgradePhase::RollingBack, &[UpgradePhase::Trial, UpgradePhase::Committing], Some(reason)) {
            Some(trial) => trial.condemned = condemns,
            None => return false,
        }
        true
    }

    /// The operator decides about the trial. What is decided already stays so, and there is nothing to commit before the switch.
    pub fn force(&mut self, force: OperatorDecision) -> bool {
        let Some(trial) = &mut self.trial else { return false };
        let decides = match (trial.phase, force) {
            (UpgradePhase::Trial, _) | (UpgradePhase::Switching, OperatorDecision::Abort) => trial.forced.is_none(),
            (UpgradePhase::Switching, OperatorDecision::Commit)
            | (UpgradePhase::Committing | UpgradePhase::RollingBack, _) => false,
        };
        if decides {
            trial.forced = Some(force);
        }
        decides
    }

    /// The upgrade has ended with the new release in place.
    pub fn forget(&mut self) -> bool {
        let Some(trial) = self.trial.take_if(|trial| trial.phase == UpgradePhase::Committing) else { return false };
        self.skipped.retain(|skipped| skipped.version != trial.to.version);
        self.interruptions = None;
        true
    }

    /// A release is not to be tried again. The running release is never skipped.
    pub fn skip(&mut self, release: &Image, reason: String, running: &Image) {
        if release.is(running) {
            return;
        }
        let Image { version, sha256, .. } = release.clone();
        self.skipped.retain(|other| other.version != version || other.sha256 != sha256);
        self.skipped.push(SkippedImage { version, sha256, reason, unknown: UnknownFields::new() });
        let surplus = self.skipped.len().saturating_sub(MAX_SKIPPED);
        self.skipped.drain(..surplus);
    }

    /// Whether and why a release is skipped.
    pub fn skipped(&self, version: &Version, sha256: &Digest) -> Option<&SkippedImage> {
        self.skipped.iter().find(|skipped| skipped.version == *version && skipped.sha256 == *sha256)
    }

    /// Whether an order of this release is skipped, and why; without a digest, whichever package of that version was.
    pub fn skips(&self, version: &Version, sha256: Option<&Digest>) -> Option<&SkippedImage> {
        let is_it = |skipped: &&SkippedImage| sha256.is_none_or(|sha256| skipped.sha256 == *sha256);
        self.skipped.iter().filter(|skipped| skipped.version == *version).find(is_it)
    }

    /// Every release may be tried again (`control retry aops-spm`). Whether one could not.
    pub fn allow(&mut self) -> bool {
        self.interruptions = None;
        !std::mem::take(&mut self.skipped).is_empty()
    }

    fn skip_and_forget(&mut self) -> bool {
        let Some(trial) = self.trial.take() else { return false };
        let reason = trial.reason.unwrap_or_else(|| TrialEndReason::Aborted.to_string());
        self.skip(&trial.to, reason, &trial.from);
        self.interruptions = None;
        true
    }

    fn interrupt(&mut self) -> bool {
        let Some(trial) = self.trial.take() else { return false };
        let Image { version, sha256, .. } = &trial.to;
        let interruptions = self.interruptions.get_or_insert_with(|| Interruptions {
            version: version.clone(),
            sha256: sha256.clone(),
            count: 0,
            unknown: UnknownFields::new(),
        });
        interruptions.count = interruptions.count.saturating_add(1);
        if interruptions.count >= MAX_INTERRUPTIONS {
            let reason = format!("the switch was interrupted {} times", interruptions.count);
            self.skip(&trial.to, reason, &trial.from);
            self.interruptions = None;
        }
        true
    }

    fn enter(
        &mut self,
        phase: UpgradePhase,
        before: &[UpgradePhase],
        reason: Option<TrialEndReason>,
    ) -> Option<&mut Trial> {
        let trial = self.trial.as_mut().filter(|trial| before.contains(&trial.phase))?;
        trial.phase = phase;
        if let Some(reason) = reason {
            trial.reason = Some(reason.to_string());
        }
        Some(trial)
    }

    fn count(&mut self, change: impl FnOnce(&mut Trial)) -> bool {
        let trial = self.trial.as_mut().filter(|trial| trial.phase == UpgradePhase::Trial);
        trial.map(change).is_some()
    }
}
