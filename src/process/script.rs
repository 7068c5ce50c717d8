//! Sub-agents of the older kind: a package with an executable `control` at its root, which is asked to `start`, `stop` and tell its
//! `status` (`started` or `stoped`, spelled so).
//!
//! The script puts the program into the background itself. Its process is the one that `control pid` names or a pid file of the release,
//! where that is known to be its own ([`claim`]), else the oldest one that is held or marked. What is not seen is not taken for what is not
//! there: before a start that finds nothing, and at a stop that does, the script is asked whether its program runs.

use std::fs::File;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use super::launch::{self, StartSpec};
use super::record::{self, ProcessRecord, RecordHead};
use super::tree::{self, StopTarget};
use super::{claim, pid_file};
use crate::command::{self, unless_busy};
use crate::core::manifest::{CONTROL_SCRIPT, StopSignal};
use crate::core::model::{AgentName, Version};
use crate::core::program::Program;
use crate::home::Home;
use crate::installation;
use crate::platform::{self, Launch, ProcessInfo};

/// A script that takes longer is ended and counts as failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// After `control start` its process must be there by then.
const APPEARS: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);
/// An ended process's remains are gone after this, where somebody clears them away.
const REMAINS: Duration = Duration::from_secs(2);
/// So many numbers of what `control pid` says are looked at.
const MAX_PIDS: usize = 16;

/// What `control status` said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScriptStatus {
    Started,
    Stopped,
    /// Something else, or nothing.
    Unclear,
}

/// What is there of a sub-agent before its script is told to start it.
#[derive(Debug)]
pub enum ScriptFindings {
    /// Nothing, as far as can be known.
    Down,
    /// Its process runs, as it is to run.
    Up(ProcessRecord),
    /// A process of it runs that may be of another release or have another environment.
    Other(ProcessRecord),
}

/// `control start` was run and ended well, and no process of it is known. Its record stays, and says so: what comes up late is known by it, and
/// what never can be seen is not started a second time.
#[derive(Debug)]
pub struct UnseenProgram(String);

impl std::fmt::Display for UnseenProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UnseenProgram {}

/// Looks what runs of a sub-agent of which nothing is seen, by asking its script.
pub async fn standing(start: &StartSpec) -> Result<ScriptFindings> {
    if !matches!(status(start).await, Ok(ScriptStatus::Started)) {
        return Ok(ScriptFindings::Down);
    }
    // The newest: its script's, where no process of it was found in time.
    let last = record::of(&start.home, &start.name).filter(|last| {
        let head = start.head();
        last.is_of_this_boot() && last.head.version == head.version && last.head.env_hash == head.env_hash
    });
    match named(start, &told_pids(start).await, last.as_ref().map(|last| last.start_time)) {
        NamedProcess::Own(process) => {
            let mut record = start.record_of(&process);
            let since = last.filter(|last| process.start_time >= last.start_time);
            let Some(last) = since else { return Ok(ScriptFindings::Other(record)) };
            record.session = own_session(&start.home, &process, last.start_time);
            record.save(&start.home);
            Ok(ScriptFindings::Up(record))
        }
        NamedProcess::Nobody if last.as_ref().is_some_and(|last| last.head.unseen) => {
            let why = "its `control status` says that it is started, but `control pid` does not name its process, and none is found: it is \
                       not started a second time. Stop it with its own script, and have the script answer `pid`";
            Err(UnseenProgram(why.to_owned()).into())
        }
        // What ran of it is known to be dead, or was never started; or its script goes by a number that is somebody else's now.
        NamedProcess::Another | NamedProcess::Nobody => Ok(ScriptFindings::Down),
    }
}

/// Runs `control start` in the sub-agent's group, its output into `output`, and finds the process that it started, whose record is written.
/// Until then the record names the script itself: a manager that comes in between goes on from there.
pub async fn start(start: &StartSpec, output: File) -> Result<ProcessRecord> {
    let mut command = start.command(CONTROL_SCRIPT, None)?;
    command.arg("start");
    let of_script = run(start, &command, output).await?;
    let deadline = Instant::now() + APPEARS;
    loop {
        if let Some(process) = find(start, &of_script, Some(of_script.start_time)).await {
            let session = own_session(&start.home, &process, of_script.start_time);
            let record = ProcessRecord { session, ..start.record_of(&process) };
            record.save(&start.home);
            return Ok(record);
        }
        if Instant::now() >= deadline {
            let why =
                format!("`control start` ended well, but {APPEARS:?} later no process of it is there; see its log");
            return Err(UnseenProgram(why).into());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Clears away what would make a script believe that its program runs, when nothing of it does: such scripts look by `kill -0` for the
/// number in a file of theirs. That finds the remains of a killed process, for which we wait, and after a power cut or a reboot whoever
/// has the number now: a file that was written before that process began is removed. Blocks.
pub fn forget(start: &StartSpec, last: Option<&ProcessRecord>) {
    let deadline = Instant::now() + REMAINS;
    while last.is_some_and(|last| platform::remains(last.pid)) && Instant::now() < deadline {
        platform::pause(LOOK);
    }
    for file in pid_file::all(&start.directory()) {
        let names_it = match platform::seen(file.pid, start.home.root()) {
            Some(process) if process.pid == 1 => false,
            Some(process) => file.is_of(&process, SystemTime::now()) || claim::own(start, file.pid, None).is_some(),
            None => false,
        };
        if !names_it {
            let (path, pid) = (file.path.display(), file.pid);
            tracing::info!(agent = %start.name, path = %path, pid, "a pid file that names nobody of its sub-agent is removed");
            if let Err(error) = std::fs::remove_file(&file.path) {
                tracing::warn!(agent = %start.name, error = %error, "it cannot be removed");
            }
        }
    }
}

/// The main process: the one that its script names, if it is one of the sub-agent's, else the oldest of those that are seen. `last`: of the
/// script, or of the main process before; the one on disk may be older. `since`: when `control start` was run, if that was just now.
pub async fn find(start: &StartSpec, last: &ProcessRecord, since: Option<u64>) -> Option<ProcessInfo> {
    let target = StopTarget::of(&start.name, Some(last.clone()), start.groups.as_ref());
    // A program that moved out of its group is still told by its mark.
    let target = if target.groups_are_empty() { target.scattered() } else { target };
    let members = tree::members(&start.home, &target);
    if let [only] = members.as_slice() {
        return Some(only.clone());
    }
    let told = told_pids(start).await;
    let member = members.iter().find(|process| told.contains(&process.pid)).cloned();
    if member.is_some() {
        return member;
    }
    match named(start, &told, since) {
        NamedProcess::Own(process) => Some(process),
        NamedProcess::Another | NamedProcess::Nobody => members.into_iter().next(),
    }
}

/// Whom a script means.
#[derive(Debug)]
enum NamedProcess {
    /// A process of its own.
    Own(ProcessInfo),
    /// A process that is none of its own, or one that is gone.
    Another,
    /// It does not say.
    Nobody,
}

/// Whom a script means by the numbers that it told, or else by its pid files.
fn named(start: &StartSpec, told: &[u32], since: Option<u64>) -> NamedProcess {
    let in_files: Vec<u32> = pid_file::all(&start.directory()).into_iter().map(|file| file.pid).collect();
    let mut numbers = told.iter().chain(&in_files).copied();
    match numbers.clone().find_map(|pid| claim::own(start, pid, since)) {
        Some(process) => NamedProcess::Own(process),
        None if numbers.next().is_some() => NamedProcess::Another,
        None => NamedProcess::Nobody,
    }
}

/// The session of a process that another began which is its own, too: nobody lives in it who was there before its script was run.
fn own_session(home: &Home, process: &ProcessInfo, since: u64) -> Option<u32> {
    if process.session == process.pid {
        return None;
    }
    let processes = platform::processes(home.root());
    let mut others = processes.iter().filter(|other| other.session == process.session);
    let is_own = others.all(|other| other.start_time >= since && !tree::is_role(home, other.pid));
    is_own.then_some(process.session)
}

async fn told_pids(start: &StartSpec) -> Vec<u32> {
    match ask(start, "pid").await {
        Ok(output) if output.status.success() => numbers(&String::from_utf8_lossy(&output.stdout)),
        _ => vec![],
    }
}

fn numbers(said: &str) -> Vec<u32> {
    said.split_whitespace().filter_map(|word| word.parse().ok()).take(MAX_PIDS).collect()
}

/// Asks `control status`.
pub async fn status(start: &StartSpec) -> Result<ScriptStatus> {
    let output = ask(start, "status").await?;
    Ok(said(&String::from_utf8_lossy(&output.stdout)))
}

/// What a status means.
pub fn said(status: &str) -> ScriptStatus {
    let says = |words: &[&str]| status.split_whitespace().any(|word| words.contains(&word));
    match () {
        () if says(&["stoped", "stopped"]) => ScriptStatus::Stopped,
        () if says(&["started"]) => ScriptStatus::Started,
        () => ScriptStatus::Unclear,
    }
}

async fn ask(start: &StartSpec, verb: &str) -> Result<Output> {
    let mut command = tokio::process::Command::from(question(start, verb)?);
    command.stdout(Stdio::piped());
    let child = command.kill_on_drop(true).spawn().with_context(|| format!("cannot run `control {verb}`"))?;
    match tokio::time::timeout(TIMEOUT, child.wait_with_output()).await {
        Ok(output) => Ok(output?),
        Err(_) => bail!("`control {verb}` did not answer within {TIMEOUT:?}"),
    }
}

fn question(start: &StartSpec, verb: &str) -> Result<Command> {
    let mut command = start.command_with_output(CONTROL_SCRIPT, None)?;
    // Only the program itself is a member; a question must not look like one.
    command.arg(verb).env_remove("AOPS_AGENT_NAME");
    platform::leave_caller(&mut command);
    Ok(command)
}

/// Runs `control start` to its end and gives the record of the script.
async fn run(start: &StartSpec, command: &Command, output: File) -> Result<ProcessRecord> {
    let head = RecordHead { unseen: true, ..start.head() };
    let launch = Launch {
        record: start.home.process_record(&start.name),
        head: head.text_before_pid()?,
        user: None,
        output,
        group: start.group(),
    };
    let started = unless_busy(|| platform::launch(command, &launch)).await;
    let mut child = started.context("cannot run its `control` script")?;
    let status = match tokio::time::timeout(TIMEOUT, child.wait()).await {
        Ok(status) => status?,
        Err(_) => {
            platform::signal(child.pid, child.start_time, StopSignal::Kill)?;
            child.wait().await?;
            bail!("`control start` did not end within {TIMEOUT:?}; a script puts its program into the background")
        }
    };
    if !status.success() {
        bail!("`control start` {}; see its log", platform::how_it_ended(status));
    }
    let group = start.entered(&launch, &child);
    Ok(ProcessRecord { head, pid: child.pid, start_time: child.start_time, group, session: None, ended: None })
}

/// Asks `control stop` and waits for it; what it leaves is the caller's to end. Of a sub-agent of which nothing is seen the script is asked
/// first whether it runs, and by which process, which the target is told. Blocks.
///
/// # Errors
///
/// Where the script says that its program runs, nothing of that is seen, and it says so still when it was told to stop it.
pub fn stop(home: &Home, target: &mut StopTarget) -> Result<()> {
    let Some(start) = target.script_to_ask().and_then(|version| for_stop(home, &target.name, version)) else {
        return Ok(());
    };
    let mut members = tree::members(home, target);
    let mut is_unseen = false;
    if members.is_empty() {
        if says_started(&start) {
            let last = record::of(home, &target.name).filter(ProcessRecord::is_of_this_boot);
            match named(&start, &told_now(&start), last.as_ref().map(|last| last.start_time)) {
                NamedProcess::Own(process) => {
                    target.claim(&process);
                    members = tree::members(home, target);
                }
                NamedProcess::Another => {
                    tracing::warn!(agent = %target.name, "its script names a process that is not its own, and is not told to stop that");
                    return Ok(());
                }
                // Some say that whatever there is.
                NamedProcess::Nobody => is_unseen = last.is_some_and(|last| last.head.unseen),
            }
        } else if target.record.is_none() {
            // What was recorded is asked to stop in any case: what it left may be its script's to clear away.
            return Ok(());
        }
    }
    // What they started is known by them, and by nothing else when they are gone.
    if target.is_scattered() {
        members.iter().for_each(|process| target.claim(process));
    }
    let stopped = question(&start, "stop").and_then(|mut command| {
        let mut child = command.spawn()?;
        let deadline = Instant::now() + TIMEOUT;
        while child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                child.kill()?;
                child.wait()?;
                bail!("it did not end within {TIMEOUT:?}");
            }
            platform::pause(LOOK);
        }
        Ok(())
    });
    if let Err(error) = stopped {
        tracing::warn!(agent = %target.name, error = format!("{error:#}"), "`control stop` failed; the sub-agent is stopped by signal");
        if let Some(record) = &target.record {
            let _ = platform::signal(record.pid, record.start_time, StopSignal::Term);
        }
    }
    if is_unseen && says_started(&start) {
        bail!(
            "cannot stop sub-agent {}: `{} status` says that it is started, but its process cannot be found; end it by hand, or remove {} \
             if nothing of it runs",
            target.name,
            start.directory().join(CONTROL_SCRIPT).display(),
            home.agent(&target.name).display()
        );
    }
    Ok(())
}

/// The sub-agents of a home whose active release has a `control` script.
pub fn installed(home: &Home) -> Vec<(AgentName, Version)> {
    let names = std::fs::read_dir(home.agents()).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().to_str()?.parse::<AgentName>().ok());
    let of_script = |name: AgentName| {
        let version: Version = platform::read_current(&home.current(&name)).ok()??.parse().ok()?;
        let program = launch::inspect(home, &name, &version).ok()?;
        matches!(program, Program::Script).then_some((name, version))
    };
    names.filter_map(of_script).collect()
}

fn says_started(start: &StartSpec) -> bool {
    let answer = question(start, "status").and_then(|mut command| command::run(&mut command, TIMEOUT));
    answer.is_ok_and(|answer| said(&answer.stdout) == ScriptStatus::Started)
}

fn told_now(start: &StartSpec) -> Vec<u32> {
    match question(start, "pid").and_then(|mut command| command::run(&mut command, TIMEOUT)) {
        Ok(answer) if answer.status.success() => numbers(&answer.stdout),
        _ => vec![],
    }
}

fn for_stop(home: &Home, name: &AgentName, version: &Version) -> Option<StartSpec> {
    let agent_id = installation::agent_id(home).ok()??;
    Some(StartSpec {
        home: home.clone(),
        name: name.clone(),
        version: version.clone(),
        program: Program::Script,
        spec: Default::default(),
        agent_id,
        endpoint: String::new(),
        restarts: 0,
        groups: super::groups(home),
    })
}
