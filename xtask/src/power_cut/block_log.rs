//! The log of QEMU's `blklogwrites`: each write, flush and discard of a disk, in the order of their completion; and the disk as a power cut
//! would have left it, rebuilt from the log.
//!
//! ```text
//! first sector    magic u64, version u64, number of entries u64, size of a sector u32      all of it little-endian
//! then, for each  one sector: first sector u64, sectors u64, flags u64, length u64         the length is that of a mark's text
//!                 its data, in whole sectors                                               a discard and a flush have none
//! ```
//!
//! What completed before a flush is on the disk. Of what was written since, the disk may have any part, since it keeps no order between two
//! flushes; a write with the flag FUA (force unit access) is on the disk once it is complete.
//!
//! The log does not say when a request began: a write that was under way when a flush began and completed before it counts as covered. A
//! file system waits for the writes that it depends on before it flushes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, fallocate};

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;
/// The length of the fields of the first sector, and of an entry.
const HEAD: usize = 28;
const FIELDS: usize = 32;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// The part of a write that reaches a disk as a whole: a page, as disks with larger sectors have it.
pub(crate) const BLOCK: u64 = 4096;

/// A log that was read to its end.
pub(crate) struct BlockLog {
    file: File,
    entries: Vec<Entry>,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// What completed before it is on the disk.
    pub(crate) flushes: bool,
    pub(crate) change: Change,
}

/// Offsets and lengths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// A flush alone, or a mark.
    None,
    /// The log has its bytes at `data`. A durable one has the flag FUA.
    Write { offset: u64, length: u64, data: u64, durable: bool },
    /// Reads as zeros from then on.
    Discard { offset: u64, length: u64 },
}

/// What a power cut left.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cut {
    /// The number of entries that are on the disk whole, up to and with a flush.
    pub(crate) covered: usize,
    /// The number of entries that had completed.
    pub(crate) completed: usize,
    /// Those of `covered..completed` that are not on the disk, or not whole.
    pub(crate) lost: BTreeMap<usize, Loss>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Loss {
    Whole,
    /// These blocks of a write, counted from its start.
    Blocks(BTreeSet<u64>),
}

impl Change {
    /// The number of blocks of a write: it can reach the disk in part.
    pub(crate) fn blocks(self) -> u64 {
        match self {
            Change::Write { length, .. } => length.div_ceil(BLOCK),
            Change::None | Change::Discard { .. } => 0,
        }
    }
}

impl BlockLog {
    /// Reads a log. What a killed machine had not logged completely is not part of it.
    pub(crate) fn open(path: &Path) -> Result<BlockLog> {
        let read = || -> Result<BlockLog> {
            let file = File::open(path)?;
            let entries = entries(&file)?;
            Ok(BlockLog { file, entries })
        };
        read().with_context(|| format!("cannot read the block log {}", path.display()))
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Carries out these entries on an image.
    pub(crate) fn apply(&self, range: Range<usize>, image: &File) -> Result<()> {
        range.into_iter().try_for_each(|number| self.apply_but(number, &BTreeSet::new(), image))
    }

    /// Carries out, on an image that has the first `done` entries, what else a power cut left.
    pub(crate) fn apply_cut(&self, done: usize, cut: &Cut, image: &File) -> Result<()> {
        self.apply(done..cut.covered, image)?;
        for number in cut.covered..cut.completed {
            match cut.lost.get(&number) {
                None => self.apply_but(number, &BTreeSet::new(), image)?,
                Some(Loss::Blocks(blocks)) => self.apply_but(number, blocks, image)?,
                Some(Loss::Whole) => (),
            }
        }
        Ok(())
    }

    /// Carries out an entry without these of its blocks.
    fn apply_but(&self, number: usize, lost: &BTreeSet<u64>, image: &File) -> Result<()> {
        let change = self.entries.get(number).with_context(|| format!("the log has no entry {number}"))?.change;
        let apply = || -> Result<()> {
            match change {
                Change::None => (),
                Change::Discard { offset, length } => {
                    fallocate(image, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?;
                }
                Change::Write { offset, length, data, .. } => {
                    for block in (0..change.blocks()).filter(|block| !lost.contains(block)) {
                        let within = block * BLOCK;
                        let mut bytes = vec![0; (length - within).min(BLOCK) as usize];
                        self.file.read_exact_at(&mut bytes, data + within)?;
                        image.write_all_at(&bytes, offset + within)?;
                    }
                }
            }
            Ok(())
        };
        apply().with_context(|| format!("cannot apply entry {number} of the log"))
    }
}

/// The complete entries of a log.
fn entries(file: &File) -> Result<Vec<Entry>> {
    let head = fields::<HEAD>(file, 0)?.context("it has no head")?;
    ensure!(number(&head, 0) == MAGIC, "it does not begin as a log of blklogwrites");
    ensure!(number(&head, 8) == VERSION, "its version is {} instead of {VERSION}", number(&head, 8));
    let (count, sector) = (number(&head, 16), u64::from(u32::from_le_bytes([head[24], head[25], head[26], head[27]])));
    ensure!(sector.is_power_of_two() && (512..1 << 24).contains(&sector), "its sectors have {sector} bytes");
    let end = file.metadata()?.len();
    let mut entries = Vec::new();
    let mut at = sector;
    for index in 0..count {
        let Some(fields) = fields::<FIELDS>(file, at)? else { break };
        let (first, sectors, flags) = (number(&fields, 0), number(&fields, 8), number(&fields, 16));
        ensure!(flags & !(FLUSH | FUA | DISCARD | MARK) == 0, "entry {index} has the unknown flags {flags:#x}");
        if flags == 0 && sectors == 0 {
            // Space for it was taken, and its request was not yet logged.
            break;
        }
        let bytes = |sectors: u64| sectors.checked_mul(sector).filter(|bytes| *bytes <= 1 << 48);
        let (offset, length) =
            (bytes(first).context("an offset is too large")?, bytes(sectors).context("a length is too large")?);
        let data = at + sector;
        let stored = match flags {
            _ if flags & MARK != 0 => number(&fields, 24).next_multiple_of(sector),
            _ if flags & DISCARD != 0 => 0,
            _ => length,
        };
        if data + stored > end {
            break;
        }
        let change = match flags {
            _ if flags & MARK != 0 || length == 0 => Change::None,
            _ if flags & DISCARD != 0 => Change::Discard { offset, length },
            _ => Change::Write { offset, length, data, durable: flags & FUA != 0 },
        };
        entries.push(Entry { flushes: flags & FLUSH != 0, change });
        at = data + stored;
    }
    Ok(entries)
}

/// Bytes at an offset; `None` past the end.
fn fields<const N: usize>(file: &File, offset: u64) -> Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entries 0 to {} whole", self.covered)?;
        if self.completed > self.covered {
            write!(f, ", of those to {} lost:", self.completed)?;
        }
        if self.completed > self.covered && self.lost.is_empty() {
            write!(f, " none")?;
        }
        for (entry, loss) in &self.lost {
            match loss {
                Loss::Whole => write!(f, " {entry}")?,
                Loss::Blocks(blocks) => write!(f, " {entry} (blocks {blocks:?})")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
