//! The packages on offer: an immutable index by release and by file name, created by a scan of the depot.
//!
//! Requests are answered from the index only. A name that is not in the index is not served, even if the file exists: no request can reach
//! another path.

mod scan;
mod signature;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

pub(super) use self::scan::{Scanner, offered};
pub(super) use self::signature::{binding_of, published, releases, signature_path, signature_status};
use crate::core::fleet::newest;
use crate::core::model::{AgentName, Arch, Binding, Digest, Os, Packing, Release, Version};
use crate::core::protocol::Offer;
use crate::platform;

/// Identifies the content of a file without reading it.
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
    /// The release and epoch in its signature; `None` for a bootstrap.
    pub(super) binding: Option<Binding>,
    /// The content of its `.minisig`; `None` for a bootstrap.
    pub(super) signature: Option<Arc<str>>,
}

/// All files on offer.
#[derive(Debug, Default)]
pub(super) struct Index {
    files: HashMap<String, Arc<DepotFile>>,
    releases: BTreeMap<Release, Arc<DepotFile>>,
    /// Files that are not offered, by name, with the reason.
    problems: BTreeMap<String, String>,
}

impl Index {
    fn new(items: Vec<Arc<DepotFile>>, mut problems: BTreeMap<String, String>) -> Index {
        let mut releases: BTreeMap<Release, Arc<DepotFile>> = BTreeMap::new();
        for item in items.iter() {
            let Some(binding) = &item.binding else { continue };
            // Of two archives of one release, the one with the better packing is offered. Both can be downloaded.
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

    /// The file with this name.
    pub(super) fn file(&self, name: &str) -> Option<&Arc<DepotFile>> {
        self.files.get(name)
    }

    /// The offer of this release.
    pub(super) fn offer(&self, release: &Release) -> Option<Offer> {
        let item = self.releases.get(release)?;
        Some(Offer {
            version: release.version.clone(),
            file: item.name.clone(),
            sha256: item.sha256.clone(),
            size: item.stamp.size,
        })
    }

    /// Whether a package with this name and version exists for any os and arch.
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

    /// The number of releases on offer.
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
