//! Windows, from Server 2012 R2 up.

use std::fs::{self, File};
use std::io;
use std::path::Path;

// --- Files

/// Windows has no permission bits; a home inherits its directory's access list.
pub fn set_mode(_path: &Path, _mode: u32) -> io::Result<()> {
    Ok(())
}

/// NTFS keeps its directories by a journal of its own; there is nothing to flush.
pub fn sync_directory(_path: &Path) -> io::Result<()> {
    Ok(())
}

// --- What the gateway asks about files and limits

/// Windows knows no such bit, and the hosts of a package that is made here may need it.
pub fn is_executable(_metadata: &fs::Metadata) -> bool {
    true
}

/// Not to be had from the metadata; size and time must do.
pub fn file_number(_metadata: &fs::Metadata) -> u64 {
    0
}

/// Windows has no such limit for sockets.
pub fn raise_open_files() -> io::Result<u64> {
    Ok(u64::MAX)
}
