//! Unix: Linux 3.10 and later.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::temporary_prefix;
use crate::core::service_manager::Notification;

mod access;
mod child_record;
mod clone;
mod group;
mod launch;
mod leave_cgroup;
mod local;
mod mounts;
mod process;
mod reset;
mod services;

pub use access::{deny_write_to_others, weakness, weakness_of_parents};
pub use group::{Group, Groups, hold_groups};
pub use launch::{Child, launch};
pub use leave_cgroup::{remove_role_groups, spawn_outside_groups};
pub use local::*;
pub use mounts::mounts_in;
pub use process::*;
pub use reset::{detach_from_caller, detach_from_caller_as};
pub use services::*;

// --- Files

/// Copies the permission bits of a file to another, and owner and group where permitted.
#[cfg(feature = "gateway")]
pub fn copy_access(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::metadata(from)?;
    // Without root, the file already has the right owner, or its owner cannot be changed.
    let _ = std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()));
    set_mode(to, metadata.mode() & 0o777)
}

/// Sets a file's permission bits.
pub fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Makes renames, creations and removals in a directory survive a power cut.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Opens a regular file for reading. A pipe or a device is an error: opening it could block or have side effects.
pub fn open_file(path: &Path) -> io::Result<File> {
    let is_file = |found: fs::Metadata| match found.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file; pipes and devices are not read")),
    };
    is_file(fs::metadata(path)?)?;
    // The path may have been replaced since.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    is_file(file.metadata()?)?;
    Ok(file)
}

/// Opens the null device for writing.
pub fn open_null() -> io::Result<File> {
    fs::OpenOptions::new().write(true).open("/dev/null")
}

/// Whether `path` currently names this open file.
pub fn is_same_file(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((ours.dev(), ours.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Volume and file number.
pub(super) fn file_identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// An existing path with links resolved and without a trailing slash.
pub(super) fn canonical(path: &Path) -> io::Result<PathBuf> {
    path.canonicalize()
}

/// Whether a path is in a directory, or is it.
pub fn is_below(path: &Path, directory: &Path) -> bool {
    path.starts_with(directory)
}

/// Whether two paths are the same directory, also through links or a second mount.
pub fn is_same_directory(one: &Path, other: &Path) -> bool {
    let number = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    number(one).is_some_and(|found| number(other) == Some(found))
}

/// Whether a link that [`replace_link`] created points to `target`, which need not exist.
pub fn points_to(link: &Path, target: &Path) -> io::Result<bool> {
    match fs::read_link(link) {
        Ok(named) => Ok(link.parent().unwrap_or(Path::new("")).join(named) == target),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Pid of a process that has the file open and locked. A process that inherited the lock counts too.
pub fn lock_holder(path: &Path) -> Option<u32> {
    let path = canonical(path).ok()?;
    let holds = |pid: u32| -> bool {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        descriptors.flatten().any(|descriptor| {
            let is_it = fs::read_link(descriptor.path()).is_ok_and(|named| named == path);
            let number = descriptor.file_name();
            let info = || fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy()));
            is_it && info().is_ok_and(|info| info.contains("lock:"))
        })
    };
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.into_iter().filter(|pid| *pid != std::process::id()).find(|pid| holds(*pid))
}

/// Makes `link` point to `target` (relative or absolute, written as given). Replaces an existing link atomically.
pub fn replace_link(target: &Path, link: &Path) -> io::Result<()> {
    let temporary = link.with_file_name(format!("{}{}", temporary_prefix(), fastrand::u64(..)));
    std::os::unix::fs::symlink(target, &temporary)?;
    fs::rename(&temporary, link).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Tests whether `path` can be renamed on its file system, without renaming it: the target `blocker` is a directory that is not empty, so
/// the rename always fails. An earlier failure gives the reason (rename(2)): a mount point, a directory of an overlay's lower layer, an
/// immutable file, a read-only file system.
pub fn can_rename(path: &Path, blocker: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    match fs::rename(path, blocker) {
        Ok(()) => Err(io::Error::other(format!(
            "a check of whether it can be renamed moved it to {}; rename it back",
            blocker.display()
        ))),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOTEMPTY | Errno::EXIST | Errno::ISDIR) => Ok(()),
            _ => Err(error),
        },
    }
}

/// Whether the process has root's privileges.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

// --- Termination

/// Receives the signals that request termination: TERM and INT.
#[derive(Debug)]
pub struct Termination {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Termination {
    /// Needs a runtime. From here on, these signals no longer end the process.
    pub fn new() -> io::Result<Termination> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Termination { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Resolves when a signal is received. Cancel-safe.
    pub async fn recv(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// Receives the signal that requests a reload: HUP.
#[cfg(feature = "gateway")]
#[derive(Debug)]
pub struct Reload(tokio::signal::unix::Signal);

#[cfg(feature = "gateway")]
impl Reload {
    /// Needs a runtime. From here on, this signal no longer ends the process.
    pub fn new() -> io::Result<Reload> {
        Ok(Reload(tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?))
    }

    /// Resolves when the signal is received. Cancel-safe.
    pub async fn recv(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Runs this process as a helper if it was started as one. Unix needs none to send signals.
pub fn errand() -> Option<std::process::ExitCode> {
    None
}

// --- The service manager's notifications

/// Nothing to do: a signal asks a process to exit.
pub fn on_exit_request(_handler: impl FnOnce() + Send + 'static) -> io::Result<()> {
    Ok(())
}

/// Notifies systemd, where `NOTIFY_SOCKET` is set (sd_notify(3)).
pub fn notify(notice: Notification) {
    let state = match notice {
        Notification::Ready => sd_notify::NotifyState::Ready,
        Notification::Stopping => sd_notify::NotifyState::Stopping,
        Notification::Alive => sd_notify::NotifyState::Watchdog,
    };
    let _ = sd_notify::notify(&[state]);
}

// --- The active release of a sub-agent

/// The version that `current` points to; `None`: the link does not exist.
pub fn read_current(link: &Path) -> io::Result<Option<String>> {
    match fs::read_link(link) {
        Ok(target) => Ok(target.to_str().map(str::to_owned)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Points `current` to a version, atomically.
pub fn write_current(link: &Path, version: &str) -> io::Result<()> {
    replace_link(Path::new(version), link)?;
    link.parent().map_or(Ok(()), sync_directory)
}

// --- Packages

/// Free space for this process on the file system of `directory`, bytes.
pub fn free_space(directory: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(directory)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Opens a file that only its owner can read and write, and creates it if it does not exist. Anything else at that path is removed first: a
/// link, another user's file, or a file that others may have open.
pub fn open_private(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    let is_private = |file: &File| -> io::Result<bool> {
        let found = file.metadata()?;
        let owner = rustix::process::geteuid().as_raw();
        Ok(found.is_file() && found.uid() == owner && found.mode() & 0o077 == 0 && found.nlink() == 1)
    };
    for _ in 0..10 {
        match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made,
        }
        match options.open(path) {
            Ok(file) if is_private(&file)? => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            _ => fs::remove_file(path)?,
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Creates a symbolic link with exactly this target. Fails if the path exists.
pub fn make_symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Makes a file's content survive a power cut.
pub fn sync_file(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes everything in a directory survive a power cut, with one call for its whole file system instead of one per file.
pub fn sync_tree(directory: &Path) -> io::Result<()> {
    let opened = File::open(directory)?;
    #[cfg(target_os = "linux")]
    return Ok(rustix::fs::syncfs(&opened)?);
    #[cfg(not(target_os = "linux"))]
    {
        rustix::fs::sync();
        opened.sync_all()
    }
}

/// Creates a file with these permission bits, less the umask. Fails if it exists.
pub fn create_file(path: &Path, mode: u32) -> io::Result<File> {
    fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)
}

/// Creates a directory with these permission bits, less the umask. Fails if it exists.
pub fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().mode(mode).create(path)
}

/// Whether a file has exactly these permission bits.
pub fn has_mode(metadata: &fs::Metadata, mode: u32) -> bool {
    metadata.mode() & 0o7777 == mode
}

/// A file's permission bits.
#[cfg(test)]
pub fn mode(path: &Path) -> io::Result<u32> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o7777)
}

// --- Files and limits for the gateway

/// Whether any execute bit is set.
pub fn has_execute_bit(metadata: &fs::Metadata) -> bool {
    metadata.mode() & 0o111 != 0
}

/// Whether group or others can read the file.
pub fn is_readable_by_others(metadata: &fs::Metadata) -> bool {
    metadata.mode() & 0o044 != 0
}

/// Inode number: a different number under the same name means a different file.
#[cfg(feature = "gateway")]
pub fn file_number(metadata: &fs::Metadata) -> u64 {
    metadata.ino()
}

/// Raises the soft limit of open files to the hard limit, and returns it.
#[cfg(feature = "gateway")]
pub fn raise_open_files() -> io::Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    }
    Ok(maximum.unwrap_or(u64::MAX))
}

// --- Installation

/// The default home.
pub fn default_home() -> PathBuf {
    PathBuf::from("/opt/aops")
}

/// Whether a file is executable, by its mode.
pub fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && has_execute_bit(&metadata))
}

/// Replaces the executable `path` by `new` with a rename. Also works while `path` runs.
pub fn replace_executable(new: &Path, path: &Path) -> io::Result<()> {
    fs::rename(new, path)
}

/// Whether asking a process to exit also asks the processes that it has started.
pub const SIGNALS_REACH_CHILDREN: bool = false;

/// The user who may do everything on this host, for messages.
pub const ADMINISTRATOR: &str = "root";

/// An example of how to start a home at boot without a service manager.
pub const START_AT_BOOT: &str = "a line `@reboot {control} start` in a crontab";

/// The link to the executable for all users; for the default home only.
pub const COMMAND_LINK: Option<&str> = Some("/usr/local/bin/aops");

/// The file of a program.
pub fn find_program(path: PathBuf) -> PathBuf {
    path
}

/// Nothing to do: a new directory has the mode that it was created with.
pub fn protect_new_home(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Whether every link to a file follows when the file is replaced.
pub const LINKS_FOLLOW: bool = true;

/// Renames a file over another one.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)
}

/// Runs an operation on files once: a file that is in use can be renamed and replaced.
pub fn while_in_use<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    attempt()
}

/// Nothing to do: a replacement is a single rename.
pub fn complete_replacements(_directory: &Path) -> io::Result<()> {
    Ok(())
}

/// There are none.
pub fn remove_replaced(_directory: &Path) {}

/// Nothing to do: a running executable can be removed.
pub fn leave_directory(_directory: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn opening_a_pipe_or_a_device_fails_without_blocking() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        make_symlink(&at("pipe"), &at("link")).unwrap();
        make_symlink(Path::new("/dev/zero"), &at("device")).unwrap();
        fs::create_dir(at("directory")).unwrap();
        for name in ["pipe", "link", "device", "directory"] {
            let (path, (sender, receiver)) = (at(name), std::sync::mpsc::channel());
            // A thread that waits for the other end of the pipe exits with the tests.
            std::thread::spawn(move || sender.send(crate::store::read(&path, 100)));
            let read = receiver.recv_timeout(crate::platform::testing::PATIENCE).expect("it is read at once");
            let error = format!("{:#}", read.unwrap_err());
            assert!(error.contains(&format!("{name}: it is not a file")), "{error}");
        }
        assert_eq!(crate::store::read(&at("nothing"), 100).unwrap(), None);
        fs::write(at("file"), [b'x'; 100]).unwrap();
        assert_eq!(crate::store::read(&at("file"), 100).unwrap().unwrap().len(), 100);
        assert!(
            crate::store::read(&at("file"), 99).unwrap_err().root_cause().to_string().contains("more than 99 bytes")
        );
    }

    #[test]
    fn a_rename_is_tested_without_renaming() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("blocker/full")).unwrap();
        fs::create_dir_all(at("directory/full")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        fs::write(at("file"), "").unwrap();
        make_symlink(Path::new("nowhere"), &at("link")).unwrap();
        for name in ["directory", "empty", "file", "link"] {
            can_rename(&at(name), &at("blocker")).unwrap();
            assert!(at(name).symlink_metadata().is_ok(), "{name}");
        }
        assert!(can_rename(&at("nothing"), &at("blocker")).is_err());
        // A mount point of another file system.
        assert!(can_rename(Path::new("/proc"), &at("blocker")).is_err());
    }

    #[test]
    fn a_file_that_is_not_private_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("a"), directory.path().join("b"));
        let length = || open_private(&path).unwrap().metadata().unwrap().len();
        open_private(&path).unwrap().write_all(b"mine").unwrap();
        assert_eq!((mode(&path).unwrap(), length()), (0o600, 4));

        // Others may have it open for writing.
        set_mode(&path, 0o620).unwrap();
        assert_eq!((length(), mode(&path).unwrap()), (0, 0o600));
        // A second hard link.
        fs::write(&other, "other").unwrap();
        set_mode(&other, 0o600).unwrap();
        fs::remove_file(&path).unwrap();
        fs::hard_link(&other, &path).unwrap();
        assert_eq!(length(), 0);
        // A symbolic link.
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        open_private(&path).unwrap().write_all(b"not there").unwrap();
        assert_eq!(fs::read(&other).unwrap(), b"other");
        // A directory.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(open_private(&path).is_err());
    }
}
