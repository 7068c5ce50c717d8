//! The signatures of the depot's packages: where they lie, and by which keys they are verified. They are read and verified as hosts do it
//! (`package`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::core::model::{AgentName, Binding};
use crate::gateway::{Place, bootstrap};
use crate::package::{self, Keys, MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX, Verdict};
use crate::store;

/// Where the signature of a file lies.
pub(in crate::gateway) fn signature_path(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(SIGNATURE_SUFFIX);
    file.with_file_name(name)
}

/// The depot's own keys.
pub(in crate::gateway) fn keys_of(place: &Place) -> Result<Keys> {
    let mut keys = Keys::default();
    for (name, text) in bootstrap::public_keys(place)? {
        let read = Keys::parse(&text).and_then(|read| keys.extend(read));
        read.with_context(|| format!("cannot read the key {name}"))?;
    }
    Ok(keys)
}

/// What a published file's signature is worth; `None` where there is none.
pub(in crate::gateway) fn verdict_on(place: &Place, file: &Path) -> Result<Option<(Verdict, String)>> {
    let Some(bytes) = store::read(&signature_path(file), MAX_SIGNATURE_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (verdict, _) = package::judge(&mut File::open(file)?, &text, &keys_of(place)?)?;
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
    let attempt = || -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(depot)? {
            let entry = entry?;
            let file_name = entry.file_name().to_string_lossy().into_owned();
            let Some(file) = file_name.strip_suffix(SIGNATURE_SUFFIX) else { continue };
            if !file.starts_with(name.as_str()) || !depot.join(file).exists() {
                continue;
            }
            let bytes = store::read(&entry.path(), MAX_SIGNATURE_BYTES)?.unwrap_or_default();
            let Ok(binding) = package::binding_of(&String::from_utf8_lossy(&bytes)) else { continue };
            if binding.release.name == *name && binding.release.packing_of(file).is_some() {
                found.push(Found { file: file.to_owned(), binding });
            }
        }
        Ok(found)
    };
    attempt().with_context(|| format!("cannot read the depot {}", depot.display()))
}
