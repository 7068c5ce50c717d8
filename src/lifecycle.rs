//! A home as a whole, started, renewed and stopped, whoever asks for it and whatever state it is in.
//!
//! A stop is recorded first, so that nothing revives what is being stopped. It is asked of the manager; where that does not answer, it is
//! done by the records of what runs.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::installation::{InstallRecord, permissions};
use crate::{control_socket, host_service, platform, process, role};

/// For a stop: every sub-agent may take its grace period, which is ten minutes at the longest.
const STOP: Duration = Duration::from_secs(840);

/// Which service manager has the roles of a home. Where the record cannot be read, its units tell.
pub fn service(home: &Home) -> ServiceManagerKind {
    match InstallRecord::load(home) {
        Ok(Some(installed)) => installed.service,
        _ => host_service::registered_with(home),
    }
}

/// Starts a home that is stopped; one that runs is left as it is. Does not wait until it answers.
pub fn start(home: &Home) -> Result<()> {
    sound(home).context("cannot start")?;
    role::clear_stop(home).context("cannot start: the recorded stop cannot be taken back")?;
    if role::living(home, Role::Spm).is_none() {
        for role in Role::BOTH {
            // On a disk that cannot be written they are counted on.
            let _ = role::forget(home, *role);
        }
    }
    let service = service(home);
    host_service::rename_strays(service, home).context("cannot start")?;
    host_service::start(service, home, Role::BOTH).map(drop)
}

/// Starts both roles anew; the sub-agents are left running. Does not wait until they answer.
pub fn renew(home: &Home) -> Result<()> {
    sound(home).context("cannot restart: what runs goes on running")?;
    let service = service(home);
    host_service::rename_strays(service, home).context("cannot restart")?;
    host_service::restart(service, home, Role::BOTH).map(drop)
}

/// Whether the roles may be started, by whoever does it.
fn sound(home: &Home) -> Result<()> {
    Role::BOTH.iter().try_for_each(|role| permissions::executable(home, &home.role_link(role.program())))
}

/// Stops every sub-agent, then both roles. Returns what did not go as it should, where it was made good.
pub fn stop(home: &Home) -> Result<Vec<String>> {
    role::record_stop(home)
        .context("cannot stop: the stop cannot be recorded, so that what is stopped would be started again")?;
    let remarks = carry_out(home)?;
    // A start by the service manager in between took the record back.
    role::record_stop(home)?;
    Ok(remarks)
}

/// As [`stop`], for a home that is going to be removed: it does not take a disk that can be written.
pub fn stop_for_good(home: &Home) -> Result<Vec<String>> {
    let recorded = role::record_stop(home).context("the stop cannot be recorded");
    let mut remarks = carry_out(home)?;
    remarks.extend(recorded.err().map(|error| format!("{error:#}")));
    Ok(remarks)
}

fn carry_out(home: &Home) -> Result<Vec<String>> {
    let mut remarks = vec![];
    match control_socket::ask_to_stop(home, STOP) {
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
        if await_end(home, role)? {
            remarks.push(format!("{} did not end by itself and was killed", role.program()));
        }
    }
    process::stop::stop_all(home)?;
    platform::remove_role_groups(&home.agents_unit());
    Ok(remarks)
}

/// Kills a manager that does not answer: nothing else would come of it but waiting for it.
pub fn kill_manager(home: &Home) -> Result<()> {
    role::who_has(home, Role::Spm).map_or(Ok(()), |manager| manager.kill())
}

/// Waits until nobody has a role, which whoever has it was told to give up; whether it had to be killed.
fn await_end(home: &Home, role: Role) -> Result<bool> {
    let mut killed = false;
    while let Some(holder) = role::living(home, role) {
        killed |= holder.await_end()?;
    }
    Ok(killed)
}
