//! Packages: the only way in which bytes from the network become something that may run.
//!
//! [`fetch`] does the whole of it: signature, download, verification, unpacking. What it answers, a [`VerifiedTree`], has no public
//! constructor, so that skipping the verification does not compile. The archive is verified and unpacked through one open file: nothing
//! can be put in its place in between.
//!
//! ```text
//! cache/<file>.part, .part.etag   being downloaded, resumed by the next try
//! cache/<file>                    whole; removed once unpacked
//! staging/<unique>/               being unpacked; swept by the next start
//! <final>/  <final>/.complete     moved into place by one rename; `.complete` is written last and removed first
//! ```

mod fetch;
pub mod keys;
#[cfg(feature = "gateway")]
pub mod pack;
#[cfg(feature = "gateway")]
pub mod sign;
pub mod trailer;
mod unpack;
mod verify;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::core::model::{Binding, Digest, Packing, Release};
use crate::endpoint::{Client, Endpoint};
use crate::home::COMPLETE;
use crate::store::{self, Access};

pub use keys::Keys;
#[cfg(feature = "gateway")]
pub use unpack::look_through;

/// What a package's signature file is called, after the package's own name.
pub const SIGNATURE_SUFFIX: &str = ".minisig";
/// A signature file is refused beyond this; minisign's have about 400 bytes.
pub const MAX_SIGNATURE_BYTES: u64 = 4 << 10;

/// Half a download that nobody came back for.
const MAX_PART_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// What downloads, half and whole, may take on the disk between two runs.
const MAX_CACHE_BYTES: u64 = 2 << 30;

/// A release to be had, and what is known about its package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub release: Release,
    /// Address of the directory that holds the package; absent: the endpoints' own download path.
    pub tarball: Option<String>,
    /// The package's file name; absent: `{name}-{version}_{os}_{arch}.tar.zst`.
    pub file: Option<String>,
    pub sha256: Option<Digest>,
    /// Of the package, bytes.
    pub size: Option<u64>,
    /// The epoch of this name that the host has committed: a lower one is refused.
    pub least_epoch: u64,
}

impl Wanted {
    /// Nothing is known but the release.
    pub fn new(release: Release) -> Wanted {
        Wanted { release, tarball: None, file: None, sha256: None, size: None, least_epoch: 0 }
    }

    /// The package's file name, which can only be one of this release's, and how it is packed.
    fn file(&self) -> Result<(String, Packing)> {
        let Some(file) = &self.file else { return Ok((self.release.file_name(Packing::TarZst), Packing::TarZst)) };
        let packing = self.release.packing_of(file).with_context(|| {
            format!(
                "cannot take {file:?} as the package of {}: it would be called {}",
                self.release,
                self.release.file_name(Packing::TarZst)
            )
        })?;
        Ok((file.clone(), packing))
    }
}

/// Where a package is kept on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    pub cache: PathBuf,
    pub staging: PathBuf,
}

/// Brings a release onto this host: downloads its package from the first endpoint that has it, verifies and unpacks it.
///
/// `progress` is told how many bytes are there, and of how many.
pub fn fetch(
    client: &Client,
    endpoints: &[Endpoint],
    wanted: &Wanted,
    keys: &Keys,
    places: &Places,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<VerifiedTree> {
    let mut attempt = || -> Result<VerifiedTree> {
        keys.ensure_some()?;
        let (file, packing) = wanted.file()?;
        for place in [&places.cache, &places.staging] {
            fs::create_dir_all(place).with_context(|| format!("cannot make {}", place.display()))?;
        }
        let sources = fetch::sources(endpoints, wanted.tarball.as_deref())?;
        let mut failures = Vec::new();
        for source in &sources {
            let tree = fetch::signature(client, source, &file).and_then(|signature| {
                let examined = verify::examine(&signature, keys, wanted)?;
                let archive = fetch::archive(client, source, &file, wanted, places, progress)?;
                let tree = open(&archive, packing, examined, wanted, keys, &places.staging);
                // Whole and unpacked, it is no longer needed; refused, it must not be taken for good the next time.
                store::remove(&archive)?;
                tree
            });
            match tree {
                Ok(tree) => return Ok(tree),
                Err(error) => failures.push(error),
            }
        }
        Err(fetch::all_failed(failures))
    };
    attempt().with_context(|| format!("cannot fetch {}", wanted.release))
}

/// As [`fetch`], from a file of this host with its signature beside it. The file may have any name that says how it is packed.
pub fn open_local(file: &Path, wanted: &Wanted, keys: &Keys, staging: &Path) -> Result<VerifiedTree> {
    let attempt = || -> Result<VerifiedTree> {
        keys.ensure_some()?;
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let packing = Packing::ALL.iter().copied().find(|packing| name.ends_with(&format!(".{packing}")));
        let packing = packing.context("its name ends neither in .tar.zst nor in .tar.gz nor in .zip")?;
        fs::create_dir_all(staging).with_context(|| format!("cannot make {}", staging.display()))?;
        fetch::ensure_space(staging, fs::metadata(file)?.len().saturating_mul(fetch::SPACE_PER_PACKAGE))?;
        let examined = verify::examine(&local_signature(file)?, keys, wanted)?;
        open(file, packing, examined, wanted, keys, staging)
    };
    attempt().with_context(|| format!("cannot use the package {}", file.display()))
}

/// What the signature beside a local package says that it is. A claim that [`open_local`] has yet to verify.
pub fn claimed(file: &Path) -> Result<Binding> {
    local_signature(file)
        .and_then(|signature| verify::claimed(&signature))
        .with_context(|| format!("cannot use the package {}", file.display()))
}

fn local_signature(file: &Path) -> Result<String> {
    let mut path = file.as_os_str().to_owned();
    path.push(SIGNATURE_SUFFIX);
    let path = PathBuf::from(path);
    let bytes = store::read(&path, MAX_SIGNATURE_BYTES)?
        .with_context(|| format!("its signature {} is missing; a package travels with it", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not a signature file", path.display()))
}

/// Verifies and unpacks through one open file.
fn open(
    archive: &Path,
    packing: Packing,
    signature: verify::Examined,
    wanted: &Wanted,
    keys: &Keys,
    staging: &Path,
) -> Result<VerifiedTree> {
    let mut opened = File::open(archive)?;
    let verified = verify::verify(&mut opened, signature, keys, wanted)?;
    let path = unpack::unpack(&mut opened, packing, wanted.release.os, staging, &unpack::Limits::default())?;
    let file = wanted.release.file_name(packing);
    Ok(VerifiedTree { path, file, binding: verified.binding, sha256: verified.sha256 })
}

/// An unpacked package whose signature was verified, in staging. Dropped, it is left to the next [`sweep`].
#[derive(Debug)]
pub struct VerifiedTree {
    path: PathBuf,
    file: String,
    binding: Binding,
    sha256: Digest,
}

impl VerifiedTree {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the signed comment said.
    pub fn binding(&self) -> &Binding {
        &self.binding
    }

    /// Of the archive.
    pub fn sha256(&self) -> &Digest {
        &self.sha256
    }

    /// Puts the tree where the release belongs, on the same file system. What stands there unfinished goes; a finished release stays,
    /// and is an error.
    pub fn move_to(self, to: &Path) -> Result<()> {
        let attempt = || -> Result<()> {
            let parent = to.parent().context("it has no parent directory")?;
            fs::create_dir_all(parent)?;
            if fs::symlink_metadata(to.join(COMPLETE)).is_ok() {
                bail!("a finished release stands there already");
            }
            store::remove_tree(to)?;
            fs::rename(&self.path, to).with_context(|| {
                format!("cannot move {} there (both must be on one file system)", self.path.display())
            })?;
            crate::platform::sync_directory(parent)?;
            let record = Completed {
                file: self.file.clone(),
                sha256: self.sha256.clone(),
                epoch: self.binding.epoch,
                unknown: Default::default(),
            };
            store::replace(&to.join(COMPLETE), &serde_json::to_vec(&record)?, Access::Public)
        };
        attempt().with_context(|| format!("cannot put {} into {}", self.binding.release, to.display()))
    }
}

/// What `.complete` in a release's directory says: which package was unpacked there, to the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completed {
    pub file: String,
    pub sha256: Digest,
    pub epoch: u64,
    #[serde(flatten)]
    unknown: serde_json::Map<String, serde_json::Value>,
}

/// Which package lies unpacked in `release_dir`; `None` where none does, or not wholly.
pub fn completed(release_dir: &Path) -> Result<Option<Completed>> {
    store::load(&release_dir.join(COMPLETE))
}

/// Removes a release: first it no longer counts, then it is gone.
pub fn discard(release_dir: &Path) -> Result<()> {
    store::remove(&release_dir.join(COMPLETE))?;
    store::remove_tree(release_dir)
}

/// Clears what earlier runs left: everything in staging, downloads that nobody came back for, and the oldest of the rest beyond the
/// cache's cap. To be called while no fetch is under way.
pub fn sweep(places: &Places) -> Result<()> {
    for entry in entries(&places.staging)? {
        let path = entry.path();
        if entry.file_type()?.is_dir() { store::remove_tree(&path)? } else { store::remove(&path)? }
    }
    let mut kept = Vec::new();
    for entry in entries(&places.cache)? {
        let metadata = entry.metadata()?;
        if !metadata.is_file() {
            continue;
        }
        // A clock that was set back makes a file young, not an error.
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let age = SystemTime::now().duration_since(modified).unwrap_or_default();
        if age > MAX_PART_AGE {
            store::remove(&entry.path())?;
        } else {
            kept.push((modified, metadata.len(), entry.path()));
        }
    }
    for path in beyond_cap(kept, MAX_CACHE_BYTES) {
        store::remove(&path)?;
    }
    Ok(())
}

/// Which files go so that the rest has at most `cap` bytes: the oldest.
fn beyond_cap(mut files: Vec<(SystemTime, u64, PathBuf)>, cap: u64) -> Vec<PathBuf> {
    files.sort();
    let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
    let mut gone = Vec::new();
    for (_, bytes, path) in files {
        if total <= cap {
            break;
        }
        total -= bytes;
        gone.push(path);
    }
    gone
}

fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>> {
    let attempt = || match fs::read_dir(directory) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    attempt().with_context(|| format!("cannot list {}", directory.display()))
}

/// Compares what was got with what was wanted, the same way wherever it came from.
fn ensure_size(got: u64, wanted: Option<u64>) -> Result<()> {
    if let Some(wanted) = wanted {
        ensure!(got == wanted, "it has {got} bytes where {wanted} were announced");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
