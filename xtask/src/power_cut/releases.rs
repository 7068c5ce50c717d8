//! The releases that are ordered in turn, three of the manager and three of one sub-agent: a host keeps two, so each is fetched again.
//!
//! The executables of the manager differ in their last bytes, which are the version. The sub-agent has many files, and a list of their
//! checksums.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::dist::{self, Target, sha256};
use crate::fleet::{Fleet, next_manager, quietly};
use crate::package::Package;
use crate::packages;

pub(super) const MANAGERS: [&str; 3] = ["0.1.0", "0.1.1", "0.1.2"];
pub(super) const RELEASES: [&str; 3] = ["7.1.0", "7.1.1", "7.1.2"];
/// The sub-agent that is upgraded, which `progress.sh` names too, and another one.
pub(super) const CHANGED: &str = "changed";
pub(super) const BYSTANDER: &str = "bystander";
/// Of the sub-agent that is upgraded.
const FILES: usize = 64;
const FILE_SIZE: usize = 32 << 10;

/// Publishes every release; returns the checksums of the managers' executables.
pub(super) fn publish(executable: &Path, fleet: &Fleet) -> Result<Vec<String>> {
    let publish = |package: &Package| quietly(fleet.gateway("publish").args(package.arguments()));
    publish(&Package::sleeper(BYSTANDER, "1"))?;
    RELEASES.iter().try_for_each(|version| publish(&sub_agent(version)))?;
    let one = |version| {
        let package = next_manager(executable, version)?;
        publish(&package)?;
        let published = std::fs::read(package.path().join("bin/aops")).context("cannot read a published executable")?;
        Ok(sha256(&published))
    };
    MANAGERS.into_iter().map(one).collect()
}

/// The Debian package of the manager's first release, built into a directory.
pub(super) fn deb(executable: &Path, directory: &Path) -> Result<PathBuf> {
    let first = next_manager(executable, MANAGERS[0])?;
    packages::build(Target::LinuxAmd64, dist::RELEASE, MANAGERS[0], &first.path().join("bin/aops"), directory)?;
    Ok(directory.join(packages::file_name(Target::LinuxAmd64, MANAGERS[0], false)))
}

/// A release with files that cannot be compressed, and their checksums.
pub(super) fn sub_agent(version: &str) -> Package {
    let mut package = Package::sleeper(CHANGED, version);
    let mut sums = String::new();
    let mut random = fastrand::Rng::with_seed(version.bytes().map(u64::from).sum());
    for number in 0..FILES {
        let name = format!("data/{number}");
        let content: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(FILE_SIZE).collect();
        sums += &format!("{}  {name}\n", sha256(&content));
        package = package.with_file(&name, content, 0o644);
    }
    package.with_file("SUMS", sums, 0o644)
}
