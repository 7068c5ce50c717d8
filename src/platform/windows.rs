//! Windows, from Server 2012 R2 up.

use std::fs::{self, File};
use std::io;
use std::os::windows::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

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

/// Starts a program without a console and in a process group of its own, so that no Ctrl-C of the caller's reaches it.
pub fn spawn_detached(command: &mut Command) -> io::Result<Child> {
    use windows_sys::Win32::System::Threading::{CREATE_NEW_PROCESS_GROUP, DETACHED_PROCESS};
    command.creation_flags(DETACHED_PROCESS | CREATE_NEW_PROCESS_GROUP).spawn()
}
