//! Windows Server 2012 R2 and later.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::core::service_manager::Notification;

mod access;
mod group;
mod launch;
mod local;
mod names;
mod process;
mod security;
mod signal;
mod watch;

pub use access::{deny_write_to_others, weakness, weakness_of_parents};
pub use group::{Group, Groups};
pub use launch::{Child, launch};
pub use local::*;
pub use process::*;
pub use signal::{errand, signal};

// --- Files

/// Windows has no permission bits; files inherit the access list of the home.
pub fn set_mode(_path: &Path, _mode: u32) -> io::Result<()> {
    Ok(())
}

/// Nothing to do: both inherit the access list of their directory.
#[cfg(feature = "gateway")]
pub fn copy_access(_from: &Path, _to: &Path) -> io::Result<()> {
    Ok(())
}

/// Nothing to do: NTFS journals its directories.
pub fn sync_directory(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// None: a mount in a directory is a reparse point, which a removal removes and does not follow.
pub fn mounts_in(_directory: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(Vec::new())
}

/// Opens a regular file for reading. A pipe or a device is an error.
pub fn open_file(path: &Path) -> io::Result<File> {
    match fs::metadata(path)?.is_file() {
        true => File::open(path),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file; pipes and devices are not read")),
    }
}

/// Opens the null device for writing.
pub fn open_null() -> io::Result<File> {
    fs::OpenOptions::new().write(true).open("NUL")
}

/// Whether `path` currently names this open file.
pub fn is_same_file(file: &File, path: &Path) -> io::Result<bool> {
    match File::open(path) {
        Ok(named) => Ok(identity(file)? == identity(&named)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Volume and file number.
fn identity(file: &File) -> io::Result<(u32, u32, u32)> {
    use std::os::windows::io::AsRawHandle;
    use windows_sys::Win32::Storage::FileSystem::{BY_HANDLE_FILE_INFORMATION, GetFileInformationByHandle};

    let mut found = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: the handle is open, and the result outlives the call.
    let done = unsafe { GetFileInformationByHandle(file.as_raw_handle(), &mut found) };
    if done == 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((found.dwVolumeSerialNumber, found.nFileIndexHigh, found.nFileIndexLow))
}

/// Volume and file number.
pub(super) fn file_identity(file: &File) -> io::Result<(u64, u64)> {
    let (volume, high, low) = identity(file)?;
    Ok((volume.into(), u64::from(high) << 32 | u64::from(low)))
}

/// Whether a copy that [`replace_link`] created has the current content of `target`.
pub fn points_to(link: &Path, target: &Path) -> io::Result<bool> {
    let content = |path: &Path| match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let content_of_link = content(link)?;
    Ok(content_of_link.is_some() && content_of_link == content(target)?)
}

/// An existing path with links resolved, in the spelling of the disk, and in the form that programs accept (not `\\?\C:\…`).
pub(super) fn canonical(path: &Path) -> io::Result<PathBuf> {
    let real = fs::canonicalize(path)?;
    let plain = real.to_str().and_then(|text| text.strip_prefix(r"\\?\"));
    match plain.filter(|plain| plain.as_bytes().get(1) == Some(&b':')) {
        Some(plain) => Ok(PathBuf::from(plain)),
        None => Ok(real),
    }
}

/// Whether two paths are the same directory.
pub fn is_same_directory(one: &Path, other: &Path) -> bool {
    one.is_dir() && crate::platform::identity(one) == crate::platform::identity(other)
}

/// Windows has no way to test a rename.
pub fn can_rename(_path: &Path, _blocker: &Path) -> io::Result<()> {
    Ok(())
}

/// Windows does not report it.
pub fn lock_holder(_path: &Path) -> Option<u32> {
    None
}

/// Makes `link` a copy of `target`, replacing an existing file: links need a privilege on Windows.
pub fn replace_link(target: &Path, link: &Path) -> io::Result<()> {
    let source = link.parent().unwrap_or(Path::new("")).join(target);
    let temporary = link.with_file_name(format!("{}{}", super::temporary_prefix(), fastrand::u64(..)));
    fs::hard_link(&source, &temporary).or_else(|_| fs::copy(&source, &temporary).map(drop))?;
    fs::rename(&temporary, link).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Whether the process has administrator privileges.
pub fn is_root() -> bool {
    File::open(r"\\.\PhysicalDrive0").is_ok()
}

// --- Packages

/// Free space for this process on the volume of `directory`, bytes.
pub fn free_space(directory: &Path) -> io::Result<u64> {
    use std::os::windows::ffi::OsStrExt;
    use windows_sys::Win32::Storage::FileSystem::GetDiskFreeSpaceExW;

    let wide: Vec<u16> = directory.as_os_str().encode_wide().chain([0]).collect();
    let mut free = 0;
    // SAFETY: `wide` ends in a zero and, like `free`, outlives the call; the other results are not requested.
    let done = unsafe { GetDiskFreeSpaceExW(wide.as_ptr(), &mut free, std::ptr::null_mut(), std::ptr::null_mut()) };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(free) }
}

/// Opens a file that nobody else can write while it is open, and creates it if it does not exist.
pub fn open_private(path: &Path) -> io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    use windows_sys::Win32::Foundation::ERROR_SHARING_VIOLATION;
    use windows_sys::Win32::Storage::FileSystem::{FILE_SHARE_DELETE, FILE_SHARE_READ};
    let shared = FILE_SHARE_READ | FILE_SHARE_DELETE;
    let opened = fs::OpenOptions::new().read(true).write(true).create(true).share_mode(shared).open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(code) if code == ERROR_SHARING_VIOLATION as i32 => io::ErrorKind::WouldBlock.into(),
        _ => error,
    })
}

/// Not supported: a service may not create symbolic links. Packages for Windows have none.
pub fn make_symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "symbolic links in packages are not supported on Windows"))
}

/// Makes a file's content survive a power cut. Windows flushes only files that are open for writing.
pub fn sync_file(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.sync_all()
}

/// Makes every file below a directory survive a power cut.
pub fn sync_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync_file(&entry.path())?;
        }
    }
    Ok(())
}

/// Creates a file. Fails if it exists. Windows has no permission bits.
pub fn create_file(path: &Path, _mode: u32) -> io::Result<File> {
    fs::OpenOptions::new().write(true).create_new(true).open(path)
}

/// Creates a directory. Fails if it exists. Windows has no permission bits.
pub fn create_directory(path: &Path, _mode: u32) -> io::Result<()> {
    fs::create_dir(path)
}

/// Always true: Windows has no permission bits.
pub fn has_mode(_metadata: &fs::Metadata, _mode: u32) -> bool {
    true
}

/// Windows has no permission bits.
#[cfg(test)]
pub fn mode(_path: &Path) -> io::Result<u32> {
    Err(io::ErrorKind::Unsupported.into())
}

// --- Files and limits for the gateway

/// Always true: Windows has no such bit, and hosts that run a package published here may need it.
#[cfg(feature = "gateway")]
pub fn has_execute_bit(_metadata: &fs::Metadata) -> bool {
    true
}

/// Always false: the access list that the file inherits decides.
pub fn is_readable_by_others(_metadata: &fs::Metadata) -> bool {
    false
}

/// Not part of the metadata; size and time must suffice.
#[cfg(feature = "gateway")]
pub fn file_number(_metadata: &fs::Metadata) -> u64 {
    0
}

/// Windows has no such limit for sockets.
#[cfg(feature = "gateway")]
pub fn raise_open_files() -> io::Result<u64> {
    Ok(u64::MAX)
}

// --- Installation

/// The default home.
pub fn default_home() -> PathBuf {
    let programs = std::env::var_os("ProgramFiles").unwrap_or_else(|| r"C:\Program Files".into());
    PathBuf::from(programs).join("aops")
}

/// Whether a file is executable, by its extension.
pub fn is_executable(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| ["exe", "bat", "cmd"].iter().any(|known| extension.eq_ignore_ascii_case(known)))
}

/// Replaces the executable `path` by `new` with a rename. A running executable is moved away first; the next start removes it.
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

/// Moves the running executable out of `directory`, which is to be removed: a running executable cannot be deleted.
pub fn leave_directory(directory: &Path) -> io::Result<()> {
    let executable = std::env::current_exe()?;
    if executable.starts_with(directory) {
        fs::rename(&executable, std::env::temp_dir().join(format!("aops-{}.old", fastrand::u32(..))))?;
    }
    Ok(())
}

// --- Termination

/// Receives the events that request termination: Ctrl-C, Ctrl-Break, and the shutdown of the machine.
#[derive(Debug)]
pub struct Termination {
    ctrl_c: tokio::signal::windows::CtrlC,
    ctrl_break: tokio::signal::windows::CtrlBreak,
    shutdown: tokio::signal::windows::CtrlShutdown,
}

impl Termination {
    /// Needs a runtime. From here on, these events no longer end the process.
    pub fn new() -> io::Result<Termination> {
        use tokio::signal::windows::{ctrl_break, ctrl_c, ctrl_shutdown};
        Ok(Termination { ctrl_c: ctrl_c()?, ctrl_break: ctrl_break()?, shutdown: ctrl_shutdown()? })
    }

    /// Resolves when an event is received. Cancel-safe.
    pub async fn recv(&mut self) {
        tokio::select! {
            _ = self.ctrl_c.recv() => {}
            _ = self.ctrl_break.recv() => {}
            _ = self.shutdown.recv() => {}
        }
    }
}

/// Windows has no reload signal.
#[cfg(feature = "gateway")]
#[derive(Debug)]
pub struct Reload;

#[cfg(feature = "gateway")]
impl Reload {
    pub fn new() -> io::Result<Reload> {
        Ok(Reload)
    }

    /// Never resolves.
    pub async fn recv(&mut self) {
        std::future::pending().await
    }
}

// --- The service manager's notifications

/// Nothing to do: a service notifies the service control manager through its own registration.
pub fn notify(_notice: Notification) {}

/// Replaces a small file atomically.
fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_file_name(format!("{}{}", super::temporary_prefix(), fastrand::u64(..)));
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

// --- The active release of a sub-agent

/// The version that `current` names; `None`: the file does not exist.
pub fn read_current(file: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(version) => Ok(Some(version.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes `current` name a version, atomically.
pub fn write_current(file: &Path, version: &str) -> io::Result<()> {
    replace_file(file, version.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{self, OtherProcess};

    const RUNNING: &str = "platform::windows::tests::a_running_program";

    /// Blocks until it is killed.
    #[test]
    fn a_running_program() {
        if testing::part(RUNNING).is_some() {
            testing::report("ready");
            testing::block();
        }
    }

    #[test]
    fn an_executable_is_replaced_while_it_runs() {
        let directory = tempfile::tempdir().unwrap();
        let (app, new) = (directory.path().join("app.exe"), directory.path().join("new.exe"));
        fs::copy(std::env::current_exe().unwrap(), &app).unwrap();
        fs::write(&new, b"new").unwrap();
        let mut running = OtherProcess::start_from(&app, RUNNING, "");
        assert_eq!(running.line(), "ready");
        replace_executable(&new, &app).unwrap();
        assert_eq!(fs::read(&app).unwrap(), b"new");
        assert!(start_time(running.pid()).is_some());
        assert!(!new.exists());
        running.kill();
    }

    #[test]
    fn a_replaced_file_is_detected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spm.lock");
        let file = File::create(&path).unwrap();
        assert!(is_same_file(&file, &path).unwrap());
        fs::rename(&path, directory.path().join("away")).unwrap();
        assert!(!is_same_file(&file, &path).unwrap());
        File::create(&path).unwrap();
        assert!(!is_same_file(&file, &path).unwrap());
    }
}
