//! Checks that an ELF executable (System V gABI, "Object Files") needs nothing of the host.

use anyhow::{Context, Result, ensure};

/// `e_ident`: the magic number, 64 bits, little-endian, version 1.
const IDENT: &[u8] = b"\x7fELF\x02\x01\x01";
/// `e_type` of an executable at a fixed address; a position-independent one has 3.
const ET_EXEC: u64 = 2;
/// `e_machine`.
const EM_X86_64: u64 = 62;
/// `p_type` of the dynamic linker's information, and of its path.
const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;
/// `sh_type` of a symbol table that only debuggers use.
const SHT_SYMTAB: u64 = 2;

/// Rejects everything except a static, stripped x86-64 executable at a fixed address.
pub(super) fn check(file: &[u8]) -> Result<()> {
    ensure!(file.starts_with(IDENT), "not a 64-bit ELF file");
    let header = |at, size| number(file, at, size);
    ensure!(header(18, 2)? == EM_X86_64, "not an x86-64 executable");
    ensure!(header(16, 2)? == ET_EXEC, "position-independent, which costs every process memory for relocations");
    for segment in table(file, header(32, 8)?, header(54, 2)?, header(56, 2)?) {
        let kind = number(segment?, 0, 4)?;
        ensure!(kind != PT_INTERP, "needs a dynamic linker");
        ensure!(kind != PT_DYNAMIC, "linked dynamically");
    }
    for section in table(file, header(40, 8)?, header(58, 2)?, header(60, 2)?) {
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
        file[..IDENT.len()].copy_from_slice(IDENT);
        for (at, value) in
            [(16, kind), (18, EM_X86_64 as u8), (32, 64), (40, 120), (54, 56), (56, 1), (58, 64), (60, 1)]
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
        let is_accepted = |file: &[u8]| check(file).is_ok();
        assert!(is_accepted(&executable(2, load, 1)));
        assert!(!is_accepted(&executable(3, load, 1)), "position-independent");
        assert!(!is_accepted(&executable(2, PT_INTERP as u8, 1)), "has an interpreter");
        assert!(!is_accepted(&executable(2, PT_DYNAMIC as u8, 1)), "is dynamic");
        assert!(!is_accepted(&executable(2, load, SHT_SYMTAB as u8)), "has symbols");
        assert!(!is_accepted(&executable(2, load, 1)[..150]), "truncated");
        assert!(!is_accepted(b"#!/bin/sh\n"));
    }

    #[test]
    fn the_test_program_itself_is_rejected() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(check(&own).is_err());
    }
}
