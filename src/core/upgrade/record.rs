//! `state/upgrade.json`: the manager's upgrade that is under way, and the releases that are not to be tried again.
//!
//! It is loaded, changed by these verbs, which do not access the disk, and written. Every part keeps the fields that a later version added, so
//! that both programs of a trial can write it. Counts only grow during a trial: if an older copy of the record is written late, a count is
//! lost, but a release never gets more than its limits.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::model::{Digest, Version};
use crate::core::unknown::UnknownFields;

/// The number of skipped releases that are remembered.
const MAX_SKIPPED: usize = 16;
/// The number of finished upgrades that are kept until they are reported.
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
    /// SHA-256 of the executable file. Two releases can have the same.
    pub executable: Digest,
    /// Of the package's signed comment.
    #[serde(default)]
    pub epoch: u64,
    /// The package's file name.
    #[serde(default)]
    pub file: String,
    /// Public keys that the package adds. They take effect when it is committed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub brings: Vec<String>,
    /// Public keys that the package revokes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revokes: Vec<String>,
    /// A new gateway endpoint that the package contains. It is on trial with the package and kept once that is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<NewEndpoint>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// A new gateway endpoint: part of the settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NewEndpoint {
    /// The content of the package's `etc/endpoint.toml`.
    pub settings: String,
    /// The certificates that it refers to, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_cert: Option<String>,
}

impl Image {
    /// Whether both are the same release: the same version of the same package.
    pub fn is(&self, other: &Image) -> bool {
        self.version == other.version && self.sha256 == other.sha256
    }
}

/// The phase of an upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UpgradePhase {
    /// `bin/aops` is about to be switched. The file shows whether it was; if both releases have the same bytes, it was not.
    Switching,
    /// The new release is installed and on trial.
    Trial,
    /// The new release is accepted.
    Committing,
    /// The new release is rolled back.
    RollingBack,
}

/// The operator's decision about a trial.
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
    /// When it began, in seconds since 1970; only for the report.
    #[serde(default)]
    pub began: u64,
    /// Seconds, without pauses, in which the new manager had not answered or not adopted the sub-agents.
    #[serde(default)]
    pub spent_seconds: u64,
    /// Deaths of the new manager.
    #[serde(default)]
    pub deaths: u32,
    /// Failed proofs of the new watchdog.
    #[serde(default)]
    pub failed_proofs: u32,
    /// Exits of the watchdog while the new manager ran.
    #[serde(default)]
    pub lost_watchdogs: u32,
    /// Why it is rolled back, or committed without a passed trial; for an operator.
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
    /// Why, for an operator.
    pub reason: String,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// Interruptions in a row of the switch to one release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interruptions {
    pub version: Version,
    pub sha256: Digest,
    pub count: u32,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The order that was in effect when an operator changed the manager. It is overruled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverruledUpgrade {
    /// `None`: there was no order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Version>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// A finished upgrade that is not reported yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FinishedUpgrade {
    pub from: Version,
    pub to: Version,
    /// As [`Trial::began`].
    #[serde(default)]
    pub began: u64,
    pub end: UpgradeEnd,
    /// Why it was rolled back, or committed without a passed trial.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The new release is skipped from now on.
    #[serde(default)]
    pub skipped: bool,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The outcome of an upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UpgradeEnd {
    Committed,
    RolledBack,
    /// Dropped before the switch, or because another program replaced `bin/aops`.
    GivenUp,
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeRecord {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) trial: Option<Trial>,
    /// The previous release, of which `bin/aops.prev` is a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<Image>,
    /// An operator changed the manager: this order is not followed any more.
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

/// Why an upgrade cannot begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpgradeRefusal {
    /// Another upgrade is under way.
    UnderWay,
    /// This release runs already.
    Running,
    /// The release is skipped, with the reason.
    Skipped(String),
}

/// Why a trial ends without passing.
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
    /// The watchdog exited too often while the new manager ran.
    WatchdogExited,
    /// `bin/aops` is missing.
    ExecutableMissing,
    Aborted,
    /// The installer installs another release.
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
            TrialEndReason::NoHeartbeat => "the new manager could not send a heartbeat, but the previous release could",
            TrialEndReason::Memory => {
                "the new manager used too many resources: more memory than spmMaxMem, or hundreds of processes"
            }
            TrialEndReason::Proof => "the new watchdog failed its proof",
            TrialEndReason::WatchdogExited => "the watchdog exited repeatedly while the new manager ran",
            TrialEndReason::ExecutableMissing => "bin/aops is missing",
            TrialEndReason::Aborted => "aborted by the operator",
            TrialEndReason::Installer => "replaced by the installer",
            TrialEndReason::Forced => "committed by the operator",
            TrialEndReason::NoBackup => "there is no intact backup to roll back to",
        })
    }
}

/// A change of the record that [`next`](super::next) requires. [`UpgradeRecord::apply`] applies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecordChange {
    /// The switch is done.
    BeginTrial,
    /// The new manager died.
    CountDeath,
    CountLostWatchdog,
    CountFailedProof,
    /// The new manager has answered and adopted: the time that it needed no longer counts.
    ResetTime,
    Commit(Option<TrialEndReason>),
    RollBack {
        reason: TrialEndReason,
        skips: bool,
    },
    /// A commit is complete.
    Finish,
    /// A roll back that skips the release is complete.
    FinishAndSkip,
    /// The upgrade is dropped without a skip.
    Drop,
    /// The switch was interrupted. The upgrade is dropped until the release is staged again.
    Interrupt,
}

impl UpgradeRecord {
    pub fn trial(&self) -> Option<&Trial> {
        self.trial.as_ref()
    }

    /// Begins an upgrade. It takes effect once the record is on disk.
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

    /// Records when the trial began, for the report.
    pub fn begun_at(&mut self, unix_seconds: u64) {
        if let Some(trial) = &mut self.trial {
            trial.began = unix_seconds;
        }
    }

    /// As [`UpgradeRecord::apply`]; the outcome of an upgrade that this ends is kept until it is reported.
    pub fn apply_and_keep(&mut self, change: RecordChange) -> bool {
        let before = self.trial.clone();
        let skips =
            |record: &UpgradeRecord, trial: &Trial| record.skipped(&trial.to.version, &trial.to.sha256).is_some();
        let done = self.apply(change);
        let Some(trial) = before.filter(|_| done && self.trial.is_none()) else { return done };
        let (end, skipped) = match change {
            RecordChange::Finish => (UpgradeEnd::Committed, false),
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

    /// Keeps the outcome of an upgrade until it is reported.
    pub fn keep(&mut self, ended: FinishedUpgrade) {
        self.ended.push(ended);
        let surplus = self.ended.len().saturating_sub(MAX_ENDED);
        self.ended.drain(..surplus);
    }

    /// Outcomes that are not reported yet.
    pub fn ended(&self) -> &[FinishedUpgrade] {
        &self.ended
    }

    /// Removes reported outcomes.
    pub fn remove_reported(&mut self, reported: &[FinishedUpgrade]) {
        self.ended.retain(|ended| !reported.contains(ended));
    }

    /// The release of `bin/aops.prev`.
    pub fn previous(&self) -> Option<&Image> {
        self.previous.as_ref()
    }

    /// The backup is being written again.
    pub fn forget_previous(&mut self) {
        self.previous = None;
    }

    /// The installer installed this release for an operator: it may run, and the backup does not belong to it.
    pub fn replaced(&mut self, version: &Version) {
        self.skipped.retain(|skipped| skipped.version != *version);
        (self.previous, self.interruptions, self.overruled) = (None, None, None);
    }

    /// The host's package manager installed this release instead of the present one, also during a trial.
    pub fn overwritten(&mut self, version: &Version) {
        self.trial = None;
        self.replaced(version);
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

    /// Whether an operator's change overrules this order.
    pub fn overrules(&self, version: &Version, sha256: Option<&Digest>) -> bool {
        self.overruled.as_ref().is_some_and(|overruled| {
            overruled.version.as_ref() == Some(version) && (overruled.sha256.as_ref() == sha256)
        })
    }

    pub fn is_held(&self) -> bool {
        self.overruled.is_some()
    }

    /// The gateway's order is followed again. Returns whether it was overruled.
    pub fn release_hold(&mut self) -> bool {
        self.overruled.take().is_some()
    }

    /// Applies a change. Returns whether it fits the phase; otherwise nothing changes.
    pub fn apply(&mut self, change: RecordChange) -> bool {
        match change {
            RecordChange::BeginTrial => self.begin_trial(),
            RecordChange::CountDeath => self.count(|trial| trial.deaths = trial.deaths.saturating_add(1)),
            RecordChange::CountLostWatchdog => {
                self.count(|trial| trial.lost_watchdogs = trial.lost_watchdogs.saturating_add(1))
            }
            RecordChange::CountFailedProof => {
                self.count(|trial| trial.failed_proofs = trial.failed_proofs.saturating_add(1))
            }
            RecordChange::ResetTime => self.count(|trial| trial.spent_seconds = 0),
            RecordChange::Commit(reason) => self.commit(reason),
            RecordChange::RollBack { reason, skips } => self.roll_back(reason, skips),
            RecordChange::Finish => self.finish(),
            RecordChange::FinishAndSkip => self.finish_and_skip(),
            RecordChange::Drop => self.trial.take().is_some(),
            RecordChange::Interrupt => self.interrupt(),
        }
    }

    /// `bin/aops` was switched.
    pub fn begin_trial(&mut self) -> bool {
        self.enter(UpgradePhase::Trial, &[UpgradePhase::Switching], None).is_some()
    }

    /// Adds time in which the new manager was not ready, without pauses. It is added in parts, because the watchdog may exit at any time.
    pub fn spend(&mut self, seconds: u64) -> bool {
        self.count(|trial| trial.spent_seconds = trial.spent_seconds.saturating_add(seconds))
    }

    /// Accepts the new release. `reason`: why, if it has not passed its trial.
    pub fn commit(&mut self, reason: Option<TrialEndReason>) -> bool {
        self.enter(UpgradePhase::Committing, &[UpgradePhase::Trial, UpgradePhase::RollingBack], reason).is_some()
    }

    /// Gives the new release up. `skips`: it is skipped afterwards.
    pub fn roll_back(&mut self, reason: TrialEndReason, skips: bool) -> bool {
        match self.enter(UpgradePhase::RollingBack, &[UpgradePhase::Trial, UpgradePhase::Committing], Some(reason)) {
            Some(trial) => trial.condemned = skips,
            None => return false,
        }
        true
    }

    /// Applies the operator's decision. An earlier decision stays, and before the switch there is nothing to commit.
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

    /// The upgrade is complete, with the new release installed.
    pub fn finish(&mut self) -> bool {
        let Some(trial) = self.trial.take_if(|trial| trial.phase == UpgradePhase::Committing) else { return false };
        self.skipped.retain(|skipped| skipped.version != trial.to.version);
        self.interruptions = None;
        true
    }

    /// Records that a release is not to be tried again. The running release is never skipped.
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

    /// The skip of this release, if there is one.
    pub fn skipped(&self, version: &Version, sha256: &Digest) -> Option<&SkippedImage> {
        self.skipped.iter().find(|skipped| skipped.version == *version && skipped.sha256 == *sha256)
    }

    /// The skip that applies to an order of this release; without a digest, of any package of that version.
    pub fn skips(&self, version: &Version, sha256: Option<&Digest>) -> Option<&SkippedImage> {
        let is_it = |skipped: &&SkippedImage| sha256.is_none_or(|sha256| skipped.sha256 == *sha256);
        self.skipped.iter().filter(|skipped| skipped.version == *version).find(is_it)
    }

    /// Clears all skips (`control retry aops-spm`). Returns whether there were any.
    pub fn clear_skips(&mut self) -> bool {
        self.interruptions = None;
        !std::mem::take(&mut self.skipped).is_empty()
    }

    fn finish_and_skip(&mut self) -> bool {
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
            let reason = format!("the switch to the new release was interrupted {} times", interruptions.count);
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
