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
//! admitted and recorded in the [`ledger`](super::ledger); it is the active one again where any step fails. A new release is committed when it
//! has started.

mod view;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::ledger::{Entry, Release, Skipped};
use super::manifest::admit_env;
use super::model::{AgentName, Version};
use super::order::{Order, Package, Run, Spec};
use super::program::Program;
use super::protocol::AgentState;
use super::schedule::Backoff;
use super::supervise::{self, Answer, Policy, Supervisor};
use super::text::{MAX_MESSAGE_BYTES, cut};

/// Between two tries at a release that cannot be had.
const RETRY: Backoff = Backoff { base: Duration::from_secs(5), cap: Duration::from_secs(300) };
/// Between two downloads of one that is refused each time: a whole fleet may be ordered to have it, over links that others need.
const COSTLY_RETRY: Backoff = Backoff { cap: Duration::from_secs(6 * 3600), ..RETRY };
/// Of the name of a variable that may not be set, so much is shown, bytes.
const MAX_NAME_SHOWN: usize = 64;

/// When something happens. `jitter` is from 0 to 1.
#[derive(Debug, Clone, Copy)]
pub struct At {
    pub now: Instant,
    /// For what must be compared after a restart of the manager.
    pub unix_seconds: u64,
    pub jitter: f64,
}

/// Why a release could not be staged, activated or started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub why: String,
    /// It was looked at and not trusted, as opposed to not available.
    pub refused: bool,
    /// Its source asks for this pause.
    pub retry_after: Option<Duration>,
    /// It was downloaded before it was refused, and would be again.
    pub costly: bool,
    /// It was accepted when it was staged, and is not any more: it is to be fetched anew.
    pub withdrawn: bool,
}

impl Refusal {
    pub fn failed(why: impl Into<String>) -> Refusal {
        Refusal { why: why.into(), refused: false, retry_after: None, costly: false, withdrawn: false }
    }

    /// As an event has it.
    pub fn outcome(&self) -> &'static str {
        if self.refused { "refused" } else { "failed" }
    }
}

/// A release that lies on disk and may be run, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    pub release: Release,
    pub program: Program,
}

/// What is under way besides its process.
#[derive(Debug, Clone, PartialEq)]
enum Work {
    Idle,
    /// Fetched, verified and unpacked. `failures`: times in a row that this release could not be had.
    Staging {
        version: Version,
        failures: u32,
    },
    /// To be activated by the next plan.
    Staged(Box<Ready>),
    Held(Held),
    /// What was accepted when it was staged is looked at once more, before anything is stopped.
    Admitting {
        order: Box<Order>,
        program: Option<Program>,
        failures: u32,
    },
    /// Its ledger is being written.
    Recording(Box<Activation>),
    /// What runs is being stopped.
    Stopping(Box<Activation>),
    /// The link `current` is being changed.
    Switching(Box<Activation>),
    Uninstalling,
    Removing,
}

#[derive(Debug, Clone, PartialEq)]
struct Activation {
    order: Order,
    ready: Ready,
    /// Its ledger before.
    before: Entry,
    /// Times in a row that this release could not be activated.
    failures: u32,
}

/// A release that is not to be tried again yet.
#[derive(Debug, Clone, PartialEq)]
struct Held {
    version: Version,
    failures: u32,
    until: Instant,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The plan wants this release on disk.
    Stage(Package),
    /// The plan wants this release, which lies on disk, to be the active one.
    Activate(Order),
    /// The plan wants it run so. `runs_so`: its process was started with just this; `sound`: whether it could be started again.
    Configure {
        spec: Spec,
        runs_so: bool,
        sound: Result<(), Refusal>,
    },
    /// The plan wants it to run, or not.
    Set(Run),
    /// The plan wants it gone.
    Uninstall,
    /// The plan does not want this release on disk.
    Discard(Version),
    /// Another desired state is in force; `None`: it does not name this sub-agent.
    Ordered(Option<Version>),
    /// Its home is being stopped.
    HomeStops,
    /// An operator wants it restarted.
    Restart,

    Staged {
        version: Version,
        result: Result<Ready, Refusal>,
    },
    /// The release that lies on disk, and how it is run where that was asked for.
    Admitted(Result<(Release, Option<Program>), Refusal>),
    /// What the ledger says of it is durable, or cannot be made so.
    Recorded(Result<(), String>),
    Switched(Result<(), String>),
    Discarded {
        version: Version,
        gone: bool,
    },
    /// How its current release is run, read anew.
    Inspected(Result<Program, String>),

    Launched {
        pid: u32,
        version: Version,
        runs_so: bool,
    },
    NotLaunched(Refusal),
    /// Its process ended by itself.
    Exited {
        success: Option<bool>,
        how: String,
    },
    /// Another process took the place of the one that was watched.
    Moved {
        pid: u32,
    },
    /// The stop that was asked for came to its end.
    Stopped(Result<(), String>),
    Checked(Answer),
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// To be answered with [`Event::Staged`].
    Stage(Package),
    /// The release that is being staged is not wanted any more.
    CancelStaging,
    /// To look whether a release that lies on disk may be run; [`Event::Admitted`]. `inspect`: how it is run is not known either.
    Admit {
        version: Version,
        inspect: bool,
    },
    /// To write the ledger; `wait`: [`Event::Recorded`] is waited for.
    Record {
        wait: bool,
    },
    /// A release was committed: its epoch counts from now on.
    RaiseEpoch(Release),
    /// To make the link `current` name this version; [`Event::Switched`].
    Switch(Version),
    /// To remove all of its files.
    Remove,
    /// To remove a release's files; [`Event::Discarded`].
    Discard(Version),
    /// To read how a release is run; [`Event::Inspected`].
    Inspect(Version),
    Start,
    Stop,
    Check,
    /// The answer to a check that is under way would say nothing.
    CancelCheck,
    Note(Note),
}

/// Something for the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    pub kind: &'static str,
    pub outcome: &'static str,
    pub version: Option<Version>,
    pub message: String,
    /// It may come again and again, and is told less and less often.
    pub repeats: bool,
}

/// One sub-agent.
#[derive(Debug)]
pub struct Agent {
    name: AgentName,
    supervisor: Supervisor,
    work: Work,
    ledger: Entry,
    /// Whole on disk.
    releases: BTreeSet<Version>,
    /// Their files are being removed.
    leaving: BTreeSet<Version>,
    /// How the current release is run; `None`: not known, or it cannot be.
    program: Option<Program>,
    run: Run,
    /// `None`: its process was started with another than is wanted.
    spec: Option<Spec>,
    /// The release of its process.
    running: Option<Version>,
    home_stops: bool,
    /// Its start waits until it is known how its release is run.
    starts_when_inspected: bool,
    /// What keeps it from being what it should, besides its exits.
    error: Option<String>,
    /// Which of the gateway's variables it was started without, as a sentence.
    refused_env: Option<String>,
}

/// What is found of a sub-agent when a manager starts.
#[derive(Debug, Default)]
pub struct Found {
    pub ledger: Entry,
    pub releases: BTreeSet<Version>,
    /// Its removal, or its unpacking, was cut short.
    pub unfinished: BTreeSet<Version>,
    /// How the current release is run; `None` where none is.
    pub program: Option<Result<Program, String>>,
    pub restarts: u64,
}

impl Agent {
    /// What an earlier manager left, and what is to be done about it.
    pub fn found(name: AgentName, found: Found) -> (Agent, Vec<Action>) {
        let Found { ledger, releases, unfinished, program, restarts } = found;
        let mut agent = Agent {
            name,
            supervisor: Supervisor::new(Policy::default(), restarts),
            work: Work::Idle,
            ledger,
            releases,
            leaving: unfinished.clone(),
            program: None,
            run: Run::Stop,
            spec: None,
            running: None,
            home_stops: false,
            starts_when_inspected: false,
            error: None,
            refused_env: None,
        };
        if let Some(program) = program {
            agent.inspected(program);
        }
        (agent, unfinished.into_iter().map(Action::Discard).collect())
    }

    /// One of which nothing is there yet.
    pub fn new(name: AgentName) -> Agent {
        Agent::found(name, Found::default()).0
    }

    /// Takes charge of a process that an earlier manager started at `since`. `spec`: what is wanted, where it was started with just that.
    pub fn adopt(&mut self, pid: u32, version: Version, since: Instant, spec: Option<Spec>, at: At) -> Vec<Action> {
        self.supervisor.adopt(pid, since, at.now, at.jitter);
        self.run = Run::Start;
        self.spec = spec;
        self.running = Some(version);
        let mut actions = self.feed(supervise::Event::Run, at);
        self.commit_started(&mut actions);
        actions
    }

    /// As [`Agent::adopt`], of a process that ended since. `restarts_it`: its restart policy counts, since it was what is wanted now;
    /// otherwise what it left behind is ended.
    pub fn bury(
        &mut self,
        pid: u32,
        version: Version,
        ended: (Option<bool>, String),
        wanted: Option<Spec>,
        at: At,
    ) -> Vec<Action> {
        self.supervisor.adopt(pid, at.now, at.now, 0.0);
        self.running = Some(version);
        match wanted {
            Some(spec) => {
                self.run = Run::Start;
                self.spec = Some(spec);
                let mut actions = self.feed(supervise::Event::Run, at);
                let (success, how) = ended;
                actions.extend(self.feed(supervise::Event::Exited { success, how }, at));
                actions
            }
            None => self.feed(supervise::Event::Rest, at),
        }
    }

    /// What runs of it cannot be adopted and is ended, as its own stop: nothing new of it starts meanwhile.
    pub fn clear_away(&mut self, pid: u32, at: At) -> Vec<Action> {
        self.supervisor.adopt(pid, at.now, at.now, 0.0);
        self.feed(supervise::Event::Rest, at)
    }

    /// Takes in what happened and says what to do. What cannot come in its state changes nothing.
    pub fn step(&mut self, event: Event, at: At) -> Vec<Action> {
        let before = self.supervisor.state();
        let of_health = matches!(event, Event::Checked(_));
        let mut actions = self.take(event, at);
        let restarts = of_health && actions.contains(&Action::Stop);
        self.note_transition(before, restarts, at.now, &mut actions);
        actions
    }

    fn take(&mut self, event: Event, at: At) -> Vec<Action> {
        match event {
            Event::Stage(package) => self.stage(package, at),
            Event::Activate(order) => self.activate(order),
            Event::Configure { spec, runs_so, sound } => self.configure(spec, runs_so, sound, at),
            Event::Set(run) => {
                self.run = run;
                self.feed(if run == Run::Start { supervise::Event::Run } else { supervise::Event::Rest }, at)
            }
            Event::Uninstall => {
                let mut actions = self.cancel_staging();
                self.work = Work::Uninstalling;
                actions.extend(self.feed(supervise::Event::Rest, at));
                actions.extend(self.go_on_if_down());
                actions
            }
            Event::Discard(version) => self.discard(version),
            Event::Ordered(version) => self.ordered(version),
            Event::HomeStops => {
                self.home_stops = true;
                self.feed(supervise::Event::Rest, at)
            }
            Event::Restart => self.feed(supervise::Event::Again, at),
            Event::Staged { version, result } => self.staged(version, result, at),
            Event::Admitted(result) => self.admitted(result, at),
            Event::Recorded(result) => self.recorded(result, at),
            Event::Switched(result) => self.switched(result, at),
            Event::Discarded { version, gone } => {
                self.leaving.remove(&version);
                // What could not be removed is tried again with the next plan, or start.
                if !gone {
                    self.releases.insert(version);
                }
                vec![]
            }
            Event::Inspected(result) => {
                self.inspected(result);
                let waits = std::mem::take(&mut self.starts_when_inspected) && self.supervisor.is_starting();
                if waits { self.start(at) } else { vec![] }
            }
            Event::Launched { pid, version, runs_so } => {
                self.running = Some(version);
                let mut actions = self.feed(supervise::Event::Started { pid }, at);
                self.commit_started(&mut actions);
                if !runs_so {
                    actions.extend(self.feed(supervise::Event::Again, at));
                }
                actions
            }
            Event::NotLaunched(refusal) => {
                let mut actions = vec![];
                if self.supervisor.last_error() != Some(&refusal.why) {
                    actions.push(self.repeating("start", refusal.outcome(), &refusal.why));
                }
                actions.extend(self.feed(supervise::Event::StartFailed { why: refusal.why }, at));
                actions.extend(self.go_on_if_down());
                actions
            }
            Event::Exited { success, how } => {
                if self.supervisor.is_stopping() {
                    return vec![];
                }
                let outcome = if success == Some(true) { "ok" } else { "failed" };
                let mut actions = vec![self.repeating("exit", outcome, &how)];
                actions.extend(self.feed(supervise::Event::Exited { success, how }, at));
                actions
            }
            Event::Moved { pid } => {
                self.supervisor.replace(pid, at.now);
                vec![]
            }
            Event::Stopped(result) => {
                let mut actions = vec![];
                match result {
                    Ok(()) => self.running = None,
                    Err(why) => {
                        actions.push(Action::Note(Note::once("stop", "failed", None, why.clone())));
                        self.error = Some(why);
                    }
                }
                actions.extend(self.feed(supervise::Event::Stopped, at));
                actions.extend(self.go_on_if_down());
                actions
            }
            Event::Checked(answer) => self.feed(supervise::Event::Checked(answer), at),
            Event::Tick => self.feed(supervise::Event::Tick, at),
        }
    }

    fn stage(&mut self, package: Package, at: At) -> Vec<Action> {
        let failures = self.failures_of(&package.version);
        if let Some(skipped) = self.ledger.skipped(&package.version, package.sha256.as_ref()) {
            // The clock may have been set back since.
            let left = skipped.until.map(|until| Duration::from_secs(until.saturating_sub(at.unix_seconds)));
            let left = left.unwrap_or(COSTLY_RETRY.cap).min(COSTLY_RETRY.cap);
            if !left.is_zero() {
                self.error = Some(skipped.reason.clone());
                self.work = Work::Held(Held { version: package.version, failures, until: at.now + left });
                return vec![];
            }
        }
        self.work = Work::Staging { version: package.version.clone(), failures };
        vec![Action::Stage(package)]
    }

    fn staged(&mut self, version: Version, result: Result<Ready, Refusal>, at: At) -> Vec<Action> {
        let is_wanted = matches!(&self.work, Work::Staging { version: wanted, .. } if *wanted == version);
        match result {
            Ok(ready) => {
                self.releases.insert(version.clone());
                if !is_wanted {
                    // The next plan discards it, or has use for it.
                    return vec![];
                }
                self.error = None;
                self.ledger.stage(ready.release.clone());
                self.work = Work::Staged(Box::new(ready));
                let message = format!("{} {version} is staged", self.name);
                vec![Action::Record { wait: false }, Action::Note(Note::once("stage", "ok", Some(version), message))]
            }
            Err(refusal) if is_wanted => self.hold(version, "stage", refusal, at),
            Err(_) => vec![],
        }
    }

    fn activate(&mut self, order: Order) -> Vec<Action> {
        let mut actions = vec![];
        let version = order.package.version.clone();
        let failures = self.failures_of(&version);
        let program = match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Staged(ready) if ready.release.version == version => Some(ready.program),
            Work::Staging { .. } => {
                actions.push(Action::CancelStaging);
                None
            }
            _ => None,
        };
        actions.push(Action::Admit { version, inspect: program.is_none() });
        self.work = Work::Admitting { order: Box::new(order), program, failures };
        actions
    }

    fn admitted(&mut self, result: Result<(Release, Option<Program>), Refusal>, at: At) -> Vec<Action> {
        let Work::Admitting { order, program, failures } = &mut self.work else { return vec![] };
        let (order, program, failures) = ((**order).clone(), program.take(), *failures);
        let (release, inspected) = match result {
            Ok(admitted) => admitted,
            Err(refusal) => return self.refuse_activation(order.package.version, refusal, at),
        };
        let Some(program) = inspected.or(program) else { return vec![] };
        let ready = Ready { release, program };
        let before = self.ledger.clone();
        if before.current().is_none() {
            self.ledger.activate(ready.release.clone());
        } else {
            self.ledger.begin_probation(ready.release.clone());
        }
        self.work = Work::Recording(Box::new(Activation { order, ready, before, failures }));
        vec![Action::Record { wait: true }]
    }

    fn recorded(&mut self, result: Result<(), String>, at: At) -> Vec<Action> {
        let activation = match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Recording(activation) => activation,
            other => {
                self.work = other;
                return vec![];
            }
        };
        if let Err(why) = result {
            let version = activation.ready.release.version.clone();
            self.ledger = activation.before.clone();
            self.work = Work::Recording(activation);
            let why = format!("cannot activate {} {version}: {why}", self.name);
            return self.refuse_activation(version, Refusal::failed(why), at);
        }
        self.work = Work::Stopping(activation);
        let mut actions = self.feed(supervise::Event::Rest, at);
        actions.extend(self.go_on_if_down());
        actions
    }

    /// Goes on with what waited for its processes to end.
    fn go_on_if_down(&mut self) -> Vec<Action> {
        if !self.supervisor.is_down() {
            return vec![];
        }
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Stopping(activation) => {
                let version = activation.ready.release.version.clone();
                self.work = Work::Switching(activation);
                vec![Action::Switch(version)]
            }
            Work::Uninstalling => {
                self.work = Work::Removing;
                vec![Action::Remove]
            }
            other => {
                self.work = other;
                vec![]
            }
        }
    }

    fn switched(&mut self, result: Result<(), String>, at: At) -> Vec<Action> {
        let activation = match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Switching(activation) => *activation,
            other => {
                self.work = other;
                return vec![];
            }
        };
        let Activation { order, ready, before, failures } = activation;
        let version = ready.release.version.clone();
        let mut actions = vec![];
        match result {
            Ok(()) => {
                self.error = None;
                self.releases.insert(version.clone());
                self.inspected(Ok(ready.program));
                let message = format!("{} {version} is active", self.name);
                actions.push(Action::Note(Note::once("activate", "ok", Some(version), message)));
                if self.ledger.probation().is_none() {
                    actions.push(Action::RaiseEpoch(ready.release));
                } else if order.run == Run::Stop {
                    // It is not started, so nothing more is to be seen of it.
                    self.commit(&mut actions);
                }
            }
            Err(why) => {
                self.work = Work::Held(Held { version: version.clone(), failures, until: at.now });
                self.ledger = before;
                actions.push(Action::Record { wait: false });
                actions.extend(self.refuse_activation(version, Refusal::failed(why), at));
            }
        }
        self.run = order.run;
        self.spec = Some(order.spec);
        // A stop of the home may have come while the old release was being ended.
        if self.run == Run::Start && !self.home_stops && self.ledger.current().is_some() {
            actions.extend(self.feed(supervise::Event::Run, at));
        }
        actions
    }

    /// What is active stays so. A release that was withdrawn goes, so that it is fetched as it is published now.
    fn refuse_activation(&mut self, version: Version, refusal: Refusal, at: At) -> Vec<Action> {
        let withdrawn = refusal.withdrawn;
        let mut actions = self.hold(version.clone(), "activate", refusal, at);
        // One whose program runs all the same (what is active could not be told) keeps its files.
        if withdrawn && self.running.as_ref() != Some(&version) {
            actions.extend(self.discard(version));
        }
        actions
    }

    fn discard(&mut self, version: Version) -> Vec<Action> {
        let mut actions = vec![];
        self.releases.remove(&version);
        let before = self.ledger.clone();
        self.ledger.keep_whole(|whole| *whole != version);
        if self.ledger != before {
            actions.push(Action::Record { wait: false });
        }
        self.leaving.insert(version.clone());
        actions.push(Action::Discard(version));
        actions
    }

    fn configure(&mut self, spec: Spec, runs_so: bool, sound: Result<(), Refusal>, at: At) -> Vec<Action> {
        if matches!(&self.work, Work::Held(held) if at.now < held.until) {
            return vec![];
        }
        if let Err(refusal) = sound {
            // With the environment that it has, it goes on running.
            let version = self.current().cloned();
            return version.map(|version| self.hold(version, "env", refusal, at)).unwrap_or_default();
        }
        self.spec = Some(spec);
        let mut actions = vec![];
        if matches!(self.work, Work::Held(_)) {
            self.work = Work::Idle;
            self.error = None;
            actions.extend(self.current().cloned().map(Action::Inspect));
        }
        if self.supervisor.pid().is_some() && !runs_so {
            actions.extend(self.feed(supervise::Event::Again, at));
        }
        actions
    }

    /// A new desired state may have at once what an older one could not.
    fn ordered(&mut self, version: Option<Version>) -> Vec<Action> {
        let mut actions = vec![];
        if self.ledger.allow_all() {
            actions.push(Action::Record { wait: false });
        }
        match &self.work {
            Work::Held(_) => self.work = Work::Idle,
            Work::Staging { version: staged, .. } if version.as_ref() != Some(staged) => {
                actions.extend(self.cancel_staging());
            }
            _ => {}
        }
        actions
    }

    fn cancel_staging(&mut self) -> Vec<Action> {
        if !matches!(self.work, Work::Staging { .. }) {
            return vec![];
        }
        self.work = Work::Idle;
        vec![Action::CancelStaging]
    }

    /// Leaves a release until it is tried again, and notes why, once.
    fn hold(&mut self, version: Version, kind: &'static str, refusal: Refusal, at: At) -> Vec<Action> {
        let mut actions = vec![];
        if self.error.as_ref() != Some(&refusal.why) {
            let note = Note::once(kind, refusal.outcome(), Some(version.clone()), refusal.why.clone());
            actions.push(Action::Note(note));
        }
        let failures = self.failures_of(&version).saturating_add(1);
        let backoff = if refusal.costly { COSTLY_RETRY } else { RETRY };
        let delay = backoff.delay(failures, at.jitter).max(refusal.retry_after.unwrap_or_default());
        if refusal.costly {
            // A manager that starts anew must not download it at once.
            self.ledger.skip(Skipped {
                version: version.clone(),
                sha256: None,
                reason: refusal.why.clone(),
                failures,
                until: Some(at.unix_seconds.saturating_add(delay.as_secs())),
                unknown: Default::default(),
            });
            actions.push(Action::Record { wait: false });
        }
        self.error = Some(refusal.why);
        self.work = Work::Held(Held { version, failures, until: at.now + delay });
        actions
    }

    /// Times in a row that a release could not be had or activated.
    fn failures_of(&self, of: &Version) -> u32 {
        match &self.work {
            Work::Held(Held { version, failures, .. }) | Work::Staging { version, failures } if version == of => {
                *failures
            }
            Work::Admitting { order, failures, .. } if order.package.version == *of => *failures,
            Work::Recording(activation) if activation.ready.release.version == *of => activation.failures,
            _ => self.ledger.skipped(of, None).map_or(0, |skipped| skipped.failures),
        }
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

    /// A release that has started is accepted.
    fn commit_started(&mut self, actions: &mut Vec<Action>) {
        let on_probation = self.ledger.probation().map(|release| &release.version);
        if on_probation.is_some() && on_probation == self.running.as_ref() {
            self.commit(actions);
        }
    }

    fn commit(&mut self, actions: &mut Vec<Action>) {
        if self.ledger.commit() {
            actions.push(Action::Record { wait: false });
            actions.extend(self.ledger.active().cloned().map(Action::RaiseEpoch));
        }
    }

    /// Passes an event on to its supervisor.
    fn feed(&mut self, event: supervise::Event, at: At) -> Vec<Action> {
        let was_up = self.supervisor.is_up();
        let action = self.supervisor.step(event, at.now, at.jitter);
        let mut actions = vec![];
        if was_up && !self.supervisor.is_up() {
            actions.push(Action::CancelCheck);
        }
        match action {
            Some(supervise::Action::Start) => match (&self.program, self.current().cloned()) {
                // What was wrong with the release may have been corrected.
                (None, Some(version)) => {
                    self.starts_when_inspected = true;
                    actions.push(Action::Inspect(version));
                }
                _ => actions.extend(self.start(at)),
            },
            Some(supervise::Action::Stop) => actions.push(Action::Stop),
            Some(supervise::Action::Check) => actions.push(Action::Check),
            None => {}
        }
        actions
    }

    fn start(&mut self, at: At) -> Vec<Action> {
        if self.current().is_none() || self.program.is_none() {
            let why = self.error.clone().unwrap_or_else(|| "no release of it is active".to_owned());
            return self.feed(supervise::Event::StartFailed { why }, at);
        }
        let mut actions = vec![];
        let refused = self.refuses_env();
        if let Some(text) = refused.as_ref().filter(|_| self.refused_env != refused) {
            actions.push(Action::Note(Note::once("env", "refused", None, text.clone())));
        }
        self.refused_env = refused;
        actions.push(Action::Start);
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

    fn note_transition(&self, before: AgentState, restarts: bool, now: Instant, actions: &mut Vec<Action>) {
        let after = self.supervisor.state();
        let why = self.supervisor.last_error().unwrap_or_default();
        match (before, after) {
            (AgentState::Unhealthy, AgentState::Unhealthy) => {}
            (_, AgentState::Unhealthy) => actions.push(self.repeating("health", "failed", why)),
            (AgentState::Unhealthy, AgentState::Running) => {
                actions.push(self.repeating("health", "ok", "it is well again"))
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

    fn repeating(&self, kind: &'static str, outcome: &'static str, message: &str) -> Action {
        let (version, message) = (self.current().cloned(), message.to_owned());
        Action::Note(Note { kind, outcome, version, message, repeats: true })
    }
}

impl Note {
    fn once(kind: &'static str, outcome: &'static str, version: Option<Version>, message: String) -> Note {
        Note { kind, outcome, version, message, repeats: false }
    }
}

#[cfg(test)]
mod tests;
