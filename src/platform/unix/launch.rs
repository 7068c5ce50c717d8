//! How a sub-agent's process begins: in its group, in a session of its own, with its record in place before its program runs.
//!
//! ```text
//! manager   clone3 into the group ──── goes on, and hears the pipe's end ───▶ runs, or what could not be done
//! child     └▶ session, output, directory, record (renamed into place), leaves the caller, user, exec ┘
//! ```
//!
//! The standard library's `Command` cannot begin a process in a cgroup, and to move it there afterwards takes a grace period of the
//! kernel's, 8 ms and more (measured), in which it could fork. Where `clone3` cannot (before Linux 5.7; cgroup v1; a sandbox that
//! forbids it), the child writes itself into the group before anything else.

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

/// What runs a program without an interpreter line, as execvp(3) does.
const SHELL: &std::ffi::CStr = c"/bin/sh";

/// Children that are begun so soon after one another are a crowd.
const CROWD: Duration = Duration::from_millis(5);
/// What is done before a program runs takes a millisecond. On a host so busy that it takes ten thousand times as long the next try is no
/// worse off, and the manager must not wait for what will never come.
const HEARD_WITHIN: Duration = Duration::from_secs(10);
/// What is killed dies at once, where it can.
const REAPED_WITHIN: Duration = Duration::from_secs(2);
/// A group is made so often that is taken away before anything begins in it.
const GROUP_TRIES: u32 = 3;

/// A child that was launched. Dropping it neither ends nor reaps it.
#[derive(Debug)]
pub struct Child {
    pub pid: u32,
    pub start_time: u64,
    /// Whether it began in the group that it was to begin in.
    pub grouped: bool,
    pidfd: Option<OwnedFd>,
}

/// Runs a program as a sub-agent. `command` says program, arguments, directory and the whole environment; of its standard streams input
/// is null and the others are `launch.output`.
///
/// Returns when the program runs. Where its record cannot be written (a full disk) or its group cannot be entered, it runs all the same:
/// the mark stands in.
pub async fn launch(command: &Command, launch: &Launch) -> io::Result<Child> {
    let plan = ChildSetup::new(command, launch)?;
    if let Some(group) = &launch.group {
        if let Some(begun) = begin_in(group, &plan, HEARD_WITHIN).await {
            return begun;
        }
        // It may have been taken away since. What cannot be made cannot be entered either, which the child tells.
        let _ = group.open();
    }
    let forked = begin(&plan, HEARD_WITHIN, |pipe| {
        let pid = fork(&plan, pipe)?;
        // Not reaped yet, so the number is still its.
        Ok((pid, rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()))
    });
    match forked.await {
        LaunchOutcome::Runs(child) => Ok(child),
        LaunchOutcome::Failed(error) | LaunchOutcome::NotMade(error) => Err(error),
        LaunchOutcome::Killed => Err(io::Error::other("it was killed before its program could run")),
    }
}

/// Begins a child that is in the group from its first moment on; `None`: none can be begun so.
async fn begin_in(group: &Group, plan: &ChildSetup<'_>, limit: Duration) -> Option<io::Result<Child>> {
    let alone = is_alone();
    for _ in 0..GROUP_TRIES {
        let directory = group.open().ok()?;
        let frozen = group.thaw();
        // Frozen before it runs its program it would hold us with it. And who takes another user's rights in our memory takes from it that
        // it may be looked into, and hands that user a process to stop while we wait for it.
        let in_ours = alone && !frozen && plan.user.is_none();
        match begin(plan, limit, |pipe| clone_into(directory.as_fd(), in_ours, plan, pipe)).await {
            LaunchOutcome::Runs(child) => return Some(Ok(child)),
            LaunchOutcome::Failed(error) => return Some(Err(error)),
            // Another role of ours, or systemd, takes away what it finds empty.
            LaunchOutcome::NotMade(error) if is_gone(&error) => {}
            // Some kernels kill at once what is cloned into a group that was ever killed whole, or from one that was.
            LaunchOutcome::Killed | LaunchOutcome::NotMade(_) => return None,
        }
    }
    None
}

/// What became of a child by the time that it ran its program.
#[derive(Debug)]
enum LaunchOutcome {
    /// There was never one.
    NotMade(io::Error),
    Runs(Child),
    /// It has ended, or was ended.
    Failed(io::Error),
    /// It ended without a word.
    Killed,
}

/// Makes a child and waits until it runs its program or cannot. Others may be begun meanwhile.
async fn begin(
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
        Err(error) => return LaunchOutcome::NotMade(error),
    };
    let told = match tokio::time::timeout(limit, hear(reader)).await {
        Ok(Ok(told)) => told,
        Ok(Err(error)) => {
            discard(pid, pidfd).await;
            return LaunchOutcome::Failed(error);
        }
        Err(_) => {
            discard(pid, pidfd).await;
            let why = format!(
                "its process did not come to run it within {limit:?} and was killed: thaw the cgroups above its group if one is \
                 frozen, and see whether the file systems of its directory and of its program answer"
            );
            return LaunchOutcome::Failed(io::Error::new(io::ErrorKind::TimedOut, why));
        }
    };
    let (mut grouped, mut started) = (plan.group.is_some(), None);
    for message in told.chunks_exact(MESSAGE) {
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
    // Told by itself: a program that ended at once has none any more.
    let Some(start_time) = started else {
        let _ = waitpid(Some(pid), WaitOptions::empty());
        return LaunchOutcome::Killed;
    };
    LaunchOutcome::Runs(Child { pid: number(pid), start_time, grouped, pidfd })
}

/// Kills a child of which we do not know what it does, and reaps it. What cannot die now (frozen in a cgroup of v1, in a system call that
/// nothing ends) is reaped with the orphans once it has.
async fn discard(pid: Pid, pidfd: Option<OwnedFd>) {
    // Not reaped yet, so the number is still its.
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    let mut child = Child { pid: number(pid), start_time: 0, grouped: false, pidfd };
    let _ = tokio::time::timeout(REAPED_WITHIN, child.wait()).await;
}

fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get() as u32
}

/// Whether no other child was begun a moment ago.
fn is_alone() -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    last.replace(Instant::now()).is_none_or(|last| last.elapsed() > CROWD)
}

/// All that is told over a pipe until its end, which is there already where the child was waited for.
async fn hear(pipe: OwnedFd) -> io::Result<Vec<u8>> {
    let (mut told, mut buffer) = (vec![], [0; 4 * MESSAGE]);
    loop {
        match rustix::io::read(&pipe, &mut buffer) {
            Ok(0) => return Ok(told),
            Ok(length) => told.extend_from_slice(&buffer[..length]),
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Receiver::from_owned_fd(pipe)?.read_to_end(&mut told).await?;
    Ok(told)
}

impl Child {
    /// Waits for its end. Cancel-safe: what was not waited for to the end can be waited for again.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        let pid = Pid::from_raw(self.pid as i32).ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(pidfd) = &self.pidfd {
            // SAFETY: the descriptor is borrowed for as long as the registration lives, and stays open meanwhile.
            let watched = unsafe { AsyncFd::register_with_interest(pidfd.as_fd(), Interest::READABLE) };
            if let Ok(watched) = watched {
                drop(watched.readable().await?);
                if let Some(status) = try_wait(pid)? {
                    return Ok(status);
                }
            }
        }
        // Where there is no pidfd, every end of a child is heard of, and each looks whether it was its own.
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

/// What the child tells: a kind, and the error's number or, at last, when it started.
const MESSAGE: usize = 9;
const NOT_GROUPED: u8 = b'g';
const NOT_RUN: u8 = b'x';
/// The last word before the program runs.
const READY: u8 = b'r';

/// All that the child needs, made before it is there: between fork and exec nothing may be allocated and no lock be taken.
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
    leaving: InheritedReset,
    user: Option<(Vec<Gid>, Gid, Uid)>,
}

struct GroupPlan {
    /// What a process writes itself into, tried in this order.
    doors: [CString; 2],
    /// How the record names it, quotes included.
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
                doors: [c_path(&group.door_v1())?, c_path(&group.door())?],
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
            leaving: InheritedReset::prepare(),
            user,
        })
    }

    /// What the child does; it does not come back.
    ///
    /// # Safety
    ///
    /// Only in a child that is to become the program: it makes raw system calls, and what it uses was allocated before.
    unsafe fn carry_out(&self, words: &ExecArrays<'_>, grouped: bool, pipe: BorrowedFd<'_>) -> ! {
        let tell = |kind: u8, value: u64| {
            let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
            let _ = rustix::io::write(pipe, &[kind, a, b, c, d, e, f, g, h]);
        };
        // A panic must not carry the child into what the manager does.
        let _end = ChildExit;
        let mut group = self.group.as_ref();
        if let Some(wanted) = group
            && !grouped
            && let Err(error) = enter(&wanted.doors[0]).or_else(|_| enter(&wanted.doors[1]))
        {
            tell(NOT_GROUPED, error.raw_os_error() as u64);
            group = None;
        }
        let error = match self.prepare(group) {
            Ok(start_time) => {
                tell(READY, start_time);
                // SAFETY: as the caller promised.
                unsafe { self.execute(words) }
            }
            Err(error) => error,
        };
        tell(NOT_RUN, error.raw_os_error() as u64);
        ChildExit::now()
    }

    /// Gives when this process started.
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
        // Behind what needs more descriptors than a program may have open.
        self.leaving.carry_out();
        if let Some((groups, gid, uid)) = &self.user {
            set_thread_groups(groups)?;
            set_thread_gid(*gid)?;
            set_thread_uid(*uid)?;
        }
        Ok(start_time)
    }

    /// # Safety
    ///
    /// As for [`ChildSetup::carry_out`].
    unsafe fn execute(&self, words: &ExecArrays<'_>) -> Errno {
        // SAFETY: the arrays end with a null and outlive the call, which returns only when it failed.
        unsafe {
            libc::execve(self.program.as_ptr(), words.arguments(), words.environment.as_ptr());
            let error = last_error();
            if error == Errno::NOEXEC {
                libc::execve(SHELL.as_ptr(), words.shell.as_ptr(), words.environment.as_ptr());
                return last_error();
            }
            error
        }
    }
}

/// The end of a child that runs no program.
struct ChildExit;

impl ChildExit {
    fn now() -> ! {
        // SAFETY: ends this process alone, without running what the manager would at its own end.
        unsafe { libc::_exit(127) }
    }
}

impl Drop for ChildExit {
    fn drop(&mut self) {
        ChildExit::now()
    }
}

/// The arrays that execve(2) takes.
struct ExecArrays<'a> {
    /// The shell's words; the program's own begin behind its name.
    shell: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    /// They point into it.
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

/// Begins the child in the group, and gives its pidfd.
fn clone_into(
    group: BorrowedFd<'_>,
    in_ours: bool,
    plan: &ChildSetup<'_>,
    pipe: BorrowedFd<'_>,
) -> io::Result<(Pid, Option<OwnedFd>)> {
    let words = ExecArrays::of(plan);
    // SAFETY: the child does only what is allowed there, and does not come back.
    let child = || unsafe { plan.carry_out(&words, true, pipe) };
    // SAFETY: as above.
    let (pid, pidfd) = unsafe { clone::clone_into(group, in_ours, &child)? };
    Ok((pid, Some(pidfd)))
}

fn fork(plan: &ChildSetup<'_>, pipe: BorrowedFd<'_>) -> io::Result<Pid> {
    let words = ExecArrays::of(plan);
    // SAFETY: the child does only what is allowed there, and does not come back.
    let child = || unsafe { plan.carry_out(&words, false, pipe) };
    // SAFETY: as above.
    unsafe { clone::fork(&child) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// Moves the calling process into a group.
fn enter(door: &CString) -> rustix::io::Result<()> {
    let file = rustix::fs::open(door.as_c_str(), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, b"0").map(drop)
}

fn c_path(path: &Path) -> io::Result<CString> {
    c_text(path.as_os_str())
}

fn c_text(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{text:?} holds a zero byte")))
}

#[cfg(test)]
mod tests;
