//! The scan that updates the index: it hashes every file and verifies its signature once, and again only when the file has changed.
//!
//! `publish` renames complete files into the depot, but operators also copy files there. So a file is read only when two scans have found it
//! unchanged.

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

/// More files than this in a directory are an error.
const MAX_FILES: usize = 20_000;

/// The stamps of all files of a directory, by name.
type DirectoryListing = BTreeMap<String, FileStamp>;

/// Scans the depot and its keys. If a directory cannot be read, its last content stays in use, and the problem is reported.
pub(in crate::gateway) struct Scanner {
    directory: GatewayDirectory,
    last: DirectoryListing,
    /// The source of the current index: the files, and the keys that their signatures were verified with.
    indexed: Option<(DirectoryListing, Keys)>,
    checked: BTreeMap<String, CheckedFile>,
    /// Why the depot cannot be read.
    unreadable: Option<String>,
    keys: WatchedKeys,
}

/// The result of checking a file; valid while the file and its signature have these stamps.
struct CheckedFile {
    stamps: (FileStamp, Option<FileStamp>),
    outcome: Result<Arc<DepotFile>, String>,
}

/// The keys that were read last, and the files that they were read from.
#[derive(Default)]
struct WatchedKeys {
    last: DirectoryListing,
    read: Option<DirectoryListing>,
    current: DepotKeys,
    /// Why the directory cannot be read.
    unreadable: Option<String>,
}

impl WatchedKeys {
    fn scan(&mut self, directory: &GatewayDirectory, at_once: bool) {
        let attempt = || -> Result<(DirectoryListing, bool)> {
            let listing = list(&directory.keys(), |name| name.ends_with(".pub"))?;
            let is_new = self.read.as_ref() != Some(&listing) && (at_once || listing == self.last);
            Ok((listing, is_new))
        };
        let outcome = attempt().and_then(|(listing, is_new)| {
            if is_new {
                self.current = DepotKeys::read(directory)?;
                self.read = Some(listing.clone());
            }
            Ok(listing)
        });
        self.unreadable = match outcome {
            Ok(listing) => {
                self.last = listing;
                None
            }
            Err(error) => Some(format!("{error:#}; the previous keys stay in use")),
        };
    }
}

impl Scanner {
    pub(in crate::gateway) fn new(directory: GatewayDirectory) -> Scanner {
        let (last, indexed, checked, unreadable) = (DirectoryListing::new(), None, BTreeMap::new(), None);
        Scanner { directory, last, indexed, checked, unreadable, keys: WatchedKeys::default() }
    }

    /// Scans once. Returns a new index if something has changed, and is unchanged since the last scan unless `at_once` is set.
    pub(in crate::gateway) fn scan(&mut self, at_once: bool) -> Option<Arc<Index>> {
        self.keys.scan(&self.directory, at_once);
        let listing = match list(&self.directory.depot(), |_| true) {
            Ok(listing) => listing,
            Err(error) => {
                self.unreadable = Some(format!("{error:#}; the previous packages stay on offer"));
                return None;
            }
        };
        self.unreadable = None;
        let settled = at_once || listing == self.last;
        self.last = listing;
        let keys = self.keys.current.keys();
        let is_known = |(files, by): &(DirectoryListing, Keys)| *files == self.last && by == keys;
        if !settled || self.indexed.as_ref().is_some_and(is_known) {
            return None;
        }
        if self.indexed.as_ref().is_none_or(|(_, by)| by != keys) {
            self.checked.clear();
        }
        let keys = keys.clone();
        let index = self.index(&keys);
        self.indexed = Some((self.last.clone(), keys));
        Some(Arc::new(index))
    }

    /// Why the depot cannot be read, if it cannot.
    pub(in crate::gateway) fn unreadable(&self) -> Option<&str> {
        self.unreadable.as_deref()
    }

    /// The problems of `keys/`.
    pub(in crate::gateway) fn key_problems(&self) -> impl Iterator<Item = &String> {
        self.keys.unreadable.iter().chain(self.keys.current.problems())
    }

    fn index(&mut self, keys: &Keys) -> Index {
        let mut checked = BTreeMap::new();
        for (name, stamp) in self.last.iter().filter(|(name, _)| !name.ends_with(SIGNATURE_SUFFIX)) {
            let stamps = (*stamp, self.last.get(&format!("{name}{SIGNATURE_SUFFIX}")).copied());
            let known = self.checked.remove(name).filter(|known| known.stamps == stamps);
            let is_new = known.is_none();
            let known = known.unwrap_or_else(|| {
                let outcome =
                    check_file(&self.directory.depot().join(name), name, stamps.0, keys).map(|(item, _)| item);
                CheckedFile { stamps, outcome: outcome.map(Arc::new).map_err(|error| format!("{error:#}")) }
            });
            if let (true, Err(reason)) = (is_new, &known.outcome) {
                tracing::warn!(file = %name, %reason, "a file of the depot is not offered");
            }
            checked.insert(name.clone(), known);
        }
        self.checked = checked;
        let items = self.checked.values().filter_map(|known| known.outcome.as_ref().ok().cloned()).collect();
        let problems =
            self.checked.iter().filter_map(|(name, known)| Some((name.clone(), known.outcome.as_ref().err()?.clone())));
        Index::new(items, problems.collect())
    }
}

/// The files of a directory whose names `counts` accepts.
fn list(directory: &Path, counts: impl Fn(&str) -> bool) -> Result<DirectoryListing> {
    let attempt = || -> Result<DirectoryListing> {
        let mut listing = DirectoryListing::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with('.') || !counts(&name) {
                continue;
            }
            if listing.len() >= MAX_FILES {
                bail!("it has more than {MAX_FILES} files; remove those that no host needs");
            }
            // Links are followed: the operator may keep packages elsewhere. A file that was removed meanwhile is skipped.
            let Ok(metadata) = fs::metadata(entry.path()) else { continue };
            if metadata.is_file() {
                listing.insert(name, FileStamp::of(&metadata));
            }
        }
        Ok(listing)
    };
    attempt().with_context(|| format!("cannot read the directory {}", directory.display()))
}

/// The status of the signature of a file in the depot, `None` for a bootstrap; an error if the gateway does not offer the file.
pub(in crate::gateway) fn offered(
    directory: &GatewayDirectory,
    name: &str,
    keys: &Keys,
) -> Result<Option<SignatureStatus>> {
    let listing = list(&directory.depot(), |_| true)?;
    let stamp = listing.get(name).context("it is not in the depot")?;
    check_file(&directory.depot().join(name), name, *stamp, keys).map(|(_, status)| status)
}

/// The file as it is offered, and the status of its signature, which a bootstrap does not have.
fn check_file(path: &Path, name: &str, stamp: FileStamp, keys: &Keys) -> Result<(DepotFile, Option<SignatureStatus>)> {
    let mut file = File::open(path)?;
    if FileStamp::of(&file.metadata()?) != stamp {
        bail!("it changed while it was read");
    }
    if bootstrap::is_file_name(name) {
        let sha256 = package::sha256_of(&mut file)?;
        let (name, path) = (name.to_owned(), path.to_owned());
        return Ok((DepotFile { name, path, stamp, sha256, binding: None, signature: None }, None));
    }
    let Some(bytes) = store::read(&signature_path(path), MAX_SIGNATURE_BYTES)? else {
        bail!("it has no signature; add it with `aops gateway publish`");
    };
    let text = String::from_utf8(bytes).context("its signature is not text")?;
    let binding = package::binding_of(&text).context("cannot read its signature")?;
    if binding.release.packing_of(name).is_none() {
        bail!("its signature is for {}", binding.release);
    }
    let (status, sha256) = package::check_signature(&mut file, &text, keys)?;
    match &status {
        SignatureStatus::Good => {}
        SignatureStatus::UnknownKey => {
            tracing::warn!(file = %name, "a package is offered, but no key in keys/ can verify its signature; hosts without its key reject it")
        }
        SignatureStatus::Bad(why) => bail!("its signature is invalid: {why}"),
    }
    let (name, path) = (name.to_owned(), path.to_owned());
    let item = DepotFile { name, path, stamp, sha256, binding: Some(binding), signature: Some(text.into()) };
    Ok((item, Some(status)))
}
