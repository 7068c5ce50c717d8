//! Traces the processes of a home: an observer sees each system call that changes something, before the kernel carries it out and after it.
//!
//! A tracer (ptrace) stops every thread of a process before and after each system call, and follows its children. So nothing that the roles
//! do is missed, whichever thread or process does it. Sub-agents are let go when they run their own program. A process that is killed while
//! it is stopped before a call has done everything before that call and nothing of it.
//!
//! ```text
//! trace      the tracer                      stranded      counts steps and kills at one of them
//! call       what a call is about to change  durability    records the calls in their order
//! syscalls   which calls change something
//! ```

mod call;
mod syscalls;

use std::collections::{BTreeMap, BTreeSet};
use std::os::raw::c_long;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

pub(crate) use self::call::{Call, Change};
use crate::wait::try_every;

/// `ptrace_syscall_info.op` at the entry and at the exit of a system call.
const ENTRY: u8 = 1;
const EXIT: u8 = 2;
/// The event of a stop that a seized process makes of its own (PTRACE_EVENT_STOP).
const EVENT_STOP: i32 = 128;

/// For killed processes to be gone.
const END: Duration = Duration::from_secs(60);
const END_POLL: Duration = Duration::from_millis(5);

/// Sees the calls of the traced processes. Several threads call it: each command has a tracer of its own.
pub(crate) trait Observer: Send + Sync {
    /// A thread is about to make this call. It is stopped until this returns.
    fn before(&self, call: &Call, trace: &Trace);
    /// The call has returned: whether it succeeded.
    fn after(&self, call: &Call, succeeded: bool, trace: &Trace);
}

/// The tracers of one home.
#[derive(Clone)]
pub(crate) struct Trace {
    observer: Arc<dyn Observer>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The traced processes.
    live: BTreeSet<i32>,
    /// System calls that are in no list.
    unknown: BTreeSet<c_long>,
}

impl Trace {
    pub(crate) fn new(observer: Arc<dyn Observer>) -> Trace {
        Trace { observer, state: Arc::default() }
    }

    /// The traced processes.
    pub(crate) fn live(&self) -> BTreeSet<i32> {
        self.with(|state| state.live.clone())
    }

    /// Kills every traced process. A traced one cannot be stopped first by a signal, so one may still see the death of another and start it
    /// again, which is then killed, too.
    pub(crate) fn end(&self) -> Result<()> {
        let gone = try_every(END_POLL, END, || {
            let live = self.live();
            for process in &live {
                let _ = kill(Pid::from_raw(*process), Signal::SIGKILL);
            }
            live.is_empty().then_some(())
        });
        gone.with_context(|| format!("cannot kill the traced processes {:?}; end them by hand", self.live()))
    }

    /// Fails if a system call is in no list, so that it is unknown whether it changes anything.
    pub(crate) fn check(&self) -> Result<()> {
        let unknown = self.with(|state| state.unknown.clone());
        ensure!(
            unknown.is_empty(),
            "cannot tell whether these system calls change anything; add them to trace/syscalls.rs: {unknown:?}"
        );
        Ok(())
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs a command traced, with all its children; returns its exit code. The tracer keeps tracing the children.
    pub(crate) fn run(&self, command: &[String], environment: &[(String, String)]) -> Result<i32> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let trace = self.clone();
        let command = command.to_vec();
        let environment = environment.to_vec();
        let _tracer: JoinHandle<()> = std::thread::spawn(move || {
            let mut tracer = Tracer { trace, processes: BTreeMap::new() };
            let outcome = tracer.begin(&command, &environment);
            let first = match outcome {
                Ok(first) => first,
                Err(error) => return drop(sender.send(Err(error))),
            };
            if let Err(error) = tracer.follow(first, &|code| drop(sender.send(Ok(code)))) {
                let _ = sender.send(Err(error));
            }
        });
        receiver.recv().context("the tracer has ended")?
    }
}

/// One thread's tracees. Only the thread that traces a process may ask about it.
struct Tracer {
    trace: Trace,
    /// By thread.
    processes: BTreeMap<i32, Traced>,
}

#[derive(Clone)]
struct Traced {
    process: i32,
    role: String,
    /// The call that the thread is in.
    pending: Option<Arc<Call>>,
}

impl Tracer {
    /// Starts the command, stopped and traced.
    fn begin(&mut self, command: &[String], environment: &[(String, String)]) -> Result<Pid> {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "kill -STOP $$; exec \"$0\" \"$@\""]).args(command);
        shell.envs(environment.iter().map(|(name, value)| (name, value)));
        shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = shell.spawn().context("cannot start a shell")?;
        let pid = Pid::from_raw(child.id() as i32);
        let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).context("cannot wait for a shell")?;
        ensure!(matches!(stopped, WaitStatus::Stopped(..)), "the shell did not stop: {stopped:?}");
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_EXITKILL;
        ptrace::seize(pid, options).context("cannot trace a process")?;
        self.processes.insert(pid.as_raw(), Traced { process: pid.as_raw(), role: "shell".to_owned(), pending: None });
        self.trace.with(|state| state.live.insert(pid.as_raw()));
        kill(pid, Signal::SIGCONT).context("cannot continue a process")?;
        Ok(pid)
    }

    /// Goes on until no process is left; `ended` gets the first one's exit code.
    fn follow(&mut self, first: Pid, ended: &dyn Fn(i32)) -> Result<()> {
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
                Ok(status) => status,
                Err(Errno::ECHILD) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => bail!("cannot wait for traced processes: {error}"),
            };
            match status {
                WaitStatus::Exited(pid, code) => {
                    self.forget(pid);
                    if pid == first {
                        ended(code);
                    }
                }
                WaitStatus::Signaled(pid, signal, _) => {
                    self.forget(pid);
                    if pid == first {
                        ended(128 + signal as i32);
                    }
                }
                WaitStatus::PtraceSyscall(pid) => {
                    self.at_system_call(pid);
                    resume(pid, None);
                }
                WaitStatus::PtraceEvent(pid, _, libc::PTRACE_EVENT_EXEC) => {
                    if self.runs_ours(pid) {
                        resume(pid, None);
                    } else {
                        self.forget(pid);
                        let _ = ptrace::detach(pid, None);
                    }
                }
                WaitStatus::PtraceEvent(pid, _, EVENT_STOP) => {
                    self.learn(pid);
                    resume(pid, None);
                }
                WaitStatus::PtraceEvent(pid, _, _) => resume(pid, None),
                WaitStatus::Stopped(pid, signal) => resume(pid, Some(signal)),
                WaitStatus::Continued(_) | WaitStatus::StillAlive => (),
            }
        }
    }

    fn forget(&mut self, thread: Pid) {
        let Some(traced) = self.processes.remove(&thread.as_raw()) else { return };
        if !self.processes.values().any(|other| other.process == traced.process) {
            self.trace.with(|state| state.live.remove(&traced.process));
        }
    }

    /// Takes in a thread or a process that was not seen before.
    fn learn(&mut self, thread: Pid) -> Option<Traced> {
        if let Some(known) = self.processes.get(&thread.as_raw()) {
            return Some(known.clone());
        }
        let (process, parent) = status_of(thread)?;
        let of = |pid: i32| self.processes.values().find(|known| known.process == pid).map(|known| known.role.clone());
        let role =
            of(process).or_else(|| of(parent).map(|role| format!("{role}'s child"))).unwrap_or_else(|| "?".to_owned());
        let traced = Traced { process, role, pending: None };
        self.processes.insert(thread.as_raw(), traced.clone());
        self.trace.with(|state| state.live.insert(process));
        Some(traced)
    }

    /// Whether a process that has just begun a program runs one of ours: the roles, the installer, `control`, or the shell that starts them.
    fn runs_ours(&mut self, pid: Pid) -> bool {
        let Some(traced) = self.learn(pid) else { return true };
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let name = program.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.starts_with("aops") {
            return traced.role == "shell";
        }
        let role = role_of(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default());
        self.processes.insert(pid.as_raw(), Traced { role, ..traced });
        true
    }

    /// A thread is about to make a system call, or has made one.
    fn at_system_call(&mut self, thread: Pid) {
        let Ok(info) = ptrace::syscall_info(thread) else { return };
        match info.op {
            ENTRY => self.enters(thread),
            EXIT => {
                let pending = self.processes.get_mut(&thread.as_raw()).and_then(|traced| traced.pending.take());
                let Some(call) = pending else { return };
                let Ok(registers) = ptrace::getregs(thread) else { return };
                self.trace.observer.after(&call, registers.rax as i64 >= 0, &self.trace);
            }
            _ => {}
        }
    }

    fn enters(&mut self, thread: Pid) {
        let Ok(registers) = ptrace::getregs(thread) else { return };
        let number = registers.orig_rax as c_long;
        let arguments = [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9];
        let Some(traced) = self.learn(thread) else { return };
        if traced.role == "shell" {
            return;
        }
        let Some(kind) = syscalls::kind(number) else {
            self.trace.with(|state| state.unknown.insert(number));
            return;
        };
        let Some(change) = call::change(thread, kind, number, &arguments) else { return };
        let Traced { process, role, .. } = traced;
        let call = Call { role, process, thread: thread.as_raw(), name: syscalls::name(number), change };
        self.trace.observer.before(&call, &self.trace);
        if let Some(traced) = self.processes.get_mut(&thread.as_raw()) {
            traced.pending = Some(Arc::new(call));
        }
    }
}

fn resume(pid: Pid, signal: Option<Signal>) {
    // It may have been killed meanwhile.
    let _ = ptrace::syscall(pid, signal);
}

/// Process and parent of a thread.
fn status_of(thread: Pid) -> Option<(i32, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let field =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).and_then(|value| value.trim().parse().ok());
    Some((field("Tgid:")?, field("PPid:")?))
}

/// The role of a command line of aops: its subcommand, or its name.
fn role_of(command_line: &[u8]) -> String {
    let words: Vec<_> =
        command_line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let name = words.first().and_then(|word| word.rsplit('/').next()).unwrap_or_default();
    let roles = ["spm", "spa", "install", "control", "service"];
    let by_name = roles.iter().find(|role| name.ends_with(*role));
    let by_word = || roles.iter().find(|role| words.iter().skip(1).any(|word| word == *role));
    let flags: Vec<_> =
        words.iter().skip(1).filter(|word| word.starts_with("--") && !word.contains('=')).cloned().collect();
    let role = by_name.or_else(by_word).map_or_else(|| name.to_owned(), |role| (*role).to_owned());
    // A one-shot of a role is named by its first flag.
    match flags.first().filter(|flag| !matches!(flag.as_str(), "--home" | "--service" | "--foreground")) {
        Some(flag) if role == "spm" || role == "spa" => format!("{role} {flag}"),
        _ => role,
    }
}
