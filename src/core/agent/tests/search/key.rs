//! A state without the parts that no decision depends on: two states with the same key continue alike.
//!
//! Times are relative to now and capped where a longer time makes no difference; counters likewise.

use std::time::{Duration, Instant};

use super::super::super::probation::MAX_FAILURES;
use super::super::super::{Activation, Activity, Agent, HeldRelease};
use super::model::{Model, State, Writing, number_of};
use crate::core::ledger::{LedgerEntry, LedgerRelease};
use crate::core::model::Version;
use crate::core::order::Run;

/// Longer than any probation with its patience.
const LONG: Duration = Duration::from_secs(130);
/// More failures do not lengthen the delay.
const MANY: u32 = 13;

pub type Key = Vec<i64>;

pub fn of(model: &Model, state: &State) -> Key {
    let mut key = vec![];
    let set = |bits: &[bool]| bits.iter().fold(0, |all, bit| all * 2 + i64::from(*bit));
    key.push(set(&[
        state.is_unsaved,
        state.survived_stop,
        state.discard_waits,
        state.is_entry_unwritten,
        state.is_stopping,
        state.is_checking,
        state.is_admitting,
        state.is_switching,
        state.home_stops,
        state.is_suspect,
        state.is_skipped_on_disk,
        state.is_overruled,
    ]));
    key.extend([
        i64::from(state.order.0),
        state.order.1 as i64,
        state.failed.min(MAX_FAILURES) as i64,
        i64::from(state.faults * 8 + state.orders),
    ]);
    key.extend([i64::from(state.whole.0), i64::from(state.partial.0), i64::from(state.discarding.0)]);
    key.extend(
        [state.launching, state.process.map(|process| process.version)].map(|number| number.map_or(0, i64::from)),
    );
    key.push(state.process.map_or(-1, |process| age(state.now, process.since)));
    key.push(state.record.map_or(0, |record| i64::from(record.version)));
    key.push(state.record.and_then(|record| record.ended).map_or(-1, |success| success.map_or(2, i64::from)));
    let mut inspecting = state.inspecting.clone();
    inspecting.sort_unstable();
    key.push(inspecting.iter().fold(0, |all, number| all * 4 + i64::from(*number)));
    for (id, number) in &state.staging {
        let is_wanted = state.agent.as_ref().is_some_and(|agent| agent.is_staging(*id));
        key.push(i64::from(*number) * 2 + i64::from(is_wanted));
    }
    key.push(-1);
    entry(model, state, &state.disk, &mut key);
    for writing in [&state.writing, &state.queued] {
        key.push(waits(state, writing));
        if let Some((_, said)) = writing {
            entry(model, state, said, &mut key);
        }
    }
    if let Some(known) = &state.agent {
        key.push(-3);
        agent(model, state, known, &mut key);
    }
    key
}

/// Whether the agent waits for this write.
fn waits(state: &State, writing: &Writing) -> i64 {
    let Some((revision, _)) = writing else { return -1 };
    i64::from(state.recorded_with.is_some_and(|waits| waits <= *revision))
}

fn age(now: Instant, since: Instant) -> i64 {
    span(now.saturating_duration_since(since).min(LONG))
}

fn span(span: Duration) -> i64 {
    span.as_millis() as i64
}

fn number(version: Option<&Version>) -> i64 {
    version.map_or(0, |version| i64::from(number_of(version)))
}

fn entry(model: &Model, state: &State, entry: &LedgerEntry, key: &mut Key) {
    let of = |release: Option<&LedgerRelease>| number(release.map(|release| &release.version));
    let releases = [entry.active(), entry.backup(), entry.probation(), entry.staged()];
    key.push(releases.into_iter().fold(0, |all, release| all * 4 + of(release)));
    key.push(entry.probation_failures().min(MAX_FAILURES) as i64);
    key.push((0..4).filter(|number| entry.has_given_up(&super::model::version_of(*number))).map(i64::from).sum());
    // Which order is overruled: only the present one can be.
    key.push([0, 1, 2, 3].into_iter().fold(i64::from(entry.is_held()), |all, version| {
        let overrules = |retry| entry.overrules(&super::model::version_of(version), None, retry);
        all * 4 + i64::from(overrules(0)) + i64::from(overrules(1))
    }));
    for skipped in entry.skips() {
        let left = skipped.until.map(|until| until.saturating_sub(model.unix_seconds(state.now)));
        key.extend([number(Some(&skipped.version)), left.map_or(-1, |left| left as i64)]);
        key.extend([i64::from(skipped.failures.min(MANY)), skipped.retry as i64]);
    }
    key.push(-2);
}

fn agent(model: &Model, state: &State, agent: &Agent, key: &mut Key) {
    let now = state.now;
    key.extend(agent.supervisor.outline(now));
    key.push(-4);
    work(model, state, &agent.activity, key);
    entry(model, state, &agent.ledger, key);
    let versions =
        |set: &std::collections::BTreeSet<Version>| set.iter().fold(0, |all, version| all + (1 << number_of(version)));
    key.extend([versions(&agent.releases), versions(&agent.removing), agent.pending_stagings.len() as i64]);
    key.extend([
        i64::from(agent.program.is_some()),
        i64::from(agent.run == Run::Start),
        i64::from(agent.spec.is_some()),
        number(agent.running.as_ref()),
        i64::from(agent.home_stops),
        i64::from(agent.rolled_back.is_some()),
        agent.order.as_ref().map_or(-1, |order| number(Some(&order.package.version)) * 2 + order.retry as i64),
        i64::from(agent.starts_when_inspected),
    ]);
    let since = |since: Option<Instant>| since.map_or(-1, |since| age(now, since));
    key.extend([since(agent.progress.waits_since), since(agent.progress.up_since)]);
    key.push(i64::from(agent.progress.is_done) * 2 + i64::from(agent.progress.is_excused));
    key.push(agent.progress.last_life.map_or(-1, |life| span(life.min(LONG))));
}

fn work(model: &Model, state: &State, work: &Activity, key: &mut Key) {
    let failures = |failures: u32| i64::from(failures.min(MANY));
    let of = |activation: &Activation, key: &mut Key| {
        key.extend([number(Some(&activation.ready.release.version)), activation.order.retry as i64]);
        key.push(failures(activation.failures));
    };
    match work {
        Activity::Idle => key.push(0),
        Activity::Staging { version, failures: times, .. } => {
            key.extend([1, number(Some(version)), failures(*times)]);
        }
        Activity::Staged(ready) => key.extend([2, number(Some(&ready.release.version))]),
        Activity::Held(HeldRelease { version, failures: times, until }) => {
            let left = span(until.saturating_duration_since(state.now));
            key.extend([3, number(Some(version)), failures(*times), left]);
        }
        Activity::Admitting { order, program, failures: times } => {
            let version = number(Some(&order.package.version));
            key.extend([4, version, order.retry as i64, i64::from(program.is_some()), failures(*times)]);
        }
        Activity::Recording(activation) => {
            key.push(5);
            of(activation, key);
        }
        Activity::Stopping(activation) => {
            key.push(6);
            of(activation, key);
        }
        Activity::Switching { activation, before } => {
            key.push(7);
            of(activation, key);
            entry(model, state, before, key);
        }
        Activity::RollingBack(back) => {
            key.extend([8, number(Some(&back.from)), number(Some(&back.to)), i64::from(back.recorded)]);
        }
        Activity::SwitchingBack(back) => key.extend([9, number(Some(&back.from)), number(Some(&back.to))]),
        Activity::Uninstalling => key.push(10),
        Activity::Removing => key.push(11),
    }
}
