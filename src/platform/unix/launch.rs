//! Starts a sub-agent's process: in its group, in a session of its own, with its record written before its program runs.
//!
//! ```text
//! manager   clone3 into the group ──── continues, and reads the pipe until it closes ───▶ started, or an error
//! child     └▶ session, output, directory, record (renamed into place), reset, user, exec ┘
//! ```
//!
//! The standard library's `Command` cannot start a process in a cgroup. Moving it there later takes a grace period of the kernel, 8 ms and
//! more (measured), in which it could fork. Where `clone3` is not available (before Linux 5.7; cgroup v1; a sandbox that forbids it), the
//! child writes itself into the group before anything else.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Gid, Pid, PidfdFlags, Signal, Uid, WaitOptions, waitpid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::{SignalKind, signal};

use super::child_record::{own_start_time, write_record};
use super::clone;
use super::group::{Group, is_gone};
use super::reset::InheritedReset;
use crate::platform::Launch;

/// Runs a program without an interpreter line, as execvp(3) does.
const SHELL: &std::ffi::CStr = c"/bin/sh";

/// Children that start within this interval are forked, see [`clone`].
const CROWD_INTERVAL: Duration = Duration::from_millis(5);
/// Timeout for the steps before exec, which take a millisecond. On a host that is ten thousand times slower a retry is no worse, and the
/// manager must not wait forever.
const EXEC_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for a killed process to exit.
const REAP_TIMEOUT: Duration = Duration::from_secs(2);
/// Attempts, where the group is removed before a process starts in it.
const GROUP_TRIES: u32 = 3;

/// A started child. Dropping it neither kills nor reaps it.
#[derive(Debug)]
pub struct Child {
    pub pid: u32,
    pub start_time: u64,
    /// Whether it started in its group.
    pub grouped: bool,
    pidfd: Option<OwnedFd>,
}

/// Starts a sub-agent's program. `command` specifies program, arguments, directory and the complete environment. Standard input is null;
/// standard output and standard error are `launch.output`.
///
/// Returns when the program runs. If its record cannot be written (a full disk) or its group cannot be entered, the program runs anyway and
/// is identified by its environment marker.
pub async fn launch(command: &Command, launch: &Launch) -> io::Result<Child> {
    let plan = ChildSetup::new(command, launch)?;
    if let Some(group) = &launch.group {
        if let Some(result) = start_in(group, &plan, EXEC_TIMEOUT).await {
            return result;
        }
        // It may have been removed. If it cannot be created, the child reports that it is not grouped.
        let _ = group.open();
    }
    let forked = start_child(&plan, EXEC_TIMEOUT, |pipe| {
        let pid = fork(&plan, pipe)?;
        // It is not reaped yet, so its pid is not reused.
        Ok((pid, rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()))
    });
    match forked.await {
        LaunchOutcome::Running(child) => Ok(child),
        LaunchOutcome::Failed(error) | LaunchOutcome::NotCreated(error) => Err(error),
        LaunchOutcome::Killed => Err(io::Error::other("its process was killed before it could run the program")),
    }
}

/// Starts a child directly in the group; `None`: not possible on this host.
async fn start_in(group: &Group, plan: &ChildSetup<'_>, limit: Duration) -> Option<io::Result<Child>> {
    let alone = is_alone();
    for _ in 0..GROUP_TRIES {
        let directory = group.open().ok()?;
        let frozen = group.thaw();
        // A child that is frozen before exec would block us. A child that changes its user in our memory clears our dumpable flag, and that
        // user could stop it while we wait.
        let share_memory = alone && !frozen && plan.user.is_none();
        match start_child(plan, limit, |pipe| clone_into(directory.as_fd(), share_memory, plan, pipe)).await {
            LaunchOutcome::Running(child) => return Some(Ok(child)),
            LaunchOutcome::Failed(error) => return Some(Err(error)),
            // Another role of ours, or systemd, removes empty groups.
            LaunchOutcome::NotCreated(error) if is_gone(&error) => {}
            // Some kernels kill a process that is cloned into, or from, a group that was once killed as a whole.
            LaunchOutcome::Killed | LaunchOutcome::NotCreated(_) => return None,
        }
    }
    None
}

/// The result of a child up to exec.
#[derive(Debug)]
enum LaunchOutcome {
    /// It was not created.
    NotCreated(io::Error),
    Running(Child),
    /// It has exited, or was killed.
    Failed(io::Error),
    /// It exited without a message.
    Killed,
}

/// Creates a child and waits until it executes its program or fails. Other children may start at the same time.
async fn start_child(
    plan: &ChildSetup<'_>,
    limit: Duration,
    make: impl FnOnce(BorrowedFd<'_>) -> io::Result<(Pid, Option<OwnedFd>)>,
) -> LaunchOutcome {
    let made = || {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        io::Result::Ok((reader, make(writer.as_fd())?))
    };
    let (reader, (pid, pidfd)) = match made() {
        Ok(made) => made,
        Err(error) => return LaunchOutcome::NotCreated(error),
    };
    let messages = match tokio::time::timeout(limit, read_messages(reader)).await {
        Ok(Ok(messages)) => messages,
        Ok(Err(error)) => {
            discard(pid, pidfd).await;
            return LaunchOutcome::Failed(error);
        }
        Err(_) => {
            discard(pid, pidfd).await;
            let why = format!(
                "its process did not run the program within {limit:?} and was killed; if a cgroup above its group is \
                 frozen, thaw it, and check whether the file systems of its directory and of its program respond"
            );
            return LaunchOutcome::Failed(io::Error::new(io::ErrorKind::TimedOut, why));
        }
    };
    let (mut grouped, mut started) = (plan.group.is_some(), None);
    for message in messages.chunks_exact(MESSAGE) {
        let value = message[1..].iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        match message[0] {
            NOT_GROUPED => grouped = false,
            READY => started = Some(value),
            _ => {
                let _ = waitpid(Some(pid), WaitOptions::empty());
                return LaunchOutcome::Failed(io::Error::from_raw_os_error(value as i32));
            }
        }
    }
    // A program that has already exited has no start time any more, so the child reported it.
    let Some(start_time) = started else {
        let _ = waitpid(Some(pid), WaitOptions::empty());
        return LaunchOutcome::Killed;
    };
    LaunchOutcome::Running(Child { pid: number(pid), start_time, grouped, pidfd })
}

/// Kills and reaps a child in an unknown state. If it cannot die now (frozen in a v1 cgroup, blocked in a system call), it is reaped with
/// the orphans later.
async fn discard(pid: Pid, pidfd: Option<OwnedFd>) {
    // It is not reaped yet, so its pid is not reused.
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    let mut child = Child { pid: number(pid), start_time: 0, grouped: false, pidfd };
    let _ = tokio::time::timeout(REAP_TIMEOUT, child.wait()).await;
}

fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get() as u32
}

/// Whether no other child was started within the last [`CROWD_INTERVAL`].
fn is_alone() -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    last.replace(Instant::now()).is_none_or(|last| last.elapsed() > CROWD_INTERVAL)
}

/// Reads the child's messages until the pipe is closed, which has already happened if the child ran in our memory.
async fn read_messages(pipe: OwnedFd) -> io::Result<Vec<u8>> {
    let (mut messages, mut buffer) = (vec![], [0; 4 * MESSAGE]);
    loop {
        match rustix::io::read(&pipe, &mut buffer) {
            Ok(0) => return Ok(messages),
            Ok(length) => messages.extend_from_slice(&buffer[..length]),
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Receiver::from_owned_fd(pipe)?.read_to_end(&mut messages).await?;
    Ok(messages)
}

impl Child {
    /// Waits for its exit. Cancel-safe: it can be called again.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        let pid = Pid::from_raw(self.pid as i32).ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(pidfd) = &self.pidfd {
            // SAFETY: the descriptor is borrowed for the life of the registration, and stays open.
            let watched = unsafe { AsyncFd::register_with_interest(pidfd.as_fd(), Interest::READABLE) };
            if let Ok(watched) = watched {
                drop(watched.readable().await?);
                if let Some(status) = try_wait(pid)? {
                    return Ok(status);
                }
            }
        }
        // Without a pidfd, each exit of any child is a reason to check this one.
        let mut ends = signal(SignalKind::child())?;
        loop {
            match try_wait(pid)? {
                Some(status) => return Ok(status),
                None => drop(ends.recv().await),
            }
        }
    }
}

fn try_wait(pid: Pid) -> io::Result<Option<ExitStatus>> {
    Ok(waitpid(Some(pid), WaitOptions::NOHANG)?.map(|(_, status)| ExitStatus::from_raw(status.as_raw())))
}

/// A message of the child: a kind, then an error number or the start time.
const MESSAGE: usize = 9;
const NOT_GROUPED: u8 = b'g';
const NOT_RUN: u8 = b'x';
/// The last message before exec.
const READY: u8 = b'r';

/// Everything that the child needs, prepared before it is created: between fork and exec nothing may be allocated and no lock taken.
struct ChildSetup<'a> {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    directory: Option<CString>,
    spare: CString,
    record: CString,
    head: &'a [u8],
    output: BorrowedFd<'a>,
    null: OwnedFd,
    group: Option<GroupPlan>,
    reset: InheritedReset,
    user: Option<(Vec<Gid>, Gid, Uid)>,
}

struct GroupPlan {
    /// The files that the process writes itself into, tried in this order.
    procs_files: [CString; 2],
    /// Its name in the record, with quotes.
    name: Vec<u8>,
}

impl<'a> ChildSetup<'a> {
    fn new(command: &Command, launch: &'a Launch) -> io::Result<ChildSetup<'a>> {
        let mut spare = launch.record.clone().into_os_string();
        spare.push(".old");
        let environment = command.get_envs().filter_map(|(name, value)| {
            let mut text = name.to_owned();
            text.push("=");
            text.push(value?);
            Some(text)
        });
        let group = match &launch.group {
            Some(group) => Some(GroupPlan {
                procs_files: [c_path(&group.tasks_file())?, c_path(&group.procs_file())?],
                name: serde_json::to_vec(&group.name())?,
            }),
            None => None,
        };
        let user = launch.user.as_ref().map(|user| {
            let groups = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            (groups, Gid::from_raw(user.gid), Uid::from_raw(user.uid))
        });
        Ok(ChildSetup {
            program: c_text(command.get_program())?,
            arguments: std::iter::once(command.get_program())
                .chain(command.get_args())
                .map(c_text)
                .collect::<io::Result<_>>()?,
            environment: environment.map(|text| c_text(&text)).collect::<io::Result<_>>()?,
            directory: command.get_current_dir().map(c_path).transpose()?,
            spare: c_text(&spare)?,
            record: c_path(&launch.record)?,
            head: &launch.head,
            output: launch.output.as_fd(),
            null: rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?,
            group,
            reset: InheritedReset::prepare(),
            user,
        })
    }

    /// The child's work. Does not return.
    ///
    /// # Safety
    ///
    /// Only in a child that is to execute the program: it makes raw system calls, and uses only memory that was allocated before.
    unsafe fn run(&self, arrays: &ExecArrays<'_>, grouped: bool, pipe: BorrowedFd<'_>) -> ! {
        let report = |kind: u8, value: u64| {
            let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
            let _ = rustix::io::write(pipe, &[kind, a, b, c, d, e, f, g, h]);
        };
        // On a panic, the child must not unwind into the manager's code.
        let _end = ChildExit;
        let mut group = self.group.as_ref();
        if let Some(target) = group
            && !grouped
            && let Err(error) = enter(&target.procs_files[0]).or_else(|_| enter(&target.procs_files[1]))
        {
            report(NOT_GROUPED, error.raw_os_error() as u64);
            group = None;
        }
        let error = match self.prepare(group) {
            Ok(start_time) => {
                report(READY, start_time);
                // SAFETY: the caller guarantees it.
                unsafe { self.execute(arrays) }
            }
            Err(error) => error,
        };
        report(NOT_RUN, error.raw_os_error() as u64);
        ChildExit::now()
    }

    /// Returns the start time of this process.
    fn prepare(&self, group: Option<&GroupPlan>) -> rustix::io::Result<u64> {
        rustix::process::setsid()?;
        rustix::stdio::dup2_stdin(&self.null)?;
        rustix::stdio::dup2_stdout(self.output)?;
        rustix::stdio::dup2_stderr(self.output)?;
        if let Some(directory) = &self.directory {
            rustix::process::chdir(directory.as_c_str())?;
        }
        let start_time = own_start_time().unwrap_or_default();
        let group = group.map(|group| group.name.as_slice());
        let _ = write_record(&self.spare, &self.record, self.head, start_time, group);
        // After the steps that need more descriptors than the new limit may allow.
        self.reset.apply();
        if let Some((groups, gid, uid)) = &self.user {
            set_thread_groups(groups)?;
            set_thread_gid(*gid)?;
            set_thread_uid(*uid)?;
        }
        Ok(start_time)
    }

    /// # Safety
    ///
    /// As for [`ChildSetup::run`].
    unsafe fn execute(&self, arrays: &ExecArrays<'_>) -> Errno {
        // SAFETY: the arrays end with a null and outlive the call, which returns only on failure.
        unsafe {
            libc::execve(self.program.as_ptr(), arrays.arguments(), arrays.environment.as_ptr());
            let error = last_error();
            if error == Errno::NOEXEC {
                libc::execve(SHELL.as_ptr(), arrays.shell.as_ptr(), arrays.environment.as_ptr());
                return last_error();
            }
            error
        }
    }
}

/// Exits the child when it runs no program.
struct ChildExit;

impl ChildExit {
    fn now() -> ! {
        // SAFETY: ends this process only, without running the manager's exit handlers.
        unsafe { libc::_exit(127) }
    }
}

impl Drop for ChildExit {
    fn drop(&mut self) {
        ChildExit::now()
    }
}

/// The arrays for execve(2).
struct ExecArrays<'a> {
    /// The shell's arguments; the program's own start at the second.
    shell: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    /// The arrays point into it.
    _plan: std::marker::PhantomData<&'a CString>,
}

impl<'a> ExecArrays<'a> {
    fn of(plan: &'a ChildSetup<'_>) -> ExecArrays<'a> {
        let pointers =
            |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>();
        let mut shell = vec![SHELL.as_ptr()];
        shell.extend(pointers(&plan.arguments));
        ExecArrays { shell, environment: pointers(&plan.environment), _plan: std::marker::PhantomData }
    }

    fn arguments(&self) -> *const *const libc::c_char {
        self.shell[1..].as_ptr()
    }
}

/// Starts the child in the group, and returns its pidfd.
fn clone_into(
    group: BorrowedFd<'_>,
    share_memory: bool,
    plan: &ChildSetup<'_>,
    pipe: BorrowedFd<'_>,
) -> io::Result<(Pid, Option<OwnedFd>)> {
    let arrays = ExecArrays::of(plan);
    // SAFETY: the child makes raw system calls only, and does not return.
    let child = || unsafe { plan.run(&arrays, true, pipe) };
    // SAFETY: as above.
    let (pid, pidfd) = unsafe { clone::clone_into(group, share_memory, &child)? };
    Ok((pid, Some(pidfd)))
}

fn fork(plan: &ChildSetup<'_>, pipe: BorrowedFd<'_>) -> io::Result<Pid> {
    let arrays = ExecArrays::of(plan);
    // SAFETY: the child makes raw system calls only, and does not return.
    let child = || unsafe { plan.run(&arrays, false, pipe) };
    // SAFETY: as above.
    unsafe { clone::fork(&child) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// Moves the calling process into a group.
fn enter(procs_file: &CString) -> rustix::io::Result<()> {
    let file = rustix::fs::open(procs_file.as_c_str(), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, b"0").map(drop)
}

fn c_path(path: &Path) -> io::Result<CString> {
    c_text(path.as_os_str())
}

fn c_text(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{text:?} contains a zero byte")))
}

#[cfg(test)]
mod tests;
