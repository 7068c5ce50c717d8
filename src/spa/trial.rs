//! The watchdog as the judge of a new release of the manager, whose upgrade it brings to one end or the other.
//!
//! What follows from what is decided in [`core::upgrade`](crate::core::upgrade). Here the new manager is observed, steps that change the
//! disk are carried out, and two one-shots are run: a heartbeat of the old program, which tells whether a missing one is the new
//! manager's fault or the network's, and the proof of the new watchdog. What concerns the manager's process or this one is answered as a
//! [`TrialAction`], for the watchdog to do.

mod shot;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use self::shot::OneShot;
use super::sentinel::Sentinel;
use super::session::{kill_session, uses_too_much};
use crate::config::Config;
use crate::core::model::Digest;
use crate::core::role::Role;
use crate::core::status::Status;
use crate::core::upgrade::{
    Decider, Evidence, ManagerEvidence, Probe, Proof, RecordChange, Trial, TrialLimits, UpgradePhase, UpgradeRecord,
    UpgradeStep, Wait, WhichRelease, next,
};
use crate::core::watch::silence::PING;
use crate::home::Home;
use crate::installation::upgrade::{Programs, UpgradeSession, which};
use crate::platform;
use crate::platform::ContentStamp;
use crate::process::record;
use crate::role::{self, RoleHolder};

/// Between two looks while an upgrade is under way.
const LOOK: Duration = Duration::from_secs(1);
/// Otherwise the record's file is looked at so often, and whenever the manager has ended.
const IDLE_LOOK: Duration = PING;
/// The other role may hold the record for a step.
const TURN: Duration = Duration::from_millis(500);
/// Steps without a pause; an upgrade has fewer.
const MAX_STEPS: usize = 32;
/// The time that is waited is recorded in pieces of this length.
const PIECE: Duration = Duration::from_secs(5);
/// The settings may change meanwhile.
const SETTINGS: Duration = Duration::from_secs(60);
/// A heartbeat of the old program ends within this, through however many endpoints.
const PROBE: Duration = Duration::from_secs(120);
/// The proof of the new watchdog ends within this.
const PROOF: Duration = Duration::from_secs(60);
/// The new manager may use too much at one look, and not at so many in a row.
const LARGE_IN_A_ROW: u32 = 3;
/// A manager that is to send a heartbeat is asked for one so often.
const ASKS: Duration = Duration::from_secs(10);
/// A manager that was asked to end is killed after this.
const ENDS: Duration = Duration::from_secs(10);

/// What the watchdog is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TrialAction {
    Nothing,
    /// Ask the manager to give way.
    EndManager,
    /// Ask the manager for a heartbeat.
    Heartbeat,
    /// Go on as the program that the watchdog's link leads to now.
    Become,
}

/// The manager that runs, as it was observed so far.
#[derive(Debug)]
struct ObservedManager {
    holder: RoleHolder,
    image: WhichRelease,
    answered: Option<Instant>,
    adopted: bool,
    heartbeat: bool,
    /// In a row, at which it used too much.
    large: u32,
    asked_to_end: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct TrialMonitor {
    home: Home,
    /// Nothing but this process would start the watchdog again.
    alone: bool,
    programs: Programs,
    own: Option<Digest>,
    was_started_from_backup: bool,
    /// Another program was put in the place of a manager that failed, and nobody has asked yet.
    has_restored: bool,
    /// The record's file, as it was last read.
    seen: Option<ContentStamp>,
    is_judging: bool,
    next_look: Instant,
    /// This watchdog was started, not renewed, and has not looked yet.
    is_new: bool,
    /// It went on for another program, in this phase of the trial.
    renewed_in: Option<UpgradePhase>,
    is_first_look: bool,
    /// The trial that what follows is about.
    trial: Option<Trial>,
    manager: Option<ObservedManager>,
    died: bool,
    took_over: bool,
    /// A manager of the release before has ended since the trial began: whoever comes then was started as the new one.
    is_old_gone: bool,
    probe: OneShot,
    proof: OneShot,
    /// The managers of the new release that were seen: what they started is ended with them.
    new_managers: Vec<RoleHolder>,
    /// Why the last look failed.
    last_error: Option<String>,
    /// The manager was last asked for a heartbeat then.
    asked: Option<Instant>,
    /// Waiting since, of which nothing is recorded yet.
    waits: Option<Instant>,
    limits: TrialLimits,
    most_memory: u64,
    settings: Option<Instant>,
    sentinel: Option<Sentinel>,
}

impl TrialMonitor {
    /// `alone`: there is no service manager; `renewed`: it goes on for another program of the same watchdog.
    pub(super) fn new(home: &Home, alone: bool, renewed: bool, now: Instant) -> TrialMonitor {
        let backup = home.backup_executable();
        let own = platform::own_executable();
        TrialMonitor {
            home: home.clone(),
            alone,
            programs: Programs::default(),
            own: None,
            was_started_from_backup: own.is_some_and(|own| own.file_name() == backup.file_name()),
            has_restored: false,
            seen: None,
            is_judging: true,
            next_look: now,
            is_new: !renewed,
            renewed_in: None,
            is_first_look: true,
            trial: None,
            manager: None,
            died: false,
            took_over: false,
            is_old_gone: false,
            probe: OneShot::NotBegun,
            proof: OneShot::NotBegun,
            new_managers: vec![],
            last_error: None,
            asked: None,
            waits: None,
            limits: TrialLimits::default(),
            most_memory: u64::MAX,
            settings: None,
            sentinel: None,
        }
    }

    /// When to look next.
    pub(super) fn due(&self) -> Instant {
        self.next_look
    }

    /// An upgrade is under way: the manager is to be asked after its state.
    pub(super) fn is_judging(&self) -> bool {
        self.is_judging
    }

    /// Whether the release before was put back since this was last asked.
    pub(super) fn has_restored(&mut self) -> bool {
        std::mem::take(&mut self.has_restored)
    }

    /// The connection to the manager has ended. `died`: without a word, or because it hung.
    pub(super) fn lost(&mut self, died: bool) {
        self.next_look = Instant::now();
        if let Some(manager) = &mut self.manager {
            manager.answered = None;
            if !died {
                manager.asked_to_end.get_or_insert(Instant::now());
            }
            self.died |= died && manager.image == WhichRelease::To && manager.asked_to_end.is_none();
        }
    }

    /// A manager that this watchdog started has ended before anybody could connect to it.
    pub(super) fn ended_unseen(&mut self) {
        self.died |= self.trial.as_ref().is_some_and(|trial| trial.phase == UpgradePhase::Trial);
        self.next_look = Instant::now();
    }

    /// What the manager says of itself.
    pub(super) fn answered(&mut self, status: &Status, now: Instant) {
        self.find_manager();
        let (Some(trial), Some(manager)) = (&self.trial, &mut self.manager) else { return };
        if status.spm.pid != Some(manager.holder.pid) {
            return;
        }
        if trial.from.executable == trial.to.executable
            && let Some(version) = &status.version
        {
            manager.image = if *version == trial.from.version { WhichRelease::From } else { WhichRelease::To };
        }
        // One that takes itself for another release than was signed would be upgraded for ever.
        if manager.image == WhichRelease::To && status.version.as_ref() != Some(&trial.to.version) {
            return tracing::warn!(version = ?status.version, "the new manager reports another version than that of its release");
        }
        manager.answered.get_or_insert(now);
        manager.heartbeat |= status.gateway.connected;
        let in_charge = |record: &record::ProcessRecord| {
            status.agents.iter().any(|agent| agent.name == record.head.name && agent.pid == Some(record.pid))
        };
        if !manager.adopted {
            manager.adopted = record::all(&self.home).iter().filter(|record| record.is_alive()).all(in_charge);
        }
    }

    /// Looks, and takes the steps that are due.
    pub(super) fn look(&mut self, now: Instant) -> TrialAction {
        if now < self.next_look {
            return TrialAction::Nothing;
        }
        self.next_look = now + if self.is_judging { LOOK } else { IDLE_LOOK };
        if !self.is_judging && !self.is_record_changed() {
            return TrialAction::Nothing;
        }
        match self.attempt(now) {
            Ok(what) => {
                self.last_error = None;
                what
            }
            Err(error) => {
                let error = format!("{error:#}");
                // Once: it is tried every second, perhaps for as long as a disk is full.
                if self.last_error.as_ref() != Some(&error) {
                    tracing::error!(error, "the manager's upgrade cannot go on; it is tried again");
                    self.last_error = Some(error);
                }
                TrialAction::Nothing
            }
        }
    }

    /// This watchdog ends in order, or makes way for another program.
    pub(super) fn relieve_sentinel(&mut self) {
        if let Some(sentinel) = self.sentinel.take() {
            sentinel.relieve();
        }
    }

    fn is_record_changed(&self) -> bool {
        let stamp = std::fs::File::open(self.home.upgrade_record()).and_then(|file| ContentStamp::of(&file)).ok();
        stamp != self.seen
    }

    fn attempt(&mut self, now: Instant) -> Result<TrialAction> {
        let Some(mut session) = UpgradeSession::open(&self.home, TURN)? else {
            self.next_look = now + LOOK;
            return Ok(TrialAction::Nothing);
        };
        if !std::mem::replace(&mut self.is_judging, true) {
            self.next_look = now + LOOK;
        }
        self.probe.look(now);
        self.proof.look(now);
        for _ in 0..MAX_STEPS {
            self.consider(session.record(), now);
            self.count_wait(&mut session, now)?;
            let evidence = self.evidence(&session)?;
            let step = next(session.record(), &evidence, &self.limits);
            if !session.carry_out(step, None)? {
                return Ok(self.decided(step, session.record(), now));
            }
            self.taken(step);
        }
        bail!("a step of the upgrade has no effect")
    }

    /// Looks at which trial it is, and at whom it is about.
    fn consider(&mut self, record: &UpgradeRecord, now: Instant) {
        let trial = record.trial().cloned();
        let is = |one: &Trial, other: &Trial| one.to.is(&other.to) && one.began == other.began;
        let is_same = matches!((&self.trial, &trial), (Some(one), Some(other)) if is(one, other));
        self.trial = trial;
        if !is_same {
            (self.died, self.waits, self.manager) = (false, None, None);
            (self.is_old_gone, self.renewed_in) = (false, None);
            self.new_managers.clear();
            (self.probe, self.proof) = (OneShot::NotBegun, OneShot::NotBegun);
        }
        self.find_manager();
        let Some(trial) = &self.trial else {
            // Whatever begins later has begun under this watchdog.
            (self.is_first_look, self.is_new) = (false, false);
            self.relieve_sentinel();
            return;
        };
        if self.is_first_look && !self.is_new {
            self.renewed_in = Some(trial.phase);
        }
        self.is_first_look = false;
        if std::mem::take(&mut self.is_new) {
            let is_new = |manager: &ObservedManager| manager.image == WhichRelease::To;
            self.took_over = trial.phase == UpgradePhase::Trial && self.manager.as_ref().is_some_and(is_new);
        }
        if self.settings.is_none_or(|at| now.saturating_duration_since(at) >= SETTINGS)
            && let Ok(loaded) = Config::load(&self.home)
        {
            self.settings = Some(now);
            self.limits = TrialLimits::of(loaded.config.upgrade_trial.0);
            self.most_memory = loaded.config.spm_max_mem.0;
        }
        if self.alone && trial.phase == UpgradePhase::Trial && self.sentinel.is_none() {
            self.sentinel = Sentinel::post(&self.home);
        }
    }

    /// Who is the manager now; what was observed of another is forgotten.
    fn find_manager(&mut self) {
        let Some(trial) = &self.trial else { return self.manager = None };
        let holder = role::who_has(&self.home, Role::Spm);
        let is_it = |manager: &ObservedManager| {
            holder.as_ref().is_some_and(|holder| {
                (holder.pid, holder.start_time) == (manager.holder.pid, manager.holder.start_time)
            })
        };
        if self.manager.as_ref().is_some_and(is_it) {
            return;
        }
        let in_trial = trial.phase == UpgradePhase::Trial;
        self.is_old_gone |=
            in_trial && self.manager.as_ref().is_some_and(|manager| manager.image == WhichRelease::From);
        let is_old_gone = self.is_old_gone && in_trial;
        self.manager = holder.map(|holder| {
            self.probe = OneShot::NotBegun;
            let program = self.programs.of_process(holder.pid);
            let same = if trial.phase == UpgradePhase::RollingBack { WhichRelease::From } else { WhichRelease::To };
            // A script, or what it starts, is the new release too: the old one is known by its bytes.
            let image = match which(trial, program.as_ref(), same) {
                WhichRelease::Other => WhichRelease::To,
                WhichRelease::From if is_old_gone => WhichRelease::To,
                image => image,
            };
            if image == WhichRelease::To && !self.new_managers.contains(&holder) {
                self.new_managers.push(holder.clone());
            }
            ObservedManager {
                holder,
                image,
                answered: None,
                adopted: false,
                heartbeat: false,
                large: 0,
                asked_to_end: None,
            }
        });
    }

    fn evidence(&mut self, session: &UpgradeSession) -> Result<Evidence> {
        let seen = session.evidence(Decider::Watchdog, &mut self.programs)?;
        let now = Instant::now();
        if self.own.is_none() {
            self.own = self.programs.of_process(std::process::id());
        }
        let watchdog = match &self.trial {
            None => WhichRelease::Other,
            Some(trial) => {
                let by_file = match self.was_started_from_backup {
                    true => WhichRelease::From,
                    // Its bytes may be those of the backup all the same.
                    false if trial.phase == UpgradePhase::Committing => WhichRelease::To,
                    false => WhichRelease::From,
                };
                match which(trial, self.own.as_ref(), by_file) {
                    // It has become what its link led to: there is nothing else that it could be.
                    _ if self.renewed_in == Some(UpgradePhase::Committing) => WhichRelease::To,
                    _ if self.renewed_in.is_some() && trial.phase != UpgradePhase::Committing => WhichRelease::From,
                    // A script in the place of an executable runs something else.
                    WhichRelease::Other if self.was_started_from_backup => WhichRelease::From,
                    WhichRelease::Other => WhichRelease::To,
                    image => image,
                }
            }
        };
        let (most, home) = (self.most_memory, &self.home);
        let manager = self.manager.as_mut().map(|manager| {
            if manager.image == WhichRelease::To {
                manager.large = if uses_too_much(home, manager.holder.pid, manager.holder.start_time, most) {
                    manager.large + 1
                } else {
                    0
                };
            }
            ManagerEvidence {
                image: manager.image,
                answered: manager.answered.map(|since| now.saturating_duration_since(since)),
                adopted: manager.adopted,
                heartbeat: manager.heartbeat,
                over_memory: manager.large >= LARGE_IN_A_ROW,
            }
        });
        Ok(Evidence {
            manager,
            watchdog: Some(watchdog),
            died: self.died,
            took_over: self.took_over,
            probe: match &self.probe {
                OneShot::NotBegun => Probe::NotAsked,
                OneShot::Running { .. } => Probe::Running,
                OneShot::Done { success: true, at } => Probe::Works(now.saturating_duration_since(*at)),
                OneShot::Done { success: false, at } => Probe::Fails(now.saturating_duration_since(*at)),
            },
            proof: match &self.proof {
                OneShot::NotBegun => Proof::NotBegun,
                OneShot::Running { .. } => Proof::Running,
                OneShot::Done { success: true, .. } => Proof::Passed,
                OneShot::Done { success: false, .. } => Proof::Failed,
            },
            ..seen
        })
    }

    /// Records the time that was waited for the new manager to be in charge: in pieces, and only as long as this process was looking.
    fn count_wait(&mut self, session: &mut UpgradeSession, now: Instant) -> Result<()> {
        let (Some(since), Some(trial)) = (self.waits, &self.trial) else { return Ok(()) };
        let left = self.limits.first_answer.saturating_sub(Duration::from_secs(trial.spent_seconds));
        let waited = now.saturating_duration_since(since).min(PIECE * 2);
        if waited < PIECE.min(left) || waited < LOOK {
            return Ok(());
        }
        self.waits = Some(now);
        session.change(|record| record.spend(waited.as_secs())).map(drop)
    }

    /// A step of the disk was taken.
    fn taken(&mut self, step: UpgradeStep) {
        match step {
            UpgradeStep::Restore => self.has_restored = true,
            UpgradeStep::Record(RecordChange::CountDeath) => {
                self.died = false;
                self.end_leftovers();
            }
            UpgradeStep::Record(RecordChange::FinishAndSkip | RecordChange::Drop) => self.end_leftovers(),
            UpgradeStep::Record(RecordChange::CountLostWatchdog) => self.took_over = false,
            UpgradeStep::Record(RecordChange::CountFailedProof) => self.proof = OneShot::NotBegun,
            UpgradeStep::Record(RecordChange::BeginTrial) => {
                (self.died, self.took_over) = (false, false);
                (self.probe, self.proof) = (OneShot::NotBegun, OneShot::NotBegun);
            }
            _ => {}
        }
    }

    /// Ends what managers of the new release that are dead have left running.
    fn end_leftovers(&mut self) {
        for manager in self.new_managers.extract_if(.., |manager| !manager.is_alive()) {
            kill_session(&self.home, manager.pid, manager.start_time);
        }
    }

    fn decided(&mut self, step: UpgradeStep, record: &UpgradeRecord, now: Instant) -> TrialAction {
        let counts = matches!(step, UpgradeStep::Wait(wait) if wait.counts());
        self.waits = counts.then(|| self.waits.unwrap_or(now));
        match step {
            UpgradeStep::Nothing => {
                self.is_judging = record.trial().is_some();
                self.next_look = now + IDLE_LOOK;
                self.seen =
                    std::fs::File::open(self.home.upgrade_record()).and_then(|file| ContentStamp::of(&file)).ok();
                TrialAction::Nothing
            }
            UpgradeStep::Wait(Wait::Heartbeat { .. }) => {
                let is_due = self.asked.is_none_or(|at| now.saturating_duration_since(at) >= ASKS);
                if is_due {
                    self.asked = Some(now);
                }
                if is_due { TrialAction::Heartbeat } else { TrialAction::Nothing }
            }
            UpgradeStep::RestartManager => self.end_manager(now),
            // One that said that it gives way is at it.
            UpgradeStep::KillManager if self.ends_by_itself(now) => TrialAction::Nothing,
            UpgradeStep::KillManager => {
                self.kill_manager();
                TrialAction::Nothing
            }
            UpgradeStep::StopWatchdog => TrialAction::Become,
            UpgradeStep::Probe => {
                tracing::warn!("the new manager has sent no heartbeat; the old program tries to");
                let mut command = Command::new(self.home.backup_executable());
                self.probe =
                    OneShot::begin(command.args(["spa", "--home"]).arg(self.home.known_as()).arg("--probe"), PROBE);
                TrialAction::Nothing
            }
            UpgradeStep::Prove => {
                tracing::info!("the new watchdog is put to the proof");
                let mut command = Command::new(self.home.executable());
                self.proof =
                    OneShot::begin(command.args(["spa", "--home"]).arg(self.home.known_as()).arg("--prove"), PROOF);
                TrialAction::Nothing
            }
            _ => TrialAction::Nothing,
        }
    }

    /// Asks it to end, and kills it where it does not; what it started is ended with one that is given up.
    fn end_manager(&mut self, now: Instant) -> TrialAction {
        let Some(manager) = &mut self.manager else { return TrialAction::Nothing };
        if manager.image == WhichRelease::To && self.trial.as_ref().is_some_and(|trial| trial.lost_watchdogs > 0) {
            // It may end this watchdog sooner than it ends itself.
            self.kill_manager();
            return TrialAction::Nothing;
        }
        match manager.asked_to_end {
            None => {
                manager.asked_to_end = Some(now);
                TrialAction::EndManager
            }
            Some(since) if now.saturating_duration_since(since) >= ENDS => {
                self.kill_manager();
                TrialAction::Nothing
            }
            Some(_) => TrialAction::Nothing,
        }
    }

    fn ends_by_itself(&self, now: Instant) -> bool {
        let asked = self.manager.as_ref().and_then(|manager| manager.asked_to_end);
        asked.is_some_and(|since| now.saturating_duration_since(since) < ENDS)
    }

    /// Kills it with all that it has started.
    pub(super) fn kill_manager(&mut self) {
        let Some(manager) = &mut self.manager else { return };
        manager.asked_to_end.get_or_insert(Instant::now());
        tracing::warn!(pid = manager.holder.pid, "a manager that is to make way is killed");
        if manager.image == WhichRelease::To {
            kill_session(&self.home, manager.holder.pid, manager.holder.start_time);
        }
        if let Err(error) = manager.holder.kill() {
            tracing::error!(error = format!("{error:#}"), "the manager cannot be killed");
        }
    }
}
