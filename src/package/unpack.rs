//! Unpacks an archive into a new directory, and writes nothing outside of it.
//!
//! The archive's signature is already verified, but its creator may have been careless, and the right to sign must not be the right to
//! write anywhere on every host. So every entry is checked before anything is created:
//!
//! ```text
//! tar.zst, tar.gz -> tar ─┐ entries as the archive lists them,
//! zip             -> zip ─┴─> plan: names, links, duplicates, limits -> tree: directories, files and links on the disk
//! ```
//!
//! Files are created only where none exists, in directories that were created here, so no write follows a link. A rejected archive is
//! rejected as a whole: the caller gets an error and no tree. Owners, times and extended attributes are ignored; of a file's mode only the
//! execute bit counts; directories get 0755. The gateway checks packages by the same rules before it publishes them.

mod names;
mod plan;
mod tar;
mod tree;
mod zip;

use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flate2::read::MultiGzDecoder;

#[cfg(feature = "gateway")]
pub(super) use self::names::link_stays_inside;
use self::plan::{PlannedEntry, UnpackPlan};
use self::tree::TreeWriter;
use crate::core::model::{Os, Packing};

const CHUNK_BYTES: usize = 64 << 10;
/// Packages with a larger zstd window than 8 MiB are rejected; every host would need that much memory.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// Limits for the content of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Number of entries of any kind, and of directories they imply.
    pub entries: u64,
    /// Unpacked size of all files together.
    pub bytes: u64,
    /// Unpacked bytes for each byte of the archive, beyond [`FREE_BYTES`]; a higher ratio indicates a decompression bomb.
    pub growth: u64,
    /// Length of a path component in bytes.
    pub name: usize,
    /// Length of a path below the root in bytes.
    pub path: usize,
}

/// Any archive may unpack to this size.
const FREE_BYTES: u64 = 64 << 20;

impl Default for UnpackLimits {
    fn default() -> UnpackLimits {
        UnpackLimits { entries: 100_000, bytes: 8 << 30, growth: 100, name: 255, path: 1024 }
    }
}

impl UnpackLimits {
    /// The limits for an archive of this length.
    fn of(&self, archive_bytes: u64) -> UnpackLimits {
        let grown = archive_bytes.saturating_mul(self.growth).saturating_add(FREE_BYTES);
        UnpackLimits { bytes: self.bytes.min(grown), ..self.clone() }
    }
}

/// The content of an accepted entry.
pub(super) enum EntryContent<'a> {
    Directory,
    File {
        executable: bool,
        size: u64,
        content: &'a mut dyn Read,
    },
    SymbolicLink(&'a str),
    /// A hard link to this file of the package.
    HardLink(&'a str),
}

/// Receives each accepted entry.
type Sink<'a> = dyn FnMut(&PlannedEntry, EntryContent<'_>) -> Result<()> + 'a;

/// Called before that many bytes are written; an error stops the unpacking.
pub(super) type MayWrite<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Unpacks into a new directory in `staging` and returns its path. After an error the directory is removed.
pub(super) fn unpack(
    archive: &mut File,
    packing: Packing,
    os: Os,
    staging: &Path,
    limits: &UnpackLimits,
    may_write: &mut MayWrite<'_>,
) -> Result<PathBuf> {
    let root = tempfile::Builder::new()
        .prefix("tree-")
        .tempdir_in(staging)
        .with_context(|| format!("cannot create a directory in {}", staging.display()))?
        .keep();
    let mut tree = TreeWriter::new(root.clone(), may_write);
    let written = read(archive, packing, os, limits, &mut |planned, content| tree.write(planned, content));
    let finished = written.context("cannot unpack the package").and_then(|()| tree.finish());
    match finished {
        Ok(()) => Ok(root),
        Err(error) => {
            let _ = fs::remove_dir_all(&root);
            Err(error)
        }
    }
}

/// A file or link found in a package.
#[cfg(feature = "gateway")]
pub struct InspectedEntry<'a> {
    /// Relative to the package's root, with `/` as separator.
    pub path: &'a str,
    /// Whether it is executable; for a link, true, as its target may be.
    pub executable: bool,
    /// The content of a file; may be left unread.
    pub content: Option<&'a mut dyn Read>,
}

/// Reads a package with the rules of a host that unpacks it, so that an unacceptable package is rejected before it is published.
#[cfg(feature = "gateway")]
pub fn inspect(
    archive: &mut File,
    packing: Packing,
    os: Os,
    each: &mut dyn FnMut(InspectedEntry<'_>) -> Result<()>,
) -> Result<()> {
    read(archive, packing, os, &UnpackLimits::default(), &mut |planned, content| {
        let path = planned.path.as_str();
        match content {
            EntryContent::Directory => Ok(()),
            EntryContent::File { executable, content, .. } => {
                each(InspectedEntry { path, executable, content: Some(&mut *content) })?;
                // Read all of it, to detect damage.
                std::io::copy(content, &mut std::io::sink()).map(drop).context("the content is damaged")
            }
            EntryContent::SymbolicLink(_) | EntryContent::HardLink(_) => {
                each(InspectedEntry { path, executable: true, content: None })
            }
        }
    })
}

/// Reads the whole archive and passes each entry to `sink` after all earlier ones were accepted.
fn read(archive: &mut File, packing: Packing, os: Os, limits: &UnpackLimits, sink: &mut Sink<'_>) -> Result<()> {
    let length = archive.metadata()?.len();
    archive.seek(SeekFrom::Start(0))?;
    let mut plan = UnpackPlan::new(os, limits.of(length));
    match packing {
        Packing::TarZst => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(CHUNK_BYTES, archive))?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            tar::read(decoder, &mut plan, sink)
        }
        Packing::TarGz => {
            let decoder = MultiGzDecoder::new(BufReader::with_capacity(CHUNK_BYTES, archive));
            tar::read(decoder, &mut plan, sink)
        }
        Packing::Zip => zip::read(archive, &mut plan, sink),
    }?;
    ensure!(!plan.is_empty(), "the archive is empty");
    Ok(())
}

/// An entry's name for an error: truncated, with control characters escaped.
fn shown(path: &str) -> String {
    let start: String = path.chars().take(100).collect();
    format!("the entry {start:?}{}", if start.len() < path.len() { "…" } else { "" })
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).with_context(|| {
        let start = &bytes[..bytes.len().min(100)];
        format!("the name {:?} is not UTF-8", String::from_utf8_lossy(start))
    })
}

#[cfg(test)]
mod tests;
