//! The public keys that packages are verified with: the trusted and the revoked ones.
//!
//! ```text
//! etc/keys/*.pub        keys of the operator and of the first installation
//! state/keys.json       brought:  keys added by the first installation, by a bootstrap and by signed packages of the manager
//!                       revoked:  keys revoked by signed packages of the manager
//! (the executable)      keys built in at build time
//!
//! in a package of the manager:
//!   keys/*.pub            keys to trust when the package is committed
//!   keys/revoked/*.pub    keys to reject permanently
//! ```
//!
//! A revoked key is rejected from every source (built in, in a bootstrap, in a later package) and under any id. A rollback does not undo a
//! revocation. One source overrides it: a key in an operator's own file in `etc/keys` stays trusted until the file is removed, with a
//! warning. A key in `etc/keys` is the operator's own unless it is listed as brought. The keys of a first installation are brought, also
//! those that were given for it: a revocation takes effect on every host of a fleet. In a home older than `state/keys.json`, every key counts
//! as brought.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::epochs::Epochs;
use super::{permissions, trust};
use crate::core::model::Version;
use crate::home::Home;
use crate::package::Keys;
use crate::package::keys::Key;
use crate::store::{self, UnknownJson};

/// More keys than are rotated in the life of a host.
const MAX_REVOKED: usize = 256;

/// `state/keys.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Keyring {
    #[serde(default)]
    brought: Vec<KeyEntry>,
    #[serde(default)]
    revoked: Vec<KeyEntry>,
    #[serde(flatten)]
    unknown: UnknownJson,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", try_from = "RawKeyEntry", into = "RawKeyEntry")]
struct KeyEntry {
    key: Key,
    /// The package or bootstrap that brought or revoked it, for display.
    by: String,
    unknown: UnknownJson,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawKeyEntry {
    /// In minisign's format, without the comment line.
    key: String,
    #[serde(default)]
    by: String,
    #[serde(flatten)]
    unknown: UnknownJson,
}

impl TryFrom<RawKeyEntry> for KeyEntry {
    type Error = String;

    fn try_from(raw: RawKeyEntry) -> Result<KeyEntry, String> {
        let keys = Keys::parse(&raw.key).map_err(|error| format!("{error:#}"))?;
        let key = keys.iter().next().ok_or("the entry has no key")?.clone();
        Ok(KeyEntry { key, by: raw.by, unknown: raw.unknown })
    }
}

impl From<KeyEntry> for RawKeyEntry {
    fn from(entry: KeyEntry) -> RawKeyEntry {
        RawKeyEntry { key: entry.key.base64().to_owned(), by: entry.by, unknown: entry.unknown }
    }
}

/// The keys that a package of the manager brings and revokes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyOffer {
    by: String,
    brought: Keys,
    revoked: Keys,
}

impl KeyOffer {
    /// Reads it from a verified and unpacked package of this version.
    pub fn read(tree: &Path, version: &Version) -> Result<KeyOffer> {
        let brought = Keys::load(&tree.join("keys")).context("cannot read the keys that the package brings")?;
        let revoked =
            Keys::load(&tree.join("keys/revoked")).context("cannot read the keys that the package revokes")?;
        KeyOffer::new(version, brought, revoked)
    }

    /// The offer of a package of this version. A key that is both brought and revoked is an error.
    pub fn new(version: &Version, brought: Keys, revoked: Keys) -> Result<KeyOffer> {
        if let Some(key) = brought.iter().find(|key| revoked.contains(key)) {
            bail!("cannot accept the keys of the package: it both brings and revokes the key {}", key.id());
        }
        Ok(KeyOffer { by: format!("aops-spm {version}"), brought, revoked })
    }

    /// The brought and the revoked keys as texts, for a record.
    pub fn texts(&self) -> (Vec<String>, Vec<String>) {
        (self.brought.texts(), self.revoked.texts())
    }

    /// The offer of a package of this version, from the texts in a record.
    pub fn of_texts(version: &Version, brought: &[String], revoked: &[String]) -> Result<KeyOffer> {
        let keys = |texts: &[String]| {
            texts.iter().try_fold(Keys::default(), |mut keys, text| {
                keys.extend(Keys::parse(text)?)?;
                Ok::<_, anyhow::Error>(keys)
            })
        };
        KeyOffer::new(version, keys(brought)?, keys(revoked)?)
    }
}

/// Applies the keys of a package of the manager that is being committed. Returns remarks for the operator.
pub fn apply_offer(home: &Home, offer: &KeyOffer) -> Result<Vec<String>> {
    let _lock = trust::lock(home)?;
    commit(home, offer)
}

/// The keys that packages are verified with on this host. Files that others can write to are rejected.
pub fn trusted(home: &Home) -> Result<Keys> {
    permissions::keys(home)?;
    Keyring::load(home)?.trusted(&Keys::load(&home.keys())?, &Keys::baked_in()?)
}

/// Installs the keys that the operator has `given`, those of a first installation or in the bootstrap (`carried`), and those of the manager's
/// package. Returns remarks for the operator. `keeps`: the keys of the existing installation are kept.
pub fn install(home: &Home, keeps: bool, given: &Keys, carried: &Keys, offer: &KeyOffer) -> Result<Vec<String>> {
    let _lock = trust::lock(home)?;
    let existing = if keeps { Some(Keyring::load(home)?) } else { None };
    if !keeps {
        // Files of a killed installation would count as the operator's.
        Keys::files(&home.keys())?.iter().try_for_each(|file| store::remove(file))?;
    }
    let (ring, accepted) = existing.clone().unwrap_or_default().installed(given, carried, &Keys::load(&home.keys())?);
    // In this order, a crash leaves no file of the bootstrap that is not listed as brought, and no key without both.
    given.save_to(&home.keys())?;
    ring.save_change(home, existing.as_ref())?;
    accepted.save_to(&home.keys())?;
    commit(home, offer)
}

/// Called after a failed installation, before the files in `etc/keys` are restored. Its revocations are kept, because a trusted key signed
/// them. The keys that packages and bootstraps brought are kept, too: without them, the host could be left without a trusted key. The keys
/// that the operator gave are removed with their files. `before`: the keyring before the installation.
pub fn keep_after_failure(home: &Home, before: &Keyring) -> Result<()> {
    let _lock = trust::lock(home)?;
    let ring = Keyring::load(home)?;
    let merged = ring.clone().merged(before);
    merged.save_change(home, Some(&ring))
}

/// Applies an offer; returns remarks for the operator. It may be repeated. The caller holds the trust lock.
fn commit(home: &Home, offer: &KeyOffer) -> Result<Vec<String>> {
    let existing = Keyring::load(home)?;
    let (ring, remarks) = existing.clone().after(offer, &Keys::load(&home.keys())?, &Keys::baked_in()?)?;
    // In this order, a crash leaves no file of a brought key that would count as the operator's.
    ring.save_change(home, Some(&existing))?;
    for file in Keys::files(&home.keys())? {
        if Keys::read(&file)?.iter().all(|key| ring.is_revoked(key) && ring.is_brought(key)) {
            store::remove(&file)?;
        }
    }
    ring.clone().without_revoked(&Keys::load(&home.keys())?).save_change(home, Some(&ring))?;
    Ok(remarks)
}

impl Keyring {
    /// The keyring of an existing home. A missing file is an error, because revoked keys would be trusted again, except in a home of an
    /// older version without a keyring.
    pub fn load(home: &Home) -> Result<Keyring> {
        let path = home.keyring();
        match store::load(&path)? {
            Some(ring) => Ok(ring),
            None if !Epochs::load(home)?.has_keyring() => Ok(Keyring::of_older_version(&Keys::load(&home.keys())?)),
            None => bail!(
                "cannot read {}: it is missing, and without it revoked keys would be trusted again; restore it from a backup, or \
                 install again with --fresh",
                path.display()
            ),
        }
    }

    /// An older version did not record the source of a key. It counts as brought, so that its revocation takes effect on every host of a
    /// fleet; an operator can give it again after that.
    fn of_older_version(etc: &Keys) -> Keyring {
        let mut ring = Keyring::default();
        for key in etc.iter() {
            ring.bring(key, "an earlier installation");
        }
        ring
    }

    /// Saves it unless it equals the one on the disk. A home of an older version has none yet.
    fn save_change(&self, home: &Home, existing: Option<&Keyring>) -> Result<()> {
        let is_same = existing == Some(self) && home.keyring().exists();
        if is_same { Ok(()) } else { self.save(home) }
    }

    fn save(&self, home: &Home) -> Result<()> {
        store::save(&home.keyring(), self)
    }

    /// The keyring after an installation with the keys that the operator has `given`, those in the bootstrap (`carried`) and those in
    /// `etc`; and the accepted ones of `carried`.
    pub fn installed(&self, given: &Keys, carried: &Keys, etc: &Keys) -> (Keyring, Keys) {
        let mut ring = self.clone();
        // A key that is given again before that keeps its source.
        ring.brought.retain(|entry| !given.contains(&entry.key) || !self.is_revoked(&entry.key));
        let accepted = carried.filtered(|key| !self.is_revoked(key) || given.contains(key));
        for key in accepted.iter().filter(|key| !etc.contains(key) && !given.contains(key)) {
            ring.bring(key, "the installation");
        }
        (ring, accepted)
    }

    /// The trusted keys: of the files in `etc`, of the built-in ones and of the brought ones.
    pub fn trusted(&self, etc: &Keys, baked: &Keys) -> Result<Keys> {
        let mut keys = etc.filtered(|key| !self.is_revoked(key) || !self.is_brought(key));
        keys.extend(baked.filtered(|key| !self.is_revoked(key)))?;
        let brought = self.brought.iter().filter(|entry| !self.is_revoked(&entry.key));
        brought.map(|entry| entry.key.clone()).try_for_each(|key| keys.trust(key))?;
        Ok(keys.with_revoked(self.revoked.iter().map(|entry| (entry.key.id(), entry.by.clone())).collect()))
    }

    /// A warning for each revoked key that is trusted because the operator has a file of it in `etc`.
    pub fn overruled(&self, etc: &Keys) -> Vec<String> {
        let overruled = self.revoked.iter().filter(|entry| etc.contains(&entry.key) && !self.is_brought(&entry.key));
        overruled.map(|entry| {
            format!(
                "the key {} was revoked by {}, but is still trusted, because your own file of it is in etc/keys; remove its file",
                entry.key.id(),
                entry.by
            )
        })
        .collect()
    }

    /// A line for each brought and each revoked key, with its source.
    pub fn described(&self) -> impl Iterator<Item = String> {
        let brought =
            self.brought.iter().map(|entry| format!("trusted key {} (brought by {})", entry.key.id(), entry.by));
        brought.chain(self.revoked.iter().map(|entry| format!("revoked key {} (by {})", entry.key.id(), entry.by)))
    }

    /// The keyring after an offer, and remarks for the operator.
    fn after(&self, offer: &KeyOffer, etc: &Keys, baked: &Keys) -> Result<(Keyring, Vec<String>)> {
        let (mut ring, mut remarks) = (self.clone(), Vec::new());
        let by = &offer.by;
        for key in offer.revoked.iter().filter(|key| !self.is_revoked(key)) {
            ring.revoked.push(KeyEntry { key: key.clone(), by: by.clone(), unknown: UnknownJson::default() });
            remarks.push(format!("{by} revokes the key {}", key.id()));
        }
        for key in offer.brought.iter() {
            if ring.is_revoked(key) {
                remarks.push(format!("{by} brings the key {}, which stays revoked", key.id()));
            } else if !etc.contains(key) && ring.bring(key, by) {
                remarks.push(format!("{by} brings the key {}, which is trusted from now on", key.id()));
            }
        }
        ensure!(
            ring.revoked.len() <= MAX_REVOKED,
            "cannot accept the keys of {by}: more than {MAX_REVOKED} keys would be revoked"
        );
        let trusted = ring.trusted(etc, baked).with_context(|| format!("cannot accept the keys of {by}"))?;
        ensure!(
            offer.revoked.is_empty() || !trusted.is_empty(),
            "cannot accept the keys of {by}: it revokes every key that this host trusts, so no later release could be verified"
        );
        remarks.extend(ring.overruled(etc).into_iter().filter(|remark| !self.overruled(etc).contains(remark)));
        Ok((ring, remarks))
    }

    /// Checks an offer before it is staged: fails if its commit would fail.
    pub fn examine(&self, offer: &KeyOffer, etc: &Keys) -> Result<()> {
        self.after(offer, etc, &Keys::baked_in()?).map(drop)
    }

    /// Drops the brought keys that are revoked and have no file: a file that is created later is the operator's.
    fn without_revoked(mut self, etc: &Keys) -> Keyring {
        let revoked: Vec<Key> = self.revoked.iter().map(|entry| entry.key.clone()).collect();
        let is_revoked = |key: &Key| revoked.iter().any(|other| other.is_same(key));
        self.brought.retain(|entry| !is_revoked(&entry.key) || etc.contains(&entry.key));
        self
    }

    /// The entries of both keyrings.
    fn merged(mut self, other: &Keyring) -> Keyring {
        for entry in &other.brought {
            if !self.is_brought(&entry.key) {
                self.brought.push(entry.clone());
            }
        }
        for entry in &other.revoked {
            if !self.is_revoked(&entry.key) {
                self.revoked.push(entry.clone());
            }
        }
        self
    }

    /// Adds a brought key; `false`: it is listed already.
    fn bring(&mut self, key: &Key, by: &str) -> bool {
        if self.is_brought(key) {
            return false;
        }
        self.brought.push(KeyEntry { key: key.clone(), by: by.to_owned(), unknown: UnknownJson::default() });
        true
    }

    fn is_brought(&self, key: &Key) -> bool {
        self.brought.iter().any(|entry| entry.key.is_same(key))
    }

    /// Whether a package has revoked this key.
    pub fn is_revoked(&self, key: &Key) -> bool {
        self.revoked.iter().any(|entry| entry.key.is_same(key))
    }
}

#[cfg(test)]
mod tests;
