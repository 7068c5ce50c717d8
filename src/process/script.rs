//! Sub-agents of the older kind: a package with an executable `control` at its root, which is asked to `start`, `stop` and tell its
//! `status` (`started` or `stoped`, spelled so).
//!
//! The script puts the program into the background itself; its process is found by `control pid` where that is known, else as the oldest
//! process that bears the mark.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::launch::Start;
use super::record::Record;
use super::tree::{self, Target};
use crate::command::unless_busy;
use crate::core::manifest::{CONTROL_SCRIPT, StopSignal};
use crate::core::program::Program;
use crate::home::Home;
use crate::platform::{self, Launch, Seen};
use crate::{installation, store};

/// A script that takes longer is ended and counts as failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// After `control start` its process must be there by then.
const APPEARS: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);
/// An ended process's remains are gone after this, where somebody clears them away.
const REMAINS: Duration = Duration::from_secs(2);
/// Pid files are looked for so deep in a release, and are no larger.
const PID_FILE_DEPTH: u32 = 3;
const MAX_PID_FILE_BYTES: u64 = 32;

/// What `control status` said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    Started,
    Stopped,
    /// Something else, or nothing.
    Unclear,
}

/// Runs `control start` in the sub-agent's group, its output into `output`, and finds the process that it started, whose record is written.
/// Until then the record names the script itself: a manager that comes in between goes on from there.
pub async fn start(start: &Start, output: File) -> Result<Record> {
    let mut command = start.command(CONTROL_SCRIPT, None)?;
    command.arg("start");
    let of_script = run(start, &command, output).await?;
    let deadline = Instant::now() + APPEARS;
    loop {
        if let Some(process) = find(start, &of_script).await {
            let record = Record { pid: process.pid, start_time: process.start_time, ..of_script };
            record.save(&start.home);
            return Ok(record);
        }
        if Instant::now() >= deadline {
            bail!("`control start` ended well, but {APPEARS:?} later no process of it is there; see its log");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Clears away what would make a script believe that its program runs, when nothing of it does: such scripts look by `kill -0` for the
/// number in a file of theirs. That finds the remains of a killed process, for which we wait, and after a power cut or a reboot whoever
/// has the number now: such a file is removed. Blocks.
pub fn forget(start: &Start, last: Option<&Record>) {
    let deadline = Instant::now() + REMAINS;
    while last.is_some_and(|last| platform::remains(last.pid)) && Instant::now() < deadline {
        platform::pause(LOOK);
    }
    for (path, pid) in pid_files(&start.directory(), PID_FILE_DEPTH) {
        if !runs_from(&start.home.agent(&start.name), pid) {
            tracing::info!(agent = %start.name, path = %path.display(), pid, "a pid file that names nobody of its sub-agent is removed");
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(agent = %start.name, error = %error, "it cannot be removed");
            }
        }
    }
}

/// The files named like `pid`, `app.pid` or `app_pid` that hold a number and nothing else.
fn pid_files(directory: &Path, depth: u32) -> Vec<(PathBuf, u32)> {
    let mut found = vec![];
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() && depth > 1 {
            found.extend(pid_files(&path, depth - 1));
        } else if metadata.is_file()
            && metadata.len() <= MAX_PID_FILE_BYTES
            && entry.file_name().to_str().is_some_and(|name| name.ends_with("pid"))
            && let Some(pid) = number_in(&path)
        {
            found.push((path, pid));
        }
    }
    found
}

fn number_in(path: &Path) -> Option<u32> {
    let text = store::read(path, MAX_PID_FILE_BYTES).ok()??;
    std::str::from_utf8(&text).ok()?.trim().parse().ok()
}

/// Whether a live process has to do with a sub-agent by where it works or what it runs, though it may bear no mark.
fn runs_from(directory: &Path, pid: u32) -> bool {
    !platform::remains(pid)
        && platform::working_directory(pid)
            .into_iter()
            .chain(platform::executable_of(pid))
            .chain(platform::first_words(pid, 2))
            .any(|path| path.starts_with(directory))
}

/// The main process: the one that `control pid` names, if it is one of the sub-agent's, else the oldest of those. `last`: of the script, or
/// of the main process before; the one on disk may be older.
pub async fn find(start: &Start, last: &Record) -> Option<Seen> {
    let target = Target::of(&start.name, Some(last.clone()), start.groups.as_ref());
    // A program that moved out of its group is still told by its mark.
    let target = if target.groups_are_empty() { target.scattered() } else { target };
    let members = tree::members(&start.home, &target);
    let told = match members.len() {
        0 => return None,
        1 => None,
        _ => told_pid(start).await,
    };
    members.iter().find(|process| Some(process.pid) == told).or(members.first()).cloned()
}

async fn told_pid(start: &Start) -> Option<u32> {
    let output = ask(start, "pid").await.ok().filter(|output| output.status.success())?;
    String::from_utf8_lossy(&output.stdout).split_whitespace().find_map(|word| word.parse().ok())
}

/// Asks `control status`.
pub async fn status(start: &Start) -> Result<Said> {
    let output = ask(start, "status").await?;
    Ok(said(&String::from_utf8_lossy(&output.stdout)))
}

/// What a status means.
pub fn said(status: &str) -> Said {
    let says = |words: &[&str]| status.split_whitespace().any(|word| words.contains(&word));
    match () {
        () if says(&["stoped", "stopped"]) => Said::Stopped,
        () if says(&["started"]) => Said::Started,
        () => Said::Unclear,
    }
}

async fn ask(start: &Start, verb: &str) -> Result<Output> {
    let mut command = start.command_with_output(CONTROL_SCRIPT, None)?;
    command.arg(verb).stdout(Stdio::piped());
    // Only the program itself is a member; a question must not look like one.
    command.env_remove("AOPS_AGENT_NAME");
    let mut command = tokio::process::Command::from(command);
    let child = command.kill_on_drop(true).spawn().with_context(|| format!("cannot run `control {verb}`"))?;
    match tokio::time::timeout(TIMEOUT, child.wait_with_output()).await {
        Ok(output) => Ok(output?),
        Err(_) => bail!("`control {verb}` did not answer within {TIMEOUT:?}"),
    }
}

/// Runs `control start` to its end and gives the record of the script.
async fn run(start: &Start, command: &Command, output: File) -> Result<Record> {
    let head = start.head();
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
    Ok(Record { head, pid: child.pid, start_time: child.start_time, group, ended: None })
}

/// Asks `control stop` of a recorded sub-agent and waits for it; what it leaves is the caller's to end. Blocks.
pub fn stop(home: &Home, record: &Record) {
    let head = &record.head;
    let Some(start) = for_stop(home, record) else { return };
    let stopped = || -> Result<()> {
        let mut command = start.command_with_output(CONTROL_SCRIPT, None)?;
        command.arg("stop").env_remove("AOPS_AGENT_NAME");
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
    };
    if let Err(error) = stopped() {
        tracing::warn!(agent = %head.name, error = format!("{error:#}"), "`control stop` failed; the sub-agent is stopped by signal");
        let _ = platform::signal(record.pid, record.start_time, StopSignal::Term);
    }
}

fn for_stop(home: &Home, record: &Record) -> Option<Start> {
    let agent_id = installation::agent_id(home).ok()??;
    Some(Start {
        home: home.clone(),
        name: record.head.name.clone(),
        version: record.head.version.clone(),
        program: Program::Script,
        spec: Default::default(),
        agent_id,
        endpoint: String::new(),
        restarts: record.head.restarts,
        groups: None,
    })
}
