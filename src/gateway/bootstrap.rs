//! The bootstrap executable: the manager's own, with the depot's public keys appended, served under the name that the old command line asks for.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{Place, archive};
use crate::core::model::{Arch, Os, Packing, Release};
use crate::package::{Keys, trailer};
use crate::platform;

/// A public key's file has two short lines.
const MAX_KEY_BYTES: u64 = 4 << 10;
/// More keys than this are a mistake.
const MAX_KEYS: usize = 64;

/// `aops-agent-service-<os>-<arch>[.exe]`.
pub(super) fn file_name(os: Os, arch: Arch) -> String {
    let suffix = if os == Os::Windows { ".exe" } else { "" };
    format!("aops-agent-service-{os}-{arch}{suffix}")
}

/// Every name that a bootstrap executable can have.
pub(super) fn is_file_name(name: &str) -> bool {
    Os::ALL.iter().any(|os| Arch::ALL.iter().any(|arch| file_name(*os, *arch) == name))
}

/// Makes the bootstrap out of the manager's package, and puts it into the depot; gives its name.
pub(super) fn make(place: &Place, package: &mut File, packing: Packing, release: &Release) -> Result<String> {
    let name = file_name(release.os, release.arch);
    let mut attempt = || -> Result<()> {
        let keys: Vec<String> = public_keys(place)?.into_iter().map(|(_, text)| text).collect();
        if keys.is_empty() {
            bail!("there is no public key in {}", place.keys().display());
        }
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(place.depot())?;
        archive::extract(package, packing, archive::manager_path(release.os), file.as_file_mut())?;
        trailer::put(file.as_file_mut(), &keys)?;
        persist(file, &place.depot().join(&name), 0o755)
    };
    attempt().with_context(|| format!("cannot make the bootstrap {name}"))?;
    Ok(name)
}

/// Every `keys/*.pub`, by name.
pub(super) fn public_keys(place: &Place) -> Result<Vec<(String, String)>> {
    let attempt = || -> Result<Vec<(String, String)>> {
        let mut keys = Vec::new();
        for entry in fs::read_dir(place.keys())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.ends_with(".pub") || name.starts_with('.') {
                continue;
            }
            if keys.len() >= MAX_KEYS {
                bail!("there are more than {MAX_KEYS}");
            }
            let mut text = String::new();
            File::open(entry.path())?.take(MAX_KEY_BYTES).read_to_string(&mut text)?;
            // As the hosts that it is for will read it.
            let parsed = Keys::parse(&text).with_context(|| format!("{name} is no minisign public key"))?;
            ensure!(!parsed.is_empty(), "{name} holds no minisign public key");
            keys.push((name, text));
        }
        keys.sort();
        Ok(keys)
    };
    attempt().with_context(|| format!("cannot read the public keys in {}", place.keys().display()))
}

/// Gives a finished temporary file its name, durably.
pub(super) fn persist(file: tempfile::NamedTempFile, path: &Path, mode: u32) -> Result<()> {
    platform::set_mode(file.path(), mode)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    if let Some(parent) = path.parent() {
        platform::sync_directory(parent)?;
    }
    Ok(())
}
