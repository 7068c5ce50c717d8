//! Where things lie in this workspace, and the one place below `target` where set-up is kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let own = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    own.parent().map_or_else(|| own.clone(), Path::to_path_buf)
}

/// Where cargo builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |given| root().join(given))
}

/// A directory or file of what the tasks set up once and keep.
pub(crate) fn kept(name: &str) -> PathBuf {
    target().join("xtask").join(name)
}

/// What is kept under `name`, made by `make` if it is not there yet. It is made under a temporary name and renamed when it is
/// whole, so that an interrupted set-up is simply done again; two tasks that want the same at once wait for each other.
pub(crate) fn keep(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = kept(name);
    let _lock = lock(name)?;
    if path.exists() {
        return Ok(path);
    }
    let unfinished = kept(&format!(".{name}.unfinished"));
    remove(&unfinished)?;
    make(&unfinished)?;
    fs::rename(&unfinished, &path).with_context(|| format!("cannot put {} in place", path.display()))?;
    Ok(path)
}

/// Held by one task at a time, until it is dropped.
pub(crate) fn lock(name: &str) -> Result<File> {
    fs::create_dir_all(kept("")).with_context(|| format!("cannot make {}", kept("").display()))?;
    let lock = File::create(kept(&format!(".{name}.lock"))).context("cannot make a lock file")?;
    lock.lock().context("cannot take the lock of the set-up")?;
    Ok(lock)
}

/// Removes a file or tree, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
