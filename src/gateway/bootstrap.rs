//! The bootstrap executable: the manager's executable with the depot's public keys appended, served under the name that the old platform's
//! command line downloads.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::keyring::DepotKeys;
use super::{GatewayDirectory, archive};
use crate::core::model::{Arch, Os, Packing, Release};
use crate::package::trailer;
use crate::platform;

/// `aops-agent-service-<os>-<arch>[.exe]`.
pub(super) fn file_name(os: Os, arch: Arch) -> String {
    let suffix = if os == Os::Windows { ".exe" } else { "" };
    format!("aops-agent-service-{os}-{arch}{suffix}")
}

/// Whether `name` is the name of a bootstrap executable.
pub(super) fn is_file_name(name: &str) -> bool {
    Os::ALL.iter().any(|os| Arch::ALL.iter().any(|arch| file_name(*os, *arch) == name))
}

/// Creates the bootstrap from the manager's package, adds it to the depot, and returns its name.
pub(super) fn create(
    directory: &GatewayDirectory,
    keys: &DepotKeys,
    package: &mut File,
    packing: Packing,
    release: &Release,
) -> Result<String> {
    let name = file_name(release.os, release.arch);
    let mut attempt = || -> Result<()> {
        if keys.texts().is_empty() {
            bail!(
                "{} has no valid public key; add aops.pub, which `aops gateway init` created",
                directory.keys().display()
            );
        }
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(directory.depot())?;
        archive::extract(package, packing, archive::manager_path(release.os), file.as_file_mut())?;
        trailer::put(file.as_file_mut(), keys.texts())?;
        persist(file, &directory.depot().join(&name), 0o755)
    };
    attempt().with_context(|| format!("cannot create the bootstrap {name}"))?;
    Ok(name)
}

/// Renames a complete temporary file to `path`, and syncs it and its directory.
pub(super) fn persist(file: tempfile::NamedTempFile, path: &Path, mode: u32) -> Result<()> {
    platform::set_mode(file.path(), mode)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    if let Some(parent) = path.parent() {
        platform::sync_directory(parent)?;
    }
    Ok(())
}
