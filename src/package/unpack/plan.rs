//! Decides which entries of a package are accepted, from their names and sizes alone. Another module writes them.
//!
//! Every entry is checked against the earlier ones: files must be in directories of the package, names must be unique, and counts and
//! sizes must stay within the limits.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use anyhow::{Result, bail, ensure};

use super::UnpackLimits;
use super::names::{fold_into, link_stays_inside, relative};
use crate::core::model::Os;
use crate::home::COMPLETE;

/// The longest link target that file systems support.
pub(super) const MAX_TARGET_BYTES: usize = 4095;

const SET_ID: u32 = 0o6000;

/// The kind of a path below the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathKind {
    /// Implied by an entry below it; its own entry may follow.
    ImpliedDirectory,
    Directory,
    File,
    Link,
}

#[derive(Debug, Clone, Copy)]
struct PlannedPath {
    kind: PathKind,
    /// Distinguishes the same name from one that differs in case.
    spelling: u32,
}

/// An accepted entry, to be created after its parent directories.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlannedEntry {
    /// Normalized, below the root, never empty.
    pub(super) path: String,
    /// Lengths of the prefixes of `path` that are directories to create first, outermost first.
    pub(super) parents: Vec<usize>,
    /// The directory exists already, implied by an earlier entry.
    pub(super) exists: bool,
}

/// The entries accepted so far.
pub(super) struct UnpackPlan {
    os: Os,
    limits: UnpackLimits,
    /// Keyed by the hash of the case-folded path, as a hundred thousand whole paths would be most of the memory needed. The hash has a
    /// random key, so collisions cannot be crafted; by chance one of 10^9 packages with 100,000 entries has one, and is rejected.
    known: HashMap<u64, PlannedPath>,
    keys: RandomState,
    folded: String,
    /// The parent directory of the previous entry, which most entries share.
    last_parent: String,
    bytes: u64,
    entries: u64,
}

impl UnpackPlan {
    pub(super) fn new(os: Os, limits: UnpackLimits) -> UnpackPlan {
        UnpackPlan {
            os,
            limits,
            known: HashMap::new(),
            keys: RandomState::new(),
            folded: String::new(),
            last_parent: String::new(),
            bytes: 0,
            entries: 0,
        }
    }

    pub(super) fn limits(&self) -> &UnpackLimits {
        &self.limits
    }

    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Counts an entry of any kind, or an implied directory.
    pub(super) fn count(&mut self) -> Result<()> {
        self.entries += 1;
        ensure!(self.entries <= self.limits.entries, "the package has more than {} entries", self.limits.entries);
        Ok(())
    }

    /// `None` for the root, which exists.
    pub(super) fn directory(&mut self, path: &str) -> Result<Option<PlannedEntry>> {
        let path = relative(path, self.os, &self.limits)?;
        if path.is_empty() {
            return Ok(None);
        }
        let exists = match self.find(&path)? {
            Some(PathKind::ImpliedDirectory) => true,
            Some(_) => bail!("duplicate entry"),
            None => false,
        };
        let parents = if exists { Vec::new() } else { self.parents(&path)? };
        self.insert(&path, PathKind::Directory);
        Ok(Some(PlannedEntry { path, parents, exists }))
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, size: u64) -> Result<PlannedEntry> {
        ensure!(mode & SET_ID == 0, "the setuid or setgid bit is set");
        let planned = self.new_entry(path)?;
        self.bytes = self.bytes.saturating_add(size);
        ensure!(self.bytes <= self.limits.bytes, "all files together have more than {} bytes", self.limits.bytes);
        self.insert(&planned.path, PathKind::File);
        Ok(planned)
    }

    pub(super) fn symbolic_link(&mut self, path: &str, target: &str) -> Result<PlannedEntry> {
        let planned = self.new_entry(path)?;
        ensure!(target.len() <= MAX_TARGET_BYTES, "the link target is too long");
        ensure!(
            link_stays_inside(&planned.path, target, self.os),
            "the link leaves the package (to {target:?}), or could"
        );
        ensure!(self.os != Os::Windows, "a service on Windows may not create symbolic links; pack the file itself");
        self.insert(&planned.path, PathKind::Link);
        Ok(planned)
    }

    /// Also returns the normalized path of the target.
    pub(super) fn hard_link(&mut self, path: &str, mode: u32, target: &str) -> Result<(PlannedEntry, String)> {
        ensure!(mode & SET_ID == 0, "the setuid or setgid bit is set");
        let planned = self.new_entry(path)?;
        let target = match relative(target, self.os, &self.limits) {
            Ok(target) => target,
            Err(error) => bail!("the hard link leaves the package: {error}"),
        };
        ensure!(
            self.find(&target)? == Some(PathKind::File),
            "the target {target:?} of the hard link is not an earlier file of the package"
        );
        self.insert(&planned.path, PathKind::File);
        Ok((planned, target))
    }

    /// Checks the path of a new file or link.
    fn new_entry(&mut self, path: &str) -> Result<PlannedEntry> {
        ensure!(!path.ends_with('/'), "the name ends in a slash, but the entry is not a directory");
        let path = relative(path, self.os, &self.limits)?;
        ensure!(!path.is_empty(), "the name is empty");
        ensure!(self.find(&path)?.is_none(), "duplicate entry");
        let parents = self.parents(&path)?;
        Ok(PlannedEntry { path, parents, exists: false })
    }

    /// Returns the parent directories to create.
    fn parents(&mut self, path: &str) -> Result<Vec<usize>> {
        self.reject_reserved_name(path)?;
        let mut missing = Vec::new();
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if parent == self.last_parent {
            return Ok(missing);
        }
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            match self.find(parent)? {
                Some(PathKind::Directory | PathKind::ImpliedDirectory) => {}
                Some(PathKind::File | PathKind::Link) => bail!("its parent {parent:?} is not a directory"),
                None => {
                    self.count()?;
                    self.insert(parent, PathKind::ImpliedDirectory);
                    missing.push(at);
                }
            }
        }
        self.last_parent.clear();
        self.last_parent.push_str(parent);
        Ok(missing)
    }

    fn reject_reserved_name(&mut self, path: &str) -> Result<()> {
        let first = path.split('/').next().unwrap_or_default();
        fold_into(&mut self.folded, first);
        ensure!(self.folded != COMPLETE, "the name {COMPLETE} is reserved: it marks a complete release");
        Ok(())
    }

    /// The kind of the path with this name; an error if the existing name differs in case.
    fn find(&mut self, path: &str) -> Result<Option<PathKind>> {
        let (key, spelling) = self.key(path);
        match self.known.get(&key) {
            None => Ok(None),
            Some(known) if known.spelling == spelling => Ok(Some(known.kind)),
            Some(_) => bail!("{path:?} and an earlier entry differ in case alone, so they are one file on Windows"),
        }
    }

    fn insert(&mut self, path: &str, kind: PathKind) {
        let (key, spelling) = self.key(path);
        self.known.insert(key, PlannedPath { kind, spelling });
    }

    fn key(&mut self, path: &str) -> (u64, u32) {
        fold_into(&mut self.folded, path);
        let hash = |text: &str| {
            let mut hasher = self.keys.build_hasher();
            hasher.write(text.as_bytes());
            hasher.finish()
        };
        (hash(&self.folded), hash(path) as u32)
    }
}
