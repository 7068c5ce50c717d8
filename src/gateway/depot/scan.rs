//! The scan that keeps the index true: every file is hashed and its signature verified once, and again only when it has changed.
//!
//! Publishing renames whole files into the depot, but operators also copy into it: so a file counts only when two looks have found it the same.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::{DepotFile, FileStamp, Index, signature_path};
use crate::gateway::keyring::DepotKeys;
use crate::gateway::{GatewayDirectory, bootstrap};
use crate::package::{self, Keys, MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX, SignatureStatus};
use crate::store;

/// More files than this in a depot are not looked at.
const MAX_FILES: usize = 20_000;

/// What one look at a directory saw: the stamp of every file.
type DirectoryListing = BTreeMap<String, FileStamp>;

/// Looks at the depot and its keys again and again. What cannot be read stays as it was, and is a problem of its part alone.
pub(in crate::gateway) struct Scanner {
    place: GatewayDirectory,
    last: DirectoryListing,
    /// What the index was made of: the files, and the keys by which they were judged.
    indexed: Option<(DirectoryListing, Keys)>,
    judged: BTreeMap<String, CheckedFile>,
    /// Why the depot cannot be looked at.
    unreadable: Option<String>,
    keys: WatchedKeys,
}

/// What was found out about a file, valid for these stamps of it, of its signature and of the keys.
struct CheckedFile {
    stamps: (FileStamp, Option<FileStamp>),
    outcome: Result<Arc<DepotFile>, String>,
}

/// The keys that were read last, and what they were read from.
#[derive(Default)]
struct WatchedKeys {
    last: DirectoryListing,
    read: Option<DirectoryListing>,
    ring: DepotKeys,
    /// Why the directory cannot be looked at.
    unreadable: Option<String>,
}

impl WatchedKeys {
    fn look(&mut self, place: &GatewayDirectory, at_once: bool) {
        let attempt = || -> Result<(DirectoryListing, bool)> {
            let look = see(&place.keys(), |name| name.ends_with(".pub"))?;
            let is_new = self.read.as_ref() != Some(&look) && (at_once || look == self.last);
            Ok((look, is_new))
        };
        let outcome = attempt().and_then(|(look, is_new)| {
            if is_new {
                self.ring = DepotKeys::read(place)?;
                self.read = Some(look.clone());
            }
            Ok(look)
        });
        self.unreadable = match outcome {
            Ok(look) => {
                self.last = look;
                None
            }
            Err(error) => Some(format!("the keys read before stay in use: {error:#}")),
        };
    }
}

impl Scanner {
    pub(in crate::gateway) fn new(place: GatewayDirectory) -> Scanner {
        let (last, indexed, judged, unreadable) = (DirectoryListing::new(), None, BTreeMap::new(), None);
        Scanner { place, last, indexed, judged, unreadable, keys: WatchedKeys::default() }
    }

    /// Looks once; a new index where something has changed and stood still since the last look (or at all, if `at_once`).
    pub(in crate::gateway) fn look(&mut self, at_once: bool) -> Option<Arc<Index>> {
        self.keys.look(&self.place, at_once);
        let look = match see(&self.place.depot(), |_| true) {
            Ok(look) => look,
            Err(error) => {
                self.unreadable = Some(format!("what was offered before stays on offer: {error:#}"));
                return None;
            }
        };
        self.unreadable = None;
        let settled = at_once || look == self.last;
        self.last = look;
        let keys = self.keys.ring.keys();
        let is_known = |(files, by): &(DirectoryListing, Keys)| *files == self.last && by == keys;
        if !settled || self.indexed.as_ref().is_some_and(is_known) {
            return None;
        }
        if self.indexed.as_ref().is_none_or(|(_, by)| by != keys) {
            self.judged.clear();
        }
        let keys = keys.clone();
        let index = self.index(&keys);
        self.indexed = Some((self.last.clone(), keys));
        Some(Arc::new(index))
    }

    /// Why the depot cannot be looked at now.
    pub(in crate::gateway) fn unreadable(&self) -> Option<&str> {
        self.unreadable.as_deref()
    }

    /// What is wrong with the keys.
    pub(in crate::gateway) fn problems_of_keys(&self) -> impl Iterator<Item = &String> {
        self.keys.unreadable.iter().chain(self.keys.ring.problems())
    }

    fn index(&mut self, keys: &Keys) -> Index {
        let mut judged = BTreeMap::new();
        for (name, stamp) in self.last.iter().filter(|(name, _)| !name.ends_with(SIGNATURE_SUFFIX)) {
            let stamps = (*stamp, self.last.get(&format!("{name}{SIGNATURE_SUFFIX}")).copied());
            let known = self.judged.remove(name).filter(|known| known.stamps == stamps);
            let fresh = known.is_none();
            let known = known.unwrap_or_else(|| {
                let outcome = judge(&self.place.depot().join(name), name, stamps.0, keys).map(|(item, _)| item);
                CheckedFile { stamps, outcome: outcome.map(Arc::new).map_err(|error| format!("{error:#}")) }
            });
            if let (true, Err(reason)) = (fresh, &known.outcome) {
                tracing::warn!(file = %name, %reason, "a file of the depot is not offered");
            }
            judged.insert(name.clone(), known);
        }
        self.judged = judged;
        let items = self.judged.values().filter_map(|known| known.outcome.as_ref().ok().cloned()).collect();
        let problems =
            self.judged.iter().filter_map(|(name, known)| Some((name.clone(), known.outcome.as_ref().err()?.clone())));
        Index::new(items, problems.collect())
    }
}

/// The files of a directory whose names `counts` takes.
fn see(directory: &Path, counts: impl Fn(&str) -> bool) -> Result<DirectoryListing> {
    let attempt = || -> Result<DirectoryListing> {
        let mut look = DirectoryListing::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with('.') || !counts(&name) {
                continue;
            }
            if look.len() >= MAX_FILES {
                bail!("it holds more than {MAX_FILES} files; remove those that no host needs");
            }
            // Links are followed: an operator may keep the packages elsewhere. One that went away meanwhile is not there.
            let Ok(metadata) = fs::metadata(entry.path()) else { continue };
            if metadata.is_file() {
                look.insert(name, FileStamp::of(&metadata));
            }
        }
        Ok(look)
    };
    attempt().with_context(|| format!("cannot read the directory {}", directory.display()))
}

/// What a gateway makes of a file of its depot: whether its signer is known, or why the file is not offered.
pub(in crate::gateway) fn offered(
    place: &GatewayDirectory,
    name: &str,
    keys: &Keys,
) -> Result<Option<SignatureStatus>> {
    let look = see(&place.depot(), |_| true)?;
    let stamp = look.get(name).context("it is not in the depot")?;
    judge(&place.depot().join(name), name, *stamp, keys).map(|(_, verdict)| verdict)
}

/// The file as it is offered, and by whom it is signed; a bootstrap has no signature of its own.
fn judge(path: &Path, name: &str, stamp: FileStamp, keys: &Keys) -> Result<(DepotFile, Option<SignatureStatus>)> {
    let mut file = File::open(path)?;
    if FileStamp::of(&file.metadata()?) != stamp {
        bail!("it has changed while it was looked at");
    }
    if bootstrap::is_file_name(name) {
        let sha256 = package::sha256_of(&mut file)?;
        let (name, path) = (name.to_owned(), path.to_owned());
        return Ok((DepotFile { name, path, stamp, sha256, binding: None, signature: None }, None));
    }
    let Some(bytes) = store::read(&signature_path(path), MAX_SIGNATURE_BYTES)? else {
        bail!("it has no signature; put it there with `aops gateway publish`");
    };
    let text = String::from_utf8(bytes).context("its signature is no text")?;
    let binding = package::binding_of(&text).context("cannot read its signature")?;
    if binding.release.packing_of(name).is_none() {
        bail!("its signature says that it is {}", binding.release);
    }
    let (verdict, sha256) = package::check_signature(&mut file, &text, keys)?;
    match &verdict {
        SignatureStatus::Good => {}
        SignatureStatus::UnknownKey => {
            tracing::warn!(file = %name, "a package is offered though none of our keys made its signature")
        }
        SignatureStatus::Bad(why) => bail!("its signature is not of these bytes: {why}"),
    }
    let (name, path) = (name.to_owned(), path.to_owned());
    let item = DepotFile { name, path, stamp, sha256, binding: Some(binding), signature: Some(text.into()) };
    Ok((item, Some(verdict)))
}
