//! The signatures of the depot's packages: what they bind, and whether they are good.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use minisign_verify::{Error as Minisign, PublicKey, Signature};
use sha2::{Digest as _, Sha256};

use crate::core::model::{AgentName, Binding, Digest};
use crate::gateway::init::hex;
use crate::gateway::{Place, bootstrap};
use crate::store;

/// A signature's file has four lines.
pub(in crate::gateway) const MAX_SIGNATURE_BYTES: u64 = 8 << 10;
/// How much of a package is read at once.
const CHUNK: usize = 256 << 10;

/// Where the signature of a file lies.
pub(in crate::gateway) fn signature_path(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".minisig");
    file.with_file_name(name)
}

/// What the signed comment says; whether it is really signed is another question ([`examine`]).
pub(in crate::gateway) fn binding_of(signature: &str) -> Result<Binding> {
    let signature = Signature::decode(signature).context("it is no minisign signature")?;
    Ok(signature.trusted_comment().parse()?)
}

/// What there is to say about a signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gateway) enum Verdict {
    Good,
    /// Made by a key that is not among ours; hosts may know it.
    UnknownKey,
    Bad(String),
}

/// The depot's own keys.
pub(in crate::gateway) fn keys_of(place: &Place) -> Result<Vec<PublicKey>> {
    let keys = bootstrap::public_keys(place)?;
    keys.iter()
        .map(|(name, text)| PublicKey::decode(text).with_context(|| format!("cannot read the key {name}")))
        .collect()
}

/// Whether `signature` is one of `package` by one of `keys`.
pub(in crate::gateway) fn examine(package: &mut File, signature: &str, keys: &[PublicKey]) -> Result<Verdict> {
    Ok(examine_and_hash(package, signature, keys)?.0)
}

/// As [`examine`], with the SHA-256 that the same reading gives.
pub(super) fn examine_and_hash(package: &mut File, signature: &str, keys: &[PublicKey]) -> Result<(Verdict, Digest)> {
    let signature = match Signature::decode(signature) {
        Ok(signature) => signature,
        Err(error) => return Ok((Verdict::Bad(error.to_string()), sha256_of(package)?)),
    };
    let mut verifier = Err(Minisign::UnexpectedKeyId);
    for key in keys {
        verifier = key.verify_stream(&signature);
        if !matches!(verifier, Err(Minisign::UnexpectedKeyId)) {
            break;
        }
    }
    let digest = read_all(package, |chunk| {
        if let Ok(verifier) = &mut verifier {
            verifier.update(chunk);
        }
    })?;
    let verdict = match verifier.and_then(|mut verifier| verifier.finalize()) {
        Ok(()) => Verdict::Good,
        Err(Minisign::UnexpectedKeyId) => Verdict::UnknownKey,
        Err(error) => Verdict::Bad(error.to_string()),
    };
    Ok((verdict, digest))
}

/// The SHA-256 of a file.
pub(in crate::gateway) fn sha256_of(file: &mut File) -> Result<Digest> {
    read_all(file, |_| {})
}

fn read_all(file: &mut File, mut each: impl FnMut(&[u8])) -> Result<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    file.seek(SeekFrom::Start(0))?;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                hash.update(&buffer[..length]);
                each(&buffer[..length]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(hex(&hash.finalize()).parse()?)
}

/// What a published file's signature is worth; `None` where there is none.
pub(in crate::gateway) fn verdict_on(place: &Place, file: &Path) -> Result<Option<(Verdict, String)>> {
    let Some(bytes) = store::read(&signature_path(file), MAX_SIGNATURE_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let verdict = examine(&mut File::open(file)?, &text, &keys_of(place)?)?;
    Ok(Some((verdict, text)))
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
            let Some(file) = file_name.strip_suffix(".minisig") else { continue };
            if !file.starts_with(name.as_str()) || !depot.join(file).exists() {
                continue;
            }
            let bytes = store::read(&entry.path(), MAX_SIGNATURE_BYTES)?.unwrap_or_default();
            let Ok(binding) = binding_of(&String::from_utf8_lossy(&bytes)) else { continue };
            if binding.release.name == *name && binding.release.packing_of(file).is_some() {
                found.push(Found { file: file.to_owned(), binding });
            }
        }
        Ok(found)
    };
    attempt().with_context(|| format!("cannot read the depot {}", depot.display()))
}
