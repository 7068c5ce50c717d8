//! The paths of this workspace, and the cache below `target` for what the tasks set up once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let own = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    own.parent().map_or_else(|| own.clone(), Path::to_path_buf)
}

/// Cargo's target directory.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |given| root().join(given))
}

/// The path of a cached file or directory.
pub(crate) fn cache_path(name: &str) -> PathBuf {
    target().join("xtask").join(name)
}

/// Returns the cached `name`; calls `make` to create it if it does not exist. It is created under a temporary name and renamed when
/// complete, so an interrupted set-up is repeated from scratch. Two tasks that need the same entry wait for each other.
pub(crate) fn cached(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = cache_path(name);
    let _lock = lock(name)?;
    if path.exists() {
        return Ok(path);
    }
    let unfinished = cache_path(&format!(".{name}.unfinished"));
    remove(&unfinished)?;
    make(&unfinished)?;
    fs::rename(&unfinished, &path).with_context(|| format!("cannot rename a finished set-up to {}", path.display()))?;
    Ok(path)
}

/// A lock that one task at a time holds until it is dropped.
pub(crate) fn lock(name: &str) -> Result<File> {
    fs::create_dir_all(cache_path("")).with_context(|| format!("cannot create {}", cache_path("").display()))?;
    let lock = File::create(cache_path(&format!(".{name}.lock"))).context("cannot create a lock file")?;
    lock.lock().context("cannot lock the set-up")?;
    Ok(lock)
}

/// Removes a file or tree, if it exists.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
