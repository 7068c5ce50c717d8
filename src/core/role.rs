//! The two resident roles of a home, by name.

use serde::{Deserialize, Serialize};

/// A resident role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// The manager.
    Spm,
    /// The watchdog.
    Spa,
}

impl Role {
    pub const BOTH: &'static [Role] = &[Role::Spm, Role::Spa];

    pub fn name(self) -> &'static str {
        match self {
            Role::Spm => "spm",
            Role::Spa => "spa",
        }
    }

    /// The name in `bin` by which the executable takes this role; also its unit's.
    pub fn program(self) -> &'static str {
        match self {
            Role::Spm => "aops-spm",
            Role::Spa => "aops-spa",
        }
    }
}
