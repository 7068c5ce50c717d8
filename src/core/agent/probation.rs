//! The probation of a new release: committed when it has proven itself, or given up for the release before it.
//!
//! ```text
//!              runs for its probation without a break, and is well           down and recorded        switched
//!  on probation ────────────────────────────────────────────▶ committed
//!       │ condemned, or an operator wants the release before
//!       └────────▶ Returning (ledger: rolled back and skipped; it is stopped) ────▶ SwitchingBack ────▶ the one before runs
//! ```
//!
//! A release is condemned when it has failed [`TRIES`] times, when its second start does not live longer than the first one, and when it is
//! not well in time ([`Program::patience`](crate::core::program::Program::patience)). To fail is to exit, not to start, or to be unhealthy too often. A stop on purpose is no failure.
//! A start that fails because the home cannot be relied on, or because the host is short of descriptors, memory or processes, is none
//! either, and the time until the next start does not count. A home that cannot be written rolls back all the same: what could not be
//! written is written later.
//! An end that no manager saw is a failure, and one that an earlier manager saw is counted already. `tests/search.rs` looks for a
//! counterexample.

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

/// So many failures condemn a release.
pub(super) const TRIES: u64 = 3;

/// Why a release makes way that did not fail.
const REQUESTED: &str = "requested by an operator";

/// What this manager has seen of the probation of the current release.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ProbationProgress {
    /// When the activation began, or the process was started that this manager adopted.
    pub(super) began: Option<Instant>,
    /// Since when this manager waits for it to be well. The time does not count while it is stopped, while no manager runs, or while it cannot
    /// be started for reasons that are not its own.
    pub(super) waits_since: Option<Instant>,
    /// Since when its process runs.
    pub(super) up_since: Option<Instant>,
    /// How long its last process lived that failed.
    pub(super) last_life: Option<Duration>,
    /// Its last start failed, and that says nothing about the release.
    pub(super) is_excused: bool,
    /// Its process has ended as it is meant to.
    pub(super) is_done: bool,
}

impl ProbationProgress {
    pub(super) fn began(at: Instant) -> ProbationProgress {
        ProbationProgress { began: Some(at), ..ProbationProgress::default() }
    }
}

/// A release that makes way for the one before it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rollback {
    pub(super) from: Version,
    pub(super) to: Version,
    pub(super) why: String,
    began: Instant,
    /// The ledger that says so is written, or cannot be.
    pub(super) recorded: bool,
}

impl Agent {
    /// Whether the current release is on probation and is to run.
    pub(super) fn is_on_probation(&self) -> bool {
        self.ledger.probation().is_some() && self.run == Run::Start && !self.home_stops
    }

    /// A process of this release runs since then.
    pub(super) fn probation_is_up(&mut self, version: &Version, since: Instant) {
        if self.ledger.probation().is_some_and(|release| release.version == *version) {
            self.seen.began.get_or_insert(since);
            self.seen.up_since = Some(since);
            self.seen.is_excused = false;
        }
    }

    /// Its process was stopped on purpose.
    pub(super) fn probation_is_down(&mut self) {
        self.seen.up_since = None;
    }

    /// Whether an end of its process is the one that it is meant to come to.
    pub(super) fn is_done_by(&self, success: Option<bool>) -> bool {
        success == Some(true) && self.restart_policy() != Restart::Always
    }

    fn restart_policy(&self) -> Restart {
        self.program.as_ref().map_or(Restart::Always, |program| program.policy().restart)
    }

    /// A start has failed. `None`: that condemns nothing.
    pub(super) fn start_failed(
        &mut self,
        refusal: &ReleaseError,
        at: Moment,
        actions: &mut Vec<AgentAction>,
    ) -> Option<Vec<AgentAction>> {
        self.seen.is_excused = !refusal.is_of_release() && holds(Guard::RefusedStartPauses);
        if self.seen.is_excused { None } else { self.fail_probation(&refusal.why, at, actions) }
    }

    /// The release on probation has failed. `None`: that does not condemn it, or nothing is on probation.
    pub(super) fn fail_probation(
        &mut self,
        how: &str,
        at: Moment,
        actions: &mut Vec<AgentAction>,
    ) -> Option<Vec<AgentAction>> {
        if !self.is_on_probation() {
            return None;
        }
        // To be written in any case: the next manager goes by it.
        if holds(Guard::FailureIsWritten) {
            actions.push(AgentAction::Record { wait: false });
        }
        let life = self.seen.up_since.take().map_or(Duration::ZERO, |since| at.now.saturating_duration_since(since));
        let failures = self.ledger.fail_probation();
        let is_no_better = self.seen.last_life.replace(life).is_some_and(|last| life <= last);
        let is_left = self.restart_policy() == Restart::Never;
        let is_left_to_try = failures < TRIES || !holds(Guard::TriesBudget);
        if is_left_to_try && !is_no_better && !is_left {
            return None;
        }
        let times = if failures == 1 { "once".to_owned() } else { format!("{failures} times") };
        self.condemn(format!("it failed {times} on probation: {how}"), at)
    }

    /// What follows for the release on probation from how its process is now. `actions`: asked for in this step.
    pub(super) fn judge(&mut self, at: Moment, actions: &mut Vec<AgentAction>) {
        // A stop may take as long as its grace period.
        let stops = self.supervisor.is_stopping() && holds(Guard::StopPauses);
        if !self.is_on_probation() || self.is_busy() || stops || self.seen.is_excused {
            self.seen.waits_since = None;
            return;
        }
        self.seen.waits_since.get_or_insert(at.now);
        let passed = self.passes_at().is_some_and(|passes| passes <= at.now || !holds(Guard::LifeBeforeCommit));
        let is_done = self.seen.is_done && self.supervisor.is_done();
        let is_well = self.supervisor.is_well() || self.supervisor.is_up() && !holds(Guard::WellBeforeCommit);
        // A start that is asked for goes by the current release, so that this stays until it is under way.
        let starts = actions.contains(&AgentAction::Start) && holds(Guard::StartBeforeReturn);
        if is_done || passed && is_well {
            self.commit(at, actions);
        } else if !starts && self.gives_up_at().is_some_and(|end| end <= at.now) {
            let why = self.supervisor.last_error().unwrap_or("it does not run").to_owned();
            actions.extend(self.condemn(format!("it was not well in time: {why}"), at).unwrap_or_default());
        }
    }

    /// When the probation is over for a process that is well.
    fn passes_at(&self) -> Option<Instant> {
        self.seen.up_since.map(|since| since + self.judged_as().probation())
    }

    /// When the release is given up unless it is well; `None`: there is nothing to go back to.
    pub(super) fn gives_up_at(&self) -> Option<Instant> {
        self.ledger.before_probation()?;
        let program = self.judged_as();
        let waits_since = self.seen.waits_since.filter(|_| holds(Guard::TimeBudget));
        waits_since.map(|since| since + program.probation() + program.patience())
    }

    /// One that cannot be read is given as much time as one that says nothing of it.
    fn judged_as(&self) -> &Program {
        self.program.as_ref().unwrap_or(&Program::Script)
    }

    /// When there is something to judge without anything happening.
    pub(super) fn judged_at(&self) -> Option<Instant> {
        if !self.is_on_probation() || self.is_busy() {
            return None;
        }
        let passes = self.passes_at().filter(|_| self.supervisor.is_well());
        [passes, self.gives_up_at()].into_iter().flatten().min()
    }

    pub(super) fn commit(&mut self, at: Moment, actions: &mut Vec<AgentAction>) {
        let from = self.ledger.before_probation().map(|release| release.version.clone());
        if !self.ledger.commit() {
            return;
        }
        let seen = std::mem::take(&mut self.seen);
        actions.push(AgentAction::Record { wait: false });
        let Some(active) = self.ledger.active().cloned() else { return };
        let seconds = seen.began.map_or(0, |began| at.now.saturating_duration_since(began).as_secs());
        let was = from.as_ref().map(|from| format!(" from {from}")).unwrap_or_default();
        let message = format!("{} is upgraded{was} to {}", self.name, active.version);
        let change = ReleaseChange { from, to: active.version.clone(), seconds };
        actions.push(AgentAction::RaiseEpoch(active));
        actions.push(AgentAction::Note(JournalNote::change("upgrade", "ok", change, message)));
    }

    /// Gives the release on probation up and skips it. `None`: there is nothing to go back to, and it goes on.
    fn condemn(&mut self, why: String, at: Moment) -> Option<Vec<AgentAction>> {
        if self.is_busy() {
            // Another release takes its place already, or it is being removed.
            return None;
        }
        let bad = self.ledger.probation()?.clone();
        let to = self.ledger.before_probation()?.version.clone();
        let why = cut(&why, MAX_MESSAGE_BYTES);
        let began = self.seen.began.unwrap_or(at.now);
        let failures = u32::try_from(self.ledger.probation_failures()).unwrap_or(u32::MAX);
        let seconds = at.now.saturating_duration_since(began).as_secs();
        let change = || ReleaseChange { from: Some(to.clone()), to: bad.version.clone(), seconds };
        let failed = format!("{} {} is rolled back to {to}: {why}", self.name, bad.version);
        let mut actions = vec![AgentAction::Note(JournalNote::change("upgrade", "failed", change(), failed))];
        self.ledger.roll_back();
        // Where another release is ordered, nothing tries this one again.
        let asked = self
            .order
            .as_ref()
            .map(Order::asks_for)
            .filter(|(version, sha256, _)| bad.is_asked(version, *sha256) || !holds(Guard::SkipWhatIsOrdered));
        if let Some((.., retry)) = asked
            && holds(Guard::SkipOnRollBack)
        {
            let skipped = format!(
                "{} {} is not tried again until another release is ordered, or `control retry {}`: {why}",
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
        actions.extend(self.make_way(bad.version, to, why, began, at));
        Some(actions)
    }

    /// The release before the current one, for an operator; `None`: there is none.
    pub fn can_return_to(&self) -> Option<&Version> {
        let before =
            if self.ledger.probation().is_some() { self.ledger.before_probation() } else { self.ledger.backup() };
        before.map(|release| &release.version)
    }

    /// An operator wants the release before the current one. `overruled`: the order that says otherwise.
    pub(super) fn return_for_operator(&mut self, overruled: Option<&Order>, at: Moment) -> Vec<AgentAction> {
        let (Some(to), Some(from)) = (self.can_return_to().cloned(), self.current().cloned()) else { return vec![] };
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
        self.make_way(from, to, REQUESTED.to_owned(), at.now, at)
    }

    /// What is skipped, held back or overruled counts again.
    pub(super) fn try_again(&mut self) -> Vec<AgentAction> {
        let is_changed = self.ledger.allow_all() | self.ledger.release_hold();
        if matches!(self.work, Activity::Held(_)) {
            self.work = Activity::Idle;
            self.error = None;
        }
        if is_changed { vec![AgentAction::Record { wait: false }] } else { vec![] }
    }

    fn make_way(&mut self, from: Version, to: Version, why: String, began: Instant, at: Moment) -> Vec<AgentAction> {
        let mut actions = self.cancel_staging();
        self.ledger.give_up(from.clone());
        self.seen = ProbationProgress::default();
        // How the one before is run is read when it is started.
        self.program = None;
        self.error = None;
        self.work = Activity::Returning(Box::new(Rollback { from, to, why, began, recorded: false }));
        actions.push(AgentAction::Record { wait: true });
        actions.extend(self.feed(supervise::SupervisorEvent::Rest, at));
        actions
    }

    /// An earlier manager has died before this process, of a release that made way, was down.
    pub(super) fn resume_return(&mut self, from: Version, at: Moment) -> Option<Vec<AgentAction>> {
        let to = self.current().filter(|_| self.ledger.has_given_up(&from) && holds(Guard::ResumeReturns))?.clone();
        let skipped = self
            .ledger
            .skipped_for_good()
            .find(|skipped| skipped.version == from)
            .map(|skipped| skipped.reason.clone());
        let why = skipped.unwrap_or_else(|| REQUESTED.to_owned());
        Some(self.make_way(from, to, why, at.now, at))
    }

    /// The ledger that says that the release before is the current one is written, or cannot be: then it is written later.
    pub(super) fn return_is_recorded(&mut self) {
        if let Activity::Returning(back) = &mut self.work {
            back.recorded = true;
        }
    }

    /// The release that made way is down.
    pub(super) fn switch_back(&mut self, back: Box<Rollback>) -> Vec<AgentAction> {
        if !back.recorded && holds(Guard::RecordBeforeReturn) {
            self.work = Activity::Returning(back);
            return vec![];
        }
        let to = back.to.clone();
        self.work = Activity::SwitchingBack(back);
        vec![AgentAction::Switch(to)]
    }

    /// The link names the release before again, or could not be changed: the ledger beats it.
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
        self.returned = Some(back);
        if starts {
            actions.extend(self.feed(supervise::SupervisorEvent::Run, at));
        } else {
            actions.extend(self.note_returned(at));
        }
        actions
    }

    /// The release before runs again.
    pub(super) fn note_returned(&mut self, at: Moment) -> Option<AgentAction> {
        let back = self.returned.take()?;
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
