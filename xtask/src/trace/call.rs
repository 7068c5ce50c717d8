//! One system call of a traced process, with the paths that it changes.

use std::fs::File;
use std::os::raw::{c_long, c_ulong};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use nix::libc;
use nix::unistd::Pid;

use super::syscalls::{Kind, Place};

/// A call that changes something, or that tells another thread or process.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// Which part of aops makes it: `spm`, `spa`, `install`, `spa --prove`, `spm's child`.
    pub(crate) role: String,
    pub(crate) process: i32,
    pub(crate) thread: i32,
    /// The system call's name.
    pub(crate) name: &'static str,
    pub(crate) change: Change,
}

/// What a call changes. Paths are absolute; that of a descriptor is the file's path at the time of the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Opens a file that may be written. `creates`: it does not exist before the call.
    Open {
        path: PathBuf,
        creates: bool,
        truncates: bool,
    },
    /// Creates a directory.
    Directory(PathBuf),
    /// Removes a name.
    Remove(PathBuf),
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Link {
        from: PathBuf,
        to: PathBuf,
    },
    /// The target as it is written.
    SymbolicLink {
        target: PathBuf,
        to: PathBuf,
    },
    /// Changes mode, owner, size, times or attributes of a path.
    Metadata(PathBuf),
    /// Changes content or metadata through a descriptor.
    Write(PathBuf),
    Sync(PathBuf),
    /// Syncs the file system that this file is on.
    SyncFileSystem(PathBuf),
    /// Waits for an exclusive lock, or tries to take it.
    Lock(PathBuf),
    /// Writes to a socket, a pipe or an eventfd.
    Message(String),
    /// Waits for another thread.
    Wait,
    /// Creates a process.
    Start,
    Execute(PathBuf),
    /// A negative number is a process group.
    Signal {
        process: i32,
        signal: i32,
    },
    /// The process exits.
    Exit,
}

impl Call {
    /// What the call changes as one text: the path of what it names, or a word for a process. `None`: nothing that lasts.
    pub(crate) fn subject(&self) -> Option<String> {
        let path = match &self.change {
            Change::Open { path, .. }
            | Change::Directory(path)
            | Change::Remove(path)
            | Change::Rename { to: path, .. }
            | Change::Link { to: path, .. }
            | Change::SymbolicLink { to: path, .. }
            | Change::Metadata(path)
            | Change::Write(path)
            | Change::Sync(path)
            | Change::SyncFileSystem(path)
            | Change::Execute(path) => path,
            Change::Start => return Some("a process".to_owned()),
            Change::Signal { signal, .. } => return Some(format!("signal {signal}")),
            Change::Exit => return Some("the process".to_owned()),
            Change::Lock(_) | Change::Message(_) | Change::Wait => return None,
        };
        Some(path.display().to_string())
    }
}

/// What a call is about to change. `None` if it changes nothing outside the process.
pub(super) fn change(thread: Pid, kind: Kind, number: c_long, arguments: &[c_ulong; 6]) -> Option<Change> {
    let descriptor = |index: usize| std::fs::read_link(format!("/proc/{thread}/fd/{}", arguments[index] as i32)).ok();
    let file = |index: usize| descriptor(index).filter(|path| path.is_absolute());
    let at = |place: Place| match place {
        Place::Path(index) => path(thread, None, arguments[index]),
        Place::At(index) => path(thread, Some(arguments[index]), arguments[index + 1]),
    };
    let opened = |path: PathBuf, flags: c_ulong| {
        let flags = flags as i32;
        let creates = flags & libc::O_CREAT != 0 && path.symlink_metadata().is_err();
        writes(flags).then_some(Change::Open { path, creates, truncates: flags & libc::O_TRUNC != 0 })
    };
    Some(match kind {
        Kind::Harmless => return None,
        Kind::Open => {
            let (directory, name, flags) = match number {
                libc::SYS_open => (None, arguments[0], arguments[1]),
                _ => (Some(arguments[0]), arguments[1], arguments[2]),
            };
            return writes(flags as i32).then(|| path(thread, directory, name)).and_then(|path| opened(path, flags));
        }
        Kind::Open2 => return opened(path(thread, Some(arguments[0]), arguments[1]), number_at(thread, arguments[2])?),
        Kind::Create(place) => {
            let path = at(place);
            let creates = path.symlink_metadata().is_err();
            Change::Open { path, creates, truncates: true }
        }
        Kind::Directory(place) => Change::Directory(at(place)),
        Kind::Remove(place) => Change::Remove(at(place)),
        Kind::Rename(from, to) => Change::Rename { from: at(from), to: at(to) },
        Kind::Link(from, to) => Change::Link { from: at(from), to: at(to) },
        Kind::SymbolicLink(target, to) => {
            Change::SymbolicLink { target: text_at(thread, arguments[target])?.into(), to: at(to) }
        }
        Kind::Metadata(place) => Change::Metadata(at(place)),
        Kind::Write(index) => match descriptor(index)? {
            path if path.is_absolute() => Change::Write(path),
            other => Change::Message(other.display().to_string()),
        },
        Kind::Sync(index) => Change::Sync(file(index)?),
        Kind::SyncFileSystem(index) => Change::SyncFileSystem(file(index)?),
        Kind::Lock(index) if arguments[index + 1] as i32 & libc::LOCK_EX != 0 => Change::Lock(file(index)?),
        Kind::Lock(_) => return None,
        Kind::Message(index) => Change::Message(descriptor(index)?.display().to_string()),
        Kind::Futex => {
            let operation = arguments[1] as i32 & !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME);
            return matches!(operation, libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET).then_some(Change::Wait);
        }
        Kind::Clone => return is_process(arguments[0]).then_some(Change::Start),
        Kind::Clone3 => return is_process(number_at(thread, arguments[0])?).then_some(Change::Start),
        Kind::Fork => Change::Start,
        Kind::Execute(index) => Change::Execute(path(thread, None, arguments[index])),
        Kind::Signal => {
            let signal = if number == libc::SYS_tgkill { arguments[2] } else { arguments[1] } as i32;
            let process = match number {
                libc::SYS_pidfd_send_signal => process_of(thread, arguments[0] as i32)?,
                _ => arguments[0] as i32,
            };
            // Signal 0 asks whether a process is there.
            return (signal != 0).then_some(Change::Signal { process, signal });
        }
        Kind::Exit => Change::Exit,
    })
}

/// The process behind a pidfd.
fn process_of(thread: Pid, descriptor: i32) -> Option<i32> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/fdinfo/{descriptor}")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Pid:")).and_then(|pid| pid.trim().parse().ok())
}

fn writes(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY || flags & (libc::O_CREAT | libc::O_TRUNC) != 0
}

fn is_process(flags: c_ulong) -> bool {
    flags & libc::CLONE_THREAD as c_ulong == 0
}

/// A path in a thread's memory, absolute.
fn path(thread: Pid, directory: Option<c_ulong>, address: c_ulong) -> PathBuf {
    let name = text_at(thread, address).unwrap_or_default();
    if name.starts_with('/') {
        return name.into();
    }
    let link = match directory.map(|descriptor| descriptor as i32) {
        None | Some(libc::AT_FDCWD) => format!("/proc/{thread}/cwd"),
        Some(descriptor) => format!("/proc/{thread}/fd/{descriptor}"),
    };
    std::fs::read_link(link).unwrap_or_default().join(name)
}

fn text_at(thread: Pid, address: c_ulong) -> Option<String> {
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = vec![0; libc::PATH_MAX as usize];
    let mut length = 0;
    // A path may end just before a page that is not there.
    while length < bytes.len() {
        let chunk = 256 - (address as usize + length) % 256;
        let end = (length + chunk).min(bytes.len());
        let read = memory.read_at(&mut bytes[length..end], address + length as u64).ok()?;
        if read == 0 {
            return None;
        }
        if let Some(end) = bytes[length..length + read].iter().position(|byte| *byte == 0) {
            return Some(String::from_utf8_lossy(&bytes[..length + end]).into_owned());
        }
        length += read;
    }
    None
}

fn number_at(thread: Pid, address: c_ulong) -> Option<c_ulong> {
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, address).ok()?;
    Some(c_ulong::from_ne_bytes(bytes))
}
