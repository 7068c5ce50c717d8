//! Windows, from Server 2012 R2 up.

use std::fs::{self, File};
use std::io;
use std::path::Path;

mod local;
mod process;

pub use local::*;
pub use process::*;

// --- Files

/// Windows has no permission bits; a home inherits its directory's access list.
pub fn set_mode(_path: &Path, _mode: u32) -> io::Result<()> {
    Ok(())
}

/// NTFS keeps its directories by a journal of its own; there is nothing to flush.
pub fn sync_directory(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Whether an open file is the one that `path` names now. An open file keeps its name on Windows: it cannot be removed beneath us.
pub fn is_same_file(_file: &File, path: &Path) -> io::Result<bool> {
    path.try_exists()
}

/// Makes `link` a copy of what `target` names, replacing what was there: links need a privilege on Windows.
pub fn replace_link(target: &Path, link: &Path) -> io::Result<()> {
    let source = link.parent().unwrap_or(Path::new("")).join(target);
    let temporary = link.with_file_name(format!(".new-{}-{}", std::process::id(), fastrand::u64(..)));
    fs::hard_link(&source, &temporary).or_else(|_| fs::copy(&source, &temporary).map(drop))?;
    fs::rename(&temporary, link).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Whether the process may write where only administrators may.
pub fn is_root() -> bool {
    File::open(r"\\.\PhysicalDrive0").is_ok()
}
