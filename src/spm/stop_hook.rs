//! The unit's `ExecStop`: a real stop of the unit also stops the sub-agents; a restart, or the exit of a manager on its own, does not.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::control_socket;
use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::{host_service, lifecycle, logging, process, role};

/// Every sub-agent may take its grace period, which is ten minutes at most; the unit's `TimeoutStopSec` is longer.
const LONGEST_STOP: Duration = Duration::from_secs(840);
/// All grace periods are over by then; a `control` script and the final kill still fit in.
const LONGEST_GRACE: Duration = Duration::from_secs(860);

/// `service`: the service manager that runs the hook; units of older versions do not pass it.
pub(super) fn run(home: &Home, service: ServiceManagerKind) -> Result<ExitCode> {
    logging::to_file(&home.role_log("spm"));
    // Empty when the manager exited on its own and is about to be restarted.
    let main_pid = std::env::var("MAINPID").unwrap_or_default();
    if main_pid.is_empty() || main_pid == "0" {
        return Ok(ExitCode::SUCCESS);
    }
    let service = if service.is_some() { service } else { host_service::detect() };
    match host_service::is_restarting(service, home, Role::Spm) {
        Ok(true) => return Ok(ExitCode::SUCCESS),
        Ok(false) => {}
        // Without an answer it is not treated as a stop. If it is one, the watchdog detects it from the unit's state.
        Err(error) => {
            tracing::error!(
                error = format!("{error:#}"),
                "cannot query whether the unit is being restarted; the sub-agents keep running"
            );
            return Ok(ExitCode::SUCCESS);
        }
    }
    stop(home).map(|()| ExitCode::SUCCESS)
}

/// As [`stop`], where nobody receives the error.
pub(super) fn stop_logged(home: &Home) {
    if let Err(error) = stop(home) {
        tracing::error!(error = format!("{error:#}"), "cannot stop every sub-agent");
    }
}

/// Records the stop, and stops the sub-agents and the manager.
fn stop(home: &Home) -> Result<()> {
    let began = Instant::now();
    tracing::info!("the unit is being stopped; the sub-agents are stopped too");
    if let Err(error) = role::record_stop(home) {
        tracing::warn!(error = format!("{error:#}"), "cannot record the stop");
    }
    let reply = match control_socket::request_stop(home, LONGEST_STOP) {
        Ok(reply) => reply,
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "the manager did not stop the sub-agents; they are stopped without it"
            );
            lifecycle::kill_manager(home)?;
            None
        }
    };
    match reply.and_then(|reply| reply.error) {
        Some(error) => bail!("cannot stop every sub-agent: {error}"),
        // A hung or dead manager stops no sub-agent; the rest is stopped here.
        None => process::stop::stop_all_within(home, LONGEST_GRACE.saturating_sub(began.elapsed())),
    }
}
