//! Visits every state that an upgrade can reach under any sequence of events: no state breaks a rule, and from each the upgrade completes.

mod model;

use std::collections::HashMap;

use super::*;
pub use model::image;
use model::{File, Interference, Kind, Model, Outcome, Scenario, State};

/// More states than any search visits. Above this, something grows without bound.
const MAX_STATES: usize = 200_000;

/// The result of a search.
struct Found {
    states: usize,
    /// The broken rule and the path to it.
    violation: Option<(&'static str, Vec<State>)>,
}

/// Visits every reachable state, then follows the fault-free path from each.
fn search(scenario: Scenario, guards: &Guards) -> Found {
    let mut model = Model::new(scenario, guards);
    let start = model.start();
    let mut states = vec![start];
    let mut before = vec![0];
    let mut indices = HashMap::from([(start, 0)]);
    let mut index = 0;
    while let Some(state) = states.get(index).copied() {
        if states.len() > MAX_STATES {
            return Found { states: states.len(), violation: Some(("there are too many states", vec![])) };
        }
        for follows in follow(&mut model, &state) {
            let violation = match &follows {
                Err(violation) => Some(*violation),
                Ok(after) => violation_of(&model, after),
            };
            if let Ok(after) = follows
                && !indices.contains_key(&after)
            {
                indices.insert(after, states.len());
                states.push(after);
                before.push(index);
            }
            if let Some(violation) = violation {
                let last = follows.ok().and_then(|after| indices.get(&after)).copied().unwrap_or(index);
                return Found { states: states.len(), violation: Some((violation, path(&states, &before, last))) };
            }
        }
        index += 1;
    }
    let violation = find_incomplete(&mut model, &states, &indices);
    Found {
        states: states.len(),
        violation: violation.map(|(violation, index)| (violation, path(&states, &before, index))),
    }
}

fn path(states: &[State], before: &[usize], last: usize) -> Vec<State> {
    let mut path = vec![states[last]];
    let mut index = last;
    while index != 0 {
        index = before[index];
        path.push(states[index]);
    }
    path.reverse();
    path
}

fn follow(model: &mut Model, state: &State) -> Vec<Outcome> {
    let mut all = role_steps(model, state);
    let own = [model.start_spm(state), model.start_spa(state), model.progress(state), model.tick(state)];
    all.extend(own.into_iter().flatten().map(Ok));
    all.extend(model.possible(state));
    all.into_iter().map(|follows| follows.map(|after| model.normalize(after))).collect()
}

fn role_steps(model: &mut Model, state: &State) -> Vec<Outcome> {
    let mut all = vec![];
    if state.spa.is_some() {
        all.extend(model.act(state, Decider::Watchdog));
    }
    if state.spm.is_some() {
        all.extend(model.act(state, Decider::Manager));
    }
    if state.stopped && state.spm.is_none() && state.spa.is_none() {
        all.extend(model.act(state, Decider::Installer));
    }
    all
}

/// The rule that a state breaks.
fn violation_of(model: &Model, state: &State) -> Option<&'static str> {
    let record = model.record(state);
    let phase = model.phase(state);
    let bin = state.bin.now;
    if let Some(trial) = record.trial() {
        let TrialLimits { deaths, failed_proofs, lost_watchdogs, first_answer, .. } = *model.limits();
        if trial.deaths > deaths
            || trial.failed_proofs > failed_proofs
            || trial.lost_watchdogs > lost_watchdogs
            || trial.spent_seconds > first_answer.as_secs()
        {
            return Some("a release is tried without a limit");
        }
    }
    if bin.image().is_none() {
        return Some("bin/aops is not complete");
    }
    if state.interference == Interference::Replaced && bin != File::Foreign {
        return Some("the executable of a package manager is replaced");
    }
    if state.interference != Interference::BackupLost {
        let leads_nowhere = (state.spa_link.now || state.other_links.now) && state.prev.now.image().is_none();
        if leads_nowhere {
            return Some("a role link does not point at a complete executable");
        }
    }
    let (from, to) = (model.from(), model.to());
    if record.skipped(&from.version, &from.sha256).is_some() {
        return Some("the old release is skipped");
    }
    if phase.is_none()
        && bin == File::From
        && model.kind != Kind::SameBytes
        && state.installed.now != WhichRelease::From
    {
        return Some("manager.json names a release that is not installed");
    }
    if state.interference != Interference::No {
        return None;
    }
    if phase.is_none() && record.skipped(&to.version, &to.sha256).is_some() && bin == File::To {
        return Some("the installed release is skipped");
    }
    let on_trial = bin == File::To
        && matches!(phase, Some(UpgradePhase::Switching | UpgradePhase::Trial | UpgradePhase::RollingBack));
    if on_trial && (!state.spa_link.now || !state.other_links.now) {
        return Some("the next watchdog would run the new program");
    }
    if on_trial && state.spa.is_some_and(|spa| spa.image != WhichRelease::From) {
        return Some("the watchdog runs the new program");
    }
    if phase.is_none() && bin == File::To && state.installed.now != WhichRelease::To {
        return Some("the installed release is neither on trial nor committed");
    }
    None
}

/// The upgrade is over, and the home is in order.
fn is_end(model: &Model, state: &State) -> bool {
    let bin = state.bin.now.image();
    if state.interference == Interference::BackupLost
        && state.spa.is_none()
        && state.spa_link.now
        && !model.kind.passes()
    {
        // The old program is lost with the backup, and the new one cannot run.
        return true;
    }
    let is_home = !state.spa_link.now && !state.other_links.now;
    if model.phase(state).is_some() || !is_home || state.stopped || state.spm.is_some_and(|spm| spm.begun.is_some()) {
        return false;
    }
    // The operator, or the loss of the backup, left a release installed that cannot run.
    let cannot_run = bin == Some(WhichRelease::To) && model.kind != Kind::Good;
    let spm = state.spm.is_some_and(|spm| Some(spm.image) == bin);
    let spa = state.spa.is_some_and(|spa| Some(spa.image) == bin);
    let any = state.spm.is_some() && state.spa.is_some();
    match model.kind {
        _ if cannot_run => true,
        Kind::SameBytes => any && state.spm.is_some_and(|spm| spm.image == state.installed.now),
        _ if state.interference != Interference::No => any,
        _ => spm && spa,
    }
}

/// The next state if nothing more fails.
fn fault_free(model: &mut Model, state: &State) -> Option<State> {
    if state.stopped {
        return match (state.spm, state.spa) {
            (Some(_), _) => model::without_spm(*state),
            (None, Some(_)) => State { spa: None, ..*state },
            (None, None) => State { stopped: false, ..*state },
        }
        .into();
    }
    if !state.gateway {
        return Some(State { gateway: true, ..*state });
    }
    for (is_there, decider) in [(state.spa.is_some(), Decider::Watchdog), (state.spm.is_some(), Decider::Manager)] {
        let mut steps = if is_there { model.act(state, decider) } else { vec![] };
        if !steps.is_empty() {
            return steps.swap_remove(0).ok();
        }
    }
    let start = model.start_spa(state).or_else(|| model.start_spm(state));
    start.or_else(|| model.progress(state)).or_else(|| model.tick(state))
}

/// A state from which the fault-free path does not complete, or completes wrongly.
fn find_incomplete(
    model: &mut Model,
    states: &[State],
    indices: &HashMap<State, usize>,
) -> Option<(&'static str, usize)> {
    const UNKNOWN: usize = usize::MAX;
    const ON_PATH: usize = usize::MAX - 1;
    let mut ends = vec![UNKNOWN; states.len()];
    for first in 0..states.len() {
        let (mut path, mut index) = (vec![], first);
        let end = loop {
            match ends[index] {
                ON_PATH => return Some(("the fault-free path never completes", index)),
                UNKNOWN if is_end(model, &states[index]) => break index,
                UNKNOWN => {}
                end => break end,
            }
            ends[index] = ON_PATH;
            path.push(index);
            match fault_free(model, &states[index]).and_then(|after| indices.get(&model.normalize(after))) {
                Some(next) => index = *next,
                None => return Some(("the fault-free path stops before completion", index)),
            }
        };
        path.push(first);
        path.into_iter().for_each(|index| ends[index] = end);
        if is_good_trial(model, &states[first]) && states[end].installed.now != WhichRelease::To {
            return Some(("a good release is not committed", first));
        }
    }
    None
}

/// Whether a good release without an objection is installed.
fn is_good_trial(model: &Model, state: &State) -> bool {
    let Some(trial) = model.record(state).trial() else { return false };
    let deaths = trial.deaths + u32::from(state.spa.is_some_and(|spa| spa.died));
    let watchdogs = trial.lost_watchdogs + u32::from(state.spa.is_some_and(|spa| spa.found_running_manager));
    model.kind.passes()
        && state.interference == Interference::No
        && trial.forced != Some(OperatorDecision::Abort)
        && (trial.phase == UpgradePhase::Trial || state.bin.now == File::To && trial.phase == UpgradePhase::Switching)
        && (state.bin.now == File::To || model.kind == Kind::SameBytes)
        && deaths < model.limits().deaths
        // A restart of the watchdog on the fault-free path may find the new manager running.
        && watchdogs + u32::from(state.spa.is_none()) < model.limits().lost_watchdogs
}

/// The path to a broken rule: the changes of each step.
fn show(path: &[State]) -> String {
    let parts = |state: &State| -> Vec<String> {
        let text = format!("{state:#?}").replace("\n        ", " ").replace("\n    }", " }");
        text.lines().map(str::trim).map(str::to_owned).collect()
    };
    let mut text = String::new();
    let mut before = vec![];
    for state in path {
        let now = parts(state);
        let changed = now.iter().filter(|part| !before.contains(*part)).map(String::as_str);
        text += &format!("  {}\n", changed.collect::<Vec<_>>().join(" "));
        before = now;
    }
    text
}

fn of(kind: Kind) -> Scenario {
    Scenario { kind, gateway_changes: kind == Kind::NoHeartbeat, operator: false, interferes: false, syncs_first: true }
}

/// Each kind of program, and some of them with further events.
fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<_> = Kind::ALL.iter().map(|kind| of(*kind)).collect();
    all.extend([Kind::Good, Kind::SameBytes, Kind::ExitsAtOnce].map(|kind| Scenario { operator: true, ..of(kind) }));
    all.extend([Kind::Good, Kind::ExitsAtOnce].map(|kind| Scenario { interferes: true, ..of(kind) }));
    all.push(Scenario { gateway_changes: true, ..of(Kind::Good) });
    all
}

#[test]
fn no_sequence_of_events_breaks_a_rule_and_every_upgrade_completes() {
    let mut states = 0;
    for scenario in scenarios() {
        let found = search(scenario, &Guards::ALL);
        println!("{scenario:?}: {} states", found.states);
        states += found.states;
        if let Some((violation, path)) = found.violation {
            panic!("{scenario:?}: {violation}, after {} steps:\n{}", path.len(), show(&path));
        }
    }
    println!("{states} states");
}

/// The scenario in which the lack of a guard shows soonest.
fn shows(guard: &str) -> Scenario {
    match guard {
        "adoption" => of(Kind::DoesNotAdopt),
        "heartbeat_before_commit" => of(Kind::NoHeartbeat),
        "memory_limit" => of(Kind::EatsMemory),
        "minimum_life" => of(Kind::DiesSoon),
        "failed_proof_limit" | "prove_before_commit" => of(Kind::FailsProof),
        "time_limit" => of(Kind::NeverAnswers),
        "death_limit" => of(Kind::ExitsAtOnce),
        "lost_watchdog_limit" => of(Kind::EndsWatchdog),
        "probe_before_rollback" => Scenario { gateway_changes: true, ..of(Kind::Good) },
        "stop_pauses" => Scenario { operator: true, ..of(Kind::Good) },
        "backup_intact_before_restore"
        | "links_before_restore"
        | "foreign_executable_drops"
        | "release_recorded_on_rollback" => Scenario { interferes: true, ..of(Kind::Good) },
        _ => of(Kind::Good),
    }
}

#[test]
fn every_guard_is_needed() {
    for (name, guards) in Guards::all_but_one() {
        let found = search(shows(name), &guards);
        let Some((violation, path)) = found.violation else { panic!("no rule is broken without {name}") };
        println!("without {name}: {violation}, after {} steps; {} states", path.len(), found.states);
        assert!(found.states <= MAX_STATES, "without {name} the search is unbounded");
    }
}

#[test]
fn a_step_that_depends_on_an_unsynced_write_breaks_a_rule() {
    let found = search(Scenario { syncs_first: false, ..of(Kind::Good) }, &Guards::ALL);
    assert!(found.violation.is_some());
}
