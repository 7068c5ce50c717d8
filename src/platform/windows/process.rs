//! Lists processes, finds the sub-agent that each belongs to, and waits for their exit.
//!
//! A process is identified permanently by its pid and its creation time, which is absolute, so boots need not be distinguished. The
//! processes of a sub-agent are found by its group, and without one by descent and by their executables.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::os::windows::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child as StdChild, Command, ExitStatus};
use std::sync::OnceLock;
use std::time::Duration;

use windows_sys::Wdk::System::SystemInformation::{NtQuerySystemInformation, SystemProcessInformation};
use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, FILETIME, HANDLE, HANDLE_FLAG_INHERIT, STATUS_INFO_LENGTH_MISMATCH, STILL_ACTIVE,
    SetHandleInformation, WAIT_OBJECT_0, WAIT_TIMEOUT,
};
use windows_sys::Win32::System::Console::{GetStdHandle, STD_ERROR_HANDLE, STD_INPUT_HANDLE, STD_OUTPUT_HANDLE};
use windows_sys::Win32::System::ProcessStatus::{GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS_EX};
use windows_sys::Win32::System::SystemInformation::{GetSystemTimeAsFileTime, GetTickCount64};
use windows_sys::Win32::System::Threading::{
    CREATE_BREAKAWAY_FROM_JOB, CREATE_DEFAULT_ERROR_MODE, CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW,
    GetExitCodeProcess, GetProcessTimes, NORMAL_PRIORITY_CLASS, OpenProcess, PROCESS_QUERY_LIMITED_INFORMATION,
    PROCESS_SYNCHRONIZE, QueryFullProcessImageNameW, WaitForSingleObject,
};
use windows_sys::Win32::System::WindowsProgramming::SYSTEM_PROCESS_INFORMATION;

use super::watch;
use crate::platform::{ProcessInfo, ProcessMarker};

pub(super) fn open(pid: u32, access: u32) -> io::Result<OwnedHandle> {
    // SAFETY: no pointer is passed; a handle that is not null is ours to close.
    let handle = unsafe { OpenProcess(access, 0, pid) };
    if handle.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedHandle::from_raw_handle(handle) })
}

pub(super) fn raw(handle: &OwnedHandle) -> HANDLE {
    handle.as_raw_handle()
}

fn joined(time: FILETIME) -> u64 {
    u64::from(time.dwHighDateTime) << 32 | u64::from(time.dwLowDateTime)
}

pub(super) fn creation_time(process: &OwnedHandle) -> Option<u64> {
    let zero = FILETIME { dwLowDateTime: 0, dwHighDateTime: 0 };
    let (mut created, mut exited, mut kernel, mut user) = (zero, zero, zero, zero);
    // SAFETY: the handle is open, and the four results outlive the call.
    let done = unsafe { GetProcessTimes(raw(process), &mut created, &mut exited, &mut kernel, &mut user) };
    (done != 0).then(|| joined(created))
}

/// Whether a process has not exited. An exit code alone does not tell: a program may exit with the code that means "still active".
pub(super) fn is_running(process: &OwnedHandle) -> bool {
    let mut code = 0;
    // SAFETY: the handle is open, and the result outlives the call.
    unsafe {
        match WaitForSingleObject(raw(process), 0) {
            WAIT_TIMEOUT => true,
            WAIT_OBJECT_0 => false,
            // The handle does not allow to wait.
            _ => GetExitCodeProcess(raw(process), &mut code) != 0 && code == STILL_ACTIVE as u32,
        }
    }
}

/// Creation time of a live process; `None`: no process has this pid.
pub fn start_time(pid: u32) -> Option<u64> {
    let access = PROCESS_QUERY_LIMITED_INFORMATION;
    // Some processes of the system may be queried, but not waited for.
    let process = open(pid, access | PROCESS_SYNCHRONIZE).or_else(|_| open(pid, access)).ok()?;
    if is_running(&process) { creation_time(&process) } else { None }
}

/// Whether the process is alive.
pub fn is_alive(pid: u32, start_time: u64) -> bool {
    self::start_time(pid) == Some(start_time)
}

/// A constant: creation times are absolute, so boots need not be distinguished.
pub fn boot_id() -> String {
    "windows".to_owned()
}

/// Time since boot.
pub fn uptime() -> Option<Duration> {
    // SAFETY: takes and returns integers.
    Some(Duration::from_millis(unsafe { GetTickCount64() }))
}

/// Time since a process was created.
pub fn age(start_time: u64) -> Option<Duration> {
    let mut now = FILETIME { dwLowDateTime: 0, dwHighDateTime: 0 };
    // SAFETY: the result outlives the call.
    unsafe { GetSystemTimeAsFileTime(&mut now) };
    Some(Duration::from_nanos(joined(now).saturating_sub(start_time).saturating_mul(100)))
}

/// The private memory of a process, bytes: without the pages of its program, which the system can drop and read again.
pub fn memory_bytes(pid: u32) -> Option<u64> {
    let process = open(pid, PROCESS_QUERY_LIMITED_INFORMATION).ok()?;
    // SAFETY: a structure of integers, for which all zero is valid.
    let mut counters: PROCESS_MEMORY_COUNTERS_EX = unsafe { std::mem::zeroed() };
    let size = size_of::<PROCESS_MEMORY_COUNTERS_EX>() as u32;
    // SAFETY: the handle is open, and the result, which begins like the shorter structure, has the given size.
    let done = unsafe { GetProcessMemoryInfo(raw(&process), (&raw mut counters).cast(), size) };
    (done != 0 && counters.PrivateUsage != 0).then_some(counters.PrivateUsage as u64)
}

/// The working directory of a process: not available on Windows.
pub fn working_directory(_pid: u32) -> Option<PathBuf> {
    None
}

/// The executable of this process, opened when it started: later another file may have its name.
static OWN_PROGRAM: OnceLock<std::fs::File> = OnceLock::new();

/// To be called first: keeps the own executable open, and keeps our standard streams from the programs that we start. A role that had
/// its caller's pipe would leave the caller waiting for the pipe's end.
pub fn begin() {
    for stream in [STD_INPUT_HANDLE, STD_OUTPUT_HANDLE, STD_ERROR_HANDLE] {
        // SAFETY: takes integers; a stream that does not exist is an error of the second call.
        unsafe { SetHandleInformation(GetStdHandle(stream), HANDLE_FLAG_INHERIT, 0) };
    }
    if let Ok(file) = std::env::current_exe().and_then(std::fs::File::open) {
        let _ = OWN_PROGRAM.set(file);
    }
}

/// Opens the executable of a process. A file that was replaced since the process started may be found instead.
pub fn program_of(pid: u32) -> io::Result<std::fs::File> {
    if pid == std::process::id()
        && let Some(own) = OWN_PROGRAM.get()
    {
        let mut file = own.try_clone()?;
        io::Seek::rewind(&mut file)?;
        return Ok(file);
    }
    let path = executable_of(pid).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    std::fs::File::open(path)
}

/// Replaces this process with another program: starts it and exits. Returns only on failure.
pub fn become_program(command: &mut std::process::Command) -> io::Error {
    match command.spawn() {
        Ok(_) => std::process::exit(0),
        Err(error) => error,
    }
}

/// The executable of a process, if readable.
pub fn executable_of(pid: u32) -> Option<PathBuf> {
    use std::os::windows::ffi::OsStringExt;
    let process = open(pid, PROCESS_QUERY_LIMITED_INFORMATION).ok()?;
    let mut text = vec![0_u16; 32_768];
    let mut length = text.len() as u32;
    // SAFETY: the handle is open, and the buffer has the given length.
    let done = unsafe { QueryFullProcessImageNameW(raw(&process), 0, text.as_mut_ptr(), &mut length) };
    (done != 0).then(|| std::ffi::OsString::from_wide(&text[..length as usize]).into())
}

/// Always false: Windows has no zombies.
pub fn is_zombie(_pid: u32) -> bool {
    false
}

/// The first words of a process's command line: on Windows only the executable is available.
pub fn first_words(pid: u32, count: usize) -> Vec<PathBuf> {
    executable_of(pid).into_iter().take(count).collect()
}

struct ProcessEntry {
    pid: u32,
    parent: u32,
    start_time: u64,
    ours: bool,
}

/// Every process of the host that is visible to us, with the markers of those that belong to the home. The environment of another process
/// cannot be read, so the marker comes from its executable.
pub fn processes(home: &Path) -> Vec<ProcessInfo> {
    let entries = snapshot();
    let others = entries.iter().filter(|entry| entry.pid != std::process::id());
    others.map(|entry| info_among(&entries, entry, home)).collect()
}

fn info_among(entries: &[ProcessEntry], entry: &ProcessEntry, home: &Path) -> ProcessInfo {
    let (mut root, mut at) = (entry.pid, entry);
    // A pid may have been reused: a parent is not younger than its child.
    while let Some(parent) = entries.iter().find(|parent| {
        parent.pid == at.parent && !parent.ours && parent.start_time <= at.start_time && parent.pid != at.pid
    }) {
        root = parent.pid;
        at = parent;
    }
    let marker = executable_of(entry.pid).and_then(|executable| marker_of(&executable, home));
    ProcessInfo { pid: entry.pid, start_time: entry.start_time, session: root, parent: entry.parent, marker }
}

/// One live process, with its marker if it belongs to the home.
pub fn process_info(pid: u32, home: &Path) -> Option<ProcessInfo> {
    let entries = snapshot();
    entries.iter().find(|entry| entry.pid == pid).map(|entry| info_among(&entries, entry, home))
}

/// The executable of a release is below `agents/<name>/<version>` of the home.
fn marker_of(executable: &Path, home: &Path) -> Option<ProcessMarker> {
    let plain = |path: &Path| PathBuf::from(path.to_string_lossy().trim_start_matches(r"\\?\").to_owned());
    let (executable, agents) = (plain(executable), plain(&home.join("agents")));
    if !super::is_below(&executable, &agents) {
        return None;
    }
    let mut rest = executable.iter().skip(agents.iter().count());
    let mut text = || Some(rest.next()?.to_str()?.to_owned());
    let (name, version, _file) = (text()?, text()?, text()?);
    Some(ProcessMarker { name, version, main_only: false, is_check: false })
}

/// The parent of a process, if it still runs. A younger process has a reused pid.
pub(super) fn parent(pid: u32) -> Option<u32> {
    let entries = snapshot();
    let child = entries.iter().find(|entry| entry.pid == pid)?;
    let parent = entries.iter().find(|entry| entry.pid == child.parent && entry.start_time <= child.start_time)?;
    Some(parent.pid)
}

/// The processes of the host, without opening one.
fn snapshot() -> Vec<ProcessEntry> {
    const FIRST_ROOM: usize = 256 << 10;
    const MAX_ROOM: usize = 64 << 20;
    let mut buffer: Vec<u64> = vec![0; FIRST_ROOM / size_of::<u64>()];
    loop {
        let length = size_of_val(buffer.as_slice());
        let mut needed = 0;
        // SAFETY: the buffer has the given length, and the result outlives the call.
        let status = unsafe {
            let room = buffer.as_mut_ptr().cast();
            NtQuerySystemInformation(SystemProcessInformation, room, length as u32, &mut needed)
        };
        match status {
            0 => return entries_in(&buffer),
            STATUS_INFO_LENGTH_MISMATCH if length < MAX_ROOM => buffer.resize(buffer.len() * 2, 0),
            _ => return vec![],
        }
    }
}

/// The entries that the system has written into a buffer.
fn entries_in(buffer: &[u64]) -> Vec<ProcessEntry> {
    // The creation time, which the binding leaves in its reserved bytes.
    const CREATED: usize = 24;
    let mut entries = vec![];
    let mut offset = 0;
    loop {
        // SAFETY: the offset is that of an entry in the buffer, perhaps not aligned for it; the text of its name is in the buffer, too.
        let (entry, name) = unsafe {
            let entry = buffer.as_ptr().byte_add(offset).cast::<SYSTEM_PROCESS_INFORMATION>().read_unaligned();
            let name = match entry.ImageName.Buffer.is_null() {
                true => &[],
                false => std::slice::from_raw_parts(entry.ImageName.Buffer, usize::from(entry.ImageName.Length) / 2),
            };
            (entry, String::from_utf16_lossy(name).to_ascii_lowercase())
        };
        let mut created = [0; 8];
        created.copy_from_slice(&entry.Reserved1[CREATED..CREATED + 8]);
        // The system's idle process has no number. A process without threads has exited, and somebody has a handle to it.
        if !entry.UniqueProcessId.is_null() && entry.NumberOfThreads > 0 {
            entries.push(ProcessEntry {
                pid: entry.UniqueProcessId as usize as u32,
                parent: entry.Reserved2 as usize as u32,
                start_time: u64::from_le_bytes(created),
                ours: name.starts_with("aops"),
            });
        }
        if entry.NextEntryOffset == 0 {
            return entries;
        }
        offset += entry.NextEntryOffset as usize;
    }
}

/// Resolves when a process, not necessarily our child, has exited. Cancel-safe.
pub async fn ended(pid: u32, start_time: u64) {
    let Ok(process) = open(pid, PROCESS_SYNCHRONIZE | PROCESS_QUERY_LIMITED_INFORMATION) else { return };
    // The pid is not reused while the handle is open.
    if creation_time(&process) == Some(start_time) {
        let _ = watch::signalled(&process).await;
    }
}

/// Describes the exit of a child.
pub fn describe_exit(status: ExitStatus) -> String {
    match status.code().map(|code| code as u32) {
        Some(code) if code >= FIRST_SYSTEM_CODE => {
            let meaning = CRASHES.iter().find(|(known, _)| *known == code).map_or("", |(_, meaning)| meaning);
            let shown = if meaning.is_empty() { String::new() } else { format!(" ({meaning})") };
            format!("exited with {code:#010X}{shown}")
        }
        Some(code) => format!("exited with {code}"),
        None => "ended".to_owned(),
    }
}

/// Exit codes from here on are those of the system.
const FIRST_SYSTEM_CODE: u32 = 0x8000_0000;
/// What the system ended a program for (ntstatus.h).
const CRASHES: &[(u32, &str)] = &[
    (0xC000_0005, "access violation"),
    (0xC000_0017, "out of memory"),
    (0xC000_001D, "illegal instruction"),
    (0xC000_0094, "integer division by zero"),
    (0xC000_00FD, "stack overflow"),
    (0xC000_0135, "a library was not found"),
    (0xC000_0139, "a library lacks a function"),
    (0xC000_013A, "ended by Ctrl-C or Ctrl-Break"),
    (0xC000_0142, "a library could not be initialized"),
    (0xC000_0374, "heap corruption"),
    (0xC000_0409, "aborted: a check of the program failed"),
    (0xE06D_7363, "an unhandled C++ exception"),
];

/// The user that a sub-agent runs as: on Windows always the manager's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {}

/// Always an error: running as another user needs its password.
pub fn find_user(_name: &str) -> io::Result<User> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "running as another user is not supported on Windows yet; remove `user` from agent.toml",
    ))
}

/// Creation flags of a process that is independent of its caller: it receives no keys from the caller's console, outlives it, and inherits
/// neither its priority nor its error mode.
pub(super) const DETACHED_FLAGS: u32 =
    CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW | CREATE_DEFAULT_ERROR_MODE | NORMAL_PRIORITY_CLASS;

/// Makes a command independent of its starter: it outlives us and our console, and inherits only the environment, directory and standard
/// streams that the command specifies, and the CPU affinity.
pub fn detach_from_caller(command: &mut Command) {
    command.creation_flags(DETACHED_FLAGS);
}

/// The same; running as another user is not supported yet.
pub fn detach_from_caller_as(command: &mut Command, user: Option<User>) -> io::Result<()> {
    if user.is_some() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "running as another user is not supported on Windows yet",
        ));
    }
    detach_from_caller(command);
    Ok(())
}

/// A process and its descendants, by pid and start time. A descendant whose own parent has exited is not found.
pub(super) fn tree_of(root: u32) -> Vec<(u32, u64)> {
    let entries = snapshot();
    let mut tree: Vec<&ProcessEntry> = entries.iter().filter(|entry| entry.pid == root).collect();
    loop {
        let is_child = |entry: &&ProcessEntry| {
            // A pid may have been reused: a parent is not younger than its child.
            let is_of = |parent: &&ProcessEntry| parent.pid == entry.parent && parent.start_time <= entry.start_time;
            tree.iter().any(is_of) && !tree.iter().any(|known| known.pid == entry.pid)
        };
        let more: Vec<&ProcessEntry> = entries.iter().filter(is_child).collect();
        if more.is_empty() {
            return tree.iter().map(|entry| (entry.pid, entry.start_time)).collect();
        }
        tree.extend(more);
    }
}

/// Whether an operation failed because this host or this process is out of a resource, independent of the operation.
pub fn is_shortage(error: &io::Error) -> bool {
    use windows_sys::Win32::Foundation::{
        ERROR_COMMITMENT_LIMIT, ERROR_NO_SYSTEM_RESOURCES, ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY,
        ERROR_TOO_MANY_OPEN_FILES,
    };
    // Of sockets: WSAEMFILE, WSAEADDRNOTAVAIL and WSAENOBUFS.
    const OF_SOCKETS: [u32; 3] = [10_024, 10_049, 10_055];
    let shortages = [
        ERROR_COMMITMENT_LIMIT,
        ERROR_NO_SYSTEM_RESOURCES,
        ERROR_NOT_ENOUGH_MEMORY,
        ERROR_OUTOFMEMORY,
        ERROR_TOO_MANY_OPEN_FILES,
    ];
    error.raw_os_error().is_some_and(|code| shortages.contains(&(code as u32)) || OF_SOCKETS.contains(&(code as u32)))
}

/// Always false: without fork, no child of ours can hold the executable open for writing.
pub fn is_busy_text(_error: &io::Error) -> bool {
    false
}

/// The basic environment variables of every program.
pub fn base_environment(_user: Option<&User>) -> Vec<(String, String)> {
    const NAMES: &[&str] = &[
        "SystemRoot",
        "SystemDrive",
        "windir",
        "ComSpec",
        "PATH",
        "PATHEXT",
        "TEMP",
        "TMP",
        "ProgramFiles",
        "ProgramFiles(x86)",
        "ProgramData",
        "NUMBER_OF_PROCESSORS",
        "PROCESSOR_ARCHITECTURE",
        "USERPROFILE",
        "USERNAME",
        "APPDATA",
        "LOCALAPPDATA",
        "ALLUSERSPROFILE",
        "ProgramW6432",
        "CommonProgramFiles",
        "CommonProgramFiles(x86)",
        "PSModulePath",
        "COMPUTERNAME",
    ];
    NAMES.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))).collect()
}

/// Starts a detached command outside of this process's job, if it is in one: that of a sub-agent, or of a remote session, which may end with
/// it. A job may forbid that; an outer one then keeps what an inner one lets go. Roles have no groups of their own.
pub fn spawn_outside_groups(command: &mut Command, _key: &str) -> io::Result<StdChild> {
    match command.creation_flags(DETACHED_FLAGS | CREATE_BREAKAWAY_FROM_JOB).spawn() {
        Err(error) if error.raw_os_error() == Some(ERROR_ACCESS_DENIED as i32) => {
            let child = command.creation_flags(DETACHED_FLAGS).spawn()?;
            tracing::warn!(pid = child.id(), "what was started is in the job of its caller, and may end with that one");
            Ok(child)
        }
        outcome => outcome,
    }
}

/// See [`spawn_outside_groups`].
pub fn remove_role_groups(_key: &str) {}

/// Windows has no zombies.
pub fn adopt_orphans() -> io::Result<()> {
    Ok(())
}

/// Windows has no zombies.
pub fn reap_orphans(_known: &[u32]) -> Vec<u32> {
    vec![]
}

/// Windows has no zombies.
pub fn reap_orphan(_pid: u32) -> bool {
    true
}

/// Windows has no zombies.
pub fn children() -> Vec<u32> {
    vec![]
}

#[cfg(test)]
mod tests {
    use windows_sys::Win32::System::Threading::CREATE_SUSPENDED;

    use super::super::signal;
    use super::*;
    use crate::core::manifest::StopSignal;

    #[test]
    fn a_program_of_a_release_has_its_marker() {
        let home = Path::new(r"C:\Program Files\aops");
        let of = |path: &str| marker_of(Path::new(path), home).map(|marker| (marker.name, marker.version));
        let marked = Some(("Echo".to_owned(), "1.2".to_owned()));
        assert_eq!(of(r"C:\Program Files\aops\agents\Echo\1.2\echo.exe"), marked);
        assert_eq!(of(r"\\?\c:\program files\AOPS\Agents\Echo\1.2\bin\echo.exe"), marked);
        assert_eq!(of(r"C:\Program Files\aops\agents\Echo\1.2"), None);
        assert_eq!(of(r"C:\Program Files\aops\bin\aops.exe"), None);
        assert_eq!(of(r"C:\Program Files\aops\agents.old\Echo\1.2\echo.exe"), None);
    }

    /// Left behind by a manager that exits after creating it and before adding it to its group.
    #[test]
    fn a_suspended_program_is_found_by_its_executable_and_killed() {
        let home = tempfile::tempdir().unwrap();
        let program = home.path().join(r"agents\Echo\1.2\echo.exe");
        std::fs::create_dir_all(program.parent().unwrap()).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let mut child = Command::new(&program).creation_flags(CREATE_SUSPENDED).spawn().unwrap();
        let found: Vec<ProcessInfo> =
            processes(home.path()).into_iter().filter(|process| process.marker.is_some()).collect();
        assert_eq!(found.iter().map(|process| process.pid).collect::<Vec<_>>(), [child.id()]);
        assert_eq!(found[0].marker.as_ref().unwrap().name, "Echo");
        assert!(signal(found[0].pid, found[0].start_time, StopSignal::Kill).unwrap());
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn an_exit_is_described_in_the_terms_of_the_system() {
        use std::os::windows::process::ExitStatusExt;
        for (code, expected) in [
            (3, "exited with 3"),
            (0xC000_0005, "exited with 0xC0000005 (access violation)"),
            (0xC000_0123, "exited with 0xC0000123"),
        ] {
            assert_eq!(describe_exit(ExitStatus::from_raw(code)), expected);
        }
    }

    #[test]
    fn the_own_process_has_an_executable_and_an_age() {
        let own = std::process::id();
        assert_eq!(executable_of(own).unwrap().file_name(), std::env::current_exe().unwrap().file_name());
        assert!(age(start_time(own).unwrap()).unwrap() < Duration::from_secs(3600));
        // Wine 8 does not count private memory.
        assert_ne!(memory_bytes(own), Some(0));
    }
}
