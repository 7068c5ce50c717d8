//! The probation of a new release: it is committed once it has run long enough, or rolled back to the previous release.
//!
//! ```text
//!              ran for the probation time without an exit, and is healthy
//!  on probation ────────────────────────────────────────────▶ committed
//!       │ failed, or an operator requests the previous release         down and recorded        switched
//!       └────────▶ RollingBack (ledger: rolled back and skipped; it is stopped) ──▶ SwitchingBack ──▶ the previous release runs
//! ```
//!
//! A release is rolled back in each of three cases: after [`MAX_FAILURES`] failures; if its second process does not live longer than the
//! first; if it is not healthy in time ([`Program::patience`](crate::core::program::Program::patience)). Failures are: an exit, a failed
//! start, being unhealthy too often. A requested stop is not a failure, nor is a start that fails because the home is not safe or the host is
//! short of descriptors, memory or processes; the time until the next start is not counted as probation. If the home cannot be written, the
//! roll back happens all the same and the ledger is written later.
//!
//! An exit that no manager saw is a failure; one that a previous manager saw is already counted. `tests/search.rs` searches for a sequence
//! of events that breaks these rules.

use std::time::{Duration, Instant};

use super::event::{AgentAction, JournalNote, ReleaseChange, ReleaseError};
use super::{Activity, Agent, Moment};
use crate::core::guards::{Guard, holds};
use crate::core::ledger::{OverruledOrder, SkippedRelease};
use crate::core::manifest::Restart;
use crate::core::model::Version;
use crate::core::order::{Order, Run};
use crate::core::program::Program;
use crate::core::supervise;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};

/// A release is rolled back after this many failures.
pub(super) const MAX_FAILURES: u64 = 3;

/// The reason of a roll back that an operator requested.
const REQUESTED: &str = "requested by an operator";

/// What this manager has observed of the current release's probation.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ProbationProgress {
    /// When the activation began, or when the adopted process was started.
    pub(super) began: Option<Instant>,
    /// Since when this manager waits for it to become healthy. The time does not count while the release is stopped, while no manager runs, or
    /// while it cannot be started for reasons outside the release.
    pub(super) waits_since: Option<Instant>,
    /// Since when its process runs.
    pub(super) up_since: Option<Instant>,
    /// How long its last failed process lived.
    pub(super) last_life: Option<Duration>,
    /// Its last start failed for a reason outside the release.
    pub(super) is_excused: bool,
    /// Its process exited as its restart policy expects.
    pub(super) is_done: bool,
}

impl ProbationProgress {
    pub(super) fn began(at: Instant) -> ProbationProgress {
        ProbationProgress { began: Some(at), ..ProbationProgress::default() }
    }
}

/// A roll back to the previous release.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rollback {
    pub(super) from: Version,
    pub(super) to: Version,
    pub(super) why: String,
    began: Instant,
    /// The ledger with the roll back is written, or cannot be.
    pub(super) recorded: bool,
}

impl Agent {
    /// Whether the current release is on probation and is to run.
    pub(super) fn is_on_probation(&self) -> bool {
        self.ledger.probation().is_some() && self.run == Run::Start && !self.home_stops
    }

    /// A process of this release runs since `since`.
    pub(super) fn probation_started(&mut self, version: &Version, since: Instant) {
        if self.ledger.probation().is_some_and(|release| release.version == *version) {
            self.progress.began.get_or_insert(since);
            self.progress.up_since = Some(since);
            self.progress.is_excused = false;
        }
    }

    /// Its process was stopped by request.
    pub(super) fn probation_stopped(&mut self) {
        self.progress.up_since = None;
    }

    /// Whether an exit with this result is the expected one.
    pub(super) fn is_expected_exit(&self, success: Option<bool>) -> bool {
        success == Some(true) && self.restart_policy() != Restart::Always
    }

    fn restart_policy(&self) -> Restart {
        self.program.as_ref().map_or(Restart::Always, |program| program.policy().restart)
    }

    /// Handles a failed start. `None`: no roll back follows.
    pub(super) fn start_failed(
        &mut self,
        refusal: &ReleaseError,
        at: Moment,
        actions: &mut Vec<AgentAction>,
    ) -> Option<Vec<AgentAction>> {
        self.progress.is_excused = !refusal.is_release_fault() && holds(Guard::ExcusedStartPausesTime);
        if self.progress.is_excused { None } else { self.fail_probation(&refusal.why, at, actions) }
    }

    /// Counts a failure of the release on probation. `None`: no roll back follows, or nothing is on probation.
    pub(super) fn fail_probation(
        &mut self,
        how: &str,
        at: Moment,
        actions: &mut Vec<AgentAction>,
    ) -> Option<Vec<AgentAction>> {
        if !self.is_on_probation() {
            return None;
        }
        // Always written, because the next manager needs the count.
        if holds(Guard::FailureIsRecorded) {
            actions.push(AgentAction::Record { wait: false });
        }
        let life =
            self.progress.up_since.take().map_or(Duration::ZERO, |since| at.now.saturating_duration_since(since));
        let failures = self.ledger.fail_probation();
        let is_shorter_lived = self.progress.last_life.replace(life).is_some_and(|last| life <= last);
        let never_restarts = self.restart_policy() == Restart::Never;
        let has_tries_left = failures < MAX_FAILURES || !holds(Guard::FailureLimit);
        if has_tries_left && !is_shorter_lived && !never_restarts {
            return None;
        }
        let times = if failures == 1 { "once".to_owned() } else { format!("{failures} times") };
        self.roll_back_failed(format!("it failed {times} on probation: {how}"), at)
    }

    /// Commits the release on probation or rolls it back, if either is due. `actions`: of this step so far.
    pub(super) fn decide_probation(&mut self, at: Moment, actions: &mut Vec<AgentAction>) {
        // A stop may take as long as its grace period.
        let stops = self.supervisor.is_stopping() && holds(Guard::StopPausesTime);
        if !self.is_on_probation() || self.is_busy() || stops || self.progress.is_excused {
            self.progress.waits_since = None;
            return;
        }
        self.progress.waits_since.get_or_insert(at.now);
        let passed = self.passes_at().is_some_and(|passes| passes <= at.now || !holds(Guard::UptimeBeforeCommit));
        let is_done = self.progress.is_done && self.supervisor.is_done();
        let is_well = self.supervisor.is_healthy() || self.supervisor.is_up() && !holds(Guard::HealthyBeforeCommit);
        // A requested start uses the current release, so do not change the release until it is under way.
        let starts = actions.contains(&AgentAction::Start) && holds(Guard::StartBeforeRollback);
        if is_done || passed && is_well {
            self.commit(at, actions);
        } else if !starts && self.rolls_back_at().is_some_and(|end| end <= at.now) {
            let why = self.supervisor.last_error().unwrap_or("it is not running").to_owned();
            actions.extend(
                self.roll_back_failed(format!("it did not become healthy in time: {why}"), at).unwrap_or_default(),
            );
        }
    }

    /// When a healthy process completes the probation.
    fn passes_at(&self) -> Option<Instant> {
        self.progress.up_since.map(|since| since + self.probation_program().probation())
    }

    /// When the release is rolled back unless it is healthy. `None`: there is no previous release.
    pub(super) fn rolls_back_at(&self) -> Option<Instant> {
        self.ledger.before_probation()?;
        let program = self.probation_program();
        let waits_since = self.progress.waits_since.filter(|_| holds(Guard::TimeLimit));
        waits_since.map(|since| since + program.probation() + program.patience())
    }

    /// The program whose limits apply. If the manifest cannot be read, the limits of a script package do.
    fn probation_program(&self) -> &Program {
        self.program.as_ref().unwrap_or(&Program::Script)
    }

    /// When the next commit or roll back can be due.
    pub(super) fn probation_deadline(&self) -> Option<Instant> {
        if !self.is_on_probation() || self.is_busy() {
            return None;
        }
        let passes = self.passes_at().filter(|_| self.supervisor.is_healthy());
        [passes, self.rolls_back_at()].into_iter().flatten().min()
    }

    pub(super) fn commit(&mut self, at: Moment, actions: &mut Vec<AgentAction>) {
        let from = self.ledger.before_probation().map(|release| release.version.clone());
        if !self.ledger.commit() {
            return;
        }
        let seen = std::mem::take(&mut self.progress);
        actions.push(AgentAction::Record { wait: false });
        let Some(active) = self.ledger.active().cloned() else { return };
        let seconds = seen.began.map_or(0, |began| at.now.saturating_duration_since(began).as_secs());
        let was = from.as_ref().map(|from| format!(" from {from}")).unwrap_or_default();
        let message = format!("{} is upgraded{was} to {}", self.name, active.version);
        let change = ReleaseChange { from, to: active.version.clone(), seconds };
        actions.push(AgentAction::RaiseEpoch(active));
        actions.push(AgentAction::Note(JournalNote::change("upgrade", "ok", change, message)));
    }

    /// Rolls the release on probation back and skips it. `None`: there is no previous release, so it stays.
    fn roll_back_failed(&mut self, why: String, at: Moment) -> Option<Vec<AgentAction>> {
        if self.is_busy() {
            // It is being replaced or removed already.
            return None;
        }
        let bad = self.ledger.probation()?.clone();
        let to = self.ledger.before_probation()?.version.clone();
        let why = cut(&why, MAX_MESSAGE_BYTES);
        let began = self.progress.began.unwrap_or(at.now);
        let failures = u32::try_from(self.ledger.probation_failures()).unwrap_or(u32::MAX);
        let seconds = at.now.saturating_duration_since(began).as_secs();
        let change = || ReleaseChange { from: Some(to.clone()), to: bad.version.clone(), seconds };
        let failed = format!("{} {} is rolled back to {to}: {why}", self.name, bad.version);
        let mut actions = vec![AgentAction::Note(JournalNote::change("upgrade", "failed", change(), failed))];
        self.ledger.roll_back();
        // If a different release is ordered, nothing tries this one again, so it is not skipped.
        let asked = self
            .order
            .as_ref()
            .map(Order::asks_for)
            .filter(|(version, sha256, _)| bad.matches(version, *sha256) || !holds(Guard::SkipOnlyOrdered));
        if let Some((.., retry)) = asked
            && holds(Guard::SkipOnRollBack)
        {
            let skipped = format!(
                "{} {} is skipped until another release is ordered or `control retry {}` is run: {why}",
                self.name, bad.version, self.name
            );
            actions.push(AgentAction::Note(JournalNote::change("skip", "ok", change(), skipped)));
            self.ledger.skip(SkippedRelease {
                version: bad.version.clone(),
                sha256: bad.sha256.clone(),
                reason: why.clone(),
                failures,
                until: None,
                retry,
                unknown: Default::default(),
            });
        }
        actions.extend(self.begin_rollback(bad.version, to, why, began, at));
        Some(actions)
    }

    /// The release that an operator can roll back to, if there is one.
    pub fn rollback_target(&self) -> Option<&Version> {
        let before =
            if self.ledger.probation().is_some() { self.ledger.before_probation() } else { self.ledger.backup() };
        before.map(|release| &release.version)
    }

    /// Rolls back for an operator. `overruled`: the order that this contradicts.
    pub(super) fn roll_back_for_operator(&mut self, overruled: Option<&Order>, at: Moment) -> Vec<AgentAction> {
        let (Some(to), Some(from)) = (self.rollback_target().cloned(), self.current().cloned()) else { return vec![] };
        if self.ledger.probation().is_some() {
            self.ledger.roll_back();
        } else {
            self.ledger.return_to_backup();
        }
        if let Some(order) = overruled
            && holds(Guard::HoldForOperator)
        {
            let (version, sha256, retry) = order.asks_for();
            let (version, sha256) = (version.clone(), sha256.cloned());
            self.ledger.hold(OverruledOrder { version, sha256, retry, unknown: Default::default() });
        }
        self.begin_rollback(from, to, REQUESTED.to_owned(), at.now, at)
    }

    /// Clears all skips, holds and overruled orders.
    pub(super) fn clear_holds(&mut self) -> Vec<AgentAction> {
        let is_changed = self.ledger.clear_skips() | self.ledger.release_hold();
        if matches!(self.activity, Activity::Held(_)) {
            self.activity = Activity::Idle;
            self.error = None;
        }
        if is_changed { vec![AgentAction::Record { wait: false }] } else { vec![] }
    }

    fn begin_rollback(
        &mut self,
        from: Version,
        to: Version,
        why: String,
        began: Instant,
        at: Moment,
    ) -> Vec<AgentAction> {
        let mut actions = self.cancel_staging();
        self.ledger.give_up(from.clone());
        self.progress = ProbationProgress::default();
        // How the previous release is run is read when it is started.
        self.program = None;
        self.error = None;
        self.activity = Activity::RollingBack(Box::new(Rollback { from, to, why, began, recorded: false }));
        actions.push(AgentAction::Record { wait: true });
        actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Stop, at));
        actions
    }

    /// Continues a roll back whose manager exited before the process of the failed release was down.
    pub(super) fn resume_rollback(&mut self, from: Version, at: Moment) -> Option<Vec<AgentAction>> {
        let to = self.current().filter(|_| self.ledger.has_given_up(&from) && holds(Guard::ResumeRollback))?.clone();
        let skipped = self
            .ledger
            .permanently_skipped()
            .find(|skipped| skipped.version == from)
            .map(|skipped| skipped.reason.clone());
        let why = skipped.unwrap_or_else(|| REQUESTED.to_owned());
        Some(self.begin_rollback(from, to, why, at.now, at))
    }

    /// The ledger with the roll back is written, or cannot be: then it is written later.
    pub(super) fn rollback_is_recorded(&mut self) {
        if let Activity::RollingBack(back) = &mut self.activity {
            back.recorded = true;
        }
    }

    /// The release that was rolled back is down.
    pub(super) fn switch_back(&mut self, back: Box<Rollback>) -> Vec<AgentAction> {
        if !back.recorded && holds(Guard::RecordBeforeSwitchBack) {
            self.activity = Activity::RollingBack(back);
            return vec![];
        }
        let to = back.to.clone();
        self.activity = Activity::SwitchingBack(back);
        vec![AgentAction::Switch(to)]
    }

    /// The link names the previous release again, or could not be changed; the ledger takes precedence over it.
    pub(super) fn switched_back(
        &mut self,
        back: Box<Rollback>,
        result: Result<(), String>,
        at: Moment,
    ) -> Vec<AgentAction> {
        let mut actions = vec![];
        if let Err(why) = result {
            actions.push(AgentAction::Note(JournalNote::once("rollback", "failed", Some(back.to.clone()), why)));
        }
        let starts = self.run == Run::Start && !self.home_stops;
        self.rolled_back = Some(back);
        if starts {
            actions.extend(self.notify_supervisor(supervise::SupervisorEvent::Run, at));
        } else {
            actions.extend(self.note_rollback(at));
        }
        actions
    }

    /// Reports a completed roll back once the restored release runs.
    pub(super) fn note_rollback(&mut self, at: Moment) -> Option<AgentAction> {
        let back = self.rolled_back.take()?;
        let Rollback { from, to, why, began, .. } = *back;
        let seconds = at.now.saturating_duration_since(began).as_secs();
        let message = format!("{} was rolled back from {from} to {to}: {why}", self.name);
        Some(AgentAction::Note(JournalNote::change(
            "rollback",
            "ok",
            ReleaseChange { from: Some(from), to, seconds },
            message,
        )))
    }
}
