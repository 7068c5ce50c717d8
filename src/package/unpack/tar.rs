//! Reads the entries of a tar archive, old, ustar, GNU or pax, out of what decompresses it.
//!
//! tar has grown ways to say one thing twice; where two readers could come to see different files, the archive is refused.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tar::{Entry, EntryType};

use super::plan::UnpackPlan;
use super::{EntryContent, Sink, shown, text};

/// What tar may say about one entry beside its content: long names, extended headers.
const MAX_HEADER_BYTES: u64 = 64 << 10;
/// The same for all entries together: a few bytes of archive can stand for any number of headers.
const MAX_HEADERS_BYTES: u64 = 256 << 20;
/// Zeros that may follow the end: tapes are written in blocks of many sizes.
const MAX_PADDING_BYTES: u64 = 1 << 20;

/// Fails when more is read than was allowed for.
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
                    "an entry's header is larger than any name needs",
                ));
            }
        }
        Ok(amount)
    }
}

/// Gives every entry that the plan admits to `sink`, to the end of what is packed.
pub(super) fn read(unpacked: impl Read, plan: &mut UnpackPlan, sink: &mut Sink<'_>) -> Result<()> {
    let left = Rc::new(Cell::new(0));
    let mut archive = tar::Archive::new(LimitedReader { inner: unpacked, left: Rc::clone(&left) });
    let mut entries = archive.entries()?;
    let mut headers = 0;
    loop {
        left.set(MAX_HEADER_BYTES);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.context("it is not a tar archive, or is damaged")?;
        headers += MAX_HEADER_BYTES - left.get();
        ensure!(headers <= MAX_HEADERS_BYTES, "its headers have more than {MAX_HEADERS_BYTES} bytes together");
        plan.count()?;
        if matches!(entry.header().entry_type(), EntryType::Regular | EntryType::Continuous) {
            left.set(entry.size().saturating_add(MAX_HEADER_BYTES));
        }
        let path = text(&entry.path_bytes())?.to_owned();
        let before = left.get();
        one(&mut entry, &path, plan, sink).with_context(|| shown(&path))?;
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            // Its content is read with it.
            headers += before.saturating_sub(left.get());
        }
    }
    let LimitedReader { inner, .. } = archive.into_inner();
    ends(inner)
}

fn one(entry: &mut Entry<'_, impl Read>, path: &str, plan: &mut UnpackPlan, sink: &mut Sink<'_>) -> Result<()> {
    look_at_extensions(entry)?;
    let mode = entry.header().mode()?;
    let kind = entry.header().entry_type();
    let size = entry.size();
    if !matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::XGlobalHeader) {
        // Some readers take it for content, and some for the next entry.
        ensure!(size == 0 || kind == EntryType::GNUSparse, "it has {size} bytes of content, though it is no file");
    }
    match kind {
        EntryType::Directory => match plan.directory(path)? {
            Some(admitted) => sink(&admitted, EntryContent::Directory),
            None => Ok(()),
        },
        EntryType::Regular | EntryType::Continuous => {
            let admitted = plan.file(path, mode, size)?;
            sink(&admitted, EntryContent::File { executable: mode & 0o100 != 0, size, content: entry })
        }
        EntryType::Symlink => {
            let target = target(entry)?;
            let admitted = plan.symbolic_link(path, &target)?;
            sink(&admitted, EntryContent::SymbolicLink(&target))
        }
        EntryType::Link => {
            let (admitted, target) = plan.hard_link(path, mode, &target(entry)?)?;
            sink(&admitted, EntryContent::HardLink(&target))
        }
        // Words to all entries, such as who packed them.
        EntryType::XGlobalHeader => Ok(()),
        EntryType::Char | EntryType::Block | EntryType::Fifo => bail!("it is a device or a pipe"),
        EntryType::GNUSparse => bail!("{SPARSE}"),
        other => bail!("it is neither file, directory nor link (tar's type {:?})", other.as_byte() as char),
    }
}

const SPARSE: &str = "it is a sparse file; pack it without tar's --sparse";

fn target(entry: &Entry<'_, impl Read>) -> Result<String> {
    let target = entry.link_name_bytes().context("it is a link to nothing")?;
    Ok(text(&target)?.to_owned())
}

/// What a pax header says of an entry, or of all that follow.
fn look_at_extensions(entry: &mut Entry<'_, impl Read>) -> Result<()> {
    let is_global = entry.header().entry_type() == EntryType::XGlobalHeader;
    let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
    let mut once = Vec::new();
    for extension in extensions {
        let extension = extension.context("its extended header is damaged")?;
        let key = extension.key().context("its extended header is damaged")?;
        ensure!(!key.starts_with("GNU.sparse."), "{SPARSE}");
        // What setuid was once for.
        ensure!(!key.ends_with("xattr.security.capability"), "it carries capabilities, which a package may not grant");
        if !["path", "linkpath", "size"].contains(&key) {
            continue;
        }
        ensure!(!is_global, "it says the {key} of all that follow");
        ensure!(!once.contains(&key), "its extended header says its {key} twice");
        once.push(key);
        if key == "size" {
            let size = extension.value().ok().and_then(|value| value.parse::<u64>().ok());
            ensure!(size.is_some(), "its extended header says a size that is none");
        }
    }
    Ok(())
}

/// Behind the end there is nothing but padding; reading it also proves the last checksum of what was packed.
fn ends(mut rest: impl Read) -> Result<()> {
    let mut chunk = [0; 4096];
    let mut padding = 0;
    loop {
        let amount = rest.read(&mut chunk).map_err(|error| anyhow!(error).context("it is damaged behind its end"))?;
        if amount == 0 {
            return Ok(());
        }
        padding += amount as u64;
        ensure!(chunk[..amount].iter().all(|byte| *byte == 0), "there is something behind its end");
        ensure!(padding <= MAX_PADDING_BYTES, "there are more than {MAX_PADDING_BYTES} bytes behind its end");
    }
}
