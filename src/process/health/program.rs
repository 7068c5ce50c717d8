//! Questions that a program of the package answers: `exec`, and `control status`.
//!
//! Such a program leads a session and a group of its own and bears the sub-agent's mark with another beside it, so that it is not taken
//! for the sub-agent, and yet ended with it. It is waited for by its number before it is reaped, so that what it left in its group can be
//! ended without hitting anybody else. Who loses interest in the answer drops the question, and its program is killed.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use super::{CheckResult, failed, late};
use crate::command::Busy;
use crate::core::manifest::{CONTROL_SCRIPT, StopSignal};
use crate::core::model::AgentName;
use crate::core::program::Program;
use crate::home::Home;
use crate::platform::{self, User};
use crate::process::launch::StartSpec;
use crate::process::script::{self, ScriptStatus};

/// How long a program is tried whose file is still being written by a forked child: a check is soon made again.
const BUSY: Duration = Duration::from_millis(200);
/// Once a script has ended, its output is read for so long: what it left in the background may hold it open.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Of a status, bytes.
const MAX_STATUS: u64 = 4 << 10;
/// For killed processes to be gone.
const GONE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);

/// A program that was asked.
struct RunningCheck {
    child: Child,
    home: Home,
    agent: AgentName,
}

impl Drop for RunningCheck {
    fn drop(&mut self) {
        // It was not waited for yet, or it would have no number any more.
        let Some(pid) = self.child.id() else { return };
        let start_time = platform::start_time(pid);
        platform::kill_group(pid);
        // What left its group is looked for beside the manager's loop; where that ends just now, the group has to do.
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
    let began = Instant::now();
    let mut asked = spawn(&start, program, arguments, user, false).await?;
    match ended(&start, &mut asked, began, timeout).await? {
        status if status.success() => Ok(()),
        status => Err(CheckResult::Unhealthy(format!("{program} {}", platform::how_it_ended(status)))),
    }
}

/// Asks `control status`. What it says that nobody understands is no reason to do anything.
pub(super) async fn status(start: StartSpec, timeout: Duration) -> Result<(), CheckResult> {
    let began = Instant::now();
    let mut asked = spawn(&start, CONTROL_SCRIPT, &["status".to_owned()], None, true).await?;
    let stdout = asked.child.stdout.take();
    let mut text = vec![];
    let read = async {
        if let Some(stdout) = stdout {
            // What cannot be read was not said.
            let _ = stdout.take(MAX_STATUS).read_to_end(&mut text).await;
        }
    };
    {
        tokio::pin!(read);
        let end = ended(&start, &mut asked, began, timeout);
        tokio::pin!(end);
        let is_read = tokio::select! {
            // Whichever comes first, the other is gone on with below.
            () = &mut read => true,
            result = &mut end => {
                result?;
                false
            }
        };
        if is_read {
            end.await?;
        } else {
            let _ = tokio::time::timeout(LAST_WORDS, read).await;
        }
    }
    match script::said(&String::from_utf8_lossy(&text)) {
        ScriptStatus::Stopped => Err(CheckResult::Gone("`control status` says that it is stopped".to_owned())),
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
        platform::leave_caller_as(&mut command, user.clone()).map_err(|error| failed(&what, &error))?;
        match Command::from(command).kill_on_drop(true).spawn() {
            Ok(child) => return Ok(RunningCheck { child, home: start.home.clone(), agent: start.name.clone() }),
            Err(error) => match busy.pause(&error) {
                Some(pause) => tokio::time::sleep(pause).await,
                None if platform::is_busy_text(&error) => {
                    return Err(CheckResult::Unknown(format!("{what}: its file is being written")));
                }
                None => return Err(failed(&what, &error)),
            },
        }
    }
}

/// Waits for the end of the program, of which nothing is left then: killed with all that it started when the time is over.
async fn ended(
    start: &StartSpec,
    asked: &mut RunningCheck,
    began: Instant,
    timeout: Duration,
) -> Result<ExitStatus, CheckResult> {
    let child = &mut asked.child;
    let mut answer = None;
    if let Some(pid) = child.id()
        && let Some(start_time) = platform::start_time(pid)
    {
        let rest = timeout.saturating_sub(began.elapsed());
        if tokio::time::timeout(rest, platform::ended(pid, start_time)).await.is_err() {
            answer = Some(late(began, timeout));
            platform::kill_group(pid);
            let (home, name) = (start.home.clone(), start.name.clone());
            let kill = move || kill_all(&home, name.as_str(), pid, start_time);
            let _ = tokio::task::spawn_blocking(kill).await;
        }
    }
    if let (Some(pid), Program::Native(_)) = (child.id(), &start.program) {
        // What a script's status leaves behind may be the very program, which some start where they do not find it.
        platform::kill_group(pid);
    }
    let status = child.wait().await.map_err(|error| failed("cannot wait for the check", &error))?;
    answer.map_or(Ok(status), Err)
}

/// Kills all that a check started: its session, and what bears its mark. Blocks.
fn kill_all(home: &Home, agent: &str, pid: u32, start_time: u64) {
    let deadline = Instant::now() + GONE;
    loop {
        let mut left = platform::processes(home.root());
        // Its number may be somebody else's by now, where nobody holds the child any more.
        let taken_over = left.iter().any(|process| process.pid == pid && process.start_time != start_time);
        left.retain(|process| {
            let asks = process.mark.as_ref().is_some_and(|mark| mark.is_check && mark.name == agent);
            asks || (process.session == pid && !taken_over)
        });
        if left.is_empty() || Instant::now() >= deadline {
            return;
        }
        for process in &left {
            let killed: io::Result<bool> = platform::signal(process.pid, process.start_time, StopSignal::Kill);
            if let Err(error) = killed {
                tracing::warn!(agent, pid = process.pid, error = %error, "a process of a health check cannot be killed");
            }
        }
        platform::pause(LOOK);
    }
}
