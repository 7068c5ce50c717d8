//! One sub-agent as the manager knows it: what is under way, what it is to be, and what follows from each thing that happens.
//!
//! ```text
//!           Stage          Staged            Activate           Admitted             Recorded          down            Switched
//!  Idle ──────────▶ Staging ─────▶ Staged ──────────▶ Admitting ───────▶ Recording ───────▶ Stopping ─────▶ Switching ───────▶ Idle
//!   ▲                  │ failed              │ refused      │ cannot be written              │ cannot be switched
//!   │   time, or       ▼                     ▼              ▼                                ▼
//!   └────────────── Held ◀───────────────────┴──────────────┴────────────────────────────────┘
//!
//!  any ── Uninstall ─▶ Uninstalling (its processes) ── down ─▶ Removing (its files) ── Removed ─▶ gone
//! ```
//!
//! Beside this its [`Supervisor`] starts, restarts and stops its process. The release that runs goes on running until the new one is staged,
//! admitted and recorded in the [`ledger`](super::ledger); it is the active one again where any step fails. A new release is on
//! [`probation`] before it is committed.

mod event;
mod probation;
mod releases;
mod view;

use std::collections::BTreeSet;
use std::time::Instant;

pub use event::{AgentAction, AgentEvent, JournalNote, Moment, Ready, ReleaseChange, ReleaseError};
use probation::{ProbationProgress, Rollback};
use releases::put_into_use;

use super::guards::{Guard, holds};
use super::ledger::LedgerEntry;
use super::manifest::admit_env;
use super::model::{AgentName, Version};
use super::order::{Order, Run, Spec};
use super::program::Program;
use super::protocol::AgentState;
use super::supervise::{self, RestartPolicy, Supervisor};
use super::text::{MAX_MESSAGE_BYTES, cut};

/// Of the name of a variable that may not be set, so much is shown, bytes.
const MAX_NAME_SHOWN: usize = 64;

/// What is under way besides its process.
#[derive(Debug, Clone, PartialEq)]
enum Activity {
    Idle,
    /// Fetched, verified and unpacked. `failures`: times in a row that this release could not be had.
    Staging {
        id: u64,
        version: Version,
        failures: u32,
    },
    /// To be activated by the next plan.
    Staged(Box<Ready>),
    Held(HeldRelease),
    /// What was accepted when it was staged is looked at once more, before anything is stopped.
    Admitting {
        order: Box<Order>,
        program: Option<Program>,
        failures: u32,
    },
    /// The ledger is being written as it will be then. Until what runs is down, nothing else goes by that.
    Recording(Box<Activation>),
    /// What runs is being stopped.
    Stopping(Box<Activation>),
    /// The link `current` is being changed. `before`: its ledger before.
    Switching {
        activation: Box<Activation>,
        before: Box<LedgerEntry>,
    },
    /// The current release makes way for the one before it: it is being stopped, and the ledger written.
    Returning(Box<Rollback>),
    /// The link `current` is being changed back.
    SwitchingBack(Box<Rollback>),
    /// Its processes are being stopped, and what is under way on its files comes to its end.
    Uninstalling,
    Removing,
}

#[derive(Debug, Clone, PartialEq)]
struct Activation {
    order: Order,
    ready: Ready,
    /// Times in a row that this release could not be activated.
    failures: u32,
    began: Instant,
}

/// A release that is not to be tried again yet.
#[derive(Debug, Clone, PartialEq)]
struct HeldRelease {
    version: Version,
    failures: u32,
    until: Instant,
}

/// One sub-agent.
#[derive(Debug, Clone)]
pub struct Agent {
    name: AgentName,
    supervisor: Supervisor,
    work: Activity,
    ledger: LedgerEntry,
    /// Whole on disk.
    releases: BTreeSet<Version>,
    /// Their files are being removed.
    leaving: BTreeSet<Version>,
    /// Counts what is staged.
    last_id: u64,
    /// What is being staged and has not been answered, cancelled ones too.
    unanswered: BTreeSet<u64>,
    /// How the current release is run; `None`: not known, or it cannot be.
    program: Option<Program>,
    run: Run,
    /// `None`: its process was started with another than is wanted.
    spec: Option<Spec>,
    /// The release of its process.
    running: Option<Version>,
    home_stops: bool,
    /// Of the probation of the current release.
    seen: ProbationProgress,
    /// The release before the last one is the current one again, and has not run since.
    returned: Option<Box<Rollback>>,
    /// In force, where it is known.
    order: Option<Order>,
    /// Its start waits until it is known how its release is run.
    starts_when_inspected: bool,
    /// What keeps it from being what it should, besides its exits.
    error: Option<String>,
    /// Which of the gateway's variables it was started without, as a sentence.
    refused_env: Option<String>,
}

/// What is found of a sub-agent when a manager starts.
#[derive(Debug, Default)]
pub struct Discovery {
    pub ledger: LedgerEntry,
    pub releases: BTreeSet<Version>,
    /// Its removal, or its unpacking, was cut short.
    pub unfinished: BTreeSet<Version>,
    /// How the current release is run; `None` where none is.
    pub program: Option<Result<Program, String>>,
    pub restarts: u64,
    /// In force.
    pub order: Option<Order>,
}

/// How a process ended that an earlier manager started.
#[derive(Debug, Clone, PartialEq)]
pub struct PriorExit {
    /// `None`: not known.
    pub success: Option<bool>,
    pub how: String,
    /// That manager saw it, and counted it where it was a failure.
    pub was_seen: bool,
}

impl Agent {
    /// What an earlier manager left, and what is to be done about it.
    pub fn found(name: AgentName, found: Discovery) -> (Agent, Vec<AgentAction>) {
        let Discovery { ledger, releases, unfinished, program, restarts, order } = found;
        let mut agent = Agent {
            name,
            supervisor: Supervisor::new(RestartPolicy::default(), restarts),
            work: Activity::Idle,
            ledger,
            releases,
            leaving: unfinished.clone(),
            last_id: 0,
            unanswered: BTreeSet::new(),
            program: None,
            run: Run::Stop,
            spec: None,
            running: None,
            home_stops: false,
            seen: ProbationProgress::default(),
            returned: None,
            order,
            starts_when_inspected: false,
            error: None,
            refused_env: None,
        };
        if let Some(program) = program {
            agent.inspected(program);
        }
        let mut actions: Vec<AgentAction> = unfinished.into_iter().map(AgentAction::Discard).collect();
        // An earlier manager may have ended before it followed the order that it had written.
        if agent.order.as_ref().is_some_and(|order| agent.ledger.resume_order(order.asks_for())) {
            actions.push(AgentAction::Record { wait: false });
        }
        (agent, actions)
    }

    /// One of which nothing is there yet.
    pub fn new(name: AgentName) -> Agent {
        Agent::found(name, Discovery::default()).0
    }

    /// Takes charge of a process that an earlier manager started at `since`. `spec`: what is wanted, where it was started with just that.
    pub fn adopt(
        &mut self,
        pid: u32,
        version: Version,
        since: Instant,
        spec: Option<Spec>,
        at: Moment,
    ) -> Vec<AgentAction> {
        self.supervisor.adopt(pid, since, at.now, at.jitter);
        self.run = Run::Start;
        self.spec = spec;
        self.probation_is_up(&version, since);
        self.running = Some(version.clone());
        if let Some(actions) = self.resume_return(version, at) {
            return actions;
        }
        self.feed(supervise::SupervisorEvent::Run, at)
    }

    /// As [`Agent::adopt`], of a process that ended since. `restarts_it`: its restart policy counts, since it was what is wanted now;
    /// otherwise what it left behind is ended.
    pub fn bury(
        &mut self,
        pid: u32,
        version: Version,
        end: PriorExit,
        wanted: Option<Spec>,
        at: Moment,
    ) -> Vec<AgentAction> {
        self.supervisor.adopt(pid, at.now, at.now, 0.0);
        self.running = Some(version.clone());
        if let Some(actions) = self.resume_return(version, at) {
            return actions;
        }
        match wanted {
            Some(spec) => {
                self.run = Run::Start;
                self.spec = Some(spec);
                let mut actions = self.feed(supervise::SupervisorEvent::Run, at);
                actions.extend(self.exited(end, at));
                self.judge(at, &mut actions);
                actions
            }
            None => self.feed(supervise::SupervisorEvent::Rest, at),
        }
    }

    /// What runs of it cannot be adopted and is ended, as its own stop: nothing new of it starts meanwhile.
    pub fn clear_away(&mut self, pid: u32, at: Moment) -> Vec<AgentAction> {
        self.supervisor.adopt(pid, at.now, at.now, 0.0);
        self.feed(supervise::SupervisorEvent::Rest, at)
    }

    /// Takes in what happened and says what to do. What cannot come in its state changes nothing.
    pub fn step(&mut self, event: AgentEvent, at: Moment) -> Vec<AgentAction> {
        let before = self.supervisor.state();
        let of_health = matches!(event, AgentEvent::Checked(_));
        let mut actions = self.take(event, at);
        self.judge(at, &mut actions);
        let restarts = of_health && actions.contains(&AgentAction::Stop);
        self.note_transition(before, restarts, at.now, &mut actions);
        actions
    }

    fn take(&mut self, event: AgentEvent, at: Moment) -> Vec<AgentAction> {
        match event {
            // A plan begins nothing on what is busy.
            AgentEvent::Stage(_)
            | AgentEvent::Activate(_)
            | AgentEvent::Configure { .. }
            | AgentEvent::Set(_)
            | AgentEvent::Uninstall
            | AgentEvent::Discard(_)
            | AgentEvent::Return { .. }
                if self.is_busy() =>
            {
                vec![]
            }
            AgentEvent::Stage(package) => self.stage(package, at),
            AgentEvent::Activate(order) => self.activate(order),
            AgentEvent::Return { overruled } => {
                let mut actions = self.return_for_operator(overruled.as_ref(), at);
                actions.extend(self.go_on_if_down());
                actions
            }
            AgentEvent::Retry => self.try_again(),
            AgentEvent::Configure { spec, runs_so, sound } => self.configure(spec, runs_so, sound, at),
            AgentEvent::Set(run) => {
                self.run = run;
                self.feed(
                    if run == Run::Start { supervise::SupervisorEvent::Run } else { supervise::SupervisorEvent::Rest },
                    at,
                )
            }
            AgentEvent::Uninstall => {
                let mut actions = self.cancel_staging();
                self.work = Activity::Uninstalling;
                actions.extend(self.feed(supervise::SupervisorEvent::Rest, at));
                actions.extend(self.go_on_if_down());
                actions
            }
            AgentEvent::Discard(version) => self.discard(version),
            AgentEvent::Ordered(order) => self.ordered(order),
            AgentEvent::HomeStops => {
                self.home_stops = true;
                self.feed(supervise::SupervisorEvent::Rest, at)
            }
            AgentEvent::Restart => self.feed(supervise::SupervisorEvent::Again, at),
            AgentEvent::Staged { id, version, result } => {
                self.unanswered.remove(&id);
                let mut actions = self.staged(id, version, result, at);
                actions.extend(self.go_on_if_down());
                actions
            }
            AgentEvent::Admitted(result) => self.admitted(result, at),
            AgentEvent::Recorded(result) => self.recorded(result, at),
            AgentEvent::Switched(result) => self.switched(result, at),
            AgentEvent::Discarded(version) => {
                // What could not be removed is found by the next manager.
                self.leaving.remove(&version);
                // What was staged in its place meanwhile is gone with it.
                self.releases.remove(&version);
                self.go_on_if_down()
            }
            AgentEvent::Inspected { version, result } => {
                if self.current() == Some(&version) {
                    self.inspected(result);
                }
                let waits = std::mem::take(&mut self.starts_when_inspected) && self.supervisor.is_starting();
                if waits { self.start(at) } else { vec![] }
            }
            AgentEvent::Launched { pid, version, runs_so } => {
                self.probation_is_up(&version, at.now);
                self.running = Some(version);
                let mut actions = self.feed(supervise::SupervisorEvent::Started { pid }, at);
                if !self.is_busy() {
                    actions.extend(self.note_returned(at));
                }
                if !runs_so {
                    actions.extend(self.feed(supervise::SupervisorEvent::Again, at));
                }
                actions
            }
            AgentEvent::NotLaunched(refusal) => {
                let mut actions = vec![];
                if self.supervisor.last_error() != Some(&refusal.why) {
                    actions.push(self.repeating("start", refusal.outcome(), &refusal.why));
                }
                if self.supervisor.is_starting() {
                    let condemned = self.start_failed(&refusal, at, &mut actions);
                    actions.extend(condemned.into_iter().flatten());
                }
                actions.extend(self.feed(supervise::SupervisorEvent::StartFailed { why: refusal.why }, at));
                actions.extend(self.go_on_if_down());
                actions
            }
            AgentEvent::Exited { success, how } => {
                if self.supervisor.is_stopping() {
                    return vec![];
                }
                let outcome = if success == Some(true) { "ok" } else { "failed" };
                let mut actions = vec![self.repeating("exit", outcome, &how)];
                self.running = None;
                actions.extend(self.exited(PriorExit { success, how, was_seen: false }, at));
                actions
            }
            AgentEvent::Moved { pid } => {
                self.supervisor.replace(pid, at.now);
                vec![]
            }
            AgentEvent::Stopped(result) => {
                let mut actions = vec![];
                match result {
                    Ok(()) => self.running = None,
                    Err(why) => {
                        actions.push(AgentAction::Note(JournalNote::once("stop", "failed", None, why.clone())));
                        self.error = Some(why);
                    }
                }
                self.probation_is_down();
                actions.extend(self.feed(supervise::SupervisorEvent::Stopped, at));
                actions.extend(self.go_on_if_down());
                actions
            }
            AgentEvent::Checked(answer) => {
                let mut actions = self.feed(supervise::SupervisorEvent::Checked(answer), at);
                if actions.contains(&AgentAction::Stop) {
                    let why = self.supervisor.last_error().unwrap_or_default().to_owned();
                    let condemned = self.fail_probation(&why, at, &mut actions);
                    actions.extend(condemned.into_iter().flatten());
                }
                actions
            }
            AgentEvent::Tick => self.feed(supervise::SupervisorEvent::Tick, at),
        }
    }

    fn exited(&mut self, end: PriorExit, at: Moment) -> Vec<AgentAction> {
        let PriorExit { success, how, was_seen } = end;
        let mut actions = vec![];
        let is_done = self.is_done_by(success);
        let counts = !was_seen || !holds(Guard::EndCountsOnce);
        let condemned = match self.supervisor.is_up() && !is_done && counts {
            true => self.fail_probation(&how, at, &mut actions),
            false => None,
        };
        if let Some(condemned) = condemned {
            actions.extend(condemned);
            return actions;
        }
        actions.extend(self.feed(supervise::SupervisorEvent::Exited { success, how }, at));
        self.seen.is_done = is_done;
        actions
    }

    fn configure(
        &mut self,
        spec: Spec,
        runs_so: bool,
        sound: Result<(), ReleaseError>,
        at: Moment,
    ) -> Vec<AgentAction> {
        if matches!(&self.work, Activity::Held(held) if at.now < held.until) {
            return vec![];
        }
        if let Err(refusal) = sound {
            // With the environment that it has, it goes on running.
            let version = self.current().cloned();
            return version.map(|version| self.hold(version, "env", refusal, at)).unwrap_or_default();
        }
        self.spec = Some(spec);
        let mut actions = vec![];
        if matches!(self.work, Activity::Held(_)) {
            self.work = Activity::Idle;
            self.error = None;
            actions.extend(self.current().cloned().map(AgentAction::Inspect));
        }
        if self.supervisor.pid().is_some() && !runs_so {
            actions.extend(self.feed(supervise::SupervisorEvent::Again, at));
        }
        actions
    }

    fn inspected(&mut self, program: Result<Program, String>) {
        match program {
            Ok(program) => {
                self.supervisor.set_policy(program.policy());
                if self.program.replace(program).is_none() {
                    self.error = None;
                }
            }
            Err(why) => {
                self.program = None;
                self.error = Some(why);
            }
        }
    }

    /// Passes an event on to its supervisor.
    fn feed(&mut self, event: supervise::SupervisorEvent, at: Moment) -> Vec<AgentAction> {
        let was_up = self.supervisor.is_up();
        let action = self.supervisor.step(event, at.now, at.jitter);
        let mut actions = vec![];
        if was_up && !self.supervisor.is_up() {
            actions.push(AgentAction::CancelCheck);
        }
        match action {
            Some(supervise::SupervisorAction::Start) => match (&self.program, self.current().cloned()) {
                // What was wrong with the release may have been corrected.
                (None, Some(version)) => {
                    self.starts_when_inspected = true;
                    actions.push(AgentAction::Inspect(version));
                }
                _ => actions.extend(self.start(at)),
            },
            Some(supervise::SupervisorAction::Stop) => actions.push(AgentAction::Stop),
            Some(supervise::SupervisorAction::Check) => actions.push(AgentAction::Check),
            None => {}
        }
        actions
    }

    fn start(&mut self, at: Moment) -> Vec<AgentAction> {
        if !self.supervisor.wanted() {
            // A stop came while it was looked how it is run.
            return self.feed(supervise::SupervisorEvent::StartFailed { why: "it is to stop".to_owned() }, at);
        }
        if self.current().is_none() || self.program.is_none() {
            let why = self.error.clone().unwrap_or_else(|| "no release of it is active".to_owned());
            return self.feed(supervise::SupervisorEvent::StartFailed { why }, at);
        }
        let mut actions = vec![];
        let refused = self.refuses_env();
        if let Some(text) = refused.as_ref().filter(|_| self.refused_env != refused) {
            actions.push(AgentAction::Note(JournalNote::once("env", "refused", None, text.clone())));
        }
        self.refused_env = refused;
        actions.push(AgentAction::Start);
        actions
    }

    /// Which of the gateway's variables its package does not let it set, as a sentence.
    fn refuses_env(&self) -> Option<String> {
        let (program, spec) = (self.program.as_ref()?, self.spec.as_ref()?);
        let (_, refused) = admit_env(&spec.env, program.env_allow());
        let names = refused.iter().map(|name| cut(name, MAX_NAME_SHOWN)).collect::<Vec<_>>().join(", ");
        (!refused.is_empty()).then(|| {
            let text = format!("the gateway may not set {names}; its package would have to allow it");
            cut(&text, MAX_MESSAGE_BYTES)
        })
    }

    fn note_transition(&self, before: AgentState, restarts: bool, now: Instant, actions: &mut Vec<AgentAction>) {
        let after = self.supervisor.state();
        let why = self.supervisor.last_error().unwrap_or_default();
        match (before, after) {
            (AgentState::Unhealthy, AgentState::Unhealthy) => {}
            (_, AgentState::Unhealthy) => actions.push(self.repeating("health", "failed", why)),
            (AgentState::Unhealthy, AgentState::Running) => {
                actions.push(self.repeating("health", "ok", "its health check passes again"))
            }
            // The later ones differ in nothing but the delay.
            (AgentState::Starting | AgentState::Running | AgentState::Unhealthy, AgentState::Backoff)
                if self.supervisor.failures() == 2 =>
            {
                let delay = self.supervisor.starts_at().map(|at| at.saturating_duration_since(now)).unwrap_or_default();
                let text = format!("{why}; it is started again in {delay:.1?}");
                actions.push(self.repeating("backoff", "failed", &text));
            }
            _ => {}
        }
        if restarts {
            actions.push(self.repeating("restart", "failed", why));
        }
    }

    fn repeating(&self, kind: &'static str, outcome: &'static str, message: &str) -> AgentAction {
        let (version, message) = (self.current().cloned(), message.to_owned());
        AgentAction::Note(JournalNote { kind, outcome, version, message, repeats: true, change: None })
    }
}

#[cfg(test)]
mod tests;
