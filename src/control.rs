//! What the operator at the host uses: status, start, stop, restart, logs.
//!
//! It asks the manager through the local door. Where that does not answer, it goes by the records of what runs, so that a stop is possible
//! whatever state the manager is in.

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

/// `status` of a stopped home.
const STOPPED: u8 = 3;
/// Any verb where nothing is installed.
const NOT_INSTALLED: u8 = 4;

/// A manager that works answers at once.
const ANSWER: Duration = Duration::from_secs(5);
/// The record of an upgrade is held for one step.
const TURN: Duration = Duration::from_secs(10);
/// The roles come up within this.
const START: Duration = Duration::from_secs(30);

/// What an operator may ask for.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum ControlAction {
    /// Show the manager, the watchdog, the gateway and every sub-agent
    ///
    /// Exit code: 0 running or degraded, 3 stopped, 4 nothing installed.
    Status {
        /// Print one JSON document
        #[arg(long)]
        json: bool,
        /// Show what came of each upgrade and rollback instead
        #[arg(long)]
        history: bool,
    },
    /// Start what was stopped
    ///
    /// Where no service manager runs them, the roles leave the caller: its
    /// session, cgroup, limits, priority and signals; of its environment they
    /// keep LANG, TZ, the variables of a proxy, SSL_CERT_FILE and SSL_CERT_DIR.
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
    /// Follow the gateway's orders now, or upgrade the manager from a file
    ///
    /// Without options: what an operator's change holds back is followed again,
    /// and what waits for its next try is tried now. A change of the manager's
    /// release is on trial at first, and rolled back by itself if it fails.
    Upgrade {
        /// Upgrade the manager from this package (FILE.minisig beside it)
        #[arg(long, value_name = "FILE", group = "what")]
        package: Option<PathBuf>,
        /// Keep the release that is on trial now
        #[arg(long, group = "what")]
        commit: bool,
        /// Roll the release back that is on trial now, and skip it
        #[arg(long, group = "what")]
        abort: bool,
    },
    /// Return a sub-agent, or the manager, to its previous release
    ///
    /// It stays at that release until the gateway orders another one.
    Rollback {
        /// The sub-agent; without it, the manager
        agent: Option<AgentName>,
    },
    /// Try a release again that failed, or is held back
    Retry {
        /// The sub-agent, or aops-spm for the manager
        agent: AgentName,
    },
    /// Show the log of the manager, or of a sub-agent
    Logs(LogOptions),
}

/// Carries a verb out.
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
            force(home, if *commit { OperatorDecision::Commit } else { OperatorDecision::Abort })
        }
        ControlAction::Rollback { agent: None } => {
            order(home, "roll the manager back", &Request::RollBackManager)?;
            message!("the manager returns to its previous release; `status` shows how far it is");
            Ok(ExitCode::SUCCESS)
        }
        ControlAction::Rollback { agent: Some(agent) } => {
            order(home, &format!("roll {agent} back"), &Request::RollBack { agent: agent.clone() })?;
            message!("{agent} returns to its previous release; `status` shows how far it is");
            Ok(ExitCode::SUCCESS)
        }
        ControlAction::Retry { agent } => {
            order(home, &format!("retry {agent}"), &Request::Retry { agent: agent.clone() })?;
            message!("{agent} is tried again as ordered; `status` shows how far it is");
            Ok(ExitCode::SUCCESS)
        }
        ControlAction::Logs(options) => logs::show(home, options).map(|()| ExitCode::SUCCESS),
    }
}

fn upgrade(home: &Home, package: Option<&Path>) -> Result<ExitCode> {
    let package = package.map(|path| {
        path.canonicalize().with_context(|| format!("cannot upgrade: cannot find the package {}", path.display()))
    });
    let package = package.transpose()?;
    let told = match &package {
        Some(_) => "the manager upgrades itself to the package's release",
        None => "the gateway's orders are followed now",
    };
    order(home, "upgrade", &Request::Upgrade { package })?;
    message!("{told}; `status` shows how far it is, `status --history` what came of it");
    Ok(ExitCode::SUCCESS)
}

/// Decides about the release of the manager that is on trial, whoever of the roles answers. The watchdog carries it out.
fn force(home: &Home, force: OperatorDecision) -> Result<ExitCode> {
    let what = if force == OperatorDecision::Commit { "commit" } else { "abort" };
    let session = UpgradeSession::open(home, TURN).with_context(|| format!("cannot {what} the upgrade"))?;
    let Some(mut session) = session else {
        bail!("cannot {what} the upgrade: its record is in use by another process; try again");
    };
    let Some(to) = session.record().trial().map(|trial| trial.to.version.clone()) else {
        bail!("cannot {what} the upgrade: no upgrade of the manager is under way");
    };
    if !session.change(|record| record.force(force))? {
        bail!("cannot {what} the upgrade to {to}: it is decided already; see `status`");
    }
    message!(
        "the manager's release {to} is {}; `status` shows how far it is",
        if force == OperatorDecision::Commit { "kept" } else { "rolled back and skipped" }
    );
    Ok(ExitCode::SUCCESS)
}

fn not_installed(home: &Home, command: &ControlAction) -> ExitCode {
    if let ControlAction::Status { json: true, history: false } = command {
        let status = Status::silent(home.known_as().display().to_string(), None, HomeState::NotInstalled);
        if let Err(error) = show::print(&status, true) {
            message!("error: {error:#}");
        }
    }
    message!("nothing is installed in {}; give another --home, or install with `aops install`", home.root().display());
    ExitCode::from(NOT_INSTALLED)
}

/// What runs, from the manager itself or, where it does not answer, from what it left.
fn status(home: &Home) -> Result<Status> {
    let mut problem = None;
    match control_socket::request(home, &Request::Status, ANSWER) {
        Ok(Some(reply)) => {
            if let Some(mut status) = reply.status {
                status.notes.extend(boot_note(home));
                return Ok(*status);
            }
            problem = reply.error;
        }
        Ok(None) => {}
        // Whoever may not ask may not see the records either, by which it would look stopped.
        Err(error) if error.is::<control_socket::AccessDenied>() => return Err(error),
        Err(error) => problem = Some(format!("{error:#}")),
    }
    let version = ManagerRecord::load(home).ok().flatten().map(|manager| manager.version);
    let (spm, spa) = (role::living(home, Role::Spm), role::living(home, Role::Spa));
    let agents_run = process::tree::any_running(home);
    let state = if spm.is_none() && spa.is_none() && !agents_run { HomeState::Stopped } else { HomeState::Degraded };
    let mut status = Status::silent(home.known_as().display().to_string(), version, state);
    status.upgrade = installation::upgrade::load(home).ok().as_ref().and_then(UpgradeRecord::trial).map(upgrade_status);
    status.spm = spm.as_ref().map_or_else(RoleStatus::default, role::RoleHolder::status);
    status.spa = spa.as_ref().map_or_else(RoleStatus::default, role::RoleHolder::status);
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

/// What the record alone tells of an upgrade.
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

/// That nothing starts this home at boot, where it is so.
fn boot_note(home: &Home) -> Option<String> {
    let service = InstallRecord::load(home).ok().flatten().map(|installed| installed.service)?;
    (service == ServiceManagerKind::None).then(|| {
        format!("nothing starts this home at boot; have the host run `{} start` then", home.control_link().display())
    })
}

fn start(home: &Home) -> Result<()> {
    lifecycle::start(home)?;
    control_socket::wait_until_ready(home, START).context("cannot start")?;
    message!("started");
    Ok(())
}

/// Stops everything, whoever is alive to help. Nothing of it comes back by itself.
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
    control_socket::wait_until_ready(home, START).context("cannot restart")?;
    message!("restarted; the sub-agents were left running");
    Ok(())
}

fn restart_agent(home: &Home, name: &AgentName) -> Result<()> {
    order(home, &format!("restart {name}"), &Request::Restart { agent: name.clone() })?;
    message!("{name} is being restarted");
    Ok(())
}

/// Has the manager do something. `what`: as an error says it.
fn order(home: &Home, what: &str, request: &Request) -> Result<()> {
    let Some(reply) = control_socket::request(home, request, ANSWER)? else {
        bail!("cannot {what}: the manager does not run; start it with `control start`");
    };
    match reply.error {
        Some(error) => bail!(error),
        None => Ok(()),
    }
}
