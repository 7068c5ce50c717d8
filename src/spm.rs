//! The manager: brings the desired state down from the gateway, keeps the sub-agents as it wants them, and tells what is.
//!
//! One task owns all state ([`manager::Manager`]) and never blocks; what takes time runs beside it and reports with an [`Input`]. Its
//! death harms no sub-agent: each has a record, by which the next manager adopts it.

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

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::config::Config;
use crate::control_socket::{self, Request};
use crate::core::desired::DesiredState;
use crate::core::ledger::Ledger;
use crate::core::model::MANAGER_PACKAGE;
use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::core::status::History;
use crate::home::Home;
use crate::output::message;
use crate::role::{self, STOPPED_ON_PURPOSE};
use crate::{installation, logging, store};

/// For a predecessor to give the role up, at the longest.
const TAKE_OVER: Duration = Duration::from_secs(10);

/// A thread that worked beside the loop keeps its stack for so long.
const IDLE_THREADS: Duration = Duration::from_secs(1);

/// How the manager is started.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ManagerOptions {
    /// Who starts it: a unit of the service manager says so here
    #[arg(long, hide = true, value_name = "KIND", default_value = "none")]
    service: ServiceManagerKind,
    #[command(subcommand)]
    command: Option<SpmCommand>,
}

/// What else the program `aops-spm` does.
#[derive(Debug, Clone, clap::Subcommand)]
enum SpmCommand {
    /// Run by the unit before it is stopped: makes a real stop one of the sub-agents too
    #[command(hide = true)]
    StopHook,
    /// Run by another release before it gives way to this one: reads the home's settings and state, and changes nothing
    #[command(hide = true)]
    Preflight,
}

/// Runs the manager until it is stopped or gives way.
pub fn main(home: &Home, options: &ManagerOptions) -> Result<ExitCode> {
    match options.command {
        Some(SpmCommand::StopHook) => return stop_hook::run(home, options.service),
        Some(SpmCommand::Preflight) => return preflight(home),
        None => {}
    }
    role::demand_home(home)?;
    // Before the log is opened, whose directory may be among them; what it fails of shows there or nowhere.
    let restored = role::restore_directories(home);
    logging::to_file(&home.role_log("spm"));
    role::tell_of_restored(&restored);
    role::leave_sub_agent(home);
    let supervised = options.service != ServiceManagerKind::None;
    if supervised {
        // The service manager starts what it was told to start, or what is to run at boot.
        role::clear_stop(home)?;
    } else if role::is_stop_recorded(home) {
        tracing::info!("the home was told to stop; the manager does not start");
        message!("{} was told to stop; start it with `control start`", home.root().display());
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let _lock = take_role(home, supervised)
        .inspect_err(|error| tracing::error!(error = format!("{error:#}"), "the manager cannot start"))?;
    let holder = role::announce(home, Role::Spm)?;
    if !supervised && role::is_stop_recorded(home) {
        // Who stops the home records it first and then looks who is there; either it sees us, or we see the record.
        role::take_leave(home, Role::Spm, &holder);
        return Ok(ExitCode::from(STOPPED_ON_PURPOSE));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(256)
        .thread_keep_alive(IDLE_THREADS)
        .build()?;
    let ended = runtime.block_on(manager::run(home, options.service, &holder));
    // Threads that wait on the network are not waited for.
    runtime.shutdown_background();
    if let Err(error) = &ended {
        tracing::error!(error = format!("{error:#}"), "the manager ended");
    } else {
        role::take_leave(home, Role::Spm, &holder);
    }
    Ok(match ended? {
        control_socket::Goodbye::Stop => ExitCode::from(STOPPED_ON_PURPOSE),
        control_socket::Goodbye::Yield => ExitCode::SUCCESS,
    })
}

/// Reads everything that a manager reads of this home when it starts. What it would do without is an error here.
fn preflight(home: &Home) -> Result<ExitCode> {
    role::demand_home(home)?;
    let loaded = Config::load(home)?;
    installation::agent_id(home)?.context("the host has no agent id")?;
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

/// Takes the role; one that the service manager started asks a predecessor that somebody else started to give way.
fn take_role(home: &Home, supervised: bool) -> Result<crate::lock::LockGuard> {
    if supervised
        && role::is_taken(home, Role::Spm)
        && let Err(error) = control_socket::ask(home, &Request::Yield, TAKE_OVER)
    {
        tracing::warn!(error = format!("{error:#}"), "the manager that runs already cannot be asked to give way");
    }
    match role::take(home, Role::Spm, TAKE_OVER).context("cannot become the manager")? {
        Some(lock) => Ok(lock),
        None => {
            let holder = role::living(home, Role::Spm)
                .map_or("another process".to_owned(), |holder| format!("process {}", holder.pid));
            bail!("cannot become the manager of {}: {holder} is", home.root().display())
        }
    }
}

/// The time now as events and `status` write it: RFC 3339, UTC, to the second.
fn timestamp() -> String {
    let now = jiff::Timestamp::now();
    now.round(jiff::Unit::Second).unwrap_or(now).to_string()
}

/// Seconds since 1970.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The time that is so many seconds after 1970.
fn timestamp_of(unix_seconds: u64) -> Option<String> {
    let at = jiff::Timestamp::from_second(i64::try_from(unix_seconds).ok()?).ok()?;
    Some(at.to_string())
}
