//! The records of all hosts, and the answer to a heartbeat.
//!
//! A heartbeat is answered from memory. The orders for a host are computed when the fleet, the depot or the host's own facts change, and
//! cached. The records are written to a file periodically and at the end. After a crash the next heartbeats restore them; generations never
//! decrease, because every host reports the one that it has.

mod record;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use sha2::{Digest as _, Sha256};

pub(super) use self::record::{Record, SentState, load, save};
use super::depot::Index;
use crate::core::fleet::{Fleet, HostFacts, HostOrders, orders_for};
use crate::core::generation;
use crate::core::item::MessageItem;
use crate::core::model::{AgentId, Release};
use crate::core::protocol::{Answer, Heartbeat};
use crate::core::text::{cut, hex};

/// The limit of hosts.
const MAX_HOSTS: usize = 50_000;
/// The limit of one record, bytes.
const MAX_RECORD_BYTES: usize = 512 << 10;
/// The limit of one record while all records together have [`FULL_BYTES`] or more, bytes.
const MAX_RECORD_BYTES_WHEN_FULL: usize = 8 << 10;
/// The total size, bytes, from which new records are smaller. 50,000 hosts with [`MAX_RECORD_BYTES_WHEN_FULL`] each need about as much again:
/// together less than the limit of the file.
const FULL_BYTES: usize = 320 << 20;
/// The number of cached orders from which unused ones are removed.
const UNUSED_LIMIT: usize = 256;
/// At the limit of hosts, a new host replaces one that has been silent for this long.
const REPLACEABLE_AFTER: Duration = Duration::from_secs(7 * 86_400);
/// The number of hosts that a new fleet file is validated with.
const SAMPLE_SIZE: usize = 1_000;

/// The data that heartbeats are answered from, at one time.
pub(super) struct Snapshot {
    /// Increases with every new snapshot.
    pub(super) revision: u64,
    pub(super) fleet: Option<Arc<Fleet>>,
    pub(super) index: Arc<Index>,
    /// The pins that hosts are to accept: the present one and the next ones.
    pub(super) pins: Vec<String>,
}

/// The records of all hosts.
pub(super) struct Hosts {
    lineage: String,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    hosts: HashMap<AgentId, KnownHost>,
    /// The size of all records.
    bytes: usize,
    /// The orders for the present snapshot, by hash: most hosts have the same ones.
    contents: HashMap<String, Arc<OrderContent>>,
    revision: u64,
    /// Whether the file is out of date.
    changed: bool,
}

struct KnownHost {
    record: Arc<Record>,
    /// Its cached orders, with the revision and the facts that they were computed for.
    orders: Option<(u64, HostFacts, Arc<OrderContent>)>,
}

/// The orders for a host, with their hash.
struct OrderContent {
    orders: HostOrders,
    hash: String,
}

/// The rejection of a heartbeat of a new host, at the limit of hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostLimitReached;

impl Hosts {
    pub(super) fn new(lineage: String, records: Vec<Record>) -> Hosts {
        let hosts = records
            .into_iter()
            .map(|record| (record.agent_id.clone(), KnownHost { record: Arc::new(record), orders: None }))
            .collect();
        let mut inner = Inner { hosts, ..Inner::default() };
        inner.bytes = inner.hosts.values().map(|known| known.record.bytes()).sum();
        Hosts { lineage, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A poisoned lock is safe: each change is one assignment.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self) -> usize {
        self.lock().hosts.len()
    }

    /// The facts of a sample of the hosts.
    pub(super) fn sample(&self) -> Vec<HostFacts> {
        let inner = self.lock();
        let step = inner.hosts.len() / SAMPLE_SIZE + 1;
        inner.hosts.values().step_by(step).map(|known| known.record.facts()).collect()
    }

    /// All records, if they have changed since the last call.
    pub(super) fn changed(&self) -> Option<Vec<Arc<Record>>> {
        let mut inner = self.lock();
        std::mem::take(&mut inner.changed).then(|| inner.hosts.values().map(|known| known.record.clone()).collect())
    }

    /// Marks the records as changed again, after a failed write.
    pub(super) fn mark_changed(&self) {
        self.lock().changed = true;
    }

    /// Records the heartbeat and returns the answer.
    pub(super) fn heartbeat(
        &self,
        heartbeat: Heartbeat,
        address: Option<String>,
        snapshot: &Snapshot,
        now: u64,
    ) -> Result<Answer, HostLimitReached> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if inner.revision != snapshot.revision {
            inner.contents.clear();
            inner.revision = snapshot.revision;
        }
        if !inner.hosts.contains_key(&heartbeat.agent_id) && inner.hosts.len() >= MAX_HOSTS {
            remove_a_silent_host(inner, now)?;
        }
        let facts = HostFacts {
            agent_id: heartbeat.agent_id.clone(),
            hostname: cut(&heartbeat.hostname, record::MAX_HOSTNAME),
            os: heartbeat.os,
            arch: heartbeat.arch,
        };
        let (previous, cached) = match inner.hosts.remove(&heartbeat.agent_id) {
            Some(known) => {
                inner.bytes = inner.bytes.saturating_sub(known.record.bytes());
                (Some(known.record), known.orders)
            }
            None => (None, None),
        };
        let content = match cached {
            Some((revision, known_facts, content)) if revision == snapshot.revision && known_facts == facts => {
                Some(content)
            }
            _ => {
                snapshot.fleet.as_ref().map(|fleet| cached_orders(fleet, &facts, &snapshot.index, &mut inner.contents))
            }
        };

        let held = (heartbeat.lineage.as_ref() == Some(&self.lineage)).then_some(heartbeat.generation);
        let last = previous.as_ref().and_then(|record| record.given.clone());
        let given = content.as_ref().map(|content| {
            let same = last.as_ref().is_some_and(|last| last.content == content.hash);
            let generation = generation::next(last.as_ref().map(|last| last.generation), same, held, now);
            SentState { generation, content: content.hash.clone() }
        });

        let orders = content.as_ref().map(|content| &content.orders);
        let mut answer = Answer {
            agent_id: heartbeat.agent_id.clone(),
            error_message: None,
            interval: snapshot.fleet.as_ref().map(|fleet| fleet.interval.as_secs()),
            removal_delay: snapshot.fleet.as_ref().map(|fleet| fleet.removal_delay.as_secs()),
            lineage: None,
            generation: 0,
            cmd: None,
            manager: None,
            complete: false,
            agents: None,
            pins: snapshot.pins.clone(),
            ack: heartbeat.events.iter().map(|event| event.id).max(),
        };
        match (orders, &given) {
            (Some(orders), Some(given)) => {
                answer.error_message = orders.missing.clone();
                answer.lineage = Some(self.lineage.clone());
                answer.generation = given.generation;
                answer.manager = orders.manager.clone().map(MessageItem::Read);
                if orders.manager.as_ref().is_some_and(|order| order.version != heartbeat.manager.version) {
                    answer.cmd = Some("upgrade".to_owned());
                }
                if held != Some(given.generation) {
                    answer.agents = Some(orders.agents.iter().cloned().map(MessageItem::Read).collect());
                    answer.complete = orders.complete;
                }
            }
            _ => answer.error_message = Some("the gateway has no valid fleet.toml yet".to_owned()),
        }

        let missing = orders.and_then(|orders| orders.missing.clone());
        let max_bytes = if inner.bytes < FULL_BYTES { MAX_RECORD_BYTES } else { MAX_RECORD_BYTES_WHEN_FULL };
        let record = Record::after(previous, heartbeat, given.or(last), missing, address, now, max_bytes);
        inner.bytes += record.bytes();
        let orders = content.map(|content| (snapshot.revision, facts, content));
        inner.hosts.insert(record.agent_id.clone(), KnownHost { record: Arc::new(record), orders });
        inner.changed = true;
        Ok(answer)
    }
}

fn cached_orders(
    fleet: &Fleet,
    facts: &HostFacts,
    index: &Index,
    contents: &mut HashMap<String, Arc<OrderContent>>,
) -> Arc<OrderContent> {
    let orders = orders_for(&fleet.desired(facts), facts, |name, version| {
        let release = Release { name: name.parse().ok()?, version: version.clone(), os: facts.os, arch: facts.arch };
        index.offer(&release)
    });
    // Serializing cannot fail, or the answer could not be sent either.
    let hash = hex(&Sha256::digest(serde_json::to_vec(&orders).unwrap_or_default()));
    // At powers of two only: all of them may be in use.
    if contents.len() >= UNUSED_LIMIT && contents.len().is_power_of_two() {
        contents.retain(|_, content| Arc::strong_count(content) > 1);
    }
    contents.entry(hash.clone()).or_insert_with(|| Arc::new(OrderContent { orders, hash })).clone()
}

fn remove_a_silent_host(inner: &mut Inner, now: u64) -> Result<(), HostLimitReached> {
    let stalest =
        inner.hosts.values().min_by_key(|known| known.record.last_heartbeat).map(|known| known.record.clone());
    let stalest = stalest.ok_or(HostLimitReached)?;
    if now.saturating_sub(stalest.last_heartbeat) < REPLACEABLE_AFTER.as_millis() as u64 {
        return Err(HostLimitReached);
    }
    tracing::info!(agent_id = %stalest.agent_id, "at the limit of hosts, a host without a recent heartbeat is replaced with a new one");
    inner.bytes = inner.bytes.saturating_sub(stalest.bytes());
    inner.hosts.remove(&stalest.agent_id);
    Ok(())
}

#[cfg(test)]
mod tests;
