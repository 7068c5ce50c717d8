//! Writes the accepted entries to the disk.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::plan::PlannedEntry;
use super::{CHUNK_BYTES, EntryContent, MayWrite};
use crate::package::fetch::unwritable;
use crate::platform;

const DIRECTORY_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;
const PROGRAM_MODE: u32 = 0o755;

/// A tree that is being written.
pub(super) struct TreeWriter<'a> {
    root: PathBuf,
    /// The full path of the current entry; reused, as is the buffer.
    current: PathBuf,
    chunk: Vec<u8>,
    /// Called before each entry and each write.
    may_write: &'a mut MayWrite<'a>,
    /// Whether files, programs and directories keep the mode they are created with; `None`: not checked yet.
    mode_is_kept: [Option<bool>; 3],
}

impl<'a> TreeWriter<'a> {
    /// Writes to an empty directory that belongs to this process.
    pub(super) fn new(root: PathBuf, may_write: &'a mut MayWrite<'a>) -> TreeWriter<'a> {
        let current = PathBuf::with_capacity(root.as_os_str().len() + 256);
        TreeWriter { root, current, chunk: vec![0; CHUNK_BYTES], may_write, mode_is_kept: [None; 3] }
    }

    pub(super) fn write(&mut self, planned: &PlannedEntry, content: EntryContent<'_>) -> Result<()> {
        (self.may_write)(0)?;
        for end in &planned.parents {
            self.directory(&planned.path[..*end])?;
        }
        match content {
            EntryContent::Directory if planned.exists => Ok(()),
            EntryContent::Directory => self.directory(&planned.path),
            EntryContent::File { executable, size, content } => {
                let mode = if executable { PROGRAM_MODE } else { FILE_MODE };
                self.file(&planned.path, mode, size, content)
            }
            EntryContent::SymbolicLink(target) => {
                self.set_current(&planned.path);
                platform::make_symlink(Path::new(target), &self.current).map_err(|error| self.unwritable(error))
            }
            EntryContent::HardLink(target) => {
                let target = self.root.join(target);
                self.set_current(&planned.path);
                fs::hard_link(target, &self.current).map_err(|error| self.unwritable(error))
            }
        }
    }

    /// Completes the tree: sets the root's mode. It is not synced: only what is kept of it needs to be.
    pub(super) fn finish(&self) -> Result<()> {
        platform::set_mode(&self.root, DIRECTORY_MODE).map_err(|error| self.unwritable(error))
    }

    fn directory(&mut self, path: &str) -> Result<()> {
        self.set_current(path);
        let created = platform::create_directory(&self.current, DIRECTORY_MODE)
            .and_then(|()| self.ensure_mode(DIRECTORY_MODE, 2, None));
        created.map_err(|error| self.unwritable(error))
    }

    fn file(&mut self, path: &str, mode: u32, size: u64, content: &mut dyn Read) -> Result<()> {
        self.set_current(path);
        let mut file = platform::create_file(&self.current, mode).map_err(|error| self.unwritable(error))?;
        let mut written = 0;
        loop {
            let amount = content.read(&mut self.chunk).context("the content is damaged")?;
            if amount == 0 {
                break;
            }
            (self.may_write)(amount as u64)?;
            file.write_all(&self.chunk[..amount]).map_err(|error| self.unwritable(error))?;
            written += amount as u64;
        }
        ensure!(written == size, "the content is truncated after {written} of {size} bytes");
        self.ensure_mode(mode, usize::from(mode == PROGRAM_MODE), Some(&file)).map_err(|error| self.unwritable(error))
    }

    /// Sets the mode if the umask changed it. The result is the same for all entries of a kind, so it is checked once.
    fn ensure_mode(&mut self, mode: u32, kind: usize, file: Option<&File>) -> io::Result<()> {
        let is_kept = match self.mode_is_kept[kind] {
            Some(is_kept) => is_kept,
            None => {
                let metadata = file.map_or_else(|| fs::symlink_metadata(&self.current), File::metadata)?;
                *self.mode_is_kept[kind].insert(platform::has_mode(&metadata, mode))
            }
        };
        if is_kept { Ok(()) } else { platform::set_mode(&self.current, mode) }
    }

    fn set_current(&mut self, path: &str) {
        self.current.clear();
        self.current.push(&self.root);
        self.current.push(path);
    }

    fn unwritable(&self, error: io::Error) -> anyhow::Error {
        if error.kind() == io::ErrorKind::AlreadyExists {
            return anyhow::anyhow!("duplicate entry on this file system");
        }
        unwritable(error, self.root.parent().unwrap_or(&self.root))
    }
}
