//! Checks that an ELF executable (System V gABI, "Object Files") needs nothing of the host.

use anyhow::{Context, Result, ensure};

/// `e_type` of an executable at a fixed address; a position-independent one has 3.
const ET_EXEC: u64 = 2;
/// Where the fields are, for each width.
struct Layout {
    /// `e_ident`: the magic number, the width, little-endian, version 1.
    ident: &'static [u8],
    machine: u64,
    /// The size of an address.
    word: usize,
    /// The offsets of `e_phoff`, `e_shoff`, `e_phentsize`, `e_phnum`, `e_shentsize`, `e_shnum`.
    header: [usize; 6],
}

const AMD64: Layout = Layout { ident: b"\x7fELF\x02\x01\x01", machine: 62, word: 8, header: [32, 40, 54, 56, 58, 60] };
const I386: Layout = Layout { ident: b"\x7fELF\x01\x01\x01", machine: 3, word: 4, header: [28, 32, 42, 44, 46, 48] };
/// `p_type` of the dynamic linker's information, and of its path.
const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;
/// `sh_type` of a symbol table that only debuggers use.
const SHT_SYMTAB: u64 = 2;

/// Rejects everything except a static, stripped executable at a fixed address for this architecture, `amd64` or `386`.
pub(super) fn check(file: &[u8], arch: &str) -> Result<()> {
    let layout = if arch == "amd64" { AMD64 } else { I386 };
    ensure!(file.starts_with(layout.ident), "not an ELF file of the width of {arch}");
    ensure!(number(file, 18, 2)? == layout.machine, "not an executable for {arch}");
    ensure!(number(file, 16, 2)? == ET_EXEC, "position-independent, which costs every process memory for relocations");
    let [segments, sections, segment_size, segment_count, section_size, section_count] = layout.header;
    let header = |at| number(file, at, 2);
    let at = number(file, segments, layout.word)?;
    for segment in table(file, at, header(segment_size)?, header(segment_count)?) {
        let kind = number(segment?, 0, 4)?;
        ensure!(kind != PT_INTERP, "needs a dynamic linker");
        ensure!(kind != PT_DYNAMIC, "linked dynamically");
    }
    let at = number(file, sections, layout.word)?;
    for section in table(file, at, header(section_size)?, header(section_count)?) {
        ensure!(number(section?, 4, 4)? != SHT_SYMTAB, "not stripped: it has symbols");
    }
    Ok(())
}

/// The entries of a table in the file.
fn table(file: &[u8], at: u64, size: u64, count: u64) -> impl Iterator<Item = Result<&[u8]>> {
    (0..count).map(move |index| {
        let start = usize::try_from(at.saturating_add(index.saturating_mul(size)))?;
        let end = start.saturating_add(usize::try_from(size)?);
        file.get(start..end).context("truncated file")
    })
}

/// A little-endian number of `size` bytes.
fn number(bytes: &[u8], at: usize, size: usize) -> Result<u64> {
    let digits = bytes.get(at..at + size).context("truncated file")?;
    Ok(digits.iter().rev().fold(0, |value, digit| value << 8 | u64::from(*digit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An executable with one segment and one section of these types.
    fn executable(kind: u8, segment: u8, section: u8) -> Vec<u8> {
        let mut file = vec![0; 64 + 56 + 64];
        file[..AMD64.ident.len()].copy_from_slice(AMD64.ident);
        for (at, value) in
            [(16, kind), (18, AMD64.machine as u8), (32, 64), (40, 120), (54, 56), (56, 1), (58, 64), (60, 1)]
        {
            file[at] = value;
        }
        file[64] = segment;
        file[120 + 4] = section;
        file
    }

    #[test]
    fn only_static_stripped_executables_are_accepted() {
        let load = 1;
        let is_accepted = |file: &[u8]| check(file, "amd64").is_ok();
        assert!(is_accepted(&executable(2, load, 1)));
        assert!(!is_accepted(&executable(3, load, 1)), "position-independent");
        assert!(!is_accepted(&executable(2, PT_INTERP as u8, 1)), "has an interpreter");
        assert!(!is_accepted(&executable(2, PT_DYNAMIC as u8, 1)), "is dynamic");
        assert!(!is_accepted(&executable(2, load, SHT_SYMTAB as u8)), "has symbols");
        assert!(!is_accepted(&executable(2, load, 1)[..150]), "truncated");
        assert!(!is_accepted(b"#!/bin/sh\n"));
        assert!(check(&executable(2, load, 1), "386").is_err(), "of another width");
    }

    #[test]
    fn the_test_program_itself_is_rejected() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(check(&own, "amd64").is_err() && check(&own, "386").is_err());
    }
}
