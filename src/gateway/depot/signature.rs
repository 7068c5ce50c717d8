//! The signatures of the packages in the depot. They are parsed and verified by `package`, as on hosts.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::core::model::{AgentName, Binding, Version};
use crate::package::{self, Keys, MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX, SignatureStatus};
use crate::store;

/// The path of the signature of a file.
pub(in crate::gateway) fn signature_path(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(SIGNATURE_SUFFIX);
    file.with_file_name(name)
}

/// The status and text of a published file's signature; `None` if it has none.
pub(in crate::gateway) fn signature_status(file: &Path, keys: &Keys) -> Result<Option<(SignatureStatus, String)>> {
    let Some(bytes) = store::read(&signature_path(file), MAX_SIGNATURE_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (status, _) = package::check_signature(&mut File::open(file)?, &text, keys)?;
    Ok(Some((status, text)))
}

/// The binding in a published file's signature; `None` if the file or a valid binding is missing. The signature is not verified.
pub(in crate::gateway) fn binding_of(file: &Path) -> Result<Option<Binding>> {
    let text = if file.exists() { store::read(&signature_path(file), MAX_SIGNATURE_BYTES)? } else { None };
    Ok(text.and_then(|text| package::binding_of(&String::from_utf8_lossy(&text)).ok()))
}

/// A package in the depot, by the trusted comment of its signature.
pub(in crate::gateway) struct PublishedPackage {
    pub(in crate::gateway) file: String,
    pub(in crate::gateway) binding: Binding,
}

/// The packages of one name. Their content is not read.
pub(in crate::gateway) fn published(depot: &Path, name: &AgentName) -> Result<Vec<PublishedPackage>> {
    let mut found = signed(depot, |file| file.starts_with(name.as_str()))?;
    found.retain(|found| found.binding.release.name == *name);
    Ok(found)
}

/// The name and version of every package. Their content is not read.
pub(in crate::gateway) fn releases(depot: &Path) -> Result<BTreeSet<(AgentName, Version)>> {
    let release = |found: PublishedPackage| (found.binding.release.name, found.binding.release.version);
    Ok(signed(depot, |_| true)?.into_iter().map(release).collect())
}

/// The packages whose file names `counts` accepts, by the trusted comments of their signatures.
fn signed(depot: &Path, counts: impl Fn(&str) -> bool) -> Result<Vec<PublishedPackage>> {
    let attempt = || -> Result<Vec<PublishedPackage>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(depot)? {
            let entry = entry?;
            let file_name = entry.file_name().to_string_lossy().into_owned();
            let Some(file) = file_name.strip_suffix(SIGNATURE_SUFFIX) else { continue };
            if !counts(file) || !depot.join(file).exists() {
                continue;
            }
            // The gateway does not offer unreadable files either, and `gateway status` shows the reason.
            let Ok(Some(bytes)) = store::read(&entry.path(), MAX_SIGNATURE_BYTES) else { continue };
            let Ok(binding) = package::binding_of(&String::from_utf8_lossy(&bytes)) else { continue };
            if binding.release.packing_of(file).is_some() {
                found.push(PublishedPackage { file: file.to_owned(), binding });
            }
        }
        Ok(found)
    };
    attempt().with_context(|| format!("cannot read the depot {}", depot.display()))
}
