//! The directories of packages in transit: private to their owner, and cleared of abandoned downloads.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use super::{MAX_PACKAGE_BYTES, PackagePaths, partial};
use crate::store;

/// Older partial downloads are abandoned and removed.
pub(super) const MAX_PART_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Disk space for downloads that are not in progress: the size of the largest package, so that it can be resumed too.
const MAX_CACHE_BYTES: u64 = MAX_PACKAGE_BYTES;

/// Creates a directory with mode 0700 if it does not exist.
pub(super) fn make_private(directory: &Path) -> Result<()> {
    let attempt = || {
        if directory.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(directory)?;
        crate::platform::set_mode(directory, 0o700)
    };
    attempt().with_context(|| format!("cannot create {}", directory.display()))
}

/// Removes what earlier runs left: everything in staging, abandoned downloads, and the oldest of the rest beyond the cache's cap. Must not
/// run during a fetch.
pub fn sweep(paths: &PackagePaths) -> Result<()> {
    let mut failures = Failures::default();
    for entry in entries(&paths.staging)? {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        failures.add(if is_directory { store::remove_tree(&path) } else { store::remove(&path) });
    }
    failures.add(trim(&paths.cache, |_| true));
    failures.into_result()
}

/// Collects errors, so that one failed removal does not stop the others.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn add(&mut self, removed: Result<()>) {
        self.0.extend(removed.err().map(|error| format!("{error:#}")));
    }

    fn into_result(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { bail!("{}", self.0.join("; ")) }
    }
}

/// Removes unneeded and abandoned downloads, and the oldest of the rest beyond the cache's cap. Leaves downloads in progress alone.
pub fn trim(cache: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<()> {
    let (mut kept, mut failures) = (Vec::new(), Failures::default());
    for entry in entries(cache)? {
        let path = entry.path();
        // A download that completed meanwhile no longer has a file.
        let Ok(metadata) = entry.metadata() else { continue };
        if !metadata.is_file() || partial::is_in_use(&path) {
            continue;
        }
        // After the clock was set back, a file in the future has age zero.
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let age = SystemTime::now().duration_since(modified).unwrap_or_default();
        if age > MAX_PART_AGE || !partial::package_of(&path).is_some_and(&is_wanted) {
            failures.add(store::remove(&path));
        } else {
            kept.push((modified, metadata.len(), path));
        }
    }
    for path in beyond_cap(kept, MAX_CACHE_BYTES) {
        failures.add(store::remove(&path));
    }
    failures.into_result()
}

/// Returns the oldest files, whose removal leaves at most `cap` bytes.
pub(super) fn beyond_cap(mut files: Vec<(SystemTime, u64, PathBuf)>, cap: u64) -> Vec<PathBuf> {
    files.sort();
    let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
    let mut removed = Vec::new();
    for (_, bytes, path) in files {
        if total <= cap {
            break;
        }
        total -= bytes;
        removed.push(path);
    }
    removed
}

pub(super) fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>> {
    let attempt = || match fs::read_dir(directory) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    attempt().with_context(|| format!("cannot list {}", directory.display()))
}
