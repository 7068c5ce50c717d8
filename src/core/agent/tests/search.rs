//! Visits every state that a change of release can reach under any sequence of events: no state breaks a rule, and from each the change
//! completes.

mod events;
mod key;
mod manager;
mod rules;
mod world;

use std::collections::{HashMap, VecDeque};

use crate::core::guards::{Guard, without};
use events::What;
use key::Key;
use world::{Kind, Scenario, State, World, Wrong};

/// More states than any search visits. Above this, something grows without bound.
const MAX_STATES: usize = 200_000;

/// A visited state.
struct Visited {
    /// The previous state and the event that led here.
    before: (usize, Option<What>),
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
    wrong: Option<(Wrong, Vec<What>)>,
}

/// Visits every reachable state, then follows the fault-free path from each.
fn search(scenario: Scenario) -> Found {
    let world = World::new(scenario);
    let mut visited: Vec<Visited> = vec![];
    let found = |visited: &[Visited], wrong: Wrong, mut place: usize, last: Option<What>| {
        let mut way: Vec<What> = last.into_iter().collect();
        while let (before, Some(what)) = visited[place].before {
            way.push(what);
            place = before;
        }
        way.reverse();
        Found { states: visited.len(), wrong: Some((wrong, way)) }
    };
    let visit = |state: &State, before| Visited {
        before,
        next: None,
        ordered: state.order.0,
        active: state.active(),
        is_to_be_committed: world.is_to_be_committed(state),
    };
    let start = match world.start() {
        Ok(start) => start,
        Err(wrong) => return Found { states: 0, wrong: Some((wrong, vec![])) },
    };
    let mut places: HashMap<Key, usize> = HashMap::from([(key::of(&world, &start), 0)]);
    visited.push(visit(&start, (0, None)));
    let mut open = VecDeque::from([start]);
    for place in 0.. {
        let Some(state) = open.pop_front() else { break };
        let fair = if world.is_end(&state) { None } else { Some(world.fair(&state)) };
        let mut next = None;
        for what in world.possible(&state) {
            let after = match world.apply(&state, what) {
                Ok(after) => after,
                Err(wrong) => return found(&visited, wrong, place, Some(what)),
            };
            let fresh = visited.len();
            let after_place = *places.entry(key::of(&world, &after)).or_insert(fresh);
            if after_place == fresh {
                visited.push(visit(&after, (place, Some(what))));
                open.push_back(after);
            }
            if fair == Some(Some(what)) {
                next = Some(after_place);
            }
        }
        if fair.is_some() && next.is_none() {
            return found(&visited, "the fault-free path stops before completion", place, None);
        }
        visited[place].next = next;
        if visited.len() > MAX_STATES {
            return found(&visited, "there are too many states", visited.len() - 1, None);
        }
    }
    match unending(&visited) {
        Some((wrong, place)) => found(&visited, wrong, place, None),
        None => Found { states: visited.len(), wrong: None },
    }
}

/// A state from which the fault-free path does not complete, or completes wrongly.
fn unending(visited: &[Visited]) -> Option<(Wrong, usize)> {
    let mut ends: Vec<Option<usize>> = vec![None; visited.len()];
    let mut on_way = vec![false; visited.len()];
    for first in 0..visited.len() {
        let (mut way, mut place) = (vec![], first);
        let end = loop {
            if let Some(end) = ends[place] {
                break end;
            }
            if std::mem::replace(&mut on_way[place], true) {
                return Some(("the fault-free path never completes", first));
            }
            way.push(place);
            match visited[place].next {
                Some(next) => place = next,
                None => break place,
            }
        };
        way.into_iter().for_each(|place| ends[place] = Some(end));
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

fn show(way: &[What]) -> String {
    way.iter().map(|what| format!("  {what:?}\n")).collect()
}

#[test]
fn no_order_of_events_breaks_a_rule_and_every_change_of_release_ends() {
    let mut states = 0;
    for scenario in scenarios() {
        let found = search(scenario);
        println!("{scenario:?}: {} states", found.states);
        states += found.states;
        if let Some((wrong, way)) = found.wrong {
            panic!("{scenario:?}: {wrong}, after {} steps:\n{}", way.len(), show(&way));
        }
    }
    println!("{states} states");
}

/// The scenario in which the lack of a guard shows soonest.
fn shows(guard: Guard) -> Scenario {
    let ordered = |kind| Scenario { orders: 1, ..of(kind) };
    match guard {
        Guard::HoldFailed => of(Kind::CannotBeFetched),
        Guard::WellBeforeCommit | Guard::ResumeReturns => of(Kind::Unhealthy),
        Guard::LifeBeforeCommit | Guard::TriesBudget => of(Kind::ExitsOnProbation),
        Guard::TimeBudget => of(Kind::NeverAnswers),
        Guard::RecordBeforeReturn | Guard::EndCountsOnce | Guard::FailureIsWritten => of(Kind::ExitsAtOnce),
        Guard::SkipOnRollBack => of(Kind::CannotBeLaunched),
        Guard::DownBeforeSwitch | Guard::KeepBackup => of(Kind::Good),
        Guard::RecordBeforeStop | Guard::RefusedStartPauses | Guard::ResumeRollsBack => {
            Scenario { faults: 1, ..of(Kind::Good) }
        }
        Guard::StartBeforeReturn => Scenario { faults: 2, ..of(Kind::NeverAnswers) },
        Guard::StopPauses | Guard::HoldForOperator => Scenario { operator: true, ..of(Kind::Good) },
        Guard::StagedIsWanted | Guard::SkipWhatIsOrdered | Guard::ActiveNeedsNoProbation => ordered(Kind::Good),
        Guard::OrderEndsSkips | Guard::ResumeOrder => ordered(Kind::CannotBeLaunched),
    }
}

#[test]
fn without_any_one_guard_a_rule_is_broken() {
    for guard in Guard::ALL {
        let found = without(*guard, || search(shows(*guard)));
        let Some((wrong, way)) = found.wrong else { panic!("no rule is broken without {guard:?}") };
        println!("without {guard:?}: {wrong}, after {} steps; {} states", way.len(), found.states);
        assert!(found.states <= MAX_STATES, "without {guard:?} the search is unbounded");
    }
}
