//! The record of one host, limited in size, and the file with all records.

use std::collections::VecDeque;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::core::fleet::HostFacts;
use crate::core::model::{AgentId, Arch, Os};
use crate::core::protocol::{AgentReport, Event, Heartbeat, MAX_AGENTS, ManagerReport, TrustReport};
use crate::core::text::cut;
use crate::store::{self, Access};

/// The longest host name, bytes.
pub(super) const MAX_HOSTNAME: usize = 255;
/// Bytes kept of a message.
const MAX_MESSAGE: usize = 300;
/// Bytes kept of a short text, such as the kind of an event.
const MAX_WORD: usize = 64;
/// Pins kept of one host.
const MAX_PINS_KEPT: usize = 16;
/// Bytes kept of one pin.
const MAX_PIN: usize = 80;
/// Events kept of one host.
const MAX_EVENTS: usize = 50;
/// Bytes of a record and of a report besides their texts, in memory and in the file.
const RECORD_BYTES: usize = 800;
const REPORT_BYTES: usize = 200;
/// The largest file that is written and read; 50,000 hosts with twenty sub-agents each need about a third of it.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// The record of one host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::gateway) struct Record {
    pub(in crate::gateway) agent_id: AgentId,
    pub(in crate::gateway) instance_id: String,
    pub(in crate::gateway) hostname: String,
    pub(in crate::gateway) os: Os,
    pub(in crate::gateway) arch: Arch,
    /// The IP address that sent the last heartbeat.
    #[serde(default)]
    pub(in crate::gateway) address: Option<String>,
    pub(in crate::gateway) manager: ManagerReport,
    #[serde(default)]
    pub(in crate::gateway) agents: Vec<AgentReport>,
    /// Unix milliseconds, by this gateway's clock.
    pub(in crate::gateway) last_heartbeat: u64,
    /// Seconds by which the host's clock was ahead of this gateway's.
    #[serde(default)]
    pub(in crate::gateway) clock_offset_seconds: Option<i64>,
    /// The generation that the host had then.
    #[serde(default)]
    pub(in crate::gateway) held: u64,
    #[serde(default)]
    pub(in crate::gateway) given: Option<SentState>,
    /// A message about packages that the depot does not have for it.
    #[serde(default)]
    pub(in crate::gateway) missing: Option<String>,
    /// The id of the last event received.
    #[serde(default)]
    pub(in crate::gateway) ack: u64,
    #[serde(default)]
    pub(in crate::gateway) events: VecDeque<Event>,
    /// Another machine that uses the same agent id.
    #[serde(default)]
    pub(in crate::gateway) twin: Option<Twin>,
    /// How it verifies this gateway's certificate; absent if its version is too old to report it.
    #[serde(default)]
    pub(in crate::gateway) trust: Option<TrustReport>,
    /// Fields of a newer version of the gateway.
    #[serde(flatten)]
    unknown: serde_json::Map<String, serde_json::Value>,
}

/// The desired state that was last sent to a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::gateway) struct SentState {
    pub(in crate::gateway) generation: u64,
    /// The hash of its content.
    pub(in crate::gateway) content: String,
}

/// The other of two machines with one agent id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::gateway) struct Twin {
    pub(in crate::gateway) instance_id: String,
    pub(in crate::gateway) hostname: String,
    /// Unix milliseconds.
    pub(in crate::gateway) last_heartbeat: u64,
}

impl Record {
    pub(in crate::gateway) fn facts(&self) -> HostFacts {
        HostFacts { agent_id: self.agent_id.clone(), hostname: self.hostname.clone(), os: self.os, arch: self.arch }
    }

    /// The record after the next heartbeat, limited to `max_bytes` bytes.
    pub(super) fn after(
        previous: Option<Arc<Record>>,
        heartbeat: Heartbeat,
        given: Option<SentState>,
        missing: Option<String>,
        address: Option<String>,
        now: u64,
        max_bytes: usize,
    ) -> Record {
        let instance_id = cut(&heartbeat.instance_id, MAX_WORD);
        // It is cloned only while the file is being written.
        let previous = previous.map(Arc::unwrap_or_clone);
        let (mut events, mut ack, twin, unknown) = match previous {
            Some(previous) => {
                let twin = if previous.instance_id == instance_id {
                    previous.twin
                } else {
                    let Record { instance_id, hostname, last_heartbeat, .. } = previous;
                    Some(Twin { instance_id, hostname, last_heartbeat })
                };
                (previous.events, previous.ack, twin, previous.unknown)
            }
            None => (VecDeque::new(), 0, None, serde_json::Map::new()),
        };
        if let Some(last) = heartbeat.events.iter().map(|event| event.id).max() {
            // Ids restart with a new installation.
            let acknowledged = if last < ack { 0 } else { ack };
            let new = heartbeat.events.into_iter().filter(|event| event.id > acknowledged);
            events.extend(new.map(cut_event));
            events.drain(..events.len().saturating_sub(MAX_EVENTS));
            ack = last;
        }
        let mut record = Record {
            agent_id: heartbeat.agent_id,
            instance_id,
            hostname: cut(&heartbeat.hostname, MAX_HOSTNAME),
            os: heartbeat.os,
            arch: heartbeat.arch,
            address,
            manager: heartbeat.manager,
            agents: heartbeat.agents.into_iter().take(MAX_AGENTS).map(cut_report).collect(),
            last_heartbeat: now,
            clock_offset_seconds: heartbeat.clock_offset_seconds,
            held: heartbeat.generation,
            given,
            missing,
            ack,
            events,
            twin,
            trust: heartbeat.trust.map(cut_trust),
            unknown,
        };
        record.shrink(max_bytes);
        record
    }

    /// Its approximate size in memory and in the file, bytes.
    pub(super) fn bytes(&self) -> usize {
        let texts = [Some(&self.hostname), self.missing.as_ref(), self.twin.as_ref().map(|twin| &twin.hostname)];
        let texts: usize = texts.into_iter().flatten().map(String::len).sum();
        RECORD_BYTES
            + texts
            + self.trust.as_ref().map_or(0, trust_bytes)
            + self.agents.iter().map(report_bytes).sum::<usize>()
            + self.events.iter().map(Event::size).sum::<usize>()
    }

    /// Removes the oldest events, then messages about sub-agents, then sub-agents, until the record has at most `max_bytes` bytes.
    fn shrink(&mut self, max_bytes: usize) {
        let mut surplus = self.bytes().saturating_sub(max_bytes);
        while surplus > 0
            && let Some(event) = self.events.pop_front()
        {
            surplus = surplus.saturating_sub(event.size());
        }
        for report in self.agents.iter_mut().rev() {
            if surplus == 0 {
                return;
            }
            surplus = surplus.saturating_sub(report.message.take().map_or(0, |message| message.len()));
        }
        while surplus > 0
            && let Some(report) = self.agents.pop()
        {
            surplus = surplus.saturating_sub(report_bytes(&report));
        }
    }
}

fn report_bytes(report: &AgentReport) -> usize {
    let AgentReport { name, version, state: _, pid: _, restarts: _, env_hash, message } = report;
    let words = name.as_str().len() + version.as_ref().map_or(0, |version| version.as_str().len());
    REPORT_BYTES + words + env_hash.as_ref().map_or(0, String::len) + message.as_ref().map_or(0, String::len)
}

fn cut_report(mut report: AgentReport) -> AgentReport {
    report.message = report.message.map(|message| cut(&message, MAX_MESSAGE));
    report.env_hash = report.env_hash.map(|hash| cut(&hash, MAX_WORD));
    report
}

fn cut_trust(mut trust: TrustReport) -> TrustReport {
    trust.by = cut(&trust.by, MAX_WORD);
    trust.pins.truncate(MAX_PINS_KEPT);
    trust.pins.iter_mut().for_each(|pin| *pin = cut(pin, MAX_PIN));
    trust.certificate_end = trust.certificate_end.map(|end| cut(&end, MAX_WORD));
    trust
}

fn trust_bytes(trust: &TrustReport) -> usize {
    trust.by.len()
        + trust.pins.iter().map(String::len).sum::<usize>()
        + trust.certificate_end.as_ref().map_or(0, String::len)
}

fn cut_event(mut event: Event) -> Event {
    event.time = cut(&event.time, MAX_WORD);
    event.kind = cut(&event.kind, MAX_WORD);
    event.outcome = cut(&event.outcome, MAX_WORD);
    event.message = cut(&event.message, MAX_MESSAGE);
    event.unknown.clear();
    event
}

#[derive(Serialize)]
struct FileOut<'a> {
    version: u32,
    hosts: Vec<&'a Record>,
}

#[derive(Deserialize)]
struct FileIn {
    hosts: Vec<Record>,
}

/// Writes all records; returns how long that took without the sync.
pub(in crate::gateway) fn save(path: &Path, records: &[Arc<Record>]) -> Result<Duration> {
    let started = Instant::now();
    let mut elapsed = Duration::ZERO;
    let hosts = records.iter().map(|record| &**record).collect();
    let content = FileOut { version: 1, hosts };
    store::replace_with(path, Access::Private, |file| {
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, &content)?;
        out.write_all(b"\n")?;
        out.flush()?;
        elapsed = started.elapsed();
        // A larger file could not be read at the next start.
        match out.get_ref().metadata()?.len() {
            bytes if bytes > MAX_FILE_BYTES => {
                Err(io::Error::other(format!("it would have {bytes} bytes, more than can be read")))
            }
            _ => Ok(()),
        }
    })?;
    Ok(elapsed)
}

/// Reads all records; a missing file has none.
pub(in crate::gateway) fn load(path: &Path) -> Result<Vec<Record>> {
    let Some(bytes) = store::read(path, MAX_FILE_BYTES)? else { return Ok(Vec::new()) };
    let file: FileIn =
        serde_json::from_slice(&bytes).with_context(|| format!("cannot read {}: it is damaged", path.display()))?;
    Ok(file.hosts)
}
