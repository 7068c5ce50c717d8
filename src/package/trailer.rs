//! The trailer of a bootstrap executable: the gateway that serves the executable appends the public keys that it must trust.
//!
//! ```text
//! <executable> <JSON: {"keys": ["untrusted comment: …\nRW…\n", …]}> <length of the JSON: 8 bytes, little endian> AOPS-TRAILER-01\n
//! ```
//!
//! Linux and Windows ignore bytes after the end of an executable. Unknown fields are ignored.

use std::fs::File;
#[cfg(feature = "gateway")]
use std::io::Write;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 16] = b"AOPS-TRAILER-01\n";
/// The length of the JSON, and the magic.
const FOOT_BYTES: u64 = 8 + MAGIC.len() as u64;
const MAX_PAYLOAD_BYTES: u64 = 64 << 10;

#[derive(Debug, Default, Serialize, Deserialize)]
struct TrailerPayload {
    /// Public keys, each as the text of a minisign key file.
    #[serde(default)]
    keys: Vec<String>,
}

/// Reads the public keys in an executable's trailer; `None` if it has no trailer.
pub fn read(executable: &Path) -> Result<Option<Vec<String>>> {
    let attempt = || -> Result<Option<Vec<String>>> {
        let mut file = File::open(executable)?;
        let Some((at, length)) = find(&mut file)? else { return Ok(None) };
        let mut json = vec![0; length as usize];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut json)?;
        let payload: TrailerPayload = serde_json::from_slice(&json).context("the trailer is damaged")?;
        Ok(Some(payload.keys))
    };
    attempt().with_context(|| format!("cannot read the public keys in the trailer of {}", executable.display()))
}

/// Writes a trailer with `keys` to an executable that is open for writing, replacing an existing one.
#[cfg(feature = "gateway")]
pub fn put(executable: &mut File, keys: &[String]) -> io::Result<()> {
    let json = serde_json::to_vec(&TrailerPayload { keys: keys.to_vec() })?;
    if json.len() as u64 > MAX_PAYLOAD_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many keys for a trailer"));
    }
    let end = length_without(executable)?;
    executable.set_len(end)?;
    executable.seek(SeekFrom::Start(end))?;
    executable.write_all(&json)?;
    executable.write_all(&(json.len() as u64).to_le_bytes())?;
    executable.write_all(MAGIC)
}

/// The length of an executable without its trailer.
#[cfg(feature = "gateway")]
pub fn length_without(executable: &mut File) -> io::Result<u64> {
    Ok(match find(executable)? {
        Some((at, _)) => at,
        None => executable.metadata()?.len(),
    })
}

/// Offset and length of the JSON.
fn find(file: &mut File) -> io::Result<Option<(u64, u64)>> {
    let size = file.metadata()?.len();
    let Some(foot_at) = size.checked_sub(FOOT_BYTES) else { return Ok(None) };
    let mut foot = [0; FOOT_BYTES as usize];
    file.seek(SeekFrom::Start(foot_at))?;
    file.read_exact(&mut foot)?;
    let (length, magic) = foot.split_at(8);
    if magic != MAGIC {
        return Ok(None);
    }
    let length = length.try_into().map(u64::from_le_bytes).map_err(io::Error::other)?;
    match foot_at.checked_sub(length).filter(|_| length <= MAX_PAYLOAD_BYTES) {
        Some(at) => Ok(Some((at, length))),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the trailer is damaged")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "gateway")]
    #[test]
    fn a_new_trailer_replaces_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("executable");
        std::fs::write(&path, b"\x7fELF and so on").unwrap();
        assert_eq!(read(&path).unwrap(), None);

        let mut file = File::options().read(true).write(true).open(&path).unwrap();
        put(&mut file, &["one".to_owned()]).unwrap();
        assert_eq!(read(&path).unwrap(), Some(vec!["one".to_owned()]));
        put(&mut file, &["two".to_owned(), "three".to_owned()]).unwrap();
        assert_eq!(read(&path).unwrap(), Some(vec!["two".to_owned(), "three".to_owned()]));
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.starts_with(b"\x7fELF and so on"));
        assert!(!bytes.windows(5).any(|bytes| bytes == b"\"one\""));
    }

    #[test]
    fn protocol_md_describes_the_trailer() {
        let magic = std::str::from_utf8(MAGIC).unwrap().trim_end();
        let words = format!("8 bytes, unsigned, little endian> <the {} bytes \"{magic}\\n\">", MAGIC.len());
        assert!(crate::core::protocol::document().contains(&words), "{words}");
    }

    #[test]
    fn damaged_trailers_are_errors_and_short_files_have_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        for (content, expected) in [
            (b"".to_vec(), true),
            (b"AOPS-TRAILER-01\n".to_vec(), true),
            ([&[9, 0, 0, 0, 0, 0, 0, 0][..], &MAGIC[..]].concat(), false),
            ([&[255; 8][..], &MAGIC[..]].concat(), false),
            ([&b"{]"[..], &[2, 0, 0, 0, 0, 0, 0, 0], &MAGIC[..]].concat(), false),
        ] {
            std::fs::write(&path, &content).unwrap();
            assert_eq!(read(&path).is_ok(), expected, "{content:?}");
        }
    }
}
