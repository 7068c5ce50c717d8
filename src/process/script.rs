//! Sub-agents of the older kind: a package with an executable `control` at its root, which is run with `start`, `stop` and `status` (prints
//! `started` or `stoped`, spelled like this).
//!
//! The script puts the program into the background itself. The program's process is the one that `control pid` or a pid file of the release
//! names, if it is verified to be the sub-agent's ([`claim`]); else the oldest one in its group or with its marker. A program whose process
//! is not found may still run: before a start that finds nothing, and at a stop that finds nothing, the script is run with `status`.

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

/// A script that runs longer is killed and counts as failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for the program's process to appear after `control start`.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);
/// Timeout for a zombie to be reaped by its parent.
const REAP_TIMEOUT: Duration = Duration::from_secs(2);
/// Pids in the output of `control pid` that are checked.
const MAX_PIDS: usize = 16;

/// The result of `control status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScriptStatus {
    Started,
    Stopped,
    /// Any other output, or none.
    Unclear,
}

/// The state of a sub-agent before its script is run with `start`.
#[derive(Debug)]
pub enum ScriptFindings {
    /// It does not run, as far as is known.
    Down,
    /// Its process runs, with the right release and environment.
    Up(ProcessRecord),
    /// A process of it runs, perhaps of another release or with another environment.
    Other(ProcessRecord),
}

/// `control start` succeeded, but no process of it was found. Its record stays and says so: a process that appears later is found by it,
/// and a program that cannot be found is not started a second time.
#[derive(Debug)]
pub struct UnseenProgram(String);

impl std::fmt::Display for UnseenProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UnseenProgram {}

/// Runs the script's `status` to find out whether a sub-agent runs of which no process was found.
pub async fn probe(start: &StartSpec) -> Result<ScriptFindings> {
    if !matches!(status(start).await, Ok(ScriptStatus::Started)) {
        return Ok(ScriptFindings::Down);
    }
    // The most recent record: the script's, if no process was found in time.
    let last = record::of(&start.home, &start.name).filter(|last| {
        let head = start.head();
        last.is_of_this_boot() && last.head.version == head.version && last.head.env_hash == head.env_hash
    });
    match named_process(start, &reported_pids(start).await, last.as_ref().map(|last| last.start_time)) {
        NamedProcess::Own(process) => {
            let mut record = start.record_of(&process);
            let since = last.filter(|last| process.start_time >= last.start_time);
            let Some(last) = since else { return Ok(ScriptFindings::Other(record)) };
            record.session = own_session(&start.home, &process, last.start_time);
            record.save(&start.home);
            Ok(ScriptFindings::Up(record))
        }
        NamedProcess::Unnamed if last.as_ref().is_some_and(|last| last.head.unseen) => {
            let why = "its `control status` reports that it is started, but `control pid` does not print its pid, and no process of it \
                       is found, so it is not started a second time; stop it with its own script, and make the script support `pid`";
            Err(UnseenProgram(why.to_owned()).into())
        }
        // The previous process has exited, or there was none; or its script refers to a reused pid.
        NamedProcess::Another | NamedProcess::Unnamed => Ok(ScriptFindings::Down),
    }
}

/// Runs `control start` in the sub-agent's group, with its output to `output`, finds the process that it started, and writes its record.
/// Until then the record names the script itself, so that a new manager can continue from there.
pub async fn start(start: &StartSpec, output: File) -> Result<ProcessRecord> {
    let mut command = start.command(CONTROL_SCRIPT, None)?;
    command.arg("start");
    let of_script = run(start, &command, output).await?;
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    loop {
        if let Some(process) = find_main(start, &of_script, Some(of_script.start_time)).await {
            let session = own_session(&start.home, &process, of_script.start_time);
            let record = ProcessRecord { session, ..start.record_of(&process) };
            record.save(&start.home);
            return Ok(record);
        }
        if Instant::now() >= deadline {
            let why = format!(
                "`control start` exited with 0, but no process of it was found within {APPEAR_TIMEOUT:?}; see its log"
            );
            return Err(UnseenProgram(why).into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Removes leftovers that would make a script believe that its program runs, when no process of it does: such scripts check the pid in
/// their pid file with `kill -0`. That succeeds for a zombie, whose reaping is awaited, and after a power cut or a reboot for any process
/// that has the pid now: a pid file that was written before that process started is removed. Blocks.
pub fn remove_leftovers(start: &StartSpec, last: Option<&ProcessRecord>) {
    let deadline = Instant::now() + REAP_TIMEOUT;
    while last.is_some_and(|last| platform::is_zombie(last.pid)) && Instant::now() < deadline {
        platform::pause(POLL);
    }
    for file in pid_file::all(&start.directory()) {
        let names_it = match platform::process_info(file.pid, start.home.root()) {
            Some(process) if process.pid == 1 => false,
            Some(process) => file.is_of(&process, SystemTime::now()) || claim::own(start, file.pid, None).is_some(),
            None => false,
        };
        if !names_it {
            let (path, pid) = (file.path.display(), file.pid);
            tracing::info!(agent = %start.name, path = %path, pid, "removing a stale pid file of a sub-agent");
            if let Err(error) = std::fs::remove_file(&file.path) {
                tracing::warn!(agent = %start.name, error = %error, "cannot remove a stale pid file of a sub-agent");
            }
        }
    }
}

/// The main process: the one that the script names, if it is the sub-agent's own, else the oldest one that is found. `last`: the record of
/// the script or of the previous main process; the record on disk may be older. `since`: the start time of `control start`, if it was just
/// run.
pub async fn find_main(start: &StartSpec, last: &ProcessRecord, since: Option<u64>) -> Option<ProcessInfo> {
    let target = StopTarget::of(&start.name, Some(last.clone()), start.groups.as_ref());
    // A program that left its group is still found by its marker.
    let target = if target.groups_are_empty() { target.scattered() } else { target };
    let members = tree::members(&start.home, &target);
    if let [only] = members.as_slice() {
        return Some(only.clone());
    }
    let reported = reported_pids(start).await;
    let member = members.iter().find(|process| reported.contains(&process.pid)).cloned();
    if member.is_some() {
        return member;
    }
    match named_process(start, &reported, since) {
        NamedProcess::Own(process) => Some(process),
        NamedProcess::Another | NamedProcess::Unnamed => members.into_iter().next(),
    }
}

/// The process that a script refers to.
#[derive(Debug)]
enum NamedProcess {
    /// A process of the sub-agent.
    Own(ProcessInfo),
    /// A process of another program, or one that has exited.
    Another,
    /// The script names no pid.
    Unnamed,
}

/// The process that a script refers to, by the pids that it printed, or else by its pid files.
fn named_process(start: &StartSpec, reported: &[u32], since: Option<u64>) -> NamedProcess {
    let in_files: Vec<u32> = pid_file::all(&start.directory()).into_iter().map(|file| file.pid).collect();
    let mut numbers = reported.iter().chain(&in_files).copied();
    match numbers.clone().find_map(|pid| claim::own(start, pid, since)) {
        Some(process) => NamedProcess::Own(process),
        None if numbers.next().is_some() => NamedProcess::Another,
        None => NamedProcess::Unnamed,
    }
}

/// The session of a process, if another process started it but it belongs to the process: all of its members started after the script did.
fn own_session(home: &Home, process: &ProcessInfo, since: u64) -> Option<u32> {
    if process.session == process.pid {
        return None;
    }
    let processes = platform::processes(home.root());
    let mut others = processes.iter().filter(|other| other.session == process.session);
    let is_own = others.all(|other| other.start_time >= since && !tree::is_role(home, other.pid));
    is_own.then_some(process.session)
}

async fn reported_pids(start: &StartSpec) -> Vec<u32> {
    match run_verb(start, "pid").await {
        Ok(output) if output.status.success() => numbers(&String::from_utf8_lossy(&output.stdout)),
        _ => vec![],
    }
}

fn numbers(output: &str) -> Vec<u32> {
    output.split_whitespace().filter_map(|word| word.parse().ok()).take(MAX_PIDS).collect()
}

/// Runs `control status`.
pub async fn status(start: &StartSpec) -> Result<ScriptStatus> {
    let output = run_verb(start, "status").await?;
    Ok(parse_status(&String::from_utf8_lossy(&output.stdout)))
}

/// Parses the output of `control status`.
pub fn parse_status(status: &str) -> ScriptStatus {
    let has_word = |words: &[&str]| status.split_whitespace().any(|word| words.contains(&word));
    match () {
        () if has_word(&["stoped", "stopped"]) => ScriptStatus::Stopped,
        () if has_word(&["started"]) => ScriptStatus::Started,
        () => ScriptStatus::Unclear,
    }
}

async fn run_verb(start: &StartSpec, verb: &str) -> Result<Output> {
    let mut command = tokio::process::Command::from(verb_command(start, verb)?);
    command.stdout(Stdio::piped());
    let child = command.kill_on_drop(true).spawn().with_context(|| format!("cannot run `control {verb}`"))?;
    match tokio::time::timeout(TIMEOUT, child.wait_with_output()).await {
        Ok(output) => Ok(output?),
        Err(_) => bail!("`control {verb}` did not exit within {TIMEOUT:?}"),
    }
}

fn verb_command(start: &StartSpec, verb: &str) -> Result<Command> {
    let mut command = start.command_with_output(CONTROL_SCRIPT, None)?;
    // Only the program itself is a member; the script's own process must not look like one.
    command.arg(verb).env_remove("AOPS_AGENT_NAME");
    platform::detach_from_caller(&mut command);
    Ok(command)
}

/// Runs `control start` until it exits, and returns the script's record.
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
            bail!(
                "`control start` did not exit within {TIMEOUT:?}; the script must start its program in the background"
            )
        }
    };
    if !status.success() {
        bail!("`control start` {}; see its log", platform::describe_exit(status));
    }
    let group = start.entered(&launch, &child);
    Ok(ProcessRecord { head, pid: child.pid, start_time: child.start_time, group, session: None, ended: None })
}

/// Runs `control stop` and waits for it; the caller kills the remaining processes. If no process of the sub-agent is found, the script is
/// first run with `status` and `pid`, and the target claims the process that it names. Blocks.
///
/// # Errors
///
/// If the script reports that its program runs, no process of it is found, and the script still reports so after `control stop`.
pub fn stop(home: &Home, target: &mut StopTarget) -> Result<()> {
    let Some(start) = target.script_to_ask().and_then(|version| for_stop(home, &target.name, version)) else {
        return Ok(());
    };
    let mut members = tree::members(home, target);
    let mut is_unseen = false;
    if members.is_empty() {
        if reports_started(&start) {
            let last = record::of(home, &target.name).filter(ProcessRecord::is_of_this_boot);
            match named_process(&start, &reported_pids_blocking(&start), last.as_ref().map(|last| last.start_time)) {
                NamedProcess::Own(process) => {
                    target.claim(&process);
                    members = tree::members(home, target);
                }
                NamedProcess::Another => {
                    tracing::warn!(agent = %target.name, "not running `control stop`: the script names a process of another program");
                    return Ok(());
                }
                // Some scripts always report that.
                NamedProcess::Unnamed => is_unseen = last.is_some_and(|last| last.head.unseen),
            }
        } else if target.record.is_none() {
            // If there is a record, `stop` runs in any case: the script may have leftovers to clean up.
            return Ok(());
        }
    }
    // Their children are found through them, and in no other way once they have exited.
    if target.is_scattered() {
        members.iter().for_each(|process| target.claim(process));
    }
    let stopped = verb_command(&start, "stop").and_then(|mut command| {
        let mut child = command.spawn()?;
        let deadline = Instant::now() + TIMEOUT;
        while child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                child.kill()?;
                child.wait()?;
                bail!("it did not exit within {TIMEOUT:?}");
            }
            platform::pause(POLL);
        }
        Ok(())
    });
    if let Err(error) = stopped {
        tracing::warn!(agent = %target.name, error = format!("{error:#}"), "`control stop` failed; the sub-agent is stopped by signal");
        if let Some(record) = &target.record {
            let _ = platform::signal(record.pid, record.start_time, StopSignal::Term);
        }
    }
    if is_unseen && reports_started(&start) {
        bail!(
            "cannot stop sub-agent {}: `{} status` reports that it is started, but its process cannot be found; kill it by hand, or \
             remove {} if it does not run",
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

fn reports_started(start: &StartSpec) -> bool {
    let answer = verb_command(start, "status").and_then(|mut command| command::run(&mut command, TIMEOUT));
    answer.is_ok_and(|answer| parse_status(&answer.stdout) == ScriptStatus::Started)
}

fn reported_pids_blocking(start: &StartSpec) -> Vec<u32> {
    match verb_command(start, "pid").and_then(|mut command| command::run(&mut command, TIMEOUT)) {
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
