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

/// Whether a file can be run, by its name.
pub fn is_executable(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| ["exe", "bat", "cmd"].iter().any(|known| extension.eq_ignore_ascii_case(known)))
}

/// Puts the executable `new` in the place of `path` by a rename. One that runs is moved away first; the next start sweeps it.
pub fn replace_executable(new: &Path, path: &Path) -> io::Result<()> {
    match fs::rename(new, path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && path.exists() => {
            let away = path.with_extension(format!("{}.old", fastrand::u32(..)));
            fs::rename(path, &away)?;
            fs::rename(new, path).inspect_err(|_| {
                let _ = fs::rename(&away, path);
            })
        }
        other => other,
    }
}

/// Moves the running executable out of `directory`, which is to be removed: it cannot be deleted while it runs.
pub fn leave_directory(directory: &Path) -> io::Result<()> {
    let executable = std::env::current_exe()?;
    if executable.starts_with(directory) {
        fs::rename(&executable, std::env::temp_dir().join(format!("aops-{}.old", fastrand::u32(..))))?;
    }
    Ok(())
}
