//! Supervises the trial of a new release of the manager, up to its commit or rollback.
//!
//! The decisions are made in [`core::upgrade`](crate::core::upgrade). Here the new manager is observed, disk steps are carried out, and two
//! one-shots are run: a heartbeat of the old program, which shows whether a missing heartbeat is the new manager's fault or the network's,
//! and the proof of the new watchdog. Actions on the manager's process or on this process are returned as a [`TrialAction`].

mod shot;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use self::shot::OneShot;
use super::session::{exceeds_limits, kill_session};
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
use crate::role::sentinel::Sentinel;
use crate::role::{self, RoleHolder};

/// Interval between checks while an upgrade is in progress.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Otherwise: interval for checking the record's file, which is also checked when the manager exits.
const IDLE_CHECK_INTERVAL: Duration = PING;
/// Timeout for the record's lock: the other role may hold it for a step.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);
/// Limit on steps without a pause; an upgrade has fewer.
const MAX_STEPS: usize = 32;
/// The time for a manager that has connected to report its status, even if the time for its first answer ends meanwhile.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Waiting time is recorded in pieces of this length.
const WAIT_PIECE: Duration = Duration::from_secs(5);
/// Interval for reloading the settings.
const SETTINGS_INTERVAL: Duration = Duration::from_secs(60);
/// Timeout of the old program's heartbeat, over all endpoints.
const PROBE_TIMEOUT: Duration = Duration::from_secs(120);
/// Timeout of the proof of the new watchdog.
const PROOF_TIMEOUT: Duration = Duration::from_secs(60);
/// Number of consecutive checks above a limit until the new manager counts as using too much.
const MAX_OVER_LIMIT: u32 = 3;
/// Interval for requesting a heartbeat that the manager still owes.
const HEARTBEAT_REQUEST_INTERVAL: Duration = Duration::from_secs(10);
/// A manager that was asked to exit is killed after this.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// An action for the watchdog to carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TrialAction {
    Nothing,
    /// Ask the manager to yield.
    EndManager,
    /// Request a heartbeat from the manager.
    Heartbeat,
    /// Continue as the program that the watchdog's link names now.
    Replace,
}

/// The running manager, as observed so far.
#[derive(Debug)]
struct ObservedManager {
    holder: RoleHolder,
    image: WhichRelease,
    answered: Option<Instant>,
    adopted: bool,
    heartbeat: bool,
    /// Number of consecutive checks at which it used too much.
    over_limit: u32,
    exit_requested: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct TrialMonitor {
    home: Home,
    /// There is no service manager that would restart the watchdog.
    is_unsupervised: bool,
    programs: Programs,
    own: Option<Digest>,
    was_started_from_backup: bool,
    /// A failed manager's program was replaced, and `has_restored` was not called since.
    has_restored: bool,
    /// Stamp of the record's file when last read.
    record_stamp: Option<ContentStamp>,
    is_in_progress: bool,
    next_check: Instant,
    /// This watchdog was started, not renewed, and has not checked the record yet.
    is_new: bool,
    /// The phase of the trial in which this watchdog was renewed.
    renewed_in: Option<UpgradePhase>,
    is_first_check: bool,
    /// The trial that the following fields are about.
    trial: Option<Trial>,
    manager: Option<ObservedManager>,
    /// The manager that announced its exit last, and when. It may do so before this watchdog notices the upgrade.
    exiting: Option<(RoleHolder, Instant)>,
    died: bool,
    found_running_manager: bool,
    /// A manager of the previous release exited since the trial started: later managers were started from the new release.
    is_old_gone: bool,
    probe: OneShot,
    proof: OneShot,
    /// The managers of the new release seen so far: the processes that they started are killed with them.
    new_managers: Vec<RoleHolder>,
    /// Why the last check failed.
    last_error: Option<String>,
    /// When the manager was last asked for a heartbeat.
    heartbeat_requested: Option<Instant>,
    /// Start of the waiting time that is not recorded yet.
    waiting_since: Option<Instant>,
    limits: TrialLimits,
    memory_limit: u64,
    settings_loaded: Option<Instant>,
    sentinel: Option<Sentinel>,
}

impl TrialMonitor {
    /// `is_unsupervised`: there is no service manager; `renewed`: a running watchdog replaced itself with this program.
    pub(super) fn new(home: &Home, is_unsupervised: bool, renewed: bool, now: Instant) -> TrialMonitor {
        let backup = home.backup_executable();
        let own = platform::own_executable();
        TrialMonitor {
            home: home.clone(),
            is_unsupervised,
            programs: Programs::default(),
            own: None,
            was_started_from_backup: own.is_some_and(|own| own.file_name() == backup.file_name()),
            has_restored: false,
            record_stamp: None,
            is_in_progress: true,
            next_check: now,
            is_new: !renewed,
            renewed_in: None,
            is_first_check: true,
            trial: None,
            manager: None,
            exiting: None,
            died: false,
            found_running_manager: false,
            is_old_gone: false,
            probe: OneShot::NotStarted,
            proof: OneShot::NotStarted,
            new_managers: vec![],
            last_error: None,
            heartbeat_requested: None,
            waiting_since: None,
            limits: TrialLimits::default(),
            memory_limit: u64::MAX,
            settings_loaded: None,
            sentinel: None,
        }
    }

    /// When [`TrialMonitor::check`] must be called next.
    pub(super) fn due(&self) -> Instant {
        self.next_check
    }

    /// Whether an upgrade is in progress: then the manager's status is requested.
    pub(super) fn is_in_progress(&self) -> bool {
        self.is_in_progress
    }

    /// Whether the previous release was restored since the last call.
    pub(super) fn has_restored(&mut self) -> bool {
        std::mem::take(&mut self.has_restored)
    }

    /// A manager accepted the connection, and its status is requested.
    pub(super) fn connected(&mut self, now: Instant) {
        if self.is_in_progress {
            self.next_check = self.next_check.max(now + REPORT_TIMEOUT);
        }
    }

    /// The connection to the manager ended. `died`: without a goodbye, or because it hung.
    pub(super) fn disconnected(&mut self, died: bool) {
        let now = Instant::now();
        self.next_check = now;
        if !died {
            self.exiting = role::current_holder(&self.home, Role::Spm).map(|holder| (holder, now));
        }
        if let Some(manager) = &mut self.manager {
            manager.answered = None;
            if !died {
                manager.exit_requested.get_or_insert(now);
            }
            self.died |= died && manager.image == WhichRelease::To && manager.exit_requested.is_none();
        }
    }

    /// A manager that this watchdog started exited before it answered.
    pub(super) fn exited_unanswered(&mut self) {
        self.died |= self.trial.as_ref().is_some_and(|trial| trial.phase == UpgradePhase::Trial);
        self.next_check = Instant::now();
    }

    /// Evaluates a status reported by the manager.
    pub(super) fn status_received(&mut self, status: &Status, now: Instant) {
        self.update_manager();
        let (Some(trial), Some(manager)) = (&self.trial, &mut self.manager) else { return };
        if status.spm.pid != Some(manager.holder.pid) {
            return;
        }
        if trial.from.executable == trial.to.executable
            && let Some(version) = &status.version
        {
            manager.image = if *version == trial.from.version { WhichRelease::From } else { WhichRelease::To };
        }
        // One that reports another version than its release's would be upgraded again and again.
        if manager.image == WhichRelease::To && status.version.as_ref() != Some(&trial.to.version) {
            return tracing::warn!(version = ?status.version, "the new manager reports another version than that of its release");
        }
        if manager.answered.is_none() {
            manager.answered = Some(now);
            self.next_check = now;
        }
        manager.heartbeat |= status.gateway.connected;
        let in_charge = |record: &record::ProcessRecord| {
            status.agents.iter().any(|agent| agent.name == record.head.name && agent.pid == Some(record.pid))
        };
        if !manager.adopted {
            manager.adopted = record::all(&self.home).iter().filter(|record| record.is_alive()).all(in_charge);
        }
    }

    /// Checks the record, and carries out the steps that are due.
    pub(super) fn check(&mut self, now: Instant) -> TrialAction {
        if now < self.next_check {
            return TrialAction::Nothing;
        }
        self.next_check = now + if self.is_in_progress { CHECK_INTERVAL } else { IDLE_CHECK_INTERVAL };
        if !self.is_in_progress && !self.is_record_changed() {
            return TrialAction::Nothing;
        }
        match self.attempt(now) {
            Ok(what) => {
                self.last_error = None;
                what
            }
            Err(error) => {
                let error = format!("{error:#}");
                // Logged once: it is retried every second, possibly for as long as a disk is full.
                if self.last_error.as_ref() != Some(&error) {
                    tracing::error!(error, "cannot continue the manager's upgrade; it is retried");
                    self.last_error = Some(error);
                }
                TrialAction::Nothing
            }
        }
    }

    /// This watchdog exits orderly, or continues as another program.
    pub(super) fn stop_sentinel(&mut self) {
        if let Some(sentinel) = self.sentinel.take() {
            sentinel.stop();
        }
    }

    fn is_record_changed(&self) -> bool {
        let stamp = std::fs::File::open(self.home.upgrade_record()).and_then(|file| ContentStamp::of(&file)).ok();
        stamp != self.record_stamp
    }

    fn attempt(&mut self, now: Instant) -> Result<TrialAction> {
        let Some(mut session) = UpgradeSession::open(&self.home, LOCK_TIMEOUT)? else {
            self.next_check = now + CHECK_INTERVAL;
            return Ok(TrialAction::Nothing);
        };
        if !std::mem::replace(&mut self.is_in_progress, true) {
            self.next_check = now + CHECK_INTERVAL;
        }
        self.probe.poll(now);
        self.proof.poll(now);
        for _ in 0..MAX_STEPS {
            self.update_trial(session.record(), now);
            self.record_wait(&mut session, now)?;
            let evidence = self.evidence(&session)?;
            let step = next(session.record(), &evidence, &self.limits);
            if !session.carry_out(step, None)? {
                return Ok(self.act(step, session.record(), now));
            }
            self.step_done(step);
        }
        bail!("an upgrade step had no effect")
    }

    /// Determines the current trial and its manager, and resets the observations of an earlier one.
    fn update_trial(&mut self, record: &UpgradeRecord, now: Instant) {
        let trial = record.trial().cloned();
        let is = |one: &Trial, other: &Trial| one.to.is(&other.to) && one.began == other.began;
        let is_same = matches!((&self.trial, &trial), (Some(one), Some(other)) if is(one, other));
        self.trial = trial;
        if !is_same {
            (self.died, self.waiting_since, self.manager) = (false, None, None);
            (self.is_old_gone, self.renewed_in) = (false, None);
            self.new_managers.clear();
            (self.probe, self.proof) = (OneShot::NotStarted, OneShot::NotStarted);
        }
        self.update_manager();
        let Some(trial) = &self.trial else {
            // An upgrade that starts later starts under this watchdog.
            (self.is_first_check, self.is_new) = (false, false);
            self.stop_sentinel();
            return;
        };
        if self.is_first_check && !self.is_new {
            self.renewed_in = Some(trial.phase);
        }
        self.is_first_check = false;
        if std::mem::take(&mut self.is_new) {
            let is_new = |manager: &ObservedManager| manager.image == WhichRelease::To;
            self.found_running_manager =
                trial.phase == UpgradePhase::Trial && self.manager.as_ref().is_some_and(is_new);
        }
        if self.settings_loaded.is_none_or(|at| now.saturating_duration_since(at) >= SETTINGS_INTERVAL)
            && let Ok(loaded) = Config::load(&self.home)
        {
            self.settings_loaded = Some(now);
            self.limits = TrialLimits::of(loaded.config.upgrade_trial.0);
            self.memory_limit = loaded.config.spm_max_mem.0;
        }
        if self.is_unsupervised && trial.phase == UpgradePhase::Trial && self.sentinel.is_none() {
            self.sentinel = Sentinel::start(&self.home);
        }
    }

    /// Determines the current manager; the observations of another one are dropped.
    fn update_manager(&mut self) {
        let Some(trial) = &self.trial else { return self.manager = None };
        let holder = role::current_holder(&self.home, Role::Spm);
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
            self.probe = OneShot::NotStarted;
            let program = self.programs.of_process(holder.pid, holder.program.as_ref());
            let same = if trial.phase == UpgradePhase::RollingBack { WhichRelease::From } else { WhichRelease::To };
            // A script, or a program started by it, counts as the new release: the old one is recognized by its bytes.
            let image = match which(trial, program.as_ref(), same) {
                WhichRelease::Other => WhichRelease::To,
                WhichRelease::From if is_old_gone => WhichRelease::To,
                image => image,
            };
            let is_exiting = |(exiting, _): &&(RoleHolder, Instant)| {
                image == WhichRelease::From && (exiting.pid, exiting.start_time) == (holder.pid, holder.start_time)
            };
            let exit_requested = self.exiting.as_ref().filter(is_exiting).map(|(_, at)| *at);
            if image == WhichRelease::To && !self.new_managers.contains(&holder) {
                self.new_managers.push(holder.clone());
            }
            ObservedManager {
                holder,
                image,
                answered: None,
                adopted: false,
                heartbeat: false,
                over_limit: 0,
                exit_requested,
            }
        });
    }

    fn evidence(&mut self, session: &UpgradeSession) -> Result<Evidence> {
        let evidence = session.evidence(Decider::Watchdog, &mut self.programs)?;
        let now = Instant::now();
        if self.own.is_none() {
            self.own = self.programs.of_process(std::process::id(), None);
        }
        let watchdog = match &self.trial {
            None => WhichRelease::Other,
            Some(trial) => {
                let by_file = match self.was_started_from_backup {
                    true => WhichRelease::From,
                    // Its bytes may equal the backup's.
                    false if trial.phase == UpgradePhase::Committing => WhichRelease::To,
                    false => WhichRelease::From,
                };
                match which(trial, self.own.as_ref(), by_file) {
                    // It became the program that its link named, which determines the release.
                    _ if self.renewed_in == Some(UpgradePhase::Committing) => WhichRelease::To,
                    _ if self.renewed_in.is_some() && trial.phase != UpgradePhase::Committing => WhichRelease::From,
                    // A script installed as the executable runs another program.
                    WhichRelease::Other if self.was_started_from_backup => WhichRelease::From,
                    WhichRelease::Other => WhichRelease::To,
                    image => image,
                }
            }
        };
        let (memory_limit, home) = (self.memory_limit, &self.home);
        let manager = self.manager.as_mut().map(|manager| {
            if manager.image == WhichRelease::To {
                manager.over_limit =
                    if exceeds_limits(home, manager.holder.pid, manager.holder.start_time, memory_limit) {
                        manager.over_limit + 1
                    } else {
                        0
                    };
            }
            ManagerEvidence {
                image: manager.image,
                answered: manager.answered.map(|since| now.saturating_duration_since(since)),
                adopted: manager.adopted,
                heartbeat: manager.heartbeat,
                over_memory: manager.over_limit >= MAX_OVER_LIMIT,
            }
        });
        Ok(Evidence {
            manager,
            watchdog: Some(watchdog),
            died: self.died,
            found_running_manager: self.found_running_manager,
            probe: match &self.probe {
                OneShot::NotStarted => Probe::NotAsked,
                OneShot::Running { .. } => Probe::Running,
                OneShot::Done { success: true, at } => Probe::Works(now.saturating_duration_since(*at)),
                OneShot::Done { success: false, at } => Probe::Fails(now.saturating_duration_since(*at)),
            },
            proof: match &self.proof {
                OneShot::NotStarted => Proof::NotBegun,
                OneShot::Running { .. } => Proof::Running,
                OneShot::Done { success: true, .. } => Proof::Passed,
                OneShot::Done { success: false, .. } => Proof::Failed,
            },
            ..evidence
        })
    }

    /// Records the time spent waiting for the new manager to take charge: in pieces, and only while this process was running.
    fn record_wait(&mut self, session: &mut UpgradeSession, now: Instant) -> Result<()> {
        let (Some(since), Some(trial)) = (self.waiting_since, &self.trial) else { return Ok(()) };
        let left = self.limits.first_answer.saturating_sub(Duration::from_secs(trial.spent_seconds));
        let waited = now.saturating_duration_since(since).min(WAIT_PIECE * 2);
        if waited < WAIT_PIECE.min(left) || waited < CHECK_INTERVAL {
            return Ok(());
        }
        self.waiting_since = Some(now);
        session.change(|record| record.spend(waited.as_secs())).map(drop)
    }

    /// Handles a completed disk step.
    fn step_done(&mut self, step: UpgradeStep) {
        match step {
            UpgradeStep::Restore => self.has_restored = true,
            UpgradeStep::Record(RecordChange::CountDeath) => {
                self.died = false;
                self.kill_leftovers();
            }
            UpgradeStep::Record(RecordChange::FinishAndSkip | RecordChange::Drop) => self.kill_leftovers(),
            UpgradeStep::Record(RecordChange::CountLostWatchdog) => self.found_running_manager = false,
            UpgradeStep::Record(RecordChange::CountFailedProof) => self.proof = OneShot::NotStarted,
            UpgradeStep::Record(RecordChange::BeginTrial) => {
                (self.died, self.found_running_manager) = (false, false);
                (self.probe, self.proof) = (OneShot::NotStarted, OneShot::NotStarted);
            }
            _ => {}
        }
    }

    /// Kills what dead managers of the new release left running.
    fn kill_leftovers(&mut self) {
        for manager in self.new_managers.extract_if(.., |manager| !manager.is_alive()) {
            kill_session(&self.home, manager.pid, manager.start_time);
        }
    }

    fn act(&mut self, step: UpgradeStep, record: &UpgradeRecord, now: Instant) -> TrialAction {
        let counts = matches!(step, UpgradeStep::Wait(wait) if wait.counts());
        self.waiting_since = counts.then(|| self.waiting_since.unwrap_or(now));
        match step {
            UpgradeStep::Nothing => {
                self.is_in_progress = record.trial().is_some();
                self.next_check = now + IDLE_CHECK_INTERVAL;
                self.record_stamp =
                    std::fs::File::open(self.home.upgrade_record()).and_then(|file| ContentStamp::of(&file)).ok();
                TrialAction::Nothing
            }
            UpgradeStep::Wait(Wait::Heartbeat { .. }) => {
                let is_due = self
                    .heartbeat_requested
                    .is_none_or(|at| now.saturating_duration_since(at) >= HEARTBEAT_REQUEST_INTERVAL);
                if is_due {
                    self.heartbeat_requested = Some(now);
                }
                if is_due { TrialAction::Heartbeat } else { TrialAction::Nothing }
            }
            UpgradeStep::RestartManager => self.end_manager(now),
            // A manager that announced its exit gets time for it.
            UpgradeStep::KillManager if self.is_exiting(now) => TrialAction::Nothing,
            UpgradeStep::KillManager => {
                self.kill_manager();
                TrialAction::Nothing
            }
            UpgradeStep::StopWatchdog => TrialAction::Replace,
            UpgradeStep::Probe => {
                tracing::warn!("the new manager sent no heartbeat; checking whether the old program can");
                let mut command = Command::new(self.home.backup_executable());
                self.probe = OneShot::start(
                    command.args(["spa", "--home"]).arg(self.home.public_path()).arg("--probe"),
                    PROBE_TIMEOUT,
                );
                TrialAction::Nothing
            }
            UpgradeStep::Prove => {
                tracing::info!("checking that the new watchdog works");
                let mut command = Command::new(self.home.executable());
                self.proof = OneShot::start(
                    command.args(["spa", "--home"]).arg(self.home.public_path()).arg("--prove"),
                    PROOF_TIMEOUT,
                );
                TrialAction::Nothing
            }
            _ => TrialAction::Nothing,
        }
    }

    /// Asks the manager to exit, and kills it after a timeout, with all processes that it started.
    fn end_manager(&mut self, now: Instant) -> TrialAction {
        let Some(manager) = &mut self.manager else { return TrialAction::Nothing };
        if manager.image == WhichRelease::To && self.trial.as_ref().is_some_and(|trial| trial.lost_watchdogs > 0) {
            // It may kill this watchdog before it exits.
            self.kill_manager();
            return TrialAction::Nothing;
        }
        match manager.exit_requested {
            None => {
                manager.exit_requested = Some(now);
                TrialAction::EndManager
            }
            Some(since) if now.saturating_duration_since(since) >= EXIT_TIMEOUT => {
                self.kill_manager();
                TrialAction::Nothing
            }
            Some(_) => TrialAction::Nothing,
        }
    }

    fn is_exiting(&self, now: Instant) -> bool {
        let requested = self.manager.as_ref().and_then(|manager| manager.exit_requested);
        requested.is_some_and(|since| now.saturating_duration_since(since) < EXIT_TIMEOUT)
    }

    /// Kills the manager with all processes that it started.
    pub(super) fn kill_manager(&mut self) {
        let Some(manager) = &mut self.manager else { return };
        manager.exit_requested.get_or_insert(Instant::now());
        tracing::warn!(pid = manager.holder.pid, "killing the manager, which must be replaced");
        if manager.image == WhichRelease::To {
            kill_session(&self.home, manager.holder.pid, manager.holder.start_time);
        }
        if let Err(error) = manager.holder.kill() {
            tracing::error!(error = format!("{error:#}"), "cannot kill the manager");
        }
    }
}

#[cfg(test)]
mod tests;
