//! Files that are never seen half-written: a new content is written beside the old one, made durable, and renamed over it.
//!
//! Machine-written state is JSON that tolerates unknown fields, so that an older version can read what a newer one wrote; its types keep
//! what they do not know in a flattened map and write it back.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::platform;

/// A state file is refused beyond this: nothing that we write comes near it.
const MAX_STATE_BYTES: u64 = 16 << 20;
/// A directory in which others still write is tried again so often.
const REMOVAL_TRIES: u32 = 10;

/// The fields of a state file that this version does not know, kept for the newer one that wrote them.
pub type UnknownJson = serde_json::Map<String, serde_json::Value>;

/// Who may read a file that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody may read it (0644).
    Public,
    /// Its owner alone may read it (0600).
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

/// Whether a file is on the disk when the writing of it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durability {
    /// It survives a power cut.
    Synced,
    /// It may be lost or damaged by one, and the writing waits for no disk.
    Unsynced,
}

/// Replaces the file at `path` by `content` in one step that survives a power cut.
pub fn replace(path: &Path, content: &[u8], access: Access) -> Result<()> {
    replace_with(path, access, |file| file.write_all(content))
}

/// As [`replace`]; whoever may read and owns `model` may read and owns the file.
#[cfg(feature = "gateway")]
pub fn replace_like(path: &Path, content: &[u8], model: &Path) -> Result<()> {
    let give = |file: &Path| platform::copy_access(model, file);
    replace_as(Durability::Synced, path, give, |file| file.write_all(content))
}

/// As [`replace`], with the content written by `write`.
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
    give: impl FnOnce(&Path) -> std::io::Result<()>,
    write: impl FnOnce(&mut fs::File) -> std::io::Result<()>,
) -> Result<()> {
    let attempt = || -> Result<()> {
        let parent = path.parent().context("it has no parent directory")?;
        let mut file = tempfile::Builder::new().prefix(platform::TEMPORARY_PREFIX).tempfile_in(parent)?;
        write(file.as_file_mut())?;
        give(file.path())?;
        if durability == Durability::Synced {
            file.as_file().sync_all()?;
        }
        file.persist(path).map_err(|error| error.error)?;
        if durability == Durability::Synced {
            platform::sync_directory(parent)?;
        }
        Ok(())
    };
    attempt().with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a file of at most `limit` bytes, which nobody can make wait: a pipe or a device in its place is an error. `None` where there is
/// none.
pub fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let attempt = || -> Result<Option<Vec<u8>>> {
        let file = match platform::open_file(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut content = Vec::with_capacity(file.metadata()?.len().min(limit) as usize);
        // It may grow while it is read.
        file.take(limit + 1).read_to_end(&mut content)?;
        if content.len() as u64 > limit {
            anyhow::bail!("it has more than {limit} bytes");
        }
        Ok(Some(content))
    };
    attempt().with_context(|| format!("cannot read {}", path.display()))
}

/// Loads a state file; `None` where there is none.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(bytes) = read(path, MAX_STATE_BYTES)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .with_context(|| format!("cannot read {}: it is not what was written there", path.display()))
}

/// Replaces a state file, readable by its owner alone. What [`load`] would refuse for its size is not written, and the old one stays.
pub fn save<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    replace(path, &state_text(path, value)?, Access::Private)
}

/// As [`save`], for what is worth nothing after a power cut: no disk is waited for.
pub fn save_unsynced<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = state_text(path, value)?;
    let give = |file: &Path| platform::set_mode(file, Access::Private.mode());
    replace_as(Durability::Unsynced, path, give, |file| file.write_all(&text))
}

fn state_text<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).with_context(|| format!("cannot write {}", path.display()))?;
    text.push(b'\n');
    // What could be written and not read again would be lost with the next start.
    ensure!(
        text.len() as u64 <= MAX_STATE_BYTES,
        "cannot write {}: it would have {} bytes, more than {MAX_STATE_BYTES}",
        path.display(),
        text.len()
    );
    Ok(text)
}

/// Removes a file; that there is none is no error.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        // On a read-only file system also a removal of what is not there fails.
        Err(error) if error.kind() != ErrorKind::NotFound && !is_missing(path) => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn is_missing(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Refuses a directory at or below which something is mounted: that is somebody else's.
pub fn ensure_nothing_mounted(directory: &Path) -> Result<()> {
    // Where the system does not say it, there is nothing to go by.
    let mounts = platform::mounts_in(directory).unwrap_or_default();
    let Some(first) = mounts.first() else { return Ok(()) };
    bail!(
        "cannot remove {}: something is mounted at {}, which would be removed too; unmount it",
        directory.display(),
        first.display()
    )
}

/// Removes a directory with all that is in it, unless something is mounted there; that there is none is no error.
pub fn remove_tree(path: &Path) -> Result<()> {
    ensure_nothing_mounted(path)?;
    let mut tries = 0;
    loop {
        match fs::remove_dir_all(path) {
            // Somebody made a file there meanwhile.
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
    fn what_could_not_be_loaded_again_is_not_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let text = |bytes: u64| "x".repeat(usize::try_from(bytes).unwrap());
        // Quotes and a line's end make it whole.
        let most = text(MAX_STATE_BYTES - 3);
        save(&path, &most).unwrap();
        let error = save(&path, &text(MAX_STATE_BYTES - 2)).unwrap_err();
        assert!(error.to_string().contains("more than 16777216"), "{error}");
        assert!(load::<String>(&path).unwrap() == Some(most), "the old one is gone");
    }
}
