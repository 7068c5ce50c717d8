//! How an unpacked release is run: as its `agent.toml` says, or through its own `control` script.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::manifest::{KillMode, Manifest, Restart, StopSignal};
use super::supervise::{HealthPolicy, RestartPolicy};

/// `control` scripts stop themselves; whatever is left after this is ended by the manager.
const SCRIPT_GRACE: Duration = Duration::from_secs(10);
/// A new release has to run for so long before it is committed, unless its package says otherwise.
const PROBATION: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(120);
/// A `control` script's `status`, which says nothing of how often it wants to be asked. Its answers count from its start, which it ended
/// well.
const OF_SCRIPTS: HealthPolicy =
    HealthPolicy { interval: Duration::from_secs(30), failures: 3, start_period: Duration::ZERO };

/// Which convention a sub-agent follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PackageKind {
    /// Run by us, as its `agent.toml` says.
    Native,
    /// Driven through its own `control` script.
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

    /// When its supervisor restarts it, and how its health is judged.
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
            Program::Script => Some(OF_SCRIPTS),
            Program::Native(manifest) => manifest.health.as_ref().map(|health| HealthPolicy {
                interval: health.interval,
                failures: health.failures,
                start_period: health.start_period,
            }),
        }
    }

    /// A new release has to run for so long before it is committed: its start period at least.
    pub fn probation(&self) -> Duration {
        let said = match self {
            Program::Native(manifest) => manifest.run.probation.map(|span| span.0),
            Program::Script => None,
        };
        said.unwrap_or(PROBATION).max(self.checks().map_or(Duration::ZERO, |checks| checks.start_period))
    }

    /// For so long after its probation a release that is not well, and has not failed either, is waited for: until its health was asked
    /// after, and a little more.
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

    /// From the stop signal to the kill.
    pub fn grace(&self) -> Duration {
        match self {
            Program::Native(manifest) => manifest.run.grace(),
            Program::Script => SCRIPT_GRACE,
        }
    }

    /// The variables that the gateway may set although they are refused otherwise.
    pub fn env_allow(&self) -> &[String] {
        match self {
            Program::Native(manifest) => &manifest.run.env_allow,
            Program::Script => &[],
        }
    }
}
