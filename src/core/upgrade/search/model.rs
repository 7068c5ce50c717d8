//! The model of a home: the disk with unsynced writes, the two roles, and the events.
//!
//! Every action that is possible in a state can happen at any time, with three fairness assumptions: the new program's own actions happen
//! before time passes; a heartbeat that can be sent is sent before the gateway becomes unreachable; and only one role at a time observes and
//! acts. Time passes in ticks of a second, with limits of one or two.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use super::super::*;
use crate::core::unknown::UnknownFields;

/// The new program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Good,
    /// Good, with the same bytes as the old one.
    SameBytes,
    ExitsAtOnce,
    NeverAnswers,
    DoesNotAdopt,
    NoHeartbeat,
    DiesSoon,
    EatsMemory,
    EndsWatchdog,
    FailsProof,
    /// It passes its proof, and its watchdog exits at once after the commit.
    BadWatchdog,
}

impl Kind {
    pub const ALL: [Kind; 11] = [
        Kind::Good,
        Kind::SameBytes,
        Kind::ExitsAtOnce,
        Kind::NeverAnswers,
        Kind::DoesNotAdopt,
        Kind::NoHeartbeat,
        Kind::DiesSoon,
        Kind::EatsMemory,
        Kind::EndsWatchdog,
        Kind::FailsProof,
        Kind::BadWatchdog,
    ];

    /// No evaluation can find a fault with it.
    pub fn passes(self) -> bool {
        matches!(self, Kind::Good | Kind::SameBytes | Kind::BadWatchdog)
    }
}

/// The possible events, apart from crashes and power cuts, which are always possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    pub kind: Kind,
    /// The gateway becomes unreachable and reachable.
    pub gateway_changes: bool,
    /// The operator stops and starts the home, and decides about the trial.
    pub operator: bool,
    /// Another program changes a file of the upgrade.
    pub interferes: bool,
    /// Before a step, all unsynced writes are synced.
    pub syncs_first: bool,
}

/// A change of the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Verb {
    Begin,
    Force(OperatorDecision),
    Apply(RecordChange),
    Spend,
}

/// A value on disk: as processes read it, and as it is after a power cut in the worst case.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cell<T> {
    pub now: T,
    pub synced: T,
}

impl<T: fmt::Debug + PartialEq> fmt::Debug for Cell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.now == self.synced {
            true => write!(f, "{:?}", self.now),
            false => write!(f, "{:?}, not synced: {:?}", self.now, self.synced),
        }
    }
}

impl<T: Copy + PartialEq> Cell<T> {
    fn new(value: T) -> Cell<T> {
        Cell { now: value, synced: value }
    }

    fn sync(&mut self) {
        self.synced = self.now;
    }

    fn cut(self, keep: bool) -> Cell<T> {
        Cell::new(if keep { self.now } else { self.synced })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum File {
    Absent,
    Broken,
    From,
    To,
    /// From a package manager.
    Foreign,
}

impl File {
    pub fn image(self) -> Option<WhichRelease> {
        match self {
            File::From => Some(WhichRelease::From),
            File::To => Some(WhichRelease::To),
            File::Foreign => Some(WhichRelease::Other),
            File::Absent | File::Broken => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spm {
    pub image: WhichRelease,
    staged: bool,
    /// The record of a trial that it has begun and not written yet.
    pub begun: Option<u16>,
    answered: Option<u8>,
    adopted: bool,
    heartbeat: bool,
    over_memory: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ProbeResult {
    Not,
    Works(u8),
    Fails(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spa {
    pub image: WhichRelease,
    pub died: bool,
    pub found_running_manager: bool,
    probe: ProbeResult,
    proof: Option<bool>,
}

/// A change of the home by another program; at most one in each history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interference {
    No,
    RecordLost,
    BackupLost,
    /// The role links are pointed at `bin/aops`.
    LinksMoved,
    /// The old executable is put at `bin/aops` again.
    PutBack,
    Replaced,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    pub bin: Cell<File>,
    pub prev: Cell<File>,
    /// Whether these links point at the backup: the watchdog's, and the others.
    pub spa_link: Cell<bool>,
    pub other_links: Cell<bool>,
    pub record: Cell<u16>,
    pub installed: Cell<WhichRelease>,
    pub spm: Option<Spm>,
    pub spa: Option<Spa>,
    pub stopped: bool,
    pub gateway: bool,
    pub interference: Interference,
    /// The release was rolled back and is skipped.
    pub is_skipped: bool,
}

pub struct Model<'a> {
    pub kind: Kind,
    scenario: Scenario,
    pub guards: &'a Guards,
    limits: TrialLimits,
    records: Vec<UpgradeRecord>,
    changed: HashMap<(u16, Verb), Option<u16>>,
}

/// The next state, or the rule that the step breaks.
pub type Outcome = Result<State, &'static str>;

impl Model<'_> {
    pub fn new(scenario: Scenario, guards: &Guards) -> Model<'_> {
        let second = Duration::from_secs(1);
        let limits = TrialLimits {
            minimum_life: 2 * second,
            first_answer: 2 * second,
            heartbeat_grace: second,
            probe_pause: second,
            deaths: 2,
            failed_proofs: 2,
            lost_watchdogs: 2,
        };
        Model { kind: scenario.kind, scenario, guards, limits, records: vec![], changed: HashMap::new() }
    }

    pub fn start(&mut self) -> State {
        let record = self.id(UpgradeRecord::default());
        State {
            bin: Cell::new(File::From),
            prev: Cell::new(File::Absent),
            spa_link: Cell::new(false),
            other_links: Cell::new(false),
            record: Cell::new(record),
            installed: Cell::new(WhichRelease::From),
            spm: Some(settled(WhichRelease::From)),
            spa: Some(fresh(WhichRelease::From)),
            stopped: false,
            gateway: true,
            interference: Interference::No,
            is_skipped: false,
        }
    }

    /// The state without the parts that no decision depends on.
    pub fn normalize(&self, mut state: State) -> State {
        let in_place = state.bin.now == File::To || self.kind == Kind::SameBytes;
        let on_trial = in_place && matches!(self.phase(&state), Some(UpgradePhase::Switching | UpgradePhase::Trial));
        match &mut state.spm {
            Some(spm) if spm.image == WhichRelease::To && !on_trial => *spm = settled(WhichRelease::To),
            _ => {}
        }
        match &mut state.spa {
            Some(spa) if !on_trial => *spa = fresh(spa.image),
            Some(spa) if state.spm.is_some_and(|spm| spm.heartbeat) => spa.probe = ProbeResult::Not,
            _ => {}
        }
        state
    }

    pub fn record(&self, state: &State) -> &UpgradeRecord {
        &self.records[usize::from(state.record.now)]
    }

    pub fn phase(&self, state: &State) -> Option<UpgradePhase> {
        self.record(state).trial().map(|trial| trial.phase)
    }

    pub fn from(&self) -> Image {
        image("1", '1', '1')
    }

    pub fn to(&self) -> Image {
        image("2", '2', if self.kind == Kind::SameBytes { '1' } else { '2' })
    }

    pub fn limits(&self) -> &TrialLimits {
        &self.limits
    }

    fn id(&mut self, record: UpgradeRecord) -> u16 {
        let index = self.records.iter().position(|known| *known == record).unwrap_or(self.records.len());
        if index == self.records.len() {
            self.records.push(record);
        }
        u16::try_from(index).unwrap()
    }

    /// The record after a change; `None`: the change does not apply.
    fn changed(&mut self, id: u16, verb: Verb) -> Option<u16> {
        if let Some(known) = self.changed.get(&(id, verb)) {
            return *known;
        }
        let mut record = self.records[usize::from(id)].clone();
        let applies = match verb {
            Verb::Begin => record.begin(self.from(), self.to()).is_ok(),
            Verb::Force(force) => record.force(force),
            Verb::Apply(change) => record.apply(change),
            Verb::Spend => record.spend(1),
        };
        let after = applies.then(|| self.id(record));
        self.changed.insert((id, verb), after);
        after
    }

    fn evidence(&self, state: &State, decider: Decider) -> (u16, Evidence) {
        let begun = state.spm.and_then(|spm| spm.begun).filter(|_| decider == Decider::Manager);
        let record = begun.unwrap_or(state.record.now);
        let trial = self.records[usize::from(record)].trial();
        let executable = match state.bin.now {
            _ if trial.is_none() => InstalledExecutable::Neither,
            File::From if self.kind == Kind::SameBytes => InstalledExecutable::Both,
            File::From => InstalledExecutable::From,
            File::To => InstalledExecutable::To,
            File::Foreign | File::Broken => InstalledExecutable::Neither,
            File::Absent => InstalledExecutable::Missing,
        };
        let seconds = |count: u8| Duration::from_secs(u64::from(count));
        let evidence = Evidence {
            decider,
            recorded: begun.is_none(),
            executable,
            backup_intact: state.prev.now == File::From,
            links: match (state.spa_link.now, state.other_links.now) {
                (true, true) => RoleLinks::Backup,
                (false, false) => RoleLinks::Executable,
                _ => RoleLinks::Mixed,
            },
            installed: state.installed.now,
            staged: decider == Decider::Manager && state.spm.is_some_and(|spm| spm.staged),
            manager: state.spm.map(|spm| ManagerEvidence {
                image: spm.image,
                answered: spm.answered.map(seconds),
                adopted: spm.adopted,
                heartbeat: spm.heartbeat,
                over_memory: spm.over_memory,
            }),
            watchdog: state.spa.map(|spa| spa.image),
            died: state.spa.is_some_and(|spa| spa.died),
            found_running_manager: state.spa.is_some_and(|spa| spa.found_running_manager),
            probe: match state.spa.map(|spa| spa.probe) {
                None | Some(ProbeResult::Not) => Probe::NotAsked,
                Some(ProbeResult::Works(ago)) => Probe::Works(seconds(ago)),
                Some(ProbeResult::Fails(ago)) => Probe::Fails(seconds(ago)),
            },
            proof: match state.spa.and_then(|spa| spa.proof) {
                None => Proof::NotBegun,
                Some(true) => Proof::Passed,
                Some(false) => Proof::Failed,
            },
            stopped: state.stopped,
        };
        (record, evidence)
    }

    pub fn step(&self, state: &State, decider: Decider) -> UpgradeStep {
        let (record, evidence) = self.evidence(state, decider);
        decide(&self.records[usize::from(record)], &evidence, &self.limits, self.guards)
    }

    /// Executes the next step of a role: completely, and interrupted by the death of its process before its writes are synced.
    pub fn act(&mut self, state: &State, decider: Decider) -> Vec<Outcome> {
        let step = self.step(state, decider);
        let (id, _) = self.evidence(state, decider);
        let mut cut = vec![];
        // Unsynced writes of an earlier step are synced first.
        let mut after = *state;
        if self.scenario.syncs_first {
            sync(&mut after);
        }
        match step {
            UpgradeStep::Nothing | UpgradeStep::Wait(_) => return vec![],
            UpgradeStep::Save => write(&mut after, id, decider),
            UpgradeStep::Record(change) => {
                if let Some(violation) = self.violation(state, decider, change) {
                    return vec![Err(violation)];
                }
                let Some(id) = self.changed(id, Verb::Apply(change)) else {
                    return vec![Err("a change that does not apply is requested")];
                };
                write(&mut after, id, decider);
                note(&mut after, change);
            }
            UpgradeStep::BackUp => after.prev.now = after.bin.now,
            UpgradeStep::LinkToBackup | UpgradeStep::LinkToExecutable => {
                let backup = step == UpgradeStep::LinkToBackup;
                after.spa_link.now = backup;
                cut.push(dead(after, decider));
                after.other_links.now = backup;
            }
            UpgradeStep::Swap if !state.spm.is_some_and(|spm| spm.staged) => {
                return vec![Err("the switch is made without a staged executable")];
            }
            UpgradeStep::Swap => after.bin.now = File::To,
            UpgradeStep::Restore => after.bin.now = after.prev.now,
            UpgradeStep::RecordRelease(which) => after.installed.now = which,
            UpgradeStep::RestartManager | UpgradeStep::KillManager => {
                after.spm = None;
                return vec![Ok(after)];
            }
            UpgradeStep::StopWatchdog => {
                after.spa = None;
                return vec![Ok(after)];
            }
            UpgradeStep::Probe => {
                let answer = if state.gateway { ProbeResult::Works(0) } else { ProbeResult::Fails(0) };
                after.spa.iter_mut().for_each(|spa| spa.probe = answer);
                return vec![Ok(after)];
            }
            UpgradeStep::Prove => {
                let passes = self.kind != Kind::FailsProof;
                after.spa.iter_mut().for_each(|spa| spa.proof = Some(passes));
                return vec![Ok(after)];
            }
        }
        cut.push(dead(after, decider));
        sync(&mut after);
        after.is_skipped |= self.record(&after).trial().is_some_and(|trial| trial.condemned);
        std::iter::once(after).chain(cut).map(Ok).collect()
    }

    /// The rule that a change of the record breaks.
    fn violation(&self, state: &State, decider: Decider, change: RecordChange) -> Option<&'static str> {
        let counts = |reason| !matches!(reason, TrialEndReason::Aborted | TrialEndReason::Installer);
        let is_new = decider == Decider::Watchdog && state.spa.is_some_and(|spa| spa.image != WhichRelease::From);
        match change {
            RecordChange::Commit(None) | RecordChange::RollBack { .. } if is_new => {
                Some("the new program evaluates itself")
            }
            RecordChange::Commit(None) if !self.kind.passes() => Some("a bad release is committed"),
            RecordChange::Commit(Some(TrialEndReason::NoBackup)) if state.interference != Interference::BackupLost => {
                Some("a release is committed without a lost backup")
            }
            RecordChange::CountDeath | RecordChange::CountLostWatchdog | RecordChange::CountFailedProof
                if state.stopped =>
            {
                Some("a stop counts against the release")
            }
            RecordChange::RollBack { reason, .. } if state.stopped && counts(reason) => {
                Some("a stopped release is rolled back")
            }
            RecordChange::RollBack { reason, .. } if self.kind.passes() && counts(reason) => match reason {
                TrialEndReason::Died | TrialEndReason::WatchdogExited => None,
                _ => Some("a good release is rolled back"),
            },
            _ => None,
        }
    }

    /// The next action of the new manager, if it has one.
    pub fn progress(&self, state: &State) -> Option<State> {
        let mut after = *state;
        let spm = after.spm.as_mut().filter(|spm| spm.image == WhichRelease::To)?;
        let answers = !matches!(self.kind, Kind::NeverAnswers);
        let adopts = !matches!(self.kind, Kind::NeverAnswers | Kind::DoesNotAdopt);
        let beats = !matches!(self.kind, Kind::NeverAnswers | Kind::NoHeartbeat);
        if spm.answered.is_none() && answers || !spm.heartbeat && beats && state.gateway {
            spm.answered = spm.answered.or(Some(0));
            (spm.adopted, spm.heartbeat) = (adopts, spm.heartbeat || beats && state.gateway);
        } else if self.kind == Kind::EatsMemory && !spm.over_memory {
            spm.over_memory = true;
        } else if self.kind == Kind::DiesSoon && spm.answered == Some(1) {
            after = without_spm(after);
        } else if self.kind == Kind::EndsWatchdog && after.spa.is_some() {
            after.spa = None;
        } else {
            return None;
        }
        Some(after)
    }

    /// A second passes in which the watchdog evaluates the trial.
    pub fn tick(&mut self, state: &State) -> Option<State> {
        let spa_waits = match self.step(state, Decider::Watchdog) {
            UpgradeStep::Wait(wait) => wait,
            _ => return None,
        };
        spa_waits.left()?;
        if state.spa.is_none() || self.progress(state).is_some() || self.start_spm(state).is_some() {
            return None;
        }
        let mut after = *state;
        if spa_waits.counts() {
            let id = self.changed(state.record.now, Verb::Spend)?;
            after.record = Cell::new(id);
        }
        for life in after.spm.iter_mut().filter_map(|spm| spm.answered.as_mut()) {
            *life = (*life + 1).min(2);
        }
        if let Some(spa) = &mut after.spa {
            spa.probe = match spa.probe {
                ProbeResult::Works(_) => ProbeResult::Works(1),
                ProbeResult::Fails(_) => ProbeResult::Fails(1),
                ProbeResult::Not => ProbeResult::Not,
            };
        }
        Some(after)
    }

    pub fn start_spm(&self, state: &State) -> Option<State> {
        if state.spm.is_some() || state.stopped {
            return None;
        }
        let mut image = state.bin.now.image()?;
        if self.kind == Kind::SameBytes && image == WhichRelease::From {
            image = match self.phase(state) {
                Some(UpgradePhase::Trial | UpgradePhase::Committing) => WhichRelease::To,
                Some(UpgradePhase::Switching | UpgradePhase::RollingBack) => WhichRelease::From,
                None => state.installed.now,
            };
        }
        let mut after = *state;
        after.spm = Some(if image == WhichRelease::To { new_manager() } else { settled(image) });
        if let Some(spa) = &mut after.spa {
            spa.probe = ProbeResult::Not;
        }
        if image == WhichRelease::To && self.kind == Kind::ExitsAtOnce {
            after = without_spm(after);
        }
        (after != *state).then_some(after)
    }

    pub fn start_spa(&self, state: &State) -> Option<State> {
        if state.spa.is_some() || state.stopped {
            return None;
        }
        let file = if state.spa_link.now { state.prev.now } else { state.bin.now };
        let mut image = file.image()?;
        let phase = self.phase(state);
        if self.kind == Kind::SameBytes && image == WhichRelease::From && !state.spa_link.now {
            let is_new =
                phase == Some(UpgradePhase::Committing) || (phase.is_none() && state.installed.now == WhichRelease::To);
            image = if is_new { WhichRelease::To } else { WhichRelease::From };
        }
        if image == WhichRelease::To && self.kind == Kind::BadWatchdog {
            return None;
        }
        let found_running_manager =
            phase == Some(UpgradePhase::Trial) && state.spm.is_some_and(|spm| spm.image == WhichRelease::To);
        Some(State { spa: Some(Spa { found_running_manager, ..fresh(image) }), ..*state })
    }

    /// The possible events outside of the roles and the new program.
    pub fn possible(&mut self, state: &State) -> Vec<Outcome> {
        let mut all = vec![];
        if state.spm.is_some() {
            all.push(without_spm(*state));
        }
        if state.spa.is_some() {
            all.push(State { spa: None, ..*state });
        }
        all.extend(power_cut(state));
        if self.scenario.operator {
            all.push(State { stopped: true, ..*state });
        }
        all.extend(start(state));
        let may_go = self.scenario.gateway_changes && self.phase(state) == Some(UpgradePhase::Trial);
        if !state.gateway || may_go && self.progress(state).is_none() {
            all.push(State { gateway: !state.gateway, ..*state });
        }
        let can_receive = state.spm.is_some_and(|spm| spm.begun.is_none()) || state.spa.is_some();
        if self.scenario.operator && can_receive {
            for force in [OperatorDecision::Commit, OperatorDecision::Abort] {
                let forced = self.changed(state.record.now, Verb::Force(force));
                all.extend(forced.map(|id| State { record: Cell::new(id), ..*state }));
            }
        }
        let trial = self.record(state).trial().is_some();
        if self.scenario.interferes && state.interference == Interference::No && trial {
            let lost = self.id(UpgradeRecord::default());
            all.push(State { record: Cell::new(lost), interference: Interference::RecordLost, ..*state });
            all.push(State { prev: Cell::new(File::Broken), interference: Interference::BackupLost, ..*state });
            all.push(State { bin: Cell::new(File::Foreign), interference: Interference::Replaced, ..*state });
            let home = Cell::new(false);
            all.push(State { spa_link: home, other_links: home, interference: Interference::LinksMoved, ..*state });
            all.push(State { bin: Cell::new(File::From), interference: Interference::PutBack, ..*state });
        }
        all.into_iter().map(Ok).chain(self.order(state)).collect()
    }

    /// The gateway orders the new release.
    fn order(&mut self, state: &State) -> Option<Outcome> {
        let ready = state.spm.is_some_and(|spm| spm.image == WhichRelease::From && spm.begun.is_none());
        if !ready || state.stopped || state.installed.now != WhichRelease::From || state.bin.now != File::From {
            return None;
        }
        let begun = self.changed(state.record.now, Verb::Begin)?;
        if state.is_skipped && state.interference != Interference::RecordLost {
            return Some(Err("a skipped release is tried again"));
        }
        let mut after = *state;
        after.spm.iter_mut().for_each(|spm| (spm.begun, spm.staged) = (Some(begun), true));
        Some(Ok(after))
    }
}

pub fn image(version: &str, package: char, executable: char) -> Image {
    let digest = |digit: char| digit.to_string().repeat(64).parse().unwrap();
    Image {
        version: version.parse().unwrap(),
        sha256: digest(package),
        executable: digest(executable),
        epoch: 1,
        file: String::new(),
        brings: vec![],
        revokes: vec![],
        endpoint: None,
        unknown: UnknownFields::new(),
    }
}

fn settled(image: WhichRelease) -> Spm {
    Spm { image, staged: false, begun: None, answered: Some(2), adopted: true, heartbeat: true, over_memory: false }
}

fn new_manager() -> Spm {
    Spm { answered: None, adopted: false, heartbeat: false, ..settled(WhichRelease::To) }
}

fn fresh(image: WhichRelease) -> Spa {
    Spa { image, died: false, found_running_manager: false, probe: ProbeResult::Not, proof: None }
}

pub fn without_spm(state: State) -> State {
    let died = state.spm.is_none_or(|spm| spm.image == WhichRelease::To);
    let spa = state.spa.map(|spa| Spa { died: spa.died || died, ..spa });
    State { spm: None, spa, ..state }
}

/// The acting process has died.
fn dead(state: State, decider: Decider) -> State {
    match decider {
        Decider::Manager => without_spm(state),
        Decider::Watchdog => State { spa: None, ..state },
        Decider::Installer => state,
    }
}

/// Updates the memory of the processes with the record.
fn note(state: &mut State, change: RecordChange) {
    let ends = matches!(
        change,
        RecordChange::Finish | RecordChange::FinishAndSkip | RecordChange::Drop | RecordChange::Interrupt
    );
    if let Some(spa) = &mut state.spa {
        match change {
            RecordChange::CountDeath => spa.died = false,
            RecordChange::CountLostWatchdog => spa.found_running_manager = false,
            RecordChange::CountFailedProof => spa.proof = None,
            RecordChange::BeginTrial => *spa = fresh(spa.image),
            _ if ends => *spa = fresh(spa.image),
            _ => {}
        }
    }
    if ends {
        state.spm.iter_mut().for_each(|spm| spm.staged = false);
    }
}

fn write(state: &mut State, id: u16, decider: Decider) {
    state.record.now = id;
    if decider == Decider::Manager {
        state.spm.iter_mut().for_each(|spm| spm.begun = None);
    }
}

fn sync(state: &mut State) {
    state.bin.sync();
    state.prev.sync();
    state.spa_link.sync();
    state.other_links.sync();
    state.record.sync();
    state.installed.sync();
}

/// The operator starts a stopped home.
pub fn start(state: &State) -> Option<State> {
    let down = state.stopped && state.spm.is_none() && state.spa.is_none();
    down.then_some(State { stopped: false, ..*state })
}

/// Each unsynced write is kept or lost.
fn power_cut(state: &State) -> Vec<State> {
    let mut all = vec![];
    let mut synced = *state;
    sync(&mut synced);
    if synced == *state {
        // Both roles die.
        return all;
    }
    let kept = |bits: u32, index: u32| bits & (1 << index) != 0;
    for bits in 0..64 {
        let after = State {
            bin: state.bin.cut(kept(bits, 0)),
            prev: state.prev.cut(kept(bits, 1)),
            spa_link: state.spa_link.cut(kept(bits, 2)),
            other_links: state.other_links.cut(kept(bits, 3)),
            record: state.record.cut(kept(bits, 4)),
            installed: state.installed.cut(kept(bits, 5)),
            spm: None,
            spa: None,
            ..*state
        };
        if !all.contains(&after) {
            all.push(after);
        }
    }
    all
}
