//! By which public keys packages are trusted, whoever brought them, and which of them were revoked.
//!
//! ```text
//! etc/keys/*.pub        the operator's, and those of the bootstrap executable
//! state/keys.json       brought:  keys that the bootstrap and signed packages of the manager brought
//!                       revoked:  keys that signed packages of the manager withdrew
//! (the executable)      keys baked in at build time
//!
//! in a package of the manager:
//!   keys/*.pub            keys to be trusted from its commit on
//!   keys/revoked/*.pub    keys to be trusted no more, for good
//! ```
//!
//! A revoked key is refused wherever it comes from, be it baked in, carried by a bootstrap or brought by a later package, and whatever id
//! it goes by; a roll back does not take a revocation back. Only an operator's own file in `etc/keys` counts for more: such a key stays
//! trusted until its file is removed, which is told. That a key in `etc/keys` is not the operator's own shows by its being among those brought.
//! A home that was made before there was `state/keys.json` cannot say it, and counts as having been brought all of them.

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

/// More than anybody rotates through in a host's life.
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
#[serde(rename_all = "camelCase", try_from = "RawKeyring", into = "RawKeyring")]
struct KeyEntry {
    key: Key,
    /// What brought or revoked it, for a person to read.
    by: String,
    unknown: UnknownJson,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawKeyring {
    /// As minisign writes it, without comment.
    key: String,
    #[serde(default)]
    by: String,
    #[serde(flatten)]
    unknown: UnknownJson,
}

impl TryFrom<RawKeyring> for KeyEntry {
    type Error = String;

    fn try_from(written: RawKeyring) -> Result<KeyEntry, String> {
        let keys = Keys::parse(&written.key).map_err(|error| format!("{error:#}"))?;
        let key = keys.iter().next().ok_or("there is no key in it")?.clone();
        Ok(KeyEntry { key, by: written.by, unknown: written.unknown })
    }
}

impl From<KeyEntry> for RawKeyring {
    fn from(entry: KeyEntry) -> RawKeyring {
        RawKeyring { key: entry.key.base64().to_owned(), by: entry.by, unknown: entry.unknown }
    }
}

/// What a package of the manager says about keys.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyOffer {
    by: String,
    brought: Keys,
    revoked: Keys,
}

impl KeyOffer {
    /// Reads it from a verified and unpacked package of this version.
    pub fn read(tree: &Path, version: &Version) -> Result<KeyOffer> {
        let brought = Keys::load(&tree.join("keys")).context("cannot take the keys that the package brings")?;
        let revoked =
            Keys::load(&tree.join("keys/revoked")).context("cannot take the keys that the package revokes")?;
        KeyOffer::new(version, brought, revoked)
    }

    /// Of a package of this version, which may not contradict itself.
    pub fn new(version: &Version, brought: Keys, revoked: Keys) -> Result<KeyOffer> {
        if let Some(key) = brought.iter().find(|key| revoked.contains(key)) {
            bail!("cannot take the keys of the package: it both brings and revokes the key {}", key.id());
        }
        Ok(KeyOffer { by: format!("aops-spm {version}"), brought, revoked })
    }

    /// What a record keeps of it: the keys that are brought, and those that are revoked.
    pub fn texts(&self) -> (Vec<String>, Vec<String>) {
        (self.brought.texts(), self.revoked.texts())
    }

    /// What a record kept of the offer of a package of this version.
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

/// Takes over what a package of the manager says about keys that is committed beside whoever else changes what the host trusts.
pub fn take_over(home: &Home, offer: &KeyOffer) -> Result<Vec<String>> {
    let _lock = trust::lock(home)?;
    commit(home, offer)
}

/// The keys by which packages are verified on this host. Files that others can write are refused.
pub fn trusted(home: &Home) -> Result<Keys> {
    permissions::keys(home)?;
    Keyring::load(home)?.trusted(&Keys::load(&home.keys())?, &Keys::baked_in()?)
}

/// Takes over the keys of an installation: those that the operator has `given`, those that the bootstrap `carried`, and what the manager's
/// package says about keys; answers what an operator should hear of that. Of a home that `stands` all else is kept.
pub fn install(home: &Home, stands: bool, given: &Keys, carried: &Keys, offer: &KeyOffer) -> Result<Vec<String>> {
    let _lock = trust::lock(home)?;
    let standing = if stands { Keyring::load(home)? } else { Keyring::default() };
    if !stands {
        // One that was killed left them: by nothing that is known would they be the operator's.
        Keys::files(&home.keys())?.iter().try_for_each(|file| store::remove(file))?;
    }
    let (ring, accepted) = standing.installed(given, carried, &Keys::load(&home.keys())?);
    // A key is never without its file or its entry; and a file is never there before it is known that the bootstrap brought it.
    given.save_to(&home.keys())?;
    ring.save(home)?;
    accepted.save_to(&home.keys())?;
    commit(home, offer)
}

/// Before the files in `etc/keys` are put back as they were `before` an installation that failed: what it revoked stays so, for the signed
/// word of a trusted key says so, and so do the keys that packages and bootstraps brought, for without them a host could be left that
/// trusts nobody. What the operator gave goes with its file.
pub fn keep_after_failure(home: &Home, before: &Keyring) -> Result<()> {
    let _lock = trust::lock(home)?;
    let ring = Keyring::load(home)?;
    let joined = ring.clone().joined(before);
    if joined == ring { Ok(()) } else { joined.save(home) }
}

/// Takes over what a package of the manager says about keys, whose release is being committed; answers what an operator should hear of.
/// It may be repeated. The caller holds the lock of what the host trusts.
fn commit(home: &Home, offer: &KeyOffer) -> Result<Vec<String>> {
    let (ring, remarks) = Keyring::load(home)?.after(offer, &Keys::load(&home.keys())?, &Keys::baked_in()?)?;
    // First it is refused; then its file goes, which would be the operator's if nothing said that it was brought.
    ring.save(home)?;
    for file in Keys::files(&home.keys())? {
        if Keys::read(&file)?.iter().all(|key| ring.is_revoked(key) && ring.is_brought(key)) {
            store::remove(&file)?;
        }
    }
    ring.settled(&Keys::load(&home.keys())?).save(home)?;
    Ok(remarks)
}

impl Keyring {
    /// The keys of a standing home. That they are missing is an error, but for one from before they were kept: what was revoked would be
    /// trusted again.
    pub fn load(home: &Home) -> Result<Keyring> {
        let path = home.keyring();
        match store::load(&path)? {
            Some(ring) => Ok(ring),
            None if !Epochs::load(home)?.has_keyring() => Ok(Keyring::of_before(&Keys::load(&home.keys())?)),
            None => bail!(
                "cannot read {}: it is missing, and without it keys that were revoked would be trusted again; bring it back \
                 from a backup, or install again with --fresh",
                path.display()
            ),
        }
    }

    /// Nobody noted then who put a key there. It counts as brought: that it was compromised, and so is revoked, must hold on every host of
    /// a fleet; whoever does not agree gives it again.
    fn of_before(etc: &Keys) -> Keyring {
        let mut ring = Keyring::default();
        for key in etc.iter() {
            ring.bring(key, "an earlier installation");
        }
        ring
    }

    fn save(&self, home: &Home) -> Result<()> {
        store::save(&home.keyring(), self)
    }

    /// After an installation that was given `given` by the operator and `carried` by the bootstrap, over the keys in `etc`: it also answers
    /// what of `carried` is trusted.
    pub fn installed(&self, given: &Keys, carried: &Keys, etc: &Keys) -> (Keyring, Keys) {
        let mut ring = self.clone();
        ring.brought.retain(|entry| !given.contains(&entry.key));
        let accepted = carried.filtered(|key| !self.is_revoked(key) || given.contains(key));
        for key in accepted.iter().filter(|key| !etc.contains(key) && !given.contains(key)) {
            ring.bring(key, "the bootstrap");
        }
        (ring, accepted)
    }

    /// The keys that count, of the files in `etc`, those baked in and those brought.
    pub fn trusted(&self, etc: &Keys, baked: &Keys) -> Result<Keys> {
        let mut keys = etc.filtered(|key| !self.is_revoked(key) || !self.is_brought(key));
        keys.extend(baked.filtered(|key| !self.is_revoked(key)))?;
        let brought = self.brought.iter().filter(|entry| !self.is_revoked(&entry.key));
        brought.map(|entry| entry.key.clone()).try_for_each(|key| keys.trust(key))?;
        Ok(keys.with_revoked(self.revoked.iter().map(|entry| (entry.key.id(), entry.by.clone())).collect()))
    }

    /// The revoked keys that are trusted all the same, for a file of the operator's is in `etc`.
    pub fn overruled(&self, etc: &Keys) -> Vec<String> {
        let held = self.revoked.iter().filter(|entry| etc.contains(&entry.key) && !self.is_brought(&entry.key));
        held.map(|entry| {
            format!(
                "the key {} was revoked by {}, and is trusted all the same, for it lies in etc/keys as your own; remove its file there",
                entry.key.id(),
                entry.by
            )
        })
        .collect()
    }

    /// What was brought and what revoked, and by what, for a person to read.
    pub fn described(&self) -> impl Iterator<Item = String> {
        let brought =
            self.brought.iter().map(|entry| format!("trusted key {} (brought by {})", entry.key.id(), entry.by));
        brought.chain(self.revoked.iter().map(|entry| format!("revoked key {} (by {})", entry.key.id(), entry.by)))
    }

    /// What follows from an offer, and what an operator should hear of.
    fn after(&self, offer: &KeyOffer, etc: &Keys, baked: &Keys) -> Result<(Keyring, Vec<String>)> {
        let (mut ring, mut remarks) = (self.clone(), Vec::new());
        let by = &offer.by;
        for key in offer.revoked.iter().filter(|key| !self.is_revoked(key)) {
            ring.revoked.push(KeyEntry { key: key.clone(), by: by.clone(), unknown: UnknownJson::default() });
            remarks.push(format!("{by} revokes the key {}", key.id()));
        }
        for key in offer.brought.iter() {
            if ring.is_revoked(key) {
                remarks.push(format!("{by} brings the key {}, which was revoked and stays so", key.id()));
            } else if !etc.contains(key) && ring.bring(key, by) {
                remarks.push(format!("{by} brings the key {}, which is trusted from now on", key.id()));
            }
        }
        ensure!(
            ring.revoked.len() <= MAX_REVOKED,
            "cannot take the keys of {by}: more than {MAX_REVOKED} would be revoked"
        );
        let trusted = ring.trusted(etc, baked).with_context(|| format!("cannot take the keys of {by}"))?;
        ensure!(
            offer.revoked.is_empty() || !trusted.is_empty(),
            "cannot take the keys of {by}: it revokes every key that is trusted here, and no release could follow it"
        );
        remarks.extend(ring.overruled(etc).into_iter().filter(|remark| !self.overruled(etc).contains(remark)));
        Ok((ring, remarks))
    }

    /// What would follow from an offer is refused here as it would be when it is committed.
    pub fn examine(&self, offer: &KeyOffer, etc: &Keys) -> Result<()> {
        self.after(offer, etc, &Keys::baked_in()?).map(drop)
    }

    /// Of a revoked key it need not be known any more that it was brought, once no file of it is left: one that comes is the operator's.
    fn settled(mut self, etc: &Keys) -> Keyring {
        let revoked: Vec<Key> = self.revoked.iter().map(|entry| entry.key.clone()).collect();
        let is_revoked = |key: &Key| revoked.iter().any(|other| other.is_same(key));
        self.brought.retain(|entry| !is_revoked(&entry.key) || etc.contains(&entry.key));
        self
    }

    /// With all that is in either.
    fn joined(mut self, other: &Keyring) -> Keyring {
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

    /// Whether that is news.
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

    fn is_revoked(&self, key: &Key) -> bool {
        self.revoked.iter().any(|entry| entry.key.is_same(key))
    }
}

#[cfg(test)]
mod tests;
