//! The manager: receives the desired state from the gateway, installs and runs the sub-agents accordingly, and reports their actual state.
//!
//! One task owns all state ([`manager::Manager`]) and never blocks; slow work runs off the event loop and reports with an [`Input`](input::Input).
//! Sub-agents survive the manager's exit: each has a record, from which the next manager adopts it.

mod agent;
mod disk;
mod heartbeats;
mod history;
mod input;
mod journal;
mod maintenance;
mod manager;
mod run;
mod stage;
mod stop_hook;
mod upgrade;
mod watchdog_link;

use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::config::Config;
use crate::control_socket::{self, Request};
use crate::core::desired::DesiredState;
use crate::core::ledger::Ledger;
use crate::core::model::MANAGER_PACKAGE;
use crate::core::role::Role;
use crate::core::service_manager::{Notification, ServiceManagerKind};
use crate::core::status::History;
use crate::home::Home;
use crate::output::message;
use crate::role::sentinel::Sentinel;
use crate::role::{self, STOPPED_ON_PURPOSE};
use crate::{command, host_service, installation, logging, platform, store};

/// How long a manager waits for its predecessor to release the role.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout of an unattended enrolment, which needs no network.
const ENROLMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long an idle blocking thread is kept, with its stack.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// How the manager is started.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ManagerOptions {
    /// The service manager that starts it; set by the unit
    #[arg(long, hide = true, value_name = "KIND", default_value = "none")]
    service: ServiceManagerKind,
    #[command(subcommand)]
    command: Option<SpmCommand>,
}

/// Hidden subcommands of `aops-spm`.
#[derive(Debug, Clone, clap::Subcommand)]
enum SpmCommand {
    /// Run by the unit's ExecStop: in a real stop, stops the sub-agents too
    #[command(hide = true)]
    StopHook,
    /// Run by the previous release before an upgrade: checks that this one can read the settings and the state; changes nothing
    #[command(hide = true)]
    Preflight,
}

/// Runs the manager until it is stopped or yields to another one.
pub fn main(home: &Home, options: &ManagerOptions) -> Result<ExitCode> {
    match options.command {
        Some(SpmCommand::StopHook) => return stop_hook::run(home, options.service),
        Some(SpmCommand::Preflight) => return preflight(home),
        None => {}
    }
    let (role_home, stopped_home, service) = (home.clone(), home.clone(), options.service);
    let on_stop = move || stop_hook::stop_logged(&stopped_home);
    host_service::run(service, home, Role::Spm, on_stop, move || serve(&role_home, service))
}

fn serve(home: &Home, service: ServiceManagerKind) -> Result<ExitCode> {
    if let Some(exit) = enrol(home)? {
        return Ok(exit);
    }
    role::require_installation(home)?;
    // Before the log is opened: its directory may be among those restored. An error shows there or is lost.
    let restored = role::restore_directories(home);
    logging::to_file(&home.role_log("spm"));
    role::log_restored(&restored);
    role::leave_sub_agent_cgroup(home);
    let supervised = service != ServiceManagerKind::None;
    if supervised {
        // The service manager starts a unit on an operator's request or at boot: both clear a recorded stop.
        role::clear_stop(home)?;
    } else if role::is_stop_recorded(home) {
        tracing::info!("the home is stopped; the manager does not start until `control start`");
        message!("{} is stopped; start it with `control start`", home.root().display());
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let _lock = acquire_role(home, supervised)
        .inspect_err(|error| tracing::error!(error = format!("{error:#}"), "the manager cannot start"))?;
    let holder = role::announce(home, Role::Spm)?;
    if !supervised && role::is_stop_recorded(home) {
        // A stop is recorded before the running roles are looked up: either the stop finds this process, or this process finds the record.
        role::record_exit(home, Role::Spm, &holder);
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(256)
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()?;
    let result = runtime.block_on(manager::run(home, service, &holder));
    // Until the watchdog has started the next manager, the home depends on it alone.
    let is_followed = !supervised && matches!(result, Ok(control_socket::Goodbye::Yield));
    let _sentinel = is_followed.then(|| Sentinel::start(home)).flatten();
    // Does not wait for threads that are blocked on the network.
    runtime.shutdown_background();
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "the manager exits because of an error");
    } else {
        role::record_exit(home, Role::Spm, &holder);
    }
    Ok(match result? {
        control_socket::Goodbye::Stop => ExitCode::from(STOPPED_ON_PURPOSE),
        control_socket::Goodbye::Yield => ExitCode::SUCCESS,
    })
}

/// Enrols a host on which a package was installed; an exit code if it cannot be enrolled.
fn enrol(home: &Home) -> Result<Option<ExitCode>> {
    if !installation::packaged::is_unenrolled(home) {
        return Ok(None);
    }
    let mut command = Command::new(home.executable());
    command.args(["service", "packaged", "--home"]).arg(home.public_path()).arg("enrol").current_dir("/");
    if let Err(error) = command::run(&mut command, ENROLMENT_TIMEOUT).and_then(command::Finished::success) {
        message!("error: {error:#}");
    }
    let Some(advice) = installation::enrolment::advice(home) else { return Ok(None) };
    message!("{advice}");
    // The unit has started and ended: systemd does not restart it, and it has not failed.
    platform::notify(Notification::Ready);
    Ok(Some(ExitCode::from(STOPPED_ON_PURPOSE)))
}

/// Reads everything that a manager reads at start. Files that a start tolerates as unreadable are errors here.
fn preflight(home: &Home) -> Result<ExitCode> {
    role::require_installation(home)?;
    let loaded = Config::load(home)?;
    installation::agent_id(home)?.context("this host has no agent id; run `aops install --agent-id ID`")?;
    installation::ManagerRecord::load(home)?;
    installation::InstallRecord::load(home)?;
    store::load::<DesiredState>(&home.desired())?;
    store::load::<Ledger>(&home.releases())?;
    store::load::<History>(&home.history())?;
    let epochs = installation::Epochs::load(home)?;
    installation::keyring::Keyring::load(home)?;
    installation::upgrade::load(home)?;
    store::load::<serde_json::Value>(&home.events())?;
    for unknown in &loaded.unknown {
        message!("warning: {unknown}");
    }
    message!("the settings and the state can be read; epoch {}", epochs.least(MANAGER_PACKAGE));
    Ok(ExitCode::SUCCESS)
}

/// Acquires the role's lock. A manager started by the service manager first asks one that was started otherwise to yield.
fn acquire_role(home: &Home, supervised: bool) -> Result<crate::lock::LockGuard> {
    if supervised
        && role::is_held(home, Role::Spm)
        && let Err(error) = control_socket::request(home, &Request::Yield, TAKE_OVER_TIMEOUT)
    {
        tracing::warn!(error = format!("{error:#}"), "cannot request the exit of the running manager");
    }
    match role::acquire(home, Role::Spm, TAKE_OVER_TIMEOUT).context("cannot acquire the manager's lock")? {
        Some(lock) => Ok(lock),
        None => {
            let holder = role::living(home, Role::Spm)
                .map_or("; see `control status`".to_owned(), |holder| format!(" (pid {})", holder.pid));
            bail!("cannot manage {}: another manager is already running{holder}", home.root().display())
        }
    }
}

/// The current time in the format of events and `status`: RFC 3339, UTC, whole seconds.
fn timestamp() -> String {
    let now = jiff::Timestamp::now();
    now.round(jiff::Unit::Second).unwrap_or(now).to_string()
}

/// Seconds since 1970.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Formats a Unix time in seconds as RFC 3339.
fn timestamp_of(unix_seconds: u64) -> Option<String> {
    let at = jiff::Timestamp::from_second(i64::try_from(unix_seconds).ok()?).ok()?;
    Some(at.to_string())
}
