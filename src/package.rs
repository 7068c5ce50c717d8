//! Packages: the only way from bytes on the network to a program on the disk.
//!
//! [`fetch()`] checks the signature file, downloads, verifies and unpacks. It returns a [`VerifiedTree`], which has no public constructor,
//! so code that skips the verification does not compile. The archive is verified during the download and unpacked from the same open,
//! private file, so it cannot be exchanged between the two.
//!
//! ```text
//! cache/<file>.part, .part.etag   a partial download; the next attempt or the next run resumes it; removed after the move into place
//! staging/<unique>/               a package that is being unpacked; removed with its VerifiedTree, or swept at the next start
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
mod rejection;
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
pub use completion::{Completed, WithdrawnRelease, discard, load_completed};
pub use keys::Keys;
pub use rejection::{PackageRejected, is_refusal};
#[cfg(feature = "gateway")]
pub use unpack::inspect;
pub use verify::sha256_of;
#[cfg(feature = "gateway")]
pub use verify::{SignatureStatus, check_signature, claimed as binding_of};

/// The suffix of a package's signature file, appended to the package's file name.
pub const SIGNATURE_SUFFIX: &str = ".minisig";
/// Larger signature files are rejected; minisign's have about 400 bytes.
pub const MAX_SIGNATURE_BYTES: u64 = 4 << 10;

/// Limit for a package of unknown size; a package with a larger announced size is rejected before the download.
const MAX_PACKAGE_BYTES: u64 = 4 << 30;

/// A release to fetch, and the properties of its package as far as they are announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageRequest {
    pub release: Release,
    /// URL of the directory that holds the package; default: the endpoints' own download path.
    pub tarball: Option<String>,
    /// The package's file name; default: `{name}-{version}_{os}_{arch}.tar.zst`.
    pub file: Option<String>,
    pub sha256: Option<Digest>,
    /// Size of the package in bytes.
    pub size: Option<u64>,
    /// The epoch that the host has committed for this name; packages of a lower epoch are rejected.
    pub min_epoch: u64,
}

impl PackageRequest {
    /// A request for a release about which nothing else is announced.
    pub fn new(release: Release) -> PackageRequest {
        PackageRequest { release, tarball: None, file: None, sha256: None, size: None, min_epoch: 0 }
    }

    /// The request for the package of an order.
    pub fn of(package: &Package, name: &AgentName, os: Os, arch: Arch) -> PackageRequest {
        let Package { version: _, tarball, file, sha256, size } = package.clone();
        PackageRequest { release: package.release(name, os, arch), tarball, file, sha256, size, min_epoch: 0 }
    }

    /// The package's file name; `None` if the announced one does not belong to this release.
    pub fn file_name(&self) -> Option<String> {
        self.file().ok().map(|(file, _)| file)
    }

    /// The package's file name, which must be one of this release's, and its archive format.
    fn file(&self) -> Result<(String, Packing)> {
        let Some(file) = &self.file else { return Ok((self.release.file_name(Packing::TarZst), Packing::TarZst)) };
        let packing = self.release.packing_of(file).with_context(|| {
            format!(
                "cannot use the file {file:?} as the package of {}: the expected file name is {}",
                self.release,
                self.release.file_name(Packing::TarZst)
            )
        });
        let packing = packing.context(PackageRejected)?;
        Ok((file.clone(), packing))
    }
}

/// The directories of packages in transit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackagePaths {
    pub cache: PathBuf,
    pub staging: PathBuf,
}

impl PackagePaths {
    /// The directories of an installed home.
    pub fn of(home: &Home) -> PackagePaths {
        PackagePaths { cache: home.cache(), staging: home.staging() }
    }
}

/// Resources that all fetches of a process share: disk space and download rate.
#[derive(Debug, Default)]
pub struct FetchLimits {
    disk: DiskReservations,
    throttle: Mutex<Option<Throttle>>,
}

impl FetchLimits {
    /// Limits all downloads together to this rate from now on; `None`: no limit.
    pub fn limit(&self, per_second: Option<u64>) {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        if throttle.as_ref().map(Throttle::per_second) != per_second {
            *throttle = per_second.map(Throttle::new);
        }
    }

    /// Accounts for received bytes; returns how long to wait before the next read.
    fn take(&self, bytes: u64) -> Duration {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        throttle.as_mut().map_or(Duration::ZERO, |throttle| throttle.take(bytes, Instant::now()))
    }
}

/// Everything that a fetch needs besides the request.
#[derive(Debug, Clone, Copy)]
pub struct FetchContext<'a> {
    pub client: &'a Client,
    /// Tried in order, after the location that the release names.
    pub endpoints: &'a [Endpoint],
    pub keys: &'a Keys,
    pub paths: &'a PackagePaths,
    pub limits: &'a FetchLimits,
    /// Limit for the download of one package, all attempts together. The bytes received by then are kept for the next fetch.
    pub timeout: Duration,
}

/// Called with the number of bytes received and the total; returns `false` to cancel the fetch.
pub type Progress<'a> = dyn FnMut(u64, Option<u64>) -> bool + 'a;

/// No source could serve the package now. [`std::fmt::Display`] gives the reason for each source.
#[derive(Debug)]
pub struct Unavailable {
    why: String,
    /// The longest `Retry-After` of the sources.
    pub retry_after: Option<Duration>,
    /// A source's package was rejected, or a source was not trusted.
    refused: bool,
}

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Unavailable {}

/// Fetches a release: downloads its package from the first source that has it, verifies and unpacks it.
///
/// Fails with an [`Unavailable`] if all sources failed. A partial download is kept for the next fetch, unless the package was rejected.
pub fn fetch(
    context: &FetchContext<'_>,
    request: &PackageRequest,
    progress: &mut Progress<'_>,
) -> Result<VerifiedTree> {
    let mut attempt = || -> Result<VerifiedTree> {
        context.keys.ensure_not_empty()?;
        let (file, packing) = request.file()?;
        let paths = context.paths;
        for directory in [&paths.cache, &paths.staging] {
            cache::make_private(directory)?;
        }
        if let Err(error) = trim(&paths.cache, |_| true) {
            tracing::warn!(error = format!("{error:#}"), "cannot remove abandoned downloads from the cache");
        }
        let until = Instant::now() + context.timeout;
        let (sources, unusable) = sources::sources(context.endpoints, request.tarball.as_deref())?;
        let mut failures: Vec<String> = unusable.iter().map(|error| format!("{error:#}")).collect();
        let (mut retry_after, mut refused) = (None, false);
        let (mut progress, mut rotation) = (DownloadProgress::new(&mut *progress), SourceRotation::new(sources.len()));
        let mut space = PackageSpace::new(&context.limits.disk, &paths.staging, until);
        let left = || until.saturating_duration_since(Instant::now());
        while let Some(attempt) = rotation.next(left()) {
            let (source, time) = (&sources[attempt.source], attempt.time);
            let download = Download { context, source, file: &file, request, time, until: Instant::now() + time };
            let error = match fetch_from(&download, packing, &mut space, &mut progress) {
                Ok(tree) => return Ok(tree),
                Err(SourceFailure::Host(error)) => return Err(error),
                Err(SourceFailure::Source { error, retry_after: source_retry_after }) => {
                    retry_after = retry_after.max(source_retry_after);
                    error
                }
                Err(SourceFailure::TimedOut(error)) => {
                    rotation.timed_out(attempt.source, left());
                    error
                }
                Err(SourceFailure::Damaged(error)) => {
                    if rotation.damaged(attempt.source) {
                        let error = format!("{error:#}");
                        tracing::warn!(file, error, "a downloaded package is damaged; downloading it again");
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
    attempt().with_context(|| format!("cannot fetch {}", request.release))
}

/// Joins the errors of all sources into one.
fn all_failed(mut failures: Vec<String>) -> String {
    match failures.len() {
        1 => failures.remove(0),
        sources => format!("none of {sources} sources could serve it: {}", failures.join("; ")),
    }
}

/// Fetches from one source.
fn fetch_from(
    download: &Download<'_>,
    packing: Packing,
    space: &mut PackageSpace<'_>,
    progress: &mut DownloadProgress<'_>,
) -> Result<VerifiedTree, SourceFailure> {
    let Download { context, source, file, request, .. } = *download;
    let signature = fetch::signature(download, progress)?;
    let examined = verify::examine(&signature, context.keys, request).map_err(SourceFailure::source)?;
    let limit = request.size.unwrap_or(MAX_PACKAGE_BYTES);
    let part = PartialDownload::open(&context.paths.cache, file, limit, &examined, context.keys, progress);
    let (mut part, start) = (part.map_err(SourceFailure::Host)?, Instant::now());
    if let Err(failure) = fetch::archive(download, &mut part, space, progress) {
        part.keep_if_resumable(request.size);
        return Err(failure);
    }
    let (bytes, received, elapsed) = (part.size(), part.received(), start.elapsed());
    tracing::info!(file, bytes, received, milliseconds = elapsed.as_millis() as u64, "package downloaded");
    let (mut archive, verification, path) = part.into_parts();
    let with_source = |error: anyhow::Error| error.context(format!("cannot use the package from {source}"));
    let verified = verification.finish().map_err(|error| SourceFailure::Damaged(with_source(error)));
    let verified = verified
        .and_then(|signed| signed.ensure_announced(request).map_err(|error| SourceFailure::source(with_source(error))));
    let tree = verified.and_then(|verified| {
        let staging = &context.paths.staging;
        let mut may_write = |bytes| {
            progress.still_wanted()?;
            space.reserve_tree(bytes, &mut || Ok(progress.still_wanted()?))
        };
        unpack_verified(&mut archive, packing, verified, request, staging, &mut may_write).map_err(SourceFailure::Host)
    });
    if let Err(SourceFailure::Host(error)) = &tree
        && !is_refusal(error)
    {
        // The archive is complete and verified: keep it, so that the next fetch need not download it.
        return tree;
    }
    match tree {
        // The archive is kept until the tree is in place.
        Ok(tree) => Ok(VerifiedTree { archive: Some(CachedArchive(path)), ..tree }),
        Err(failure) => {
            // A rejected archive must not be used again. Dropping the file last keeps the lock until it is removed.
            partial::remove(&path).map_err(SourceFailure::Host)?;
            drop(archive);
            Err(failure)
        }
    }
}

/// Like [`fetch()`], for a local file with its signature beside it. The file may have any name with the suffix of an archive format.
pub fn open_local(file: &Path, request: &PackageRequest, keys: &Keys, staging: &Path) -> Result<VerifiedTree> {
    let attempt = || -> Result<VerifiedTree> {
        keys.ensure_not_empty()?;
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let packing = Packing::ALL.iter().copied().find(|packing| name.ends_with(&format!(".{packing}")));
        let packing = packing.context("the file name must end in .tar.zst, .tar.gz or .zip")?;
        fs::create_dir_all(staging).with_context(|| format!("cannot create {}", staging.display()))?;
        let size = fs::metadata(file)?.len();
        let limits = FetchLimits::default();
        let mut space = PackageSpace::new(&limits.disk, staging, Instant::now());
        space.reserve(size, &mut || Ok(()))?;
        let examined = verify::examine(&local_signature(file)?, keys, request)?;
        // Others may be able to write to the given file, so verify and unpack a copy without a name.
        let mut copy = tempfile::tempfile_in(staging)
            .with_context(|| format!("cannot create a temporary file in {}", staging.display()))?;
        let mut verification = examined.begin(keys)?;
        let mut given = File::open(file)?.take(size);
        verify::read_through(&mut given, &mut verification, Some(&mut copy), &mut |_| Ok(()))
            .with_context(|| format!("cannot copy the package to {}", staging.display()))?;
        let verified = verification.finish()?.ensure_announced(request)?;
        space.set_archive(size);
        unpack_verified(&mut copy, packing, verified, request, staging, &mut |bytes| {
            space.reserve_tree(bytes, &mut || Ok(()))
        })
    };
    attempt().with_context(|| format!("cannot use the package {}", file.display()))
}

/// The binding in the signature beside a local package. It is a claim until [`open_local`] has verified it.
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
        .with_context(|| format!("the signature file {} is missing; put it beside the package", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not a signature file", path.display()))
}

/// Unpacks a verified package. `archive` is the file that was verified; no one else can write to it.
fn unpack_verified(
    archive: &mut File,
    packing: Packing,
    verified: verify::VerifiedPackage,
    request: &PackageRequest,
    staging: &Path,
    may_write: &mut unpack::MayWrite<'_>,
) -> Result<VerifiedTree> {
    archive.rewind()?;
    let limits = unpack::UnpackLimits::default();
    let os = request.release.os;
    let path = unpack::unpack(archive, packing, os, staging, &limits, may_write).map_err(rejection::mark_rejected)?;
    let file = request.release.file_name(packing);
    let verify::VerifiedPackage { binding, sha256, signer } = verified;
    Ok(VerifiedTree { path: StagedTree(path), archive: None, file, binding, sha256, signer })
}

/// A tree in staging, removed when this is dropped.
#[derive(Debug)]
struct StagedTree(PathBuf);

impl Drop for StagedTree {
    fn drop(&mut self) {
        // After the move the path no longer exists. If the removal fails, the next sweep removes the tree.
        let _ = store::remove_tree(&self.0);
    }
}

/// The cached archive of a tree, removed when this is dropped.
#[derive(Debug)]
struct CachedArchive(PathBuf);

impl CachedArchive {
    /// Keeps the archive for another fetch.
    fn keep(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for CachedArchive {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = partial::remove(&self.0)
        {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot remove an unpacked package from the cache; a later cleanup removes it"
            );
        }
    }
}

/// An unpacked package with a verified signature, in staging. Dropping it removes the tree.
#[derive(Debug)]
pub struct VerifiedTree {
    path: StagedTree,
    /// The archive in the cache; `None` for a local package.
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

    /// The binding from the signed comment.
    pub fn binding(&self) -> &Binding {
        &self.binding
    }

    /// The SHA-256 of the archive.
    pub fn sha256(&self) -> &Digest {
        &self.sha256
    }

    /// Moves the tree to the release directory, which must be on the same file system. Replaces an incomplete release; a complete one at
    /// that path is an error. Survives a power cut: the tree is synced before `.complete` is written.
    pub fn move_to(mut self, to: &Path) -> Result<()> {
        let attempt = || -> Result<()> {
            let parent = to.parent().context("it has no parent directory")?;
            match platform::create_directory(parent, 0o755) {
                // Set the mode explicitly: no one else may write to the directory of releases, whatever the umask is.
                Err(error) if error.kind() == ErrorKind::NotFound => fs::create_dir_all(parent)?,
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
            if fs::symlink_metadata(to.join(COMPLETE)).is_ok() {
                bail!("a complete release already exists there");
            }
            completion::discard(to)?;
            // After the directory of releases was created: its name is synced, too.
            platform::sync_tree(self.path())
                .map_err(|error| fetch::unwritable(error, self.path().parent().unwrap_or(self.path())))?;
            platform::rename(self.path(), to).with_context(|| {
                format!("cannot rename {} (both paths must be on one file system)", self.path().display())
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
            // The obstacle is on this host: keep the archive, so that it need not be downloaded again.
            archive.keep();
        }
        outcome.with_context(|| format!("cannot move {} to {}", self.binding.release, to.display()))
    }
}

/// Compares the size of a package with the announced one.
fn ensure_size(size: u64, announced: Option<u64>) -> Result<()> {
    if let Some(announced) = announced {
        ensure!(size == announced, "the size is {size} bytes, but {announced} were announced");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
