//! The checks of a release of the manager before it is installed: it is verified, runs on this host, and can read this home.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::keyring::KeyOffer;
use super::packaged::PackageRecord;
use super::records::ManagerRecord;
use super::upgrade::Programs;
use crate::config;
use crate::core::model::Digest;
use crate::core::upgrade::{Image, NewEndpoint};
use crate::home::Home;
use crate::package::{Keys, VerifiedTree};
use crate::store::UnknownJson;
use crate::{command, platform};

/// Timeout for the new executable to print its version.
const SELF_CHECK_TIMEOUT: Duration = Duration::from_secs(30);

/// Timeout for the new executable to read the settings and the state of a home.
const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(60);

/// A release of the manager that can be installed. Only [`check`] and [`of_package`] create one.
#[derive(Debug)]
pub struct CheckedRelease {
    /// The new executable, in the unpacked package.
    executable: PathBuf,
    /// Dropping it removes the unpacked package.
    _tree: Option<VerifiedTree>,
    /// Its record, to be saved when it is installed.
    pub manager: ManagerRecord,
    /// The keys that the package brings and revokes.
    pub offer: KeyOffer,
    /// The endpoint that the package brings.
    endpoint: Option<NewEndpoint>,
}

impl CheckedRelease {
    /// The new executable, in the unpacked package.
    pub fn executable(&self) -> PathBuf {
        self.executable.clone()
    }

    /// The release in the form of an upgrade's record.
    pub fn image(&self) -> Result<Image> {
        let path = self.executable();
        let digest = Programs::default().at(&path)?.with_context(|| format!("{} is missing", path.display()))?;
        let (brings, revokes) = self.offer.texts();
        Ok(Image { brings, revokes, endpoint: self.endpoint.clone(), ..image(&self.manager, digest) })
    }
}

/// The installed release in the form of an upgrade's record.
pub fn in_place(home: &Home) -> Result<Image> {
    let path = home.executable();
    let manager = ManagerRecord::load(home)?.with_context(|| {
        format!("cannot determine the installed release: {} is missing", home.manager_record().display())
    })?;
    let digest = Programs::default().at(&path)?.with_context(|| format!("{} is missing", path.display()))?;
    Ok(image(&manager, digest))
}

fn image(manager: &ManagerRecord, executable: Digest) -> Image {
    let ManagerRecord { version, sha256, epoch, file, .. } = manager.clone();
    let unknown = BTreeMap::new();
    Image { version, sha256, executable, epoch, file, brings: Vec::new(), revokes: Vec::new(), endpoint: None, unknown }
}

/// Runs an executable of the manager to check that it can read the settings and the state of a home.
pub fn preflight(home: &Home, executable: &Path) -> Result<()> {
    let mut command = Command::new(executable);
    command.args(["spm", "--home"]).arg(home.public_path()).arg("preflight").current_dir("/");
    command::run(&mut command, PREFLIGHT_TIMEOUT)
        .and_then(command::Finished::success)
        .context("the new executable cannot read this home's settings and state")
        .map(drop)
}

/// Checks that the executable of an unpacked package runs on this host. `file`: the package's file name.
pub fn check(tree: VerifiedTree, file: String) -> Result<CheckedRelease> {
    let executable = executable_in(tree.path());
    if !executable.is_file() {
        bail!(
            "cannot use the package {file}: it has no {}",
            executable.strip_prefix(tree.path()).unwrap_or(&executable).display()
        );
    }
    platform::set_mode(&executable, 0o755)
        .with_context(|| format!("cannot set the mode of {}", executable.display()))?;
    command::run(Command::new(&executable).arg("--version").current_dir("/"), SELF_CHECK_TIMEOUT)
        .and_then(command::Finished::success)
        .with_context(|| format!("the executable of {file} does not run on this host"))?;
    let manager = ManagerRecord {
        version: tree.binding().release.version.clone(),
        sha256: tree.sha256().clone(),
        epoch: tree.binding().epoch,
        file,
        unknown: UnknownJson::default(),
    };
    let offer = KeyOffer::read(tree.path(), &manager.version)?;
    let endpoint = config::new_endpoint::read(tree.path())?;
    Ok(CheckedRelease { executable, _tree: Some(tree), manager, offer, endpoint })
}

/// The release that a package of the host has installed, which the package manager has verified. `copy`: a path for a copy of its
/// executable, which can be moved like that of an unpacked package.
pub fn of_package(home: &Home, record: PackageRecord, copy: &Path) -> Result<CheckedRelease> {
    let from = home.executable();
    std::fs::copy(&from, copy).with_context(|| format!("cannot copy {} to {}", from.display(), copy.display()))?;
    let manager = record.release;
    let offer = KeyOffer::new(&manager.version, Keys::default(), Keys::default())?;
    Ok(CheckedRelease { executable: copy.to_owned(), _tree: None, manager, offer, endpoint: None })
}

fn executable_in(tree: &Path) -> PathBuf {
    Home::new(tree).executable()
}
