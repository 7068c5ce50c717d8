//! The part of `status` about an upgrade that is under way.

use serde::{Deserialize, Serialize};

use super::evidence::{Decider, Evidence, TrialLimits};
use super::record::{UpgradePhase, UpgradeRecord};
use super::{UpgradeStep, Wait, next};
use crate::core::model::Version;

/// An upgrade as operators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeView {
    pub from: Version,
    pub to: Version,
    pub phase: UpgradeViewPhase,
    /// Until the next decision, if it depends on time alone.
    pub seconds_left: Option<u64>,
    /// Deaths of the new manager left before the roll back.
    pub tries_left: u32,
    /// Why it is rolled back, or committed early.
    pub reason: Option<String>,
}

/// The phase of an upgrade as operators see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UpgradeViewPhase {
    Switching,
    Trial,
    /// On trial, and neither program can send a heartbeat: the gateway is unreachable.
    Unproven,
    /// On trial, and the home is stopped.
    Paused,
    Committing,
    RollingBack,
}

impl UpgradeViewPhase {
    /// The value in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            UpgradeViewPhase::Switching => "switching",
            UpgradeViewPhase::Trial => "trial",
            UpgradeViewPhase::Unproven => "unproven",
            UpgradeViewPhase::Paused => "paused",
            UpgradeViewPhase::Committing => "committing",
            UpgradeViewPhase::RollingBack => "rollingBack",
        }
    }
}

/// `None`: no upgrade is under way. Either role may call this; the result is as the watchdog would decide.
pub fn status(record: &UpgradeRecord, evidence: &Evidence, limits: &TrialLimits) -> Option<UpgradeView> {
    let trial = record.trial()?;
    let watchdog_evidence =
        Evidence { decider: Decider::Watchdog, recorded: true, watchdog: Some(super::WhichRelease::From), ..*evidence };
    let wait = match next(record, &watchdog_evidence, limits) {
        UpgradeStep::Wait(wait) => Some(wait),
        _ => None,
    };
    let phase = match (trial.phase, wait) {
        (UpgradePhase::Trial, Some(Wait::Unproven { .. })) => UpgradeViewPhase::Unproven,
        (UpgradePhase::Trial, Some(Wait::Start)) => UpgradeViewPhase::Paused,
        (UpgradePhase::Trial, _) => UpgradeViewPhase::Trial,
        (UpgradePhase::Switching, _) => UpgradeViewPhase::Switching,
        (UpgradePhase::Committing, _) => UpgradeViewPhase::Committing,
        (UpgradePhase::RollingBack, _) => UpgradeViewPhase::RollingBack,
    };
    Some(UpgradeView {
        from: trial.from.version.clone(),
        to: trial.to.version.clone(),
        phase,
        seconds_left: wait.and_then(Wait::left).map(|left| left.as_secs()),
        tries_left: limits.deaths.saturating_sub(trial.deaths),
        reason: trial.reason.clone(),
    })
}
