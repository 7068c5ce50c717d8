//! What may be made of a package's entries, one after the other: decided here, from their names and sizes alone; carried out elsewhere.
//!
//! Every entry is judged against those before it. Files lie in directories that are the package's own, no name is used twice, and what is
//! counted stays within the limits.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use anyhow::{Result, bail, ensure};

use super::UnpackLimits;
use super::names::{fold_into, link_stays_inside, relative};
use crate::core::model::Os;
use crate::home::COMPLETE;

/// A link's target beyond this is none that a file system takes.
pub(super) const MAX_TARGET_BYTES: usize = 4095;

const SET_ID: u32 = 0o6000;

/// What a path below the root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathKind {
    /// Only because something lies in it; its own entry may yet come.
    ImpliedDirectory,
    Directory,
    File,
    Link,
}

#[derive(Debug, Clone, Copy)]
struct PlannedPath {
    kind: PathKind,
    /// Tells the very same name from one that differs in case.
    spelling: u32,
}

/// An entry that may be made, once the directories above it are there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlannedEntry {
    /// Below the root, clean; never empty.
    pub(super) path: String,
    /// Where in `path` the names of directories end that are to be made first, outermost first.
    pub(super) parents: Vec<usize>,
    /// It is there already, since something lies in it.
    pub(super) stands: bool,
}

/// The entries that were admitted so far.
pub(super) struct UnpackPlan {
    os: Os,
    limits: UnpackLimits,
    /// By the hash of the folded path: a hundred thousand whole paths would be most of the memory that unpacking takes. The hash is keyed
    /// at random, so nobody can make two names meet; by chance two of 100,000 meet once in 10^9 packages, which are then refused.
    made: HashMap<u64, PlannedPath>,
    keys: RandomState,
    folded: String,
    /// The directory of the entry before: most lie where that one did.
    last_parent: String,
    bytes: u64,
    entries: u64,
}

impl UnpackPlan {
    pub(super) fn new(os: Os, limits: UnpackLimits) -> UnpackPlan {
        UnpackPlan {
            os,
            limits,
            made: HashMap::new(),
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
        self.made.is_empty()
    }

    /// Counts one entry of the archive, whatever it is, or one directory that it implies.
    pub(super) fn count(&mut self) -> Result<()> {
        self.entries += 1;
        ensure!(self.entries <= self.limits.entries, "the package has more than {} entries", self.limits.entries);
        Ok(())
    }

    /// `None` for the root itself, which is there.
    pub(super) fn directory(&mut self, path: &str) -> Result<Option<PlannedEntry>> {
        let path = relative(path, self.os, &self.limits)?;
        if path.is_empty() {
            return Ok(None);
        }
        let stands = match self.find(&path)? {
            Some(PathKind::ImpliedDirectory) => true,
            Some(_) => bail!("there are two of it"),
            None => false,
        };
        let parents = if stands { Vec::new() } else { self.parents(&path)? };
        self.put(&path, PathKind::Directory);
        Ok(Some(PlannedEntry { path, parents, stands }))
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, size: u64) -> Result<PlannedEntry> {
        ensure!(mode & SET_ID == 0, "it is setuid or setgid");
        let admitted = self.begin(path)?;
        self.bytes = self.bytes.saturating_add(size);
        ensure!(self.bytes <= self.limits.bytes, "all files together have more than {} bytes", self.limits.bytes);
        self.put(&admitted.path, PathKind::File);
        Ok(admitted)
    }

    pub(super) fn symbolic_link(&mut self, path: &str, target: &str) -> Result<PlannedEntry> {
        let admitted = self.begin(path)?;
        ensure!(target.len() <= MAX_TARGET_BYTES, "it is a link to a name that is too long");
        ensure!(
            link_stays_inside(&admitted.path, target, self.os),
            "it is a link that leaves the package (to {target:?}), or could"
        );
        ensure!(
            self.os != Os::Windows,
            "it is a symbolic link, which a service on Windows may not make; pack the file itself"
        );
        self.put(&admitted.path, PathKind::Link);
        Ok(admitted)
    }

    /// The second is the clean path of what it is another name of.
    pub(super) fn hard_link(&mut self, path: &str, mode: u32, target: &str) -> Result<(PlannedEntry, String)> {
        ensure!(mode & SET_ID == 0, "it is setuid or setgid");
        let admitted = self.begin(path)?;
        let target = match relative(target, self.os, &self.limits) {
            Ok(target) => target,
            Err(error) => bail!("it is a hard link that leaves the package: {error}"),
        };
        ensure!(
            self.find(&target)? == Some(PathKind::File),
            "it is a hard link to {target:?}, which is no file of the package before it"
        );
        self.put(&admitted.path, PathKind::File);
        Ok((admitted, target))
    }

    /// For what is to be made anew.
    fn begin(&mut self, path: &str) -> Result<PlannedEntry> {
        ensure!(!path.ends_with('/'), "its name is that of a directory, which it is not");
        let path = relative(path, self.os, &self.limits)?;
        ensure!(!path.is_empty(), "it has no name");
        ensure!(self.find(&path)?.is_none(), "there are two of it");
        let parents = self.parents(&path)?;
        Ok(PlannedEntry { path, parents, stands: false })
    }

    /// Which directories above it are to be made.
    fn parents(&mut self, path: &str) -> Result<Vec<usize>> {
        self.refuse_mark(path)?;
        let mut missing = Vec::new();
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if parent == self.last_parent {
            return Ok(missing);
        }
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            match self.find(parent)? {
                Some(PathKind::Directory | PathKind::ImpliedDirectory) => {}
                Some(PathKind::File | PathKind::Link) => bail!("it would lie in {parent:?}, which is no directory"),
                None => {
                    self.count()?;
                    self.put(parent, PathKind::ImpliedDirectory);
                    missing.push(at);
                }
            }
        }
        self.last_parent.clear();
        self.last_parent.push_str(parent);
        Ok(missing)
    }

    fn refuse_mark(&mut self, path: &str) -> Result<()> {
        let first = path.split('/').next().unwrap_or_default();
        fold_into(&mut self.folded, first);
        ensure!(self.folded != COMPLETE, "the name {COMPLETE} is reserved: it says that a release is whole");
        Ok(())
    }

    /// What was made under this name; an error where it was made in another case.
    fn find(&mut self, path: &str) -> Result<Option<PathKind>> {
        let (key, spelling) = self.key(path);
        match self.made.get(&key) {
            None => Ok(None),
            Some(made) if made.spelling == spelling => Ok(Some(made.kind)),
            Some(_) => bail!("there are two of {path:?} that differ in case alone, which are one on Windows"),
        }
    }

    fn put(&mut self, path: &str, kind: PathKind) {
        let (key, spelling) = self.key(path);
        self.made.insert(key, PlannedPath { kind, spelling });
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
