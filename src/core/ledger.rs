//! The ledger of sub-agents' releases (`state/releases.json`): the active release, the backup, the release on probation, the skipped ones.
//!
//! ```text
//!            stage                begin_probation                 commit
//!  (fetched) ─────▶ staged ──────────────────────▶ on probation ─────────▶ active; the previous release is the backup
//!                     │ activate (nothing was active)     │ roll_back (and skip)
//!                     └─────────────────────────▶ active ◀┘ (the previous release stays active)
//!
//!  active ⇄ backup: return_to_backup, for an operator; hold keeps it so until another release is ordered
//! ```
//!
//! It is loaded, changed by these verbs, which do not access the disk, and written. It is durable before its content takes effect, and it
//! takes precedence over the link `current`. A release is a version and the content of its package: a version that is published again with
//! other content is a different release.
//!
//! [`LedgerEntry::resume`] never makes the release that was given up last the active one, even if its process still runs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::guards::{Guard, holds};
use super::model::{AgentName, Digest, Version};
use super::order::is_zero;
use super::unknown::UnknownFields;

/// The number of skipped releases that are kept for one sub-agent.
const MAX_SKIPPED: usize = 16;

/// One release of a sub-agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LedgerRelease {
    pub version: Version,
    /// Of its package; absent if its directory no longer records it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// The epoch in the signed comment of its package.
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
    /// Of its package, where known: another package of the same version is not skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// Why, for an operator.
    pub reason: String,
    /// Failures in a row.
    #[serde(default)]
    pub failures: u32,
    /// Not tried earlier than this, in seconds since 1970. Absent: until another release, or another try, is ordered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// The `retry` of the order that it failed for. An order with a higher one tries it again.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry: u64,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The order that an operator on the host has overruled. It is not followed until it changes.
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
    /// The release that was committed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    active: Option<LedgerRelease>,
    /// The previous active release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backup: Option<LedgerRelease>,
    /// It replaces the active release and is not committed yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    probation: Option<LedgerRelease>,
    /// Failures of the release on probation.
    #[serde(default, skip_serializing_if = "is_zero")]
    probation_failures: u64,
    /// Verified and unpacked, not activated yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    staged: Option<LedgerRelease>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<SkippedRelease>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    overruled: Option<OverruledOrder>,
    /// The release that was rolled back last. Its process may still be stopping, and is not adopted as the current release.
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
    /// The entry of a home without a ledger, from the disk alone: the release that `current` names and the backup.
    pub fn from_disk(active: Option<LedgerRelease>, backup: Option<LedgerRelease>) -> LedgerEntry {
        LedgerEntry { active, backup, ..LedgerEntry::default() }
    }

    /// The release that runs or would run.
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

    /// Failures of the release on probation.
    pub fn probation_failures(&self) -> u64 {
        self.probation_failures
    }

    /// The release that a roll back restores.
    pub fn before_probation(&self) -> Option<&LedgerRelease> {
        self.active.as_ref().or(self.backup.as_ref())
    }

    /// The versions that must stay on disk, whatever the desired state.
    pub fn kept(&self) -> impl Iterator<Item = &Version> {
        let LedgerEntry { active, backup, probation, .. } = self;
        [active, backup, probation].into_iter().flatten().map(|release| &release.version)
    }

    /// The release is complete on disk.
    pub fn stage(&mut self, release: LedgerRelease) {
        self.skipped.retain(|skipped| skipped.version != release.version);
        self.staged = Some(release);
    }

    /// Makes the release active without a probation: there is no previous release.
    pub fn activate(&mut self, release: LedgerRelease) {
        self.put_into_use(&release);
        (self.probation, self.probation_failures) = (None, 0);
        self.replace_active(release);
    }

    /// The release replaces the active one, which is kept for a roll back. The active release itself needs no probation: it ends the probation of
    /// another.
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

    /// Counts a failure of the release on probation. Returns its failures.
    pub fn fail_probation(&mut self) -> u64 {
        self.probation_failures = self.probation_failures.saturating_add(u64::from(self.probation.is_some()));
        self.probation_failures
    }

    /// Accepts the release on probation; the previous one becomes the backup. Returns whether there was one.
    pub fn commit(&mut self) -> bool {
        let Some(release) = self.probation.take() else { return false };
        self.probation_failures = 0;
        self.skipped.retain(|skipped| skipped.version != release.version);
        self.replace_active(release);
        true
    }

    /// Rolls the release on probation back to the active one or, if that is lost, to the backup. Returns whether there was one.
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

    /// Swaps the backup and the active release, without a probation. Returns whether there was a backup.
    pub fn return_to_backup(&mut self) -> bool {
        let Some(backup) = self.backup.take() else { return false };
        self.roll_back();
        self.put_into_use(&backup);
        self.backup = self.active.replace(backup);
        true
    }

    /// The current release replaces this one, whose process may still run.
    pub fn give_up(&mut self, version: Version) {
        self.given_up = Some(version);
    }

    /// Whether a process of this release is left over from a roll back.
    pub fn has_given_up(&self, version: &Version) -> bool {
        self.given_up.as_ref() == Some(version)
    }

    /// An operator has overruled this order.
    pub fn hold(&mut self, order: OverruledOrder) {
        self.overruled = Some(order);
    }

    /// Whether an operator overruled an order, so that the active release is kept.
    pub fn is_held(&self) -> bool {
        self.overruled.is_some()
    }

    /// Withdraws the operator's hold. Returns whether there was one.
    pub fn release_hold(&mut self) -> bool {
        self.overruled.take().is_some()
    }

    /// Whether an operator has overruled this order.
    pub fn overrules(&self, version: &Version, sha256: Option<&Digest>, retry: u64) -> bool {
        self.overruled.as_ref().is_some_and(|order| {
            order.version == *version && !differ(order.sha256.as_ref(), sha256) && retry <= order.retry
        })
    }

    /// Records that a release is not to be tried again yet. The active release is never skipped.
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

    /// The skip of this release, if there is one. Another package of the same version is not skipped.
    pub fn skipped(&self, version: &Version, sha256: Option<&Digest>) -> Option<&SkippedRelease> {
        self.skipped.iter().find(|skipped| skipped.version == *version && !differ(skipped.sha256.as_ref(), sha256))
    }

    /// Clears all skips. Returns whether there were any.
    pub fn clear_skips(&mut self) -> bool {
        !std::mem::take(&mut self.skipped).is_empty()
    }

    /// Applies the current order: version, package and `retry`; `None`: there is none. Permanent skips and a hold last while the order names the
    /// same release with no higher `retry`; timed skips end. Returns whether anything changed.
    pub fn order_changed(&mut self, order: Option<(&Version, Option<&Digest>, u64)>) -> bool {
        let timed = self.skipped.len();
        self.skipped.retain(|skipped| skipped.until.is_none());
        let ended = timed != self.skipped.len();
        self.drop_outdated(order) || ended
    }

    /// As [`LedgerEntry::order_changed`], for the order that a restarted manager finds: timed skips stay.
    pub fn resume_order(&mut self, order: (&Version, Option<&Digest>, u64)) -> bool {
        holds(Guard::ResumeOrder) && self.drop_outdated(Some(order))
    }

    fn drop_outdated(&mut self, order: Option<(&Version, Option<&Digest>, u64)>) -> bool {
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

    /// The permanently skipped releases: they are not tried again until another release is ordered.
    pub fn permanently_skipped(&self) -> impl Iterator<Item = &SkippedRelease> {
        self.skipped.iter().filter(|skipped| skipped.until.is_none())
    }

    /// All skips, for a search through the states.
    #[cfg(test)]
    pub fn skips(&self) -> &[SkippedRelease] {
        &self.skipped
    }

    /// Verified and unpacked, not activated yet.
    #[cfg(test)]
    pub fn staged(&self) -> Option<&LedgerRelease> {
        self.staged.as_ref()
    }

    /// Drops releases that are not complete on disk, as `is_whole` reports. A lost probation is rolled back, and a lost active release is
    /// replaced by the backup.
    pub fn drop_incomplete(&mut self, is_whole: impl Fn(&Version) -> bool) {
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

    /// Resumes after a restart of the manager. `running`: the release whose process still runs.
    ///
    /// If that is the active one, the release on probation was not started yet and is dropped until it is ordered again. If it is neither, an
    /// older manager without a ledger has activated it, unless it was given up and its process is still stopping.
    pub fn resume(&mut self, running: &LedgerRelease) {
        let is =
            |place: &Option<LedgerRelease>| place.as_ref().is_some_and(|release| release.version == running.version);
        if is(&self.probation) {
            return;
        }
        if holds(Guard::ResumeRollsBack) {
            self.roll_back();
        }
        let was_given_up = self.has_given_up(&running.version) && holds(Guard::ResumeRollback);
        if !is(&self.active) && !was_given_up {
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

    /// Clears the release from the staged, skipped and given-up ones.
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
    /// Whether this is the given version and, where a package is given, that package.
    pub fn matches(&self, version: &Version, sha256: Option<&Digest>) -> bool {
        self.version == *version && !differ(self.sha256.as_ref(), sha256)
    }

    /// Whether both are the same release.
    pub fn is(&self, other: &LedgerRelease) -> bool {
        self.matches(&other.version, other.sha256.as_ref())
    }
}

#[cfg(test)]
mod tests;
