//! Visits every state that a change of release can reach under any sequence of events: no state breaks a rule, and from each the change
//! completes.

mod events;
mod key;
mod manager;
mod model;
mod rules;

use std::collections::{HashMap, VecDeque};

use crate::core::guards::{Guard, without};
use events::SearchEvent;
use key::Key;
use model::{Kind, Model, Scenario, State, Violation};

/// More states than any search visits. Above this, something grows without bound.
const MAX_STATES: usize = 200_000;

/// A visited state.
struct Visited {
    /// The previous state and the event that led here.
    before: (usize, Option<SearchEvent>),
    /// The next state if nothing more fails; `None`: the change is complete.
    next: Option<usize>,
    ordered: u8,
    /// The active release.
    active: Option<u8>,
    is_to_be_committed: bool,
}

/// The result of a search.
struct Found {
    states: usize,
    /// The broken rule and the path to it.
    violation: Option<(Violation, Vec<SearchEvent>)>,
}

/// Visits every reachable state, then follows the fault-free path from each.
fn search(scenario: Scenario) -> Found {
    let model = Model::new(scenario);
    let mut visited: Vec<Visited> = vec![];
    let found = |visited: &[Visited], violation: Violation, mut index: usize, last: Option<SearchEvent>| {
        let mut path: Vec<SearchEvent> = last.into_iter().collect();
        while let (before, Some(event)) = visited[index].before {
            path.push(event);
            index = before;
        }
        path.reverse();
        Found { states: visited.len(), violation: Some((violation, path)) }
    };
    let visit = |state: &State, before| Visited {
        before,
        next: None,
        ordered: state.order.0,
        active: state.active(),
        is_to_be_committed: model.is_to_be_committed(state),
    };
    let start = match model.start() {
        Ok(start) => start,
        Err(violation) => return Found { states: 0, violation: Some((violation, vec![])) },
    };
    let mut indices: HashMap<Key, usize> = HashMap::from([(key::of(&model, &start), 0)]);
    visited.push(visit(&start, (0, None)));
    let mut open = VecDeque::from([start]);
    for index in 0.. {
        let Some(state) = open.pop_front() else { break };
        let fault_free = if model.is_end(&state) { None } else { Some(model.fault_free(&state)) };
        let mut next = None;
        for event in model.possible(&state) {
            let after = match model.apply(&state, event) {
                Ok(after) => after,
                Err(violation) => return found(&visited, violation, index, Some(event)),
            };
            let fresh = visited.len();
            let after_index = *indices.entry(key::of(&model, &after)).or_insert(fresh);
            if after_index == fresh {
                visited.push(visit(&after, (index, Some(event))));
                open.push_back(after);
            }
            if fault_free == Some(Some(event)) {
                next = Some(after_index);
            }
        }
        if fault_free.is_some() && next.is_none() {
            return found(&visited, "the fault-free path stops before completion", index, None);
        }
        visited[index].next = next;
        if visited.len() > MAX_STATES {
            return found(&visited, "there are too many states", visited.len() - 1, None);
        }
    }
    match find_incomplete(&visited) {
        Some((violation, index)) => found(&visited, violation, index, None),
        None => Found { states: visited.len(), violation: None },
    }
}

/// A state from which the fault-free path does not complete, or completes wrongly.
fn find_incomplete(visited: &[Visited]) -> Option<(Violation, usize)> {
    let mut ends: Vec<Option<usize>> = vec![None; visited.len()];
    let mut on_path = vec![false; visited.len()];
    for first in 0..visited.len() {
        let (mut path, mut index) = (vec![], first);
        let end = loop {
            if let Some(end) = ends[index] {
                break end;
            }
            if std::mem::replace(&mut on_path[index], true) {
                return Some(("the fault-free path never completes", first));
            }
            path.push(index);
            match visited[index].next {
                Some(next) => index = next,
                None => break index,
            }
        };
        path.into_iter().for_each(|index| ends[index] = Some(end));
        let (first_state, end) = (&visited[first], &visited[end]);
        if first_state.is_to_be_committed && end.active != Some(first_state.ordered) {
            return Some(("a good release is not committed", first));
        }
    }
    None
}

fn of(kind: Kind) -> Scenario {
    Scenario { kind, faults: 0, operator: false, orders: 0 }
}

/// Each kind of release, and some of them with further events.
fn scenarios() -> Vec<Scenario> {
    use Kind::*;
    let mut all = Kind::ALL.map(of).to_vec();
    let faults = [Good, Slow, Job, ExitsAtOnce, NeverAnswers, CannotBeLaunched];
    all.extend(faults.map(|kind| Scenario { faults: 1, ..of(kind) }));
    all.extend([Good, ExitsAtOnce, CannotBeLaunched].map(|kind| Scenario { operator: true, ..of(kind) }));
    all.extend([Good, CannotBeLaunched].map(|kind| Scenario { orders: 1, ..of(kind) }));
    all
}

fn show(path: &[SearchEvent]) -> String {
    path.iter().map(|event| format!("  {event:?}\n")).collect()
}

#[test]
fn no_sequence_of_events_breaks_a_rule_and_every_change_of_release_completes() {
    let mut states = 0;
    for scenario in scenarios() {
        let found = search(scenario);
        println!("{scenario:?}: {} states", found.states);
        states += found.states;
        if let Some((violation, path)) = found.violation {
            panic!("{scenario:?}: {violation}, after {} steps:\n{}", path.len(), show(&path));
        }
    }
    println!("{states} states");
}

/// The scenario in which the lack of a guard shows soonest.
fn shows(guard: Guard) -> Scenario {
    let ordered = |kind| Scenario { orders: 1, ..of(kind) };
    match guard {
        Guard::HoldFailed => of(Kind::CannotBeFetched),
        Guard::HealthyBeforeCommit | Guard::ResumeRollback => of(Kind::Unhealthy),
        Guard::UptimeBeforeCommit | Guard::FailureLimit => of(Kind::ExitsOnProbation),
        Guard::TimeLimit => of(Kind::NeverAnswers),
        Guard::RecordBeforeSwitchBack | Guard::ExitCountsOnce | Guard::FailureIsRecorded => of(Kind::ExitsAtOnce),
        Guard::SkipOnRollBack => of(Kind::CannotBeLaunched),
        Guard::DownBeforeSwitch | Guard::KeepBackup => of(Kind::Good),
        Guard::RecordBeforeStop | Guard::ExcusedStartPausesTime | Guard::ResumeRollsBack => {
            Scenario { faults: 1, ..of(Kind::Good) }
        }
        Guard::StartBeforeRollback => Scenario { faults: 2, ..of(Kind::NeverAnswers) },
        Guard::StopPausesTime | Guard::HoldForOperator => Scenario { operator: true, ..of(Kind::Good) },
        Guard::CurrentStagingOnly | Guard::SkipOnlyOrdered | Guard::ActiveNeedsNoProbation => ordered(Kind::Good),
        Guard::OrderEndsSkips | Guard::ResumeOrder => ordered(Kind::CannotBeLaunched),
    }
}

#[test]
fn every_guard_is_needed() {
    for guard in Guard::ALL {
        let found = without(*guard, || search(shows(*guard)));
        let Some((violation, path)) = found.violation else { panic!("no rule is broken without {guard:?}") };
        println!("without {guard:?}: {violation}, after {} steps; {} states", path.len(), found.states);
        assert!(found.states <= MAX_STATES, "without {guard:?} the search is unbounded");
    }
}
