//! Packages: the only way in which bytes from the network become something that may run.
//!
//! [`fetch`] does the whole of it: signature, download, verification, unpacking. What it answers, a [`VerifiedTree`], has no public
//! constructor, so that skipping the verification does not compile. The archive is verified as it comes and unpacked from the same open
//! file, which is nobody else's to write: nothing can be put in its place in between.
//!
//! ```text
//! cache/<file>.part, .part.etag   being downloaded, gone on with by the next try or the next run; removed once in place
//! staging/<unique>/               being unpacked; removed with its VerifiedTree, else swept by the next start
//! <final>/  <final>/.complete     moved into place by one rename; `.complete` is written last and removed first
//! ```

mod cache;
mod completion;
mod disk_reservation;
mod fetch;
pub mod keys;
#[cfg(feature = "gateway")]
pub mod pack;
mod partial;
mod progress;
mod refused;
#[cfg(feature = "gateway")]
pub mod sign;
mod source_rotation;
mod sources;
pub mod trailer;
mod unpack;
mod verify;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::core::model::{AgentName, Arch, Binding, Digest, Os, Packing, Release};
use crate::core::order::Package;
use crate::core::throughput::Throttle;
use crate::endpoint::{Client, Endpoint};
use crate::home::{COMPLETE, Home};
use crate::platform;
use crate::store::{self, Access};

use disk_reservation::{DiskReservations, PackageSpace};
use fetch::{Download, SourceFailure};
use keys::Key;
use partial::PartialDownload;
use progress::DownloadProgress;
use source_rotation::SourceRotation;

pub use cache::{sweep, trim};
pub use completion::{Completed, WithdrawnRelease, discard, whole};
pub use keys::Keys;
pub use refused::{PackageRejected, is_refusal};
#[cfg(feature = "gateway")]
pub use unpack::look_through;
pub use verify::sha256_of;
#[cfg(feature = "gateway")]
pub use verify::{SignatureStatus, claimed as binding_of, judge};

/// What a package's signature file is called, after the package's own name.
pub const SIGNATURE_SUFFIX: &str = ".minisig";
/// A signature file is refused beyond this; minisign's have about 400 bytes.
pub const MAX_SIGNATURE_BYTES: u64 = 4 << 10;

/// A package whose size nobody told is given up beyond this, and one that is told to be larger is not begun.
const MAX_PACKAGE_BYTES: u64 = 4 << 30;

/// A release to be had, and what is known about its package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageRequest {
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

impl PackageRequest {
    /// Nothing is known but the release.
    pub fn new(release: Release) -> PackageRequest {
        PackageRequest { release, tarball: None, file: None, sha256: None, size: None, least_epoch: 0 }
    }

    /// What an order says about its package.
    pub fn of(package: &Package, name: &AgentName, os: Os, arch: Arch) -> PackageRequest {
        let Package { version: _, tarball, file, sha256, size } = package.clone();
        PackageRequest { release: package.release(name, os, arch), tarball, file, sha256, size, least_epoch: 0 }
    }

    /// What the package's file is called.
    pub fn file_name(&self) -> Option<String> {
        self.file().ok().map(|(file, _)| file)
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
        });
        let packing = packing.context(PackageRejected)?;
        Ok((file.clone(), packing))
    }
}

/// Where a package is kept on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackagePaths {
    pub cache: PathBuf,
    pub staging: PathBuf,
}

impl PackagePaths {
    /// Those of an installed home.
    pub fn of(home: &Home) -> PackagePaths {
        PackagePaths { cache: home.cache(), staging: home.staging() }
    }
}

/// What all fetches of a process share: the disk, and the rate of their downloads.
#[derive(Debug, Default)]
pub struct FetchLimits {
    space: DiskReservations,
    throttle: Mutex<Option<Throttle>>,
}

impl FetchLimits {
    /// From now on they bring at most so many bytes a second, all together; `None`: as many as they can.
    pub fn limit(&self, per_second: Option<u64>) {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        if throttle.as_ref().map(Throttle::per_second) != per_second {
            *throttle = per_second.map(Throttle::new);
        }
    }

    /// So many bytes came; how long to wait for the next.
    fn take(&self, bytes: u64) -> Duration {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        throttle.as_mut().map_or(Duration::ZERO, |throttle| throttle.take(bytes, Instant::now()))
    }
}

/// By what packages are fetched.
#[derive(Debug, Clone, Copy)]
pub struct FetchContext<'a> {
    pub client: &'a Client,
    /// Asked in order, after the place that a release names itself.
    pub endpoints: &'a [Endpoint],
    pub keys: &'a Keys,
    pub places: &'a PackagePaths,
    pub commons: &'a FetchLimits,
    /// For the download of one package, all tries together. What came until then is kept for the next fetch.
    pub within: Duration,
}

/// Is told how many bytes are there, and of how many; `false`: the package is not wanted any more.
pub type Progress<'a> = dyn FnMut(u64, Option<u64>) -> bool + 'a;

/// No source could give a package now. [`std::fmt::Display`] names what was wrong with each.
#[derive(Debug)]
pub struct Unavailable {
    why: String,
    /// They asked to be left alone for so long.
    pub retry_after: Option<Duration>,
    /// What one of them gave was refused, or who it is was not trusted.
    refused: bool,
}

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Unavailable {}

/// Brings a release onto this host: downloads its package from the first source that has it, verifies and unpacks it.
///
/// Fails with an [`Unavailable`] where it is the sources that failed. What came of the package stays for the next fetch, unless it is the
/// package that was refused.
pub fn fetch(means: &FetchContext<'_>, wanted: &PackageRequest, progress: &mut Progress<'_>) -> Result<VerifiedTree> {
    let mut attempt = || -> Result<VerifiedTree> {
        means.keys.ensure_some()?;
        let (file, packing) = wanted.file()?;
        let places = means.places;
        for place in [&places.cache, &places.staging] {
            cache::make_private(place)?;
        }
        if let Err(error) = trim(&places.cache, |_| true) {
            tracing::warn!(error = format!("{error:#}"), "what nobody comes back for stays in the cache");
        }
        let until = Instant::now() + means.within;
        let (sources, unusable) = sources::sources(means.endpoints, wanted.tarball.as_deref())?;
        let mut failures: Vec<String> = unusable.iter().map(|error| format!("{error:#}")).collect();
        let (mut retry_after, mut refused) = (None, false);
        let (mut watch, mut turns) = (DownloadProgress::new(&mut *progress), SourceRotation::new(sources.len()));
        let mut room = PackageSpace::new(&means.commons.space, &places.staging, until);
        let left = || until.saturating_duration_since(Instant::now());
        while let Some(turn) = turns.next(left()) {
            let (source, time) = (&sources[turn.source], turn.time);
            let download = Download { means, source, file: &file, wanted, time, until: Instant::now() + time };
            let error = match from(&download, packing, &mut room, &mut watch) {
                Ok(tree) => return Ok(tree),
                Err(SourceFailure::Host(error)) => return Err(error),
                Err(SourceFailure::Source { error, retry_after: asked }) => {
                    retry_after = retry_after.max(asked);
                    error
                }
                Err(SourceFailure::Late(error)) => {
                    turns.late(turn.source, left());
                    error
                }
                Err(SourceFailure::Damaged(error)) => {
                    if turns.damaged(turn.source) {
                        let error = format!("{error:#}");
                        tracing::warn!(file, error, "a package came damaged and is fetched again");
                    }
                    error
                }
            };
            refused |= is_refusal(&error);
            failures.push(format!("{error:#}"));
        }
        failures.dedup();
        Err(anyhow!(Unavailable { why: all_failed(failures), retry_after, refused }))
    };
    attempt().with_context(|| format!("cannot fetch {}", wanted.release))
}

/// One error out of what each source failed with.
fn all_failed(mut failures: Vec<String>) -> String {
    match failures.len() {
        1 => failures.remove(0),
        sources => format!("none of {sources} sources could serve it: {}", failures.join("; ")),
    }
}

/// From one source.
fn from(
    download: &Download<'_>,
    packing: Packing,
    room: &mut PackageSpace<'_>,
    watch: &mut DownloadProgress<'_>,
) -> Result<VerifiedTree, SourceFailure> {
    let Download { means, source, file, wanted, .. } = *download;
    let signature = fetch::signature(download, watch)?;
    let examined = verify::examine(&signature, means.keys, wanted).map_err(SourceFailure::source)?;
    let most = wanted.size.unwrap_or(MAX_PACKAGE_BYTES);
    let part = PartialDownload::open(&means.places.cache, file, most, &examined, means.keys, watch);
    let (mut part, began) = (part.map_err(SourceFailure::Host)?, Instant::now());
    if let Err(failure) = fetch::archive(download, &mut part, room, watch) {
        part.leave(wanted.size);
        return Err(failure);
    }
    let (bytes, came, took) = (part.have(), part.came(), began.elapsed());
    tracing::info!(file, bytes, came, milliseconds = took.as_millis() as u64, "a package is downloaded");
    let (mut archive, verification, path) = part.whole();
    let of_source = |error: anyhow::Error| error.context(format!("cannot take what {source} sent"));
    let verified = verification.finish().map_err(|error| SourceFailure::Damaged(of_source(error)));
    let verified =
        verified.and_then(|signed| signed.compared(wanted).map_err(|error| SourceFailure::source(of_source(error))));
    let tree = verified.and_then(|verified| {
        let staging = &means.places.staging;
        let mut may_write = |bytes| {
            watch.still_wanted()?;
            room.unpacks(bytes, &mut || Ok(watch.still_wanted()?))
        };
        unpacked(&mut archive, packing, verified, wanted, staging, &mut may_write).map_err(SourceFailure::Host)
    });
    if let Err(SourceFailure::Host(error)) = &tree
        && !is_refusal(error)
    {
        // It is whole and as it was signed: the next fetch need not download it.
        return tree;
    }
    match tree {
        // It is needed until the tree is in its place.
        Ok(tree) => Ok(VerifiedTree { archive: Some(CachedArchive(path)), ..tree }),
        Err(failure) => {
            // It must not be taken for good the next time. Its lock goes last.
            partial::remove(&path).map_err(SourceFailure::Host)?;
            drop(archive);
            Err(failure)
        }
    }
}

/// As [`fetch`], from a file of this host with its signature beside it. The file may have any name that says how it is packed.
pub fn open_local(file: &Path, wanted: &PackageRequest, keys: &Keys, staging: &Path) -> Result<VerifiedTree> {
    let attempt = || -> Result<VerifiedTree> {
        keys.ensure_some()?;
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let packing = Packing::ALL.iter().copied().find(|packing| name.ends_with(&format!(".{packing}")));
        let packing = packing.context("its name ends neither in .tar.zst nor in .tar.gz nor in .zip")?;
        fs::create_dir_all(staging).with_context(|| format!("cannot make {}", staging.display()))?;
        let size = fs::metadata(file)?.len();
        let commons = FetchLimits::default();
        let mut room = PackageSpace::new(&commons.space, staging, Instant::now());
        room.fit(size, &mut || Ok(()))?;
        let examined = verify::examine(&local_signature(file)?, keys, wanted)?;
        // Others may be able to write the file that was given: what is verified and unpacked is a copy that has no name.
        let mut copy =
            tempfile::tempfile_in(staging).with_context(|| format!("cannot make a file in {}", staging.display()))?;
        let mut verification = examined.begin(keys)?;
        let mut given = File::open(file)?.take(size);
        verify::read_through(&mut given, &mut verification, Some(&mut copy), &mut |_| Ok(()))
            .with_context(|| format!("cannot copy it into {}", staging.display()))?;
        let verified = verification.finish()?.compared(wanted)?;
        room.has_archive(size);
        unpacked(&mut copy, packing, verified, wanted, staging, &mut |bytes| room.unpacks(bytes, &mut || Ok(())))
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

/// Unpacks what was verified: `archive` is the file that it was verified through, and nobody else's to write.
fn unpacked(
    archive: &mut File,
    packing: Packing,
    verified: verify::VerifiedPackage,
    wanted: &PackageRequest,
    staging: &Path,
    may_write: &mut unpack::MayWrite<'_>,
) -> Result<VerifiedTree> {
    archive.rewind()?;
    let limits = unpack::UnpackLimits::default();
    let os = wanted.release.os;
    let path = unpack::unpack(archive, packing, os, staging, &limits, may_write).map_err(refused::by_content)?;
    let file = wanted.release.file_name(packing);
    let verify::VerifiedPackage { binding, sha256, signer } = verified;
    Ok(VerifiedTree { path: Unpacked(path), archive: None, file, binding, sha256, signer })
}

/// A tree in staging, which is removed when this is dropped.
#[derive(Debug)]
struct Unpacked(PathBuf);

impl Drop for Unpacked {
    fn drop(&mut self) {
        // Moved to its place, it is not there any more. What cannot be removed is left to the next sweep.
        let _ = store::remove_tree(&self.0);
    }
}

/// The archive of a tree, in the cache, which goes when this is dropped.
#[derive(Debug)]
struct CachedArchive(PathBuf);

impl CachedArchive {
    /// It stays, for another time.
    fn keep(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for CachedArchive {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = partial::remove(&self.0)
        {
            tracing::warn!(error = format!("{error:#}"), "a package that is unpacked stays in the cache for a while");
        }
    }
}

/// An unpacked package whose signature was verified, in staging. Dropped, nothing stays of it.
#[derive(Debug)]
pub struct VerifiedTree {
    path: Unpacked,
    /// In the cache; `None`: it came from elsewhere.
    archive: Option<CachedArchive>,
    file: String,
    binding: Binding,
    sha256: Digest,
    signer: Key,
}

impl VerifiedTree {
    pub fn path(&self) -> &Path {
        &self.path.0
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
    pub fn move_to(mut self, to: &Path) -> Result<()> {
        let attempt = || -> Result<()> {
            let parent = to.parent().context("it has no parent directory")?;
            match platform::create_directory(parent, 0o755) {
                // Whatever the umask is: nobody else may write where releases lie.
                Err(error) if error.kind() == ErrorKind::NotFound => fs::create_dir_all(parent)?,
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
            if fs::symlink_metadata(to.join(COMPLETE)).is_ok() {
                bail!("a finished release stands there already");
            }
            store::remove_tree(to)?;
            fs::rename(self.path(), to).with_context(|| {
                format!("cannot move {} there (both must be on one file system)", self.path().display())
            })?;
            platform::sync_directory(parent)?;
            let record = Completed {
                file: self.file.clone(),
                sha256: self.sha256.clone(),
                epoch: self.binding.epoch,
                signer: Some(self.signer.clone()),
                unknown: Default::default(),
            };
            store::replace(&to.join(COMPLETE), &serde_json::to_vec(&record)?, Access::Public)
        };
        let outcome = attempt();
        if outcome.is_err()
            && let Some(archive) = self.archive.take()
        {
            // What keeps it from its place need not have it downloaded again.
            archive.keep();
        }
        outcome.with_context(|| format!("cannot put {} into {}", self.binding.release, to.display()))
    }
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
