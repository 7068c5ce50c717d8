//! Visits every state that an upgrade can reach under any sequence of events: no state breaks a rule, and from each the upgrade completes.

mod world;

use std::collections::HashMap;

use super::*;
pub use world::image;
use world::{File, Follows, Kind, Meddled, Scenario, State, World};

/// More states than any search visits. Above this, something grows without bound.
const MAX_STATES: usize = 200_000;

/// The result of a search.
struct Found {
    states: usize,
    /// The broken rule and the path to it.
    wrong: Option<(&'static str, Vec<State>)>,
}

/// Visits every reachable state, then follows the fault-free path from each.
fn search(scenario: Scenario, guards: &Guards) -> Found {
    let mut world = World::new(scenario, guards);
    let start = world.start();
    let mut states = vec![start];
    let mut before = vec![0];
    let mut places = HashMap::from([(start, 0)]);
    let mut place = 0;
    while let Some(state) = states.get(place).copied() {
        if states.len() > MAX_STATES {
            return Found { states: states.len(), wrong: Some(("there are too many states", vec![])) };
        }
        for follows in follow(&mut world, &state) {
            let wrong = match &follows {
                Err(wrong) => Some(*wrong),
                Ok(after) => breach(&world, after),
            };
            if let Ok(after) = follows
                && !places.contains_key(&after)
            {
                places.insert(after, states.len());
                states.push(after);
                before.push(place);
            }
            if let Some(wrong) = wrong {
                let last = follows.ok().and_then(|after| places.get(&after)).copied().unwrap_or(place);
                return Found { states: states.len(), wrong: Some((wrong, way(&states, &before, last))) };
            }
        }
        place += 1;
    }
    let wrong = unending(&mut world, &states, &places);
    Found { states: states.len(), wrong: wrong.map(|(wrong, place)| (wrong, way(&states, &before, place))) }
}

fn way(states: &[State], before: &[usize], last: usize) -> Vec<State> {
    let mut way = vec![states[last]];
    let mut place = last;
    while place != 0 {
        place = before[place];
        way.push(states[place]);
    }
    way.reverse();
    way
}

fn follow(world: &mut World, state: &State) -> Vec<Follows> {
    let mut all = role_steps(world, state);
    let own = [world.start_spm(state), world.start_spa(state), world.progress(state), world.tick(state)];
    all.extend(own.into_iter().flatten().map(Ok));
    all.extend(world.happens(state));
    all.into_iter().map(|follows| follows.map(|after| world.normal(after))).collect()
}

fn role_steps(world: &mut World, state: &State) -> Vec<Follows> {
    let mut all = vec![];
    if state.spa.is_some() {
        all.extend(world.act(state, Decider::Watchdog));
    }
    if state.spm.is_some() {
        all.extend(world.act(state, Decider::Manager));
    }
    if state.stopped && state.spm.is_none() && state.spa.is_none() {
        all.extend(world.act(state, Decider::Installer));
    }
    all
}

/// The rule that a state breaks.
fn breach(world: &World, state: &State) -> Option<&'static str> {
    let record = world.record(state);
    let phase = world.phase(state);
    let bin = state.bin.now;
    if let Some(trial) = record.trial() {
        let TrialLimits { deaths, failed_proofs, lost_watchdogs, first_answer, .. } = *world.limits();
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
    if state.meddled == Meddled::Replaced && bin != File::Foreign {
        return Some("the executable of a package manager is replaced");
    }
    if state.meddled != Meddled::BackupLost {
        let leads_nowhere = (state.spa_link.now || state.other_links.now) && state.prev.now.image().is_none();
        if leads_nowhere {
            return Some("a role link does not point at a complete executable");
        }
    }
    let (from, to) = (world.from(), world.to());
    if record.skipped(&from.version, &from.sha256).is_some() {
        return Some("the old release is skipped");
    }
    if phase.is_none()
        && bin == File::From
        && world.kind != Kind::SameBytes
        && state.installed.now != WhichRelease::From
    {
        return Some("manager.json names a release that is not installed");
    }
    if state.meddled != Meddled::No {
        return None;
    }
    if phase.is_none() && record.skipped(&to.version, &to.sha256).is_some() && bin == File::To {
        return Some("the installed release is skipped");
    }
    let judged = bin == File::To
        && matches!(phase, Some(UpgradePhase::Switching | UpgradePhase::Trial | UpgradePhase::RollingBack));
    if judged && (!state.spa_link.now || !state.other_links.now) {
        return Some("the next watchdog would run the new program");
    }
    if judged && state.spa.is_some_and(|spa| spa.image != WhichRelease::From) {
        return Some("the watchdog runs the new program");
    }
    if phase.is_none() && bin == File::To && state.installed.now != WhichRelease::To {
        return Some("the installed release is neither on trial nor committed");
    }
    None
}

/// The upgrade is over, and the home is in order.
fn is_end(world: &World, state: &State) -> bool {
    let bin = state.bin.now.image();
    if state.meddled == Meddled::BackupLost && state.spa.is_none() && state.spa_link.now && !world.kind.passes() {
        // The old program is lost with the backup, and the new one cannot run.
        return true;
    }
    let is_home = !state.spa_link.now && !state.other_links.now;
    if world.phase(state).is_some() || !is_home || state.stopped || state.spm.is_some_and(|spm| spm.begun.is_some()) {
        return false;
    }
    // The operator, or the loss of the backup, left a release installed that cannot run.
    let cannot_run = bin == Some(WhichRelease::To) && world.kind != Kind::Good;
    let spm = state.spm.is_some_and(|spm| Some(spm.image) == bin);
    let spa = state.spa.is_some_and(|spa| Some(spa.image) == bin);
    let any = state.spm.is_some() && state.spa.is_some();
    match world.kind {
        _ if cannot_run => true,
        Kind::SameBytes => any && state.spm.is_some_and(|spm| spm.image == state.installed.now),
        _ if state.meddled != Meddled::No => any,
        _ => spm && spa,
    }
}

/// The next state if nothing more fails.
fn fair(world: &mut World, state: &State) -> Option<State> {
    if state.stopped {
        return match (state.spm, state.spa) {
            (Some(_), _) => world::without_spm(*state),
            (None, Some(_)) => State { spa: None, ..*state },
            (None, None) => State { stopped: false, ..*state },
        }
        .into();
    }
    if !state.gateway {
        return Some(State { gateway: true, ..*state });
    }
    for (is_there, asker) in [(state.spa.is_some(), Decider::Watchdog), (state.spm.is_some(), Decider::Manager)] {
        let mut steps = if is_there { world.act(state, asker) } else { vec![] };
        if !steps.is_empty() {
            return steps.swap_remove(0).ok();
        }
    }
    let start = world.start_spa(state).or_else(|| world.start_spm(state));
    start.or_else(|| world.progress(state)).or_else(|| world.tick(state))
}

/// A state from which the fault-free path does not complete, or completes wrongly.
fn unending(world: &mut World, states: &[State], places: &HashMap<State, usize>) -> Option<(&'static str, usize)> {
    const UNKNOWN: usize = usize::MAX;
    const ON_WAY: usize = usize::MAX - 1;
    let mut ends = vec![UNKNOWN; states.len()];
    for first in 0..states.len() {
        let (mut way, mut place) = (vec![], first);
        let end = loop {
            match ends[place] {
                ON_WAY => return Some(("the fault-free path never completes", place)),
                UNKNOWN if is_end(world, &states[place]) => break place,
                UNKNOWN => {}
                end => break end,
            }
            ends[place] = ON_WAY;
            way.push(place);
            match fair(world, &states[place]).and_then(|after| places.get(&world.normal(after))) {
                Some(next) => place = *next,
                None => return Some(("the fault-free path stops before completion", place)),
            }
        };
        way.push(first);
        way.into_iter().for_each(|place| ends[place] = end);
        if is_good_trial(world, &states[first]) && states[end].installed.now != WhichRelease::To {
            return Some(("a good release is not committed", first));
        }
    }
    None
}

/// Whether a good release without an objection is installed.
fn is_good_trial(world: &World, state: &State) -> bool {
    let Some(trial) = world.record(state).trial() else { return false };
    let deaths = trial.deaths + u32::from(state.spa.is_some_and(|spa| spa.died));
    let watchdogs = trial.lost_watchdogs + u32::from(state.spa.is_some_and(|spa| spa.took_over));
    world.kind.passes()
        && state.meddled == Meddled::No
        && trial.forced != Some(OperatorDecision::Abort)
        && (trial.phase == UpgradePhase::Trial || state.bin.now == File::To && trial.phase == UpgradePhase::Switching)
        && (state.bin.now == File::To || world.kind == Kind::SameBytes)
        && deaths < world.limits().deaths
        // A restart of the watchdog on the fault-free path may find the new manager running.
        && watchdogs + u32::from(state.spa.is_none()) < world.limits().lost_watchdogs
}

/// The path to a broken rule: the changes of each step.
fn show(way: &[State]) -> String {
    let parts = |state: &State| -> Vec<String> {
        let text = format!("{state:#?}").replace("\n        ", " ").replace("\n    }", " }");
        text.lines().map(str::trim).map(str::to_owned).collect()
    };
    let mut text = String::new();
    let mut before = vec![];
    for state in way {
        let now = parts(state);
        let changed = now.iter().filter(|part| !before.contains(*part)).map(String::as_str);
        text += &format!("  {}\n", changed.collect::<Vec<_>>().join(" "));
        before = now;
    }
    text
}

fn of(kind: Kind) -> Scenario {
    Scenario { kind, gateway_changes: kind == Kind::NoHeartbeat, operator: false, meddling: false, syncs_first: true }
}

/// Each kind of program, and some of them with further events.
fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<_> = Kind::ALL.iter().map(|kind| of(*kind)).collect();
    all.extend([Kind::Good, Kind::SameBytes, Kind::ExitsAtOnce].map(|kind| Scenario { operator: true, ..of(kind) }));
    all.extend([Kind::Good, Kind::ExitsAtOnce].map(|kind| Scenario { meddling: true, ..of(kind) }));
    all.push(Scenario { gateway_changes: true, ..of(Kind::Good) });
    all
}

#[test]
fn no_order_of_events_breaks_a_rule_and_every_upgrade_ends() {
    let mut states = 0;
    for scenario in scenarios() {
        let found = search(scenario, &Guards::ALL);
        println!("{scenario:?}: {} states", found.states);
        states += found.states;
        if let Some((wrong, way)) = found.wrong {
            panic!("{scenario:?}: {wrong}, after {} steps:\n{}", way.len(), show(&way));
        }
    }
    println!("{states} states");
}

/// The scenario in which the lack of a guard shows soonest.
fn shows(guard: &str) -> Scenario {
    match guard {
        "adoption" => of(Kind::DoesNotAdopt),
        "heartbeat_before_commit" => of(Kind::NoHeartbeat),
        "memory" => of(Kind::EatsMemory),
        "minimum_life" => of(Kind::DiesSoon),
        "proofs_budget" | "prove_before_commit" => of(Kind::FailsProof),
        "time_budget" => of(Kind::NeverAnswers),
        "tries_budget" => of(Kind::ExitsAtOnce),
        "watchdogs_budget" => of(Kind::EndsWatchdog),
        "probe_before_condemning" => Scenario { gateway_changes: true, ..of(Kind::Good) },
        "stop_pauses" => Scenario { operator: true, ..of(Kind::Good) },
        "backup_whole_before_restore" | "links_before_restore" | "neither_image_drops" | "release_recorded_back" => {
            Scenario { meddling: true, ..of(Kind::Good) }
        }
        _ => of(Kind::Good),
    }
}

#[test]
fn without_any_one_guard_a_rule_is_broken() {
    for (name, guards) in Guards::all_but_one() {
        let found = search(shows(name), &guards);
        let Some((wrong, way)) = found.wrong else { panic!("no rule is broken without {name}") };
        println!("without {name}: {wrong}, after {} steps; {} states", way.len(), found.states);
        assert!(found.states <= MAX_STATES, "without {name} the search is unbounded");
    }
}

#[test]
fn a_step_that_relies_on_an_unsynced_one_breaks_a_rule() {
    let found = search(Scenario { syncs_first: false, ..of(Kind::Good) }, &Guards::ALL);
    assert!(found.wrong.is_some());
}
