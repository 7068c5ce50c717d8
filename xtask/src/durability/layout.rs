//! The home's layout, as far as durability depends on it: which names must survive a power cut, and what they are.

use std::path::{Path, PathBuf};

/// Lost or stale content here does no harm: processes and locks are gone after a power cut, staging is emptied at each start, a download is
/// verified as a whole, and no program reads a log.
const VOLATILE: &[&str] = &["run", "log", "cache", "staging", ".install"];
/// The exception: which directories a first installation creates.
pub(super) const INSTALL_JOURNAL: &str = ".install/made.json";

/// An installation is complete once it is there.
pub(super) const INSTALL_RECORD: &str = "state/install.json";

/// State that announces what was done before it, or what follows.
const RECORDS: &[&str] = &[
    "state/releases.json",
    "state/upgrade.json",
    "state/manager.json",
    INSTALL_RECORD,
    "state/desired.json",
    "state/epochs.json",
    "state/keys.json",
    "state/stopped.json",
];

/// A name in `agents/<name>/<version>/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReleaseFile {
    pub(super) directory: PathBuf,
    pub(super) is_complete_mark: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Layout {
    home: PathBuf,
}

impl Layout {
    pub(super) fn new(home: &Path) -> Layout {
        Layout { home: home.to_owned() }
    }

    pub(super) fn at(&self, inside: &str) -> PathBuf {
        self.home.join(inside)
    }

    /// The path below the home; empty for the home itself.
    pub(super) fn inside<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        path.strip_prefix(&self.home).ok()
    }

    pub(super) fn is(&self, path: &Path, inside: &str) -> bool {
        self.inside(path) == Some(Path::new(inside))
    }

    /// Whether a name must survive a power cut once it is announced. Names that are about to be renamed are not lasting yet.
    pub(super) fn is_lasting(&self, path: &Path) -> bool {
        let Some(inside) = self.inside(path) else { return false };
        inside == Path::new(INSTALL_JOURNAL) || !(self.is_volatile(path) || inside.components().any(is_temporary))
    }

    /// Whether a file of this name may get a name that lasts: what is staged may, and a new file before its rename.
    pub(super) fn may_last(&self, path: &Path) -> bool {
        let inside = self.inside(path).unwrap_or(path);
        !["run", "log", "cache"].iter().any(|place| inside.starts_with(place))
    }

    pub(super) fn is_volatile(&self, path: &Path) -> bool {
        self.inside(path).is_some_and(|inside| VOLATILE.iter().any(|volatile| inside.starts_with(volatile)))
    }

    /// Space that is set aside for an upgrade on a full disk. Its sync makes the file system allocate it, and nothing reads it.
    pub(super) fn is_reserve(&self, path: &Path) -> bool {
        self.is(path, "state/upgrade.reserve")
    }

    /// Whether a rename to this name announces something: a record, a complete release, the active release, the executable.
    pub(super) fn announces(&self, path: &Path) -> bool {
        let Some(inside) = self.inside(path) else { return false };
        RECORDS.iter().any(|record| inside == Path::new(record))
            || inside == Path::new("bin/aops")
            || inside == Path::new(INSTALL_JOURNAL)
            || self.current_of(path).is_some()
            || self.release_file(path).is_some_and(|file| file.is_complete_mark)
    }

    /// As [`Layout::announces`], for the installer.
    pub(super) fn announces_installation(&self, path: &Path) -> bool {
        self.is(path, INSTALL_RECORD) || self.is(path, INSTALL_JOURNAL)
    }

    /// Whether a sync of this directory or file is of the home, or saves the home's own name.
    pub(super) fn is_synced_for_home(&self, path: &Path) -> bool {
        self.inside(path).is_some() || self.home.parent() == Some(path)
    }

    /// The sub-agent whose `current` this is.
    pub(super) fn current_of<'a>(&self, path: &'a Path) -> Option<&'a str> {
        match parts(self.inside(path)?)[..] {
            ["agents", name, "current"] => Some(name),
            _ => None,
        }
    }

    /// A name inside a release's directory.
    pub(super) fn release_file(&self, path: &Path) -> Option<ReleaseFile> {
        match parts(self.inside(path)?)[..] {
            ["agents", name, version, first, ref rest @ ..] if version != "current" => Some(ReleaseFile {
                directory: self.release(name, version),
                is_complete_mark: first == ".complete" && rest.is_empty(),
            }),
            _ => None,
        }
    }

    pub(super) fn release(&self, name: &str, version: &str) -> PathBuf {
        self.home.join("agents").join(name).join(version)
    }

    /// The names that lead to a complete release: its sub-agent's directory, its own, and `.complete`.
    pub(super) fn names_of_release(&self, name: &str, version: &str) -> [PathBuf; 3] {
        let directory = self.release(name, version);
        [self.home.join("agents").join(name), directory.clone(), directory.join(".complete")]
    }

    /// The file that is downloaded to this new path: `<name>-<version>_<os>_<arch>.<packing>`.
    pub(super) fn downloaded<'a>(&self, path: &'a Path) -> Option<&'a str> {
        match parts(self.inside(path)?)[..] {
            ["cache", file] => file.strip_suffix(".part"),
            _ => None,
        }
    }
}

fn parts(path: &Path) -> Vec<&str> {
    path.iter().map(|part| part.to_str().unwrap_or_default()).collect()
}

fn is_temporary(part: std::path::Component<'_>) -> bool {
    let name = part.as_os_str().to_str().unwrap_or_default();
    name.starts_with(".new-") || name == ".aops.next" || name == "upgrade.reserve"
}
