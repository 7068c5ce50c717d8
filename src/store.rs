//! Files that are never half-written: new content is written to a temporary file next to the old one, synced, and renamed over it.
//!
//! Machine-written state is JSON that tolerates unknown fields, so that an older version can read the state of a newer one. Its types keep
//! unknown fields in a flattened map and write them back.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::platform;

/// Limit for a state file, bytes; real ones are much smaller.
const MAX_STATE_BYTES: u64 = 16 << 20;
/// Number of retries to remove a directory in which files are still being created.
const REMOVAL_TRIES: u32 = 10;

/// The fields of a state file that this version does not know, kept for the newer one that wrote them.
pub type UnknownJson = serde_json::Map<String, serde_json::Value>;

/// Who may read a file that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// All users (0644).
    Public,
    /// The owner only (0600).
    Private,
}

impl Access {
    fn mode(self) -> u32 {
        match self {
            Access::Public => 0o644,
            Access::Private => 0o600,
        }
    }
}

/// Whether a file is synced to the disk when it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durability {
    /// It survives a power cut.
    Synced,
    /// A power cut may lose or damage it, but the write does not wait for the disk.
    Unsynced,
}

/// Atomically replaces the file at `path` by `content`; survives a power cut.
pub fn replace(path: &Path, content: &[u8], access: Access) -> Result<()> {
    replace_with(path, access, |file| file.write_all(content))
}

/// Like [`replace`], with the owner and the permissions of `model`.
#[cfg(feature = "gateway")]
pub fn replace_like(path: &Path, content: &[u8], model: &Path) -> Result<()> {
    let set_access = |file: &Path| platform::copy_access(model, file);
    replace_as(Durability::Synced, path, set_access, |file| file.write_all(content))
}

/// Like [`replace`], with the content written by `write`.
pub fn replace_with(
    path: &Path,
    access: Access,
    write: impl FnOnce(&mut fs::File) -> std::io::Result<()>,
) -> Result<()> {
    replace_as(Durability::Synced, path, |file| platform::set_mode(file, access.mode()), write)
}

fn replace_as(
    durability: Durability,
    path: &Path,
    set_access: impl FnOnce(&Path) -> std::io::Result<()>,
    write: impl FnOnce(&mut fs::File) -> std::io::Result<()>,
) -> Result<()> {
    let attempt = || -> Result<()> {
        let parent = path.parent().context("it has no parent directory")?;
        let mut file = tempfile::Builder::new().prefix(&platform::temporary_prefix()).tempfile_in(parent)?;
        write(file.as_file_mut())?;
        set_access(file.path())?;
        if durability == Durability::Synced {
            file.as_file().sync_all()?;
        }
        let mut unnamed = Some(file);
        platform::while_in_use(|| {
            let file = unnamed.take().ok_or(ErrorKind::NotFound)?;
            file.persist(path).map(drop).map_err(|error| {
                unnamed = Some(error.file);
                error.error
            })
        })?;
        if durability == Durability::Synced {
            platform::sync_directory(parent)?;
        }
        Ok(())
    };
    attempt().with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a file of at most `limit` bytes; `None`: it does not exist. A pipe or a device is an error, so that the read cannot block.
pub fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let attempt = || -> Result<Option<Vec<u8>>> {
        let file = match platform::open_file(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut content = Vec::with_capacity(file.metadata()?.len().min(limit) as usize);
        // The file may grow while it is read.
        file.take(limit + 1).read_to_end(&mut content)?;
        if content.len() as u64 > limit {
            anyhow::bail!("it has more than {limit} bytes");
        }
        Ok(Some(content))
    };
    attempt().with_context(|| format!("cannot read {}", path.display()))
}

/// Loads a state file; `None`: it does not exist.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(bytes) = read(path, MAX_STATE_BYTES)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .with_context(|| format!("cannot read {}: it is not a valid state file", path.display()))
}

/// Replaces a state file, readable by its owner only. Content that is too large for [`load`] is rejected, and the old file stays.
pub fn save<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    replace(path, &state_text(path, value)?, Access::Private)
}

/// Like [`save`], for state that is useless after a power cut: does not wait for the disk.
pub fn save_unsynced<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = state_text(path, value)?;
    let set_access = |file: &Path| platform::set_mode(file, Access::Private.mode());
    replace_as(Durability::Unsynced, path, set_access, |file| file.write_all(&text))
}

fn state_text<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).with_context(|| format!("cannot write {}", path.display()))?;
    text.push(b'\n');
    // State that cannot be loaded again would be lost at the next start.
    ensure!(
        text.len() as u64 <= MAX_STATE_BYTES,
        "cannot write {}: its {} bytes exceed the limit of {MAX_STATE_BYTES}",
        path.display(),
        text.len()
    );
    Ok(text)
}

/// Removes a file, if it exists.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        // On a read-only file system, removing a missing file fails too.
        Err(error) if error.kind() != ErrorKind::NotFound && !is_missing(path) => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn is_missing(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Fails if a file system is mounted at or below a directory: its files must not be removed.
pub fn ensure_nothing_mounted(directory: &Path) -> Result<()> {
    // If the mounts are unknown, none is assumed.
    let mounts = platform::mounts_in(directory).unwrap_or_default();
    let Some(first) = mounts.first() else { return Ok(()) };
    bail!(
        "cannot remove {}: a file system is mounted at {} and would be removed too; unmount it",
        directory.display(),
        first.display()
    )
}

/// Removes a directory and its contents, if it exists. Fails if a file system is mounted there.
pub fn remove_tree(path: &Path) -> Result<()> {
    ensure_nothing_mounted(path)?;
    let mut tries = 0;
    loop {
        match fs::remove_dir_all(path) {
            // A file was created there meanwhile.
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && tries < REMOVAL_TRIES => tries += 1,
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_that_is_too_large_to_load_is_not_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let text = |bytes: u64| "x".repeat(usize::try_from(bytes).unwrap());
        // Two quotes and a line end are added.
        let most = text(MAX_STATE_BYTES - 3);
        save(&path, &most).unwrap();
        let error = save(&path, &text(MAX_STATE_BYTES - 2)).unwrap_err();
        assert!(error.to_string().contains("exceed the limit of 16777216"), "{error}");
        assert!(load::<String>(&path).unwrap() == Some(most), "the old file was lost");
    }
}
