//! The manager's one task: all of its state, and what every word from outside does to it.

mod adoption;
mod exchange;
mod health;
mod knocks;
mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{mpsc, oneshot, watch};

use super::agent::Agent;
use super::heartbeats::Uplink;
use super::journal::{About, Journal};
use super::peer::Peer;
use super::run::Inputs;
use super::stage;
use crate::config::{Config, Loaded};
use crate::core::desired::Desired;
use crate::core::model::{AgentId, AgentName, Version};
use crate::core::role::Role;
use crate::core::schedule::{self, Allowance};
use crate::core::service_manager::{Kind, Notice};
use crate::core::status::GatewayStatus;
use crate::core::supervise::Event;
use crate::door::{self, Farewell, Reply};
use crate::home::Home;
use crate::installation::keyring::Keyring;
use crate::installation::{self, guard};
use crate::package::{self, Keys, Places};
use crate::platform::{self, Groups, LocalListener, Termination};
use crate::process::{self, log};
use crate::role::{self, Holder};
use crate::store;

/// Logs, the configuration, orphans and the service manager's watchdog are looked after so often: twice within its minute.
const HOUSEKEEPING: Duration = Duration::from_secs(25);
/// To look at the home takes a hundred system calls: however often heartbeats go out, it is not looked at more often.
const LOOK_APART: Duration = Duration::from_secs(10);
/// Downloads that nobody came back for are looked for so often, besides before each download.
const TRIM_EVERY: Duration = Duration::from_secs(24 * 3600);
/// Housekeeping that comes so late was held up by a stop of this process or of the machine.
const NOT_SCHEDULED: Duration = Duration::from_secs(10);
/// A host that booted so recently comes back together with many others.
const JUST_BOOTED: Duration = Duration::from_secs(300);
/// What a gateway may ask for, as an operator may.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);
/// Of strangers at the door, so many are told of at once, and one more each so often.
const STRANGERS_AT_ONCE: u32 = 3;
const STRANGERS_EVERY: Duration = Duration::from_secs(600);
/// Connections at the door get so long to hear the farewell.
const FAREWELL: Duration = Duration::from_millis(500);

pub(super) struct Manager {
    home: Home,
    own: Holder,
    /// Whether others can see by the record who the manager is.
    is_recorded: bool,
    config: Config,
    config_seen: Option<std::time::SystemTime>,
    agent_id: AgentId,
    instance_id: String,
    version: Version,
    started: Instant,
    desired: Desired,
    agents: BTreeMap<AgentName, Agent>,
    /// Where the sub-agents' process trees are held together.
    groups: Option<Groups>,
    /// Something came about that a plan goes by.
    replan: bool,
    journal: Journal,
    peer: Peer,
    inputs: Inputs,
    uplink: Uplink,
    desk: stage::Desk,
    gateway: GatewayStatus,
    /// Why the last answer was not believed, until one is.
    refused_answer: Option<String>,
    /// How often it is told that somebody knocked who may not.
    strangers: Allowance,
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
    next_look: Instant,
    next_trim: Instant,
    /// Dead at the last housekeeping, and nobody's to wait for.
    orphans: Vec<u32>,
    /// A stop is under way; who waits for its end.
    stopping: Option<Vec<oneshot::Sender<Reply>>>,
    stop_errors: Vec<String>,
    ending: Option<Farewell>,
}

/// Runs the manager until it is told to end, and says as what it ended.
///
/// `own`: its record, which it sees to where that could not be written at first.
pub(super) async fn run(home: &Home, service: Kind, own: &Holder) -> Result<Farewell> {
    let (inputs, mut words) = mpsc::unbounded_channel();
    let mut termination = Termination::new()?;
    if let Err(error) = platform::adopt_orphans() {
        tracing::warn!(error = %error, "the orphans of sub-agents go to init, which may not reap them");
    }
    let mut manager = Manager::load(home, service, own, inputs)?;
    manager.look_at_home();
    manager.take_charge();

    let listener = LocalListener::bind(&home.control_socket())
        .with_context(|| format!("cannot listen at {}", home.control_socket().display()))?;
    let (knock, mut knocks) = mpsc::channel(16);
    let (farewell, heard) = watch::channel(None);
    let door = tokio::spawn(door::serve(listener, knock, heard));
    platform::notify(Notice::Ready);
    tracing::info!(version = %manager.version, pid = std::process::id(), agents = manager.agents.len(), "the manager is ready");

    let ending = loop {
        if std::mem::take(&mut manager.replan) {
            manager.reconcile();
        }
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
    platform::notify(Notice::Stopping);
    manager.journal.flush();
    // The door is shut first: the watchdog, which comes again as soon as it was told, would take our end for a death.
    door.abort();
    let _ = door.await;
    farewell.send_replace(Some(ending));
    // Every connection drops its receiver when it has said the farewell.
    let _ = tokio::time::timeout(FAREWELL, farewell.closed()).await;
    Ok(ending)
}

impl Manager {
    fn load(home: &Home, service: Kind, own: &Holder, inputs: Inputs) -> Result<Manager> {
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
        // Behind a link lies what is somebody else's.
        if guard::home(home).is_ok()
            && let Err(error) = package::sweep(&Places { cache: home.cache(), staging: home.staging() })
        {
            tracing::warn!(error = format!("{error:#}"), "leftovers of an earlier staging cannot be removed");
        }
        let config = loaded.config;
        let uplink = Uplink::new(home, &agent_id, &config, &inputs);
        let now = Instant::now();
        let after_boot = platform::uptime().is_some_and(|uptime| uptime < JUST_BOOTED) && desired.is_some();
        let interval = config.heartbeat_interval.0;
        let gateway = GatewayStatus {
            endpoint: config.heartbeat_srv.first().map(ToString::to_string),
            ..GatewayStatus::default()
        };
        Ok(Manager {
            home: home.clone(),
            own: own.clone(),
            is_recorded: role::holder(home, Role::Spm).as_ref() == Some(own),
            config_seen: modified(home),
            instance_id: installation::instance_id(home),
            version: installation::Manager::load(home)
                .context("cannot tell which release this is; install again")?
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
            groups: groups(home),
            replan: true,
            journal,
            peer: Peer::new(home, service, now),
            inputs,
            uplink,
            desk: stage::Desk::new(),
            gateway,
            refused_answer: None,
            strangers: Allowance::new(STRANGERS_AT_ONCE, STRANGERS_EVERY),
            problems,
            answered: BTreeSet::new(),
            next_heartbeat: Some(now + schedule::first_heartbeat(interval, after_boot, fastrand::f64())),
            interval,
            config,
            sequence: 0,
            failures: 0,
            next_housekeeping: now,
            next_look: now,
            next_trim: now + TRIM_EVERY,
            orphans: vec![],
            stopping: None,
            stop_errors: vec![],
            ending: None,
        })
    }

    /// Somebody asked this process to end: the sub-agents stay, unless they are being stopped already.
    fn asked_to_end(&mut self) {
        if self.stopping.is_some() {
            tracing::info!("the manager was asked to end, and does so when every sub-agent is stopped");
            return;
        }
        tracing::info!("the manager was asked to end; the sub-agents stay");
        self.ending = Some(Farewell::Yield);
    }

    fn deadline(&self) -> Instant {
        let now = Instant::now();
        let agents = self.agents.values().filter_map(|agent| agent.deadline(now));
        // While the home stops, the watchdog is nobody's concern.
        let peer = self.stopping.is_none().then(|| self.peer.deadline());
        let fixed = [self.next_heartbeat, Some(self.next_housekeeping), self.journal.flush_at(), peer];
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
        self.replan |= self.agents.values().any(|agent| agent.hold_is_over(now));
        if now >= self.next_housekeeping + NOT_SCHEDULED {
            tracing::warn!("the manager did not run for a while; what it missed meanwhile counts against nobody");
            self.peer.ping(now);
        }
        if now >= self.peer.deadline() && self.stopping.is_none() {
            self.peer.look(&self.home, &self.inputs, now);
        }
        if self.journal.flush_at().is_some_and(|at| at <= now) {
            self.journal.flush();
        }
        if now >= self.next_housekeeping {
            self.next_housekeeping = now + HOUSEKEEPING;
            log::rotate_all(&self.home, self.config.log_max_size.0);
            self.reload_if_changed();
            if !self.is_recorded {
                role::announce_again(&self.home, Role::Spm, &self.own);
                self.is_recorded = role::holder(&self.home, Role::Spm).as_ref() == Some(&self.own);
            }
            self.orphans = platform::reap_orphans(&self.orphans);
            if now >= self.next_trim {
                self.trim_cache(now);
            }
            platform::notify(Notice::Alive);
        }
        if self.next_heartbeat.is_some_and(|at| at <= now) {
            // It is to tell what is wrong; a manager that nobody hears of need not ask.
            if now >= self.next_look {
                self.next_look = now + LOOK_APART;
                self.look_at_home();
            }
            self.send_heartbeat();
        }
    }

    /// Whether the home can be relied on, and its keys; what is wrong there shows and is told until it is mended.
    fn look_at_home(&mut self) {
        let found = guard::home(&self.home).and_then(|()| guard::keys(&self.home));
        let home = found.err().map(|error| format!("{error:#}; no release is fetched or activated meanwhile"));
        let is_sound = home.is_none();
        self.tell_of("home", "refused", home);
        let files = guard::files(&self.home, self.config.certificates(&self.home).as_deref());
        let files = files.err().map(|error| format!("{error:#}; it counts all the same, as no release gets in by it"));
        self.tell_of("files", "failed", files);
        if !is_sound {
            // What lies there may be anybody's, and nothing is taken on its word.
            return;
        }
        let ring = Keyring::load(&self.home).and_then(|ring| Ok(ring.overruled(&Keys::load(&self.home.keys())?)));
        let keys = match ring {
            Ok(overruled) => (!overruled.is_empty()).then(|| overruled.join("; ")),
            Err(error) => Some(format!("{error:#}")),
        };
        self.tell_of("keys", "failed", keys);
    }

    /// Tells of a problem when it comes and when it is gone.
    fn tell_of(&mut self, subject: &'static str, outcome: &str, problem: Option<String>) {
        match problem {
            Some(text) if self.problems.get(subject) == Some(&text) => {}
            Some(text) => {
                self.journal.note(subject, outcome, About::default(), text.as_str());
                self.problems.insert(subject, text);
            }
            None if self.problems.remove(subject).is_some() => {
                self.journal.note(subject, "ok", About::default(), "what was wrong there is mended");
            }
            None => {}
        }
    }

    /// Removes what came of downloads that nobody wants any more, or comes back for.
    fn trim_cache(&mut self, now: Instant) {
        self.next_trim = now + TRIM_EVERY;
        if guard::home(&self.home).is_err() {
            // What lies behind a link is somebody else's.
            return;
        }
        let cache = self.home.cache();
        let orders = self.desired.agents.iter();
        let wanted: BTreeSet<String> =
            orders.filter_map(|(name, order)| stage::wanted(name, order).file_name()).collect();
        // It may wait for a disk; nothing waits for it.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = package::trim(&cache, |file| wanted.contains(file)) {
                tracing::warn!(error = format!("{error:#}"), "old downloads cannot be removed");
            }
        });
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
                self.uplink.configure(&self.config);
                // It may be what kept the gateway from being reached.
                self.failures = 0;
                self.next_heartbeat = self.next_heartbeat.map(|_| Instant::now());
            }
            Err(error) => {
                let text = format!("{error:#}");
                self.journal.note("config", "failed", About::default(), text.as_str());
                self.problems.insert("config", text);
            }
        }
    }
}

fn groups(home: &Home) -> Option<Groups> {
    let groups = process::groups(home);
    match &groups {
        Some(groups) => tracing::info!(place = groups.place(), "sub-agents live in groups of their own"),
        None => tracing::warn!(
            "this host has no place for groups of processes (no cgroup that we may write); a sub-agent's session and mark stand in, \
             and what escapes from both outlives its stop"
        ),
    }
    groups
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
