//! The desired state of a host, and how a gateway's answer may change it.
//!
//! A generation only grows within its lineage. An empty or absent list removes nothing; a list that is not complete changes what it names
//! and leaves the rest; a complete one, and only one that is not empty, also has removed what it does not name. That waits: what a complete
//! list omits stays as it was ordered until it has been omitted for the answer's `removalDelay`, because a list may be an accident.
//!
//! An order that cannot be read or followed is refused alone, and its sub-agent stays as it is: it is named, so it is not omitted. Where not
//! even the name can be read, the list omits nothing. Beyond what a host can keep and read again an answer is refused as a whole, and
//! nothing is lost.

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

/// The longest words of an order, bytes: an address is no longer, and neither is the name of a file.
const MAX_TARBALL_BYTES: usize = 2_048;
const MAX_FILE_BYTES: usize = 255;
const MAX_CMD_BYTES: usize = 64;
const MAX_LINEAGE_BYTES: usize = 128;
/// The environments of all sub-agents together, bytes.
const MAX_ENV_BYTES: usize = 1 << 20;
/// Fields that versions before 7ac5350 kept and that no version reads any more.
const OBSOLETE_FIELDS: [&str; 2] = ["told", "complete"];
/// What a complete list omits is removed after so many seconds, where the answer does not say it.
pub const REMOVAL_DELAY: u64 = 300;
/// What this version does not know of one order, bytes. More is not kept.
const MAX_UNKNOWN_BYTES: usize = 4 << 10;

/// The desired state as it is kept on the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DesiredState {
    #[serde(default)]
    pub lineage: String,
    #[serde(default)]
    pub generation: u64,
    #[serde(default)]
    pub agents: BTreeMap<AgentName, Order>,
    /// To be removed, or removed already.
    #[serde(default)]
    pub removed: BTreeSet<AgentName>,
    /// Its list came from a stand-in, and what that did not name stayed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spares_unnamed: bool,
    #[serde(default, skip_serializing_if = "PendingOrders::is_empty")]
    pub(super) open: PendingOrders,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// What of the lists that were taken is not in force, or not yet.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PendingOrders {
    /// Of the desired state that it belongs to: a version that does not know it writes it back beside another.
    #[serde(default)]
    generation: u64,
    /// What the last complete list omits, and for how many seconds so far. Until it is removed it stays as it was ordered.
    #[serde(default)]
    omitted: BTreeMap<AgentName, u64>,
    /// Orders that are not followed, by the sub-agent's name, or by their place in the list where that cannot be read.
    #[serde(default)]
    refused: BTreeMap<String, RejectedOrder>,
}

/// An order that is not followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RejectedOrder {
    #[serde(default)]
    pub name: Option<AgentName>,
    pub why: String,
    /// A command of a later version, and otherwise sound.
    #[serde(default)]
    pub is_unsupported: bool,
    /// Tells it from another order that is refused for the same reason.
    #[serde(default)]
    mark: u64,
}

impl PendingOrders {
    /// Where there is nothing, it belongs to no generation: that is not written either.
    fn normalized(self) -> PendingOrders {
        if self.is_empty() { PendingOrders::default() } else { self }
    }

    fn is_empty(&self) -> bool {
        self.omitted.is_empty() && self.refused.is_empty()
    }
}

impl DesiredState {
    /// Forgets what another version, which does not know it, wrote back beside a desired state that it took meanwhile.
    pub fn forget_stale(&mut self) {
        if self.open.generation != self.generation {
            self.open = PendingOrders::default();
        }
    }

    /// What the last complete list omits, and for how many seconds so far.
    pub fn omitted(&self) -> &BTreeMap<AgentName, u64> {
        &self.open.omitted
    }

    /// The orders that are not followed.
    pub fn rejected(&self) -> impl Iterator<Item = &RejectedOrder> {
        self.open.refused.values()
    }

    /// What was omitted has been so for so many seconds more.
    pub fn count_omission(&mut self, seconds: u64) {
        for so_far in self.open.omitted.values_mut() {
            *so_far = so_far.saturating_add(seconds);
        }
    }

    /// The desired state after the removal of what has been omitted for `delay` seconds; `None`: there is no such.
    pub fn without_omitted(&self, delay: u64) -> Option<DesiredState> {
        let is_due = |(_, so_far): &(&AgentName, &u64)| **so_far >= delay;
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

/// A desired state that takes the place of the one held.
#[derive(Debug, Clone, PartialEq)]
pub struct AcceptedState {
    pub desired: DesiredState,
    pub new_lineage: bool,
    /// Its generation is lower than the one held, which no clock explains.
    pub moved_back: bool,
    /// How many an empty list, though it says that it is complete, did not remove.
    pub kept: usize,
}

/// What becomes of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerOutcome {
    /// It brings nothing new.
    Unchanged,
    /// It is the desired state from now on.
    Accept(Box<AcceptedState>),
    /// It must not be acted on.
    Reject(String),
}

/// The host that an answer is for, at the moment when it came.
#[derive(Debug, Clone, Copy)]
pub struct AnswerContext<'a> {
    pub os: Os,
    pub arch: Arch,
    pub clocks: Clocks,
    /// The sub-agents that are installed, whoever ordered them.
    pub present: &'a BTreeSet<AgentName>,
    /// The answer is that of one who stands in for another and may know less: what a list of another lineage does not name stays, until that
    /// list changes.
    pub from_fallback: bool,
}

/// Judges an answer by what is held.
pub fn evaluate(held: &DesiredState, answer: &Answer, host: AnswerContext<'_>) -> AnswerOutcome {
    let Some(items) = &answer.agents else { return AnswerOutcome::Unchanged };
    let lineage = answer.lineage.clone().unwrap_or_default();
    if lineage.len() > MAX_LINEAGE_BYTES {
        let bytes = lineage.len();
        return AnswerOutcome::Reject(format!(
            "cannot take a desired state with a lineage of {bytes} bytes: at most {MAX_LINEAGE_BYTES}"
        ));
    }
    if items.len() > MAX_AGENTS {
        return AnswerOutcome::Reject(format!(
            "cannot take a desired state of {} orders: at most {MAX_AGENTS}",
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
    // A list of which an earlier version could not follow an order is followed as far as this one can, under the same number.
    let is_followed_further = same_number && !held.open.refused.is_empty();
    let counted = (!first && !new_lineage && !is_followed_further).then_some(held.generation);
    let moved_back = match generation::evaluate(counted, answer.generation, host.clocks) {
        Ok(next) => next == GenerationOrder::Back,
        Err(why) => return AnswerOutcome::Reject(why),
    };
    let is_strange = !held.lineage.is_empty() && answer.lineage.as_ref() != Some(&held.lineage);
    let spares_unnamed = host.from_fallback && is_strange;
    let Applied { agents, removed, omitted, refused } = list.apply(held, host.present, spares_unnamed);
    if let Err(why) = check_limits(&agents, &omitted, held) {
        return AnswerOutcome::Reject(why);
    }
    let kept = if list.complete && list.is_empty { agents.len() } else { 0 };
    let mut unknown = held.unknown.clone();
    unknown.retain(|name, _| !OBSOLETE_FIELDS.contains(&name.as_str()));
    let generation = answer.generation;
    let open = PendingOrders { generation, omitted, refused }.normalized();
    let desired = DesiredState { lineage, generation, agents, removed, spares_unnamed, open, unknown };
    let desired = desired.without_omitted(removal_delay(answer)).unwrap_or(desired);
    AnswerOutcome::Accept(Box::new(AcceptedState { desired, new_lineage, moved_back, kept }))
}

/// For how many seconds a complete list must have omitted a sub-agent before that is removed.
pub fn removal_delay(answer: &Answer) -> u64 {
    answer.removal_delay.unwrap_or(REMOVAL_DELAY)
}

/// The orders of a list, told apart.
struct SortedOrders<'a> {
    sound: Vec<&'a AgentOrder>,
    /// By the name, or the place in the list.
    refused: BTreeMap<String, RejectedOrder>,
    named: BTreeSet<&'a AgentName>,
    /// Of each it is known whom it is about.
    all_named: bool,
}

impl<'a> SortedOrders<'a> {
    fn of(items: &'a [MessageItem<AgentOrder>], host: AnswerContext<'_>) -> SortedOrders<'a> {
        let mut orders =
            SortedOrders { sound: vec![], refused: BTreeMap::new(), named: BTreeSet::new(), all_named: true };
        for (index, item) in items.iter().enumerate() {
            let (name, why, mark) = match item {
                MessageItem::Read(order) => (Some(&order.name), check(order, host).err(), item::mark(order)),
                MessageItem::Unreadable(Unreadable { name, why, mark }) => (name.as_ref(), Some(why.clone()), *mark),
            };
            let Some(name) = name else {
                orders.all_named = false;
                let why = why.unwrap_or_default();
                let refusal = RejectedOrder { name: None, why, is_unsupported: false, mark };
                orders.refused.insert(format!("order {} of the list", index + 1), refusal);
                continue;
            };
            // Which of two is meant cannot be known.
            let why = if orders.named.insert(name) { why } else { Some("it is named twice in one list".to_owned()) };
            if let Some(why) = why {
                orders.sound.retain(|order| order.name != *name);
                orders.reject(name, why, false, mark);
            } else if let MessageItem::Read(order) = item {
                match &order.cmd {
                    Cmd::Unknown(word) => {
                        let why = format!("cannot {word} {name}: this version does not know how");
                        orders.reject(name, why, true, mark);
                    }
                    Cmd::Run(_) | Cmd::Uninstall => orders.sound.push(order),
                }
            }
        }
        orders
    }

    fn reject(&mut self, name: &AgentName, why: String, is_unsupported: bool, mark: u64) {
        self.refused.insert(name.to_string(), RejectedOrder { name: Some(name.clone()), why, is_unsupported, mark });
    }
}

/// Whether an order is one that a gateway can mean, and that can be followed beside all others.
fn check(order: &AgentOrder, host: AnswerContext<'_>) -> Result<(), String> {
    let AgentOrder { name, package, cmd, spec, .. } = order;
    // What is there already, whatever it is called, may be stopped and removed.
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
    env::check(&spec.env).map_err(|why| format!("cannot take its environment: {why}"))
}

/// A list of orders.
struct OrderList<'a> {
    complete: bool,
    is_empty: bool,
    orders: SortedOrders<'a>,
}

/// What a list makes of what is held.
struct Applied {
    agents: BTreeMap<AgentName, Order>,
    removed: BTreeSet<AgentName>,
    omitted: BTreeMap<AgentName, u64>,
    refused: BTreeMap<String, RejectedOrder>,
}

impl OrderList<'_> {
    fn apply(&self, held: &DesiredState, present: &BTreeSet<AgentName>, spares_unnamed: bool) -> Applied {
        let SortedOrders { sound, refused, named, all_named } = &self.orders;
        let mut agents = held.agents.clone();
        let mut removed = held.removed.clone();
        for order in sound {
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
        // Of what was never there, nothing is to be removed, or to be remembered.
        removed.retain(|name| present.contains(name) || held.agents.contains_key(name));
        let so_far = |name: &AgentName| held.open.omitted.get(name).copied().unwrap_or(0);
        let omitted = match self.complete {
            true if !self.is_empty && *all_named && !spares_unnamed => {
                let omitted = present.iter().chain(held.agents.keys());
                let omitted = omitted.filter(|name| !named.contains(name) && !removed.contains(*name));
                omitted.map(|name| (name.clone(), so_far(name))).collect()
            }
            // It does not say that anything is to go.
            true => BTreeMap::new(),
            false => {
                let mut omitted = held.open.omitted.clone();
                omitted.retain(|name, _| !named.contains(name) && !removed.contains(name));
                omitted
            }
        };
        let mut refused = refused.clone();
        if !self.complete {
            let earlier = held
                .open
                .refused
                .iter()
                .filter(|(_, refusal)| refusal.name.as_ref().is_some_and(|name| !named.contains(name)));
            refused.extend(earlier.map(|(name, refusal)| (name.clone(), refusal.clone())));
        }
        Applied { agents, removed, omitted, refused }
    }

    /// Whether it is a repetition: followed once more, it would leave what is wanted as it is.
    ///
    /// Of a gateway that counts its lists, the same number says that nothing more is to be removed either; whoever counts nothing may mean
    /// that.
    fn is_repetition(&self, held: &DesiredState, present: &BTreeSet<AgentName>) -> bool {
        let applied = self.apply(held, present, held.spares_unnamed);
        let is_counted = held.generation > 0 || !held.lineage.is_empty();
        let is_asked = |name: &&AgentName| !is_counted || held.agents.contains_key(*name);
        applied.agents == held.agents
            && applied.refused == held.open.refused
            && applied.omitted.keys().filter(is_asked).eq(held.open.omitted.keys().filter(is_asked))
            && (is_counted || applied.removed.iter().all(|name| held.removed.contains(name) || !present.contains(name)))
    }
}

/// An order as it is kept.
fn order_to_keep(order: &AgentOrder, run: Run) -> Order {
    let AgentOrder { package, spec, retry, .. } = order;
    let unknown = match unknown::bytes(&order.unknown) {
        ..=MAX_UNKNOWN_BYTES => order.unknown.clone(),
        _ => UnknownFields::new(),
    };
    Order { package: package.clone(), run, spec: spec.clone(), retry: *retry, unknown }
}

/// Whether all that is wanted then can be kept: lists that are not complete add up, and so does what waits to be removed. What was kept
/// before can be kept again.
fn check_limits(
    agents: &BTreeMap<AgentName, Order>,
    omitted: &BTreeMap<AgentName, u64>,
    held: &DesiredState,
) -> Result<(), String> {
    let wanted = || agents.iter().filter(|(name, _)| !omitted.contains_key(*name));
    let count = wanted().count();
    if count > MAX_AGENTS.max(held.agents.len()) {
        return Err(format!("cannot take a desired state with {count} sub-agents: at most {MAX_AGENTS}"));
    }
    let bytes_of = |order: &Order| env::bytes(&order.spec.env);
    let before: usize = held.agents.values().map(bytes_of).sum();
    let bytes: usize = wanted().map(|(_, order)| bytes_of(order)).sum();
    if bytes > MAX_ENV_BYTES.max(before) {
        return Err(format!("cannot take a desired state with environments of {bytes} bytes: at most {MAX_ENV_BYTES}"));
    }
    let with_omitted: usize = agents.values().map(bytes_of).sum();
    if agents.len() > (2 * MAX_AGENTS).max(held.agents.len()) || with_omitted > (2 * MAX_ENV_BYTES).max(before) {
        return Err(format!(
            "cannot take a desired state with {count} sub-agents while {} others wait to be removed; send it again when they are",
            agents.len() - count
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
