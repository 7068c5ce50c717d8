//! Signing of packages with minisign: pre-hashed, by a key without password, with the binding as the trusted comment.
//!
//! The gateway alone signs, and only what an operator publishes. Hosts verify, with another and smaller crate, and never see a private key.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use minisign::{KeyPair, PublicKey, SecretKey, SecretKeyBox};

use crate::core::model::Binding;
use crate::store;

/// A key file has three short lines at most.
const MAX_KEY_BYTES: u64 = 4 << 10;

/// A private key that signs, and its public one.
pub struct Signer {
    secret: SecretKey,
    public: PublicKey,
}

impl Signer {
    /// A new key of its own.
    pub fn generate() -> Result<Signer> {
        let KeyPair { pk, sk } = KeyPair::generate_unencrypted_keypair().context("cannot make a signing key")?;
        Ok(Signer { secret: sk, public: pk })
    }

    /// The key in a file as `minisign -G -W` makes it.
    pub fn load(path: &Path) -> Result<Signer> {
        let attempt = || -> Result<Signer> {
            let Some(bytes) = store::read(path, MAX_KEY_BYTES)? else { bail!("there is no such file") };
            let text = String::from_utf8(bytes).context("it is no text")?;
            let secret = SecretKeyBox::from_string(&text)?
                .into_unencrypted_secret_key()
                .context("it is no minisign key without password (`minisign -G -W` makes one)")?;
            let public = PublicKey::from_secret_key(&secret)?;
            Ok(Signer { secret, public })
        };
        attempt().with_context(|| format!("cannot take the signing key {}", path.display()))
    }

    /// The private key as its file holds it.
    pub fn secret_text(&self) -> Result<String> {
        let boxed =
            self.secret.to_box(Some("aops signing key, keep it secret")).context("cannot write the signing key")?;
        Ok(boxed.into_string())
    }

    /// The public key as its file holds it.
    pub fn public_text(&self) -> Result<String> {
        Ok(self.public.to_box().context("cannot write the public key")?.into_string())
    }

    /// The content of the `.minisig` that binds what `package` yields to `binding`.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn binding() -> Binding {
        "name=a version=1 os=linux arch=amd64 epoch=3".parse().unwrap()
    }

    #[test]
    fn what_is_signed_here_is_verified_by_the_crate_that_hosts_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aops.key");
        std::fs::write(&path, Signer::generate().unwrap().secret_text().unwrap()).unwrap();
        let signer = Signer::load(&path).unwrap();

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
    fn a_key_with_a_password_or_none_at_all_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aops.key");
        let refused = || format!("{:#}", Signer::load(&path).err().unwrap());
        assert!(refused().contains("no such file"));
        let locked = KeyPair::generate_encrypted_keypair(Some("secret".into())).unwrap();
        std::fs::write(&path, locked.sk.to_box(None).unwrap().into_string()).unwrap();
        assert!(refused().contains("minisign -G -W"), "{}", refused());
    }
}
