//! The supported service managers, the states of their units, and the notifications to them.
//!
//! The behaviour of each kind is in `host_service`, one file each; other code compares with [`ServiceManagerKind::None`] at most.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::model::InvalidValue;

/// A kind of service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceManagerKind {
    Systemd,
    /// The service control manager of Windows.
    Scm,
    /// No service manager: the roles start each other.
    #[default]
    None,
}

impl ServiceManagerKind {
    pub const ALL: &'static [ServiceManagerKind] =
        &[ServiceManagerKind::Systemd, ServiceManagerKind::Scm, ServiceManagerKind::None];

    /// Whether the home has a service manager.
    pub fn is_some(self) -> bool {
        self != ServiceManagerKind::None
    }
}

impl fmt::Display for ServiceManagerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ServiceManagerKind::Systemd => "systemd",
            ServiceManagerKind::Scm => "scm",
            ServiceManagerKind::None => "none",
        })
    }
}

/// All kinds, for an error message.
const KINDS: &str = "systemd, scm or none";

impl FromStr for ServiceManagerKind {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<ServiceManagerKind, InvalidValue> {
        let named = ServiceManagerKind::ALL.iter().copied().find(|kind| kind.to_string() == text);
        named.ok_or_else(|| InvalidValue::new("a service manager", KINDS, text))
    }
}

/// The state of a role's unit, as far as it matters for restarting that role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitCondition {
    /// It was stopped on purpose and stays stopped.
    Stopped,
    /// It runs, or the service manager is starting or stopping it.
    Active,
    /// The service manager has given up on it.
    Dead,
    /// It is masked or disabled: it must not be started, but the home was not stopped.
    Forbidden,
    /// The unit does not exist.
    Missing,
}

/// A notification of a role to the service manager that started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notification {
    /// The role is ready.
    Ready,
    /// The role is stopping on purpose.
    Stopping,
    /// The role is alive: the keep-alive for the watchdog of the service manager.
    Alive,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_one_spelling_on_the_command_line_and_in_records() {
        for kind in ServiceManagerKind::ALL {
            assert_eq!(kind.to_string().parse::<ServiceManagerKind>().unwrap(), *kind);
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.to_string());
        }
        assert!(
            "Systemd".parse::<ServiceManagerKind>().unwrap_err().to_string().contains("expected systemd, scm or none")
        );
    }
}
