//! What is remembered of one host, cut down to a bounded size, and the file that all of it lies in.

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

/// The longest host name there can be, bytes.
pub(super) const MAX_HOSTNAME: usize = 255;
/// Bytes kept of what a host says about one thing.
const MAX_MESSAGE: usize = 300;
/// Bytes kept of a word, such as the kind of an event.
const MAX_WORD: usize = 64;
/// Of what a host has pinned, so many, each of so many bytes.
const MAX_PINS_KEPT: usize = 16;
const MAX_PIN: usize = 80;
/// Events kept of one host.
const MAX_EVENTS: usize = 50;
/// What a record and a report take besides their texts, in memory and in the file.
const RECORD_BYTES: usize = 800;
const REPORT_BYTES: usize = 200;
/// 50,000 hosts with twenty sub-agents each are about a third of it; no more is written.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// One host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::gateway) struct Record {
    pub(in crate::gateway) agent_id: AgentId,
    pub(in crate::gateway) instance_id: String,
    pub(in crate::gateway) hostname: String,
    pub(in crate::gateway) os: Os,
    pub(in crate::gateway) arch: Arch,
    /// Where the last heartbeat came from.
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
    /// The generation that the host held then.
    #[serde(default)]
    pub(in crate::gateway) held: u64,
    #[serde(default)]
    pub(in crate::gateway) given: Option<Given>,
    /// What the depot does not have for it.
    #[serde(default)]
    pub(in crate::gateway) missing: Option<String>,
    /// The id of the last event seen.
    #[serde(default)]
    pub(in crate::gateway) ack: u64,
    #[serde(default)]
    pub(in crate::gateway) events: VecDeque<Event>,
    /// Another machine that goes by the same agent id.
    #[serde(default)]
    pub(in crate::gateway) twin: Option<Twin>,
    /// How it checks this gateway's certificate; absent: of an older version, which does not say.
    #[serde(default)]
    pub(in crate::gateway) trust: Option<TrustReport>,
    /// What a newer version wrote.
    #[serde(flatten)]
    unknown: serde_json::Map<String, serde_json::Value>,
}

/// What a host was told last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::gateway) struct Given {
    pub(in crate::gateway) generation: u64,
    /// Hash of the content.
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

    /// The record after one more heartbeat, of at most that many bytes.
    pub(super) fn after(
        previous: Option<Arc<Record>>,
        heartbeat: Heartbeat,
        given: Option<Given>,
        missing: Option<String>,
        address: Option<String>,
        now: u64,
        most: usize,
    ) -> Record {
        let instance_id = cut(&heartbeat.instance_id, MAX_WORD);
        // Copied only while the file is being written.
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
            // Ids that begin anew are those of a new installation.
            let seen = if last < ack { 0 } else { ack };
            let new = heartbeat.events.into_iter().filter(|event| event.id > seen);
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
        record.fit(most);
        record
    }

    /// What it takes, in memory and in the file, bytes; about.
    pub(super) fn bytes(&self) -> usize {
        let texts = [Some(&self.hostname), self.missing.as_ref(), self.twin.as_ref().map(|twin| &twin.hostname)];
        let texts: usize = texts.into_iter().flatten().map(String::len).sum();
        RECORD_BYTES
            + texts
            + self.trust.as_ref().map_or(0, trust_bytes)
            + self.agents.iter().map(report_bytes).sum::<usize>()
            + self.events.iter().map(Event::size).sum::<usize>()
    }

    /// Leaves out what is too much: the oldest events, then what is said about sub-agents, then sub-agents.
    fn fit(&mut self, most: usize) {
        let mut surplus = self.bytes().saturating_sub(most);
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

/// Writes all records; gives the time that it took to write them, without that of the disk to sync them.
pub(in crate::gateway) fn save(path: &Path, records: &[Arc<Record>]) -> Result<Duration> {
    let started = Instant::now();
    let mut work = Duration::ZERO;
    let hosts = records.iter().map(|record| &**record).collect();
    let content = FileOut { version: 1, hosts };
    store::replace_with(path, Access::Private, |file| {
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, &content)?;
        out.write_all(b"\n")?;
        out.flush()?;
        work = started.elapsed();
        // What could not be read again would be lost with the next start.
        match out.get_ref().metadata()?.len() {
            bytes if bytes > MAX_FILE_BYTES => {
                Err(io::Error::other(format!("it would have {bytes} bytes, too many to be read")))
            }
            _ => Ok(()),
        }
    })?;
    Ok(work)
}

/// Reads all records; none where there is no file.
pub(in crate::gateway) fn load(path: &Path) -> Result<Vec<Record>> {
    let Some(bytes) = store::read(path, MAX_FILE_BYTES)? else { return Ok(Vec::new()) };
    let file: FileIn = serde_json::from_slice(&bytes)
        .with_context(|| format!("cannot read {}: it is not what was written there", path.display()))?;
    Ok(file.hosts)
}
