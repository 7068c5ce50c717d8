//! Windows 7 and Server 2008 R2 and later. Without nested jobs (before Windows 8), a sub-agent whose starter is in a job has none of its own.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::windows::io::OwnedHandle;
use std::path::{Path, PathBuf};

use windows_sys::Win32::Storage::FileSystem::{BY_HANDLE_FILE_INFORMATION, GetFileInformationByHandle};

mod access;
mod event;
mod event_log;
mod exit_event;
mod group;
mod gui;
mod launch;
mod local;
mod names;
mod process;
mod replace;
mod security;
mod service_list;
mod services;
mod signal;
mod watch;

pub use access::{deny_write_to_others, weakness, weakness_of_parents};
pub use exit_event::on_exit_request;
pub use group::{Group, Groups, hold_groups};
pub use launch::{Child, launch};
pub use local::*;
pub use process::*;
pub use replace::*;
pub use services::*;
pub use signal::{errand, kill_group, signal};

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

/// Makes the names in a directory survive a power cut, as far as the file system can: NTFS journals its directories, and writes the journal
/// when one of them is flushed.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    use std::os::windows::fs::OpenOptionsExt;
    use windows_sys::Win32::Storage::FileSystem::FILE_FLAG_BACKUP_SEMANTICS;
    // This flag opens a directory.
    let opened = fs::OpenOptions::new().write(true).custom_flags(FILE_FLAG_BACKUP_SEMANTICS).open(path);
    match opened.and_then(|directory| directory.sync_all()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(error),
        // Not every file system can flush a directory.
        _ => Ok(()),
    }
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
        Ok(named) => Ok(file_identity(file)? == file_identity(&named)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn information(file: &File) -> io::Result<BY_HANDLE_FILE_INFORMATION> {
    use std::os::windows::io::AsRawHandle;
    let mut found = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: the handle is open, and the result outlives the call.
    let done = unsafe { GetFileInformationByHandle(file.as_raw_handle(), &mut found) };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(found) }
}

/// Volume and file number.
fn identity(found: &BY_HANDLE_FILE_INFORMATION) -> (u64, u64) {
    (found.dwVolumeSerialNumber.into(), u64::from(found.nFileIndexHigh) << 32 | u64::from(found.nFileIndexLow))
}

/// Volume and file number.
pub(super) fn file_identity(file: &File) -> io::Result<(u64, u64)> {
    Ok(identity(&information(file)?))
}

/// Whether a link that [`replace_link`] created is a name of the file `target`. A copy, which a file system without hard links has instead,
/// counts if it has the same content.
pub fn points_to(link: &Path, target: &Path) -> io::Result<bool> {
    let open = |path: &Path| match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let (Some(named), Some(file)) = (open(link)?, open(target)?) else { return Ok(false) };
    let (named, file) = (information(&named)?, information(&file)?);
    if named.nNumberOfLinks > 1 {
        return Ok(identity(&named) == identity(&file));
    }
    Ok(fs::read(link)? == fs::read(target)?)
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

/// Whether a path is in a directory, or is it. File names are not case-sensitive here.
pub fn is_below(path: &Path, directory: &Path) -> bool {
    let folded = |path: &Path| PathBuf::from(path.to_string_lossy().trim_start_matches(r"\\?\").to_lowercase());
    folded(path).starts_with(folded(directory))
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

/// Whether the process runs with the rights of an administrator: an administrator's program does not, unless it was started elevated.
pub fn is_root() -> bool {
    security::is_administrator().unwrap_or(false)
}

/// Whether asking a process to exit also asks the processes that it has started: those that share its console.
pub const SIGNALS_REACH_CHILDREN: bool = true;

/// The user who may do everything on this host, for messages.
pub const ADMINISTRATOR: &str = "an administrator in an elevated command prompt";

/// An example of how to start a home at boot without a service manager.
pub const START_AT_BOOT: &str = "`schtasks /create /tn aops /sc onstart /ru SYSTEM /tr \"{control} start\"`";

/// The link to the executable for all users: there is no such directory.
pub const COMMAND_LINK: Option<&str> = None;

/// The extensions of programs, in the order in which they are tried.
const PROGRAMS: [&str; 3] = ["exe", "cmd", "bat"];

/// The file of a program, which may be named without its extension.
pub fn find_program(path: PathBuf) -> PathBuf {
    if path.is_file() {
        return path;
    }
    let with = |extension: &str| {
        let mut name = path.clone().into_os_string();
        name.push(format!(".{extension}"));
        PathBuf::from(name)
    };
    PROGRAMS.iter().map(|extension| with(extension)).find(|file| file.is_file()).unwrap_or(path)
}

/// Gives a new home an access list for administrators, the system and the user that we run as, instead of the one of its parent: a
/// directory below C:\ inherits rights of every user.
pub fn protect_new_home(path: &Path) -> io::Result<()> {
    security::set_access_list(path, "D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)(A;OICI;FA;;;@US@)")
}

/// Whether every link to a file follows when the file is replaced: on Windows the names of the executable are files of their own.
pub const LINKS_FOLLOW: bool = false;

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

/// The default home. On 64-bit Windows, `ProgramFiles` names a directory of its own to 32-bit programs; the 32-bit executable uses the one of
/// 64-bit programs, too.
pub fn default_home() -> PathBuf {
    let named = ["ProgramW6432", "ProgramFiles"].into_iter().find_map(std::env::var_os);
    let programs = named.unwrap_or_else(|| r"C:\Program Files".into());
    PathBuf::from(programs).join("aops")
}

/// Whether a file is executable, by its extension.
pub fn is_executable(path: &Path) -> bool {
    path.extension().is_some_and(|extension| PROGRAMS.iter().any(|known| extension.eq_ignore_ascii_case(known)))
}

// --- Termination

/// Receives the events that request termination: Ctrl-C, Ctrl-Break, a closed console, a logoff, the shutdown of the machine, a stop of the
/// service, and a request of another process of ours.
#[derive(Debug)]
pub struct Termination {
    ctrl_c: tokio::signal::windows::CtrlC,
    ctrl_break: tokio::signal::windows::CtrlBreak,
    close: tokio::signal::windows::CtrlClose,
    logoff: tokio::signal::windows::CtrlLogoff,
    shutdown: tokio::signal::windows::CtrlShutdown,
    request: OwnedHandle,
}

impl Termination {
    /// Needs a runtime. From here on, these events no longer end the process.
    pub fn new() -> io::Result<Termination> {
        use tokio::signal::windows::{ctrl_break, ctrl_c, ctrl_close, ctrl_logoff, ctrl_shutdown};
        Ok(Termination {
            ctrl_c: ctrl_c()?,
            ctrl_break: ctrl_break()?,
            close: ctrl_close()?,
            logoff: ctrl_logoff()?,
            shutdown: ctrl_shutdown()?,
            request: exit_event::own()?,
        })
    }

    /// Resolves when an event is received. Cancel-safe.
    pub async fn recv(&mut self) {
        // The service control manager announces a shutdown, and users come and go, without any effect on a service.
        let is_service = is_service();
        loop {
            tokio::select! {
                _ = self.ctrl_c.recv() => return,
                _ = self.ctrl_break.recv() => return,
                _ = self.close.recv() => return,
                _ = self.logoff.recv() => if !is_service { return },
                _ = self.shutdown.recv() => if !is_service { return },
                () = requested(&self.request) => return,
            }
        }
    }
}

/// Resolves when an event is signalled; never if it cannot be watched. Cancel-safe.
async fn requested(event: &OwnedHandle) {
    if let Err(error) = watch::signalled(event).await {
        tracing::error!(error = %error, "cannot wait for requests to exit; this process is ended without one");
        std::future::pending::<()>().await;
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

// --- The active release of a sub-agent

/// Replaces a small file atomically.
fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_file_name(format!("{}{}", super::temporary_prefix(), fastrand::u64(..)));
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    rename(&temporary, path).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

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
