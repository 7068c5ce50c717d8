//! Stops the roles of a home at each of their steps, and kills a process at one of them.
//!
//! A tracer (ptrace) sees every system call of a process before the kernel carries it out, and follows its children. So nothing that the roles
//! do is missed, whichever thread or process does it. Sub-agents are let go when they run their own program. A process that is killed while it
//! is stopped before a call has done everything before that call and nothing of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::raw::{c_long, c_ulong};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::step::{Naming, Step};
use super::syscalls::{self, Kind};

/// `ptrace_syscall_info.op` at the entry of a system call.
const ENTRY: u8 = 1;
/// The event of a stop that a seized process makes of its own (PTRACE_EVENT_STOP).
const EVENT_STOP: i32 = 128;

/// Longer than the interval of heartbeats, whose answers make the host act.
const QUIET: Duration = Duration::from_secs(2);

/// What the tracers of one home share.
#[derive(Clone)]
pub(super) struct Watch {
    state: Arc<Mutex<State>>,
}

struct State {
    home: PathBuf,
    naming: Naming,
    /// Steps are counted, and one may be a process's last.
    is_armed: bool,
    target: Option<Target>,
    /// The steps since the watch was armed, in their order.
    steps: Vec<Step>,
    counts: BTreeMap<Step, u32>,
    /// When the last step came.
    last: Instant,
    killed: Option<Step>,
    /// The traced processes.
    live: BTreeSet<i32>,
    /// System calls that are in no list.
    unknown: BTreeSet<c_long>,
}

/// Which process is killed where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) step: Step,
    /// With every other process of the home but the sub-agents.
    pub(super) together: bool,
}

impl Watch {
    pub(super) fn new(home: &Path, naming: Naming) -> Watch {
        let state = State {
            home: home.to_owned(),
            naming,
            is_armed: false,
            target: None,
            steps: Vec::new(),
            counts: BTreeMap::new(),
            last: Instant::now(),
            killed: None,
            live: BTreeSet::new(),
            unknown: BTreeSet::new(),
        };
        Watch { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on steps are counted from the first, and the target's process is killed.
    pub(super) fn arm(&self, naming: Naming, target: Option<Target>) {
        let mut state = self.state();
        state.naming = naming;
        state.is_armed = true;
        state.target = target;
        state.steps.clear();
        state.counts.clear();
        state.last = Instant::now();
        state.killed = None;
    }

    /// Nothing is counted or killed any more; returns the steps that were seen.
    pub(super) fn disarm(&self) -> Vec<Step> {
        let mut state = self.state();
        state.is_armed = false;
        state.target = None;
        std::mem::take(&mut state.steps)
    }

    /// The step before which a process was killed.
    pub(super) fn killed(&self) -> Option<Step> {
        self.state().killed.clone()
    }

    /// Whether no step came for a while: an upgrade ends with steps that no status shows.
    pub(super) fn is_quiet(&self) -> bool {
        self.state().last.elapsed() > QUIET
    }

    pub(super) fn live(&self) -> usize {
        self.state().live.len()
    }

    /// Fails if a system call is in no list, so that it is unknown whether it is a step.
    pub(super) fn check(&self) -> Result<()> {
        let unknown = self.state().unknown.clone();
        ensure!(
            unknown.is_empty(),
            "cannot tell whether these system calls are steps; add them to syscalls.rs: {unknown:?}"
        );
        Ok(())
    }

    /// Runs a command traced, with all its children; returns its exit code. The tracer keeps tracing the children.
    pub(super) fn run(&self, command: &[String], environment: &[(String, String)]) -> Result<i32> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let watch = self.clone();
        let command = command.to_vec();
        let environment = environment.to_vec();
        let _tracer: JoinHandle<()> = std::thread::spawn(move || {
            let mut tracer = Tracer { watch, processes: BTreeMap::new() };
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
    watch: Watch,
    /// By thread.
    processes: BTreeMap<i32, Traced>,
}

#[derive(Clone)]
struct Traced {
    process: i32,
    role: String,
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
        self.processes.insert(pid.as_raw(), Traced { process: pid.as_raw(), role: "shell".to_owned() });
        self.watch.state().live.insert(pid.as_raw());
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
            self.watch.state().live.remove(&traced.process);
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
        let traced = Traced { process, role };
        self.processes.insert(thread.as_raw(), traced.clone());
        self.watch.state().live.insert(process);
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
        self.processes.insert(pid.as_raw(), Traced { process: traced.process, role });
        true
    }

    /// A thread is about to make a system call, or has made one.
    fn at_system_call(&mut self, thread: Pid) {
        if !ptrace::syscall_info(thread).is_ok_and(|info| info.op == ENTRY) {
            return;
        }
        let Ok(registers) = ptrace::getregs(thread) else { return };
        let number = registers.orig_rax as c_long;
        let arguments = [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9];
        let Some(traced) = self.learn(thread) else { return };
        if traced.role == "shell" {
            return;
        }
        let Some(kind) = syscalls::kind(number) else {
            self.watch.state().unknown.insert(number);
            return;
        };
        let Some(what) = subject(thread, kind, number, &arguments) else { return };
        let mut state = self.watch.state();
        if !state.is_armed {
            return;
        }
        let Some(step) = state.naming.step(&state.home, &traced.role, syscalls::name(number), &what) else { return };
        let count = state.counts.entry(step.clone()).or_default();
        *count += 1;
        let step = step.numbered(*count);
        if step.is_repetition() {
            return;
        }
        state.steps.push(step.clone());
        state.last = Instant::now();
        let Some(target) = state.target.clone().filter(|target| target.step == step) else { return };
        state.target = None;
        let victims: Vec<i32> =
            if target.together { state.live.iter().copied().collect() } else { vec![traced.process] };
        for victim in victims {
            let _ = kill(Pid::from_raw(victim), Signal::SIGKILL);
        }
        state.killed = Some(step);
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

/// What a call is about to change: a path, or a word for a process. `None` if it changes nothing that lasts.
fn subject(thread: Pid, kind: Kind, number: c_long, arguments: &[c_ulong; 6]) -> Option<String> {
    let descriptor = |index: usize| {
        let path = std::fs::read_link(format!("/proc/{thread}/fd/{}", arguments[index] as i32)).ok()?;
        path.is_absolute().then(|| path.display().to_string())
    };
    match kind {
        Kind::Harmless => None,
        Kind::Path(index) => Some(path(thread, None, arguments[index])),
        Kind::At(index) => Some(path(thread, Some(arguments[index]), arguments[index + 1])),
        Kind::Open => {
            let (directory, name, flags) = match number {
                libc::SYS_open => (None, arguments[0], arguments[1]),
                _ => (Some(arguments[0]), arguments[1], arguments[2]),
            };
            writes(flags).then(|| path(thread, directory, name))
        }
        Kind::Open2 => {
            let flags = number_at(thread, arguments[2])?;
            writes(flags).then(|| path(thread, Some(arguments[0]), arguments[1]))
        }
        Kind::Descriptor(index) | Kind::Sync(index) => descriptor(index),
        Kind::Clone => is_process(arguments[0]).then(|| "a process".to_owned()),
        Kind::Clone3 => is_process(number_at(thread, arguments[0])?).then(|| "a process".to_owned()),
        Kind::Fork => Some("a process".to_owned()),
        Kind::Execute(index) => Some(path(thread, None, arguments[index])),
        Kind::Signal => {
            let signal = if number == libc::SYS_tgkill { arguments[2] } else { arguments[1] };
            // Signal 0 asks whether a process is there.
            (signal != 0).then(|| format!("signal {signal}"))
        }
        Kind::Exit => Some("the process".to_owned()),
    }
}

fn writes(flags: c_ulong) -> bool {
    let flags = flags as i32;
    flags & libc::O_ACCMODE != libc::O_RDONLY || flags & (libc::O_CREAT | libc::O_TRUNC) != 0
}

fn is_process(flags: c_ulong) -> bool {
    flags & libc::CLONE_THREAD as c_ulong == 0
}

/// A path in a thread's memory, absolute.
fn path(thread: Pid, directory: Option<c_ulong>, address: c_ulong) -> String {
    let name = text_at(thread, address).unwrap_or_default();
    if name.starts_with('/') {
        return name;
    }
    let link = match directory.map(|descriptor| descriptor as i32) {
        None | Some(libc::AT_FDCWD) => format!("/proc/{thread}/cwd"),
        Some(descriptor) => format!("/proc/{thread}/fd/{descriptor}"),
    };
    std::fs::read_link(link).unwrap_or_default().join(name).display().to_string()
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
