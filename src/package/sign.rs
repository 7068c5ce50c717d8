//! Signs packages with minisign: pre-hashed, with or without a password on the key, with the binding as the trusted comment.
//!
//! Only the gateway signs, and only when an operator publishes. Hosts verify with another, smaller crate and hold no private key.

use std::env::VarError;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use minisign::{KeyPair, PublicKey, SecretKey, SecretKeyBox};

use crate::core::model::Binding;
use crate::store;

/// Holds the private key's password where no terminal is available.
const PASSWORD_VARIABLE: &str = "MINISIGN_PASSWORD";
/// A key file has at most three short lines.
const MAX_KEY_BYTES: u64 = 4 << 10;

/// A private signing key and its public key.
pub struct Signer {
    secret: SecretKey,
    public: PublicKey,
}

impl Signer {
    /// Generates a new key.
    pub fn generate() -> Result<Signer> {
        let KeyPair { pk, sk } = KeyPair::generate_unencrypted_keypair().context("cannot generate a signing key")?;
        Ok(Signer { secret: sk, public: pk })
    }

    /// Loads a key file as created by `minisign -G`; calls `password` if the key has one.
    pub fn load(path: &Path, password: impl FnOnce() -> Result<String>) -> Result<Signer> {
        let attempt = || -> Result<Signer> {
            let Some(bytes) = store::read(path, MAX_KEY_BYTES)? else { bail!("the file does not exist") };
            let text = String::from_utf8(bytes).context("it is not a text file")?;
            let secret = secret_in(&text, password)?;
            let public = PublicKey::from_secret_key(&secret)?;
            let signer = Signer { secret, public };
            signer.check().context(
                "the private and the public half of the key do not match: the file is damaged; restore it from a copy",
            )?;
            Ok(signer)
        };
        attempt().with_context(|| format!("cannot use the signing key {}", path.display()))
    }

    /// Signs and verifies a sample: without a checksum, damage to a key shows only in its signatures.
    fn check(&self) -> Result<()> {
        let signature = minisign::sign(Some(&self.public), &self.secret, &b"aops"[..], None, None)?.into_string();
        let public = minisign_verify::PublicKey::decode(&self.public_text()?)?;
        Ok(public.verify(b"aops", &minisign_verify::Signature::decode(&signature)?, false)?)
    }

    /// The private key as text of its file.
    pub fn secret_text(&self) -> Result<String> {
        let boxed =
            self.secret.to_box(Some("aops signing key, keep it secret")).context("cannot encode the signing key")?;
        Ok(boxed.into_string())
    }

    /// The public key as text of its file.
    pub fn public_text(&self) -> Result<String> {
        Ok(self.public.to_box().context("cannot encode the public key")?.into_string())
    }

    /// Signs `package` and `binding`; returns the content of the `.minisig` file.
    pub fn sign(&self, package: impl Read, binding: &Binding) -> Result<String> {
        let comment = binding.to_string();
        let signature = minisign::sign(
            Some(&self.public),
            &self.secret,
            package,
            Some(&comment),
            Some("signature of an aops package"),
        )
        .with_context(|| format!("cannot sign {}", binding.release))?;
        Ok(signature.into_string())
    }
}

/// Length of a minisign private key: algorithms of the signature, the password and the checksum, two bytes each; salt and limits of the
/// key derivation; key id, key and checksum.
const SECRET_BYTES: usize = 158;
/// The key derivation algorithm; zero for a key without a password.
const PASSWORD_AT: std::ops::Range<usize> = 2..4;
const CHECKSUM_AT: usize = SECRET_BYTES - 32;

fn secret_in(text: &str, password: impl FnOnce() -> Result<String>) -> Result<SecretKey> {
    const EXPECTED: &str = "it is not a minisign private key (`minisign -G` creates one)";
    let line = text.lines().nth(1).context(EXPECTED)?;
    let bytes = BASE64_STANDARD.decode(line.trim()).context(EXPECTED)?;
    ensure!(bytes.len() == SECRET_BYTES, EXPECTED);
    let boxed = SecretKeyBox::from_string(text)?;
    if bytes[PASSWORD_AT] != [0, 0] {
        return boxed.into_secret_key(Some(password()?)).context("cannot decrypt it");
    }
    // minisign 0.11 writes no checksum into a key without a password (`minisign -G -W`), and does not check it.
    if bytes[CHECKSUM_AT..].iter().all(|byte| *byte == 0) {
        return Ok(SecretKey::from_bytes(&bytes)?);
    }
    Ok(boxed.into_unencrypted_secret_key()?)
}

/// Reads the private key's password from the environment, or prompts for it on the terminal.
pub fn password(key: &Path) -> Result<String> {
    match std::env::var(PASSWORD_VARIABLE) {
        Ok(password) => Ok(password),
        Err(VarError::NotUnicode(_)) => bail!("cannot use the password in {PASSWORD_VARIABLE}: it is not UTF-8"),
        Err(VarError::NotPresent) => rpassword::prompt_password(format!("Password of {}: ", key.display()))
            .with_context(|| {
                format!(
                    "cannot prompt for the password without a terminal; set the environment variable {PASSWORD_VARIABLE}"
                )
            }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding() -> Binding {
        "name=a version=1 os=linux arch=amd64 epoch=3".parse().unwrap()
    }

    #[test]
    fn a_signature_is_verified_by_the_crate_that_hosts_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aops.key");
        std::fs::write(&path, Signer::generate().unwrap().secret_text().unwrap()).unwrap();
        let signer = Signer::load(&path, || bail!("no password expected")).unwrap();

        let text = signer.sign(&b"the bytes"[..], &binding()).unwrap();
        let signature = minisign_verify::Signature::decode(&text).unwrap();
        let key = minisign_verify::PublicKey::decode(&signer.public_text().unwrap()).unwrap();
        assert_eq!(signature.trusted_comment().parse::<Binding>().unwrap(), binding());
        key.verify(b"the bytes", &signature, false).unwrap();
        assert!(key.verify(b"the byteS", &signature, false).is_err());

        let other = minisign_verify::Signature::decode(&text.replace("epoch=3", "epoch=4")).unwrap();
        assert!(key.verify(b"the bytes", &other, false).is_err(), "the comment is covered");
    }

    #[test]
    fn a_key_with_a_password_loads_with_that_password_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aops.key");
        let load =
            |password: &str| Signer::load(&path, || Ok(password.to_owned())).map_err(|error| format!("{error:#}"));
        assert!(load("").err().unwrap().contains("does not exist"));
        let locked = KeyPair::generate_encrypted_keypair(Some("secret".into())).unwrap();
        std::fs::write(&path, locked.sk.to_box(None).unwrap().into_string()).unwrap();
        let signer = load("secret").unwrap();
        assert_eq!(signer.public_text().unwrap(), locked.pk.to_box().unwrap().into_string());
        assert!(load("other").err().unwrap().contains("Wrong password"));
        for bad in ["", "untrusted comment: x\n", "untrusted comment: x\nRWQ\n", "untrusted comment: x\nåå\n"] {
            std::fs::write(&path, bad).unwrap();
            assert!(load("secret").err().unwrap().contains("not a minisign private key"), "{bad}");
        }
    }

    #[test]
    fn a_key_without_password_needs_no_checksum_but_must_be_intact() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aops.key");
        let made = Signer::generate().unwrap();
        let text = made.secret_text().unwrap();
        let bytes = BASE64_STANDARD.decode(text.lines().nth(1).unwrap()).unwrap();
        let load = |bytes: &[u8]| {
            std::fs::write(&path, format!("untrusted comment: x\n{}\n", BASE64_STANDARD.encode(bytes))).unwrap();
            Signer::load(&path, || bail!("no password expected")).map_err(|error| format!("{error:#}"))
        };
        // As written by `minisign -G -W` of version 0.11.
        let mut bare = bytes.clone();
        bare[CHECKSUM_AT..].fill(0);
        assert_eq!(load(&bare).unwrap().public_text().unwrap(), made.public_text().unwrap());
        // A changed byte of the key, with and without the checksum.
        for mut bad in [bare, bytes] {
            bad[70] ^= 1;
            let refused = load(&bad).err().unwrap();
            assert!(refused.contains("damaged") || refused.contains("Corrupted"), "{refused}");
        }
    }
}
