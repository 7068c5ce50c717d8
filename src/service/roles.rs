//! The two roles of a home as an installation sees them: stopped as a whole, renewed under running sub-agents, started, waited for.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::leftovers;
use super::progress;
use crate::control_socket::{self, Request};
use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::{host_service, lifecycle, platform, role, store};

/// For the manager to answer once it is started.
const ANSWER: Duration = Duration::from_secs(30);
/// For one question.
const QUESTION: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(50);

/// How much of the manager's log is shown when it does not come up.
const LAST_LINES: usize = 5;
const MAX_LOG_BYTES: u64 = 64 << 20;

/// The manager that answers now.
pub(super) fn manager_pid(home: &Home) -> Option<u32> {
    role::living(home, Role::Spm).map(|holder| holder.pid)
}

/// Whether a role of the home runs, answering or not.
pub(super) fn run(home: &Home) -> bool {
    !leftovers::running_from(&home.bin()).is_empty()
}

/// Stops everything: sub-agents, roles, and what else runs of this home. Works also where the manager is dead or a unit is gone.
pub(super) fn stop_all(home: &Home) -> Result<()> {
    for remark in lifecycle::stop_before_removal(home)? {
        progress::warn(remark);
    }
    // One that was being started meanwhile, by a role that is dead now, would write into what is taken away.
    leftovers::end_running_from(&home.bin())
}

/// Registers the roles where they are to be, and takes them out of a service manager that they are not to be in any more.
pub(super) fn register(home: &Home, kind: ServiceManagerKind) -> Result<()> {
    let before = host_service::registered_with(home);
    if before != kind {
        // The units' stop is a real one: sub-agents are stopped, too, and started again by the new manager.
        host_service::stop(before, home, Role::BOTH)?;
        host_service::unregister(before, home)?;
    }
    host_service::register(kind, home)
}

/// Starts the roles, or renews them where they run: sub-agents keep running. The child is the manager itself, where there is no service
/// manager.
pub(super) fn start(home: &Home, kind: ServiceManagerKind, registered_before: bool) -> Result<Option<Child>> {
    role::clear_stop(home)?;
    if !registered_before {
        // Somebody else started those that run: they would keep the locks.
        host_service::stop_roles(home)?;
    }
    host_service::restart(kind, home, Role::BOTH)
}

/// Waits until a manager answers that is not `before`.
pub(super) fn wait(home: &Home, before: Option<u32>, mut child: Option<Child>) -> Result<()> {
    let started = Instant::now();
    loop {
        let answer = control_socket::request(home, &Request::Status, QUESTION);
        if let Ok(Some(reply)) = &answer
            && let Some(status) = &reply.status
            && status.spm.pid.is_some()
            && status.spm.pid != before
            && status.spa.pid.is_some()
        {
            return Ok(());
        }
        let ended = match &mut child {
            Some(child) => child.try_wait()?,
            None => None,
        };
        let waited = started.elapsed() >= ANSWER;
        if let Some(status) = ended {
            bail!("the manager ended with {status}{}", last_words(home));
        }
        if waited {
            let why = answer.err().map(|error| format!(" ({error:#})")).unwrap_or_default();
            bail!("the manager has not answered within {} seconds{why}{}", ANSWER.as_secs(), last_words(home));
        }
        platform::pause(LOOK);
    }
}

/// The end of the manager's log.
fn last_words(home: &Home) -> String {
    let path = home.role_log("spm");
    let Ok(Some(bytes)) = store::read(&path, MAX_LOG_BYTES) else { return String::new() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    if last.is_empty() { String::new() } else { format!("; {} ends with:\n  {}", path.display(), last.join("\n  ")) }
}

/// Starts again what ran before a failure.
pub(super) fn start_again(home: &Home, kind: ServiceManagerKind) -> Result<()> {
    let attempt = || -> Result<()> {
        register(home, kind)?;
        let child = start(home, kind, kind.is_some())?;
        wait(home, None, child)
    };
    attempt().context("cannot start again what ran before")
}
