//! Verifies packages: minisign's signature over all bytes, and the signed comment that says what the package is.
//!
//! Only pre-hashed signatures are accepted. They are verified while the bytes stream by, so a package of any size is read once. The code
//! that unpacks the package must read the same bytes: from a file that stays open and that no one else can write to.

use std::fs::File;
use std::io::Seek as _;
use std::io::{ErrorKind, Read, Write};

use anyhow::{Context, Result, anyhow, bail, ensure};
use minisign_verify::{Error, Signature, StreamVerifier};
use sha2::{Digest as _, Sha256};

use super::keys::{Key, KeyId, Keys, is_prehashed, key_id};
use super::{PackageRejected, PackageRequest, ensure_size};
use crate::core::model::{Binding, Digest};

const CHUNK_BYTES: usize = 64 << 10;

/// A signature of the accepted kind and the binding that it claims; not verified against the package's bytes yet.
pub(super) struct SignedClaim {
    signature: Signature,
    signer: KeyId,
    binding: Binding,
}

#[derive(Debug)]
pub(super) struct VerifiedPackage {
    pub(super) binding: Binding,
    pub(super) sha256: Digest,
    pub(super) signer: Key,
}

/// Checks a signature file before the download of its package, so that an unacceptable package is not downloaded.
pub(super) fn examine(text: &str, keys: &Keys, request: &PackageRequest) -> Result<SignedClaim> {
    check_claim(text, keys, request).context(PackageRejected)
}

fn check_claim(text: &str, keys: &Keys, request: &PackageRequest) -> Result<SignedClaim> {
    let claim = SignedClaim::read(text)?;
    let SignedClaim { signer, binding, .. } = &claim;
    if keys.with_id(*signer).next().is_none() {
        if let Some(by) = keys.revoked_by(*signer) {
            bail!(
                "the package is signed by the key {signer}, which was revoked by {by}; have it signed by a key that is trusted here"
            );
        }
        let trusted: Vec<String> = keys.ids().map(|id| id.to_string()).collect();
        bail!(
            "the package is signed by the key {signer}, which is not trusted here (trusted{}: {}); to trust it, add its public key \
             there, or install with `--trusted-key FILE`",
            keys.location_suffix(),
            trusted.join(", ")
        );
    }
    ensure!(
        binding.release == request.release,
        "the package is signed as {}, but {} was requested",
        binding.release,
        request.release
    );
    ensure!(
        binding.epoch >= request.min_epoch,
        "the package has epoch {}, lower than the {} that this host has committed for {}: packages of lower epochs were withdrawn; \
         publish it again with `--epoch {}`",
        binding.epoch,
        request.min_epoch,
        request.release.name,
        request.min_epoch
    );
    claim.begin(keys)?;
    Ok(claim)
}

impl SignedClaim {
    /// Parses a signature file.
    fn read(text: &str) -> Result<SignedClaim> {
        let attempt = || {
            let line = text.lines().nth(1)?;
            Some((Signature::decode(text).ok()?, key_id(line)?, is_prehashed(line)?))
        };
        let (signature, signer, is_prehashed) = attempt().context("the signature file is not a minisign signature")?;
        ensure!(
            is_prehashed,
            "the signature has minisign's legacy format, which is not accepted; sign again with `minisign -S -H`, or \
             publish again with `aops gateway publish`"
        );
        let binding = signature.trusted_comment().parse().context(
            "the signature's comment does not name the package; sign it with `aops gateway publish`, or give minisign the comment \
             `-t \"name=… version=… os=… arch=… epoch=…\"`",
        )?;
        Ok(SignedClaim { signature, signer, binding })
    }

    /// Starts to verify a package, from its first byte.
    pub(super) fn begin<'a>(&'a self, keys: &'a Keys) -> Result<Verification<'a>> {
        let streams = keys.with_id(self.signer).map(|key| Ok((key, key.public().verify_stream(&self.signature)?)));
        let verifiers = streams
            .collect::<Result<Vec<_>, Error>>()
            .map_err(|error| anyhow!("the signature cannot be used: {error}"))?;
        Ok(Verification { claim: self, verifiers, hasher: Sha256::new(), size: 0 })
    }
}

/// A verification in progress; it receives the package's bytes in order.
pub(super) struct Verification<'a> {
    claim: &'a SignedClaim,
    /// One for each trusted key that has the signature's id.
    verifiers: Vec<(&'a Key, StreamVerifier<'a>)>,
    hasher: Sha256,
    size: u64,
}

impl<'a> Verification<'a> {
    /// Adds the next bytes.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.verifiers.iter_mut().for_each(|(_, verifier)| verifier.update(bytes));
        self.size += bytes.len() as u64;
    }

    /// Number of bytes added so far.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Verifies the signature over the bytes added so far, which must be the whole package.
    pub(super) fn finish(self) -> Result<SignedPackage> {
        let Verification { claim: SignedClaim { signer, binding, .. }, size, .. } = self;
        let (signed_by, sha256) = self.signer_and_digest();
        let Some(signed_by) = signed_by else {
            let error = anyhow!(
                "signature mismatch: the package was tampered with or damaged, as the key {signer} did not sign these {size} bytes with \
                 this comment; nothing was unpacked. Publish it again, and find out how it was changed"
            );
            return Err(error.context(PackageRejected));
        };
        let verified = VerifiedPackage { binding: binding.clone(), sha256, signer: signed_by.clone() };
        Ok(SignedPackage { size, verified })
    }

    /// Returns the key that signed the bytes, if any, and their SHA-256.
    fn signer_and_digest(mut self) -> (Option<&'a Key>, Digest) {
        let signed_by =
            self.verifiers.iter_mut().find_map(|(key, verifier)| verifier.finalize().is_ok().then_some(*key));
        (signed_by, <[u8; 32]>::from(self.hasher.finalize()).into())
    }
}

/// A package signed by a trusted key.
pub(super) struct SignedPackage {
    size: u64,
    verified: VerifiedPackage,
}

impl SignedPackage {
    /// Compares the package with the announced size and SHA-256.
    pub(super) fn ensure_announced(self, request: &PackageRequest) -> Result<VerifiedPackage> {
        ensure_size(self.size, request.size).context(PackageRejected)?;
        let sha256 = &self.verified.sha256;
        if let Some(announced) = &request.sha256 {
            let differs = || {
                anyhow!("SHA-256 mismatch: the package has {sha256}, but {announced} was announced")
                    .context(PackageRejected)
            };
            ensure!(sha256 == announced, differs());
        }
        Ok(self.verified)
    }
}

/// Reads `from` to its end through a verification, and optionally copies it to a file. `each` receives the size of each chunk; its error
/// stops the reading.
pub(super) fn read_through(
    from: &mut impl Read,
    verification: &mut Verification<'_>,
    mut to: Option<&mut File>,
    each: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    in_chunks(from, |bytes| {
        each(bytes.len() as u64)?;
        verification.update(bytes);
        if let Some(to) = &mut to {
            to.write_all(bytes).context("cannot copy the package")?;
        }
        Ok(())
    })
}

fn in_chunks(from: &mut impl Read, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(amount) => each(&chunk[..amount])?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot read the package"),
        }
    }
}

/// Returns the binding that a signature claims, unverified. Signatures of a kind that hosts reject are errors.
pub fn claimed(signature: &str) -> Result<Binding> {
    Ok(SignedClaim::read(signature)?.binding)
}

/// The result of checking a signature with the keys at hand.
#[cfg(feature = "gateway")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignatureStatus {
    Good,
    /// Signed by a key that is not at hand; hosts may trust it.
    UnknownKey,
    /// No host accepts it for these bytes.
    Bad(String),
}

/// Verifies a package before it is offered, as hosts will verify it; also returns its SHA-256, computed in the same pass.
#[cfg(feature = "gateway")]
pub fn check_signature(package: &mut File, signature: &str, keys: &Keys) -> Result<(SignatureStatus, Digest)> {
    let claim = SignedClaim::read(signature);
    let verification = claim
        .as_ref()
        .map_err(|error| format!("{error:#}"))
        .and_then(|claim| claim.begin(keys).map_err(|error| format!("{error:#}")));
    let mut verification = match verification {
        Ok(verification) => verification,
        Err(why) => return Ok((SignatureStatus::Bad(why), sha256_of(package)?)),
    };
    package.rewind()?;
    read_through(package, &mut verification, None, &mut |_| Ok(()))?;
    let signer = verification.claim.signer;
    let is_known = !verification.verifiers.is_empty();
    Ok(match verification.signer_and_digest() {
        (Some(_), sha256) => (SignatureStatus::Good, sha256),
        (None, sha256) if is_known => {
            (SignatureStatus::Bad(format!("signature mismatch: the key {signer} signed other bytes")), sha256)
        }
        (None, sha256) => (SignatureStatus::UnknownKey, sha256),
    })
}

/// Computes the SHA-256 of a whole file.
pub fn sha256_of(file: &mut File) -> Result<Digest> {
    let mut hasher = Sha256::new();
    file.rewind()?;
    in_chunks(file, |bytes| {
        hasher.update(bytes);
        Ok(())
    })?;
    Ok(<[u8; 32]>::from(hasher.finalize()).into())
}
