//! The records of an installation: which release of the manager is in place, and what `install` did on the host outside the home, so
//! that `uninstall` can take exactly that back.
//!
//! ```text
//! state/manager.json    written when a release of the manager is in place
//! state/install.json    written last: where it stands, the installation is whole
//! ```

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::core::model::{Digest, Version};
use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::store::{self, UnknownJson};

/// `state/manager.json`: the release of the manager that is in place, as its signed comment said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManagerRecord {
    pub version: Version,
    /// Of the package.
    pub sha256: Digest,
    pub epoch: u64,
    /// The package's file name.
    pub file: String,
    #[serde(flatten)]
    pub unknown: UnknownJson,
}

impl ManagerRecord {
    pub fn load(home: &Home) -> Result<Option<ManagerRecord>> {
        store::load(&home.manager_record())
    }

    pub fn save(&self, home: &Home) -> Result<()> {
        store::save(&home.manager_record(), self)
    }
}

/// `state/install.json`: how the home is tied into the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstallRecord {
    /// The service manager that the roles are registered with.
    pub service: ServiceManagerKind,
    pub product: String,
    /// Directories that were made for the home, the home itself among them, parents first.
    #[serde(default)]
    pub created_directories: Vec<PathBuf>,
    /// Links that were made outside the home.
    #[serde(default)]
    pub linked: Vec<PathBuf>,
    #[serde(flatten)]
    pub unknown: UnknownJson,
}

impl InstallRecord {
    /// Nothing is known but who starts the roles.
    pub fn by(service: ServiceManagerKind) -> InstallRecord {
        let unknown = UnknownJson::default();
        InstallRecord { service, product: String::new(), created_directories: Vec::new(), linked: Vec::new(), unknown }
    }

    pub fn load(home: &Home) -> Result<Option<InstallRecord>> {
        store::load(&home.install_record())
    }

    pub fn save(&self, home: &Home) -> Result<()> {
        store::save(&home.install_record(), self)
    }
}

/// Whether an installation of aops stands in this home, however broken.
pub fn exists(home: &Home) -> bool {
    let has = |path: PathBuf| path.symlink_metadata().is_ok();
    has(home.install_record())
        || has(home.manager_record())
        || (has(home.executable()) && has(home.role_link(Role::Spm.program())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir_all(home.state()).unwrap();
        (directory, home)
    }

    #[test]
    fn fields_of_a_newer_version_are_written_back() {
        let (_directory, home) = home();
        let text = r#"{"service":"none","product":"generic","later":[1]}"#;
        std::fs::write(home.install_record(), text).unwrap();
        let installed = InstallRecord::load(&home).unwrap().unwrap();
        assert_eq!(installed.service, ServiceManagerKind::None);
        installed.save(&home).unwrap();
        assert!(std::fs::read_to_string(home.install_record()).unwrap().contains("later"));
        assert!(exists(&home));
    }
}
