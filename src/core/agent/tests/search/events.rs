//! The events that are possible in a state, and the fault-free next event.

use super::super::*;
use super::world::{Kind, NEW, Ordered, Process, Scenario, State, World, number_of};

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
pub enum What {
    Staged {
        place: usize,
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
        place: usize,
        ok: bool,
    },
    Launched,
    NotLaunched {
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

impl World {
    /// All events that are possible now.
    pub fn possible(&self, state: &State) -> Vec<What> {
        let Scenario { kind, operator, .. } = self.scenario;
        let faults = state.faults > 0;
        let Some(agent) = &state.agent else { return self.possible_without_manager(state) };
        let mut all = vec![];
        if self.has_ended(state) {
            all.extend(cuts(state, kind).map(What::Dies));
            return all;
        }
        for (place, (id, number)) in state.staging.iter().enumerate() {
            let can = kind.can_be_fetched(*number);
            let fetched = [
                (Fetched::Ready, can),
                (Fetched::Failed, faults || !can || !agent.is_staging(*id)),
                (Fetched::Refused, faults),
            ];
            let fetched = fetched.into_iter().filter(|(_, happens)| *happens);
            all.extend(fetched.map(|(fetched, _)| What::Staged { place, fetched }));
        }
        let fails = |happens: bool| [true, false].into_iter().take(if happens { 1 + usize::from(faults) } else { 0 });
        if state.is_admitting {
            let can = state.can_be_admitted();
            all.extend(
                [(true, can), (false, faults || !can)]
                    .into_iter()
                    .filter(|(_, happens)| *happens)
                    .map(|(ok, _)| What::Admitted { ok }),
            );
        }
        if state.writing.is_some() {
            all.push(What::Written { ok: true, kept: true });
            all.extend([true, false].into_iter().filter(|_| faults).map(|kept| What::Written { ok: false, kept }));
        } else if state.is_unsaved {
            all.push(What::Housekeeping);
        }
        all.extend(fails(state.is_switching).map(|ok| What::Switched { ok }));
        all.extend(state.discarding.all().map(What::Discarded));
        for place in 0..state.inspecting.len() {
            all.extend(fails(true).map(|ok| What::Inspected { place, ok }));
        }
        if let Some(number) = state.launching {
            let can = kind.can_be_launched(number);
            let launched = [
                (What::Launched, can),
                (What::NotLaunched { refused: false }, faults || !can),
                (What::NotLaunched { refused: true }, faults),
            ];
            all.extend(launched.into_iter().filter(|(_, happens)| *happens).map(|(what, _)| what));
        }
        all.extend(fails(state.is_stopping).map(|ok| What::Stopped { ok }));
        let is_seen = agent.supervisor().is_up() || state.clings;
        if state.process.is_some_and(|process| is_seen && (faults || self.may_exit(process))) {
            all.push(What::Exits);
        }
        if state.is_checking {
            all.push(What::Checked);
        }
        all.extend([What::Tick, What::Second].into_iter().filter(|what| self.may_pass(state, *what)));
        if operator && !state.home_stops {
            all.push(What::HomeStops);
            if !agent.is_busy() && agent.can_return_to().is_some_and(|to| state.whole.has(number_of(to))) {
                all.push(What::RollBack);
            }
            all.push(What::Retry);
            if agent.supervisor().wanted() {
                all.push(What::Restart);
            }
        }
        if state.orders > 0 && !state.home_stops && state.staging.len() < 2 {
            for other in [Ordered(1, 0), Ordered(NEW, 0), Ordered(NEW, 1), Ordered(3, 0)] {
                if other != state.order && other.1 >= state.order.1 {
                    all.extend([What::Orders(other), What::OrdersAndDies(other)]);
                }
            }
        }
        all.extend(cuts(state, kind).map(What::Dies));
        all
    }

    fn possible_without_manager(&self, state: &State) -> Vec<What> {
        let mut all = vec![What::Starts];
        if let Some(process) = state.process {
            all.push(What::PowerCut);
            if state.faults > 0 || self.may_exit(process) {
                all.push(What::Exits);
            }
            if !self.must_exit(process) && self.scenario.kind != Kind::ExitsOnProbation {
                all.push(What::Later);
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

    fn may_pass(&self, state: &State, what: What) -> bool {
        let Some(agent) = &state.agent else { return false };
        let until = match what {
            What::Tick => agent.deadline(state.now),
            _ => Some(state.now + S(1)),
        };
        let Some(until) = until else { return false };
        match state.process.filter(|_| agent.supervisor().is_up() || state.clings) {
            Some(process) if self.must_exit(process) => false,
            Some(process) if process.version == NEW && self.scenario.kind == Kind::ExitsOnProbation => {
                until < process.since + S(3)
            }
            _ => what == What::Tick,
        }
    }

    /// The next event if nothing fails that need not, and no operator or gateway intervenes.
    pub fn fair(&self, state: &State) -> Option<What> {
        let kind = self.scenario.kind;
        let Some(agent) = &state.agent else { return Some(What::Starts) };
        if self.has_ended(state) {
            return cuts(state, kind).last().map(What::Dies);
        }
        if state.writing.is_some() {
            return Some(What::Written { ok: true, kept: true });
        }
        if state.is_admitting {
            return Some(What::Admitted { ok: state.can_be_admitted() });
        }
        if state.is_switching {
            return Some(What::Switched { ok: true });
        }
        if let Some(version) = state.discarding.all().next() {
            return Some(What::Discarded(version));
        }
        if !state.inspecting.is_empty() {
            return Some(What::Inspected { place: 0, ok: true });
        }
        if state.is_stopping {
            return Some(What::Stopped { ok: true });
        }
        if let Some(number) = state.launching {
            let can = kind.can_be_launched(number);
            return Some(if can { What::Launched } else { What::NotLaunched { refused: false } });
        }
        if let Some((_, number)) = state.staging.first() {
            let fetched = if kind.can_be_fetched(*number) { Fetched::Ready } else { Fetched::Failed };
            return Some(What::Staged { place: 0, fetched });
        }
        if state.is_checking {
            return Some(What::Checked);
        }
        let is_up = agent.supervisor().is_up() || state.clings;
        if let Some(process) = state.process.filter(|process| is_up && self.may_exit(*process)) {
            // Each process lives a little longer than the previous one.
            let lives_on = state.now < process.since + S(agent.ledger().probation_failures());
            return Some(if lives_on && self.may_pass(state, What::Second) { What::Second } else { What::Exits });
        }
        if state.is_unsaved {
            return Some(What::Housekeeping);
        }
        self.may_pass(state, What::Tick).then_some(What::Tick)
    }

    /// Whether the event is a fault.
    pub fn is_fault(&self, state: &State, what: What) -> bool {
        match what {
            What::Staged { fetched, .. } => match fetched {
                Fetched::Ready => false,
                Fetched::Failed => self.scenario.kind != Kind::CannotBeFetched,
                Fetched::Refused => true,
            },
            What::NotLaunched { refused } => refused || self.scenario.kind != Kind::CannotBeLaunched,
            What::Exits => state.process.is_some_and(|process| !self.may_exit(process)),
            What::Admitted { ok }
            | What::Written { ok, .. }
            | What::Switched { ok }
            | What::Inspected { ok, .. }
            | What::Stopped { ok } => !ok,
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
