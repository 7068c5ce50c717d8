//! The group that holds a sub-agent's process tree: a Job Object. Processes started in it are in it, too, unless their starter wants them
//! outside: a role that a sub-agent starts.
//!
//! It outlives us. A job exists as long as a process is in it, but can be opened by its name only while a handle to it is open. So each
//! process that we start gets a handle to its own job (which its children inherit, as most programs allow), we keep a handle to every job that
//! we created or opened, and the watchdog looks for jobs and keeps them open, too ([`hold_groups`]).
//!
//! The next manager opens it by its name. A process in it without a record was being started when the previous manager exited, or was left
//! behind by a process that has exited since.

use std::collections::BTreeMap;
use std::io;
use std::mem::offset_of;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use windows_sys::Win32::Foundation::{
    DuplicateHandle, ERROR_ACCESS_DENIED, ERROR_ALREADY_EXISTS, ERROR_FILE_NOT_FOUND, ERROR_INVALID_HANDLE,
    ERROR_MORE_DATA, GetLastError, HANDLE,
};
use windows_sys::Win32::Storage::FileSystem::SYNCHRONIZE;
use windows_sys::Win32::System::JobObjects::{
    AssignProcessToJobObject, CreateJobObjectW, JOB_OBJECT_LIMIT, JOB_OBJECT_LIMIT_ACTIVE_PROCESS,
    JOB_OBJECT_LIMIT_BREAKAWAY_OK, JOBOBJECT_BASIC_PROCESS_ID_LIST, JOBOBJECT_EXTENDED_LIMIT_INFORMATION,
    JobObjectBasicProcessIdList, JobObjectExtendedLimitInformation, OpenJobObjectW, QueryInformationJobObject,
    SetInformationJobObject, TerminateJobObject,
};
use windows_sys::Win32::System::SystemServices::{
    JOB_OBJECT_ASSIGN_PROCESS, JOB_OBJECT_QUERY, JOB_OBJECT_SET_ATTRIBUTES, JOB_OBJECT_TERMINATE,
};
use windows_sys::Win32::System::Threading::{EVENT_MODIFY_STATE, GetCurrentProcess, PROCESS_SYNCHRONIZE};

use super::security::{self, PrivateAcl, READ_CONTROL, wide};
use super::{event, names, process, watch};

/// Prefix of names that are visible to the whole host, from any session.
const GLOBAL: &str = r"Global\";
const AGENT: &str = "agent-";
const APART: &str = "apart-";
/// Between a name that another user has taken and random digits. No name of a sub-agent has it.
const BESIDE: &str = "~";
/// Exit code of a process that we terminate.
pub(super) const ENDED_BY_US: u32 = 1;
/// Number of pids in the first query of a job, and the maximum.
const FIRST_ROOM: usize = 64;
const MAX_ROOM: usize = 1 << 20;

/// Poll interval for a process that cannot be watched.
const POLL: Duration = Duration::from_millis(250);

/// The jobs that this process has open, by name.
static OPEN_JOBS: Mutex<BTreeMap<String, Arc<OwnedHandle>>> = Mutex::new(BTreeMap::new());

/// Whether this process has the job of a group open.
#[cfg(test)]
pub(super) fn is_open(group: &Group) -> bool {
    open_jobs().contains_key(&group.name)
}

fn open_jobs() -> MutexGuard<'static, BTreeMap<String, Arc<OwnedHandle>>> {
    OPEN_JOBS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the groups of a home are created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    prefix: String,
}

/// Holds the process tree of one sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    name: String,
}

impl Groups {
    /// The groups of a home, with names visible to the whole host, so that a service and an operator's session see the same ones. `key`
    /// names the home and has no backslash.
    pub fn find(key: &str) -> Option<Groups> {
        Some(Groups { prefix: format!("{GLOBAL}{key}-") })
    }

    /// The location, for display.
    pub fn location(&self) -> String {
        self.prefix.clone()
    }

    /// Nothing to do: no process can leave its job. A role is started outside of its starter's.
    pub fn leave(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// The group of a sub-agent, whether or not it exists.
    pub fn group(&self, agent: &str) -> Group {
        Group { name: format!("{}{AGENT}{agent}", self.prefix) }
    }

    /// The group of a sub-agent whose main process alone is ours: it is not listed by [`Groups::all`], and never killed as a whole.
    pub fn main_only(&self, agent: &str) -> Group {
        Group { name: format!("{}{APART}{agent}", self.prefix) }
    }

    /// The sub-agents whose groups exist.
    pub fn all(&self) -> io::Result<Vec<String>> {
        let prefix = format!("{}{AGENT}", self.prefix.strip_prefix(GLOBAL).unwrap_or(&self.prefix));
        let mut agents = names::with_prefix(&prefix)?;
        for name in &mut agents {
            name.truncate(name.find(BESIDE).unwrap_or(name.len()));
        }
        agents.sort();
        agents.dedup();
        Ok(agents)
    }
}

/// Opens the jobs of a home's sub-agents and keeps them open: then their names remain, although every process with a handle to one has exited.
/// Jobs that have become empty are closed. A sub-agent whose main process alone is ours has nothing to lose with its job.
pub fn hold_groups(key: &str) {
    let Some(groups) = Groups::find(key) else { return };
    for agent in groups.all().unwrap_or_default() {
        // One that cannot be opened is the manager's to report.
        let _ = groups.group(&agent).find();
    }
    let held: Vec<Group> = open_jobs().keys().map(|name| Group::named(name)).collect();
    for group in held {
        // It fails for one that has processes.
        let _ = group.remove();
    }
}

impl Group {
    /// The group with the name that a record stores.
    pub fn named(name: &str) -> Group {
        Group { name: name.to_owned() }
    }

    /// Its permanent name.
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// Creates it; an existing group is not an error.
    pub fn make(&self) -> io::Result<()> {
        let job = match self.find() {
            Ok(Some(job)) => job,
            Err(error) if !is_of_another(&error) => return Err(error),
            _ => self.create()?,
        };
        limit(&job, JOB_OBJECT_LIMIT_BREAKAWAY_OK, 0)
    }

    fn create(&self) -> io::Result<Arc<OwnedHandle>> {
        let job = match create_job(&self.name) {
            Err(error) if is_of_another(&error) => {
                let other = format!("{}{BESIDE}{:016x}", self.name, fastrand::u64(..));
                tracing::warn!(job = self.name, error = %error, "another user has taken the name of a job; another name is used");
                create_job(&other)?
            }
            outcome => outcome?,
        };
        Ok(self.keep_open(job))
    }

    /// The job, opened by its name unless it is open already; `None`: no job of ours has this name.
    fn find(&self) -> io::Result<Option<Arc<OwnedHandle>>> {
        if let Some(job) = open_jobs().get(&self.name) {
            return Ok(Some(job.clone()));
        }
        let plain = open_job(&self.name);
        if let Ok(Some(job)) = plain {
            return Ok(Some(self.keep_open(job)));
        }
        let prefix = format!("{}{BESIDE}", self.name);
        for name in names::with_prefix(prefix.strip_prefix(GLOBAL).unwrap_or(&prefix)).unwrap_or_default() {
            if let Ok(Some(job)) = open_job(&format!("{prefix}{name}")) {
                return Ok(Some(self.keep_open(job)));
            }
        }
        // It may be ours, and this process has fewer rights than the one that created it.
        plain.map(|_| None)
    }

    fn keep_open(&self, job: OwnedHandle) -> Arc<OwnedHandle> {
        open_jobs().entry(self.name.clone()).or_insert_with(|| Arc::new(job)).clone()
    }

    /// The pids in it. The system's console host may be among them; it exits shortly after the last program that uses it.
    pub fn members(&self) -> io::Result<Vec<u32>> {
        const HEAD: usize = offset_of!(JOBOBJECT_BASIC_PROCESS_ID_LIST, ProcessIdList) / size_of::<usize>();
        let Some(job) = self.find()? else { return Ok(vec![]) };
        let mut room = FIRST_ROOM;
        loop {
            let mut list = vec![0_usize; HEAD + room];
            let length = (list.len() * size_of::<usize>()) as u32;
            // SAFETY: the handle is open; the buffer has the given length and the structure's alignment.
            let done = unsafe {
                QueryInformationJobObject(
                    raw(&job),
                    JobObjectBasicProcessIdList,
                    list.as_mut_ptr().cast(),
                    length,
                    std::ptr::null_mut(),
                )
            };
            if done != 0 {
                // SAFETY: the buffer is longer than the structure, and the system has filled in its head.
                let count =
                    unsafe { (*list.as_ptr().cast::<JOBOBJECT_BASIC_PROCESS_ID_LIST>()).NumberOfProcessIdsInList };
                return Ok(list[HEAD..].iter().take(count as usize).map(|pid| *pid as u32).collect());
            }
            match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(ERROR_MORE_DATA as i32) && room < MAX_ROOM => room *= 4,
                error => return Err(error),
            }
        }
    }

    /// Whether it has no processes.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.members()?.is_empty())
    }

    /// Resolves when the group has no processes, by waiting for each of them. Cancel-safe.
    pub async fn emptied(&self) {
        while let Some(pid) = self.members().ok().and_then(|members| members.into_iter().next()) {
            match process::open(pid, PROCESS_SYNCHRONIZE) {
                Ok(member) if watch::signalled(&member).await.is_ok() => {}
                // It has exited, or cannot be watched.
                _ => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// The name of the event that asks its program to stop.
    fn stop_event(&self) -> String {
        format!("{GLOBAL}stop-{}", self.name.strip_prefix(GLOBAL).unwrap_or(&self.name))
    }

    /// Asks its program to stop, if it waits for the event that it was given. Consoles and windows are asked by `signal`.
    pub fn request_stop(&self) {
        if let Ok(Some(event)) = event::open(&self.stop_event()) {
            let _ = event::set(&event);
        }
    }

    /// The environment variable with the name of the event that asks a program in this group to stop.
    pub(super) fn stop_variable(&self) -> (&'static str, String) {
        ("AOPS_STOP_EVENT", self.stop_event())
    }

    /// Kills all processes in it at once. New processes are forbidden first, so that no fork in progress escapes.
    pub fn kill(&self) -> io::Result<()> {
        let Some(job) = self.find()? else { return Ok(()) };
        // If this fails, a process that starts in between is killed by the next attempt.
        let _ = limit(&job, JOB_OBJECT_LIMIT_ACTIVE_PROCESS, 1);
        // SAFETY: the handle is open.
        if unsafe { TerminateJobObject(raw(&job), ENDED_BY_US) } == 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Closes our handle to an empty job, which removes it. A missing job is not an error.
    pub fn remove(&self) -> io::Result<()> {
        if !self.is_empty()? {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the job has processes"));
        }
        open_jobs().remove(&self.name);
        Ok(())
    }

    /// Adds a suspended process to the job, and gives it a handle that keeps the job open. Once it is in the job, a handle that it does not get
    /// is no error: the job is open here.
    pub(super) fn add(&self, process: &OwnedHandle) -> io::Result<()> {
        let job = self.find()?.ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: both handles are open.
        if unsafe { AssignProcessToJobObject(raw(&job), process.as_raw_handle()) } == 0 {
            return Err(io::Error::last_os_error());
        }
        if let Err(error) = self.give_handles(&job, process) {
            tracing::warn!(job = self.name, error = %error, "a sub-agent cannot be given handles to its job and its stop event; it may not be asked to stop before it is killed");
        }
        Ok(())
    }

    fn give_handles(&self, job: &OwnedHandle, process: &OwnedHandle) -> io::Result<()> {
        let mut theirs: HANDLE = std::ptr::null_mut();
        // SAFETY: the handles are open, and the result, a handle of the other process, outlives the call.
        let done = unsafe {
            let own = GetCurrentProcess();
            DuplicateHandle(own, raw(job), process.as_raw_handle(), &mut theirs, JOB_OBJECT_QUERY, 1, 0)
        };
        if done == 0 {
            return Err(io::Error::last_os_error());
        }
        // The process keeps the event, so that the next manager finds it.
        let event = event::create(&self.stop_event())?;
        event::reset(&event)?;
        // SAFETY: as above.
        let done = unsafe {
            let own = GetCurrentProcess();
            let rights = EVENT_MODIFY_STATE | SYNCHRONIZE;
            DuplicateHandle(own, event.as_raw_handle(), process.as_raw_handle(), &mut theirs, rights, 0, 0)
        };
        if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Creates a job, or opens ours.
fn create_job(name: &str) -> io::Result<OwnedHandle> {
    let (wide, ours) = (wide(name), PrivateAcl::new()?);
    // SAFETY: the name ends in a zero and, like the access list, outlives the call.
    let (job, error) = unsafe { (CreateJobObjectW(&ours.attributes(), wide.as_ptr()), GetLastError()) };
    if job.is_null() {
        return Err(io::Error::from_raw_os_error(error as i32));
    }
    // SAFETY: a new handle, which only we own.
    let job = unsafe { OwnedHandle::from_raw_handle(job) };
    if error == ERROR_ALREADY_EXISTS && !security::is_trusted(&job)? {
        return Err(io::Error::from_raw_os_error(ERROR_ACCESS_DENIED as i32));
    }
    Ok(job)
}

/// `None`: there is none of this name, or another user has created it, perhaps with processes in it or with an access list that lets that user
/// kill ours.
fn open_job(name: &str) -> io::Result<Option<OwnedHandle>> {
    let name = wide(name);
    let access =
        JOB_OBJECT_QUERY | JOB_OBJECT_SET_ATTRIBUTES | JOB_OBJECT_ASSIGN_PROCESS | JOB_OBJECT_TERMINATE | READ_CONTROL;
    // SAFETY: the name ends in a zero and outlives the call.
    let job = unsafe { OpenJobObjectW(access, 0, name.as_ptr()) };
    if job.is_null() {
        return match io::Error::last_os_error() {
            error if has_code(&error, &[ERROR_FILE_NOT_FOUND, ERROR_INVALID_HANDLE]) => Ok(None),
            error => Err(error),
        };
    }
    // SAFETY: a new handle, which only we own.
    let job = unsafe { OwnedHandle::from_raw_handle(job) };
    Ok(security::is_trusted(&job)?.then_some(job))
}

/// Whether a name is that of an object of another user, or of another kind.
fn is_of_another(error: &io::Error) -> bool {
    has_code(error, &[ERROR_ACCESS_DENIED, ERROR_INVALID_HANDLE])
}

fn has_code(error: &io::Error, codes: &[u32]) -> bool {
    error.raw_os_error().is_some_and(|code| codes.contains(&(code as u32)))
}

fn raw(handle: &OwnedHandle) -> HANDLE {
    handle.as_raw_handle()
}

/// Sets all limits of a job; those that are not given end.
fn limit(job: &OwnedHandle, flags: JOB_OBJECT_LIMIT, processes: u32) -> io::Result<()> {
    let mut limits = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
    limits.BasicLimitInformation.LimitFlags = flags;
    limits.BasicLimitInformation.ActiveProcessLimit = processes;
    let size = size_of_val(&limits) as u32;
    // SAFETY: the handle is open, and the structure has the given size.
    let done = unsafe {
        SetInformationJobObject(raw(job), JobObjectExtendedLimitInformation, (&raw const limits).cast(), size)
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
