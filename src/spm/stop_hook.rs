//! Run as the unit's `ExecStop`: a real stop of the unit also stops the sub-agents; a restart, or the end of a manager that ended by
//! itself, does not.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::control_socket;
use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::{host_service, lifecycle, logging, process, role};

/// Every sub-agent may take its grace period, which is ten minutes at the longest; the unit's `TimeoutStopSec` is longer still.
const LONGEST_STOP: Duration = Duration::from_secs(840);
/// Grace periods are over by then; a `control` script and the last kill still fit in.
const LONGEST_GRACE: Duration = Duration::from_secs(860);

/// `service`: who runs the hook; units that an older version wrote do not say it.
pub(super) fn run(home: &Home, service: ServiceManagerKind) -> Result<ExitCode> {
    logging::to_file(&home.role_log("spm"));
    // Empty when the manager ended by itself and is about to be restarted.
    let main_pid = std::env::var("MAINPID").unwrap_or_default();
    if main_pid.is_empty() || main_pid == "0" {
        return Ok(ExitCode::SUCCESS);
    }
    let service = if service.is_some() { service } else { host_service::detect() };
    match host_service::is_restarting(service, home, Role::Spm) {
        Ok(true) => return Ok(ExitCode::SUCCESS),
        Ok(false) => {}
        // Not known to be a stop, it is none. If it was one, the watchdog sees it by the unit.
        Err(error) => {
            tracing::error!(
                error = format!("{error:#}"),
                "the service manager does not say whether this is a restart; the sub-agents stay"
            );
            return Ok(ExitCode::SUCCESS);
        }
    }
    let began = Instant::now();
    tracing::info!("the unit is being stopped; the sub-agents are stopped with it");
    if let Err(error) = role::record_stop(home) {
        tracing::warn!(error = format!("{error:#}"), "the stop cannot be recorded");
    }
    let reply = match control_socket::ask_to_stop(home, LONGEST_STOP) {
        Ok(reply) => reply,
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "the manager does not stop the sub-agents; they are stopped without it"
            );
            lifecycle::kill_manager(home)?;
            None
        }
    };
    match reply.and_then(|reply| reply.error) {
        Some(error) => bail!("cannot stop every sub-agent: {error}"),
        // A manager that hangs or is dead stops nobody; what is left is ended here.
        None => process::stop::stop_all_within(home, LONGEST_GRACE.saturating_sub(began.elapsed()))?,
    }
    Ok(ExitCode::SUCCESS)
}
