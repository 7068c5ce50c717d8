//! The manager's one task: all of its state, and what follows from each thing that it hears.
//!
//! The loop waits for nothing but its inputs. What is decided about a sub-agent is decided in [`core::agent`](crate::core::agent); here its
//! actions are carried out ([`steps`]), and their outcomes taken in ([`outcomes`]).

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
use crate::installation::{self, permissions};
use crate::package::{self, PackagePaths};
use crate::platform::{self, Groups, LocalListener, Termination};
use crate::process;
use crate::role::RoleHolder;
use crate::store;

/// Of strangers at the door, so many are reported at once, and one more each so often.
const STRANGERS_AT_ONCE: u32 = 3;
const STRANGERS_EVERY: Duration = Duration::from_secs(600);
/// The end of the process waits so long for a disk.
const LAST_WRITE: Duration = Duration::from_secs(5);
/// Connections at the door get so long to hear the farewell.
const FAREWELL: Duration = Duration::from_millis(500);

/// Who this manager is.
#[derive(Debug)]
struct ManagerIdentity {
    agent_id: AgentId,
    instance_id: String,
    version: Version,
    started: Instant,
    own: RoleHolder,
}

/// A stop of the home that is under way.
#[derive(Debug)]
struct PendingStop {
    /// Whom it is answered to.
    waiting: Vec<oneshot::Sender<ControlReply>>,
    errors: Vec<String>,
    /// Its record was written, or could not be: the sub-agents are being stopped.
    is_recorded: bool,
    /// A disk is waited for so long.
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
    /// Where the sub-agents' process trees are held together.
    groups: Option<Groups>,
    /// Something came about that a plan goes by.
    replan: bool,
    journal: Journal,
    history: UpgradeHistory,
    peer: WatchdogLink,
    inputs: Inputs,
    upgrading: ManagerUpgrade,
    desk: stage::StagingContext,
    line: GatewayLink,
    housekeeping: MaintenanceSchedule,
    /// How often a stranger at the door is reported.
    strangers: RateLimiter,
    /// By subject, so that one that is resolved disappears.
    problems: BTreeMap<&'static str, String>,
    stop: Option<PendingStop>,
    ending: Option<Goodbye>,
}

/// Runs the manager until it is told to end, and says as what it ended.
///
/// `own`: its record, which it sees to where that could not be written at first.
pub(super) async fn run(home: &Home, service: ServiceManagerKind, own: &RoleHolder) -> Result<Goodbye> {
    let (inputs, mut words) = mpsc::unbounded_channel();
    let mut termination = Termination::new()?;
    if let Err(error) = platform::adopt_orphans() {
        tracing::warn!(error = %error, "the orphans of sub-agents go to init, which may not reap them");
    }
    let mut manager = Manager::load(home, service, own, inputs)?;
    manager.look_at_home_now();
    manager.show_refused_orders();
    manager.take_charge();

    let listener = LocalListener::bind(&home.control_socket())
        .with_context(|| format!("cannot listen at {}", home.control_socket().display()))?;
    let (knock, mut knocks) = mpsc::channel(16);
    let (farewell, heard) = watch::channel(None);
    let door = tokio::spawn(control_socket::serve(listener, knock, heard));
    platform::notify(Notification::Ready);
    let version = &manager.identity.version;
    tracing::info!(version = %version, pid = std::process::id(), agents = manager.agents.len(), "the manager is ready");

    let ending = loop {
        if std::mem::take(&mut manager.replan) {
            manager.reconcile();
        }
        manager.write_ledger();
        if let Some(ending) = manager.ending {
            break ending;
        }
        let deadline = manager.deadline();
        tokio::select! {
            // Each arm takes one value from a channel or waits: all are cancel-safe.
            Some(input) = words.recv() => manager.take_in(input),
            Some(knock) = knocks.recv() => manager.answer_knock(knock),
            () = tokio::time::sleep_until(deadline.into()) => manager.tick(),
            () = termination.recv() => manager.asked_to_end(),
        }
    };
    platform::notify(Notification::Stopping);
    manager.journal.flush(&manager.inputs);
    // The door is shut first: the watchdog, which connects again as soon as it heard the farewell, would take our end for a death.
    door.abort();
    let _ = door.await;
    farewell.send_replace(Some(ending));
    // Every connection drops its receiver when it has sent the farewell.
    let _ = tokio::time::timeout(FAREWELL, farewell.closed()).await;
    manager.finish().await;
    Ok(ending)
}

impl Manager {
    /// Writes what is not written yet, at the end of the process.
    async fn finish(self) {
        let Manager { journal, history, releases, orders, .. } = self;
        let written = async { tokio::join!(journal.finish(), history.finish(), releases.finish(), orders.finish()) };
        if tokio::time::timeout(LAST_WRITE, written).await.is_err() {
            tracing::warn!("what changed last is not written: the disk does not answer");
        }
    }

    fn load(home: &Home, service: ServiceManagerKind, own: &RoleHolder, inputs: Inputs) -> Result<Manager> {
        let mut problems = BTreeMap::new();
        let loaded = Config::load(home)?;
        warn_of_unknown(&loaded);
        if let Some(problem) = &loaded.problem {
            problems.insert("config", config_problem(problem));
        }
        let agent_id =
            installation::agent_id(home).context("cannot tell who this host is; install again with --agent-id")?;
        let agent_id = agent_id.with_context(|| {
            format!("cannot tell who this host is: {} is missing; install again", home.agent_id().display())
        })?;
        let desired_path = home.desired();
        let desired: Option<DesiredState> = store::load(&desired_path).unwrap_or_else(|error| {
            let text = format!("the last desired state is lost and asked for again: {error:#}");
            tracing::error!(error = text, "the desired state cannot be read");
            problems.insert("desired", text);
            None
        });
        let releases = LedgerWriter::load(home, &mut problems);
        let mut journal = Journal::load(home);
        for problem in problems.values() {
            journal.note("config", "failed", EventSubject::default(), problem.as_str());
        }
        // Behind a link lies what is somebody else's.
        if permissions::home(home).is_ok()
            && let Err(error) = package::sweep(&PackagePaths::of(home))
        {
            tracing::warn!(error = format!("{error:#}"), "leftovers of an earlier staging cannot be removed");
        }
        let record = installation::upgrade::load(home).unwrap_or_else(|error| {
            tracing::error!(error = format!("{error:#}"), "the record of upgrades cannot be read");
            Default::default()
        });
        let on_trial = installation::upgrade::on_trial(&record, &mut Programs::default());
        let endpoint = on_trial.as_ref().and_then(|image| image.endpoint.clone());
        let config = moved(home, loaded.config, endpoint.as_ref());
        let now = Instant::now();
        let mut line = GatewayLink::new(home, &agent_id, &config, desired.is_some(), &inputs, now);
        let mut held = desired.unwrap_or_default();
        held.forget_stale();
        line.asks_anew = held.rejected().next().is_some();
        let installed = installation::ManagerRecord::load(home)
            .context("cannot tell which release this is; install again")?
            .with_context(|| {
                format!(
                    "cannot tell which release this is: {} is missing; install again",
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
            peer: WatchdogLink::new(home, service, now),
            inputs,
            upgrading: ManagerUpgrade::new(record, endpoint),
            desk: stage::StagingContext::new(),
            line,
            strangers: RateLimiter::new(STRANGERS_AT_ONCE, STRANGERS_EVERY),
            problems,
            config,
            stop: None,
            ending: None,
        })
    }

    /// Somebody asked this process to end: the sub-agents stay, unless they are being stopped already.
    fn asked_to_end(&mut self) {
        if self.stop.is_some() {
            tracing::info!("the manager was asked to end, and does so when every sub-agent is stopped");
            return;
        }
        tracing::info!("the manager was asked to end; the sub-agents stay");
        self.ending = Some(Goodbye::Yield);
    }

    fn deadline(&self) -> Instant {
        let now = Instant::now();
        let agents = self.agents.values().filter_map(|agent| agent.state.deadline(now));
        // While the home stops, the watchdog does not matter.
        let peer = self.stop.is_none().then(|| self.peer.deadline());
        let recorded_by = self.stop.as_ref().filter(|stop| !stop.is_recorded).map(|stop| stop.recorded_by);
        let upgrading = self.stop.is_none().then(|| self.upgrading.deadline(now)).flatten();
        let fixed = [
            upgrading,
            self.line.next_heartbeat,
            Some(self.housekeeping.next),
            self.journal.flush_at(),
            peer,
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
            tracing::warn!("the manager did not run for a while; what it missed meanwhile counts against nobody");
            self.peer.ping(now);
        }
        if now >= self.peer.deadline() && self.stop.is_none() {
            self.peer.look(&self.home, &self.inputs, now);
        }
        if self.journal.flush_at().is_some_and(|at| at <= now) {
            self.journal.flush(&self.inputs);
        }
        if now >= self.housekeeping.next {
            self.keep_house(now);
        }
        if self.line.next_heartbeat.is_some_and(|at| at <= now) {
            self.heartbeat_due(now);
        }
        if self.stop.is_none() {
            self.tend_upgrade(now);
        }
        if self.stop.as_ref().is_some_and(|stop| stop.recorded_by <= now) {
            self.stop_recorded(now);
        }
    }

    /// Reports a problem when it comes and when it is resolved.
    fn tell_of(&mut self, subject: &'static str, outcome: &str, problem: Option<String>) {
        match problem {
            Some(text) if self.problems.get(subject) == Some(&text) => {}
            Some(text) => {
                self.journal.note(subject, outcome, EventSubject::default(), text.as_str());
                self.problems.insert(subject, text);
            }
            None if self.problems.remove(subject).is_some() => {
                self.journal.note(subject, "ok", EventSubject::default(), "what was wrong there is mended");
            }
            None => {}
        }
    }
}

/// The settings, with the endpoint that a release on trial brings.
fn moved(home: &Home, config: Config, endpoint: Option<&NewEndpoint>) -> Config {
    let Some(endpoint) = endpoint else { return config };
    config::new_endpoint::on_trial(home, &config, endpoint).unwrap_or_else(|error| {
        tracing::error!(error = format!("{error:#}"), "the endpoint that this release brings cannot be used");
        config
    })
}

fn groups(home: &Home) -> Option<Groups> {
    let groups = process::groups(home);
    match &groups {
        Some(groups) => tracing::info!(place = groups.place(), "sub-agents live in groups of their own"),
        None => tracing::warn!(
            "this host has no place for groups of processes (no cgroup that we may write); a sub-agent's session, descendants and mark stand in, \
             and what escapes from all of them outlives its stop"
        ),
    }
    groups
}

fn warn_of_unknown(loaded: &LoadedSettings) {
    for unknown in &loaded.unknown {
        tracing::warn!(key = %unknown, "the configuration has a key that this version does not know");
    }
}

fn config_problem(problem: &anyhow::Error) -> String {
    format!("{problem:#}; the last good settings are in force")
}
