//! Starts, restarts and stops a home as a whole, in any state and for any caller.
//!
//! A stop is recorded first, so that nothing restarts what is being stopped. The manager receives a request to stop the sub-agents; if it
//! does not answer, they are stopped by their records.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::installation::{InstallRecord, permissions};
use crate::{control_socket, host_service, platform, process, role};

/// Timeout for a stop: every sub-agent may take its grace period, which is ten minutes at most.
const STOP_TIMEOUT: Duration = Duration::from_secs(840);

/// The service manager of a home: from the installation's record, or else from the registered units.
pub fn service(home: &Home) -> ServiceManagerKind {
    match InstallRecord::load(home) {
        Ok(Some(installed)) => installed.service,
        _ => host_service::registered_with(home),
    }
}

/// Starts a stopped home; a running one is left as it is. Does not wait until it answers.
pub fn start(home: &Home) -> Result<()> {
    check_executables(home).context("cannot start")?;
    role::clear_stop(home).context("cannot start: cannot delete the file that marks the home as stopped")?;
    if role::living(home, Role::Spm).is_none() {
        for role in Role::BOTH {
            // If the record cannot be removed, restarts continue to be counted.
            let _ = role::reset_restarts(home, *role);
        }
    }
    let service = service(home);
    host_service::rename_strays(service, home).context("cannot start")?;
    host_service::start(service, home, Role::BOTH).map(drop)
}

/// Restarts both roles; the sub-agents keep running. Does not wait until the roles answer.
pub fn restart(home: &Home) -> Result<()> {
    check_executables(home).context("cannot restart; the running processes are unchanged")?;
    let service = service(home);
    host_service::rename_strays(service, home).context("cannot restart")?;
    host_service::restart(service, home, Role::BOTH).map(drop)
}

/// Checks that the roles' executables are safe to start.
fn check_executables(home: &Home) -> Result<()> {
    Role::BOTH.iter().try_for_each(|role| permissions::executable(home, &home.role_program(*role).0))
}

/// Stops every sub-agent, then both roles. Returns the problems that were worked around.
pub fn stop(home: &Home) -> Result<Vec<String>> {
    role::record_stop(home)
        .context("cannot stop: the stop cannot be recorded, so the stopped processes would be restarted")?;
    let remarks = stop_all(home)?;
    // A start by the service manager in between removes the record.
    role::record_stop(home)?;
    Ok(remarks)
}

/// As [`stop`], before the home is removed: succeeds even if the stop cannot be recorded.
pub fn stop_before_removal(home: &Home) -> Result<Vec<String>> {
    let recorded = role::record_stop(home).context("cannot record the stop");
    let mut remarks = stop_all(home)?;
    remarks.extend(recorded.err().map(|error| format!("{error:#}")));
    Ok(remarks)
}

fn stop_all(home: &Home) -> Result<Vec<String>> {
    let mut remarks = vec![];
    match control_socket::request_stop(home, STOP_TIMEOUT) {
        Ok(Some(reply)) => {
            remarks.extend(reply.error.map(|error| format!("the manager could not stop every sub-agent: {error}")))
        }
        Ok(None) => {}
        Err(error) => {
            remarks.push(format!("the manager did not stop the sub-agents ({error:#}); they are stopped without it"));
            kill_manager(home)?;
        }
    }
    host_service::stop(service(home), home, &[Role::Spa, Role::Spm])?;
    for role in [Role::Spa, Role::Spm] {
        if wait_for_exit(home, role)? {
            remarks.push(format!("{} did not exit in time and was killed", role.program()));
        }
    }
    process::stop::stop_all(home)?;
    platform::remove_role_groups(&home.agents_unit());
    Ok(remarks)
}

/// Kills a manager that does not answer, unless it is this process.
pub fn kill_manager(home: &Home) -> Result<()> {
    let manager = role::current_holder(home, Role::Spm).filter(|manager| manager.pid != std::process::id());
    manager.map_or(Ok(()), |manager| manager.kill())
}

/// Waits until no process has a role; returns whether one had to be killed. The holder was asked to exit before.
fn wait_for_exit(home: &Home, role: Role) -> Result<bool> {
    let mut killed = false;
    while let Some(holder) = role::living(home, role) {
        killed |= holder.wait_for_exit()?;
    }
    Ok(killed)
}
