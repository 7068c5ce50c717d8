//! Whether bytes are what they are said to be: minisign's signature over all of them, and the signed comment that says what they are.
//!
//! Only pre-hashed signatures count: they are verified as the bytes stream by, so that a package of any size is read but once. Who unpacks
//! it afterwards must read the same bytes: from a file that is open since, and that nobody else can write.

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

/// A signature of the right kind, and what it says that its package is. Whether it is true, the bytes have yet to show.
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

/// Looks at a signature before its package is downloaded: what could not be accepted anyway is not worth the way.
pub(super) fn examine(text: &str, keys: &Keys, wanted: &PackageRequest) -> Result<SignedClaim> {
    examined(text, keys, wanted).context(PackageRejected)
}

fn examined(text: &str, keys: &Keys, wanted: &PackageRequest) -> Result<SignedClaim> {
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
            "the package is signed by the key {signer}, which is not trusted here (trusted{}: {}); if it should be, add its \
             public key there, or install with `--trusted-key FILE`",
            keys.place(),
            trusted.join(", ")
        );
    }
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
    claim.begin(keys)?;
    Ok(claim)
}

impl SignedClaim {
    /// Takes the text of a signature's file apart.
    fn read(text: &str) -> Result<SignedClaim> {
        let attempt = || {
            let line = text.lines().nth(1)?;
            Some((Signature::decode(text).ok()?, key_id(line)?, is_prehashed(line)?))
        };
        let (signature, signer, is_prehashed) = attempt().context("its signature file is not one of minisign's")?;
        ensure!(
            is_prehashed,
            "the signature is of minisign's legacy kind, which is not accepted; sign again with `minisign -S -H`, or \
             publish again with `aops gateway publish`"
        );
        let binding = signature.trusted_comment().parse().context(
            "the signature does not say what the package is; sign it with `aops gateway publish`, or give minisign the comment \
             `-t \"name=… version=… os=… arch=… epoch=…\"`",
        )?;
        Ok(SignedClaim { signature, signer, binding })
    }

    /// Begins to verify a package's bytes, from its first one.
    pub(super) fn begin<'a>(&'a self, keys: &'a Keys) -> Result<Verification<'a>> {
        let streams = keys.with_id(self.signer).map(|key| Ok((key, key.public().verify_stream(&self.signature)?)));
        let verifiers = streams
            .collect::<Result<Vec<_>, Error>>()
            .map_err(|error| anyhow!("the signature cannot be used: {error}"))?;
        Ok(Verification { claim: self, verifiers, hasher: Sha256::new(), size: 0 })
    }
}

/// A package that is verified while its bytes come by, in their order.
pub(super) struct Verification<'a> {
    claim: &'a SignedClaim,
    /// Of each trusted key with the signature's id.
    verifiers: Vec<(&'a Key, StreamVerifier<'a>)>,
    hasher: Sha256,
    size: u64,
}

impl<'a> Verification<'a> {
    /// The bytes that follow those that it was given before.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.verifiers.iter_mut().for_each(|(_, verifier)| verifier.update(bytes));
        self.size += bytes.len() as u64;
    }

    /// How many bytes it was given.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Judges the bytes that it was given as the whole of the package, by the signature.
    pub(super) fn finish(self) -> Result<SignedPackage> {
        let Verification { claim: SignedClaim { signer, binding, .. }, size, .. } = self;
        let (signed_by, sha256) = self.end();
        let Some(signed_by) = signed_by else {
            let error = anyhow!(
                "the package has been tampered with or damaged: its {size} bytes and its comment are not what the key {signer} \
                 signed; nothing of it was unpacked. Publish it again, and find out who changed it"
            );
            return Err(error.context(PackageRejected));
        };
        let verified = VerifiedPackage { binding: binding.clone(), sha256, signer: signed_by.clone() };
        Ok(SignedPackage { size, verified })
    }

    /// Which key has signed the bytes that it was given, if any, and their SHA-256.
    fn end(mut self) -> (Option<&'a Key>, Digest) {
        let signed_by =
            self.verifiers.iter_mut().find_map(|(key, verifier)| verifier.finalize().is_ok().then_some(*key));
        (signed_by, <[u8; 32]>::from(self.hasher.finalize()).into())
    }
}

/// A package that a trusted key has signed.
pub(super) struct SignedPackage {
    size: u64,
    verified: VerifiedPackage,
}

impl SignedPackage {
    /// Compares it with what was announced.
    pub(super) fn compared(self, wanted: &PackageRequest) -> Result<VerifiedPackage> {
        ensure_size(self.size, wanted.size).context(PackageRejected)?;
        let sha256 = &self.verified.sha256;
        if let Some(announced) = &wanted.sha256 {
            let differs =
                || anyhow!("its SHA-256 is {sha256} where {announced} was announced").context(PackageRejected);
            ensure!(sha256 == announced, differs());
        }
        Ok(self.verified)
    }
}

/// Reads what follows in `from`, to its end, through a verification and perhaps into a file of ours. `each` is told how much came and may
/// end it.
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

/// What a signature says that its package is, before anything was verified: of the kind that hosts accept.
pub fn claimed(signature: &str) -> Result<Binding> {
    Ok(SignedClaim::read(signature)?.binding)
}

/// What a signature is worth to who offers the package, by the keys at hand.
#[cfg(feature = "gateway")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignatureStatus {
    Good,
    /// Made by a key that is not among these; hosts may know it.
    UnknownKey,
    /// No host would accept it for these bytes.
    Bad(String),
}

/// Verifies a package that is about to be offered as the hosts that fetch it will, and gives its SHA-256, of the same reading.
#[cfg(feature = "gateway")]
pub fn judge(package: &mut File, signature: &str, keys: &Keys) -> Result<(SignatureStatus, Digest)> {
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
    Ok(match verification.end() {
        (Some(_), sha256) => (SignatureStatus::Good, sha256),
        (None, sha256) if is_known => (SignatureStatus::Bad(format!("the key {signer} signed others")), sha256),
        (None, sha256) => (SignatureStatus::UnknownKey, sha256),
    })
}

/// The SHA-256 of a whole file.
pub fn sha256_of(file: &mut File) -> Result<Digest> {
    let mut hasher = Sha256::new();
    file.rewind()?;
    in_chunks(file, |bytes| {
        hasher.update(bytes);
        Ok(())
    })?;
    Ok(<[u8; 32]>::from(hasher.finalize()).into())
}
