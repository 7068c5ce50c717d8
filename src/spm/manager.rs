//! The manager's event loop, which owns all of its state.
//!
//! The loop waits for its inputs only. [`core::agent`](crate::core::agent) makes the decisions about a sub-agent; here its actions are
//! carried out ([`steps`]), and their results handled ([`outcomes`]).

mod adoption;
mod exchange;
mod housekeeping;
mod ledger;
mod orders;
mod outcomes;
mod requests;
mod steps;
mod upgrade;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{mpsc, oneshot, watch};

use self::exchange::GatewayLink;
use self::housekeeping::MaintenanceSchedule;
use self::ledger::LedgerWriter;
use self::orders::DesiredStateStore;
use self::upgrade::ManagerUpgrade;
use super::agent::SubAgent;
use super::disk::StateFile;
use super::history::UpgradeHistory;
use super::input::{Inputs, StateFileName};
use super::journal::{EventSubject, Journal};
use super::stage;
use super::watchdog_link::WatchdogLink;
use crate::config::{self, Config, LoadedSettings};
use crate::control_socket::{self, ControlReply, Goodbye};
use crate::core::agent::AgentEvent;
use crate::core::desired::DesiredState;
use crate::core::model::{AgentId, AgentName, Version};
use crate::core::schedule::RateLimiter;
use crate::core::service_manager::{Notification, ServiceManagerKind};
use crate::core::upgrade::NewEndpoint;
use crate::home::Home;
use crate::installation::upgrade::Programs;
use crate::installation::{self, permissions, temporaries};
use crate::package::{self, PackagePaths};
use crate::platform::{self, Groups, LocalListener, Termination};
use crate::process;
use crate::role::RoleHolder;
use crate::store;

/// Rate limit for events about rejected clients of the control socket: this burst, then one per interval.
const REJECTIONS_BURST: u32 = 3;
const REJECTIONS_INTERVAL: Duration = Duration::from_secs(600);
/// Timeout for the last writes before the process exits.
const FINAL_WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for sending the goodbye on all connections of the control socket.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);

/// The identity of this manager process.
#[derive(Debug)]
struct ManagerIdentity {
    agent_id: AgentId,
    instance_id: String,
    version: Version,
    started: Instant,
    own: RoleHolder,
}

/// A stop of the home in progress.
#[derive(Debug)]
struct PendingStop {
    /// The requests to answer when it completes.
    waiting: Vec<oneshot::Sender<ControlReply>>,
    errors: Vec<String>,
    /// Its record was written, could not be written or timed out: the sub-agents are being stopped.
    is_recorded: bool,
    /// When waiting for the record times out.
    recorded_by: Instant,
}

pub(super) struct Manager {
    home: Home,
    identity: ManagerIdentity,
    config: Config,
    orders: DesiredStateStore,
    agents: BTreeMap<AgentName, SubAgent>,
    last_serial: u64,
    releases: LedgerWriter,
    /// The parent of the sub-agents' cgroups; `None` where this host has none.
    groups: Option<Groups>,
    /// Something changed that a plan depends on.
    replan: bool,
    journal: Journal,
    history: UpgradeHistory,
    watchdog: WatchdogLink,
    inputs: Inputs,
    upgrading: ManagerUpgrade,
    staging: stage::StagingContext,
    gateway: GatewayLink,
    housekeeping: MaintenanceSchedule,
    /// Limits the events about rejected clients of the control socket.
    rejections: RateLimiter,
    /// By subject, so that a resolved problem is removed.
    problems: BTreeMap<&'static str, String>,
    stop: Option<PendingStop>,
    exit: Option<Goodbye>,
}

/// Runs the manager until it is asked to exit; returns whether the home stops or another manager follows.
///
/// `own`: this manager's record, which is written later if it could not be written before.
pub(super) async fn run(home: &Home, service: ServiceManagerKind, own: &RoleHolder) -> Result<Goodbye> {
    let (inputs, mut input_queue) = mpsc::unbounded_channel();
    let mut termination = Termination::new()?;
    if let Err(error) = platform::adopt_orphans() {
        tracing::warn!(error = %error, "cannot become the subreaper; orphaned processes of sub-agents go to init, which may not reap them");
    }
    let mut manager = Manager::load(home, service, own, inputs)?;
    manager.check_home_now();
    manager.show_rejected_orders();
    manager.adopt_all();

    let listener = LocalListener::bind(&home.control_socket())
        .with_context(|| format!("cannot listen on {}", home.control_socket().display()))?;
    let (request, mut requests) = mpsc::channel(16);
    let (goodbye, goodbye_receiver) = watch::channel(None);
    let server = tokio::spawn(control_socket::serve(listener, request, goodbye_receiver));
    platform::notify(Notification::Ready);
    let version = &manager.identity.version;
    tracing::info!(version = %version, pid = std::process::id(), agents = manager.agents.len(), "the manager is ready");

    let exit = loop {
        if std::mem::take(&mut manager.replan) {
            manager.reconcile();
        }
        manager.write_ledger();
        if let Some(exit) = manager.exit {
            break exit;
        }
        let deadline = manager.deadline();
        tokio::select! {
            // Every arm receives one value from a channel or sleeps: all are cancel-safe.
            Some(input) = input_queue.recv() => manager.handle_input(input),
            Some(request) = requests.recv() => manager.handle_request(request),
            () = tokio::time::sleep_until(deadline.into()) => manager.tick(),
            () = termination.recv() => manager.handle_termination(),
        }
    };
    platform::notify(Notification::Stopping);
    manager.journal.flush(&manager.inputs);
    // Stop accepting connections first: the watchdog reconnects right after the goodbye, and would take the manager's exit for a crash.
    server.abort();
    let _ = server.await;
    goodbye.send_replace(Some(exit));
    // Every connection drops its receiver when it has sent the goodbye.
    let _ = tokio::time::timeout(GOODBYE_TIMEOUT, goodbye.closed()).await;
    manager.finish().await;
    Ok(exit)
}

impl Manager {
    /// Writes pending changes before the process exits.
    async fn finish(self) {
        let Manager { journal, history, releases, orders, .. } = self;
        let written = async { tokio::join!(journal.finish(), history.finish(), releases.finish(), orders.finish()) };
        if tokio::time::timeout(FINAL_WRITE_TIMEOUT, written).await.is_err() {
            tracing::warn!("cannot write the last changes before exit: the disk does not answer in time");
        }
    }

    fn load(home: &Home, service: ServiceManagerKind, own: &RoleHolder, inputs: Inputs) -> Result<Manager> {
        let mut problems = BTreeMap::new();
        let loaded = Config::load(home)?;
        warn_of_unknown_keys(&loaded);
        if let Some(problem) = &loaded.problem {
            problems.insert("config", config_problem(problem));
        }
        let agent_id = installation::agent_id(home)
            .context("cannot read this host's agent id; reinstall with `aops install --agent-id ID`")?;
        let agent_id = agent_id.with_context(|| {
            format!(
                "cannot read this host's agent id: {} is missing; reinstall with `aops install --agent-id ID`",
                home.agent_id().display()
            )
        })?;
        let desired_path = home.desired();
        let desired: Option<DesiredState> = store::load(&desired_path).unwrap_or_else(|error| {
            let text = format!("the stored desired state is lost and is requested again from the gateway: {error:#}");
            tracing::error!(error = text, "cannot read the stored desired state");
            problems.insert("desired", text);
            None
        });
        let releases = LedgerWriter::load(home, &mut problems);
        let mut journal = Journal::load(home);
        for problem in problems.values() {
            journal.note("config", "failed", EventSubject::default(), problem.as_str());
        }
        temporaries::sweep(home);
        // An unsafe home may contain symbolic links to files of other users.
        if permissions::home(home).is_ok()
            && let Err(error) = package::sweep(&PackagePaths::of(home))
        {
            tracing::warn!(error = format!("{error:#}"), "cannot remove files that earlier downloads left in staging/");
        }
        let record = installation::upgrade::load(home).unwrap_or_else(|error| {
            tracing::error!(error = format!("{error:#}"), "cannot read the record of the manager's upgrades");
            Default::default()
        });
        let on_trial = installation::upgrade::on_trial(&record, &mut Programs::default());
        let endpoint = on_trial.as_ref().and_then(|image| image.endpoint.clone());
        let config = with_trial_endpoint(home, loaded.config, endpoint.as_ref());
        let now = Instant::now();
        let mut gateway = GatewayLink::new(home, &agent_id, &config, desired.is_some(), &inputs, now);
        let mut held = desired.unwrap_or_default();
        held.forget_stale();
        gateway.requests_current_list = held.rejected().next().is_some();
        let installed = installation::ManagerRecord::load(home)
            .context("cannot read the manager's release; reinstall with `aops install`")?
            .with_context(|| {
                format!(
                    "cannot read the manager's release: {} is missing; reinstall with `aops install`",
                    home.manager_record().display()
                )
            })?
            .version;
        let version = on_trial.map_or(installed, |image| image.version);
        let identity = ManagerIdentity {
            agent_id,
            instance_id: installation::instance_id(home),
            version,
            started: now,
            own: own.clone(),
        };
        Ok(Manager {
            home: home.clone(),
            housekeeping: MaintenanceSchedule::new(home, own, now),
            identity,
            orders: DesiredStateStore::new(held, StateFile::new(StateFileName::Desired, desired_path), now),
            agents: BTreeMap::new(),
            last_serial: 0,
            releases,
            groups: groups(home),
            replan: true,
            journal,
            history: UpgradeHistory::load(home),
            watchdog: WatchdogLink::new(home, service, now),
            inputs,
            upgrading: ManagerUpgrade::new(record, endpoint),
            staging: stage::StagingContext::new(),
            gateway,
            rejections: RateLimiter::new(REJECTIONS_BURST, REJECTIONS_INTERVAL),
            problems,
            config,
            stop: None,
            exit: None,
        })
    }

    /// Handles a signal to exit: the sub-agents keep running, unless the home is being stopped.
    fn handle_termination(&mut self) {
        if self.stop.is_some() {
            tracing::info!("received a signal to exit; the manager exits when every sub-agent is stopped");
            return;
        }
        tracing::info!("received a signal to exit; the sub-agents keep running");
        self.exit = Some(Goodbye::Yield);
    }

    fn deadline(&self) -> Instant {
        let now = Instant::now();
        let agents = self.agents.values().filter_map(|agent| agent.state.deadline(now));
        // The watchdog is not supervised while the home stops.
        let watchdog = self.stop.is_none().then(|| self.watchdog.deadline());
        let recorded_by = self.stop.as_ref().filter(|stop| !stop.is_recorded).map(|stop| stop.recorded_by);
        let upgrading = self.stop.is_none().then(|| self.upgrading.deadline(now)).flatten();
        let fixed = [
            upgrading,
            self.gateway.next_heartbeat,
            Some(self.housekeeping.next),
            self.journal.flush_at(),
            watchdog,
            recorded_by,
        ];
        fixed.into_iter().flatten().chain(agents).min().unwrap_or(now)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let due = self.agents.values().filter(|agent| agent.state.is_due(now));
        for name in due.map(|agent| agent.state.name().clone()).collect::<Vec<_>>() {
            self.step(&name, AgentEvent::Tick, now);
        }
        self.replan |= self.agents.values().any(|agent| agent.state.hold_is_over(now));
        if self.housekeeping.was_held_up(now) {
            tracing::warn!("the manager was not scheduled for a while; timeouts that expired in that time are ignored");
            self.watchdog.ping(now);
        }
        if now >= self.watchdog.deadline() && self.stop.is_none() {
            self.watchdog.tick(&self.home, &self.inputs, now);
        }
        if self.journal.flush_at().is_some_and(|at| at <= now) {
            self.journal.flush(&self.inputs);
        }
        if now >= self.housekeeping.next {
            self.run_housekeeping(now);
        }
        if self.gateway.next_heartbeat.is_some_and(|at| at <= now) {
            self.heartbeat_due(now);
        }
        if self.stop.is_none() {
            self.tick_upgrade(now);
        }
        if self.stop.as_ref().is_some_and(|stop| stop.recorded_by <= now) {
            self.stop_recorded(now);
        }
    }

    /// Reports a problem once when it appears, and once when it is resolved.
    fn report_problem(&mut self, subject: &'static str, outcome: &str, problem: Option<String>) {
        match problem {
            Some(text) if self.problems.get(subject) == Some(&text) => {}
            Some(text) => {
                self.journal.note(subject, outcome, EventSubject::default(), text.as_str());
                self.problems.insert(subject, text);
            }
            None if self.problems.remove(subject).is_some() => {
                self.journal.note(
                    subject,
                    "ok",
                    EventSubject::default(),
                    "the last reported problem of this kind is resolved",
                );
            }
            None => {}
        }
    }
}

/// The settings with the endpoint that a release on trial brings.
fn with_trial_endpoint(home: &Home, config: Config, endpoint: Option<&NewEndpoint>) -> Config {
    let Some(endpoint) = endpoint else { return config };
    config::new_endpoint::on_trial(home, &config, endpoint).unwrap_or_else(|error| {
        tracing::error!(error = format!("{error:#}"), "cannot use the endpoint that this release brings");
        config
    })
}

fn groups(home: &Home) -> Option<Groups> {
    let groups = process::groups(home);
    match &groups {
        Some(groups) => tracing::info!(place = groups.location(), "each sub-agent runs in a group of its own"),
        None => tracing::warn!(
            "this host has no writable cgroup; a sub-agent's processes are found by session, descent and environment marker, \
             and a process that escapes all of these survives the sub-agent's stop"
        ),
    }
    groups
}

fn warn_of_unknown_keys(loaded: &LoadedSettings) {
    for unknown in &loaded.unknown {
        tracing::warn!(key = %unknown, "unknown key in the settings");
    }
}

fn config_problem(problem: &anyhow::Error) -> String {
    format!("{problem:#}; the last good settings are in use")
}
