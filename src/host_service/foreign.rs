//! The units that somebody else wrote for the programs in a home: those of the system that aops replaces. They are stopped and set aside
//! when its installation is replaced, and put back when that fails. They may have the names of ours.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::platform::RegisteredService;

/// Such a unit, or a service of Windows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForeignUnit {
    /// Of systemd, with `.service`.
    pub(super) name: String,
    pub(super) is_active: bool,
    /// What is set aside with it: its file, its drop-ins, and the links that enable it. Nothing of a unit that stays.
    pub(super) paths: Vec<PathBuf>,
    /// How it is registered on Windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) registration: Option<RegisteredService>,
}

impl ForeignUnit {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn is_active(&self) -> bool {
        self.is_active
    }

    /// As recorded before, if it was found then: it may be set aside in part.
    pub fn or_recorded(self, before: &[ForeignUnit]) -> ForeignUnit {
        let Some(recorded) = before.iter().find(|unit| unit.name == self.name) else { return self };
        let registration = recorded.registration.clone().or(self.registration);
        ForeignUnit { is_active: self.is_active || recorded.is_active, registration, ..self }
    }
}
