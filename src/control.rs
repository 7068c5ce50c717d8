//! What the operator at the host uses: status, start, stop, restart, logs.
//!
//! It asks the manager through the local door. Where that does not answer, it goes by the records of what runs, so that a stop is possible
//! whatever state the manager is in.

mod logs;
mod show;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::core::model::AgentName;
use crate::core::status::{HomeState, RoleStatus, Status};
use crate::door::{self, Request};
use crate::home::Home;
use crate::host_service::{self, Kind};
use crate::installation::{self, Installed, Manager};
use crate::role::{self, Role};
use crate::{platform, process};

pub use logs::LogOptions;

/// `status` of a stopped home.
const STOPPED: u8 = 3;
/// Any verb where nothing is installed.
const NOT_INSTALLED: u8 = 4;

/// A manager that works answers at once.
const ANSWER: Duration = Duration::from_secs(5);
/// The roles come up within this.
const START: Duration = Duration::from_secs(30);
/// A stop gives every sub-agent its grace period.
const STOP: Duration = Duration::from_secs(3700);
/// The roles end within this once the sub-agents have.
const ROLES_END: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(50);

/// What an operator may ask for.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Show the manager, the watchdog, the gateway and every sub-agent
    ///
    /// Exit code: 0 running or degraded, 3 stopped, 4 nothing installed.
    Status {
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Start what was stopped
    Start,
    /// Stop every sub-agent and both roles; nothing comes back by itself
    Stop,
    /// Start the roles anew, or one sub-agent
    ///
    /// Restarting the roles leaves the sub-agents running as they are.
    Restart {
        /// The sub-agent to stop and start; without it, both roles
        agent: Option<AgentName>,
    },
    /// Show the log of the manager, or of a sub-agent
    Logs(LogOptions),
}

/// Carries a verb out.
pub fn main(home: &Home, command: &Command) -> Result<ExitCode> {
    if !installation::exists(home) {
        return Ok(not_installed(home, command));
    }
    match command {
        Command::Status { json } => {
            let status = status(home)?;
            show::print(&status, *json)?;
            Ok(if status.state == HomeState::Stopped { ExitCode::from(STOPPED) } else { ExitCode::SUCCESS })
        }
        Command::Start => start(home).map(|()| ExitCode::SUCCESS),
        Command::Stop => stop(home).map(|()| ExitCode::SUCCESS),
        Command::Restart { agent: None } => restart(home).map(|()| ExitCode::SUCCESS),
        Command::Restart { agent: Some(name) } => restart_agent(home, name).map(|()| ExitCode::SUCCESS),
        Command::Logs(options) => logs::show(home, options).map(|()| ExitCode::SUCCESS),
    }
}

fn not_installed(home: &Home, command: &Command) -> ExitCode {
    if let Command::Status { json: true } = command {
        let status = Status::silent(home.root().display().to_string(), None, HomeState::NotInstalled);
        if let Err(error) = show::print(&status, true) {
            anstream::eprintln!("error: {error:#}");
        }
    }
    anstream::eprintln!(
        "nothing is installed in {}; give another --home, or install with `aops install`",
        home.root().display()
    );
    ExitCode::from(NOT_INSTALLED)
}

/// What runs, from the manager itself or, where it does not answer, from what it left.
fn status(home: &Home) -> Result<Status> {
    let mut problem = None;
    match door::ask(home, &Request::Status, ANSWER) {
        Ok(Some(reply)) => {
            if let Some(mut status) = reply.status {
                status.notes.extend(boot_note(home));
                return Ok(*status);
            }
            problem = reply.error;
        }
        Ok(None) => {}
        Err(error) => problem = Some(format!("{error:#}")),
    }
    let version = Manager::load(home).ok().flatten().map(|manager| manager.version);
    let (spm, spa) = (role::living(home, Role::Spm), role::living(home, Role::Spa));
    let agents_run = process::tree::all(home).iter().any(|target| !process::tree::members(home, target).is_empty());
    let state = if spm.is_none() && spa.is_none() && !agents_run { HomeState::Stopped } else { HomeState::Degraded };
    let mut status = Status::silent(home.root().display().to_string(), version, state);
    status.spm = spm.as_ref().map_or_else(RoleStatus::default, role::Holder::status);
    status.spa = spa.as_ref().map_or_else(RoleStatus::default, role::Holder::status);
    if state == HomeState::Degraded {
        let what = if spm.is_some() { "the manager does not answer" } else { "the manager does not run" };
        status.problems.push(problem.map_or_else(|| what.to_owned(), |problem| format!("{what}: {problem}")));
        if spm.is_none() && spa.is_none() {
            status.problems.push("sub-agents run without a manager; `control start` takes charge of them".to_owned());
        }
    }
    status.notes.extend(boot_note(home));
    Ok(status)
}

/// That nothing starts this home at boot, where it is so.
fn boot_note(home: &Home) -> Option<String> {
    let service = Installed::load(home).ok().flatten().map(|installed| installed.service)?;
    (service == Kind::None).then(|| {
        format!(
            "nothing starts this home at boot; have the host run `{} start` then",
            home.control_link().display()
        )
    })
}

fn service(home: &Home) -> Result<Kind> {
    Ok(Installed::load(home)?.map_or(Kind::None, |installed| installed.service))
}

fn start(home: &Home) -> Result<()> {
    role::clear_stop(home).context("cannot start: the recorded stop cannot be taken back")?;
    if role::living(home, Role::Spm).is_none() {
        role::forget(home, Role::Spm)?;
        role::forget(home, Role::Spa)?;
    }
    match service(home)? {
        Kind::Systemd => host_service::start(home, &[Role::Spm, Role::Spa])?,
        Kind::None if role::is_taken(home, Role::Spm) => {}
        Kind::None => drop(role::spawn(home, Role::Spm)?),
    }
    door::wait_until_it_answers(home, START)?;
    anstream::eprintln!("started");
    Ok(())
}

/// Stops everything, whoever is alive to help. Nothing of it comes back by itself.
fn stop(home: &Home) -> Result<()> {
    role::record_stop(home).context("cannot stop: the stop cannot be recorded, so that what is stopped would be started again")?;
    let asked = door::ask(home, &Request::Stop, STOP);
    match &asked {
        Ok(Some(reply)) => {
            if let Some(error) = &reply.error {
                anstream::eprintln!("the manager could not stop every sub-agent: {error}");
            }
        }
        Ok(None) => {}
        Err(error) => anstream::eprintln!("the manager did not stop the sub-agents ({error:#}); they are stopped without it"),
    }
    if service(home)? == Kind::Systemd {
        host_service::stop(home, &[Role::Spa, Role::Spm])?;
    }
    for role in [Role::Spa, Role::Spm] {
        end_role(home, role)?;
    }
    process::tree::end_all(home)?;
    // A start by the service manager in the meantime took the record back.
    role::record_stop(home)?;
    anstream::eprintln!("stopped");
    Ok(())
}

/// Waits for a role to end by itself, which it was told to, and ends it if it does not.
fn end_role(home: &Home, role: Role) -> Result<()> {
    let deadline = Instant::now() + ROLES_END;
    while let Some(holder) = role::living(home, role) {
        if Instant::now() >= deadline {
            anstream::eprintln!("the {} does not end by itself and is killed", role.name());
            holder.kill()?;
        }
        platform::pause(LOOK);
    }
    Ok(())
}

fn restart(home: &Home) -> Result<()> {
    let before = role::living(home, Role::Spm).map(|holder| holder.pid);
    if before.is_none() || role::is_stop_recorded(home) {
        return start(home);
    }
    match service(home)? {
        Kind::Systemd => host_service::restart(home, &[Role::Spm, Role::Spa])?,
        Kind::None => {
            if let Some(spa) = role::living(home, Role::Spa) {
                spa.ask_to_end()?;
                end_role(home, Role::Spa)?;
            }
            door::ask(home, &Request::Yield, ANSWER)?;
            end_role(home, Role::Spm)?;
            drop(role::spawn(home, Role::Spm)?);
        }
    }
    door::wait_until_it_answers(home, START)?;
    anstream::eprintln!("restarted; the sub-agents were left running");
    Ok(())
}

fn restart_agent(home: &Home, name: &AgentName) -> Result<()> {
    let Some(reply) = door::ask(home, &Request::Restart { agent: name.clone() }, ANSWER)? else {
        bail!("cannot restart {name}: the manager does not run; start it with `control start`");
    };
    match reply.error {
        Some(error) => bail!(error),
        None => {
            anstream::eprintln!("{name} is being restarted");
            Ok(())
        }
    }
}
