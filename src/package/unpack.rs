//! Makes a tree of an archive, and nothing outside of it.
//!
//! The archive's signature was verified before, yet its maker may have been careless, and whoever could sign is not thereby to write
//! anywhere on every host: every entry is checked against the tree as it was made so far. Files are made where none was, in directories
//! that were made here; so no write ever goes through a link. What is refused is refused whole: the caller gets an error and no tree.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use tar::EntryType;

use super::fetch::unwritable;
use crate::core::model::Packing;
use crate::home::COMPLETE;
use crate::platform;

const CHUNK_BYTES: usize = 64 << 10;
/// A package packed with a larger window (8 MiB) would need that much memory on every host.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// What tar may say about one entry beside its content: long names, extended headers.
const MAX_HEADER_BYTES: u64 = 1 << 20;
/// A link's target beyond this is none that a file system takes.
const MAX_TARGET_BYTES: u64 = 4096;

const TYPE_MASK: u32 = 0o170000;
const TYPE_FILE: u32 = 0o100000;
const TYPE_DIRECTORY: u32 = 0o040000;
const TYPE_LINK: u32 = 0o120000;
const SET_ID: u32 = 0o6000;

/// What a package may hold at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and links.
    pub entries: u64,
    /// Of all files together, unpacked.
    pub bytes: u64,
    /// Of one name in a path, bytes.
    pub name: usize,
    /// Of a path below the root, bytes.
    pub path: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { entries: 100_000, bytes: 8 << 30, name: 255, path: 1024 }
    }
}

/// Unpacks into a new directory in `staging` and answers its path. After an error nothing of it is left, as far as can be.
pub(super) fn unpack(archive: &mut File, packing: Packing, staging: &Path, limits: &Limits) -> Result<PathBuf> {
    let root = tempfile::Builder::new()
        .prefix("tree-")
        .tempdir_in(staging)
        .with_context(|| format!("cannot make a directory in {}", staging.display()))?
        .keep();
    let mut tree = Tree::new(root, limits.clone());
    let unpacked = match packing {
        Packing::TarZst => from_zstd(archive, &mut tree),
        Packing::TarGz => from_tar(MultiGzDecoder::new(BufReader::with_capacity(CHUNK_BYTES, archive)), &mut tree),
        Packing::Zip => from_zip(archive, &mut tree),
    };
    match unpacked.context("cannot unpack it").and_then(|()| tree.finish()) {
        Ok(root) => Ok(root),
        Err(error) => {
            let _ = fs::remove_dir_all(&tree.root);
            Err(error)
        }
    }
}

fn from_zstd(archive: &mut File, tree: &mut Tree) -> Result<()> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(CHUNK_BYTES, archive))?;
    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
    from_tar(decoder, tree)
}

/// Fails when more is read than was allowed for: a few bytes of archive can stand for gigabytes of header.
struct Allowed<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Allowed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let amount = self.inner.read(buffer)?;
        match self.left.get().checked_sub(amount as u64) {
            Some(left) => self.left.set(left),
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "an entry's header is larger than any name needs",
                ));
            }
        }
        Ok(amount)
    }
}

fn from_tar(decoded: impl Read, tree: &mut Tree) -> Result<()> {
    let left = Rc::new(Cell::new(MAX_HEADER_BYTES));
    let mut archive = tar::Archive::new(Allowed { inner: decoded, left: Rc::clone(&left) });
    let mut entries = archive.entries()?;
    loop {
        left.set(MAX_HEADER_BYTES);
        let Some(entry) = entries.next() else { return Ok(()) };
        let mut entry = entry.context("it is not a tar archive, or is damaged")?;
        let path = text(&entry.path_bytes())?.to_owned();
        let refused = || shown(&path);
        let mode = entry.header().mode().with_context(refused)?;
        match entry.header().entry_type() {
            EntryType::Directory => tree.directory(&path),
            EntryType::Regular | EntryType::Continuous => {
                left.set(entry.size().saturating_add(MAX_HEADER_BYTES));
                tree.file(&path, mode, &mut entry)
            }
            EntryType::Symlink => match entry.link_name_bytes() {
                Some(target) => text(&target).and_then(|target| tree.symbolic_link(&path, target)),
                None => Err(anyhow::anyhow!("it is a link to nothing")),
            },
            EntryType::Link => match entry.link_name_bytes() {
                Some(target) => text(&target).and_then(|target| tree.hard_link(&path, target)),
                None => Err(anyhow::anyhow!("it is a link to nothing")),
            },
            // Words to all entries, such as who packed them.
            EntryType::XGlobalHeader => Ok(()),
            EntryType::Char | EntryType::Block | EntryType::Fifo => Err(anyhow::anyhow!("it is a device or a pipe")),
            other => Err(anyhow::anyhow!(
                "it is neither file, directory nor link (tar's type {:?})",
                other.as_byte() as char
            )),
        }
        .with_context(refused)?;
    }
}

fn from_zip(archive: &mut File, tree: &mut Tree) -> Result<()> {
    let mut zip = zip::ZipArchive::new(BufReader::with_capacity(CHUNK_BYTES, archive))
        .context("it is not a zip archive, or is damaged")?;
    ensure!(zip.len() as u64 <= tree.limits.entries, "it has more than {} entries", tree.limits.entries);
    ensure!(!zip.has_duplicate_names(), "it has two entries of one name");
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).with_context(|| format!("cannot read entry {index}"))?;
        let path = text(entry.name_raw())?.to_owned();
        let mode = entry.unix_mode().unwrap_or(0o644);
        let kind = match mode & TYPE_MASK {
            0 if path.ends_with('/') => TYPE_DIRECTORY,
            0 => TYPE_FILE,
            kind => kind,
        };
        match kind {
            TYPE_DIRECTORY => tree.directory(&path),
            TYPE_FILE => tree.file(&path, mode, &mut entry),
            TYPE_LINK => {
                let mut target = Vec::new();
                entry.by_ref().take(MAX_TARGET_BYTES + 1).read_to_end(&mut target)?;
                text(&target).and_then(|target| tree.symbolic_link(&path, target))
            }
            _ => Err(anyhow::anyhow!("it is a device or a pipe")),
        }
        .with_context(|| shown(&path))?;
    }
    Ok(())
}

fn shown(path: &str) -> String {
    let start: String = path.chars().take(100).collect();
    format!("the entry {start:?}{}", if start.len() < path.len() { "…" } else { "" })
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).with_context(|| format!("the name {:?} is not UTF-8", String::from_utf8_lossy(bytes)))
}

/// What a path below the root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Made {
    /// Only because something lies in it; its own entry may yet come.
    ImpliedDirectory,
    Directory,
    File,
    Link,
}

/// The tree as it was made so far.
struct Tree {
    root: PathBuf,
    limits: Limits,
    made: HashMap<String, Made>,
    bytes: u64,
    /// Entries, the implied ones included.
    entries: u64,
}

impl Tree {
    fn new(root: PathBuf, limits: Limits) -> Tree {
        Tree { root, limits, made: HashMap::new(), bytes: 0, entries: 0 }
    }

    fn directory(&mut self, path: &str) -> Result<()> {
        let path = relative(path, &self.limits)?;
        if path.is_empty() {
            return Ok(());
        }
        match self.made.get(&path) {
            Some(Made::ImpliedDirectory) => {}
            Some(_) => bail!("there are two of it"),
            None => {
                self.make_parents(&path)?;
                self.make_directory(&path)?;
            }
        }
        self.made.insert(path, Made::Directory);
        Ok(())
    }

    fn file(&mut self, path: &str, mode: u32, content: &mut impl Read) -> Result<()> {
        ensure!(mode & SET_ID == 0, "it is setuid or setgid");
        let path = self.begin(path)?;
        let at = self.root.join(&path);
        let mut file =
            OpenOptions::new().write(true).create_new(true).open(&at).map_err(|error| self.unwritable(error))?;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let amount = content.read(&mut chunk).context("its content is damaged")?;
            if amount == 0 {
                break;
            }
            self.bytes += amount as u64;
            ensure!(self.bytes <= self.limits.bytes, "all together have more than {} bytes", self.limits.bytes);
            file.write_all(&chunk[..amount]).map_err(|error| self.unwritable(error))?;
        }
        drop(file);
        let mode = if mode & 0o100 != 0 { 0o755 } else { 0o644 };
        platform::set_mode(&at, mode).map_err(|error| self.unwritable(error))?;
        self.made.insert(path, Made::File);
        Ok(())
    }

    fn symbolic_link(&mut self, path: &str, target: &str) -> Result<()> {
        let path = self.begin(path)?;
        ensure!(target.len() as u64 <= MAX_TARGET_BYTES, "it is a link to a name that is too long");
        ensure!(stays_inside(&path, target), "it is a link that leaves the package (to {target:?})");
        platform::make_symlink(Path::new(target), &self.root.join(&path)).map_err(|error| self.unwritable(error))?;
        self.made.insert(path, Made::Link);
        Ok(())
    }

    fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        let path = self.begin(path)?;
        let target = relative(target, &self.limits).context("it is a hard link that leaves the package")?;
        ensure!(
            self.made.get(&target) == Some(&Made::File),
            "it is a hard link to {target:?}, which is no file of the package before it"
        );
        fs::hard_link(self.root.join(&target), self.root.join(&path)).map_err(|error| self.unwritable(error))?;
        self.made.insert(path, Made::File);
        Ok(())
    }

    /// For what is to be made anew: its path, with all directories above it.
    fn begin(&mut self, path: &str) -> Result<String> {
        ensure!(!path.ends_with('/'), "its name is that of a directory, which it is not");
        let path = relative(path, &self.limits)?;
        ensure!(!path.is_empty(), "it has no name");
        ensure!(path != COMPLETE, "the name is reserved: it says that a release is whole");
        ensure!(!self.made.contains_key(&path), "there are two of it");
        self.make_parents(&path)?;
        self.count()?;
        Ok(path)
    }

    fn make_parents(&mut self, path: &str) -> Result<()> {
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            match self.made.get(parent) {
                Some(Made::Directory | Made::ImpliedDirectory) => {}
                Some(Made::File | Made::Link) => bail!("it would lie in {parent:?}, which is no directory"),
                None => {
                    self.make_directory(parent)?;
                    self.made.insert(parent.to_owned(), Made::ImpliedDirectory);
                }
            }
        }
        Ok(())
    }

    fn make_directory(&mut self, path: &str) -> Result<()> {
        self.count()?;
        let at = self.root.join(path);
        fs::create_dir(&at).and_then(|()| platform::set_mode(&at, 0o755)).map_err(|error| self.unwritable(error))
    }

    fn count(&mut self) -> Result<()> {
        self.entries += 1;
        ensure!(self.entries <= self.limits.entries, "the package has more than {} entries", self.limits.entries);
        Ok(())
    }

    /// Everything is there: it survives a power cut from here on, and all may read it.
    fn finish(&self) -> Result<PathBuf> {
        ensure!(!self.made.is_empty(), "cannot unpack it: it is empty");
        platform::set_mode(&self.root, 0o755)
            .and_then(|()| platform::sync_tree(&self.root))
            .map_err(|error| self.unwritable(error))?;
        Ok(self.root.clone())
    }

    fn unwritable(&self, error: io::Error) -> anyhow::Error {
        if error.kind() == io::ErrorKind::AlreadyExists {
            return anyhow::anyhow!("there are two of it, as this file system sees them");
        }
        unwritable(error, self.root.parent().unwrap_or(&self.root))
    }
}

/// A path below the root, without `.` and doubled slashes; empty for the root itself. Refuses whatever could lie elsewhere.
fn relative(path: &str, limits: &Limits) -> Result<String> {
    ensure!(!path.starts_with('/'), "its path is absolute");
    ensure!(path.len() <= limits.path, "its path has more than {} bytes", limits.path);
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => bail!("its path goes up (..)"),
            _ => {
                ensure!(part.len() <= limits.name, "a name in its path has more than {} bytes", limits.name);
                // A backslash is a separator on Windows, and in no name that anybody gives a file elsewhere.
                let harmless =
                    !part.contains(|c: char| c == '\\' || c.is_control()) && platform::can_be_file_name(part);
                ensure!(harmless, "{part:?} cannot be the name of a file here");
                parts.push(part);
            }
        }
    }
    Ok(parts.join("/"))
}

/// Whether a symbolic link at `path` can only lead to something below the root.
///
/// `..` may stand at the target's beginning alone: there it counts from directories that really are where they seem to be. Behind a
/// name, that name may itself be a link, and `..` would lead up from wherever that one points.
fn stays_inside(path: &str, target: &str) -> bool {
    if target.is_empty() || target.starts_with('/') || target.contains(['\\', '\0']) {
        return false;
    }
    let depth = path.matches('/').count();
    let mut up = 0;
    let mut named = false;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." if named => return false,
            ".." => up += 1,
            _ => named = true,
        }
    }
    up <= depth
}

#[cfg(test)]
mod tests;
