//! The ledger of sub-agents' releases (`state/releases.json`): which one is active, which one to go back to, which one is on probation,
//! which ones are not to be tried.
//!
//! ```text
//!            stage                begin_probation                 commit
//!  (fetched) ─────▶ staged ──────────────────────▶ on probation ─────────▶ active, and the one before it is the backup
//!                     │ activate (nothing was active)     │ roll_back (and skip)
//!                     └─────────────────────────▶ active ◀┘ (the one before stays active)
//!
//!  what was given up last is not taken for the active release by `resume` while its process ends
//!  active ⇄ backup: return_to_backup, for an operator; hold keeps it so until another release is ordered
//! ```
//!
//! It is loaded, changed by these verbs, which touch no disk, and written. What it says is durable before it is acted on, and it beats the
//! link `current`. A release is a version and the bytes of its package: a version that is republished with other bytes is a different release.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::guards::{Guard, holds};
use super::model::{AgentName, Digest, Version};
use super::order::is_zero;
use super::unknown::UnknownFields;

/// So many skipped releases of one sub-agent are remembered.
const MAX_SKIPPED: usize = 16;

/// One release of a sub-agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LedgerRelease {
    pub version: Version,
    /// Of its package; absent where its directory does not say it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// Of its signed comment.
    #[serde(default)]
    pub epoch: u64,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// A release that is not to be tried again yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SkippedRelease {
    pub version: Version,
    /// Of its package, where that is known: another package of the same version is not skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// Why, for an operator to read.
    pub reason: String,
    /// Times in a row that it failed.
    #[serde(default)]
    pub failures: u32,
    /// Not before then, in seconds since 1970; absent: not until another release is ordered, or another try is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// The `retry` of the order that it failed for: an order with a higher one tries it again.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry: u64,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The order that an operator at the host has overruled; it is not followed again. Another one is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverruledOrder {
    pub version: Version,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry: u64,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The releases of one sub-agent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LedgerEntry {
    /// The last one that was committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    active: Option<LedgerRelease>,
    /// The one that was active before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backup: Option<LedgerRelease>,
    /// It takes the place of the active one, and is not committed yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    probation: Option<LedgerRelease>,
    /// Times that the release on probation has failed.
    #[serde(default, skip_serializing_if = "is_zero")]
    probation_failures: u64,
    /// Verified and unpacked, not activated yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    staged: Option<LedgerRelease>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<SkippedRelease>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    overruled: Option<OverruledOrder>,
    /// The release that made way for the one before it last. Until it is down, its process is not the one that is to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    given_up: Option<Version>,
    #[serde(flatten)]
    unknown: UnknownFields,
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ledger {
    #[serde(default)]
    pub agents: BTreeMap<AgentName, LedgerEntry>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

impl LedgerEntry {
    /// As it follows from the disk alone, for a home without a ledger: the release that `current` names, and the one to go back to.
    pub fn found(active: Option<LedgerRelease>, backup: Option<LedgerRelease>) -> LedgerEntry {
        LedgerEntry { active, backup, ..LedgerEntry::default() }
    }

    /// The release that runs, or would.
    pub fn current(&self) -> Option<&LedgerRelease> {
        self.probation.as_ref().or(self.active.as_ref())
    }

    pub fn active(&self) -> Option<&LedgerRelease> {
        self.active.as_ref()
    }

    pub fn backup(&self) -> Option<&LedgerRelease> {
        self.backup.as_ref()
    }

    pub fn probation(&self) -> Option<&LedgerRelease> {
        self.probation.as_ref()
    }

    /// Times that the release on probation has failed.
    pub fn probation_failures(&self) -> u64 {
        self.probation_failures
    }

    /// The release that a roll back returns to.
    pub fn before_probation(&self) -> Option<&LedgerRelease> {
        self.active.as_ref().or(self.backup.as_ref())
    }

    /// The versions that must stay on disk, whatever is wanted.
    pub fn kept(&self) -> impl Iterator<Item = &Version> {
        let LedgerEntry { active, backup, probation, .. } = self;
        [active, backup, probation].into_iter().flatten().map(|release| &release.version)
    }

    /// It lies on disk, whole.
    pub fn stage(&mut self, release: LedgerRelease) {
        self.skipped.retain(|skipped| skipped.version != release.version);
        self.staged = Some(release);
    }

    /// It is the active one from now on, without a probation: there is nothing to go back to.
    pub fn activate(&mut self, release: LedgerRelease) {
        self.put_into_use(&release);
        (self.probation, self.probation_failures) = (None, 0);
        self.replace_active(release);
    }

    /// It takes the place of the active one, which stays to go back to. The active one itself needs no probation: whatever was on it is
    /// given up.
    pub fn begin_probation(&mut self, release: LedgerRelease) {
        if let Some(before) = self.probation.take()
            && !before.is(&release)
        {
            self.give_up(before.version);
        }
        self.put_into_use(&release);
        self.probation_failures = 0;
        match &self.active {
            Some(active) if active.is(&release) && holds(Guard::ActiveNeedsNoProbation) => self.probation = None,
            _ => self.probation = Some(release),
        }
    }

    /// The release on probation has failed once more. How often it has.
    pub fn fail_probation(&mut self) -> u64 {
        self.probation_failures = self.probation_failures.saturating_add(u64::from(self.probation.is_some()));
        self.probation_failures
    }

    /// The release on probation is accepted; the one before it is the backup. Whether there was one.
    pub fn commit(&mut self) -> bool {
        let Some(release) = self.probation.take() else { return false };
        self.probation_failures = 0;
        self.skipped.retain(|skipped| skipped.version != release.version);
        self.replace_active(release);
        true
    }

    /// The release on probation is given up for the active one; where that is lost, for the backup. Whether there was one.
    pub fn roll_back(&mut self) -> bool {
        self.probation_failures = 0;
        if self.active.is_none()
            && let Some(backup) = self.backup.take()
        {
            self.put_into_use(&backup);
            self.active = Some(backup);
        }
        self.probation.take().is_some()
    }

    /// The backup is the active release again, without a probation, and the active one the backup. Whether there was a backup.
    pub fn return_to_backup(&mut self) -> bool {
        let Some(backup) = self.backup.take() else { return false };
        self.roll_back();
        self.put_into_use(&backup);
        self.backup = self.active.replace(backup);
        true
    }

    /// This release makes way for the current one, and its process may still run.
    pub fn give_up(&mut self, version: Version) {
        self.given_up = Some(version);
    }

    /// Whether a process of this release is left over from when it made way.
    pub fn has_given_up(&self, version: &Version) -> bool {
        self.given_up.as_ref() == Some(version)
    }

    /// An operator has overruled this order.
    pub fn hold(&mut self, order: OverruledOrder) {
        self.overruled = Some(order);
    }

    /// Whether it is an operator who keeps the active release, against an order.
    pub fn is_held(&self) -> bool {
        self.overruled.is_some()
    }

    /// What an operator has overruled counts again. Whether there was something.
    pub fn release_hold(&mut self) -> bool {
        self.overruled.take().is_some()
    }

    /// Whether an operator has overruled this order.
    pub fn overrules(&self, version: &Version, sha256: Option<&Digest>, retry: u64) -> bool {
        self.overruled.as_ref().is_some_and(|order| {
            order.version == *version && !differ(order.sha256.as_ref(), sha256) && retry <= order.retry
        })
    }

    /// A release is not to be tried again yet. The release that is active is never skipped.
    pub fn skip(&mut self, skipped: SkippedRelease) {
        let runs = self.active.as_ref().is_some_and(|active| {
            active.version == skipped.version && !differ(skipped.sha256.as_ref(), active.sha256.as_ref())
        });
        if runs {
            return;
        }
        self.skipped.retain(|other| other.version != skipped.version);
        self.skipped.push(skipped);
        let surplus = self.skipped.len().saturating_sub(MAX_SKIPPED);
        self.skipped.drain(..surplus);
    }

    /// Whether and how a release of this version is skipped; of another package it is not.
    pub fn skipped(&self, version: &Version, sha256: Option<&Digest>) -> Option<&SkippedRelease> {
        self.skipped.iter().find(|skipped| skipped.version == *version && !differ(skipped.sha256.as_ref(), sha256))
    }

    /// Every release may be tried again. Whether one could not.
    pub fn allow_all(&mut self) -> bool {
        !std::mem::take(&mut self.skipped).is_empty()
    }

    /// Takes in the order in force: version, package and `retry`; `None`: there is none. A skip for good, and a hold, last as long as the
    /// order names the same release with no higher `retry`; skips for a while end. Whether anything changed.
    pub fn ordered(&mut self, order: Option<(&Version, Option<&Digest>, u64)>) -> bool {
        let timed = self.skipped.len();
        self.skipped.retain(|skipped| skipped.until.is_none());
        let ended = timed != self.skipped.len();
        self.keep_ordered(order) || ended
    }

    /// As [`LedgerEntry::ordered`], of the order that a new manager finds: skips for a while last on.
    pub fn resume_order(&mut self, order: (&Version, Option<&Digest>, u64)) -> bool {
        holds(Guard::ResumeOrder) && self.keep_ordered(Some(order))
    }

    fn keep_ordered(&mut self, order: Option<(&Version, Option<&Digest>, u64)>) -> bool {
        let before = (self.skipped.len(), self.overruled.is_some());
        self.skipped.retain(|skipped| {
            skipped.until.is_some()
                || !holds(Guard::OrderEndsSkips)
                || order.is_some_and(|(version, sha256, retry)| {
                    skipped.version == *version && !differ(skipped.sha256.as_ref(), sha256) && retry <= skipped.retry
                })
        });
        let is_overruled = order.is_some_and(|(version, sha256, retry)| self.overrules(version, sha256, retry));
        self.overruled.take_if(|_| !is_overruled);
        before != (self.skipped.len(), self.overruled.is_some())
    }

    /// The release of this version, or of any, that is not to be tried again until another is ordered.
    pub fn skipped_for_good(&self) -> impl Iterator<Item = &SkippedRelease> {
        self.skipped.iter().filter(|skipped| skipped.until.is_none())
    }

    /// All of them, for a search through the states.
    #[cfg(test)]
    pub fn skips(&self) -> &[SkippedRelease] {
        &self.skipped
    }

    /// Verified and unpacked, not activated yet.
    #[cfg(test)]
    pub fn staged(&self) -> Option<&LedgerRelease> {
        self.staged.as_ref()
    }

    /// Drops what is not whole on disk; `is_whole` says which releases are. A probation that is lost so is rolled back, and a lost active
    /// one gives way to the backup.
    pub fn keep_whole(&mut self, is_whole: impl Fn(&Version) -> bool) {
        let had_active = self.active.is_some();
        for place in [&mut self.probation, &mut self.active, &mut self.backup, &mut self.staged] {
            place.take_if(|release| !is_whole(&release.version));
        }
        if had_active && self.active.is_none() && self.probation.is_none() {
            self.active = self.backup.take();
        }
        if self.probation.is_none() {
            self.probation_failures = 0;
        }
        if let Some(active) = &self.active {
            let version = active.version.clone();
            self.skipped.retain(|skipped| skipped.version != version);
        }
    }

    /// Goes on after a restart of the manager. `running`: the release whose process still runs.
    ///
    /// Where that is the active one, the one on probation was not started yet and is given up until it is ordered again. Where it is
    /// neither, an older manager, which keeps no ledger, has activated it meanwhile; but not one that was given up, which was not down yet.
    pub fn resume(&mut self, running: &LedgerRelease) {
        let is =
            |place: &Option<LedgerRelease>| place.as_ref().is_some_and(|release| release.version == running.version);
        if is(&self.probation) {
            return;
        }
        if holds(Guard::ResumeRollsBack) {
            self.roll_back();
        }
        let makes_way = self.has_given_up(&running.version) && holds(Guard::ResumeReturns);
        if !is(&self.active) && !makes_way {
            self.activate(running.clone());
        }
    }

    /// The previous release becomes the backup. The backup always differs from the active release.
    fn replace_active(&mut self, release: LedgerRelease) {
        self.backup.take_if(|backup| backup.is(&release));
        if let Some(before) = self.active.replace(release.clone())
            && !before.is(&release)
            && holds(Guard::KeepBackup)
        {
            self.backup = Some(before);
        }
    }

    /// It is put into use: it is neither waiting nor skipped nor given up.
    fn put_into_use(&mut self, release: &LedgerRelease) {
        self.given_up.take_if(|version| *version == release.version);
        self.skipped.retain(|skipped| skipped.version != release.version);
        self.staged.take_if(|staged| staged.version == release.version);
    }
}

/// Whether both are known and not the same.
fn differ(one: Option<&Digest>, other: Option<&Digest>) -> bool {
    matches!((one, other), (Some(one), Some(other)) if one != other)
}

impl LedgerRelease {
    /// Whether this version, of this package where one is named, is it.
    pub fn is_asked(&self, version: &Version, sha256: Option<&Digest>) -> bool {
        self.version == *version && !differ(self.sha256.as_ref(), sha256)
    }

    /// Whether both are the same release.
    pub fn is(&self, other: &LedgerRelease) -> bool {
        self.is_asked(&other.version, other.sha256.as_ref())
    }
}

#[cfg(test)]
mod tests;
