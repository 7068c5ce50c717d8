//! Starts, restarts and stops the two roles of a home for the installer, and waits for the manager.

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

/// Timeout until the manager answers after a start.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The lines of the manager's log that an error shows if it does not start.
const LAST_LINES: usize = 5;
const MAX_LOG_BYTES: u64 = 64 << 20;

/// The pid of the running manager.
pub(super) fn manager_pid(home: &Home) -> Option<u32> {
    role::living(home, Role::Spm).map(|holder| holder.pid)
}

/// Whether a role of the home is running, even if it does not answer.
pub(super) fn any_running(home: &Home) -> bool {
    !leftovers::running_from(&home.bin()).is_empty()
}

/// Stops the sub-agents, the roles and every other process of this home, also if the manager is dead or a unit is missing.
pub(super) fn stop_all(home: &Home) -> Result<()> {
    for remark in lifecycle::stop_before_removal(home)? {
        progress::warn(remark);
    }
    // A role that the other one started meanwhile would write into the directories that are removed.
    leftovers::stop_running_from(&home.bin())
}

/// Registers the roles with a service manager, and unregisters them from the previous one.
pub(super) fn register(home: &Home, kind: ServiceManagerKind) -> Result<()> {
    let before = host_service::registered_with(home);
    if before != kind {
        // Stopping the units stops the sub-agents, too; the new manager restarts them.
        host_service::stop(before, home, Role::BOTH)?;
        host_service::unregister(before, home)?;
    }
    host_service::register(kind, home)
}

/// Starts the roles, or restarts them if they are running: sub-agents keep running. Returns the manager's process if there is no service
/// manager.
pub(super) fn start(home: &Home, kind: ServiceManagerKind, registered_before: bool) -> Result<Option<Child>> {
    role::clear_stop(home)?;
    if kind.is_some() && !registered_before {
        // It was started in a different way and would start managers in that way.
        host_service::stop_watchdog(home)?;
    }
    host_service::restart(kind, home, Role::BOTH)
}

/// Waits until a manager answers whose pid is not `before`.
pub(super) fn wait(home: &Home, before: Option<u32>, mut child: Option<Child>) -> Result<()> {
    let started = Instant::now();
    loop {
        let answer = control_socket::request(home, &Request::Status, REQUEST_TIMEOUT);
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
        let timed_out = started.elapsed() >= START_TIMEOUT;
        if let Some(status) = ended {
            bail!("the manager exited with {status}{}", log_tail(home));
        }
        if timed_out {
            let reason = answer.err().map(|error| format!(" ({error:#})")).unwrap_or_default();
            bail!("the manager did not answer within {} seconds{reason}{}", START_TIMEOUT.as_secs(), log_tail(home));
        }
        platform::pause(POLL_INTERVAL);
    }
}

/// The last lines of the manager's log, for an error.
fn log_tail(home: &Home) -> String {
    let path = home.role_log("spm");
    let Ok(Some(bytes)) = store::read(&path, MAX_LOG_BYTES) else { return String::new() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    if last.is_empty() { String::new() } else { format!("; {} ends with:\n  {}", path.display(), last.join("\n  ")) }
}

/// Restarts the previous installation after a failure.
pub(super) fn restart_previous(home: &Home, kind: ServiceManagerKind) -> Result<()> {
    let attempt = || -> Result<()> {
        register(home, kind)?;
        let child = start(home, kind, kind.is_some())?;
        wait(home, None, child)
    };
    attempt().context("cannot restart the previous installation")
}
