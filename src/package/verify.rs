//! Whether bytes are what they are said to be: minisign's signature over all of them, and the signed comment that says what they are.
//!
//! Only pre-hashed signatures count: they are verified as the bytes stream by, so that a package of any size is read but once. Who unpacks
//! it afterwards must read the same bytes: from a file that is open since, and that nobody else can write.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};

use anyhow::{Context, Result, anyhow, bail, ensure};
use minisign_verify::{Error, Signature, StreamVerifier};
use sha2::{Digest as _, Sha256};

use super::keys::{Key, KeyId, Keys, key_id};
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
    pub(super) signer: Key,
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
        key.public().verify_stream(&signature).map_err(|error| match error {
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

impl Examined {
    /// Begins to verify a package's bytes, from its first one.
    pub(super) fn begin<'a>(&'a self, keys: &'a Keys) -> Result<Verification<'a>> {
        let streams = keys.with_id(self.signer).map(|key| Ok((key, key.public().verify_stream(&self.signature)?)));
        let verifiers = streams.collect::<Result<Vec<_>, Error>>()?;
        Ok(Verification { examined: self, verifiers, hasher: Sha256::new(), size: 0 })
    }
}

/// A package that is verified while its bytes come by, in their order.
pub(super) struct Verification<'a> {
    examined: &'a Examined,
    /// Of each trusted key with the signature's id.
    verifiers: Vec<(&'a Key, StreamVerifier<'a>)>,
    hasher: Sha256,
    size: u64,
}

impl Verification<'_> {
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
    pub(super) fn finish(mut self) -> Result<Signed> {
        let Examined { signer, binding, .. } = self.examined;
        let signed_by =
            self.verifiers.iter_mut().find_map(|(key, verifier)| verifier.finalize().is_ok().then_some(*key));
        let Some(signed_by) = signed_by else {
            let error = anyhow!(
                "the package has been tampered with or damaged: its {} bytes and its comment are not what the key {signer} \
                 signed; nothing of it was unpacked. Publish it again, and find out who changed it",
                self.size
            );
            return Err(error.context(Refused));
        };
        let sha256 = hex(&self.hasher.finalize()).parse::<Digest>().context("cannot note the package's SHA-256")?;
        let verified = Verified { binding: binding.clone(), sha256, signer: signed_by.clone() };
        Ok(Signed { size: self.size, verified })
    }
}

/// A package that a trusted key has signed.
pub(super) struct Signed {
    size: u64,
    verified: Verified,
}

impl Signed {
    /// Compares it with what was announced.
    pub(super) fn compared(self, wanted: &Wanted) -> Result<Verified> {
        ensure_size(self.size, wanted.size).context(Refused)?;
        let sha256 = &self.verified.sha256;
        if let Some(announced) = &wanted.sha256 {
            let differs = || anyhow!("its SHA-256 is {sha256} where {announced} was announced").context(Refused);
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
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let amount = match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(amount) => amount,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("cannot read the package"),
        };
        let bytes = &chunk[..amount];
        each(amount as u64)?;
        verification.update(bytes);
        if let Some(to) = &mut to {
            to.write_all(bytes).context("cannot copy the package")?;
        }
    }
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
