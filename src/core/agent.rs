//! The state of one sub-agent in the manager: its release, its process, the change under way, and the actions that follow from each event.
//!
//! ```text
//!           Stage          Staged            Activate           Admitted             Recorded          down            Switched
//!  Idle ──────────▶ Staging ─────▶ Staged ──────────▶ Admitting ───────▶ Recording ───────▶ Stopping ─────▶ Switching ───────▶ Idle
//!   ▲                  │ failed              │ refused      │ cannot be written              │ cannot be switched
//!   │   time, or       ▼                     ▼              ▼                                ▼
//!   └────────────── Held ◀───────────────────┴──────────────┴────────────────────────────────┘
//!
//!  any ── Uninstall ─▶ Uninstalling (processes stop) ── down ─▶ Removing (files are removed) ── Removed ─▶ gone
//! ```
//!
//! Independently of this, its [`Supervisor`] starts, restarts and stops its process. The running release keeps running until the new one
//! is staged, admitted and recorded in the [`ledger`](super::ledger); if any step fails, it becomes the active one again. A new release is
//! on [`probation`] before it is committed.

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

/// Longest part shown of the name of a rejected environment variable, in bytes.
const MAX_NAME_SHOWN: usize = 64;

/// The change under way, apart from the supervision of its process.
#[derive(Debug, Clone, PartialEq)]
enum Activity {
    Idle,
    /// The release is fetched, verified and unpacked. `failures`: failures in a row to stage this release.
    Staging {
        id: u64,
        version: Version,
        failures: u32,
    },
    /// Waits for the next plan to activate it.
    Staged(Box<Ready>),
    Held(HeldRelease),
    /// The staged release is verified again before anything is stopped.
    Admitting {
        order: Box<Order>,
        program: Option<Program>,
        failures: u32,
    },
    /// The ledger is written with the activation already applied. In memory the old entry is used until the running release is down.
    Recording(Box<Activation>),
    /// The running release is being stopped.
    Stopping(Box<Activation>),
    /// The link `current` is being changed. `before`: the ledger entry before the activation.
    Switching {
        activation: Box<Activation>,
        before: Box<LedgerEntry>,
    },
    /// Roll back: the current release is being stopped and the ledger written.
    RollingBack(Box<Rollback>),
    /// The link `current` is being changed back.
    SwitchingBack(Box<Rollback>),
    /// Its processes are being stopped, and operations on its files complete.
    Uninstalling,
    Removing,
}

#[derive(Debug, Clone, PartialEq)]
struct Activation {
    order: Order,
    ready: Ready,
    /// Failures in a row to activate this release.
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
    activity: Activity,
    ledger: LedgerEntry,
    /// Complete on disk.
    releases: BTreeSet<Version>,
    /// Releases whose files are being removed.
    removing: BTreeSet<Version>,
    /// The id of the last staging.
    last_id: u64,
    /// Stagings without an answer yet, including cancelled ones.
    pending_stagings: BTreeSet<u64>,
    /// How the current release is run. `None`: unknown, or it cannot be run.
    program: Option<Program>,
    run: Run,
    /// `None`: its process was started with a spec other than the desired one.
    spec: Option<Spec>,
    /// The release of its process.
    running: Option<Version>,
    home_stops: bool,
    /// The progress of the current release's probation.
    progress: ProbationProgress,
    /// A roll back that is complete but for the start of the restored release.
    rolled_back: Option<Box<Rollback>>,
    /// The order in effect, where known.
    order: Option<Order>,
    /// The start waits for [`AgentEvent::Inspected`].
    starts_when_inspected: bool,
    /// Why it is not in its desired state, apart from exits of its process.
    error: Option<String>,
    /// The rejected environment variables of the gateway, as a message.
    refused_env: Option<String>,
}

/// What a manager finds of a sub-agent when it starts.
#[derive(Debug, Default)]
pub struct Discovery {
    pub ledger: LedgerEntry,
    pub releases: BTreeSet<Version>,
    /// Releases whose removal or unpacking was interrupted.
    pub unfinished: BTreeSet<Version>,
    /// How the current release is run; `None` if there is no current release.
    pub program: Option<Result<Program, String>>,
    pub restarts: u64,
    /// The order in effect.
    pub order: Option<Order>,
}

/// The exit of a process that a previous manager started.
#[derive(Debug, Clone, PartialEq)]
pub struct PriorExit {
    /// `None`: unknown.
    pub success: Option<bool>,
    pub how: String,
    /// The previous manager saw the exit and counted it if it was a failure.
    pub was_seen: bool,
}

impl Agent {
    /// Restores the state that a previous manager left. Returns the actions to continue from there.
    pub fn restore(name: AgentName, discovery: Discovery) -> (Agent, Vec<AgentAction>) {
        let Discovery { ledger, releases, unfinished, program, restarts, order } = discovery;
        let mut agent = Agent {
            name,
            supervisor: Supervisor::new(RestartPolicy::default(), restarts),
            activity: Activity::Idle,
            ledger,
            releases,
            removing: unfinished.clone(),
            last_id: 0,
            pending_stagings: BTreeSet::new(),
            program: None,
            run: Run::Stop,
            spec: None,
            running: None,
            home_stops: false,
            progress: ProbationProgress::default(),
            rolled_back: None,
            order,
            starts_when_inspected: false,
            error: None,
            refused_env: None,
        };
        if let Some(program) = program {
            agent.inspected(program);
        }
        let mut actions: Vec<AgentAction> = unfinished.into_iter().map(AgentAction::Discard).collect();
        // The previous manager may have exited between writing the order and following it.
        if agent.order.as_ref().is_some_and(|order| agent.ledger.resume_order(order.asks_for())) {
            actions.push(AgentAction::Record { wait: false });
        }
        (agent, actions)
    }

    /// A sub-agent of which nothing exists on this host yet.
    pub fn new(name: AgentName) -> Agent {
        Agent::restore(name, Discovery::default()).0
    }

    /// Adopts a process that a previous manager started at `since`. `spec`: the desired spec, if the process was started with exactly that.
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
        self.probation_started(&version, since);
        self.running = Some(version.clone());
        if let Some(actions) = self.resume_rollback(version, at) {
            return actions;
        }
        self.notify_supervisor(supervise::SupervisorEvent::Run, at)
    }

    /// As [`Agent::adopt`], for a process that has exited since. `wanted`: the desired spec, if the process had it; its restart policy then
    /// applies. Otherwise its leftover processes are stopped.
    pub fn adopt_exited(
        &mut self,
        pid: u32,
        version: Version,
        end: PriorExit,
        wanted: Option<Spec>,
        at: Moment,
    ) -> Vec<AgentAction> {
        self.supervisor.adopt(pid, at.now, at.now, 0.0);
        self.running = Some(version.clone());
        if let Some(actions) = self.resume_rollback(version, at) {
            return actions;
        }
        match wanted {
            Some(spec) => {
                self.run = Run::Start;
                self.spec = Some(spec);
                let mut actions = self.notify_supervisor(supervise::SupervisorEvent::Run, at);
                actions.extend(self.exited(end, at));
                self.decide_probation(at, &mut actions);
                actions
            }
            None => self.notify_supervisor(supervise::SupervisorEvent::Stop, at),
        }
    }

    /// Stops a leftover process that cannot be adopted. Nothing is started until it is down.
    pub fn stop_leftover(&mut self, pid: u32, at: Moment) -> Vec<AgentAction> {
        self.supervisor.adopt(pid, at.now, at.now, 0.0);
        self.notify_supervisor(supervise::SupervisorEvent::Stop, at)
    }

    /// Handles an event and returns the actions. An event that does not fit the current state changes nothing.
    pub fn step(&mut self, event: AgentEvent, at: Moment) -> Vec<AgentAction> {
        let before = self.supervisor.state();
        let of_health = matches!(event, AgentEvent::Checked(_));
        let mut actions = self.handle(event, at);
        self.decide_probation(at, &mut actions);
        let restarts = of_health && actions.contains(&AgentAction::Stop);
        self.note_transition(before, restarts, at.now, &mut actions);
        actions
    }

    fn handle(&mut self, event: AgentEvent, at: Moment) -> Vec<AgentAction> {
        match event {
            // A plan starts nothing on a busy sub-agent.
            AgentEvent::Stage(_)
            | AgentEvent::Activate(_)
            | AgentEvent::Configure { .. }
            | AgentEvent::Set(_)
            | AgentEvent::Uninstall
            | AgentEvent::Discard(_)
            | AgentEvent::RollBack { .. }
                if self.is_busy() =>
            {
                vec![]
            }
            AgentEvent::Stage(package) => self.stage(package, at),
            AgentEvent::Activate(order) => self.activate(order),
            AgentEvent::RollBack { overruled } => {
                let mut actions = self.roll_back_for_operator(overruled.as_ref(), at);
                actions.extend(self.continue_if_down());
                actions
            }
            AgentEvent::Retry => self.clear_holds(),
            AgentEvent::Configure { spec, spec_matches, sound } => self.configure(spec, spec_matches, sound, at),
            AgentEvent::Set(run) => {
                self.run = run;
                self.notify_supervisor(
                    if run == Run::Start { supervise::SupervisorEvent::Run } else { supervise::SupervisorEvent::Stop },
                    at,
                )
            }
            AgentEvent::Uninstall => {
                let mut actions = self.cancel_staging();
                self.activity = Activity::Uninstalling;
                actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Stop, at));
                actions.extend(self.continue_if_down());
                actions
            }
            AgentEvent::Discard(version) => self.discard(version),
            AgentEvent::OrderChanged(order) => self.order_changed(order),
            AgentEvent::HomeStopping => {
                self.home_stops = true;
                self.notify_supervisor(supervise::SupervisorEvent::Stop, at)
            }
            AgentEvent::Restart => self.notify_supervisor(supervise::SupervisorEvent::Restart, at),
            AgentEvent::Staged { id, version, result } => {
                self.pending_stagings.remove(&id);
                let mut actions = self.staged(id, version, result, at);
                actions.extend(self.continue_if_down());
                actions
            }
            AgentEvent::Admitted(result) => self.admitted(result, at),
            AgentEvent::Recorded(result) => self.recorded(result, at),
            AgentEvent::Switched(result) => self.switched(result, at),
            AgentEvent::Discarded(version) => {
                // If the removal failed, the next manager finds the files.
                self.removing.remove(&version);
                // A release that was staged to the same directory meanwhile is removed with it.
                self.releases.remove(&version);
                self.continue_if_down()
            }
            AgentEvent::Inspected { version, result } => {
                if self.current() == Some(&version) {
                    self.inspected(result);
                }
                let waits = std::mem::take(&mut self.starts_when_inspected) && self.supervisor.is_starting();
                if waits { self.start(at) } else { vec![] }
            }
            AgentEvent::Launched { pid, version, spec_matches } => {
                self.probation_started(&version, at.now);
                self.running = Some(version);
                let mut actions = self.notify_supervisor(supervise::SupervisorEvent::Started { pid }, at);
                if !self.is_busy() {
                    actions.extend(self.note_rollback(at));
                }
                if !spec_matches {
                    actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Restart, at));
                }
                actions
            }
            AgentEvent::LaunchFailed(refusal) => {
                let mut actions = vec![];
                if self.supervisor.last_error() != Some(&refusal.why) {
                    actions.push(self.repeating_note("start", refusal.outcome(), &refusal.why));
                }
                if self.supervisor.is_starting() {
                    let rollback_actions = self.start_failed(&refusal, at, &mut actions);
                    actions.extend(rollback_actions.into_iter().flatten());
                }
                actions
                    .extend(self.notify_supervisor(supervise::SupervisorEvent::StartFailed { why: refusal.why }, at));
                actions.extend(self.continue_if_down());
                actions
            }
            AgentEvent::Exited { success, how } => {
                if self.supervisor.is_stopping() {
                    return vec![];
                }
                let outcome = if success == Some(true) { "ok" } else { "failed" };
                let mut actions = vec![self.repeating_note("exit", outcome, &how)];
                self.running = None;
                actions.extend(self.exited(PriorExit { success, how, was_seen: false }, at));
                actions
            }
            AgentEvent::ProcessReplaced { pid } => {
                self.supervisor.replace_pid(pid, at.now);
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
                self.probation_stopped();
                actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Stopped, at));
                actions.extend(self.continue_if_down());
                actions
            }
            AgentEvent::Checked(answer) => {
                let mut actions = self.notify_supervisor(supervise::SupervisorEvent::Checked(answer), at);
                if actions.contains(&AgentAction::Stop) {
                    let why = self.supervisor.last_error().unwrap_or_default().to_owned();
                    let rollback_actions = self.fail_probation(&why, at, &mut actions);
                    actions.extend(rollback_actions.into_iter().flatten());
                }
                actions
            }
            AgentEvent::Tick => self.notify_supervisor(supervise::SupervisorEvent::Tick, at),
        }
    }

    fn exited(&mut self, end: PriorExit, at: Moment) -> Vec<AgentAction> {
        let PriorExit { success, how, was_seen } = end;
        let mut actions = vec![];
        let is_done = self.is_expected_exit(success);
        let counts = !was_seen || !holds(Guard::ExitCountsOnce);
        let rollback_actions = match self.supervisor.is_up() && !is_done && counts {
            true => self.fail_probation(&how, at, &mut actions),
            false => None,
        };
        if let Some(rollback_actions) = rollback_actions {
            actions.extend(rollback_actions);
            return actions;
        }
        actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Exited { success, how }, at));
        self.progress.is_done = is_done;
        actions
    }

    fn configure(
        &mut self,
        spec: Spec,
        spec_matches: bool,
        sound: Result<(), ReleaseError>,
        at: Moment,
    ) -> Vec<AgentAction> {
        if matches!(&self.activity, Activity::Held(held) if at.now < held.until) {
            return vec![];
        }
        if let Err(refusal) = sound {
            // It keeps running with its current environment.
            let version = self.current().cloned();
            return version.map(|version| self.hold(version, "env", refusal, at)).unwrap_or_default();
        }
        self.spec = Some(spec);
        let mut actions = vec![];
        if matches!(self.activity, Activity::Held(_)) {
            self.activity = Activity::Idle;
            self.error = None;
            actions.extend(self.current().cloned().map(AgentAction::Inspect));
        }
        if self.supervisor.pid().is_some() && !spec_matches {
            actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Restart, at));
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

    /// Passes an event to the supervisor.
    fn notify_supervisor(&mut self, event: supervise::SupervisorEvent, at: Moment) -> Vec<AgentAction> {
        let was_up = self.supervisor.is_up();
        let action = self.supervisor.step(event, at.now, at.jitter);
        let mut actions = vec![];
        if was_up && !self.supervisor.is_up() {
            actions.push(AgentAction::CancelCheck);
        }
        match action {
            Some(supervise::SupervisorAction::Start) => match (&self.program, self.current().cloned()) {
                // The release may have been repaired since.
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
            // A stop arrived while the release was inspected.
            return self.notify_supervisor(
                supervise::SupervisorEvent::StartFailed { why: "stopped before the start".to_owned() },
                at,
            );
        }
        if self.current().is_none() || self.program.is_none() {
            let why = self.error.clone().unwrap_or_else(|| "no active release".to_owned());
            return self.notify_supervisor(supervise::SupervisorEvent::StartFailed { why }, at);
        }
        let mut actions = vec![];
        let refused = self.rejected_env_message();
        if let Some(text) = refused.as_ref().filter(|_| self.refused_env != refused) {
            actions.push(AgentAction::Note(JournalNote::once("env", "refused", None, text.clone())));
        }
        self.refused_env = refused;
        actions.push(AgentAction::Start);
        actions
    }

    /// A message with the gateway's variables that the package does not allow.
    fn rejected_env_message(&self) -> Option<String> {
        let (program, spec) = (self.program.as_ref()?, self.spec.as_ref()?);
        let (_, refused) = admit_env(&spec.env, program.env_allow());
        let names = refused.iter().map(|name| cut(name, MAX_NAME_SHOWN)).collect::<Vec<_>>().join(", ");
        (!refused.is_empty()).then(|| {
            let text =
                format!("the gateway may not set {names}: the package does not allow it (envAllow in agent.toml)");
            cut(&text, MAX_MESSAGE_BYTES)
        })
    }

    fn note_transition(&self, before: AgentState, restarts: bool, now: Instant, actions: &mut Vec<AgentAction>) {
        let after = self.supervisor.state();
        let why = self.supervisor.last_error().unwrap_or_default();
        match (before, after) {
            (AgentState::Unhealthy, AgentState::Unhealthy) => {}
            (_, AgentState::Unhealthy) => actions.push(self.repeating_note("health", "failed", why)),
            (AgentState::Unhealthy, AgentState::Running) => {
                actions.push(self.repeating_note("health", "ok", "its health check passes again"))
            }
            // Later back-offs differ only in their delay.
            (AgentState::Starting | AgentState::Running | AgentState::Unhealthy, AgentState::Backoff)
                if self.supervisor.failures() == 2 =>
            {
                let delay = self.supervisor.starts_at().map(|at| at.saturating_duration_since(now)).unwrap_or_default();
                let text = format!("{why}; restarting in {delay:.1?}");
                actions.push(self.repeating_note("backoff", "failed", &text));
            }
            _ => {}
        }
        if restarts {
            actions.push(self.repeating_note("restart", "failed", why));
        }
    }

    fn repeating_note(&self, kind: &'static str, outcome: &'static str, message: &str) -> AgentAction {
        let (version, message) = (self.current().cloned(), message.to_owned());
        AgentAction::Note(JournalNote { kind, outcome, version, message, repeats: true, change: None })
    }
}

#[cfg(test)]
mod tests;
