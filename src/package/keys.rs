//! The public keys that packages are verified with: minisign keys, as in `etc/keys/*.pub`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use minisign_verify::PublicKey;
use serde::{Deserialize, Serialize};

use crate::store::{self, Access};

/// Larger key files are rejected; minisign's have 114 bytes.
const MAX_KEY_FILE_BYTES: u64 = 64 << 10;
/// More keys than any rotation needs.
const MAX_KEYS: usize = 64;

/// Offset of the point in a key's bytes, after the algorithm and the id.
const POINT_AT: usize = 10;
const POINT_BYTES: usize = 32;

/// The id of a minisign key, shown as minisign shows it: 16 hexadecimal digits.
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

/// The key id in a signature or public key, in minisign's base64: eight bytes after the two of the algorithm.
pub(super) fn key_id(base64: &str) -> Option<KeyId> {
    let bytes = BASE64_STANDARD.decode(base64.trim()).ok()?;
    Some(KeyId(bytes.get(2..10)?.try_into().ok()?))
}

/// Whether a signature, in minisign's base64, is over the hash of its file: `ED`; the legacy format has `Ed`.
pub(super) fn is_prehashed(base64: &str) -> Option<bool> {
    Some(BASE64_STANDARD.decode(base64.trim()).ok()?.get(..2)? == b"ED")
}

/// One public key, stored as its line of the minisign file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key {
    id: KeyId,
    base64: String,
    key: PublicKey,
    /// The curve point without the id; the id is chosen by the creator of the key.
    point: [u8; POINT_BYTES],
}

impl Key {
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The key as its line of the minisign file.
    pub fn base64(&self) -> &str {
        &self.base64
    }

    /// Whether both are the same key; their ids may differ.
    pub fn is_same(&self, other: &Key) -> bool {
        self.point == other.point
    }

    /// The key that verifies signatures.
    pub(super) fn public(&self) -> &PublicKey {
        &self.key
    }

    fn parse(line: &str) -> Option<Key> {
        let bytes = BASE64_STANDARD.decode(line).ok()?;
        let point = bytes.get(POINT_AT..)?.try_into().ok()?;
        Some(Key { id: key_id(line)?, base64: line.to_owned(), key: PublicKey::from_base64(line).ok()?, point })
    }
}

impl TryFrom<String> for Key {
    type Error = String;

    fn try_from(line: String) -> Result<Key, String> {
        Key::parse(&line).ok_or_else(|| {
            let shown: String = line.chars().take(60).collect();
            format!("{shown:?} is not a minisign public key")
        })
    }
}

impl From<Key> for String {
    fn from(key: Key) -> String {
        key.base64
    }
}

/// A set of trusted keys without duplicates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keys {
    keys: Vec<Key>,
    /// For error messages: where to add a key.
    directory: Option<PathBuf>,
    /// For error messages: revoked keys, and what revoked each.
    revoked: Vec<(KeyId, String)>,
}

impl Keys {
    /// Loads all `*.pub` of a directory; empty if the directory does not exist. A file that holds no key is an error.
    pub fn load(directory: &Path) -> Result<Keys> {
        let mut keys = Keys { directory: Some(directory.to_owned()), ..Keys::default() };
        for path in Keys::files(directory)? {
            keys.extend(Keys::read(&path)?)?;
        }
        Ok(keys)
    }

    /// All `*.pub` of a directory, sorted by name; empty if the directory does not exist.
    pub fn files(directory: &Path) -> Result<Vec<PathBuf>> {
        let attempt = || -> std::io::Result<Vec<PathBuf>> {
            let mut paths = Vec::new();
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "pub") {
                    paths.push(path);
                }
            }
            paths.sort();
            Ok(paths)
        };
        match attempt() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other.with_context(|| format!("cannot list {}", directory.display())),
        }
    }

    /// Loads the keys of one file.
    pub fn read(path: &Path) -> Result<Keys> {
        let attempt = || -> Result<Keys> {
            let text = store::read(path, MAX_KEY_FILE_BYTES)?.context("the file does not exist")?;
            let keys = Keys::parse(std::str::from_utf8(&text).context("it is not a text file")?)?;
            ensure!(!keys.is_empty(), "it contains no key");
            Ok(keys)
        };
        attempt().with_context(|| format!("cannot use {} as a trusted key", path.display()))
    }

    /// Parses one or more keys in minisign's format, with or without comment lines.
    pub fn parse(text: &str) -> Result<Keys> {
        let mut keys = Keys::default();
        for line in text.split(['\n', ',']).map(str::trim) {
            if line.is_empty() || line.starts_with("untrusted comment:") {
                continue;
            }
            let key = Key::parse(line).with_context(|| {
                let shown: String = line.chars().take(60).collect();
                format!("{shown:?} is not a minisign public key: expected a line of base64 that starts with RW")
            })?;
            keys.trust(key)?;
        }
        Ok(keys)
    }

    /// The keys that this executable was built with (`AOPS_TRUSTED_KEYS` at build time).
    pub fn baked_in() -> Result<Keys> {
        Keys::parse(option_env!("AOPS_TRUSTED_KEYS").unwrap_or_default())
    }

    /// Adds the keys of `others`.
    pub fn extend(&mut self, others: Keys) -> Result<()> {
        others.keys.into_iter().try_for_each(|key| self.trust(key))
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Key> {
        self.keys.iter()
    }

    /// Whether the set contains this key; ids may differ.
    pub fn contains(&self, key: &Key) -> bool {
        self.keys.iter().any(|known| known.is_same(key))
    }

    /// The keys for which `keep` returns true.
    #[must_use]
    pub fn filtered(&self, keep: impl Fn(&Key) -> bool) -> Keys {
        let keys = self.keys.iter().filter(|key| keep(key)).cloned().collect();
        Keys { keys, directory: self.directory.clone(), revoked: self.revoked.clone() }
    }

    /// Adds the list of revoked keys, for error messages.
    #[must_use]
    pub fn with_revoked(self, revoked: Vec<(KeyId, String)>) -> Keys {
        Keys { revoked, ..self }
    }

    /// What revoked the key with this id, if it was revoked.
    pub(super) fn revoked_by(&self, id: KeyId) -> Option<&str> {
        self.revoked.iter().find(|(revoked, _)| *revoked == id).map(|(_, by)| by.as_str())
    }

    pub fn ids(&self) -> impl Iterator<Item = KeyId> {
        self.keys.iter().map(|key| key.id)
    }

    /// Each key as the text of a minisign key file.
    pub fn texts(&self) -> Vec<String> {
        self.keys
            .iter()
            .map(|key| format!("untrusted comment: minisign public key {}\n{}\n", key.id, key.base64))
            .collect()
    }

    /// Writes each key that `directory` does not contain yet, as `<key id>.pub`.
    pub fn save_to(&self, directory: &Path) -> Result<()> {
        let existing = Keys::load(directory)?;
        for (key, text) in self.keys.iter().zip(self.texts()) {
            if !existing.keys.iter().any(|other| other.key == key.key) {
                fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
                let mut path = directory.join(format!("{}.pub", key.id));
                // Two keys may share an id, even on purpose; neither replaces the other.
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

    pub(super) fn ensure_not_empty(&self) -> Result<()> {
        ensure!(
            !self.is_empty(),
            "there is no trusted key{}, so no package can be verified; give the gateway's public key with `--trusted-key FILE`",
            self.location_suffix()
        );
        Ok(())
    }

    /// ` in DIR`, if the directory is known.
    pub(super) fn location_suffix(&self) -> String {
        self.directory.as_ref().map(|directory| format!(" in {}", directory.display())).unwrap_or_default()
    }

    /// The keys with this id; nearly always one.
    pub(super) fn with_id(&self, id: KeyId) -> impl Iterator<Item = &Key> {
        self.keys.iter().filter(move |key| key.id == id)
    }

    /// Adds a key.
    pub fn trust(&mut self, key: Key) -> Result<()> {
        if self.keys.iter().any(|known| known.key == key.key) {
            return Ok(());
        }
        ensure!(self.keys.len() < MAX_KEYS, "cannot trust more than {MAX_KEYS} keys");
        self.keys.push(key);
        Ok(())
    }
}
