//! The group that holds a sub-agent's whole process tree: a Job Object, which no process leaves, by whatever way it begins.
//!
//! It does not end with us. A job lives as long as a process lives in it, but can be found by its name only as long as somebody holds it
//! open. So each process that we start holds its own job (a handle that its children inherit, as most programs let them), and we hold
//! every job that we have made or found.
//!
//! The next manager finds it under the same name. What lives in it without being recorded was being started when the last one died, or
//! was left by a process that has ended since.

use std::collections::BTreeMap;
use std::io;
use std::mem::offset_of;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use windows_sys::Win32::Foundation::{
    DuplicateHandle, ERROR_ALREADY_EXISTS, ERROR_FILE_NOT_FOUND, ERROR_MORE_DATA, GetLastError, HANDLE,
};
use windows_sys::Win32::System::JobObjects::{
    AssignProcessToJobObject, CreateJobObjectW, JOB_OBJECT_LIMIT, JOB_OBJECT_LIMIT_ACTIVE_PROCESS,
    JOBOBJECT_BASIC_LIMIT_INFORMATION, JOBOBJECT_BASIC_PROCESS_ID_LIST, JobObjectBasicLimitInformation,
    JobObjectBasicProcessIdList, OpenJobObjectW, QueryInformationJobObject, SetInformationJobObject,
    TerminateJobObject,
};
use windows_sys::Win32::System::SystemServices::{
    JOB_OBJECT_ASSIGN_PROCESS, JOB_OBJECT_QUERY, JOB_OBJECT_SET_ATTRIBUTES, JOB_OBJECT_TERMINATE,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, PROCESS_SYNCHRONIZE};

use super::security::{self, PrivateAcl, wide};
use super::{names, process, watch};

/// What leads to the names of the whole host, from any session.
const GLOBAL: &str = r"Global\";
const AGENT: &str = "agent-";
const APART: &str = "apart-";
/// The exit code of what is ended by us.
pub(super) const ENDED_BY_US: u32 = 1;
/// Room for so many processes at first, and never for more than that.
const FIRST_ROOM: usize = 64;
const MOST_ROOM: usize = 1 << 20;

/// Between two looks at a process that cannot be watched.
const LOOK: Duration = Duration::from_millis(250);

/// The jobs that this process holds open, by name.
static HELD: Mutex<BTreeMap<String, Arc<OwnedHandle>>> = Mutex::new(BTreeMap::new());

fn held() -> MutexGuard<'static, BTreeMap<String, Arc<OwnedHandle>>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a home's groups are made.
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
    /// Where a home's groups are made: in the names of the whole host, so that a service and an operator's session see the same ones.
    /// `key` names the home and holds no backslash.
    pub fn find(key: &str) -> Option<Groups> {
        Some(Groups { prefix: format!("{GLOBAL}{key}-") })
    }

    /// Where that is, for people.
    pub fn place(&self) -> String {
        self.prefix.clone()
    }

    /// No process leaves a job: one that a sub-agent started ends with it.
    pub fn leave(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// The group of one sub-agent, made or not.
    pub fn group(&self, agent: &str) -> Group {
        Group { name: format!("{}{AGENT}{agent}", self.prefix) }
    }

    /// Where a sub-agent lives of which the main process alone is ours: apart from ours, and never listed or killed whole.
    pub fn apart(&self, agent: &str) -> Group {
        Group { name: format!("{}{APART}{agent}", self.prefix) }
    }

    /// The sub-agents whose groups exist.
    pub fn all(&self) -> io::Result<Vec<String>> {
        names::beginning_with(&format!("{}{AGENT}", self.prefix.strip_prefix(GLOBAL).unwrap_or(&self.prefix)))
    }
}

impl Group {
    /// The group of that name, as a record keeps it.
    pub fn named(name: &str) -> Group {
        Group { name: name.to_owned() }
    }

    /// Its name for good.
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// Makes it. Twice is as good as once.
    pub fn make(&self) -> io::Result<()> {
        let job = match self.find()? {
            Some(job) => job,
            None => self.create()?,
        };
        limit(&job, 0, 0)
    }

    fn create(&self) -> io::Result<Arc<OwnedHandle>> {
        let (name, ours) = (wide(&self.name), PrivateAcl::new()?);
        // SAFETY: the name ends in a zero and, like the access list, outlives the call.
        let (job, error) = unsafe { (CreateJobObjectW(&ours.attributes(), name.as_ptr()), GetLastError()) };
        if job.is_null() {
            return Err(io::Error::from_raw_os_error(error as i32));
        }
        // SAFETY: a new handle, which is ours alone.
        let job = unsafe { OwnedHandle::from_raw_handle(job) };
        if error == ERROR_ALREADY_EXISTS {
            self.demand_trust(&job)?;
        }
        Ok(self.hold(job))
    }

    /// The job, opened by its name unless we hold it already; `None`: there is none of that name.
    fn find(&self) -> io::Result<Option<Arc<OwnedHandle>>> {
        if let Some(job) = held().get(&self.name) {
            return Ok(Some(job.clone()));
        }
        let name = wide(&self.name);
        let access = JOB_OBJECT_QUERY
            | JOB_OBJECT_SET_ATTRIBUTES
            | JOB_OBJECT_ASSIGN_PROCESS
            | JOB_OBJECT_TERMINATE
            | READ_CONTROL;
        // SAFETY: the name ends in a zero and outlives the call.
        let job = unsafe { OpenJobObjectW(access, 0, name.as_ptr()) };
        if job.is_null() {
            return match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(ERROR_FILE_NOT_FOUND as i32) => Ok(None),
                error => Err(error),
            };
        }
        // SAFETY: a new handle, which is ours alone.
        let job = unsafe { OwnedHandle::from_raw_handle(job) };
        self.demand_trust(&job)?;
        Ok(Some(self.hold(job)))
    }

    /// Who may make names on this host could have made this one first, with a tree of theirs in it or an access list that lets them end
    /// ours.
    fn demand_trust(&self, job: &OwnedHandle) -> io::Result<()> {
        if security::is_trusted(job)? {
            return Ok(());
        }
        let message = format!("cannot use the job {}: another user made it; find and end that program", self.name);
        Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
    }

    fn hold(&self, job: OwnedHandle) -> Arc<OwnedHandle> {
        held().entry(self.name.clone()).or_insert_with(|| Arc::new(job)).clone()
    }

    /// The pids of what lives in it. The system's own process that keeps a program's console may be among them, and ends a moment after
    /// the last program that uses it.
    pub fn members(&self) -> io::Result<Vec<u32>> {
        const HEAD: usize = offset_of!(JOBOBJECT_BASIC_PROCESS_ID_LIST, ProcessIdList) / size_of::<usize>();
        let Some(job) = self.find()? else { return Ok(vec![]) };
        let mut room = FIRST_ROOM;
        loop {
            let mut list = vec![0_usize; HEAD + room];
            let length = (list.len() * size_of::<usize>()) as u32;
            // SAFETY: the handle is open; the buffer has the length that is told and the structure's alignment.
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
                error if error.raw_os_error() == Some(ERROR_MORE_DATA as i32) && room < MOST_ROOM => room *= 4,
                error => return Err(error),
            }
        }
    }

    /// Whether nothing lives in it.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.members()?.is_empty())
    }

    /// Resolves when nothing lives in it: by the ends of what does. Cancel-safe.
    pub async fn emptied(&self) {
        while let Some(pid) = self.members().ok().and_then(|members| members.into_iter().next()) {
            match process::open(pid, PROCESS_SYNCHRONIZE) {
                Ok(member) if watch::signalled(&member).await.is_ok() => {}
                // It has ended since, or cannot be watched.
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Kills all of it at once. That nothing more may begin in it is said first, so that no fork in flight gets away.
    pub fn kill(&self) -> io::Result<()> {
        let Some(job) = self.find()? else { return Ok(()) };
        // Without it, what begins in between is left and is killed when it is looked at again.
        let _ = limit(&job, JOB_OBJECT_LIMIT_ACTIVE_PROCESS, 1);
        // SAFETY: the handle is open.
        if unsafe { TerminateJobObject(raw(&job), ENDED_BY_US) } == 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Lets go of it when it is empty, and so removes it; that it is not there is no error.
    pub fn remove(&self) -> io::Result<()> {
        if !self.is_empty()? {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "something lives in the job"));
        }
        held().remove(&self.name);
        Ok(())
    }

    /// Puts a process into it that has not begun yet, and makes it hold the job open.
    pub(super) fn take_in(&self, process: &OwnedHandle) -> io::Result<()> {
        let job = self.find()?.ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: both handles are open.
        if unsafe { AssignProcessToJobObject(raw(&job), process.as_raw_handle()) } == 0 {
            return Err(io::Error::last_os_error());
        }
        let mut theirs: HANDLE = std::ptr::null_mut();
        // SAFETY: the handles are open, and the result, a handle of the other process, outlives the call.
        let done = unsafe {
            let own = GetCurrentProcess();
            DuplicateHandle(own, raw(&job), process.as_raw_handle(), &mut theirs, JOB_OBJECT_QUERY, 1, 0)
        };
        if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// The right to ask who owns something (winnt.h).
const READ_CONTROL: u32 = 0x2_0000;

fn raw(handle: &OwnedHandle) -> HANDLE {
    handle.as_raw_handle()
}

fn limit(job: &OwnedHandle, flags: JOB_OBJECT_LIMIT, processes: u32) -> io::Result<()> {
    let limits =
        JOBOBJECT_BASIC_LIMIT_INFORMATION { LimitFlags: flags, ActiveProcessLimit: processes, ..Default::default() };
    let size = size_of_val(&limits) as u32;
    // SAFETY: the handle is open, and the structure has the size that is told.
    let done =
        unsafe { SetInformationJobObject(raw(job), JobObjectBasicLimitInformation, (&raw const limits).cast(), size) };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
