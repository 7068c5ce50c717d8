//! The signatures of the depot's packages: where they lie. They are read and verified as hosts do it
//! (`package`).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::core::model::{AgentName, Binding, Version};
use crate::package::{self, Keys, MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX, SignatureStatus};
use crate::store;

/// Where the signature of a file lies.
pub(in crate::gateway) fn signature_path(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(SIGNATURE_SUFFIX);
    file.with_file_name(name)
}

/// What a published file's signature is worth; `None` where there is none.
pub(in crate::gateway) fn verdict_on(file: &Path, keys: &Keys) -> Result<Option<(SignatureStatus, String)>> {
    let Some(bytes) = store::read(&signature_path(file), MAX_SIGNATURE_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (verdict, _) = package::check_signature(&mut File::open(file)?, &text, keys)?;
    Ok(Some((verdict, text)))
}

/// What a published file is, as its signed comment says; `None`: there is no such file, or nothing says it.
pub(in crate::gateway) fn binding_of(file: &Path) -> Result<Option<Binding>> {
    let text = if file.exists() { store::read(&signature_path(file), MAX_SIGNATURE_BYTES)? } else { None };
    Ok(text.and_then(|text| package::binding_of(&String::from_utf8_lossy(&text)).ok()))
}

/// A package in the depot, as its signed comment says.
pub(in crate::gateway) struct Found {
    pub(in crate::gateway) file: String,
    pub(in crate::gateway) binding: Binding,
}

/// The packages of one name, without a look at their bytes.
pub(in crate::gateway) fn published(depot: &Path, name: &AgentName) -> Result<Vec<Found>> {
    let mut found = signed(depot, |file| file.starts_with(name.as_str()))?;
    found.retain(|found| found.binding.release.name == *name);
    Ok(found)
}

/// Every name and version that there is a package of, without a look at its bytes.
pub(in crate::gateway) fn releases(depot: &Path) -> Result<BTreeSet<(AgentName, Version)>> {
    let release = |found: Found| (found.binding.release.name, found.binding.release.version);
    Ok(signed(depot, |_| true)?.into_iter().map(release).collect())
}

/// The packages whose file names `counts` takes, as their signatures say.
fn signed(depot: &Path, counts: impl Fn(&str) -> bool) -> Result<Vec<Found>> {
    let attempt = || -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(depot)? {
            let entry = entry?;
            let file_name = entry.file_name().to_string_lossy().into_owned();
            let Some(file) = file_name.strip_suffix(SIGNATURE_SUFFIX) else { continue };
            if !counts(file) || !depot.join(file).exists() {
                continue;
            }
            // What cannot be read is not offered either, and the gateway's status says why.
            let Ok(Some(bytes)) = store::read(&entry.path(), MAX_SIGNATURE_BYTES) else { continue };
            let Ok(binding) = package::binding_of(&String::from_utf8_lossy(&bytes)) else { continue };
            if binding.release.packing_of(file).is_some() {
                found.push(Found { file: file.to_owned(), binding });
            }
        }
        Ok(found)
    };
    attempt().with_context(|| format!("cannot read the depot {}", depot.display()))
}
