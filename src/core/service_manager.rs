//! The kinds of service manager that can run the roles of a home, and the words in which each of them answers.
//!
//! What a kind does is in `host_service`, one file for each; everything else compares with [`ServiceManagerKind::None`] at most.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::model::InvalidValue;

/// A service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceManagerKind {
    Systemd,
    /// No service manager: the roles start each other.
    #[default]
    None,
}

impl ServiceManagerKind {
    pub const ALL: &'static [ServiceManagerKind] = &[ServiceManagerKind::Systemd, ServiceManagerKind::None];

    /// Whether there is a service manager.
    pub fn is_some(self) -> bool {
        self != ServiceManagerKind::None
    }
}

impl fmt::Display for ServiceManagerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ServiceManagerKind::Systemd => "systemd",
            ServiceManagerKind::None => "none",
        })
    }
}

/// Every kind, as an error lists them.
const KINDS: &str = "systemd or none";

impl FromStr for ServiceManagerKind {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<ServiceManagerKind, InvalidValue> {
        let named = ServiceManagerKind::ALL.iter().copied().find(|kind| kind.to_string() == text);
        named.ok_or_else(|| InvalidValue::new("a service manager", KINDS, text))
    }
}

/// What the service manager knows of a role's unit, as far as it matters to whoever would start a role that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitStanding {
    /// It was stopped on purpose and is to stay stopped.
    Stopped,
    /// It runs, or the service manager is starting or stopping it.
    Coming,
    /// The service manager has given up on it.
    Dead,
    /// It is masked or disabled: nobody is to start it, and nothing was stopped.
    Forbidden,
    /// There is no such unit.
    Missing,
}

/// What a role tells the service manager that started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notification {
    /// It is up.
    Ready,
    /// It ends, and means to.
    Stopping,
    /// It is alive: the sign of life that a watchdog of the service manager waits for.
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
        assert!("Systemd".parse::<ServiceManagerKind>().unwrap_err().to_string().contains("expected systemd or none"));
    }
}
