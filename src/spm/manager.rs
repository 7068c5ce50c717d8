//! The manager's one task: all of its state, and what every word from outside does to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::agent::{Agent, Busy};
use super::journal::{About, Journal};
use super::peer::Peer;
use super::run::{self, Inputs, Running};
use super::uplink_task::{self, Order as UplinkOrder, Outcome};
use super::{Input, notify, stage};
use crate::config::{Config, Loaded};
use crate::core::desired::{self, Desired, Run, Verdict};
use crate::core::model::{AgentId, AgentName, Version};
use crate::core::protocol::{Answer, Heartbeat, ManagerReport};
use crate::core::reconcile::{self, Step};
use crate::core::schedule;
use crate::core::status::{self, GatewayStatus, HomeState, RoleStatus, Status};
use crate::core::supervise::{Action, Event};
use crate::door::{self, Farewell, Knock, Reply, Request};
use crate::home::Home;
use crate::installation;
use crate::package::{self, Places};
use crate::platform::{self, LocalListener, Termination};
use crate::process::launch::Start;
use crate::process::record::{self, Record};
use crate::process::{log, tree};
use crate::role::{self, Role};
use crate::store;

/// Logs, watchdog and journal are looked after so often.
const HOUSEKEEPING: Duration = Duration::from_secs(10);
/// A host that booted so recently comes back together with many others.
const JUST_BOOTED: Duration = Duration::from_secs(300);
/// What a gateway may ask for, as an operator may.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);
/// Connections at the door get so long to hear the farewell.
const FAREWELL: Duration = Duration::from_millis(500);

pub(super) struct Manager {
    home: Home,
    config: Config,
    config_seen: Option<std::time::SystemTime>,
    agent_id: AgentId,
    instance_id: String,
    version: Version,
    started: Instant,
    desired: Desired,
    agents: BTreeMap<AgentName, Agent>,
    journal: Journal,
    peer: Peer,
    inputs: Inputs,
    uplink: std::sync::mpsc::Sender<UplinkOrder>,
    turns: Arc<Semaphore>,
    gateway: GatewayStatus,
    /// By subject, so that what was mended disappears.
    problems: BTreeMap<&'static str, String>,
    /// Commands already answered as unsupported.
    answered: BTreeSet<String>,
    interval: Duration,
    sequence: u64,
    failures: u32,
    /// `None` while one is under way.
    next_heartbeat: Option<Instant>,
    next_housekeeping: Instant,
    /// A stop is under way; who waits for its end.
    stopping: Option<Vec<oneshot::Sender<Reply>>>,
    stop_errors: Vec<String>,
    ending: Option<Farewell>,
}

/// Runs the manager until it is told to end, and says as what it ended.
pub(super) async fn run(home: &Home, supervised: bool) -> Result<Farewell> {
    let (inputs, mut words) = mpsc::unbounded_channel();
    let mut termination = Termination::new()?;
    let mut manager = Manager::load(home, supervised, inputs)?;
    manager.take_charge();

    let listener = LocalListener::bind(&home.control_socket())
        .with_context(|| format!("cannot listen at {}", home.control_socket().display()))?;
    let (knock, mut knocks) = mpsc::channel(16);
    let (farewell, heard) = watch::channel(None);
    let door = tokio::spawn(door::serve(listener, knock, heard));
    notify("READY=1");
    tracing::info!(version = %manager.version, pid = std::process::id(), agents = manager.agents.len(), "the manager is ready");

    let ending = loop {
        manager.reconcile();
        if let Some(ending) = manager.ending {
            break ending;
        }
        let deadline = manager.deadline();
        tokio::select! {
            // Each arm takes one value from a channel or waits: all are cancel-safe.
            Some(input) = words.recv() => manager.take_in(input),
            Some(knock) = knocks.recv() => manager.answer_knock(knock),
            () = tokio::time::sleep_until(deadline.into()) => manager.tick(),
            () = termination.recv() => {
                tracing::info!("the manager was asked to end; the sub-agents stay");
                manager.ending = Some(Farewell::Yield);
            }
        }
    };
    notify("STOPPING=1");
    manager.journal.flush();
    farewell.send_replace(Some(ending));
    door.abort();
    // Every connection drops its receiver when it has said the farewell.
    let _ = tokio::time::timeout(FAREWELL, farewell.closed()).await;
    Ok(ending)
}

impl Manager {
    fn load(home: &Home, supervised: bool, inputs: Inputs) -> Result<Manager> {
        let mut problems = BTreeMap::new();
        let loaded = Config::load(home)?;
        warn_of_unknown(&loaded);
        if let Some(problem) = &loaded.problem {
            problems.insert("config", config_problem(problem));
        }
        let agent_id = installation::agent_id(home)?.with_context(|| {
            format!("cannot tell who this host is: {} is missing; install again", home.agent_id().display())
        })?;
        let desired = store::load(&home.state_file("desired.json")).unwrap_or_else(|error| {
            let text = format!("the last desired state is lost and asked for again: {error:#}");
            tracing::error!(error = text, "the desired state cannot be read");
            problems.insert("desired", text);
            None
        });
        let mut journal = Journal::load(home);
        for problem in problems.values() {
            journal.note("config", "failed", About::default(), problem.as_str());
        }
        if let Err(error) = package::sweep(&Places { cache: home.cache(), staging: home.staging() }) {
            tracing::warn!(error = format!("{error:#}"), "leftovers of an earlier staging cannot be removed");
        }
        let config = loaded.config;
        let uplink = uplink_task::start(home, &agent_id, &config, &inputs)?;
        let now = Instant::now();
        let after_boot = platform::uptime().is_some_and(|uptime| uptime < JUST_BOOTED) && desired.is_some();
        let interval = config.heartbeat_interval.0;
        let gateway = GatewayStatus {
            endpoint: config.heartbeat_srv.first().map(ToString::to_string),
            ..GatewayStatus::default()
        };
        Ok(Manager {
            home: home.clone(),
            config_seen: modified(home),
            instance_id: installation::instance_id(home),
            version: installation::Manager::load(home)?
                .with_context(|| {
                    format!(
                        "cannot tell which release this is: {} is missing; install again",
                        installation::Manager::path(home).display()
                    )
                })?
                .version,
            agent_id,
            started: now,
            desired: desired.unwrap_or_default(),
            agents: BTreeMap::new(),
            journal,
            peer: Peer::new(home, supervised, now),
            inputs,
            uplink,
            turns: Arc::new(Semaphore::new(stage::AT_ONCE)),
            gateway,
            problems,
            answered: BTreeSet::new(),
            next_heartbeat: Some(now + schedule::first_heartbeat(interval, after_boot, fastrand::f64())),
            interval,
            config,
            sequence: 0,
            failures: 0,
            next_housekeeping: now,
            stopping: None,
            stop_errors: vec![],
            ending: None,
        })
    }

    /// Finds what is installed and what of it runs, and adopts that.
    fn take_charge(&mut self) {
        let targets = tree::all(&self.home);
        let recorded = |name: &AgentName| targets.iter().find(|target| target.name == *name);
        let mut names: BTreeSet<AgentName> = self.desired.agents.keys().cloned().collect();
        names.extend(
            std::fs::read_dir(self.home.agents())
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok()),
        );
        for name in names {
            let target = recorded(&name);
            let restarts = target.and_then(|target| target.record.as_ref()).map_or(0, |record| record.head.restarts);
            let agent = Agent::found(&self.home, name.clone(), restarts);
            self.agents.insert(name.clone(), agent);
            match target.and_then(|target| target.record.clone()) {
                Some(record) if record.is_alive() => self.adopt(&name, record),
                Some(record) => match self.by_mark(&name) {
                    Some(marked) => self.adopt(&name, marked),
                    None if record.head.boot_id == platform::boot_id() => {
                        let about = About { agent: Some(&name), version: Some(&record.head.version) };
                        self.journal.note("exit", "failed", about, "ended while no manager was watching");
                    }
                    None => {}
                },
                None => {
                    if let Some(marked) = self.by_mark(&name) {
                        self.adopt(&name, marked);
                    }
                }
            }
        }
        // What runs under our mark and belongs to nothing that is installed has no business here any more. Where it cannot be told what
        // is installed, nothing is ended.
        if self.home.agents().read_dir().is_ok() {
            for target in targets.into_iter().filter(|target| !self.agents.contains_key(&target.name)) {
                tracing::warn!(agent = %target.name, "a sub-agent that is not installed any more is stopped");
                run::stop(&self.inputs, 0, &self.home, target);
            }
        }
    }

    /// A record for a process that has none: by its mark. Of a native sub-agent the oldest, which every other of its tree descends from.
    fn by_mark(&self, name: &AgentName) -> Option<Record> {
        let agent = self.agents.get(name)?;
        let members = tree::members(&self.home, &tree::Target::of(name, None));
        let process = members.first()?;
        let version: Version = process.mark.as_ref()?.version.parse().ok()?;
        if agent.active.as_ref() != Some(&version) {
            return None;
        }
        let start = self.start_of(agent)?;
        Some(Record { head: start.head(), pid: process.pid, start_time: process.start_time })
    }

    fn adopt(&mut self, name: &AgentName, record: Record) {
        let env = self.desired.agents.get(name).map(|order| order.env.clone());
        let Some(agent) = self.agents.get_mut(name) else { return };
        let since =
            platform::age(record.start_time).and_then(|age| Instant::now().checked_sub(age)).unwrap_or(self.started);
        agent.supervisor.adopt(record.pid, since);
        agent.run = Run::Start;
        agent.supervisor.step(Event::Run, Instant::now(), 0.0);
        // With another environment than it is to have, it is restarted by the first plan.
        agent.env = env.filter(|env| crate::process::launch::env_hash(env) == record.head.env_hash);
        agent.serial += 1;
        agent.record = Some(record.clone());
        let serial = agent.serial;
        tracing::info!(agent = %name, pid = record.pid, "a sub-agent is adopted");
        let script = record.head.kind == record::Kind::Script;
        let start = script.then(|| self.agents.get(name).and_then(|agent| self.start_of(agent))).flatten();
        let running = match start {
            Some(start) => Running::Script(Box::new(start), record),
            None => Running::Adopted(record),
        };
        run::watch(&self.inputs, serial, running);
    }

    fn start_of(&self, agent: &Agent) -> Option<Start> {
        Some(Start {
            home: self.home.clone(),
            name: agent.name.clone(),
            version: agent.active.clone()?,
            program: agent.program.clone()?,
            env: agent
                .env
                .clone()
                .or_else(|| Some(self.desired.agents.get(&agent.name)?.env.clone()))
                .unwrap_or_default(),
            agent_id: self.agent_id.clone(),
            endpoint: self.gateway.endpoint.clone().unwrap_or_default(),
            restarts: agent.supervisor.restarts(),
        })
    }

    /// Compares what is wanted with what is, and begins what is to be done.
    fn reconcile(&mut self) {
        if self.stopping.is_some() || self.ending.is_some() {
            return;
        }
        let now = Instant::now();
        for name in self.desired.agents.keys() {
            if !self.agents.contains_key(name) {
                self.agents.insert(name.clone(), Agent::new(name.clone(), 0));
            }
        }
        let actual = self.agents.iter().map(|(name, agent)| (name.clone(), agent.actual(now))).collect();
        for step in reconcile::plan(&self.desired, &actual) {
            self.carry_out(step, now);
        }
    }

    fn carry_out(&mut self, step: Step, now: Instant) {
        match step {
            Step::Stage { name, version } => {
                let (Some(order), Some(agent)) = (self.desired.agents.get(&name), self.agents.get_mut(&name)) else {
                    return;
                };
                tracing::info!(agent = %name, version = %version, "a release is staged");
                agent.staging = Some(version);
                let job = stage::Job {
                    home: self.home.clone(),
                    config: self.config.clone(),
                    agent_id: self.agent_id.clone(),
                    name,
                    order: order.clone(),
                };
                stage::start(&self.inputs, &self.turns, job);
            }
            Step::Activate { name, version, run, env } => {
                self.begin(&name, Busy::Activating { version, run, env }, now)
            }
            Step::Uninstall { name } => self.begin(&name, Busy::Uninstalling, now),
            Step::Configure { name, env } => {
                let Some(agent) = self.agents.get_mut(&name) else { return };
                agent.env = Some(env);
                if agent.supervisor.pid().is_some() {
                    tracing::info!(agent = %name, "the environment changed; the sub-agent is restarted");
                    self.feed(&name, Event::Again, now);
                }
            }
            Step::Set { name, run } => {
                let Some(agent) = self.agents.get_mut(&name) else { return };
                agent.run = run;
                self.feed(&name, if run == Run::Start { Event::Run } else { Event::Rest }, now);
            }
            Step::Discard { name, version } => {
                let Some(agent) = self.agents.get_mut(&name) else { return };
                agent.releases.remove(&version);
                if let Err(error) = package::discard(&self.home.release(&name, &version)) {
                    tracing::warn!(agent = %name, error = format!("{error:#}"), "an old release cannot be removed");
                }
            }
        }
    }

    /// Takes the sub-agent down for something that needs it down.
    fn begin(&mut self, name: &AgentName, busy: Busy, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.busy = Some(busy);
        self.feed(name, Event::Rest, now);
        self.finish_if_down(name, now);
    }

    /// Goes on with what waited for the sub-agent to be down.
    fn finish_if_down(&mut self, name: &AgentName, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        if !agent.supervisor.is_down() {
            return;
        }
        match agent.busy.take() {
            None => {}
            Some(Busy::Activating { version, run, env }) => self.activate(name, version, run, env, now),
            Some(Busy::Uninstalling) => self.remove(name),
        }
    }

    fn activate(&mut self, name: &AgentName, version: Version, run: Run, env: BTreeMap<String, String>, now: Instant) {
        let release = self.home.release(name, &version);
        let switched = stage::commit_epoch(&self.home, name, &release).and_then(|()| {
            platform::write_current(&self.home.current(name), version.as_str()).with_context(|| {
                format!("cannot activate {name} {version}: cannot switch {}", self.home.current(name).display())
            })
        });
        let Some(agent) = self.agents.get_mut(name) else { return };
        let about = About { agent: Some(name), version: Some(&version) };
        match switched {
            Ok(()) => {
                agent.backup = agent.active.replace(version.clone());
                agent.error = None;
                agent.release_hold();
                agent.inspect(&self.home);
                self.journal.note("activate", "ok", about, format!("{name} {version} is active"));
            }
            Err(error) => {
                let error = format!("{error:#}");
                self.journal.note("activate", "failed", about, error.as_str());
                agent.hold_back(version, error, now);
            }
        }
        agent.run = run;
        agent.env = Some(env);
        if run == Run::Start {
            self.feed(name, Event::Run, now);
        }
    }

    fn remove(&mut self, name: &AgentName) {
        let removed = store::remove(&self.home.current(name))
            .and_then(|()| {
                for version in self.agents.get(name).map(|agent| agent.releases.clone()).unwrap_or_default() {
                    package::discard(&self.home.release(name, &version))?;
                }
                store::remove_tree(&self.home.agent(name))
            })
            .and_then(|()| record::remove(&self.home, name))
            .and_then(|()| log::remove(&self.home, name));
        let about = About { agent: Some(name), version: None };
        match removed {
            Ok(()) => {
                self.agents.remove(name);
                self.desired.removed.remove(name);
                self.problems.remove("uninstall");
                self.journal.note("uninstall", "ok", about, format!("{name} is removed"));
            }
            Err(error) => {
                let text = format!("{error:#}");
                self.journal.note("uninstall", "failed", about, text.as_str());
                // Tried again with the next desired state or start; until then it shows.
                self.problems.insert("uninstall", text);
                self.desired.removed.remove(name);
            }
        }
    }

    /// Tells a sub-agent's supervisor what happened and does what it says.
    fn feed(&mut self, name: &AgentName, event: Event, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        match agent.supervisor.step(event, now, fastrand::f64()) {
            Some(Action::Start) => self.start(name, now),
            Some(Action::Stop) => {
                let target = tree::Target::of(name, agent.record.clone());
                run::stop(&self.inputs, agent.serial, &self.home, target);
            }
            None => {}
        }
    }

    fn start(&mut self, name: &AgentName, now: Instant) {
        let Some(agent) = self.agents.get(name) else { return };
        let start = self.start_of(agent);
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.serial += 1;
        match start {
            Some(start) => {
                let refused = start.refused_env();
                if !refused.is_empty() {
                    let text =
                        format!("the gateway may not set {}; its package would have to allow it", refused.join(", "));
                    if agent.error.as_ref() != Some(&text) {
                        self.journal.note("env", "refused", About { agent: Some(name), version: None }, text.as_str());
                    }
                    agent.error = Some(text);
                }
                run::start(&self.inputs, agent.serial, start);
            }
            None => {
                let why = agent.error.clone().unwrap_or_else(|| "no release of it is active".to_owned());
                self.feed(name, Event::StartFailed { why }, now);
            }
        }
    }

    fn take_in(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Launched { name, serial, result } => self.launched(&name, serial, result, now),
            Input::Exited { name, serial, success, how } => {
                let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.serial == serial) else { return };
                if agent.supervisor.is_stopping() {
                    return;
                }
                let version = agent.active.clone();
                let about = About { agent: Some(&name), version: version.as_ref() };
                let outcome = if success == Some(true) { "ok" } else { "failed" };
                self.journal.note("exit", outcome, about, how.as_str());
                self.feed(&name, Event::Exited { success, how }, now);
            }
            Input::Moved { name, serial, record } => {
                let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.serial == serial) else { return };
                agent.supervisor.adopt(record.pid, now);
                if let Err(error) = record.save(&self.home) {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "a process record cannot be written; the mark stands in"
                    );
                }
                agent.record = Some(*record);
            }
            Input::Ended { name, serial, result } => {
                let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.serial == serial) else { return };
                agent.record = None;
                if let Err(error) = result {
                    self.journal.note("stop", "failed", About { agent: Some(&name), version: None }, error.as_str());
                    self.stop_errors.push(error.clone());
                    agent.error = Some(error);
                }
                self.feed(&name, Event::Stopped, now);
                self.finish_if_down(&name, now);
                self.finish_stop_if_down();
            }
            Input::Staged { name, version, result } => {
                let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.staging.as_ref() == Some(&version))
                else {
                    return;
                };
                agent.staging = None;
                let about = About { agent: Some(&name), version: Some(&version) };
                match result {
                    Ok(()) => {
                        agent.error = None;
                        agent.release_hold();
                        agent.releases.insert(version.clone());
                        self.journal.note("stage", "ok", about, format!("{name} {version} is staged"));
                    }
                    Err(error) => {
                        if agent.error.as_ref() != Some(&error) {
                            self.journal.note("stage", "failed", about, error.as_str());
                        }
                        agent.hold_back(version, error, now);
                    }
                }
            }
            Input::Heartbeat(outcome) => self.heartbeat_done(outcome, now),
        }
    }

    fn launched(&mut self, name: &AgentName, serial: u64, result: Result<Box<Running>, String>, now: Instant) {
        let Some(agent) = self.agents.get_mut(name).filter(|agent| agent.serial == serial) else { return };
        match result {
            Ok(running) => {
                let record = running.record().clone();
                tracing::info!(agent = %name, version = %record.head.version, pid = record.pid, "a sub-agent is started");
                agent.record = Some(record.clone());
                run::watch(&self.inputs, serial, *running);
                self.feed(name, Event::Started { pid: record.pid }, now);
            }
            Err(why) => {
                let version = agent.active.clone();
                if agent.supervisor.last_error() != Some(&why) {
                    self.journal.note(
                        "start",
                        "failed",
                        About { agent: Some(name), version: version.as_ref() },
                        why.as_str(),
                    );
                }
                self.feed(name, Event::StartFailed { why }, now);
                self.finish_if_down(name, now);
                self.finish_stop_if_down();
            }
        }
    }

    fn deadline(&self) -> Instant {
        let now = Instant::now();
        let agents = self.agents.values().filter_map(|agent| agent.deadline(now));
        let fixed = [self.next_heartbeat, Some(self.next_housekeeping), Some(self.peer.deadline())];
        fixed.into_iter().flatten().chain(agents).min().unwrap_or(now)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let due: Vec<AgentName> = self
            .agents
            .values()
            .filter(|agent| agent.supervisor.deadline().is_some_and(|deadline| deadline <= now))
            .map(|agent| agent.name.clone())
            .collect();
        for name in due {
            self.feed(&name, Event::Tick, now);
        }
        if now >= self.peer.deadline() && self.stopping.is_none() {
            self.peer.look(&self.home, now);
        }
        if now >= self.next_housekeeping {
            self.next_housekeeping = now + HOUSEKEEPING;
            self.journal.flush();
            log::rotate_all(&self.home, self.config.log_max_size.0);
            self.reload_if_changed();
            notify("WATCHDOG=1");
        }
        if self.next_heartbeat.is_some_and(|at| at <= now) {
            self.send_heartbeat();
        }
    }

    /// Takes a changed configuration; a bad one leaves the old in force, which shows.
    fn reload_if_changed(&mut self) {
        let seen = modified(&self.home);
        if seen == self.config_seen {
            return;
        }
        self.config_seen = seen;
        match Config::load(&self.home) {
            Ok(loaded) => {
                warn_of_unknown(&loaded);
                if let Some(problem) = &loaded.problem {
                    let text = config_problem(problem);
                    self.journal.note("config", "failed", About::default(), text.as_str());
                    self.problems.insert("config", text);
                    return;
                }
                self.problems.remove("config");
                self.journal.note("config", "ok", About::default(), "the changed configuration is in force");
                self.config = loaded.config;
                self.interval = self.config.heartbeat_interval.0;
                let _ = self.uplink.send(UplinkOrder::Configure(Box::new(self.config.clone())));
            }
            Err(error) => {
                let text = format!("{error:#}");
                self.journal.note("config", "failed", About::default(), text.as_str());
                self.problems.insert("config", text);
            }
        }
    }

    fn send_heartbeat(&mut self) {
        self.sequence += 1;
        let heartbeat = Heartbeat {
            agent_id: self.agent_id.clone(),
            instance_id: self.instance_id.clone(),
            hostname: gethostname::gethostname().to_string_lossy().into_owned(),
            os: platform::OS,
            arch: platform::ARCH,
            manager: ManagerReport {
                version: self.version.clone(),
                pid: std::process::id(),
                uptime_seconds: self.started.elapsed().as_secs(),
                memory_bytes: platform::memory_bytes(std::process::id()).unwrap_or(0),
            },
            lineage: Some(self.desired.lineage.clone()).filter(|lineage| !lineage.is_empty()),
            generation: self.desired.generation,
            sequence: self.sequence,
            agents: self.agents.values().map(Agent::report).collect(),
            events: self.journal.pending(),
        };
        self.next_heartbeat = None;
        if self.uplink.send(UplinkOrder::Send(Box::new(heartbeat))).is_err() {
            let why = "the uplink's thread has ended".to_owned();
            self.heartbeat_done(Outcome::Failed { why, retry_after: None }, Instant::now());
        }
    }

    fn heartbeat_done(&mut self, outcome: Outcome, now: Instant) {
        let outcome = match outcome {
            Outcome::Answered { endpoint, answer } => {
                if !self.gateway.connected {
                    tracing::info!(%endpoint, "the gateway answers");
                }
                self.failures = 0;
                self.gateway = GatewayStatus {
                    endpoint: Some(endpoint.to_string()),
                    connected: true,
                    last_heartbeat: Some(super::timestamp()),
                    last_error: None,
                };
                self.take_answer(&answer);
                schedule::Outcome::Answered
            }
            Outcome::Failed { why, retry_after } => {
                self.failures = self.failures.saturating_add(1);
                if self.gateway.last_error.as_ref() != Some(&why) {
                    tracing::warn!(
                        error = why,
                        "the gateway cannot be reached; what runs goes on as it was wanted last"
                    );
                }
                self.gateway.connected = false;
                self.gateway.last_error = Some(why);
                schedule::Outcome::Failed { times: self.failures, retry_after }
            }
        };
        self.next_heartbeat = Some(now + schedule::next_heartbeat(self.interval, outcome, fastrand::f64()));
    }

    fn take_answer(&mut self, answer: &Answer) {
        if let Some(seconds) = answer.interval {
            self.interval = Duration::from_secs(seconds).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL);
        }
        if let Some(id) = answer.ack {
            self.journal.acknowledge(id);
        }
        match &answer.error_message {
            Some(message) => drop(self.problems.insert("gateway", format!("the gateway says: {message}"))),
            None => drop(self.problems.remove("gateway")),
        }
        if let Some(cmd) = &answer.cmd {
            let wanted = answer.manager.as_ref().map(|order| format!(" to {}", order.version)).unwrap_or_default();
            if self.answered.len() < 100 && self.answered.insert(format!("{cmd}{wanted}")) {
                self.journal.note(
                    "command",
                    "unsupported",
                    About::default(),
                    format!("cannot {cmd}{wanted}: this version does not know how"),
                );
            }
        }
        let present = self.agents.keys().cloned().collect();
        match desired::judge(&self.desired, &present, answer) {
            Verdict::Unchanged => {
                let held = answer.lineage.as_deref().unwrap_or_default() == self.desired.lineage
                    && answer.generation == self.desired.generation;
                // What was refused in between is not asked for any more.
                if held {
                    self.problems.remove("desired");
                }
            }
            Verdict::Refuse(why) => {
                if self.problems.get("desired") != Some(&why) {
                    self.journal.note("desired", "refused", About::default(), why.as_str());
                }
                self.problems.insert("desired", why);
            }
            Verdict::Take { desired, unsupported, new_lineage } => {
                // On disk before it is acted on: what is begun must be known after a crash.
                if let Err(error) = store::save(&self.home.state_file("desired.json"), &*desired) {
                    let text = format!("the new desired state is not acted on: {error:#}");
                    self.journal.note("desired", "failed", About::default(), text.as_str());
                    self.problems.insert("desired", text);
                    return;
                }
                self.problems.remove("desired");
                if new_lineage {
                    tracing::warn!(lineage = desired.lineage, "another store counts the generations from now on");
                }
                tracing::info!(
                    generation = desired.generation,
                    agents = desired.agents.len(),
                    "a new desired state is taken"
                );
                for (name, cmd) in unsupported {
                    let about = About { agent: Some(&name), version: None };
                    self.journal.note(
                        "command",
                        "unsupported",
                        about,
                        format!("cannot {cmd} {name}: this version does not know how"),
                    );
                }
                self.desired = *desired;
                self.agents.values_mut().for_each(Agent::release_hold);
            }
        }
    }

    fn answer_knock(&mut self, knock: Knock) {
        let now = Instant::now();
        let (request, reply) = match knock {
            Knock::PeerGone { role: Role::Spa, pid } => return self.peer.gone(pid, now),
            Knock::PeerGone { .. } => return,
            Knock::Asked(request, reply) => (request, reply),
        };
        let answer = match request {
            Request::Hello { role: Role::Spa, pid } => {
                self.peer.hello(pid, now);
                Reply::done()
            }
            Request::Hello { .. } => Reply::failed("there is one manager, and it is this one"),
            Request::Ping => {
                self.peer.ping(now);
                Reply::done()
            }
            Request::Status => Reply { error: None, status: Some(Box::new(self.status(now))) },
            Request::Stop => return self.begin_stop(reply, now),
            Request::Yield => {
                tracing::info!("the manager was asked to give way; the sub-agents stay");
                self.ending = Some(Farewell::Yield);
                Reply::done()
            }
            Request::Restart { agent: name } => match self.agents.get_mut(&name) {
                None => {
                    Reply::failed(format!("cannot restart {name}: there is no such sub-agent; `status` lists them"))
                }
                Some(agent) if !agent.supervisor.wanted() => {
                    Reply::failed(format!("cannot restart {name}: it is stopped, as the gateway wants it"))
                }
                Some(_) => {
                    self.feed(&name, Event::Again, now);
                    Reply::done()
                }
            },
        };
        let _ = reply.send(answer);
    }

    /// Stops every sub-agent; who asked is answered, and the manager ends, when the last one is down.
    fn begin_stop(&mut self, reply: oneshot::Sender<Reply>, now: Instant) {
        if let Err(error) = role::record_stop(&self.home) {
            // A stop is honoured even where its record cannot be kept; the farewell tells the watchdog.
            tracing::warn!(error = format!("{error:#}"), "the stop cannot be recorded");
        }
        match &mut self.stopping {
            Some(waiting) => waiting.push(reply),
            None => {
                tracing::info!("the home is stopped");
                self.stop_errors.clear();
                self.stopping = Some(vec![reply]);
                for name in self.agents.keys().cloned().collect::<Vec<_>>() {
                    self.feed(&name, Event::Rest, now);
                }
            }
        }
        self.finish_stop_if_down();
    }

    fn finish_stop_if_down(&mut self) {
        if self.stopping.is_none() || !self.agents.values().all(|agent| agent.supervisor.is_down()) {
            return;
        }
        let errors = std::mem::take(&mut self.stop_errors);
        let answer = if errors.is_empty() { Reply::done() } else { Reply::failed(errors.join("; ")) };
        for waiting in self.stopping.iter_mut().flat_map(|waiting| waiting.drain(..)) {
            let _ = waiting.send(answer.clone());
        }
        self.ending = Some(Farewell::Stop);
    }

    fn status(&self, now: Instant) -> Status {
        let agents: Vec<_> = self.agents.values().map(|agent| agent.status(now)).collect();
        let mut problems: Vec<String> = self.problems.values().cloned().collect();
        if self.peer.stopped_by_operator {
            problems.push(
                "the watchdog's unit was stopped; start it with `systemctl start`, or `control start`".to_owned(),
            );
        }
        let state = if self.stopping.is_some() {
            HomeState::Degraded
        } else {
            status::judge(self.peer.is_connected(), &agents, &problems)
        };
        let own = role::holder(&self.home, Role::Spm).map(|holder| holder.status());
        Status {
            version: Some(self.version.clone()),
            home: self.home.root().display().to_string(),
            state,
            spm: RoleStatus { pid: Some(std::process::id()), ..own.unwrap_or_default() },
            spa: self.peer.status(&self.home),
            gateway: self.gateway.clone(),
            generation: self.desired.generation,
            agents,
            problems,
            notes: vec![],
        }
    }
}

fn warn_of_unknown(loaded: &Loaded) {
    for unknown in &loaded.unknown {
        tracing::warn!(key = %unknown, "the configuration has a key that this version does not know");
    }
}

fn config_problem(problem: &anyhow::Error) -> String {
    format!("{problem:#}; the last good settings are in force")
}

fn modified(home: &Home) -> Option<std::time::SystemTime> {
    std::fs::metadata(home.config()).and_then(|metadata| metadata.modified()).ok()
}
