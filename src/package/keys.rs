//! The public keys that packages are trusted by: minisign's, as in `etc/keys/*.pub`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use minisign_verify::PublicKey;

use crate::store::{self, Access};

/// A file of keys is refused beyond this: minisign's have 114 bytes.
const MAX_KEY_FILE_BYTES: u64 = 64 << 10;
/// More keys than anybody rotates through.
const MAX_KEYS: usize = 64;

/// Which key of minisign's: shown as minisign shows it, 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId([u8; 8]);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016X}", u64::from_le_bytes(self.0))
    }
}

impl std::fmt::Debug for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The key that a signature or a public key, in base64 as minisign writes them, names: eight bytes after the two of the algorithm.
pub(super) fn key_id(base64: &str) -> Option<KeyId> {
    let bytes = BASE64_STANDARD.decode(base64.trim()).ok()?;
    Some(KeyId(bytes.get(2..10)?.try_into().ok()?))
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    id: KeyId,
    base64: String,
    key: PublicKey,
}

/// Trusted keys, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keys {
    keys: Vec<Key>,
    /// For telling an operator where to put one.
    directory: Option<PathBuf>,
}

impl Keys {
    /// All `*.pub` of a directory; none where there is no such directory. A file that is no key is an error: it was put there to be one.
    pub fn load(directory: &Path) -> Result<Keys> {
        let mut keys = Keys { keys: Vec::new(), directory: Some(directory.to_owned()) };
        let mut paths = Vec::new();
        match fs::read_dir(directory) {
            Ok(entries) => {
                for entry in entries {
                    let path = entry.with_context(|| format!("cannot list {}", directory.display()))?.path();
                    if path.extension().is_some_and(|extension| extension == "pub") {
                        paths.push(path);
                    }
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot list {}", directory.display())),
        }
        paths.sort();
        for path in paths {
            keys.extend(Keys::read(&path)?)?;
        }
        Ok(keys)
    }

    /// The keys of one file.
    pub fn read(path: &Path) -> Result<Keys> {
        let attempt = || -> Result<Keys> {
            let text = store::read(path, MAX_KEY_FILE_BYTES)?.context("there is no such file")?;
            let keys = Keys::parse(std::str::from_utf8(&text).context("it is not text")?)?;
            ensure!(!keys.is_empty(), "it is empty");
            Ok(keys)
        };
        attempt().with_context(|| format!("cannot take {} as a trusted key", path.display()))
    }

    /// Keys as minisign writes them, with or without their comment lines; several follow one another.
    pub fn parse(text: &str) -> Result<Keys> {
        let mut keys = Keys::default();
        for line in text.split(['\n', ',']).map(str::trim) {
            if line.is_empty() || line.starts_with("untrusted comment:") {
                continue;
            }
            let parsed = PublicKey::from_base64(line).ok().zip(key_id(line));
            let (key, id) = parsed.with_context(|| {
                let shown: String = line.chars().take(60).collect();
                format!("cannot take {shown:?} as a minisign public key: it is a line of base64 that begins with RW")
            })?;
            keys.add(Key { id, base64: line.to_owned(), key })?;
        }
        Ok(keys)
    }

    /// What this executable was built to trust (the variable `AOPS_TRUSTED_KEYS` at build time).
    pub fn baked_in() -> Result<Keys> {
        Keys::parse(option_env!("AOPS_TRUSTED_KEYS").unwrap_or_default())
    }

    /// Trusts `others` too.
    pub fn extend(&mut self, others: Keys) -> Result<()> {
        others.keys.into_iter().try_for_each(|key| self.add(key))
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn ids(&self) -> impl Iterator<Item = KeyId> {
        self.keys.iter().map(|key| key.id)
    }

    /// Each key as the text of a file that minisign reads.
    pub fn texts(&self) -> Vec<String> {
        self.keys
            .iter()
            .map(|key| format!("untrusted comment: minisign public key {}\n{}\n", key.id, key.base64))
            .collect()
    }

    /// Writes each key that `directory` does not hold yet, as `<key id>.pub`.
    pub fn save_to(&self, directory: &Path) -> Result<()> {
        let held = Keys::load(directory)?;
        for (key, text) in self.keys.iter().zip(self.texts()) {
            if !held.keys.iter().any(|other| other.key == key.key) {
                fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
                let mut path = directory.join(format!("{}.pub", key.id));
                // Two keys may share an id, by intent of whoever made the second; neither takes the other's place.
                for n in 2.. {
                    if !path.exists() {
                        break;
                    }
                    path = directory.join(format!("{}-{n}.pub", key.id));
                }
                store::replace(&path, text.as_bytes(), Access::Public)?;
            }
        }
        Ok(())
    }

    pub(super) fn ensure_some(&self) -> Result<()> {
        ensure!(
            !self.is_empty(),
            "there is no trusted key{}: no package can be verified; give the gateway's public key with `--trusted-key FILE`",
            self.place()
        );
        Ok(())
    }

    /// ` in DIR`, where that is known.
    pub(super) fn place(&self) -> String {
        self.directory.as_ref().map(|directory| format!(" in {}", directory.display())).unwrap_or_default()
    }

    /// The keys with this id; nearly always one.
    pub(super) fn with_id(&self, id: KeyId) -> impl Iterator<Item = &PublicKey> {
        self.keys.iter().filter(move |key| key.id == id).map(|key| &key.key)
    }

    fn add(&mut self, key: Key) -> Result<()> {
        if self.keys.iter().any(|known| known.key == key.key) {
            return Ok(());
        }
        ensure!(self.keys.len() < MAX_KEYS, "cannot trust more than {MAX_KEYS} keys");
        self.keys.push(key);
        Ok(())
    }
}
