//! Archives, read by the rules with which hosts unpack them.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::archives::attacks;
use crate::core::model::{Os, Packing};
use crate::package::inspect;

/// The archive is stored on disk while it is read; a memory file system is enough.
fn unpack(bytes: &[u8], packing: Packing) {
    thread_local! {
        static FILE: RefCell<File> = RefCell::new(tempfile::tempfile().expect("a temporary file"));
    }
    FILE.with_borrow_mut(|file| {
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).expect("it is ours");
        file.write_all(bytes).expect("there is space for an archive");
        let os = if bytes.len().is_multiple_of(2) { Os::Linux } else { Os::Windows };
        let mut paths = std::collections::BTreeSet::new();
        let looked = inspect(file, packing, os, &mut |seen| {
            let path = seen.path;
            assert!(!path.is_empty() && !path.starts_with('/') && !path.contains(['\\', '\0']), "{path:?}");
            assert!(path.split('/').all(|part| !part.is_empty() && part != "." && part != ".."), "{path:?}");
            assert!(path.split('/').next().is_some_and(|first| !first.eq_ignore_ascii_case(".complete")), "{path:?}");
            assert!(paths.insert(path.to_ascii_lowercase()), "{path:?} comes twice");
            Ok(())
        });
        // An error message contains text of the archive.
        if let Err(error) = looked {
            assert!(format!("{error:#}").len() < 20_000);
        }
    });
}

/// The blocks of a tar with correct checksums, which a mutation cannot guess, in an uncompressed frame.
pub fn tar(data: &[u8]) {
    let mut tar = data.to_vec();
    for block in tar.chunks_exact_mut(512) {
        if block[257..].starts_with(b"ustar") {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    unpack(&stored(&tar), Packing::TarZst);
}

/// A zstd frame with raw blocks only (RFC 8878, section 3.1.1), which is quick to read and write.
fn stored(bytes: &[u8]) -> Vec<u8> {
    // A window of 128 KiB, no content size, no checksum.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3];
    let mut blocks = bytes.chunks(100_000).peekable();
    if blocks.peek().is_none() {
        frame.extend([1, 0, 0]);
    }
    while let Some(block) = blocks.next() {
        let last = u32::from(blocks.peek().is_none());
        frame.extend(&((block.len() as u32) << 3 | last).to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame
}

pub fn tar_zst(data: &[u8]) {
    unpack(data, Packing::TarZst);
}

pub fn tar_gz(data: &[u8]) {
    unpack(data, Packing::TarGz);
}

pub fn zip(data: &[u8]) {
    unpack(data, Packing::Zip);
}

/// Writes the attack table's archives of one kind into a corpus, if they are small and do not expand: large ones would take most of the
/// time.
pub fn seeds(target: &str, directory: &Path) {
    const MAX_BYTES: usize = 8 << 10;
    let packing = match target {
        "tar" | "tar-zst" => "tar.zst",
        "tar-gz" => "tar.gz",
        "zip" => "zip",
        _ => return,
    };
    for (number, attack) in attacks().into_iter().enumerate().filter(|(_, attack)| attack.packing == packing) {
        // An archive that cannot be unpacked does not expand.
        let unpacked = match packing {
            "tar.zst" => zstd::stream::decode_all(attack.bytes.as_slice()).unwrap_or_default(),
            "tar.gz" => {
                let mut unpacked = Vec::new();
                let _ = flate2::read::MultiGzDecoder::new(attack.bytes.as_slice()).read_to_end(&mut unpacked);
                unpacked
            }
            _ => Vec::new(),
        };
        let seed = if target == "tar" { &unpacked } else { &attack.bytes };
        if !seed.is_empty() && seed.len().max(unpacked.len()) <= MAX_BYTES {
            fs::write(directory.join(format!("attack-{number:03}")), seed).expect("the corpus can be written");
        }
    }
}
