//! Unix: Linux from kernel 3.10 up.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

// --- Files

/// Sets a file's permission bits.
pub fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Makes what was renamed, made or removed in a directory survive a power cut.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Whether an open file is the one that `path` names now.
pub fn is_same_file(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((ours.dev(), ours.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes `link` name `target` (a relative or absolute path as it is to stand in the link), replacing what was there in one step.
pub fn replace_link(target: &Path, link: &Path) -> io::Result<()> {
    let temporary = link.with_file_name(format!(".new-{}-{}", std::process::id(), fastrand::u64(..)));
    std::os::unix::fs::symlink(target, &temporary)?;
    fs::rename(&temporary, link).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Whether the process may do what needs root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

// --- The host's services

/// Where an installation stands unless somebody says otherwise.
pub fn default_home() -> PathBuf {
    PathBuf::from("/opt/aops")
}

/// Whether a file can be run, by its mode.
pub fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Puts the executable `new` in the place of `path` by one rename, also while that one runs.
pub fn replace_executable(new: &Path, path: &Path) -> io::Result<()> {
    fs::rename(new, path)
}

/// A running executable can be removed: there is nothing to do before its directory is.
pub fn leave_directory(_directory: &Path) -> io::Result<()> {
    Ok(())
}

// --- placeholder, the real ones are written elsewhere

pub fn detach(_command: &mut std::process::Command) {}
pub fn start_time(_pid: u32) -> Option<u64> {
    None
}
pub fn executable_of(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}
pub struct Seen {
    pub pid: u32,
    pub start_time: u64,
}
pub fn processes(_home: &Path) -> Vec<Seen> {
    vec![]
}
pub fn signal(_pid: u32, _start_time: u64, _signal: crate::core::manifest::StopSignal) -> io::Result<bool> {
    Ok(false)
}
