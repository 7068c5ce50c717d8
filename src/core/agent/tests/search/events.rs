//! The events that are possible in a state, and the fault-free next event.

use super::super::*;
use super::model::{Kind, Model, NEW, Ordered, Process, Scenario, State, number_of};

/// How much of the work under way is done when the manager dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub write: bool,
    pub launched: bool,
    /// The process to stop: alive, dead with its record, gone.
    pub stopped: u8,
    pub staged: bool,
    /// The release to remove: complete, partly removed, gone.
    pub discarded: u8,
}

impl Cut {
    pub const NOTHING: Cut = Cut { write: false, launched: false, stopped: 0, staged: false, discarded: 0 };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    Ready,
    Failed,
    /// Rejected after a costly download.
    Refused,
}

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SearchEvent {
    Staged {
        index: usize,
        fetched: Fetched,
    },
    Admitted {
        ok: bool,
    },
    /// `kept`: it is on disk.
    Written {
        ok: bool,
        kept: bool,
    },
    Housekeeping,
    Switched {
        ok: bool,
    },
    Discarded(u8),
    Inspected {
        index: usize,
        ok: bool,
    },
    Launched,
    LaunchFailed {
        refused: bool,
    },
    Stopped {
        ok: bool,
    },
    Exits,
    Checked,
    Tick,
    Second,
    HomeStops,
    RollBack,
    Retry,
    Restart,
    Orders(Ordered),
    /// The manager dies after it has written the order and before it follows it.
    OrdersAndDies(Ordered),
    Dies(Cut),
    /// While no manager runs:
    Later,
    PowerCut,
    Starts,
}

impl Model {
    /// All events that are possible now.
    pub fn possible(&self, state: &State) -> Vec<SearchEvent> {
        let Scenario { kind, operator, .. } = self.scenario;
        let faults = state.faults > 0;
        let Some(agent) = &state.agent else { return self.possible_without_manager(state) };
        let mut all = vec![];
        if self.has_ended(state) {
            all.extend(cuts(state, kind).map(SearchEvent::Dies));
            return all;
        }
        for (index, (id, number)) in state.staging.iter().enumerate() {
            let can = kind.can_be_fetched(*number);
            let fetched = [
                (Fetched::Ready, can),
                (Fetched::Failed, faults || !can || !agent.is_staging(*id)),
                (Fetched::Refused, faults),
            ];
            let fetched = fetched.into_iter().filter(|(_, happens)| *happens);
            all.extend(fetched.map(|(fetched, _)| SearchEvent::Staged { index, fetched }));
        }
        let fails = |happens: bool| [true, false].into_iter().take(if happens { 1 + usize::from(faults) } else { 0 });
        if state.is_admitting {
            let can = state.can_be_admitted();
            all.extend(
                [(true, can), (false, faults || !can)]
                    .into_iter()
                    .filter(|(_, happens)| *happens)
                    .map(|(ok, _)| SearchEvent::Admitted { ok }),
            );
        }
        if state.writing.is_some() {
            all.push(SearchEvent::Written { ok: true, kept: true });
            all.extend(
                [true, false].into_iter().filter(|_| faults).map(|kept| SearchEvent::Written { ok: false, kept }),
            );
        } else if state.is_unsaved {
            all.push(SearchEvent::Housekeeping);
        }
        all.extend(fails(state.is_switching).map(|ok| SearchEvent::Switched { ok }));
        all.extend(state.discarding.all().map(SearchEvent::Discarded));
        for index in 0..state.inspecting.len() {
            all.extend(fails(true).map(|ok| SearchEvent::Inspected { index, ok }));
        }
        if let Some(number) = state.launching {
            let can = kind.can_be_launched(number);
            let launched = [
                (SearchEvent::Launched, can),
                (SearchEvent::LaunchFailed { refused: false }, faults || !can),
                (SearchEvent::LaunchFailed { refused: true }, faults),
            ];
            all.extend(launched.into_iter().filter(|(_, happens)| *happens).map(|(event, _)| event));
        }
        all.extend(fails(state.is_stopping).map(|ok| SearchEvent::Stopped { ok }));
        let is_seen = agent.supervisor().is_up() || state.survived_stop;
        if state.process.is_some_and(|process| is_seen && (faults || self.may_exit(process))) {
            all.push(SearchEvent::Exits);
        }
        if state.is_checking {
            all.push(SearchEvent::Checked);
        }
        all.extend([SearchEvent::Tick, SearchEvent::Second].into_iter().filter(|event| self.may_pass(state, *event)));
        if operator && !state.home_stops {
            all.push(SearchEvent::HomeStops);
            if !agent.is_busy() && agent.rollback_target().is_some_and(|to| state.whole.has(number_of(to))) {
                all.push(SearchEvent::RollBack);
            }
            all.push(SearchEvent::Retry);
            if agent.supervisor().wanted() {
                all.push(SearchEvent::Restart);
            }
        }
        if state.orders > 0 && !state.home_stops && state.staging.len() < 2 {
            for other in [Ordered(1, 0), Ordered(NEW, 0), Ordered(NEW, 1), Ordered(3, 0)] {
                if other != state.order && other.1 >= state.order.1 {
                    all.extend([SearchEvent::Orders(other), SearchEvent::OrdersAndDies(other)]);
                }
            }
        }
        all.extend(cuts(state, kind).map(SearchEvent::Dies));
        all
    }

    fn possible_without_manager(&self, state: &State) -> Vec<SearchEvent> {
        let mut all = vec![SearchEvent::Starts];
        if let Some(process) = state.process {
            all.push(SearchEvent::PowerCut);
            if state.faults > 0 || self.may_exit(process) {
                all.push(SearchEvent::Exits);
            }
            if !self.must_exit(process) && self.scenario.kind != Kind::ExitsOnProbation {
                all.push(SearchEvent::Later);
            }
        }
        all
    }

    /// The home is stopped and the manager has exited.
    fn has_ended(&self, state: &State) -> bool {
        state.home_stops && state.agent.as_ref().is_some_and(|agent| agent.supervisor().is_down())
    }

    fn may_exit(&self, process: Process) -> bool {
        process.version == NEW && matches!(self.scenario.kind, Kind::Job | Kind::ExitsAtOnce | Kind::ExitsOnProbation)
    }

    fn must_exit(&self, process: Process) -> bool {
        process.version == NEW && matches!(self.scenario.kind, Kind::Job | Kind::ExitsAtOnce)
    }

    fn may_pass(&self, state: &State, event: SearchEvent) -> bool {
        let Some(agent) = &state.agent else { return false };
        let until = match event {
            SearchEvent::Tick => agent.deadline(state.now),
            _ => Some(state.now + S(1)),
        };
        let Some(until) = until else { return false };
        match state.process.filter(|_| agent.supervisor().is_up() || state.survived_stop) {
            Some(process) if self.must_exit(process) => false,
            Some(process) if process.version == NEW && self.scenario.kind == Kind::ExitsOnProbation => {
                until < process.since + S(3)
            }
            _ => event == SearchEvent::Tick,
        }
    }

    /// The next event if nothing fails that need not, and no operator or gateway intervenes.
    pub fn fault_free(&self, state: &State) -> Option<SearchEvent> {
        let kind = self.scenario.kind;
        let Some(agent) = &state.agent else { return Some(SearchEvent::Starts) };
        if self.has_ended(state) {
            return cuts(state, kind).last().map(SearchEvent::Dies);
        }
        if state.writing.is_some() {
            return Some(SearchEvent::Written { ok: true, kept: true });
        }
        if state.is_admitting {
            return Some(SearchEvent::Admitted { ok: state.can_be_admitted() });
        }
        if state.is_switching {
            return Some(SearchEvent::Switched { ok: true });
        }
        if let Some(version) = state.discarding.all().next() {
            return Some(SearchEvent::Discarded(version));
        }
        if !state.inspecting.is_empty() {
            return Some(SearchEvent::Inspected { index: 0, ok: true });
        }
        if state.is_stopping {
            return Some(SearchEvent::Stopped { ok: true });
        }
        if let Some(number) = state.launching {
            let can = kind.can_be_launched(number);
            return Some(if can { SearchEvent::Launched } else { SearchEvent::LaunchFailed { refused: false } });
        }
        if let Some((_, number)) = state.staging.first() {
            let fetched = if kind.can_be_fetched(*number) { Fetched::Ready } else { Fetched::Failed };
            return Some(SearchEvent::Staged { index: 0, fetched });
        }
        if state.is_checking {
            return Some(SearchEvent::Checked);
        }
        let is_up = agent.supervisor().is_up() || state.survived_stop;
        if let Some(process) = state.process.filter(|process| is_up && self.may_exit(*process)) {
            // Each process lives a little longer than the previous one.
            let lives_on = state.now < process.since + S(agent.ledger().probation_failures());
            return Some(if lives_on && self.may_pass(state, SearchEvent::Second) {
                SearchEvent::Second
            } else {
                SearchEvent::Exits
            });
        }
        if state.is_unsaved {
            return Some(SearchEvent::Housekeeping);
        }
        self.may_pass(state, SearchEvent::Tick).then_some(SearchEvent::Tick)
    }

    /// Whether the event is a fault.
    pub fn is_fault(&self, state: &State, event: SearchEvent) -> bool {
        match event {
            SearchEvent::Staged { fetched, .. } => match fetched {
                Fetched::Ready => false,
                Fetched::Failed => self.scenario.kind != Kind::CannotBeFetched,
                Fetched::Refused => true,
            },
            SearchEvent::LaunchFailed { refused } => refused || self.scenario.kind != Kind::CannotBeLaunched,
            SearchEvent::Exits => state.process.is_some_and(|process| !self.may_exit(process)),
            SearchEvent::Admitted { ok }
            | SearchEvent::Written { ok, .. }
            | SearchEvent::Switched { ok }
            | SearchEvent::Inspected { ok, .. }
            | SearchEvent::Stopped { ok } => !ok,
            _ => false,
        }
    }
}

/// Every way in which the manager can die now. In the last one, all work under way is done.
fn cuts(state: &State, kind: Kind) -> impl Iterator<Item = Cut> {
    let can_come = state.staging.iter().any(|(_, number)| kind.can_be_fetched(*number));
    let can_launch = state.launching.is_some_and(|number| kind.can_be_launched(number));
    let either = |is_under_way: bool| if is_under_way { &[false, true][..] } else { &[false] };
    let steps = |is_under_way: bool| if is_under_way { 0..=2 } else { 0..=0 };
    let mut all = vec![];
    for write in either(state.writing.is_some()) {
        for launched in either(can_launch) {
            for stopped in steps(state.is_stopping) {
                for staged in either(can_come) {
                    for discarded in steps(state.discarding.0 != 0) {
                        all.push(Cut { write: *write, launched: *launched, stopped, staged: *staged, discarded });
                    }
                }
            }
        }
    }
    all.into_iter()
}
