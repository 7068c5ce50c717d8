//! Processes: who is there, who belongs together, how one begins and how its end is seen.
//!
//! A process is named for good by its pid and its creation time, which is absolute, so that one boot needs no telling from another. Who
//! belongs to a sub-agent is told by its group, and where there is none by descent and by the file that a process runs.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::os::windows::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use windows_sys::Win32::Foundation::{FILETIME, HANDLE, INVALID_HANDLE_VALUE, STILL_ACTIVE};
use windows_sys::Win32::System::Diagnostics::ToolHelp::{
    CreateToolhelp32Snapshot, PROCESSENTRY32W, Process32FirstW, Process32NextW, TH32CS_SNAPPROCESS,
};
use windows_sys::Win32::System::ProcessStatus::{GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
use windows_sys::Win32::System::SystemInformation::{GetSystemTimeAsFileTime, GetTickCount64};
use windows_sys::Win32::System::Threading::{
    CREATE_DEFAULT_ERROR_MODE, CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW, GetExitCodeProcess, GetProcessTimes,
    NORMAL_PRIORITY_CLASS, OpenProcess, PROCESS_QUERY_LIMITED_INFORMATION, PROCESS_SYNCHRONIZE,
    QueryFullProcessImageNameW,
};

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

pub(super) fn is_running(process: &OwnedHandle) -> bool {
    let mut code = 0;
    // SAFETY: the handle is open, and the result outlives the call.
    unsafe { GetExitCodeProcess(raw(process), &mut code) != 0 && code == STILL_ACTIVE as u32 }
}

/// When a live process was created; `None`: there is none of that number.
pub fn start_time(pid: u32) -> Option<u64> {
    let process = open(pid, PROCESS_QUERY_LIMITED_INFORMATION).ok()?;
    if is_running(&process) { creation_time(&process) } else { None }
}

/// Whether that process lives.
pub fn lives(pid: u32, start_time: u64) -> bool {
    self::start_time(pid) == Some(start_time)
}

/// Creation times are absolute; there is nothing to tell boots apart for.
pub fn boot_id() -> String {
    "windows".to_owned()
}

/// How long the machine has been up.
pub fn uptime() -> Option<Duration> {
    // SAFETY: takes and gives plain numbers.
    Some(Duration::from_millis(unsafe { GetTickCount64() }))
}

/// How long a process has been running, from its creation time.
pub fn age(start_time: u64) -> Option<Duration> {
    let mut now = FILETIME { dwLowDateTime: 0, dwHighDateTime: 0 };
    // SAFETY: the result outlives the call.
    unsafe { GetSystemTimeAsFileTime(&mut now) };
    Some(Duration::from_nanos(joined(now).saturating_sub(start_time).saturating_mul(100)))
}

/// The working set of a process, bytes.
pub fn memory_bytes(pid: u32) -> Option<u64> {
    let process = open(pid, PROCESS_QUERY_LIMITED_INFORMATION).ok()?;
    // SAFETY: a structure of plain numbers, for which zeros are good values.
    let mut counters: PROCESS_MEMORY_COUNTERS = unsafe { std::mem::zeroed() };
    let size = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
    // SAFETY: the handle is open, and the result has the size that is told.
    let done = unsafe { GetProcessMemoryInfo(raw(&process), &mut counters, size) };
    (done != 0).then_some(counters.WorkingSetSize as u64)
}

/// Where a process works: Windows does not tell of others.
pub fn working_directory(_pid: u32) -> Option<PathBuf> {
    None
}

/// The program that a process runs.
pub fn program_of(pid: u32) -> io::Result<std::fs::File> {
    let path = executable_of(pid).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    std::fs::File::open(path)
}

/// Goes on as another program: that is started, and this process ends. Returns only where that fails.
pub fn become_program(command: &mut std::process::Command) -> io::Error {
    match command.spawn() {
        Ok(_) => std::process::exit(0),
        Err(error) => error,
    }
}

/// The executable that a process runs, where we may know it.
pub fn executable_of(pid: u32) -> Option<PathBuf> {
    use std::os::windows::ffi::OsStringExt;
    let process = open(pid, PROCESS_QUERY_LIMITED_INFORMATION).ok()?;
    let mut text = vec![0_u16; 32_768];
    let mut length = text.len() as u32;
    // SAFETY: the handle is open, and the buffer has the length that is told.
    let done = unsafe { QueryFullProcessImageNameW(raw(&process), 0, text.as_mut_ptr(), &mut length) };
    (done != 0).then(|| std::ffi::OsString::from_wide(&text[..length as usize]).into())
}

/// Whether an ended process can still be found by its number: nobody here asks by number alone.
pub fn remains(_pid: u32) -> bool {
    false
}

/// The first words of a process's command line: of another's no more than the executable is known.
pub fn first_words(pid: u32, count: usize) -> Vec<PathBuf> {
    executable_of(pid).into_iter().take(count).collect()
}

struct ProcessEntry {
    pid: u32,
    parent: u32,
    start_time: u64,
    ours: bool,
}

/// Every process of the host that we can see, with the marks of those that belong to the home: a variable of the environment, which tells
/// it on Unix, cannot be read, but the file that a process runs can.
pub fn processes(home: &Path) -> Vec<ProcessInfo> {
    let entries = snapshot();
    let others = entries.iter().filter(|entry| entry.pid != std::process::id());
    others.map(|entry| seen_among(&entries, entry, home)).collect()
}

fn seen_among(entries: &[ProcessEntry], entry: &ProcessEntry, home: &Path) -> ProcessInfo {
    let (mut root, mut at) = (entry.pid, entry);
    // A number may have been given anew: who is younger than its child is not its parent.
    while let Some(parent) = entries.iter().find(|parent| {
        parent.pid == at.parent && !parent.ours && parent.start_time <= at.start_time && parent.pid != at.pid
    }) {
        root = parent.pid;
        at = parent;
    }
    let mark = executable_of(entry.pid).and_then(|executable| mark_of(&executable, home));
    ProcessInfo { pid: entry.pid, start_time: entry.start_time, session: root, parent: entry.parent, mark }
}

/// One process, if it lives, with its mark if it belongs to the home.
pub fn seen(pid: u32, home: &Path) -> Option<ProcessInfo> {
    let entries = snapshot();
    entries.iter().find(|entry| entry.pid == pid).map(|entry| seen_among(&entries, entry, home))
}

/// A program of a release lies in `agents/<name>/<version>` of the home. File names that differ in case alone are one here.
fn mark_of(executable: &Path, home: &Path) -> Option<ProcessMarker> {
    let plain = |path: &Path| PathBuf::from(path.to_string_lossy().trim_start_matches(r"\\?\").to_owned());
    let folded = |path: &Path| PathBuf::from(path.to_string_lossy().to_lowercase());
    let (executable, agents) = (plain(executable), plain(&home.join("agents")));
    if !folded(&executable).starts_with(folded(&agents)) {
        return None;
    }
    let mut rest = executable.iter().skip(agents.iter().count());
    let mut text = || Some(rest.next()?.to_str()?.to_owned());
    let (name, version, _file) = (text()?, text()?, text()?);
    Some(ProcessMarker { name, version, main_only: false, is_check: false })
}

/// Which process started another, if it still runs: a number may have been given anew since, to somebody younger.
pub(super) fn parent(pid: u32) -> Option<u32> {
    let entries = snapshot();
    let child = entries.iter().find(|entry| entry.pid == pid)?;
    let parent = entries.iter().find(|entry| entry.pid == child.parent && entry.start_time <= child.start_time)?;
    Some(parent.pid)
}

fn snapshot() -> Vec<ProcessEntry> {
    // SAFETY: takes plain numbers; a valid handle is ours to close.
    let handle = unsafe { CreateToolhelp32Snapshot(TH32CS_SNAPPROCESS, 0) };
    if handle == INVALID_HANDLE_VALUE {
        return vec![];
    }
    // SAFETY: as above.
    let handle = unsafe { OwnedHandle::from_raw_handle(handle) };
    // SAFETY: a structure of plain numbers, for which zeros are good values.
    let mut entry: PROCESSENTRY32W = unsafe { std::mem::zeroed() };
    entry.dwSize = size_of::<PROCESSENTRY32W>() as u32;
    let mut entries = vec![];
    // SAFETY: the handle is open, and the entry says its own size.
    let mut more = unsafe { Process32FirstW(raw(&handle), &mut entry) };
    while more != 0 {
        let name = String::from_utf16_lossy(&entry.szExeFile).to_ascii_lowercase();
        if let Some(start_time) = start_time(entry.th32ProcessID) {
            let (pid, parent) = (entry.th32ProcessID, entry.th32ParentProcessID);
            entries.push(ProcessEntry { pid, parent, start_time, ours: name.starts_with("aops") });
        }
        // SAFETY: as above.
        more = unsafe { Process32NextW(raw(&handle), &mut entry) };
    }
    entries
}

/// Resolves when a process that need not be our child has ended. Cancel-safe.
pub async fn ended(pid: u32, start_time: u64) {
    let Ok(process) = open(pid, PROCESS_SYNCHRONIZE | PROCESS_QUERY_LIMITED_INFORMATION) else { return };
    // The number belongs to nobody else as long as the handle is open.
    if creation_time(&process) == Some(start_time) {
        let _ = watch::signalled(&process).await;
    }
}

/// How an ended child ended, in words.
pub fn how_it_ended(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exited with {code}"),
        None => "ended".to_owned(),
    }
}

/// Whom a sub-agent runs as: on Windows, whoever the manager runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {}

/// Another user's password is not known here.
pub fn find_user(name: &str) -> io::Result<User> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!("cannot run as {name:?}: another user is not supported on Windows yet"),
    ))
}

/// How a process begins that is to have nothing of its caller's: it hears of no key that is pressed in the caller's console, which it
/// outlives, and has neither its priority nor its way of showing errors.
pub(super) const LEAVING: u32 =
    CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW | CREATE_DEFAULT_ERROR_MODE | NORMAL_PRIORITY_CLASS;

/// Makes a command leave the caller: what it runs outlives us and our console, and nothing of who started us remains in it but the
/// environment, directory and standard streams that the command itself says, and the CPUs that it may run on.
pub fn leave_caller(command: &mut Command) {
    command.creation_flags(LEAVING);
}

/// The same; as another user, nothing can be run yet.
pub fn leave_caller_as(command: &mut Command, user: Option<User>) -> io::Result<()> {
    if user.is_some() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "cannot run as another user on Windows yet"));
    }
    leave_caller(command);
    Ok(())
}

/// Windows knows no groups of processes outside a job: what a check leaves behind is found by descent.
pub fn kill_group(_child: u32) {}

/// Whether something failed because this host, or this process, has no more of what it needs, whatever was to be done.
pub fn is_shortage(error: &io::Error) -> bool {
    use windows_sys::Win32::Foundation::{
        ERROR_COMMITMENT_LIMIT, ERROR_NO_SYSTEM_RESOURCES, ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY,
        ERROR_TOO_MANY_OPEN_FILES,
    };
    // WSAEMFILE, WSAEADDRNOTAVAIL and WSAENOBUFS, of sockets.
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

/// An executable that is open for writing cannot be started, and is not still held by a child of ours: there is no fork.
pub fn is_busy_text(_error: &io::Error) -> bool {
    false
}

/// The variables that any program expects.
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
        "COMPUTERNAME",
    ];
    NAMES.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))).collect()
}

/// Windows ends nobody with who started him, and roles have no groups there.
pub fn leave_groups(_command: &mut Command, _key: &str) {}

/// See [`leave_groups`].
pub fn remove_role_groups(_key: &str) {}

/// Windows has no zombies.
pub fn adopt_orphans() -> io::Result<()> {
    Ok(())
}

/// There are none.
pub fn reap_orphans(_known: &[u32]) -> Vec<u32> {
    vec![]
}

/// There are none.
pub fn reap_orphan(_pid: u32) {}

#[cfg(test)]
mod tests {
    use windows_sys::Win32::System::Threading::CREATE_SUSPENDED;

    use super::super::signal;
    use super::*;
    use crate::core::manifest::StopSignal;

    #[test]
    fn a_program_of_a_release_bears_its_mark() {
        let home = Path::new(r"C:\Program Files\aops");
        let of = |path: &str| mark_of(Path::new(path), home).map(|mark| (mark.name, mark.version));
        let marked = Some(("Echo".to_owned(), "1.2".to_owned()));
        assert_eq!(of(r"C:\Program Files\aops\agents\Echo\1.2\echo.exe"), marked);
        assert_eq!(of(r"\\?\c:\program files\AOPS\Agents\Echo\1.2\bin\echo.exe"), marked);
        assert_eq!(of(r"C:\Program Files\aops\agents\Echo\1.2"), None);
        assert_eq!(of(r"C:\Program Files\aops\bin\aops.exe"), None);
        assert_eq!(of(r"C:\Program Files\aops\agents.old\Echo\1.2\echo.exe"), None);
    }

    /// As a manager leaves it that dies between its creation and its being put into its group.
    #[test]
    fn a_program_that_never_began_is_found_by_its_file_and_ended() {
        let home = tempfile::tempdir().unwrap();
        let program = home.path().join(r"agents\Echo\1.2\echo.exe");
        std::fs::create_dir_all(program.parent().unwrap()).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let mut child = Command::new(&program).creation_flags(CREATE_SUSPENDED).spawn().unwrap();
        let found: Vec<ProcessInfo> =
            processes(home.path()).into_iter().filter(|process| process.mark.is_some()).collect();
        assert_eq!(found.iter().map(|process| process.pid).collect::<Vec<_>>(), [child.id()]);
        assert_eq!(found[0].mark.as_ref().unwrap().name, "Echo");
        assert!(signal(found[0].pid, found[0].start_time, StopSignal::Kill).unwrap());
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn the_own_process_is_known_by_its_file_and_age() {
        let own = std::process::id();
        assert_eq!(executable_of(own).unwrap().file_name(), std::env::current_exe().unwrap().file_name());
        assert!(age(start_time(own).unwrap()).unwrap() < Duration::from_secs(3600));
        assert!(memory_bytes(own).unwrap() > 0);
    }
}
