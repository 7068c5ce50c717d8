//! Checks that run a program of the package: `exec`, and `control status`.
//!
//! Such a program leads a session and a process group of its own. Its environment has the sub-agent's marker and the check's, so it is not
//! part of the sub-agent, but is killed with it. Its exit is awaited by pid before it is reaped, so that its process group can be killed
//! safely. If the check is dropped, its program is killed.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use super::{CheckResult, failed, timed_out};
use crate::command::Busy;
use crate::core::manifest::{CONTROL_SCRIPT, StopSignal};
use crate::core::model::AgentName;
use crate::core::program::Program;
use crate::home::Home;
use crate::platform::{self, User};
use crate::process::launch::StartSpec;
use crate::process::script::{self, ScriptStatus};

/// Retry time while the program's file is open for writing in a forked child: the next check comes soon.
const BUSY: Duration = Duration::from_millis(200);
/// Time to read a script's output after it has exited: a background process may keep it open.
const READ_TIMEOUT: Duration = Duration::from_millis(200);
/// Bytes of a status that are read.
const MAX_STATUS: u64 = 4 << 10;
/// Timeout for killed processes to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// A running program of a check.
struct RunningCheck {
    child: Child,
    home: Home,
    agent: AgentName,
}

impl Drop for RunningCheck {
    fn drop(&mut self) {
        // Without a pid, it was already reaped.
        let Some(pid) = self.child.id() else { return };
        let start_time = platform::start_time(pid);
        platform::kill_group(pid);
        // Processes that left the process group are searched off the event loop. During its shutdown, only the process group is killed.
        if let (Some(start_time), Ok(runtime)) = (start_time, tokio::runtime::Handle::try_current()) {
            let (home, agent) = (self.home.clone(), self.agent.clone());
            drop(runtime.spawn_blocking(move || kill_all(&home, agent.as_str(), pid, start_time)));
        }
    }
}

/// Runs a program of the package; exit code 0 is healthy.
pub(super) async fn exec(start: StartSpec, words: &[String], timeout: Duration) -> Result<(), CheckResult> {
    let Some((program, arguments)) = words.split_first() else { return Ok(()) };
    let Program::Native(manifest) = &start.program else { return Ok(()) };
    let what = format!("cannot run {program}");
    let user = match &manifest.run.user {
        Some(name) => Some(platform::find_user(name).map_err(|error| failed(&what, &error))?),
        None => None,
    };
    let started = Instant::now();
    let mut check = spawn(&start, program, arguments, user, false).await?;
    match wait(&start, &mut check, started, timeout).await? {
        status if status.success() => Ok(()),
        status => Err(CheckResult::Unhealthy(format!("{program} {}", platform::describe_exit(status)))),
    }
}

/// Runs `control status`. An unknown status counts as healthy.
pub(super) async fn status(start: StartSpec, timeout: Duration) -> Result<(), CheckResult> {
    let started = Instant::now();
    let mut check = spawn(&start, CONTROL_SCRIPT, &["status".to_owned()], None, true).await?;
    let stdout = check.child.stdout.take();
    let mut text = vec![];
    let read = async {
        if let Some(stdout) = stdout {
            // Unreadable output counts as no output.
            let _ = stdout.take(MAX_STATUS).read_to_end(&mut text).await;
        }
    };
    {
        tokio::pin!(read);
        let end = wait(&start, &mut check, started, timeout);
        tokio::pin!(end);
        let is_read = tokio::select! {
            // Cancel-safe: both futures are pinned, and the other one is awaited below.
            () = &mut read => true,
            result = &mut end => {
                result?;
                false
            }
        };
        if is_read {
            end.await?;
        } else {
            let _ = tokio::time::timeout(READ_TIMEOUT, read).await;
        }
    }
    match script::parse_status(&String::from_utf8_lossy(&text)) {
        ScriptStatus::Stopped => Err(CheckResult::Gone("`control status` reports that it is stopped".to_owned())),
        ScriptStatus::Started | ScriptStatus::Unclear => Ok(()),
    }
}

async fn spawn(
    start: &StartSpec,
    program: &str,
    arguments: &[String],
    user: Option<User>,
    is_read: bool,
) -> Result<RunningCheck, CheckResult> {
    let what = format!("cannot run {program}");
    let busy = Busy::within(BUSY);
    loop {
        let mut command = start
            .command_with_output(program, user.as_ref())
            .map_err(|error| CheckResult::Unknown(format!("{what}: {error:#}")))?;
        command.args(arguments).env(platform::CHECK, "1").env_remove(platform::MAIN_ONLY);
        if is_read {
            command.stdout(Stdio::piped());
        }
        platform::detach_from_caller_as(&mut command, user.clone()).map_err(|error| failed(&what, &error))?;
        match Command::from(command).kill_on_drop(true).spawn() {
            Ok(child) => return Ok(RunningCheck { child, home: start.home.clone(), agent: start.name.clone() }),
            Err(error) => match busy.pause(&error) {
                Some(pause) => tokio::time::sleep(pause).await,
                None if platform::is_busy_text(&error) => {
                    return Err(CheckResult::Unknown(format!("{what}: its file is open for writing")));
                }
                None => return Err(failed(&what, &error)),
            },
        }
    }
}

/// Waits for the program to exit. At the timeout it is killed with everything that it started.
async fn wait(
    start: &StartSpec,
    check: &mut RunningCheck,
    started: Instant,
    timeout: Duration,
) -> Result<ExitStatus, CheckResult> {
    let child = &mut check.child;
    let mut answer = None;
    if let Some(pid) = child.id()
        && let Some(start_time) = platform::start_time(pid)
    {
        let rest = timeout.saturating_sub(started.elapsed());
        if tokio::time::timeout(rest, platform::ended(pid, start_time)).await.is_err() {
            answer = Some(timed_out(started, timeout));
            platform::kill_group(pid);
            let (home, name) = (start.home.clone(), start.name.clone());
            let kill = move || kill_all(&home, name.as_str(), pid, start_time);
            let _ = tokio::task::spawn_blocking(kill).await;
        }
    }
    if let (Some(pid), Program::Native(_)) = (child.id(), &start.program) {
        // Not for a script: its status may leave behind the program itself, which some scripts start if they do not find it.
        platform::kill_group(pid);
    }
    let status = child.wait().await.map_err(|error| failed("cannot wait for the check", &error))?;
    answer.map_or(Ok(status), Err)
}

/// Kills everything that a check started: its session, and processes with its marker. Blocks.
fn kill_all(home: &Home, agent: &str, pid: u32, start_time: u64) {
    let deadline = Instant::now() + KILL_TIMEOUT;
    loop {
        let mut left = platform::processes(home.root());
        // The pid may be reused by now, if the child was already reaped.
        let is_reused = left.iter().any(|process| process.pid == pid && process.start_time != start_time);
        left.retain(|process| {
            let is_check = process.marker.as_ref().is_some_and(|marker| marker.is_check && marker.name == agent);
            is_check || (process.session == pid && !is_reused)
        });
        if left.is_empty() || Instant::now() >= deadline {
            return;
        }
        for process in &left {
            let killed: io::Result<bool> = platform::signal(process.pid, process.start_time, StopSignal::Kill);
            if let Err(error) = killed {
                tracing::warn!(agent, pid = process.pid, error = %error, "cannot kill a process of a health check");
            }
        }
        platform::pause(POLL);
    }
}
