//! The rules that hold in every state, and when a change of release is complete.

use super::super::super::Activity;
use super::super::*;
use super::model::{Kind, Model, NEW, Ordered, State, Violation, number_of, ordered, version_of};
use crate::core::ledger::{LedgerEntry, SkippedRelease};

impl Model {
    /// The rule that a state breaks.
    pub fn violation_of(&self, state: &State) -> Option<Violation> {
        let is_bad = !self.scenario.kind.passes();
        let number = |release: Option<&LedgerRelease>| release.map(|release| number_of(&release.version));
        let lies = |release: Option<&LedgerRelease>| number(release).is_none_or(|number| state.whole.has(number));
        if number(state.disk.active()) == Some(NEW) && is_bad {
            return Some("a bad release is committed on disk");
        }
        if !lies(state.disk.active()) {
            return Some("the active release is not complete");
        }
        let skips_active = |entry: &LedgerEntry| number(entry.active()).is_some_and(|active| is_skipped(entry, active));
        if skips_active(&state.disk) {
            return Some("the active release is skipped on disk");
        }
        let agent = state.agent.as_ref()?;
        let (ledger, to_record) = (agent.ledger(), agent.to_record());
        if number(ledger.active()) == Some(NEW) && is_bad {
            return Some("a bad release is committed");
        }
        if !lies(ledger.active()) || !lies(ledger.backup()) || !lies(ledger.probation()) {
            return Some("a release of the ledger is not complete");
        }
        if number(ledger.active()) != Some(1) && ledger.backup().is_none() {
            return Some("there is no release to roll back to");
        }
        if skips_active(ledger) {
            return Some("the active release is skipped");
        }
        if ledger.probation().is_some() && number(ledger.probation()) == number(ledger.active()) {
            return Some("the active release is on probation");
        }
        if number(ledger.backup()).is_some() && number(ledger.backup()) == number(ledger.active()) {
            return Some("the active release is its own backup");
        }
        let newest = state.queued.as_ref().or(state.writing.as_ref()).map_or(&state.disk, |(_, entry)| entry);
        if *newest != to_record && !(state.is_unsaved && state.writing.is_none()) {
            return Some("the ledger is changed without a write");
        }
        if number(ledger.probation()) == Some(NEW) && ledger.probation_failures() > state.failed {
            return Some("a failure is counted twice");
        }
        if state.is_skipped_on_disk && number(to_record.current()) == Some(NEW) {
            return Some("a skipped release is tried again");
        }
        if !is_bad && !state.is_suspect && is_skipped(ledger, NEW) {
            return Some("a good release is skipped");
        }
        let Ordered(version, retry) = state.order;
        let outlives = |skipped: &SkippedRelease| number_of(&skipped.version) != version || skipped.retry < retry;
        if ledger.permanently_skipped().any(outlives) {
            return Some("a skip outlives its order");
        }
        if ledger.is_held() && !ledger.overrules(&version_of(version), None, retry) {
            return Some("a hold outlives its order");
        }
        if agent.supervisor().is_up() != (state.process.is_some() && !state.survived_stop && !state.is_stopping) {
            return Some("the process differs from the one of the manager");
        }
        None
    }

    /// Everything is as ordered, and stays so.
    pub fn is_end(&self, state: &State) -> bool {
        let Some(agent) = &state.agent else { return false };
        let is_quiet = state.writing.is_none()
            && !state.is_unsaved
            && state.launching.is_none()
            && !(state.is_stopping || state.is_checking || state.is_admitting || state.is_switching)
            && state.inspecting.is_empty()
            && state.discarding.0 == 0
            && !state.home_stops;
        let ledger = agent.ledger();
        let active = ledger.active().map(|release| number_of(&release.version));
        let runs = state.process.is_some_and(|process| Some(process.version) == active && agent.supervisor().is_up());
        let is_done = self.scenario.kind == Kind::Job && active == Some(NEW) && agent.supervisor().is_done();
        let Ordered(version, _) = state.order;
        let stays = agent.actual(Some(&ordered(state.order)), state.now).stays;
        let is_awaited = version == NEW
            && self.scenario.kind == Kind::CannotBeFetched
            && agent.deadline(state.now).is_some_and(|retry| retry > state.now);
        let is_answered = active == Some(version) || stays || is_skipped(ledger, version) || is_awaited;
        let rests =
            is_awaited || state.staging.is_empty() && matches!(agent.activity, Activity::Idle | Activity::Held(_));
        is_quiet
            && ledger.probation().is_none()
            && agent.rolled_back.is_none()
            && (runs || is_done)
            && is_answered
            && rests
    }

    /// Whether a good release without an objection is ordered.
    pub fn is_to_be_committed(&self, state: &State) -> bool {
        let agent = state.agent.as_ref();
        let written = [&state.writing, &state.queued].into_iter().flatten().map(|(_, entry)| entry);
        let stays = agent.map(Agent::ledger).into_iter().chain([&state.disk]).chain(written).any(LedgerEntry::is_held);
        let may = !stays && !state.is_suspect && !agent.is_some_and(|agent| is_skipped(agent.ledger(), state.order.0));
        may && (self.scenario.kind.passes() || state.order.0 != NEW)
    }
}

/// Skipped until another release is ordered.
pub fn is_skipped(entry: &LedgerEntry, number: u8) -> bool {
    entry.permanently_skipped().any(|skipped| number_of(&skipped.version) == number)
}
