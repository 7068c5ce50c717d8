//! A home whose executable, links and units belong to a package of the host's package manager (rpm, deb).
//!
//! ```text
//! of the package            package.json, bin/aops and the links to it, control, the units below /usr/lib
//! of the installation       everything else: settings, identity, keys, state, sub-agents, bin/aops.prev
//! ```
//!
//! The package manager owns the path `bin/aops`; its content is that of the last change, by the package or by a self-upgrade. The next
//! operation of the package manager replaces it, whatever its version.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::records::{self, ManagerRecord};
use super::upgrade::Programs;
use crate::core::model::Digest;
use crate::home::Home;
use crate::store;

/// `package.json`: written by the package.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PackageRecord {
    pub package_manager: PackageManager,
    /// The release that the package installed.
    pub release: ManagerRecord,
    /// The SHA-256 of its executable, which a self-upgrade replaces.
    pub executable: Digest,
}

/// The package manager of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PackageManager {
    Rpm,
    Deb,
}

impl PackageManager {
    /// The command that removes the package.
    pub fn removal(self) -> &'static str {
        match self {
            PackageManager::Rpm => "rpm -e aops",
            PackageManager::Deb => "apt-get purge aops",
        }
    }
}

impl PackageRecord {
    /// `None`: the home does not belong to a package.
    pub fn load(home: &Home) -> Result<Option<PackageRecord>> {
        store::load(&home.package_record())
    }

    /// Whether the executable is still that of the package.
    pub fn is_in_place(&self, home: &Home) -> Result<bool> {
        Ok(Programs::default().at(&home.executable())?.as_ref() == Some(&self.executable))
    }
}

/// Whether a package has installed its files here, and no installation has completed them: the host has no identity and no gateway yet.
pub fn is_unenrolled(home: &Home) -> bool {
    // An enrolment that was killed left its journal.
    let is_incomplete = home.install_journal().is_file() && !home.install_record().is_file();
    home.package_record().is_file() && (!records::exists(home) || is_incomplete)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_package_alone_are_no_installation() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        for path in [home.bin(), home.state()] {
            std::fs::create_dir_all(path).unwrap();
        }
        for path in [home.executable(), home.role_link("aops-spm")] {
            std::fs::write(path, "").unwrap();
        }
        assert!(records::exists(&home) && !is_unenrolled(&home));
        let text = r#"{"packageManager":"rpm","release":{"version":"1.0","sha256":"DIGEST","epoch":0,"file":"aops-spm-1.0_linux_amd64.tar.zst"},"executable":"EXECUTABLE"}"#;
        let digest = Programs::default().at(&home.executable()).unwrap().unwrap();
        let text = text.replace("DIGEST", &"0".repeat(64)).replace("EXECUTABLE", digest.as_str());
        std::fs::write(home.package_record(), text).unwrap();
        assert!(is_unenrolled(&home));
        let record = PackageRecord::load(&home).unwrap().unwrap();
        assert_eq!(record.package_manager, PackageManager::Rpm);
        assert!(record.is_in_place(&home).unwrap());
        std::fs::write(home.executable(), "of a self-upgrade").unwrap();
        assert!(!record.is_in_place(&home).unwrap());
        record.release.save(&home).unwrap();
        assert!(records::exists(&home) && !is_unenrolled(&home));
    }
}
