//! A package that is being downloaded: its file in the cache, verified as far as it is there.
//!
//! ```text
//! cache/<file>.part        as much as came; private to its owner, locked by who writes it
//! cache/<file>.part.etag   of which file that is; there only while it can be gone on with
//! ```
//!
//! The bytes are verified on their way into the file. Only what an earlier run has left there is read again. From the first byte to the
//! unpacking the file stays open and locked, so what is unpacked is what was verified.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::progress::{DownloadCancelled, DownloadProgress};
use super::verify::{self, SignedClaim, Verification};
use super::{Keys, MAX_PACKAGE_BYTES};
use crate::{platform, store};

/// What it is called, after the package's own name; and the ETag, after that.
const PART_SUFFIX: &str = ".part";
const ETAG_SUFFIX: &str = ".etag";
const MAX_ETAG_BYTES: u64 = 256;

/// For another fetch of the same file to let go of it: a child process that has not come to its own program yet may hold the lock too.
const LOCK: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });
const LOOK: Duration = Duration::from_millis(20);

pub(super) struct PartialDownload<'a> {
    path: PathBuf,
    etag_path: PathBuf,
    /// Stands behind the bytes that the verification has seen.
    file: File,
    verification: Verification<'a>,
    claim: &'a SignedClaim,
    keys: &'a Keys,
    etag: Option<String>,
    /// Who sent what is there; not known of what an earlier run has left.
    origin: Option<String>,
    came: u64,
}

impl<'a> PartialDownload<'a> {
    /// Opens the part of `file` in the cache, where there is one of at most `most` bytes, or begins one.
    pub(super) fn open(
        cache: &Path,
        file: &str,
        most: u64,
        claim: &'a SignedClaim,
        keys: &'a Keys,
        watch: &mut DownloadProgress<'_>,
    ) -> Result<PartialDownload<'a>> {
        let path = cache.join(format!("{file}{PART_SUFFIX}"));
        let opened = locked(&path)?;
        let mut part = PartialDownload {
            etag_path: etag_of(&path),
            path,
            file: opened,
            verification: claim.begin(keys)?,
            claim,
            keys,
            etag: None,
            origin: None,
            came: 0,
        };
        let there = part.file.metadata()?.len();
        let etag = store::read(&part.etag_path, MAX_ETAG_BYTES).ok().flatten();
        part.etag = etag.and_then(|etag| String::from_utf8(etag).ok()).filter(|etag| !etag.is_empty());
        if there > 0 && there <= most.min(MAX_PACKAGE_BYTES) && (part.etag.is_some() || there == most) {
            let read = verify::read_through(&mut (&part.file).take(there), &mut part.verification, None, &mut |_| {
                Ok(watch.still_wanted()?)
            });
            match read {
                Err(error) if !error.is::<DownloadCancelled>() => {
                    // What cannot be read is not there; kept, it would fail every other time too.
                    tracing::warn!(error = format!("{error:#}"), "a part of a download is lost and fetched again");
                    part.clear()?;
                }
                read => read?,
            }
        } else {
            part.clear()?;
        }
        Ok(part)
    }

    /// How many bytes are there.
    pub(super) fn have(&self) -> u64 {
        self.verification.size()
    }

    /// How many bytes were appended since it was opened, those among them that were not kept.
    pub(super) fn came(&self) -> u64 {
        self.came
    }

    /// Whether all that is there came from that origin.
    pub(super) fn is_from(&self, origin: &str) -> bool {
        self.origin.as_deref() == Some(origin)
    }

    /// What is there, and of which file, where it can be gone on with.
    pub(super) fn resumable(&self) -> Option<(u64, &str)> {
        let etag = self.etag.as_deref().filter(|_| self.have() > 0)?;
        Some((self.have(), etag))
    }

    /// Nothing of what was there counts.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.begin_as(None)
    }

    /// Begins anew with what that origin sends.
    pub(super) fn begin(&mut self, etag: Option<&str>, origin: &str) -> Result<()> {
        self.begin_as(etag)?;
        self.origin = Some(origin.to_owned());
        Ok(())
    }

    /// Goes on with what that origin sends.
    pub(super) fn go_on(&mut self, origin: &str) {
        if !self.is_from(origin) {
            self.origin = None;
        }
    }

    fn begin_as(&mut self, etag: Option<&str>) -> Result<()> {
        let mut attempt = || -> Result<()> {
            // In this order: an ETag must never stand beside another file's bytes.
            self.forget();
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.verification = self.claim.begin(self.keys)?;
            // A weak one does not say that the bytes are the same.
            if let Some(etag) = etag.filter(|etag| !etag.starts_with("W/") && etag.len() as u64 <= MAX_ETAG_BYTES) {
                fs::write(&self.etag_path, etag)?;
                self.etag = Some(etag.to_owned());
            }
            Ok(())
        };
        attempt().with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// What is there cannot be gone on with.
    pub(super) fn forget(&mut self) {
        (self.etag, self.origin) = (None, None);
        let _ = fs::remove_file(&self.etag_path);
    }

    /// The bytes that follow.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.verification.update(bytes);
        self.came += bytes.len() as u64;
        Ok(())
    }

    /// Leaves it to another time, where it can be gone on with then: `whole` is its announced size.
    pub(super) fn leave(self, whole: Option<u64>) {
        if self.have() == 0 || (self.etag.is_none() && Some(self.have()) != whole) {
            let _ = remove(&self.path);
        }
    }

    /// All of it is there: the verification to be finished, and the file to be unpacked. Neither its name nor its lock are needed for
    /// that; the name goes with [`remove`].
    pub(super) fn whole(self) -> (File, Verification<'a>, PathBuf) {
        (self.file, self.verification, self.path)
    }
}

/// Removes a part with its ETag.
pub(super) fn remove(path: &Path) -> Result<()> {
    store::remove(&etag_of(path)).and_then(|()| store::remove(path))
}

/// Whether a file of the cache is a part that somebody is writing, or belongs to one.
pub(super) fn is_in_use(path: &Path) -> bool {
    let part = match path.to_str().and_then(|text| text.strip_suffix(ETAG_SUFFIX)) {
        Some(part) => PathBuf::from(part),
        None => path.to_owned(),
    };
    let held = File::open(part).and_then(|file| match file.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    });
    held.unwrap_or(false)
}

/// The package that a file of the cache is a part of, or belongs to one of.
pub(super) fn package_of(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(ETAG_SUFFIX).unwrap_or(name).strip_suffix(PART_SUFFIX)
}

fn etag_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ETAG_SUFFIX);
    name.into()
}

/// Opens the file for this fetch alone.
fn locked(path: &Path) -> Result<File> {
    let until = Instant::now() + LOCK;
    loop {
        let attempt = platform::open_private(path).and_then(|file| match file.try_lock() {
            // Who had it until now may have removed it.
            Ok(()) => platform::is_same_file(&file, path).map(|same| same.then_some(file)),
            Err(TryLockError::WouldBlock) => Err(ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => Err(error),
        });
        match attempt {
            Ok(Some(file)) => return Ok(file),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => platform::pause(LOOK),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("{} is being written by another download", path.display())
            }
            Err(error) => return Err(error).with_context(|| format!("cannot write {}", path.display())),
        }
    }
}
