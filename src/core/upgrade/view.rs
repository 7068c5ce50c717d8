//! What `status` shows of an upgrade that is under way.

use serde::{Deserialize, Serialize};

use super::evidence::{Asker, Evidence, Limits};
use super::record::{Phase, Record};
use super::{Step, Wait, next};
use crate::core::model::Version;

/// An upgrade as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    pub from: Version,
    pub to: Version,
    pub phase: ViewPhase,
    /// Until the next decision, where time alone brings it.
    pub seconds_left: Option<u64>,
    /// How often the new manager may still die.
    pub tries_left: u32,
    /// Why it is rolled back or committed early.
    pub reason: Option<String>,
}

/// The phase of an upgrade as an operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ViewPhase {
    Switching,
    Trial,
    /// On trial, and neither program can send a heartbeat: the gateway is unreachable.
    Unproven,
    /// On trial, and the home is stopped.
    Paused,
    Committing,
    RollingBack,
}

impl ViewPhase {
    /// The word in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            ViewPhase::Switching => "switching",
            ViewPhase::Trial => "trial",
            ViewPhase::Unproven => "unproven",
            ViewPhase::Paused => "paused",
            ViewPhase::Committing => "committing",
            ViewPhase::RollingBack => "rollingBack",
        }
    }
}

/// `None`: no upgrade is under way. Either role may ask; it sees what the judge would.
pub fn status(record: &Record, evidence: &Evidence, limits: &Limits) -> Option<View> {
    let trial = record.trial()?;
    let judged = Evidence { asker: Asker::Watchdog, recorded: true, watchdog: Some(super::Which::From), ..*evidence };
    let wait = match next(record, &judged, limits) {
        Step::Wait(wait) => Some(wait),
        _ => None,
    };
    let phase = match (trial.phase, wait) {
        (Phase::Trial, Some(Wait::Unproven { .. })) => ViewPhase::Unproven,
        (Phase::Trial, Some(Wait::Start)) => ViewPhase::Paused,
        (Phase::Trial, _) => ViewPhase::Trial,
        (Phase::Switching, _) => ViewPhase::Switching,
        (Phase::Committing, _) => ViewPhase::Committing,
        (Phase::RollingBack, _) => ViewPhase::RollingBack,
    };
    Some(View {
        from: trial.from.version.clone(),
        to: trial.to.version.clone(),
        phase,
        seconds_left: wait.and_then(Wait::left).map(|left| left.as_secs()),
        tries_left: limits.deaths.saturating_sub(trial.deaths),
        reason: trial.reason.clone(),
    })
}
