//! Makes a tree of an archive, and nothing outside of it.
//!
//! The archive's signature was verified before, yet its maker may have been careless, and whoever could sign is not thereby to write
//! anywhere on every host. So every entry is judged before anything is made of it:
//!
//! ```text
//! tar.zst, tar.gz -> tape ─┐ entries as the archive says them,
//! zip             -> zip  ─┴─> plan: names, links, duplicates, limits -> tree: directories, files and links on the disk
//! ```
//!
//! Files are made where none was, in directories that were made here; so no write ever goes through a link. What is refused is refused
//! whole: the caller gets an error and no tree. Owners, times and extended attributes are not taken over; of the mode only whether a
//! file can be run; directories get 0755 whatever the archive says. The gateway judges by the same rules what it publishes.

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
/// A package packed with a larger window (8 MiB) would need that much memory on every host.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// What a package may hold at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Files, directories and links, and whatever else an archive counts as an entry.
    pub entries: u64,
    /// Of all files together, unpacked.
    pub bytes: u64,
    /// The same for each byte of the archive, beyond [`FREE_BYTES`]: what grows more was made to.
    pub growth: u64,
    /// Of one name in a path, bytes.
    pub name: usize,
    /// Of a path below the root, bytes.
    pub path: usize,
}

/// Any archive may unpack to this much.
const FREE_BYTES: u64 = 64 << 20;

impl Default for UnpackLimits {
    fn default() -> UnpackLimits {
        UnpackLimits { entries: 100_000, bytes: 8 << 30, growth: 100, name: 255, path: 1024 }
    }
}

impl UnpackLimits {
    /// With the bytes that an archive of this length may unpack to.
    fn of(&self, archive_bytes: u64) -> UnpackLimits {
        let grown = archive_bytes.saturating_mul(self.growth).saturating_add(FREE_BYTES);
        UnpackLimits { bytes: self.bytes.min(grown), ..self.clone() }
    }
}

/// What an entry is that was admitted.
pub(super) enum EntryContent<'a> {
    Directory,
    File {
        executable: bool,
        size: u64,
        content: &'a mut dyn Read,
    },
    SymbolicLink(&'a str),
    /// Another name of this file of the package.
    HardLink(&'a str),
}

/// What is done with each of them.
type Sink<'a> = dyn FnMut(&PlannedEntry, EntryContent<'_>) -> Result<()> + 'a;

/// Asked before so many bytes of content are written; an error ends the unpacking.
pub(super) type MayWrite<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Unpacks into a new directory in `staging` and answers its path. After an error nothing of it is left, as far as can be.
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
        .with_context(|| format!("cannot make a directory in {}", staging.display()))?
        .keep();
    let mut tree = TreeWriter::new(root.clone(), may_write);
    let made = read(archive, packing, os, limits, &mut |admitted, item| tree.make(admitted, item));
    let finished = made.context("cannot unpack it").and_then(|()| tree.finish());
    match finished {
        Ok(()) => Ok(root),
        Err(error) => {
            let _ = fs::remove_dir_all(&root);
            Err(error)
        }
    }
}

/// A file or link of a package that was looked into.
#[cfg(feature = "gateway")]
pub struct InspectedEntry<'a> {
    /// Relative to the package's root, with `/`.
    pub path: &'a str,
    /// Whether it can be run; of a link, whether what it leads to might be.
    pub executable: bool,
    /// Of a file; need not be read.
    pub content: Option<&'a mut dyn Read>,
}

/// Reads through a package by the rules of a host that unpacks it, so that what no host would take is refused before it is published.
#[cfg(feature = "gateway")]
pub fn look_through(
    archive: &mut File,
    packing: Packing,
    os: Os,
    each: &mut dyn FnMut(InspectedEntry<'_>) -> Result<()>,
) -> Result<()> {
    read(archive, packing, os, &UnpackLimits::default(), &mut |admitted, item| {
        let path = admitted.path.as_str();
        match item {
            EntryContent::Directory => Ok(()),
            EntryContent::File { executable, content, .. } => {
                each(InspectedEntry { path, executable, content: Some(&mut *content) })?;
                // Damage shows only where all of it is read.
                std::io::copy(content, &mut std::io::sink()).map(drop).context("its content is damaged")
            }
            EntryContent::SymbolicLink(_) | EntryContent::HardLink(_) => {
                each(InspectedEntry { path, executable: true, content: None })
            }
        }
    })
}

/// Reads through the whole archive, and gives each entry to `sink` that every one before it allows.
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
    ensure!(!plan.is_empty(), "it is empty");
    Ok(())
}

/// An entry's name for an error: not all of it, and nothing that a terminal obeys.
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
