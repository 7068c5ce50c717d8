//! `aops control`: the commands of the operator at the host.
//!
//! They query the manager through its control socket. If the manager does not answer, `status` and `stop` use the process records, so
//! that a home can be stopped in any state of its manager.

mod logs;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::control_socket::{self, Request};
use crate::core::model::AgentName;
use crate::core::role::Role;
use crate::core::service_manager::ServiceManagerKind;
use crate::core::status::{History, HomeState, RoleStatus, Status, UpgradeStatus};
use crate::core::upgrade::{OperatorDecision, Trial, UpgradePhase, UpgradeRecord};
use crate::home::Home;
use crate::installation::upgrade::UpgradeSession;
use crate::installation::{self, InstallRecord, ManagerRecord};
use crate::output::message;
use crate::{lifecycle, process, role, store};

pub use logs::LogOptions;

/// Exit code of `status` if the home is stopped.
const STOPPED: u8 = 3;
/// Exit code of any command if nothing is installed.
const NOT_INSTALLED: u8 = 4;

/// Timeout of a request. A working manager answers at once.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for the lock on the upgrade's record. A role holds it for one step.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout until the manager answers after a start.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A command of `aops control`.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum ControlAction {
    /// Show the manager, the watchdog, the gateway and every sub-agent
    ///
    /// Exit code: 0 running or degraded, 3 stopped, 4 nothing installed.
    Status {
        /// Print one JSON document
        #[arg(long)]
        json: bool,
        /// Show the result of each upgrade and rollback instead
        #[arg(long)]
        history: bool,
    },
    /// Start the manager and the watchdog, and with them the sub-agents
    ///
    /// Without a service manager, the roles are detached from the caller: from
    /// its session, cgroup, limits, priority and signals. Of its environment
    /// they keep only LANG, TZ, the proxy variables, SSL_CERT_FILE and
    /// SSL_CERT_DIR.
    Start,
    /// Stop every sub-agent, the manager and the watchdog
    ///
    /// Nothing restarts until `control start` or the next boot.
    Stop,
    /// Restart the manager and the watchdog, or one sub-agent
    ///
    /// The sub-agents keep running while the roles restart.
    Restart {
        /// The sub-agent to restart; without it, the manager and the watchdog
        agent: Option<AgentName>,
    },
    /// Apply the gateway's orders now, or upgrade the manager from a file
    ///
    /// Without options: follow the gateway's orders again where `rollback` or
    /// `--package` overruled them, and retry a pending upgrade of the manager.
    ///
    /// A new release of the manager must first read the settings and the state
    /// of this home. During its trial (upgradeTrial in etc/conf.toml) it must
    /// answer the watchdog, adopt the running sub-agents and send a heartbeat.
    /// The watchdog, still the previous release, supervises the trial. If it
    /// fails, bin/aops is restored from bin/aops.prev and the release is skipped.
    /// While the gateway is unreachable, the trial continues.
    Upgrade {
        /// Upgrade the manager from this package, with FILE.minisig beside it
        #[arg(long, value_name = "FILE", group = "what")]
        package: Option<PathBuf>,
        /// Commit the release of the manager that is on trial
        #[arg(long, group = "what")]
        commit: bool,
        /// Roll back the release of the manager that is on trial, and skip it
        #[arg(long, group = "what")]
        abort: bool,
    },
    /// Roll back a sub-agent, or the manager, to its previous release
    ///
    /// It stays at that release until the gateway orders a different one.
    Rollback {
        /// The sub-agent; without it, the manager
        agent: Option<AgentName>,
    },
    /// Retry a release that failed or was rolled back
    ///
    /// A failed release is skipped until fleet.toml orders a different one, or
    /// has a higher number in the `retry` of the sub-agent (`retry = 1`, then
    /// 2), or until this command is run.
    Retry {
        /// The sub-agent, or aops-spm for the manager
        agent: AgentName,
    },
    /// Show the log of the manager, the watchdog or a sub-agent
    Logs(LogOptions),
}

/// Runs a command.
pub fn main(home: &Home, command: &ControlAction) -> Result<ExitCode> {
    if !installation::exists(home) {
        return Ok(not_installed(home, command));
    }
    match command {
        ControlAction::Status { json, history: true } => {
            let history: Option<History> = store::load(&home.history())?;
            show::print_history(&history.unwrap_or_default(), *json)?;
            Ok(ExitCode::SUCCESS)
        }
        ControlAction::Status { json, history: false } => {
            let status = status(home)?;
            show::print(&status, *json)?;
            Ok(if status.state == HomeState::Stopped { ExitCode::from(STOPPED) } else { ExitCode::SUCCESS })
        }
        ControlAction::Start => start(home).map(|()| ExitCode::SUCCESS),
        ControlAction::Stop => stop(home).map(|()| ExitCode::SUCCESS),
        ControlAction::Restart { agent: None } => restart(home).map(|()| ExitCode::SUCCESS),
        ControlAction::Restart { agent: Some(name) } => restart_agent(home, name).map(|()| ExitCode::SUCCESS),
        ControlAction::Upgrade { package, commit: false, abort: false } => upgrade(home, package.as_deref()),
        ControlAction::Upgrade { commit, .. } => {
            decide(home, if *commit { OperatorDecision::Commit } else { OperatorDecision::Abort })
        }
        ControlAction::Rollback { agent: None } => {
            send(home, "roll back the manager", &Request::RollBackManager)?;
            message!("rolling back the manager to its previous release; `status` shows the progress");
            Ok(ExitCode::SUCCESS)
        }
        ControlAction::Rollback { agent: Some(agent) } => {
            send(home, &format!("roll back {agent}"), &Request::RollBack { agent: agent.clone() })?;
            message!("rolling back {agent} to its previous release; `status` shows the progress");
            Ok(ExitCode::SUCCESS)
        }
        ControlAction::Retry { agent } => {
            send(home, &format!("retry {agent}"), &Request::Retry { agent: agent.clone() })?;
            message!("retrying the ordered release of {agent}; `status` shows the progress");
            Ok(ExitCode::SUCCESS)
        }
        ControlAction::Logs(options) => logs::show(home, options).map(|()| ExitCode::SUCCESS),
    }
}

fn upgrade(home: &Home, package: Option<&Path>) -> Result<ExitCode> {
    let package = package
        .map(|path| path.canonicalize().with_context(|| format!("cannot upgrade the manager from {}", path.display())));
    let package = package.transpose()?;
    let started = match &package {
        Some(_) => "upgrading the manager to the release of the package",
        None => "applying the gateway's orders now",
    };
    send(home, "upgrade", &Request::Upgrade { package })?;
    message!("{started}; `status` shows the progress, `status --history` the result");
    Ok(ExitCode::SUCCESS)
}

/// Records the operator's decision on the manager's release that is on trial; works also if neither role answers. The watchdog carries it
/// out.
fn decide(home: &Home, decision: OperatorDecision) -> Result<ExitCode> {
    let verb = if decision == OperatorDecision::Commit { "commit" } else { "abort" };
    let session = UpgradeSession::open(home, LOCK_TIMEOUT).with_context(|| format!("cannot {verb} the upgrade"))?;
    let Some(mut session) = session else {
        bail!("cannot {verb} the upgrade: its record is in use by another process; try again");
    };
    let Some(to) = session.record().trial().map(|trial| trial.to.version.clone()) else {
        bail!("cannot {verb} the upgrade: no upgrade of the manager is under way");
    };
    if !session.change(|record| record.force(decision))? {
        bail!("cannot {verb} the upgrade to {to}: it is already decided; see `status`");
    }
    message!(
        "{} the manager's release {to}; `status` shows the progress",
        if decision == OperatorDecision::Commit { "committing" } else { "rolling back and skipping" }
    );
    Ok(ExitCode::SUCCESS)
}

fn not_installed(home: &Home, command: &ControlAction) -> ExitCode {
    let advice = installation::enrolment::advice(home);
    if let ControlAction::Status { json: true, history: false } = command {
        let mut status = Status::silent(home.public_path().display().to_string(), None, HomeState::NotInstalled);
        status.problems.extend(advice.clone());
        if let Err(error) = show::print(&status, true) {
            message!("error: {error:#}");
        }
    }
    match advice {
        Some(advice) => message!("{advice}"),
        None => message!(
            "nothing is installed in {}; give another --home, or install with `aops install`",
            home.root().display()
        ),
    }
    ExitCode::from(NOT_INSTALLED)
}

/// The status that the manager reports or, if it does not answer, that the process records give.
fn status(home: &Home) -> Result<Status> {
    let mut problem = None;
    match control_socket::request(home, &Request::Status, REPLY_TIMEOUT) {
        Ok(Some(reply)) => {
            if let Some(mut status) = reply.status {
                status.notes.extend(boot_note(home));
                return Ok(*status);
            }
            problem = reply.error;
        }
        Ok(None) => {}
        // A user without access to the socket cannot read the records either: the home would look stopped.
        Err(error) if error.is::<control_socket::AccessDenied>() => return Err(error),
        Err(error) => problem = Some(format!("{error:#}")),
    }
    let version = ManagerRecord::load(home).ok().flatten().map(|manager| manager.version);
    let (spm, spa) = (role::living(home, Role::Spm), role::living(home, Role::Spa));
    let agents_run = process::tree::any_running(home);
    let state = if spm.is_none() && spa.is_none() && !agents_run { HomeState::Stopped } else { HomeState::Degraded };
    let mut status = Status::silent(home.public_path().display().to_string(), version, state);
    status.upgrade = installation::upgrade::load(home).ok().as_ref().and_then(UpgradeRecord::trial).map(upgrade_status);
    status.spm = spm.as_ref().map_or_else(RoleStatus::default, role::RoleHolder::status);
    status.spa = spa.as_ref().map_or_else(RoleStatus::default, role::RoleHolder::status);
    if state == HomeState::Degraded {
        let state = if spm.is_some() { "the manager does not answer" } else { "the manager is not running" };
        status.problems.push(problem.map_or_else(|| state.to_owned(), |problem| format!("{state}: {problem}")));
        if spm.is_none() && spa.is_none() {
            let orphaned = "sub-agents are running without a manager; `control start` starts one that adopts them";
            status.problems.push(orphaned.to_owned());
        }
    }
    status.notes.extend(boot_note(home));
    Ok(status)
}

/// The status of an upgrade according to its record alone.
fn upgrade_status(trial: &Trial) -> UpgradeStatus {
    let phase = match trial.phase {
        UpgradePhase::Switching => "switching",
        UpgradePhase::Trial => "trial",
        UpgradePhase::Committing => "committing",
        UpgradePhase::RollingBack => "rollingBack",
    };
    UpgradeStatus {
        from: Some(trial.from.version.clone()),
        to: trial.to.version.clone(),
        phase: phase.to_owned(),
        deadline: None,
        tries_left: None,
        reason: trial.reason.clone(),
        download: None,
    }
}

/// The note for a home that nothing starts at boot; `None` if a service manager starts it.
fn boot_note(home: &Home) -> Option<String> {
    let service = InstallRecord::load(home).ok().flatten().map(|installed| installed.service)?;
    (service == ServiceManagerKind::None).then(|| {
        format!("nothing starts this home at boot; configure the host to run `{} start`", home.control_link().display())
    })
}

fn start(home: &Home) -> Result<()> {
    lifecycle::start(home)?;
    control_socket::wait_until_ready(home, START_TIMEOUT).context("cannot start")?;
    message!("started");
    Ok(())
}

/// Stops the sub-agents and both roles, also if the manager or the watchdog is dead, and records the stop: nothing restarts them.
fn stop(home: &Home) -> Result<()> {
    for remark in lifecycle::stop(home)? {
        message!("{remark}");
    }
    message!("stopped");
    Ok(())
}

fn restart(home: &Home) -> Result<()> {
    if role::living(home, Role::Spm).is_none() || role::is_stop_recorded(home) {
        return start(home);
    }
    lifecycle::restart(home)?;
    control_socket::wait_until_ready(home, START_TIMEOUT).context("cannot restart")?;
    message!("restarted; the sub-agents kept running");
    Ok(())
}

fn restart_agent(home: &Home, name: &AgentName) -> Result<()> {
    send(home, &format!("restart {name}"), &Request::Restart { agent: name.clone() })?;
    message!("restarting {name}");
    Ok(())
}

/// Sends a request to the manager. `action`: what it does, for the error `cannot <action>`.
fn send(home: &Home, action: &str, request: &Request) -> Result<()> {
    let Some(reply) = control_socket::request(home, request, REPLY_TIMEOUT)? else {
        bail!("cannot {action}: the manager is not running; start it with `control start`");
    };
    match reply.error {
        Some(error) => bail!(error),
        None => Ok(()),
    }
}
