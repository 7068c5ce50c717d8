//! Whether bytes are what they are said to be: minisign's signature over all of them, and the signed comment that says what they are.
//!
//! Only pre-hashed signatures count: they can be verified as the bytes stream by, and so can any size be.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use anyhow::{Context, Result, bail, ensure};
use minisign_verify::{Error, Signature, StreamVerifier};
use sha2::{Digest as _, Sha256};

use super::keys::{KeyId, Keys, key_id};
use super::{Refused, Wanted, ensure_size};
use crate::core::model::{Binding, Digest};

const CHUNK_BYTES: usize = 64 << 10;

/// A signature that could do: by a trusted key, of the right kind, for what is wanted. Whether it is true, the bytes have yet to show.
pub(super) struct Examined {
    signature: Signature,
    signer: KeyId,
    binding: Binding,
}

#[derive(Debug)]
pub(super) struct Verified {
    pub(super) binding: Binding,
    pub(super) sha256: Digest,
}

/// Looks at a signature before its package is downloaded: what could not be accepted anyway is not worth the way.
pub(super) fn examine(text: &str, keys: &Keys, wanted: &Wanted) -> Result<Examined> {
    examined(text, keys, wanted).context(Refused)
}

fn examined(text: &str, keys: &Keys, wanted: &Wanted) -> Result<Examined> {
    let (signature, signer) = decode(text)?;
    let mut trusted = keys.with_id(signer).peekable();
    if trusted.peek().is_none() {
        if let Some(by) = keys.revoked_by(signer) {
            bail!(
                "the package is signed by the key {signer}, which was revoked by {by}; have it signed by a key that is trusted here"
            );
        }
        let trusted: Vec<String> = keys.ids().map(|id| id.to_string()).collect();
        bail!(
            "the package is signed by the key {signer}, which is not trusted here (trusted{}: {}); if it should be, add its \
             public key there, or install with `--trusted-key FILE`",
            keys.place(),
            trusted.join(", ")
        );
    }
    for key in trusted {
        key.verify_stream(&signature).map_err(|error| match error {
            Error::UnsupportedLegacyMode => anyhow::anyhow!(
                "the signature is of minisign's legacy kind, which is not accepted; sign again with `minisign -S -H`, or \
                 publish again with `aops gateway publish`"
            ),
            error => anyhow::anyhow!("the signature cannot be used: {error}"),
        })?;
    }
    let binding = binding(&signature)?;
    ensure!(
        binding.release == wanted.release,
        "the package is signed as {}, not as the {} that was asked for",
        binding.release,
        wanted.release
    );
    ensure!(
        binding.epoch >= wanted.least_epoch,
        "the package is of epoch {}, older than the {} that this host has committed for {}: packages of earlier epochs were \
         withdrawn; publish it again with `--epoch {}`",
        binding.epoch,
        wanted.least_epoch,
        wanted.release.name,
        wanted.least_epoch
    );
    Ok(Examined { signature, signer, binding })
}

/// Reads the whole of `archive` and leaves it at its beginning, to be read again through the same open file.
pub(super) fn verify(archive: &mut File, examined: Examined, keys: &Keys, wanted: &Wanted) -> Result<Verified> {
    let Examined { signature, signer, binding } = examined;
    let streams = keys.with_id(signer).map(|key| key.verify_stream(&signature));
    let mut verifiers = streams.collect::<Result<Vec<StreamVerifier<'_>>, Error>>()?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut size = 0;
    archive.seek(SeekFrom::Start(0))?;
    loop {
        let amount = archive.read(&mut chunk).context("cannot read the package")?;
        if amount == 0 {
            break;
        }
        let bytes = &chunk[..amount];
        hasher.update(bytes);
        verifiers.iter_mut().for_each(|verifier| verifier.update(bytes));
        size += amount as u64;
    }
    archive.seek(SeekFrom::Start(0))?;

    let is_signed = verifiers.iter_mut().any(|verifier| verifier.finalize().is_ok());
    let sha256 = hex(&hasher.finalize()).parse::<Digest>().context("cannot note the package's SHA-256")?;
    judge(is_signed, signer, size, &sha256, wanted).context(Refused)?;
    Ok(Verified { binding, sha256 })
}

fn judge(is_signed: bool, signer: KeyId, size: u64, sha256: &Digest, wanted: &Wanted) -> Result<()> {
    if !is_signed {
        bail!(
            "the package has been tampered with or damaged: its {size} bytes and its comment are not what the key {signer} \
             signed; nothing of it was unpacked. Publish it again, and find out who changed it"
        );
    }
    ensure_size(size, wanted.size)?;
    if let Some(announced) = &wanted.sha256 {
        ensure!(sha256 == announced, "its SHA-256 is {sha256} where {announced} was announced");
    }
    Ok(())
}

/// What a signature says that its package is, before anything was verified.
pub(super) fn claimed(signature: &str) -> Result<Binding> {
    binding(&decode(signature)?.0)
}

fn decode(text: &str) -> Result<(Signature, KeyId)> {
    let attempt = || Some((Signature::decode(text).ok()?, key_id(text.lines().nth(1)?)?));
    attempt().context("its signature file is not one of minisign's")
}

fn binding(signature: &Signature) -> Result<Binding> {
    signature.trusted_comment().parse().context(
        "the signature does not say what the package is; sign it with `aops gateway publish`, or give minisign the comment \
         `-t \"name=… version=… os=… arch=… epoch=…\"`",
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
