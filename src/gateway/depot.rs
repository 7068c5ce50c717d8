//! What the depot has on offer: an index by release and by file name, made by a scan and never changed.
//!
//! Requests read the index alone. A name that it does not hold is not served, whatever is in the directory; so no request can name a path.

mod scan;
mod signature;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

pub(super) use self::scan::{Scanner, offered};
pub(super) use self::signature::{binding_of, published, releases, signature_path, verdict_on};
use crate::core::fleet::newest;
use crate::core::model::{AgentName, Arch, Binding, Digest, Os, Packing, Release, Version};
use crate::core::protocol::Offer;
use crate::platform;

/// What tells one content of a file from the next without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileStamp {
    pub(super) size: u64,
    modified: Option<SystemTime>,
    number: u64,
}

impl FileStamp {
    pub(super) fn of(metadata: &std::fs::Metadata) -> FileStamp {
        FileStamp { size: metadata.len(), modified: metadata.modified().ok(), number: platform::file_number(metadata) }
    }
}

/// A file that may be downloaded.
#[derive(Debug)]
pub(super) struct DepotFile {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) stamp: FileStamp,
    pub(super) sha256: Digest,
    /// What its signature binds it to; a bootstrap has none.
    pub(super) binding: Option<Binding>,
    /// The content of its `.minisig`.
    pub(super) signature: Option<Arc<str>>,
}

/// Everything on offer.
#[derive(Debug, Default)]
pub(super) struct Index {
    files: HashMap<String, Arc<DepotFile>>,
    releases: BTreeMap<Release, Arc<DepotFile>>,
    /// Why a file is not offered, by its name.
    problems: BTreeMap<String, String>,
}

impl Index {
    fn new(items: Vec<Arc<DepotFile>>, mut problems: BTreeMap<String, String>) -> Index {
        let mut releases: BTreeMap<Release, Arc<DepotFile>> = BTreeMap::new();
        for item in items.iter() {
            let Some(binding) = &item.binding else { continue };
            // Two archives of one release: the better packing is offered, the other one can still be downloaded.
            match releases.get(&binding.release) {
                Some(other) if preference(other) <= preference(item) => {
                    problems.insert(item.name.clone(), format!("{} is the same release", other.name));
                }
                _ => {
                    releases.insert(binding.release.clone(), item.clone());
                }
            }
        }
        Index { files: items.into_iter().map(|item| (item.name.clone(), item)).collect(), releases, problems }
    }

    /// The file of that name.
    pub(super) fn file(&self, name: &str) -> Option<&Arc<DepotFile>> {
        self.files.get(name)
    }

    /// The package of a release.
    pub(super) fn offer(&self, release: &Release) -> Option<Offer> {
        let item = self.releases.get(release)?;
        Some(Offer {
            version: release.version.clone(),
            file: item.name.clone(),
            sha256: item.sha256.clone(),
            size: item.stamp.size,
        })
    }

    /// Whether there is a package of that name and version for any os and arch.
    pub(super) fn has(&self, name: &str, version: &Version) -> bool {
        self.releases.keys().any(|release| release.name.as_str() == name && release.version == *version)
    }

    /// The newest version of a package for one os and arch.
    pub(super) fn newest(&self, name: &AgentName, os: Os, arch: Arch) -> Option<Version> {
        let of_that_kind = |release: &&Release| release.name == *name && release.os == os && release.arch == arch;
        let mut found: Vec<(&Release, Option<SystemTime>)> = self
            .releases
            .iter()
            .filter(|(release, _)| of_that_kind(release))
            .map(|(release, item)| (release, item.stamp.modified))
            .collect();
        found.sort_by_key(|(_, modified)| *modified);
        newest(found.into_iter().map(|(release, _)| &release.version)).cloned()
    }

    /// How many packages are on offer.
    pub(super) fn packages(&self) -> usize {
        self.releases.len()
    }

    pub(super) fn problems(&self) -> &BTreeMap<String, String> {
        &self.problems
    }
}

fn preference(item: &DepotFile) -> usize {
    let packing = item.binding.as_ref().and_then(|binding| binding.release.packing_of(&item.name));
    packing.and_then(|packing| Packing::ALL.iter().position(|other| *other == packing)).unwrap_or(usize::MAX)
}
