//! Reads the entries of a tar archive (old, ustar, GNU or pax) from a decompressor.
//!
//! The tar formats allow the same fact to be stated twice. An archive in which two readers could see different files is rejected.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tar::{Entry, EntryType};

use super::plan::UnpackPlan;
use super::{EntryContent, Sink, shown, text};

/// Limit for one entry's long names and extended headers.
const MAX_HEADER_BYTES: u64 = 64 << 10;
/// The same for all entries together, as a few compressed bytes can stand for any number of headers.
const MAX_HEADERS_BYTES: u64 = 256 << 20;
/// Zeros allowed after the end: tapes are written in blocks of various sizes.
const MAX_PADDING_BYTES: u64 = 1 << 20;

/// Fails when more than `left` bytes are read.
struct LimitedReader<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for LimitedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let amount = self.inner.read(buffer)?;
        match self.left.get().checked_sub(amount as u64) {
            Some(left) => self.left.set(left),
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "an entry's header exceeds the limit of 64 KiB",
                ));
            }
        }
        Ok(amount)
    }
}

/// Passes every accepted entry to `sink`, and reads the archive to its end.
pub(super) fn read(decompressed: impl Read, plan: &mut UnpackPlan, sink: &mut Sink<'_>) -> Result<()> {
    let left = Rc::new(Cell::new(0));
    let mut archive = tar::Archive::new(LimitedReader { inner: decompressed, left: Rc::clone(&left) });
    let mut entries = archive.entries()?;
    let mut headers = 0;
    loop {
        left.set(MAX_HEADER_BYTES);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.context("not a tar archive, or it is damaged")?;
        headers += MAX_HEADER_BYTES - left.get();
        ensure!(headers <= MAX_HEADERS_BYTES, "the headers have more than {MAX_HEADERS_BYTES} bytes together");
        plan.count()?;
        if matches!(entry.header().entry_type(), EntryType::Regular | EntryType::Continuous) {
            left.set(entry.size().saturating_add(MAX_HEADER_BYTES));
        }
        let path = text(&entry.path_bytes())?.to_owned();
        let before = left.get();
        read_entry(&mut entry, &path, plan, sink).with_context(|| shown(&path))?;
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            // The check of the extensions has read its content.
            headers += before.saturating_sub(left.get());
        }
    }
    let LimitedReader { inner, .. } = archive.into_inner();
    ensure_only_padding(inner)
}

fn read_entry(entry: &mut Entry<'_, impl Read>, path: &str, plan: &mut UnpackPlan, sink: &mut Sink<'_>) -> Result<()> {
    check_extensions(entry)?;
    let mode = entry.header().mode()?;
    let kind = entry.header().entry_type();
    let size = entry.size();
    if !matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::XGlobalHeader) {
        // Readers disagree whether such bytes are content or the next entry.
        ensure!(size == 0 || kind == EntryType::GNUSparse, "the entry has {size} bytes of content, but is not a file");
    }
    match kind {
        EntryType::Directory => match plan.directory(path)? {
            Some(planned) => sink(&planned, EntryContent::Directory),
            None => Ok(()),
        },
        EntryType::Regular | EntryType::Continuous => {
            let planned = plan.file(path, mode, size)?;
            sink(&planned, EntryContent::File { executable: mode & 0o100 != 0, size, content: entry })
        }
        EntryType::Symlink => {
            let target = target(entry)?;
            let planned = plan.symbolic_link(path, &target)?;
            sink(&planned, EntryContent::SymbolicLink(&target))
        }
        EntryType::Link => {
            let (planned, target) = plan.hard_link(path, mode, &target(entry)?)?;
            sink(&planned, EntryContent::HardLink(&target))
        }
        // Comments that apply to all entries, such as the archive's creator.
        EntryType::XGlobalHeader => Ok(()),
        EntryType::Char | EntryType::Block | EntryType::Fifo => bail!("the entry is a device or a pipe"),
        EntryType::GNUSparse => bail!("{SPARSE}"),
        other => bail!("the entry is not a file, directory or link (tar type {:?})", other.as_byte() as char),
    }
}

const SPARSE: &str = "the entry is a sparse file; pack it without tar's --sparse";

fn target(entry: &Entry<'_, impl Read>) -> Result<String> {
    let target = entry.link_name_bytes().context("the link has no target")?;
    Ok(text(&target)?.to_owned())
}

/// Checks the pax headers of an entry, or of all that follow.
fn check_extensions(entry: &mut Entry<'_, impl Read>) -> Result<()> {
    let is_global = entry.header().entry_type() == EntryType::XGlobalHeader;
    let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
    let mut seen = Vec::new();
    for extension in extensions {
        let extension = extension.context("the extended header is damaged")?;
        let key = extension.key().context("the extended header is damaged")?;
        ensure!(!key.starts_with("GNU.sparse."), "{SPARSE}");
        // Capabilities grant what setuid grants.
        ensure!(
            !key.ends_with("xattr.security.capability"),
            "the entry has file capabilities, which a package may not grant"
        );
        if !["path", "linkpath", "size"].contains(&key) {
            continue;
        }
        ensure!(!is_global, "a global header sets the {key} of all following entries");
        ensure!(!seen.contains(&key), "the extended header sets {key} twice");
        seen.push(key);
        if key == "size" {
            let size = extension.value().ok().and_then(|value| value.parse::<u64>().ok());
            ensure!(size.is_some(), "the extended header has an invalid size");
        }
    }
    Ok(())
}

/// Checks that only padding follows the end; reading it also verifies the last checksum of the compressed stream.
fn ensure_only_padding(mut rest: impl Read) -> Result<()> {
    let mut chunk = [0; 4096];
    let mut padding = 0;
    loop {
        let amount =
            rest.read(&mut chunk).map_err(|error| anyhow!(error).context("the archive is damaged after its end"))?;
        if amount == 0 {
            return Ok(());
        }
        padding += amount as u64;
        ensure!(chunk[..amount].iter().all(|byte| *byte == 0), "the archive has data after its end");
        ensure!(padding <= MAX_PADDING_BYTES, "the archive has more than {MAX_PADDING_BYTES} bytes after its end");
    }
}
