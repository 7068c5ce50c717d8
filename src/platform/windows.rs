//! Windows, from Server 2012 R2 up.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

// --- Files

/// Windows has no permission bits; a home inherits its directory's access list.
pub fn set_mode(_path: &Path, _mode: u32) -> io::Result<()> {
    Ok(())
}

/// NTFS keeps its directories by a journal of its own; there is nothing to flush.
pub fn sync_directory(_path: &Path) -> io::Result<()> {
    Ok(())
}

// --- The host's services

/// Where an installation stands unless somebody says otherwise.
pub fn default_home() -> PathBuf {
    let programs = std::env::var_os("ProgramFiles").unwrap_or_else(|| r"C:\Program Files".into());
    PathBuf::from(programs).join("aops")
}
