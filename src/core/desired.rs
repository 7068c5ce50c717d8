//! The desired state of a host, and how a gateway's answer may change it.
//!
//! Within a lineage, a generation only grows. An empty or missing list removes nothing. A partial list changes the sub-agents that it names
//! and no others. A complete list that is not empty also removes the sub-agents that it omits, but only after they have been omitted for
//! the answer's `removalDelay`: until then they stay as ordered, because an omission may be a mistake.
//!
//! An order that cannot be read or carried out is rejected alone, and its sub-agent stays unchanged; it is named, so it is not omitted. If
//! the name of an order cannot be read, no sub-agent counts as omitted. An answer beyond what a host can store and load again is rejected as a
//! whole, and the held desired state is kept.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::env;
use super::generation::{self, Clocks, GenerationOrder};
use super::item::{self, MessageItem, Unreadable};
use super::model::{AgentName, Arch, Os};
use super::names;
use super::order::{Cmd, Order, Run};
use super::protocol::{AgentOrder, Answer, MAX_AGENTS};
use super::unknown::{self, UnknownFields};

/// Limits for the texts of an order, bytes: the usual maximum of a URL, and of a file name.
const MAX_TARBALL_BYTES: usize = 2_048;
const MAX_FILE_BYTES: usize = 255;
const MAX_CMD_BYTES: usize = 64;
const MAX_LINEAGE_BYTES: usize = 128;
/// The environments of all sub-agents together, bytes.
const MAX_ENV_BYTES: usize = 1 << 20;
/// Fields that versions before 7ac5350 stored and that no version reads any more.
const OBSOLETE_FIELDS: [&str; 2] = ["told", "complete"];
/// Seconds from the first complete list that omits a sub-agent to its removal, if the answer has no `removalDelay`.
pub const REMOVAL_DELAY: u64 = 300;
/// Limit for the unknown fields of one order, bytes; if there are more, none is stored.
const MAX_UNKNOWN_BYTES: usize = 4 << 10;

/// The desired state as the host stores it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DesiredState {
    #[serde(default)]
    pub lineage: String,
    #[serde(default)]
    pub generation: u64,
    #[serde(default)]
    pub agents: BTreeMap<AgentName, Order>,
    /// Sub-agents to remove, or already removed.
    #[serde(default)]
    pub removed: BTreeSet<AgentName>,
    /// The list came from a fallback endpoint, so the sub-agents that it did not name were kept.
    #[serde(default, rename = "sparesUnnamed", skip_serializing_if = "std::ops::Not::not")]
    pub keeps_unnamed: bool,
    #[serde(default, skip_serializing_if = "PendingOrders::is_empty")]
    pub(super) open: PendingOrders,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The part of the accepted lists that is not in effect, or not yet.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PendingOrders {
    /// The generation that this belongs to. A version that does not know this field writes it back next to a newer desired state.
    #[serde(default)]
    generation: u64,
    /// Sub-agents that the last complete list omits, and for how many seconds so far. Until removal they stay as ordered.
    #[serde(default)]
    omitted: BTreeMap<AgentName, u64>,
    /// Rejected orders, by the sub-agent's name, or by their position in the list if the name cannot be read.
    #[serde(default, rename = "refused")]
    rejected: BTreeMap<String, RejectedOrder>,
}

/// An order that is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RejectedOrder {
    #[serde(default)]
    pub name: Option<AgentName>,
    pub why: String,
    /// A command of a later version in an otherwise valid order.
    #[serde(default)]
    pub is_unsupported: bool,
    /// Distinguishes it from another order that is rejected for the same reason.
    #[serde(default, rename = "mark")]
    hash: u64,
}

impl PendingOrders {
    /// Drops the generation if nothing is pending, so that it is not written.
    fn normalized(self) -> PendingOrders {
        if self.is_empty() { PendingOrders::default() } else { self }
    }

    fn is_empty(&self) -> bool {
        self.omitted.is_empty() && self.rejected.is_empty()
    }
}

impl DesiredState {
    /// Drops pending orders that another version wrote back next to a newer desired state without knowing them.
    pub fn forget_stale(&mut self) {
        if self.open.generation != self.generation {
            self.open = PendingOrders::default();
        }
    }

    /// Sub-agents that the last complete list omits, and for how many seconds so far.
    pub fn omitted(&self) -> &BTreeMap<AgentName, u64> {
        &self.open.omitted
    }

    /// The orders that are not carried out.
    pub fn rejected(&self) -> impl Iterator<Item = &RejectedOrder> {
        self.open.rejected.values()
    }

    /// Adds `more` seconds to the time for which each omitted sub-agent has been omitted.
    pub fn count_omission(&mut self, more: u64) {
        for seconds in self.open.omitted.values_mut() {
            *seconds = seconds.saturating_add(more);
        }
    }

    /// The desired state without the sub-agents omitted for `delay` seconds or more; `None`: there are none.
    pub fn without_omitted(&self, delay: u64) -> Option<DesiredState> {
        let is_due = |(_, seconds): &(&AgentName, &u64)| **seconds >= delay;
        let due: BTreeSet<AgentName> = self.open.omitted.iter().filter(is_due).map(|(name, _)| name.clone()).collect();
        if due.is_empty() {
            return None;
        }
        let mut desired = self.clone();
        desired.agents.retain(|name, _| !due.contains(name));
        desired.open.omitted.retain(|name, _| !due.contains(name));
        desired.open = desired.open.normalized();
        desired.removed.extend(due);
        Some(desired)
    }
}

/// A desired state that replaces the held one.
#[derive(Debug, Clone, PartialEq)]
pub struct AcceptedState {
    pub desired: DesiredState,
    pub new_lineage: bool,
    /// Its generation is lower than the held one, which is further ahead than any clock explains.
    pub moved_back: bool,
    /// Number of sub-agents that an empty list did not remove although it is marked as complete.
    pub kept: usize,
}

/// The result of evaluating an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerOutcome {
    /// The answer changes nothing.
    Unchanged,
    /// The answer is the new desired state.
    Accept(Box<AcceptedState>),
    /// The answer is rejected as a whole, for this reason.
    Reject(String),
}

/// The host that an answer is for, at the time of the answer.
#[derive(Debug, Clone, Copy)]
pub struct AnswerContext<'a> {
    pub os: Os,
    pub arch: Arch,
    pub clocks: Clocks,
    /// The installed sub-agents, ordered or not.
    pub present: &'a BTreeSet<AgentName>,
    /// The answer is from a fallback endpoint, which may have an incomplete list: sub-agents that a list of another lineage does not name
    /// are kept until that list changes.
    pub from_fallback: bool,
}

/// Decides whether an answer changes the `held` desired state.
pub fn evaluate(held: &DesiredState, answer: &Answer, host: AnswerContext<'_>) -> AnswerOutcome {
    let Some(items) = &answer.agents else { return AnswerOutcome::Unchanged };
    let lineage = answer.lineage.clone().unwrap_or_default();
    if lineage.len() > MAX_LINEAGE_BYTES {
        let bytes = lineage.len();
        return AnswerOutcome::Reject(format!(
            "cannot accept a desired state with a lineage of {bytes} bytes: at most {MAX_LINEAGE_BYTES}"
        ));
    }
    if items.len() > MAX_AGENTS {
        return AnswerOutcome::Reject(format!(
            "cannot accept a desired state of {} orders: at most {MAX_AGENTS}",
            items.len()
        ));
    }
    let list =
        OrderList { complete: answer.complete, is_empty: items.is_empty(), orders: SortedOrders::of(items, host) };
    let same_number = lineage == held.lineage && answer.generation == held.generation;
    if same_number && list.is_repetition(held, host.present) {
        return AnswerOutcome::Unchanged;
    }
    let first = held.generation == 0 && held.lineage.is_empty();
    let new_lineage = !first && lineage != held.lineage;
    // An earlier version may have rejected an order of this list that this version can carry out; the generation is the same then.
    let retries_rejected = same_number && !held.open.rejected.is_empty();
    let counted = (!first && !new_lineage && !retries_rejected).then_some(held.generation);
    let moved_back = match generation::evaluate(counted, answer.generation, host.clocks) {
        Ok(next) => next == GenerationOrder::Back,
        Err(why) => return AnswerOutcome::Reject(why),
    };
    let is_other_lineage = !held.lineage.is_empty() && answer.lineage.as_ref() != Some(&held.lineage);
    let keeps_unnamed = host.from_fallback && is_other_lineage;
    let AppliedList { agents, removed, omitted, rejected } = list.apply(held, host.present, keeps_unnamed);
    if let Err(why) = check_limits(&agents, &omitted, held) {
        return AnswerOutcome::Reject(why);
    }
    let kept = if list.complete && list.is_empty { agents.len() } else { 0 };
    let mut unknown = held.unknown.clone();
    unknown.retain(|name, _| !OBSOLETE_FIELDS.contains(&name.as_str()));
    let generation = answer.generation;
    let open = PendingOrders { generation, omitted, rejected }.normalized();
    let desired = DesiredState { lineage, generation, agents, removed, keeps_unnamed, open, unknown };
    let desired = desired.without_omitted(removal_delay(answer)).unwrap_or(desired);
    AnswerOutcome::Accept(Box::new(AcceptedState { desired, new_lineage, moved_back, kept }))
}

/// Seconds for which a sub-agent must be omitted from complete lists before it is removed.
pub fn removal_delay(answer: &Answer) -> u64 {
    answer.removal_delay.unwrap_or(REMOVAL_DELAY)
}

/// The orders of a list, sorted into valid and rejected ones.
struct SortedOrders<'a> {
    valid: Vec<&'a AgentOrder>,
    /// By name, or by position in the list.
    rejected: BTreeMap<String, RejectedOrder>,
    named: BTreeSet<&'a AgentName>,
    /// The name of each order could be read.
    all_named: bool,
}

impl<'a> SortedOrders<'a> {
    fn of(items: &'a [MessageItem<AgentOrder>], host: AnswerContext<'_>) -> SortedOrders<'a> {
        let mut orders =
            SortedOrders { valid: vec![], rejected: BTreeMap::new(), named: BTreeSet::new(), all_named: true };
        for (index, item) in items.iter().enumerate() {
            let (name, why, hash) = match item {
                MessageItem::Read(order) => (Some(&order.name), check(order, host).err(), item::content_hash(order)),
                MessageItem::Unreadable(Unreadable { name, why, hash }) => (name.as_ref(), Some(why.clone()), *hash),
            };
            let Some(name) = name else {
                orders.all_named = false;
                let why = why.unwrap_or_default();
                let rejection = RejectedOrder { name: None, why, is_unsupported: false, hash };
                orders.rejected.insert(format!("order {} of the list", index + 1), rejection);
                continue;
            };
            // It is not known which of the two orders is meant.
            let why = if orders.named.insert(name) { why } else { Some("the list names it twice".to_owned()) };
            if let Some(why) = why {
                orders.valid.retain(|order| order.name != *name);
                orders.reject(name, why, false, hash);
            } else if let MessageItem::Read(order) = item {
                match &order.cmd {
                    Cmd::Unknown(word) => {
                        let why = format!("cannot {word} {name}: this version does not know the command");
                        orders.reject(name, why, true, hash);
                    }
                    Cmd::Run(_) | Cmd::Uninstall => orders.valid.push(order),
                }
            }
        }
        orders
    }

    fn reject(&mut self, name: &AgentName, why: String, is_unsupported: bool, hash: u64) {
        self.rejected.insert(name.to_string(), RejectedOrder { name: Some(name.clone()), why, is_unsupported, hash });
    }
}

/// Whether an order is within the limits and can be carried out next to all others.
fn check(order: &AgentOrder, host: AnswerContext<'_>) -> Result<(), String> {
    let AgentOrder { name, package, cmd, spec, .. } = order;
    // An installed sub-agent may be removed whatever its name.
    if *cmd != Cmd::Uninstall {
        names::check(&package.release(name, host.os, host.arch))?;
    }
    let within = |what: &str, bytes: usize, most: usize| match bytes > most {
        true => Err(format!("it has {what} of {bytes} bytes: at most {most}")),
        false => Ok(()),
    };
    within("a tarball", package.tarball.as_ref().map_or(0, String::len), MAX_TARBALL_BYTES)?;
    within("a file name", package.file.as_ref().map_or(0, String::len), MAX_FILE_BYTES)?;
    within("a command", cmd.as_str().len(), MAX_CMD_BYTES)?;
    env::check(&spec.env).map_err(|why| format!("cannot use its environment: {why}"))
}

/// A list of orders.
struct OrderList<'a> {
    complete: bool,
    is_empty: bool,
    orders: SortedOrders<'a>,
}

/// The held desired state with a list applied.
struct AppliedList {
    agents: BTreeMap<AgentName, Order>,
    removed: BTreeSet<AgentName>,
    omitted: BTreeMap<AgentName, u64>,
    rejected: BTreeMap<String, RejectedOrder>,
}

impl OrderList<'_> {
    fn apply(&self, held: &DesiredState, present: &BTreeSet<AgentName>, keeps_unnamed: bool) -> AppliedList {
        let SortedOrders { valid, rejected, named, all_named } = &self.orders;
        let mut agents = held.agents.clone();
        let mut removed = held.removed.clone();
        for order in valid {
            match &order.cmd {
                Cmd::Run(run) => {
                    removed.remove(&order.name);
                    agents.insert(order.name.clone(), order_to_keep(order, *run));
                }
                Cmd::Uninstall => {
                    agents.remove(&order.name);
                    removed.insert(order.name.clone());
                }
                Cmd::Unknown(_) => {}
            }
        }
        // A sub-agent that was never installed needs no removal.
        removed.retain(|name| present.contains(name) || held.agents.contains_key(name));
        let seconds = |name: &AgentName| held.open.omitted.get(name).copied().unwrap_or(0);
        let omitted = match self.complete {
            true if !self.is_empty && *all_named && !keeps_unnamed => {
                let omitted = present.iter().chain(held.agents.keys());
                let omitted = omitted.filter(|name| !named.contains(name) && !removed.contains(*name));
                omitted.map(|name| (name.clone(), seconds(name))).collect()
            }
            // This list removes nothing.
            true => BTreeMap::new(),
            false => {
                let mut omitted = held.open.omitted.clone();
                omitted.retain(|name, _| !named.contains(name) && !removed.contains(name));
                omitted
            }
        };
        let mut rejected = rejected.clone();
        if !self.complete {
            let earlier = held
                .open
                .rejected
                .iter()
                .filter(|(_, rejection)| rejection.name.as_ref().is_some_and(|name| !named.contains(name)));
            rejected.extend(earlier.map(|(name, rejection)| (name.clone(), rejection.clone())));
        }
        AppliedList { agents, removed, omitted, rejected }
    }

    /// Whether applying the list again would not change the desired state.
    ///
    /// From a gateway that numbers its lists, the same number also means that no further sub-agent is to be removed. A list without a
    /// number may order that.
    fn is_repetition(&self, held: &DesiredState, present: &BTreeSet<AgentName>) -> bool {
        let applied = self.apply(held, present, held.keeps_unnamed);
        let is_counted = held.generation > 0 || !held.lineage.is_empty();
        let is_relevant = |name: &&AgentName| !is_counted || held.agents.contains_key(*name);
        applied.agents == held.agents
            && applied.rejected == held.open.rejected
            && applied.omitted.keys().filter(is_relevant).eq(held.open.omitted.keys().filter(is_relevant))
            && (is_counted || applied.removed.iter().all(|name| held.removed.contains(name) || !present.contains(name)))
    }
}

/// An order as it is stored.
fn order_to_keep(order: &AgentOrder, run: Run) -> Order {
    let AgentOrder { package, spec, retry, .. } = order;
    let unknown = match unknown::bytes(&order.unknown) {
        ..=MAX_UNKNOWN_BYTES => order.unknown.clone(),
        _ => UnknownFields::new(),
    };
    Order { package: package.clone(), run, spec: spec.clone(), retry: *retry, unknown }
}

/// Whether the new desired state can be stored. Partial lists add up, and so do sub-agents that wait for removal. A state that is as large
/// as the held one is always accepted.
fn check_limits(
    agents: &BTreeMap<AgentName, Order>,
    omitted: &BTreeMap<AgentName, u64>,
    held: &DesiredState,
) -> Result<(), String> {
    let remaining = || agents.iter().filter(|(name, _)| !omitted.contains_key(*name));
    let count = remaining().count();
    if count > MAX_AGENTS.max(held.agents.len()) {
        return Err(format!("cannot accept a desired state with {count} sub-agents: at most {MAX_AGENTS}"));
    }
    let bytes_of = |order: &Order| env::bytes(&order.spec.env);
    let before: usize = held.agents.values().map(bytes_of).sum();
    let bytes: usize = remaining().map(|(_, order)| bytes_of(order)).sum();
    if bytes > MAX_ENV_BYTES.max(before) {
        return Err(format!(
            "cannot accept a desired state with environments of {bytes} bytes: at most {MAX_ENV_BYTES}"
        ));
    }
    let with_omitted: usize = agents.values().map(bytes_of).sum();
    if agents.len() > (2 * MAX_AGENTS).max(held.agents.len()) || with_omitted > (2 * MAX_ENV_BYTES).max(before) {
        return Err(format!(
            "cannot accept a desired state with {count} sub-agents while {} others wait for their removal: together they exceed the limit; send it \
             again when they are removed",
            agents.len() - count
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
