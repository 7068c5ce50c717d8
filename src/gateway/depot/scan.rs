//! The scan that keeps the index true: every file is hashed and its signature verified once, and again only when it has changed.
//!
//! Publishing renames whole files into the depot, but operators also copy into it: so a file counts only when two looks have found it the same.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::{Index, Item, Stamp, keys_of, signature_path};
use crate::gateway::{Place, bootstrap};
use crate::package::{self, Keys, MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX, Verdict};
use crate::store;

/// More files than this in a depot are not looked at.
const MAX_FILES: usize = 20_000;

/// What one look at the directories saw: the stamp of every file, of keys/ too (under names with a slash).
type Look = BTreeMap<String, Stamp>;

/// Looks at the depot again and again.
pub(in crate::gateway) struct Scanner {
    place: Place,
    last: Look,
    /// What the index was made of.
    indexed: Option<Look>,
    judged: BTreeMap<String, Judged>,
}

/// What was found out about a file, valid for these stamps of it, of its signature and of the keys.
struct Judged {
    stamps: (Stamp, Option<Stamp>),
    outcome: Result<Arc<Item>, String>,
}

impl Scanner {
    pub(in crate::gateway) fn new(place: Place) -> Scanner {
        Scanner { place, last: Look::new(), indexed: None, judged: BTreeMap::new() }
    }

    /// Looks once; a new index where something has changed and stood still since the last look (or at all, if `at_once`).
    pub(in crate::gateway) fn look(&mut self, at_once: bool) -> Result<Option<Arc<Index>>> {
        let look = self.see().with_context(|| format!("cannot read the depot {}", self.place.depot().display()))?;
        let settled = at_once || look == self.last;
        self.last = look;
        if !settled || self.indexed.as_ref() == Some(&self.last) {
            return Ok(None);
        }
        let keys_changed = self.indexed.as_ref().is_none_or(|indexed| keys_in(indexed).ne(keys_in(&self.last)));
        if keys_changed {
            self.judged.clear();
        }
        let index = self.index()?;
        self.indexed = Some(self.last.clone());
        Ok(Some(Arc::new(index)))
    }

    fn see(&self) -> Result<Look> {
        let mut look = Look::new();
        for (directory, prefix) in [(self.place.depot(), ""), (self.place.keys(), "keys/")] {
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                let Ok(name) = entry.file_name().into_string() else { continue };
                if name.starts_with('.') || (!prefix.is_empty() && !name.ends_with(".pub")) {
                    continue;
                }
                if look.len() >= MAX_FILES {
                    bail!("it holds more than {MAX_FILES} files");
                }
                // Links are followed: an operator may keep the packages elsewhere. One that went away meanwhile is not there.
                let Ok(metadata) = fs::metadata(entry.path()) else { continue };
                if metadata.is_file() {
                    look.insert(format!("{prefix}{name}"), Stamp::of(&metadata));
                }
            }
        }
        Ok(look)
    }

    fn index(&mut self) -> Result<Index> {
        let keys = keys_of(&self.place)?;
        let mut judged = BTreeMap::new();
        for (name, stamp) in
            self.last.iter().filter(|(name, _)| !name.starts_with("keys/") && !name.ends_with(SIGNATURE_SUFFIX))
        {
            let stamps = (*stamp, self.last.get(&format!("{name}{SIGNATURE_SUFFIX}")).copied());
            let known = self.judged.remove(name).filter(|known| known.stamps == stamps);
            let fresh = known.is_none();
            let known = known.unwrap_or_else(|| {
                let outcome = judge(&self.place.depot().join(name), name, stamps.0, &keys);
                Judged { stamps, outcome: outcome.map(Arc::new).map_err(|error| format!("{error:#}")) }
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
        Ok(Index::new(items, problems.collect()))
    }
}

fn keys_in(look: &Look) -> impl Iterator<Item = (&String, &Stamp)> {
    look.iter().filter(|(name, _)| name.starts_with("keys/"))
}

fn judge(path: &Path, name: &str, stamp: Stamp, keys: &Keys) -> Result<Item> {
    let mut file = File::open(path)?;
    if Stamp::of(&file.metadata()?) != stamp {
        bail!("it has changed while it was looked at");
    }
    if bootstrap::is_file_name(name) {
        let sha256 = package::sha256_of(&mut file)?;
        return Ok(Item {
            name: name.to_owned(),
            path: path.to_owned(),
            stamp,
            sha256,
            binding: None,
            signature: None,
        });
    }
    let Some(bytes) = store::read(&signature_path(path), MAX_SIGNATURE_BYTES)? else {
        bail!("it has no signature; put it there with `aops gateway publish`");
    };
    let text = String::from_utf8(bytes).context("its signature is no text")?;
    let binding = package::binding_of(&text).context("cannot read its signature")?;
    if binding.release.packing_of(name).is_none() {
        bail!("its signature says that it is {}", binding.release);
    }
    let (verdict, sha256) = package::judge(&mut file, &text, keys)?;
    match verdict {
        Verdict::Good => {}
        Verdict::UnknownKey => {
            tracing::warn!(file = %name, "a package is offered though none of our keys made its signature")
        }
        Verdict::Bad(why) => bail!("its signature is not of these bytes: {why}"),
    }
    Ok(Item {
        name: name.to_owned(),
        path: path.to_owned(),
        stamp,
        sha256,
        binding: Some(binding),
        signature: Some(text.into()),
    })
}
