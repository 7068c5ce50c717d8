//! How an unpacked release is run: as its `agent.toml` specifies, or by its own `control` script.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::manifest::{KillMode, Manifest, Restart, StopSignal};
use super::supervise::{HealthPolicy, RestartPolicy};

/// Time for a `control` script to stop its sub-agent; the manager kills the processes that are left.
const SCRIPT_GRACE: Duration = Duration::from_secs(10);
/// Default of `probation`.
const PROBATION: Duration = Duration::from_secs(10);
/// Minimum of [`Program::patience`].
const PATIENCE: Duration = Duration::from_secs(120);
/// How `status` of a `control` script is checked. There is no start period, because its `start` has succeeded when the checks begin.
const SCRIPT_CHECKS: HealthPolicy =
    HealthPolicy { interval: Duration::from_secs(30), failures: 3, start_period: Duration::ZERO };

/// The convention that a package follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PackageKind {
    /// Started by the manager, as its `agent.toml` specifies.
    Native,
    /// Started and stopped by its own `control` script.
    Script,
}

/// How an unpacked release is run.
#[derive(Debug, Clone, PartialEq)]
pub enum Program {
    Native(Box<Manifest>),
    Script,
}

impl Program {
    pub fn kind(&self) -> PackageKind {
        match self {
            Program::Native(_) => PackageKind::Native,
            Program::Script => PackageKind::Script,
        }
    }

    /// When its supervisor restarts it, and how its health is checked.
    pub fn policy(&self) -> RestartPolicy {
        RestartPolicy { restart: self.restart(), checks: self.checks(), ..RestartPolicy::default() }
    }

    fn restart(&self) -> Restart {
        match self {
            Program::Native(manifest) => manifest.run.restart,
            Program::Script => Restart::Always,
        }
    }

    fn checks(&self) -> Option<HealthPolicy> {
        match self {
            Program::Script => Some(SCRIPT_CHECKS),
            Program::Native(manifest) => manifest.health.as_ref().map(|health| HealthPolicy {
                interval: health.interval,
                failures: health.failures,
                start_period: health.start_period,
            }),
        }
    }

    /// Time that a new release must run before it is committed; at least its start period.
    pub fn probation(&self) -> Duration {
        let set = match self {
            Program::Native(manifest) => manifest.run.probation.map(|span| span.0),
            Program::Script => None,
        };
        set.unwrap_or(PROBATION).max(self.checks().map_or(Duration::ZERO, |checks| checks.start_period))
    }

    /// Time after the probation to wait for a release that is neither healthy nor failed; at least two health checks.
    pub fn patience(&self) -> Duration {
        self.checks().map_or(Duration::ZERO, |checks| checks.interval * 2).max(PATIENCE)
    }

    pub fn kill_mode(&self) -> KillMode {
        match self {
            Program::Native(manifest) => manifest.run.kill_mode,
            Program::Script => KillMode::Tree,
        }
    }

    pub fn stop_signal(&self) -> StopSignal {
        match self {
            Program::Native(manifest) => manifest.run.stop_signal,
            Program::Script => StopSignal::Term,
        }
    }

    /// Time from the stop signal to the kill.
    pub fn grace(&self) -> Duration {
        match self {
            Program::Native(manifest) => manifest.run.grace(),
            Program::Script => SCRIPT_GRACE,
        }
    }

    /// Environment variables that the gateway may set although they are refused by default.
    pub fn env_allow(&self) -> &[String] {
        match self {
            Program::Native(manifest) => &manifest.run.env_allow,
            Program::Script => &[],
        }
    }
}
