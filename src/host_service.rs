//! The host's service manager: registers the two roles of a home, starts and stops them, and tells what it knows of them.
//!
//! It knows systemd, and the absence of any. Where there is none, the manager is started in a session of its own and keeps the rest.
//! Whether a home is registered is in its `state/install.json`; what is here acts on the service manager that it is told.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::home::Home;
use crate::role::Role;

pub mod product;
pub mod systemd;

pub use systemd::{UnitState, register, remove_drop_ins, restart, start, state, stop, unregister};

/// A service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Systemd,
    #[default]
    None,
}

/// What the service manager's view of a dead role's unit means for who would revive it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Somebody stopped the unit: it is to stay so.
    Stopped,
    /// The service manager is at it.
    Coming,
    /// The service manager has given up.
    Dead,
    /// Somebody masked or disabled the unit: nobody is to start it, and nothing was stopped.
    Forbidden,
    /// There is no such unit.
    Missing,
}

/// So often in a row the service manager may give no answer before it counts as none: it may be busy, or be renewed itself.
const UNANSWERED: u32 = 6;

/// Questions in a row that the service manager did not answer.
#[derive(Debug, Default)]
pub struct Unanswered(u32);

impl Unanswered {
    /// What follows from an answer, or from its absence: at first nothing, since the unit may be masked or stopped.
    pub fn judge(&mut self, answer: Result<Verdict>) -> Verdict {
        match answer {
            Ok(verdict) => {
                self.0 = 0;
                verdict
            }
            Err(error) => {
                self.0 = self.0.saturating_add(1);
                tracing::warn!(
                    error = format!("{error:#}"),
                    times = self.0,
                    "the service manager cannot be asked after a role"
                );
                if self.0 < UNANSWERED { Verdict::Coming } else { Verdict::Missing }
            }
        }
    }
}

/// Judges a dead role by its unit.
pub fn verdict(home: &Home, role: Role) -> Result<Verdict> {
    Ok(judge(&state(home, role)?))
}

fn judge(unit: &UnitState) -> Verdict {
    match unit.active_state.as_str() {
        "active" | "activating" | "reloading" | "deactivating" => Verdict::Coming,
        // Whatever is at work on it, what comes of that is seen at the next look.
        _ if unit.job.is_some() => Verdict::Coming,
        _ if unit.is_forbidden() => Verdict::Forbidden,
        _ if unit.load_state == "not-found" => Verdict::Missing,
        // Whatever its last run's result: a failure that nobody stopped is `failed`, or about to be restarted. A stop in the pause before an
        // automatic restart leaves the result of the run that failed.
        "inactive" => Verdict::Stopped,
        _ => Verdict::Dead,
    }
}

/// Whether the unit is being stopped only to be started again.
pub fn is_restarting(home: &Home, role: Role) -> Result<bool> {
    Ok(matches!(state(home, role)?.job.as_deref(), Some("restart" | "try-restart")))
}

/// The service manager that runs on this host.
pub fn detect() -> Kind {
    if systemd::runs() { Kind::Systemd } else { Kind::None }
}

/// The name of a role's unit: that of the program in the default home, with 8 hexadecimal digits of the home's path in any other.
pub fn unit_name(home: &Home, role: Role) -> String {
    named(home, role.program())
}

/// The name of the unit in whose cgroup the sub-agents live: neither role's end touches them there.
pub fn agents_unit(home: &Home) -> String {
    named(home, "aops-agents")
}

fn named(home: &Home, name: &str) -> String {
    if home.root() == product::default_home() {
        return name.to_owned();
    }
    let digest = Sha256::digest(home.root().as_os_str().as_encoded_bytes());
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{name}-{digits}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_unit_that_is_inactive_was_stopped() {
        let unit = |load: &str, active: &str, result: &str, file: &str, job: Option<&str>| {
            judge(&UnitState {
                load_state: load.into(),
                active_state: active.into(),
                result: result.into(),
                unit_file_state: file.into(),
                job: job.map(Into::into),
                ..UnitState::default()
            })
        };
        assert_eq!(unit("loaded", "inactive", "success", "enabled", None), Verdict::Stopped);
        assert_eq!(unit("loaded", "inactive", "signal", "enabled", None), Verdict::Stopped);
        assert_eq!(unit("loaded", "inactive", "success", "enabled", Some("start")), Verdict::Coming);
        assert_eq!(unit("loaded", "inactive", "success", "enabled", Some("ended")), Verdict::Coming);
        assert_eq!(unit("loaded", "activating", "signal", "enabled", None), Verdict::Coming);
        assert_eq!(unit("loaded", "failed", "signal", "enabled", None), Verdict::Dead);
        assert_eq!(unit("masked", "failed", "signal", "masked", None), Verdict::Forbidden);
        assert_eq!(unit("loaded", "inactive", "success", "disabled", None), Verdict::Forbidden);
        assert_eq!(unit("not-found", "inactive", "success", "", None), Verdict::Missing);
    }

    #[test]
    fn only_the_default_home_has_the_plain_unit_names() {
        let home = Home::new(product::default_home());
        assert_eq!(unit_name(&home, Role::Spm), "aops-spm");
        let other = Home::new("/srv/a home");
        let name = unit_name(&other, Role::Spa);
        assert!(name.starts_with("aops-spa-") && name.len() == "aops-spa-".len() + 8, "{name}");
        assert_ne!(name[9..], unit_name(&Home::new("/srv/b"), Role::Spa)[9..]);
        assert_eq!(name[9..], unit_name(&other, Role::Spm)[9..]);
    }
}
