//! A partial download: its file in the cache, verified as far as it was received.
//!
//! ```text
//! cache/<file>.part        the bytes received; private to its owner, locked by its writer
//! cache/<file>.part.etag   the ETag of the file they belong to; exists only while the download can be resumed
//! ```
//!
//! The bytes are verified while they are written; only those left by an earlier run are read again. The file stays open and locked from
//! the first byte until it is unpacked, so the bytes that are unpacked are the bytes that were verified.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::progress::{DownloadCancelled, DownloadProgress};
use super::verify::{self, SignedClaim, Verification};
use super::{Keys, MAX_PACKAGE_BYTES};
use crate::{platform, store};

/// Suffix of the partial file, after the package's name, and of its ETag file, after that.
const PART_SUFFIX: &str = ".part";
const ETAG_SUFFIX: &str = ".etag";
const MAX_ETAG_BYTES: u64 = 256;

/// How long to wait for another fetch of the same file to release the lock; a child process between fork and exec may hold it too.
const LOCK_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });
const LOCK_POLL: Duration = Duration::from_millis(20);

pub(super) struct PartialDownload<'a> {
    path: PathBuf,
    etag_path: PathBuf,
    /// Positioned after the bytes that the verification has processed.
    file: File,
    verification: Verification<'a>,
    claim: &'a SignedClaim,
    keys: &'a Keys,
    etag: Option<String>,
    /// The origin of all bytes; `None` if mixed, or left by an earlier run.
    origin: Option<String>,
    received: u64,
}

impl<'a> PartialDownload<'a> {
    /// Opens the partial download of `file` in the cache, if it has at most `limit` bytes; else starts an empty one.
    pub(super) fn open(
        cache: &Path,
        file: &str,
        limit: u64,
        claim: &'a SignedClaim,
        keys: &'a Keys,
        progress: &mut DownloadProgress<'_>,
    ) -> Result<PartialDownload<'a>> {
        let path = cache.join(format!("{file}{PART_SUFFIX}"));
        let opened = open_locked(&path)?;
        let mut part = PartialDownload {
            etag_path: etag_path_of(&path),
            path,
            file: opened,
            verification: claim.begin(keys)?,
            claim,
            keys,
            etag: None,
            origin: None,
            received: 0,
        };
        let existing = part.file.metadata()?.len();
        let etag = store::read(&part.etag_path, MAX_ETAG_BYTES).ok().flatten();
        part.etag = etag.and_then(|etag| String::from_utf8(etag).ok()).filter(|etag| !etag.is_empty());
        if existing > 0 && existing <= limit.min(MAX_PACKAGE_BYTES) && (part.etag.is_some() || existing == limit) {
            let read =
                verify::read_through(&mut (&part.file).take(existing), &mut part.verification, None, &mut |_| {
                    Ok(progress.still_wanted()?)
                });
            match read {
                Err(error) if !error.is::<DownloadCancelled>() => {
                    // Discard an unreadable part; it would fail every later fetch too.
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "cannot read a partial download; downloading it from the start"
                    );
                    part.clear()?;
                }
                read => read?,
            }
        } else {
            part.clear()?;
        }
        Ok(part)
    }

    /// Number of bytes received.
    pub(super) fn size(&self) -> u64 {
        self.verification.size()
    }

    /// Number of bytes appended since it was opened, including discarded ones.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Whether all bytes came from that origin.
    pub(super) fn is_from(&self, origin: &str) -> bool {
        self.origin.as_deref() == Some(origin)
    }

    /// The number of bytes and their ETag, if the download can be resumed.
    pub(super) fn resumable(&self) -> Option<(u64, &str)> {
        let etag = self.etag.as_deref().filter(|_| self.size() > 0)?;
        Some((self.size(), etag))
    }

    /// Discards all bytes.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.restart_as(None)
    }

    /// Discards all bytes and restarts with a response of that origin.
    pub(super) fn restart(&mut self, etag: Option<&str>, origin: &str) -> Result<()> {
        self.restart_as(etag)?;
        self.origin = Some(origin.to_owned());
        Ok(())
    }

    /// Continues with a response of that origin.
    pub(super) fn continue_from(&mut self, origin: &str) {
        if !self.is_from(origin) {
            self.origin = None;
        }
    }

    fn restart_as(&mut self, etag: Option<&str>) -> Result<()> {
        let mut attempt = || -> Result<()> {
            // Remove the ETag first: it must never exist beside the bytes of another file.
            self.forget_etag();
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.verification = self.claim.begin(self.keys)?;
            // A weak ETag does not guarantee equal bytes.
            if let Some(etag) = etag.filter(|etag| !etag.starts_with("W/") && etag.len() as u64 <= MAX_ETAG_BYTES) {
                fs::write(&self.etag_path, etag)?;
                self.etag = Some(etag.to_owned());
            }
            Ok(())
        };
        attempt().with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Makes the download not resumable.
    pub(super) fn forget_etag(&mut self) {
        (self.etag, self.origin) = (None, None);
        let _ = fs::remove_file(&self.etag_path);
    }

    /// Appends the next bytes.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.verification.update(bytes);
        self.received += bytes.len() as u64;
        Ok(())
    }

    /// Keeps the file if it can be resumed or is complete (`announced`: the full size); else removes it.
    pub(super) fn keep_if_resumable(self, announced: Option<u64>) {
        if self.size() == 0 || (self.etag.is_none() && Some(self.size()) != announced) {
            let _ = remove(&self.path);
        }
    }

    /// Takes a complete download apart: the file to unpack, the verification to finish, and the path to give to [`remove`]. Unpacking needs
    /// neither the path nor the lock.
    pub(super) fn into_parts(self) -> (File, Verification<'a>, PathBuf) {
        (self.file, self.verification, self.path)
    }
}

/// Removes a partial download and its ETag.
pub(super) fn remove(path: &Path) -> Result<()> {
    store::remove(&etag_path_of(path)).and_then(|()| store::remove(path))
}

/// Whether a file of the cache belongs to a download in progress.
pub(super) fn is_in_use(path: &Path) -> bool {
    let part = match path.to_str().and_then(|text| text.strip_suffix(ETAG_SUFFIX)) {
        Some(part) => PathBuf::from(part),
        None => path.to_owned(),
    };
    let is_locked = File::open(part).and_then(|file| match file.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    });
    is_locked.unwrap_or(false)
}

/// The package to which a file of the cache belongs.
pub(super) fn package_of(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(ETAG_SUFFIX).unwrap_or(name).strip_suffix(PART_SUFFIX)
}

fn etag_path_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ETAG_SUFFIX);
    name.into()
}

/// Opens and locks the file.
fn open_locked(path: &Path) -> Result<File> {
    let until = Instant::now() + LOCK_TIMEOUT;
    loop {
        let attempt = platform::open_private(path).and_then(|file| match file.try_lock() {
            // The previous owner of the lock may have removed the file.
            Ok(()) => platform::is_same_file(&file, path).map(|same| same.then_some(file)),
            Err(TryLockError::WouldBlock) => Err(ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => Err(error),
        });
        match attempt {
            Ok(Some(file)) => return Ok(file),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => platform::pause(LOCK_POLL),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("{} is in use by another download", path.display())
            }
            Err(error) => return Err(error).with_context(|| format!("cannot write {}", path.display())),
        }
    }
}
