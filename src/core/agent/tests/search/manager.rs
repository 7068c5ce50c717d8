//! The manager's part, as in `spm::manager`: it plans, carries out actions, and restores the state at a start.

use std::collections::BTreeMap;

use super::super::*;
use super::model::{Done, Model, NEW, State, number_of, ordered, release_of, version_of};
use super::rules::is_skipped;
use crate::core::desired::DesiredState;
use crate::core::reconcile::{self, ReconcileStep};

impl Model {
    /// An input of the manager. `replans`: a new plan follows it.
    pub fn handle(&self, state: &mut State, event: AgentEvent, replans: bool) -> Done {
        let is_down = |state: &State| state.agent.as_ref().is_some_and(Agent::is_down_for_upgrade);
        state.replan |= replans;
        let was_down = is_down(state);
        self.send(state, event)?;
        state.replan |= was_down && !is_down(state);
        Ok(())
    }

    pub fn send(&self, state: &mut State, event: AgentEvent) -> Done {
        let at = self.at(state.now);
        let Some(agent) = &mut state.agent else { return Ok(()) };
        let actions = agent.step(event, at);
        self.perform(state, actions)
    }

    /// The manager's work until it waits for the next input.
    pub fn work(&self, state: &mut State) -> Done {
        if std::mem::take(&mut state.replan) && !state.home_stops {
            self.reconcile(state)?;
        }
        let Some(agent) = &state.agent else { return Ok(()) };
        if std::mem::take(&mut state.is_changed) {
            state.revision += 1;
            let next = Some((state.revision, agent.to_record()));
            if state.writing.is_some() {
                state.queued = next;
            } else {
                state.writing = next;
            }
        }
        Ok(())
    }

    fn reconcile(&self, state: &mut State) -> Done {
        let Some(agent) = &state.agent else { return Ok(()) };
        let (name, order) = (agent.name().clone(), ordered(state.order));
        let actual = BTreeMap::from([(name.clone(), agent.actual(Some(&order), state.now))]);
        let desired = DesiredState { agents: BTreeMap::from([(name, order)]), ..DesiredState::default() };
        for step in reconcile::plan(&desired, &actual) {
            if matches!(step, ReconcileStep::Discard { .. }) && (state.is_changed || state.writing.is_some()) {
                state.discard_waits = true;
                continue;
            }
            let event = match step {
                ReconcileStep::Stage { package, .. } => AgentEvent::Stage(package),
                ReconcileStep::Activate { order, .. } => AgentEvent::Activate(order),
                ReconcileStep::Configure { spec, .. } => {
                    AgentEvent::Configure { spec, spec_matches: state.record.is_some(), sound: Ok(()) }
                }
                ReconcileStep::Set { run, .. } => AgentEvent::Set(run),
                ReconcileStep::Uninstall { .. } => AgentEvent::Uninstall,
                ReconcileStep::Discard { version, .. } => AgentEvent::Discard(version),
            };
            self.send(state, event)?;
        }
        Ok(())
    }

    fn perform(&self, state: &mut State, actions: Vec<AgentAction>) -> Done {
        for action in actions {
            self.act(state, action)?;
        }
        Ok(())
    }

    fn act(&self, state: &mut State, action: AgentAction) -> Done {
        let Some(agent) = &state.agent else { return Ok(()) };
        match action {
            AgentAction::Stage { id, package } => state.staging.push((id, number_of(&package.version))),
            AgentAction::CancelStaging | AgentAction::Note(_) => {}
            AgentAction::Admit { version, .. } => {
                let on_probation = agent.ledger().probation().map(|release| &release.version);
                if number_of(&version) == NEW && on_probation != Some(&version) {
                    state.failed = 0;
                }
                if state.is_overruled || agent.ledger().overrules(&version, None, state.order.1) {
                    return Err("an overruled order is followed");
                }
                state.is_admitting = true;
            }
            AgentAction::Record { wait } => {
                state.is_changed = true;
                if wait {
                    state.recorded_with = Some(state.revision + 1);
                }
            }
            AgentAction::RaiseEpoch(release) => {
                if number_of(&release.version) == NEW && !self.scenario.kind.passes() {
                    return Err("the epoch of a bad release is raised");
                }
            }
            AgentAction::Switch(version) => {
                if state.process.is_some() && !state.survived_stop {
                    return Err("the link is changed while the previous release runs");
                }
                self.is_durable(state, &version, agent, false)?;
                state.is_switching = true;
            }
            AgentAction::Remove => return Err("the sub-agent is removed"),
            AgentAction::Discard(version) => {
                let number = number_of(&version);
                if state.process.is_some_and(|process| process.version == number) {
                    return Err("the files of the running release are removed");
                }
                let is_kept = state.whole.has(number) && state.disk.kept().any(|kept| *kept == version);
                if is_kept && !state.is_unsaved {
                    return Err("a release is removed that the ledger on disk keeps");
                }
                state.discarding = state.discarding.with(number);
            }
            AgentAction::Inspect(version) => state.inspecting.push(number_of(&version)),
            AgentAction::Start => {
                let (Some(version), Some(_)) = (agent.current().cloned(), agent.program()) else {
                    return Err("a start is requested that cannot be carried out");
                };
                if state.launching.is_some() || state.process.is_some() && !state.survived_stop {
                    return Err("a second process is launched");
                }
                self.is_durable(state, &version, agent, true)?;
                state.launching = Some(number_of(&version));
            }
            AgentAction::Stop => state.is_stopping = true,
            AgentAction::Check => state.is_checking = true,
            AgentAction::CancelCheck => state.is_checking = false,
        }
        Ok(())
    }

    /// The ledger on disk must include a release before it is used. A roll back and a restart do not wait for a disk that cannot be written, and
    /// the active release may be restarted while another is recorded.
    fn is_durable(&self, state: &State, version: &Version, agent: &Agent, starts: bool) -> Done {
        let is = |release: Option<&LedgerRelease>| release.is_some_and(|release| release.version == *version);
        let restarts = starts && agent.rolled_back.is_none();
        let may = is(state.disk.current()) || is(state.disk.active()) && restarts;
        let is_activation = matches!(agent.activity, Activity::Switching { .. });
        match may || !is_activation && (state.is_unsaved || state.is_entry_unwritten) {
            true => Ok(()),
            false => Err("a release is used that the ledger on disk does not name"),
        }
    }

    /// A new manager restores the state that it finds.
    pub fn take_charge(&self, state: &mut State) -> Done {
        state.home_stops = false;
        (state.revision, state.is_unsaved, state.replan) = (0, false, true);
        // A new admission that is not on disk did not happen.
        state.failed = state.failed.max(state.disk.probation_failures());
        let mut ledger = state.disk.clone();
        ledger.drop_incomplete(|version| state.whole.has(number_of(version)));
        let running = state.process.map(|process| process.version);
        if let Some(running) = running.filter(|running| state.whole.has(*running)) {
            ledger.resume(&release_of(running));
        }
        state.is_changed = ledger != state.disk;
        (state.is_entry_unwritten, state.discard_waits) = (state.is_changed, false);
        let current = ledger.current().map(|release| number_of(&release.version));
        let recorded = state.record.map(|record| record.version);
        let unfinished = state.partial.all().filter(|version| Some(*version) != recorded).map(version_of);
        let found = Discovery {
            ledger,
            releases: state.whole.versions(),
            unfinished: unfinished.collect(),
            program: current.map(|current| Ok(self.program(current))),
            restarts: 0,
            order: Some(ordered(state.order)),
        };
        let (agent, actions) = Agent::restore("a".parse().unwrap(), found);
        state.is_skipped_on_disk |= is_skipped(agent.ledger(), NEW);
        state.agent = Some(agent);
        self.perform(state, actions)?;
        let (at, spec) = (self.at(state.now), Spec::default());
        let Some(agent) = &mut state.agent else { return Ok(()) };
        let actions = match (state.process, state.record) {
            (Some(process), _) => agent.adopt(9, version_of(process.version), process.since, Some(spec), at),
            (None, Some(record)) => {
                let version = version_of(record.version);
                let is_wanted = record.version == state.order.0 && agent.current() == Some(&version);
                // An exit that no manager saw counts as a failure.
                let is_unseen = record.ended.is_none();
                state.failed += u64::from(is_unseen && record.version == NEW);
                state.is_suspect |= is_unseen && record.version != 1;
                let end = PriorExit {
                    success: record.ended.flatten(),
                    how: "it exited".to_owned(),
                    was_seen: record.ended.is_some(),
                };
                agent.adopt_exited(9, version, end, is_wanted.then_some(spec), at)
            }
            (None, None) => vec![],
        };
        self.perform(state, actions)?;
        if state.process.is_none()
            && !state.is_stopping
            && let Some(record) = &mut state.record
        {
            record.ended.get_or_insert(None);
        }
        Ok(())
    }
}
