//! What every host said last and what it was told: the gateway's memory, and the answer to a heartbeat.
//!
//! A heartbeat is answered from memory alone. What a host is told is worked out when the fleet, the depot or the host's own facts have changed,
//! and kept until then. The file is written from time to time and at the end: what is lost with a crash, the next heartbeats bring again, and
//! generations never go back, because the host says which one it holds.

mod record;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use sha2::{Digest as _, Sha256};

pub(super) use self::record::{Given, Record, load, save};
use super::depot::Index;
use crate::core::fleet::{Fleet, HostFacts, HostOrders, orders_for};
use crate::core::generation;
use crate::core::item::MessageItem;
use crate::core::model::{AgentId, Release};
use crate::core::protocol::{Answer, Heartbeat};
use crate::core::text::{cut, hex};

/// More hosts than this are not remembered.
const MAX_HOSTS: usize = 50_000;
/// Of one host so much is remembered, bytes; and where all hosts together take as much as [`AMPLE`], so much.
const MOST: usize = 512 << 10;
const LEAST: usize = 8 << 10;
/// 50,000 hosts with [`LEAST`] each are no more than that again, and all together no more than the file may have.
const AMPLE: usize = 320 << 20;
/// What was worked out for no host that is there any more is forgotten when there are so many.
const MAX_UNUSED: usize = 256;
/// When there is no room, a host that was silent for so long makes place for a new one.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(7 * 86_400);
/// How many hosts a new fleet file is tried on before it is accepted.
const SAMPLE: usize = 1_000;

/// What answers are made from, as it stood at one time.
pub(super) struct Snapshot {
    /// Another one for every other world.
    pub(super) revision: u64,
    pub(super) fleet: Option<Arc<Fleet>>,
    pub(super) index: Arc<Index>,
    /// The public keys that hosts are to accept: the present one, and those to come.
    pub(super) pins: Vec<String>,
}

/// The hosts of this gateway.
pub(super) struct Hosts {
    lineage: String,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    hosts: HashMap<AgentId, KnownHost>,
    /// Of all records.
    bytes: usize,
    /// What was worked out in the present world, by its hash: most hosts are told the same.
    contents: HashMap<String, Arc<OrderContent>>,
    revision: u64,
    /// Something is not in the file yet.
    changed: bool,
}

struct KnownHost {
    record: Arc<Record>,
    /// What it is told, for which world and which facts.
    told: Option<(u64, HostFacts, Arc<OrderContent>)>,
}

/// What a host is told, with the hash by which another content is known.
struct OrderContent {
    told: HostOrders,
    hash: String,
}

/// Why a heartbeat is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostLimitReached;

impl Hosts {
    pub(super) fn new(lineage: String, records: Vec<Record>) -> Hosts {
        let hosts = records
            .into_iter()
            .map(|record| (record.agent_id.clone(), KnownHost { record: Arc::new(record), told: None }))
            .collect();
        let mut inner = Inner { hosts, ..Inner::default() };
        inner.bytes = inner.hosts.values().map(|known| known.record.bytes()).sum();
        Hosts { lineage, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing is left half-done behind the lock: each change is one assignment.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self) -> usize {
        self.lock().hosts.len()
    }

    /// Some of the hosts, spread over all of them.
    pub(super) fn sample(&self) -> Vec<HostFacts> {
        let inner = self.lock();
        let step = inner.hosts.len() / SAMPLE + 1;
        inner.hosts.values().step_by(step).map(|known| known.record.facts()).collect()
    }

    /// Every record, where something is not in the file yet.
    pub(super) fn changed(&self) -> Option<Vec<Arc<Record>>> {
        let mut inner = self.lock();
        std::mem::take(&mut inner.changed).then(|| inner.hosts.values().map(|known| known.record.clone()).collect())
    }

    /// What was taken as written was not.
    pub(super) fn mark_changed(&self) {
        self.lock().changed = true;
    }

    /// Remembers the heartbeat and answers it.
    pub(super) fn heartbeat(
        &self,
        heartbeat: Heartbeat,
        address: Option<String>,
        world: &Snapshot,
        now: u64,
    ) -> Result<Answer, HostLimitReached> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if inner.revision != world.revision {
            inner.contents.clear();
            inner.revision = world.revision;
        }
        if !inner.hosts.contains_key(&heartbeat.agent_id) && inner.hosts.len() >= MAX_HOSTS {
            make_room(inner, now)?;
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
                (Some(known.record), known.told)
            }
            None => (None, None),
        };
        let content = match cached {
            Some((revision, known_facts, content)) if revision == world.revision && known_facts == facts => {
                Some(content)
            }
            _ => world.fleet.as_ref().map(|fleet| content(fleet, &facts, &world.index, &mut inner.contents)),
        };

        let held = (heartbeat.lineage.as_ref() == Some(&self.lineage)).then_some(heartbeat.generation);
        let last = previous.as_ref().and_then(|record| record.given.clone());
        let given = content.as_ref().map(|content| {
            let same = last.as_ref().is_some_and(|last| last.content == content.hash);
            let generation = generation::next(last.as_ref().map(|last| last.generation), same, held, now);
            Given { generation, content: content.hash.clone() }
        });

        let told = content.as_ref().map(|content| &content.told);
        let mut answer = Answer {
            agent_id: heartbeat.agent_id.clone(),
            error_message: None,
            interval: world.fleet.as_ref().map(|fleet| fleet.interval.as_secs()),
            removal_delay: world.fleet.as_ref().map(|fleet| fleet.removal_delay.as_secs()),
            lineage: None,
            generation: 0,
            cmd: None,
            manager: None,
            complete: false,
            agents: None,
            pins: world.pins.clone(),
            ack: heartbeat.events.iter().map(|event| event.id).max(),
        };
        match (told, &given) {
            (Some(told), Some(given)) => {
                answer.error_message = told.missing.clone();
                answer.lineage = Some(self.lineage.clone());
                answer.generation = given.generation;
                answer.manager = told.manager.clone().map(MessageItem::Read);
                if told.manager.as_ref().is_some_and(|order| order.version != heartbeat.manager.version) {
                    answer.cmd = Some("upgrade".to_owned());
                }
                if held != Some(given.generation) {
                    answer.agents = Some(told.agents.iter().cloned().map(MessageItem::Read).collect());
                    answer.complete = told.complete;
                }
            }
            _ => answer.error_message = Some("the gateway has no good fleet.toml yet".to_owned()),
        }

        let missing = told.and_then(|told| told.missing.clone());
        let most = if inner.bytes < AMPLE { MOST } else { LEAST };
        let record = Record::after(previous, heartbeat, given.or(last), missing, address, now, most);
        inner.bytes += record.bytes();
        let told = content.map(|content| (world.revision, facts, content));
        inner.hosts.insert(record.agent_id.clone(), KnownHost { record: Arc::new(record), told });
        inner.changed = true;
        Ok(answer)
    }
}

fn content(
    fleet: &Fleet,
    facts: &HostFacts,
    index: &Index,
    contents: &mut HashMap<String, Arc<OrderContent>>,
) -> Arc<OrderContent> {
    let told = orders_for(&fleet.desired(facts), facts, |name, version| {
        let release = Release { name: name.parse().ok()?, version: version.clone(), os: facts.os, arch: facts.arch };
        index.offer(&release)
    });
    // What cannot be written as JSON cannot be sent either; then every content counts as another one.
    let hash = hex(&Sha256::digest(serde_json::to_vec(&told).unwrap_or_default()));
    // Not each time, where they are all in use.
    if contents.len() >= MAX_UNUSED && contents.len().is_power_of_two() {
        contents.retain(|_, content| Arc::strong_count(content) > 1);
    }
    contents.entry(hash.clone()).or_insert_with(|| Arc::new(OrderContent { told, hash })).clone()
}

fn make_room(inner: &mut Inner, now: u64) -> Result<(), HostLimitReached> {
    let stalest =
        inner.hosts.values().min_by_key(|known| known.record.last_heartbeat).map(|known| known.record.clone());
    let stalest = stalest.ok_or(HostLimitReached)?;
    if now.saturating_sub(stalest.last_heartbeat) < FORGOTTEN_AFTER.as_millis() as u64 {
        return Err(HostLimitReached);
    }
    tracing::info!(agent_id = %stalest.agent_id, "a silent host is forgotten to make room for another");
    inner.bytes = inner.bytes.saturating_sub(stalest.bytes());
    inner.hosts.remove(&stalest.agent_id);
    Ok(())
}

#[cfg(test)]
mod tests;
