//! The records of an installation: the installed release of the manager, and the changes that `install` made outside the home, which
//! `uninstall` undoes.
//!
//! ```text
//! state/manager.json    written when a release of the manager is installed
//! state/install.json    written last: if it exists, the installation is complete
//! ```

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::core::model::{Digest, Version};
use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::store::{self, UnknownJson};

/// `state/manager.json`: the installed release of the manager, according to the signed comment of its package.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManagerRecord {
    pub version: Version,
    /// The digest of the package.
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

/// `state/install.json`: the registration of the home with the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstallRecord {
    /// The service manager that the roles are registered with.
    pub service: ServiceManagerKind,
    pub product: String,
    /// Directories that were created for the home, including the home itself, parents first.
    #[serde(default)]
    pub created_directories: Vec<PathBuf>,
    /// Links that were created outside the home.
    #[serde(default)]
    pub linked: Vec<PathBuf>,
    #[serde(flatten)]
    pub unknown: UnknownJson,
}

impl InstallRecord {
    /// A record with nothing but the service manager.
    pub fn new(service: ServiceManagerKind) -> InstallRecord {
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

/// Whether this home holds an installation of aops, even a broken one.
pub fn exists(home: &Home) -> bool {
    let has = |path: PathBuf| path.symlink_metadata().is_ok();
    // The files of a package alone are no installation.
    let is_packaged = has(home.package_record());
    has(home.install_record())
        || has(home.manager_record())
        || (!is_packaged && has(home.executable()) && has(home.role_link(Role::Spm.program())))
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
    fn unknown_fields_of_a_newer_version_are_preserved() {
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
