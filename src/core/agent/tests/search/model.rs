//! The model of a sub-agent's home: the disk with the writes under way, its process, the manager, and the events.
//!
//! Results arrive in any order. Release 1 runs at first, 2 is the one under search, 3 and 1 are good.
//!
//! Time passes from one deadline to the next, with any work under way. Only a release that exits during its probation is stepped second by
//! second.

use super::super::super::Activity;
use super::super::super::probation::MAX_FAILURES;
use super::super::*;
use super::events::{Cut, Fetched, SearchEvent};
use super::key;
use super::rules::is_skipped;
use crate::core::health::HealthSpec;
use crate::core::manifest::Restart;
use crate::core::supervise::CheckResult;
use crate::core::units::Span;

/// The release under search.
pub const NEW: u8 = 2;

/// The kind of release 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Good,
    /// Its health checks fail for its first 40 seconds.
    Slow,
    /// It completes its work and exits, as its restart policy expects.
    Job,
    ExitsAtOnce,
    /// It runs, and its health checks fail.
    Unhealthy,
    /// Its health checks give no result.
    NeverAnswers,
    /// It runs without a fault and exits before its probation is over.
    ExitsOnProbation,
    CannotBeLaunched,
    CannotBeFetched,
}

impl Kind {
    pub const ALL: [Kind; 9] = [
        Kind::Good,
        Kind::Slow,
        Kind::Job,
        Kind::ExitsAtOnce,
        Kind::Unhealthy,
        Kind::NeverAnswers,
        Kind::ExitsOnProbation,
        Kind::CannotBeLaunched,
        Kind::CannotBeFetched,
    ];

    pub fn passes(self) -> bool {
        matches!(self, Kind::Good | Kind::Slow | Kind::Job)
    }

    pub fn can_be_fetched(self, number: u8) -> bool {
        number != NEW || self != Kind::CannotBeFetched
    }

    pub fn can_be_launched(self, number: u8) -> bool {
        number != NEW || self != Kind::CannotBeLaunched
    }
}

/// The possible events, apart from exits of the manager and power cuts, which are always possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    pub kind: Kind,
    /// How many operations fail (an absent gateway is a failed fetch) or good releases exit.
    pub faults: u8,
    /// The operator rolls back, retries, restarts, and stops and starts the home.
    pub operator: bool,
    /// How many times another release is ordered, or the same one with a higher `retry`.
    pub orders: u8,
}

/// An order: a version and `retry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ordered(pub u8, pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub version: u8,
    pub since: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recorded {
    pub version: u8,
    /// The exit that a manager has handled, with its result.
    pub ended: Option<Option<bool>>,
}

/// A set of versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set(pub u8);

impl Set {
    pub fn has(self, version: u8) -> bool {
        self.0 & (1 << version) != 0
    }

    pub fn with(self, version: u8) -> Set {
        Set(self.0 | 1 << version)
    }

    pub fn without(self, version: u8) -> Set {
        Set(self.0 & !(1 << version))
    }

    pub fn all(self) -> impl Iterator<Item = u8> {
        (1..8).filter(move |version| self.has(*version))
    }

    pub fn versions(self) -> BTreeSet<Version> {
        self.all().map(version_of).collect()
    }
}

/// A ledger entry on its way to the disk: its revision and content.
pub type Writing = Option<(u64, LedgerEntry)>;

#[derive(Debug, Clone)]
pub struct State {
    pub now: Instant,
    /// `None`: no manager runs.
    pub agent: Option<Agent>,
    pub order: Ordered,
    /// The ledger on disk.
    pub disk: LedgerEntry,
    pub writing: Writing,
    pub queued: Writing,
    pub revision: u64,
    pub is_changed: bool,
    pub recorded_with: Option<u64>,
    /// The last write failed.
    pub is_unsaved: bool,
    pub replan: bool,
    /// A removal waits for a write.
    pub discard_waits: bool,
    /// The entry was changed by a start or a failure and is not on disk yet.
    pub is_entry_unwritten: bool,
    /// Releases on disk: complete, and partly unpacked or removed.
    pub whole: Set,
    pub partial: Set,
    pub process: Option<Process>,
    pub record: Option<Recorded>,
    /// A stop has left the process running.
    pub survived_stop: bool,
    pub launching: Option<u8>,
    pub is_stopping: bool,
    pub is_checking: bool,
    pub is_admitting: bool,
    pub is_switching: bool,
    pub inspecting: Vec<u8>,
    pub staging: Vec<(u64, u8)>,
    pub discarding: Set,
    pub home_stops: bool,
    /// The number of faults left.
    pub faults: u8,
    pub orders: u8,
    /// Failures of release 2 since its last admission.
    pub failed: u64,
    /// Something happened that may roll back a good release.
    pub is_suspect: bool,
    /// The ledger on disk skips release 2, and no order or operator has changed this since.
    pub is_skipped_on_disk: bool,
    /// The operator rolled back and has not changed this since, and no new manager has started since.
    pub is_overruled: bool,
}

pub type Violation = &'static str;
pub type Done = Result<(), Violation>;

pub fn version_of(number: u8) -> Version {
    version(["0", "1", "2", "3"][usize::from(number)])
}

pub fn number_of(version: &Version) -> u8 {
    version.as_str().as_bytes()[0] - b'0'
}

pub fn release_of(number: u8) -> LedgerRelease {
    release(version_of(number).as_str())
}

pub fn ordered(Ordered(number, retry): Ordered) -> Order {
    Order { retry, ..order(version_of(number).as_str()) }
}

fn moment(now: Instant, start: Instant) -> Moment {
    let unix_seconds = 1_800_000_000 + now.saturating_duration_since(start).as_secs();
    Moment { now, unix_seconds, jitter: 0.0 }
}

pub struct Model {
    pub scenario: Scenario,
    start: Instant,
    programs: [Program; 4],
}

impl Model {
    pub fn new(scenario: Scenario) -> Model {
        let program = |edit: &dyn Fn(&mut Manifest)| {
            let Program::Native(mut manifest) = manifest(&[]) else { panic!() };
            manifest.run.probation = Some(Span(S(3)));
            edit(&mut manifest);
            Program::Native(manifest)
        };
        let checks = |text: &str| -> Option<HealthSpec> { Some(serde_json::from_str(text).unwrap()) };
        let plain = || program(&|_| {});
        let new = match scenario.kind {
            Kind::Slow => program(&|manifest| {
                manifest.health = checks(r#"{"tcp": "127.0.0.1:1", "interval": 20, "failures": 2, "startPeriod": 60}"#);
            }),
            Kind::Unhealthy | Kind::NeverAnswers => program(&|manifest| {
                manifest.health = checks(r#"{"tcp": "127.0.0.1:1", "interval": 40, "failures": 2, "startPeriod": 0}"#);
            }),
            Kind::Job => program(&|manifest| manifest.run.restart = Restart::OnFailure),
            _ => plain(),
        };
        Model { scenario, start: Instant::now(), programs: [plain(), plain(), new, plain()] }
    }

    pub fn at(&self, now: Instant) -> Moment {
        moment(now, self.start)
    }

    pub fn unix_seconds(&self, now: Instant) -> u64 {
        self.at(now).unix_seconds
    }

    pub fn program(&self, number: u8) -> Program {
        self.programs[usize::from(number)].clone()
    }

    /// Release 1 runs, and 2 is ordered.
    pub fn start(&self) -> Result<State, Violation> {
        let down = State {
            now: self.start,
            agent: None,
            order: Ordered(NEW, 0),
            disk: LedgerEntry::from_disk(Some(release_of(1)), None),
            writing: None,
            queued: None,
            revision: 0,
            is_changed: false,
            recorded_with: None,
            is_unsaved: false,
            replan: false,
            discard_waits: false,
            is_entry_unwritten: false,
            whole: Set(0).with(1),
            partial: Set(0),
            process: Some(Process { version: 1, since: self.start }),
            record: Some(Recorded { version: 1, ended: None }),
            survived_stop: false,
            launching: None,
            is_stopping: false,
            is_checking: false,
            is_admitting: false,
            is_switching: false,
            inspecting: vec![],
            staging: vec![],
            discarding: Set(0),
            home_stops: false,
            faults: self.scenario.faults,
            orders: self.scenario.orders,
            failed: 0,
            is_suspect: false,
            is_skipped_on_disk: false,
            is_overruled: false,
        };
        self.apply(&down, SearchEvent::Starts)
    }

    pub fn apply(&self, state: &State, event: SearchEvent) -> Result<State, Violation> {
        let mut after = state.clone();
        if self.is_fault(state, event) {
            after.faults = state.faults.saturating_sub(1);
        }
        match event {
            SearchEvent::Dies(cut) => after.die(cut, self.scenario.kind),
            SearchEvent::OrdersAndDies(order) => {
                self.follow_order(&mut after, order);
                after.die(Cut::NOTHING, self.scenario.kind);
            }
            SearchEvent::Exits if after.agent.is_none() => {
                self.lose_process(&mut after);
            }
            SearchEvent::PowerCut => (after.process, after.record, after.survived_stop) = (None, None, false),
            SearchEvent::Later => after.now += S(200),
            SearchEvent::Starts => {
                self.take_charge(&mut after)?;
                self.work(&mut after)?;
            }
            _ => {
                self.apply_event(&mut after, event)?;
                self.work(&mut after)?;
                if event == SearchEvent::Tick && after.now == state.now && key::of(self, state) == key::of(self, &after)
                {
                    return Err("a passed deadline is waited for");
                }
            }
        }
        self.violation_of(&after).map_or(Ok(after), Err)
    }

    fn apply_event(&self, state: &mut State, event: SearchEvent) -> Done {
        match event {
            SearchEvent::Staged { index, fetched } => {
                let (id, number) = state.staging.remove(index);
                let version = version_of(number);
                let failed = ReleaseError::failed("it cannot be fetched");
                let result = match fetched {
                    Fetched::Ready => {
                        state.whole = state.whole.with(number);
                        state.partial = state.partial.without(number);
                        Ok(Ready { release: release_of(number), program: self.program(number) })
                    }
                    Fetched::Failed => Err(failed),
                    Fetched::Refused => Err(ReleaseError { refused: true, costly: true, ..failed }),
                };
                self.handle(state, AgentEvent::Staged { id, version, result }, true)
            }
            SearchEvent::Admitted { ok } => {
                state.is_admitting = false;
                let Some(Activity::Admitting { order, .. }) = state.agent.as_ref().map(|agent| &agent.activity) else {
                    return Err("no admission is under path");
                };
                let number = number_of(&order.package.version);
                let result = match ok {
                    true => Ok((release_of(number), Some(self.program(number)))),
                    false => Err(ReleaseError::failed("the home cannot be read")),
                };
                self.handle(state, AgentEvent::Admitted(result), true)
            }
            SearchEvent::Written { ok, kept } => self.written(state, ok, kept),
            SearchEvent::Housekeeping => {
                state.is_changed = true;
                Ok(())
            }
            SearchEvent::Switched { ok } => {
                state.is_switching = false;
                state.is_entry_unwritten |= !ok;
                let result = if ok { Ok(()) } else { Err("read-only file system".to_owned()) };
                self.handle(state, AgentEvent::Switched(result), true)
            }
            SearchEvent::Discarded(number) => {
                state.discarding = state.discarding.without(number);
                state.remove(number);
                self.handle(state, AgentEvent::Discarded(version_of(number)), true)
            }
            SearchEvent::Inspected { index, ok } => {
                let number = state.inspecting.remove(index);
                state.is_suspect |= number != 1 && !ok;
                let result = if ok { Ok(self.program(number)) } else { Err("no agent.toml".to_owned()) };
                self.handle(state, AgentEvent::Inspected { version: version_of(number), result }, true)
            }
            SearchEvent::Launched => {
                let Some(number) = state.launching.take() else { return Err("no launch is under path") };
                // Processes that a failed stop left are stopped first.
                state.survived_stop = false;
                state.process = Some(Process { version: number, since: state.now });
                state.record = Some(Recorded { version: number, ended: None });
                self.handle(
                    state,
                    AgentEvent::Launched { pid: 9, version: version_of(number), spec_matches: true },
                    false,
                )
            }
            SearchEvent::LaunchFailed { refused } => {
                let number = state.launching.take();
                if state.process.is_none() {
                    state.record = None;
                }
                state.failed += u64::from(number == Some(NEW) && !refused);
                state.is_suspect |= number != Some(1) && !refused;
                self.handle(
                    state,
                    AgentEvent::LaunchFailed(ReleaseError { refused, ..ReleaseError::failed("no such file") }),
                    false,
                )
            }
            SearchEvent::Stopped { ok } => {
                state.is_stopping = false;
                if ok {
                    (state.process, state.record, state.survived_stop) = (None, None, false);
                } else {
                    state.survived_stop = state.process.is_some();
                }
                self.handle(state, AgentEvent::Stopped(if ok { Ok(()) } else { Err("it hangs".to_owned()) }), true)
            }
            // The exit of a process that a stop could not end is not reported any more.
            SearchEvent::Exits if state.survived_stop => {
                self.lose_process(state);
                Ok(())
            }
            SearchEvent::Exits => {
                let is_new = state.process.is_some_and(|process| process.version == NEW);
                let success = self.lose_process(state);
                state.failed += u64::from(is_new);
                state.is_suspect |= is_new && !success;
                let event = AgentEvent::Exited { success: Some(success), how: "it exited".to_owned() };
                let is_busy = state.agent.as_ref().is_some_and(Agent::is_busy);
                self.handle(state, event, false)?;
                let Some(agent) = &state.agent else { return Ok(()) };
                let ledger = agent.ledger();
                if !is_busy && ledger.probation_failures() >= MAX_FAILURES && ledger.before_probation().is_some() {
                    return Err("a release that has failed too often is tried again");
                }
                if let Some(record) = state.record.as_mut().filter(|_| !agent.supervisor().is_stopping()) {
                    record.ended = Some(Some(success));
                }
                Ok(())
            }
            SearchEvent::Checked => {
                state.is_checking = false;
                let age = state.process.map_or(S(0), |process| state.now - process.since);
                let answer = match self.scenario.kind {
                    Kind::NeverAnswers => CheckResult::Unknown("no answer".to_owned()),
                    Kind::Slow if age >= S(40) => CheckResult::Healthy,
                    _ => CheckResult::Unhealthy("refused".to_owned()),
                };
                self.handle(state, AgentEvent::Checked(answer), false)?;
                // Its health is why it is stopped.
                state.failed += u64::from(state.is_stopping);
                Ok(())
            }
            SearchEvent::Tick | SearchEvent::Second => {
                let Some(agent) = &state.agent else { return Ok(()) };
                let deadline = agent.deadline(state.now).filter(|_| event == SearchEvent::Tick);
                state.now = deadline.unwrap_or(state.now + S(1)).max(state.now);
                // It is slow to start, or to answer.
                state.is_suspect |= state.launching.is_some() || !state.inspecting.is_empty() || state.is_checking;
                let (now, is_due) = (state.now, agent.is_due(state.now));
                if is_due {
                    self.send(state, AgentEvent::Tick)?;
                }
                state.replan |= state.agent.as_ref().is_some_and(|agent| agent.hold_is_over(now));
                Ok(())
            }
            SearchEvent::HomeStops => {
                state.home_stops = true;
                self.send(state, AgentEvent::HomeStopping)
            }
            SearchEvent::RollBack => {
                (state.is_skipped_on_disk, state.is_overruled) = (false, false);
                state.is_overruled = true;
                self.send(state, AgentEvent::RollBack { overruled: Some(ordered(state.order)) })
            }
            SearchEvent::Retry => {
                (state.is_skipped_on_disk, state.is_overruled) = (false, false);
                state.replan = true;
                self.send(state, AgentEvent::Retry)
            }
            SearchEvent::Restart => self.send(state, AgentEvent::Restart),
            SearchEvent::Orders(order) => {
                self.follow_order(state, order);
                state.replan = true;
                self.send(state, AgentEvent::OrderChanged(Some(ordered(order))))
            }
            SearchEvent::OrdersAndDies(_)
            | SearchEvent::Dies(_)
            | SearchEvent::Later
            | SearchEvent::PowerCut
            | SearchEvent::Starts => Ok(()),
        }
    }

    fn follow_order(&self, state: &mut State, order: Ordered) {
        state.order = order;
        state.orders -= 1;
        (state.is_skipped_on_disk, state.is_overruled) = (false, false);
    }

    /// Its process exits. Returns whether this is the expected exit.
    fn lose_process(&self, state: &mut State) -> bool {
        let process = state.process.take();
        state.survived_stop = false;
        let is_new = process.is_some_and(|process| process.version == NEW);
        is_new && self.scenario.kind == Kind::Job
    }

    /// A write has completed or failed.
    fn written(&self, state: &mut State, ok: bool, kept: bool) -> Done {
        let Some((revision, entry)) = state.writing.take() else { return Err("no write is under path") };
        state.writing = state.queued.take();
        state.is_unsaved = !ok;
        state.replan |= std::mem::take(&mut state.discard_waits);
        state.is_entry_unwritten = !ok || state.is_entry_unwritten && state.writing.is_some();
        if kept {
            state.disk = entry;
            let said = state.agent.as_ref().is_some_and(|agent| is_skipped(agent.ledger(), NEW));
            state.is_skipped_on_disk |= said && is_skipped(&state.disk, NEW);
        }
        if state.recorded_with.take_if(|waits| *waits <= revision).is_some() {
            let result = if ok { Ok(()) } else { Err("no space left".to_owned()) };
            self.send(state, AgentEvent::Recorded(result))?;
        }
        Ok(())
    }
}

impl State {
    pub fn active(&self) -> Option<u8> {
        self.agent.as_ref()?.ledger().active().map(|release| number_of(&release.version))
    }

    pub fn can_be_admitted(&self) -> bool {
        let work = self.agent.as_ref().map(|agent| &agent.activity);
        matches!(work, Some(Activity::Admitting { order, .. }) if self.whole.has(number_of(&order.package.version)))
    }

    fn remove(&mut self, number: u8) {
        (self.whole, self.partial) = (self.whole.without(number), self.partial.without(number));
    }

    /// The manager dies in the middle of its work.
    fn die(&mut self, cut: Cut, kind: Kind) {
        if let Some((_, entry)) = self.writing.take().filter(|_| cut.write) {
            self.disk = entry;
        }
        if let Some(number) = self.launching.take().filter(|_| cut.launched) {
            self.process = Some(Process { version: number, since: self.now });
            self.record = Some(Recorded { version: number, ended: None });
        }
        if cut.stopped > 0 {
            self.process = None;
        }
        if cut.stopped > 1 {
            self.record = None;
        }
        for (_, number) in std::mem::take(&mut self.staging) {
            if cut.staged && kind.can_be_fetched(number) {
                self.whole = self.whole.with(number);
                self.partial = self.partial.without(number);
            }
        }
        for number in std::mem::replace(&mut self.discarding, Set(0)).all() {
            if cut.discarded > 0 {
                self.remove(number);
            }
            if cut.discarded == 1 {
                self.partial = self.partial.with(number);
            }
        }
        (self.agent, self.is_overruled) = (None, false);
        (self.queued, self.recorded_with) = (None, None);
        (self.is_changed, self.is_unsaved, self.survived_stop) = (false, false, false);
        (self.is_stopping, self.is_checking, self.is_admitting, self.is_switching) = (false, false, false, false);
        self.inspecting.clear();
    }
}
