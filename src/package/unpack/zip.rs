//! Reads the entries of a zip archive by its central directory, and compares every field with the local headers.
//!
//! A zip states each fact twice, and readers differ in which one they use. So only unambiguous archives are accepted: no gap before the
//! directory or after the end, no entries that share bytes, no zip64 (a package that needs it is packed as `tar.zst`), no encryption, only
//! stored or deflated content. The format is PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.4.
//!
//! ```text
//! (local header, name, extra, content, descriptor)*  (central header, name, extra, comment)*  end of the central directory, comment
//! ```

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Take};

use anyhow::{Context, Result, bail, ensure};
use flate2::Crc;
use flate2::bufread::DeflateDecoder;

use super::plan::{MAX_TARGET_BYTES, UnpackPlan};
use super::{CHUNK_BYTES, EntryContent, Sink, shown, text};

const LOCAL: u32 = 0x0403_4b50;
const LOCAL_BYTES: usize = 30;
const CENTRAL: u32 = 0x0201_4b50;
const CENTRAL_BYTES: usize = 46;
const END: u32 = 0x0605_4b50;
const END_BYTES: usize = 22;
const ZIP64_LOCATOR: u32 = 0x0706_4b50;
const ZIP64_LOCATOR_BYTES: usize = 20;

/// The directory is held in memory; unpacking may take 12 MiB in all.
const MAX_DIRECTORY_BYTES: u32 = 4 << 20;

const STORED: u16 = 0;
const DEFLATED: u16 = 8;
/// Flags of rejected entries: encrypted, patched, strongly encrypted, a directory with masked headers.
const REJECTED_FLAGS: u16 = 1 | 1 << 5 | 1 << 6 | 1 << 13;
/// Sizes and checksum follow the content, and are not in the local header.
const DESCRIPTOR: u16 = 1 << 3;
/// Flags that affect how the content is read. Writers set the others differently.
const RELEVANT_FLAGS: u16 = REJECTED_FLAGS | DESCRIPTOR;

/// The `made by` values with Unix modes.
const UNIX: [u8; 2] = [3, 19];
const DOS_DIRECTORY: u32 = 0x10;

const TYPE_MASK: u32 = 0o170000;
const TYPE_FILE: u32 = 0o100000;
const TYPE_DIRECTORY: u32 = 0o040000;
const TYPE_LINK: u32 = 0o120000;

const NOT_A_ZIP: &str = "not a zip archive, or it is damaged";
const ZIP64: &str = "zip64 archives are not accepted; pack it as tar.zst";

/// An entry of the central directory.
#[derive(Debug, Clone, Copy)]
struct CentralEntry<'a> {
    name: &'a [u8],
    mode: u32,
    flags: u16,
    method: u16,
    crc: u32,
    packed: u64,
    size: u64,
    local: u64,
}

/// Passes every accepted entry to `sink`.
pub(super) fn read(archive: &mut File, plan: &mut UnpackPlan, sink: &mut Sink<'_>) -> Result<()> {
    let directory = directory(archive, plan.limits().entries)?;
    let mut reader = BufReader::with_capacity(CHUNK_BYTES, archive);
    // Check all entries first: nothing is created from an archive that contradicts itself further on.
    let mut contents = Vec::new();
    for entry in directory.entries() {
        let entry = entry?;
        let name = text(entry.name)?;
        let content_range = content_range(&mut reader, &entry, directory.at).with_context(|| shown(name))?;
        contents.push((content_range, entry.local));
    }
    contents.sort_unstable_by_key(|(_, local)| *local);
    let mut end = 0;
    for (content, local) in &contents {
        ensure!(*local >= end, "two entries share bytes");
        end = content.end;
    }
    for entry in directory.entries() {
        let entry = entry?;
        let name = text(entry.name)?;
        plan.count()?;
        read_entry(&mut reader, &entry, name, plan, sink).with_context(|| shown(name))?;
    }
    Ok(())
}

fn read_entry(
    reader: &mut BufReader<&mut File>,
    entry: &CentralEntry<'_>,
    name: &str,
    plan: &mut UnpackPlan,
    sink: &mut Sink<'_>,
) -> Result<()> {
    match entry.mode & TYPE_MASK {
        TYPE_DIRECTORY => {
            ensure!(entry.size == 0, "the entry has {} bytes of content, but is not a file", entry.size);
            match plan.directory(name)? {
                Some(planned) => sink(&planned, EntryContent::Directory),
                None => Ok(()),
            }
        }
        TYPE_FILE => {
            let planned = plan.file(name, entry.mode, entry.size)?;
            let content = &mut ZipContent::open(reader, entry)?;
            sink(&planned, EntryContent::File { executable: entry.mode & 0o100 != 0, size: entry.size, content })
        }
        TYPE_LINK => {
            ensure!(entry.size <= MAX_TARGET_BYTES as u64, "the link target is too long");
            let mut target = Vec::new();
            ZipContent::open(reader, entry)?.read_to_end(&mut target).context("the content is damaged")?;
            let target = text(&target)?;
            let planned = plan.symbolic_link(name, target)?;
            sink(&planned, EntryContent::SymbolicLink(target))
        }
        _ => bail!("the entry is a device or a pipe"),
    }
}

/// The bytes of the central directory.
struct CentralDirectory {
    bytes: Vec<u8>,
    /// Its offset in the file.
    at: u64,
}

/// Finds the end record, which must be the end of the file, and reads the directory, which must end where the end record begins.
fn directory(archive: &mut File, max_entries: u64) -> Result<CentralDirectory> {
    let length = archive.seek(SeekFrom::End(0))?;
    let tail_bytes = length.min((END_BYTES + usize::from(u16::MAX)) as u64);
    let mut tail = vec![0; tail_bytes as usize];
    archive.seek(SeekFrom::Start(length - tail_bytes))?;
    archive.read_exact(&mut tail)?;
    let is_end = |at: &usize| {
        let comment = tail.len() - at - END_BYTES;
        u32_at(&tail[*at..], 0) == Some(END) && u16_at(&tail[*at..], 20).map(usize::from) == Some(comment)
    };
    let at = tail.len().checked_sub(END_BYTES).and_then(|last| (0..=last).rev().find(is_end)).context(NOT_A_ZIP)?;
    let end = &tail[at..];
    let field16 = |at| u16_at(end, at).context(NOT_A_ZIP);
    let field32 = |at| u32_at(end, at).context(NOT_A_ZIP);
    let locator = at.checked_sub(ZIP64_LOCATOR_BYTES).and_then(|at| u32_at(&tail[at..], 0));
    ensure!(locator != Some(ZIP64_LOCATOR), ZIP64);
    let (entries, size, begin) = (field16(10)?, field32(12)?, field32(16)?);
    ensure!(entries != u16::MAX && size != u32::MAX && begin != u32::MAX, ZIP64);
    ensure!(field16(4)? == 0 && field16(6)? == 0 && field16(8)? == entries, "the archive is one of several volumes");
    ensure!(u64::from(entries) <= max_entries, "the package has more than {max_entries} entries");
    ensure!(
        size <= MAX_DIRECTORY_BYTES,
        "the central directory has more than {MAX_DIRECTORY_BYTES} bytes; pack it as tar.zst"
    );
    let end_at = length - tail_bytes + at as u64;
    ensure!(
        u64::from(begin) + u64::from(size) == end_at,
        "the central directory is not where the end record says: data was inserted before it, after it or between"
    );
    let mut bytes = vec![0; size as usize];
    archive.seek(SeekFrom::Start(begin.into()))?;
    archive.read_exact(&mut bytes)?;
    let directory = CentralDirectory { bytes, at: begin.into() };
    let found = directory.entries().map(|entry| entry.map(drop)).collect::<Result<Vec<()>>>()?.len();
    ensure!(found == usize::from(entries), "the archive has {found} entries, but its end record says {entries}");
    Ok(directory)
}

impl CentralDirectory {
    fn entries(&self) -> impl Iterator<Item = Result<CentralEntry<'_>>> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let entry = central(&mut rest);
            if entry.is_err() {
                rest = &[];
            }
            Some(entry)
        })
    }
}

/// Parses the first central header of `rest` and removes it from there.
fn central<'a>(rest: &mut &'a [u8]) -> Result<CentralEntry<'a>> {
    let attempt = |bytes: &'a [u8]| -> Option<(CentralEntry<'a>, &'a [u8])> {
        if u32_at(bytes, 0)? != CENTRAL {
            return None;
        }
        let lengths = [28, 30, 32].map(|at| u16_at(bytes, at).map(usize::from));
        let [name, extra, comment] = [lengths[0]?, lengths[1]?, lengths[2]?];
        let after = bytes.get(CENTRAL_BYTES..)?;
        let (name, after) = after.split_at_checked(name)?;
        let (_, after) = after.split_at_checked(extra + comment)?;
        let entry = CentralEntry {
            name,
            mode: mode(*bytes.get(5)?, u32_at(bytes, 38)?, name),
            flags: u16_at(bytes, 8)?,
            method: u16_at(bytes, 10)?,
            crc: u32_at(bytes, 16)?,
            packed: u32_at(bytes, 20)?.into(),
            size: u32_at(bytes, 24)?.into(),
            local: u32_at(bytes, 42)?.into(),
        };
        Some((entry, after))
    };
    let (entry, after) = attempt(rest).context("the central directory is damaged")?;
    *rest = after;
    Ok(entry)
}

/// Unix type and permission bits of an entry made on any system.
fn mode(made_by: u8, attributes: u32, name: &[u8]) -> u32 {
    let mode = if UNIX.contains(&made_by) { attributes >> 16 } else { 0 };
    match mode & TYPE_MASK {
        0 if name.ends_with(b"/") || attributes & DOS_DIRECTORY != 0 => TYPE_DIRECTORY | 0o755,
        0 if mode == 0 => TYPE_FILE | 0o644,
        0 => TYPE_FILE | mode,
        _ => mode,
    }
}

/// The range of an entry's content, after checking that its two headers agree.
fn content_range(
    reader: &mut BufReader<&mut File>,
    entry: &CentralEntry<'_>,
    end: u64,
) -> Result<std::ops::Range<u64>> {
    ensure!([entry.packed, entry.size, entry.local].iter().all(|value| *value != u64::from(u32::MAX)), ZIP64);
    ensure!(entry.flags & REJECTED_FLAGS == 0, "the entry is encrypted, or has other unsupported flags");
    ensure!(
        matches!(entry.method, STORED | DEFLATED),
        "the entry is compressed with method {}; only deflate is supported",
        entry.method
    );
    ensure!(
        entry.method != STORED || entry.packed == entry.size,
        "the entry is stored uncompressed, but its compressed and uncompressed sizes differ"
    );
    let mut header = [0; LOCAL_BYTES];
    let mut name = vec![0; entry.name.len()];
    reader.seek(SeekFrom::Start(entry.local))?;
    let read = reader.read_exact(&mut header).and_then(|()| reader.read_exact(&mut name));
    read.context("the local header is truncated")?;
    let field16 = |at| u16_at(&header, at).unwrap_or_default();
    let field32 = |at| u32_at(&header, at).unwrap_or_default();
    let described = entry.flags & DESCRIPTOR != 0;
    let agree = field32(0) == LOCAL
        && usize::from(field16(26)) == name.len()
        && name == entry.name
        && field16(6) & RELEVANT_FLAGS == entry.flags & RELEVANT_FLAGS
        && field16(8) == entry.method
        && (described
            || (field32(14), u64::from(field32(18)), u64::from(field32(22))) == (entry.crc, entry.packed, entry.size));
    ensure!(agree, "the local header contradicts the central directory");
    let begin = entry.local + (LOCAL_BYTES + name.len()) as u64 + u64::from(field16(28));
    ensure!(begin + entry.packed <= end, "the entry overlaps the central directory");
    Ok(begin..begin + entry.packed)
}

/// One entry's content. Reading fails unless length and checksum match the headers.
struct ZipContent<'a, 'b> {
    source: ZipDecoder<'a, 'b>,
    crc: Crc,
    expected: u32,
    left: u64,
}

type ZipRange<'a, 'b> = Take<&'a mut BufReader<&'b mut File>>;

enum ZipDecoder<'a, 'b> {
    Stored(ZipRange<'a, 'b>),
    Deflated(Box<DeflateDecoder<ZipRange<'a, 'b>>>),
}

impl<'a, 'b> ZipContent<'a, 'b> {
    /// Requires headers that were checked to agree.
    fn open(reader: &'a mut BufReader<&'b mut File>, entry: &CentralEntry<'_>) -> Result<ZipContent<'a, 'b>> {
        let content_range = content_range(reader, entry, u64::MAX)?;
        reader.seek(SeekFrom::Start(content_range.start))?;
        let part = reader.take(entry.packed);
        let source = match entry.method {
            STORED => ZipDecoder::Stored(part),
            _ => ZipDecoder::Deflated(Box::new(DeflateDecoder::new(part))),
        };
        Ok(ZipContent { source, crc: Crc::new(), expected: entry.crc, left: entry.size })
    }
}

impl Read for ZipContent<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let amount = match &mut self.source {
            ZipDecoder::Stored(source) => source.read(buffer)?,
            ZipDecoder::Deflated(source) => source.read(buffer)?,
        };
        let invalid = |reason| Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        if amount == 0 && !buffer.is_empty() {
            if self.left > 0 {
                return invalid("the content is shorter than its header says");
            }
            if self.crc.sum() != self.expected {
                return invalid("checksum mismatch");
            }
        }
        self.crc.update(&buffer[..amount]);
        match self.left.checked_sub(amount as u64) {
            Some(left) => self.left = left,
            None => return invalid("the content is longer than its header says"),
        }
        Ok(amount)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
