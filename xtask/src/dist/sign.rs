//! The key that signs what is handed out, and depots that publish with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use minisign::{PublicKey, SecretKey, SecretKeyBox};

use crate::command::{run_quietly, say};
use crate::workspace;

/// Holds the password of a key.
const PASSWORD: &str = "MINISIGN_PASSWORD";

pub(super) struct Signing {
    secret: SecretKey,
    public: PublicKey,
    /// A gateway's directory with nothing but the key.
    template: PathBuf,
}

impl Signing {
    /// With the key in this file, or with a throw-away key that is created once.
    pub(super) fn begin(key: Option<&Path>, gateway: &Path) -> Result<Signing> {
        let template = workspace::cached("dist-gateway", |unfinished| {
            say("creating a throw-away key to sign with");
            run_quietly(Command::new(gateway).args(["gateway", "init", "--name", "localhost", "--dir"]).arg(unfinished))
        })?;
        let path = key.map_or_else(|| template.join("keys/aops.key"), Path::to_owned);
        let attempt = || -> Result<SecretKey> {
            let boxed = SecretKeyBox::from_string(&fs::read_to_string(&path)?)?;
            Ok(match std::env::var(PASSWORD) {
                Ok(password) if key.is_some() => boxed.into_secret_key(Some(password))?,
                _ => boxed.into_unencrypted_secret_key()?,
            })
        };
        let secret = attempt().with_context(|| format!("cannot use the signing key {}", path.display()))?;
        let public = PublicKey::from_secret_key(&secret).context("cannot derive the public key")?;
        Ok(Signing { secret, public, template })
    }

    /// Writes the public key as minisign does.
    pub(super) fn write_public_key(&self, path: &Path) -> Result<()> {
        let text = self.public.to_box().context("cannot encode the public key")?.into_string();
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Creates a depot at `path` that signs with this key.
    pub(super) fn depot(&self, path: &Path) -> Result<PathBuf> {
        run_quietly(Command::new("cp").arg("-a").arg(&self.template).arg(path))?;
        let keys = path.join("keys");
        let secret = self.secret.to_box(None).context("cannot encode the key")?.into_string();
        // It replaces a file that only its owner can read.
        fs::write(keys.join("aops.key"), secret).context("cannot write the key of a depot")?;
        self.write_public_key(&keys.join("aops.pub"))?;
        Ok(path.to_owned())
    }

    /// Writes SHA256SUMS and its signature.
    pub(super) fn sign_sums(&self, directory: &Path) -> Result<()> {
        let sums = super::sums(directory)?;
        let comment = format!("aops {}", super::VERSION);
        let signature = minisign::sign(Some(&self.public), &self.secret, sums.as_bytes(), Some(&comment), None);
        let signature = signature.context("cannot sign the checksums")?.into_string();
        for (name, text) in [("SHA256SUMS", sums), ("SHA256SUMS.minisig", signature)] {
            fs::write(directory.join(name), text).with_context(|| format!("cannot write {name}"))?;
        }
        Ok(())
    }
}
