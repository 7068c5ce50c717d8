//! What is remembered of one host, cut down to a bounded size, and the file that all of it lies in.

use std::collections::VecDeque;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::core::fleet::HostFacts;
use crate::core::model::{AgentId, Arch, Os};
use crate::core::protocol::{AgentReport, Event, Heartbeat, ManagerReport};
use crate::store::{self, Access};

/// The longest host name there can be.
pub(super) const MAX_HOSTNAME: usize = 255;
/// Characters kept of what a host says about one thing.
const MAX_MESSAGE: usize = 300;
/// Characters kept of a word, such as the kind of an event.
const MAX_WORD: usize = 64;
/// Sub-agents kept of one host's report.
const MAX_AGENTS: usize = 1_000;
/// Events kept of one host.
const MAX_EVENTS: usize = 50;
/// 50,000 hosts with twenty sub-agents each are about a third of it.
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

    /// The record after one more heartbeat.
    pub(super) fn after(
        previous: Option<Arc<Record>>,
        heartbeat: Heartbeat,
        given: Option<Given>,
        missing: Option<String>,
        address: Option<String>,
        now: u64,
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
        Record {
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
            unknown,
        }
    }
}

/// At most `most` characters of a text, and none that would disturb a terminal.
pub(super) fn cut(text: &str, most: usize) -> String {
    text.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn cut_report(mut report: AgentReport) -> AgentReport {
    report.message = report.message.map(|message| cut(&message, MAX_MESSAGE));
    report.env_hash = report.env_hash.map(|hash| cut(&hash, MAX_WORD));
    report
}

fn cut_event(mut event: Event) -> Event {
    event.time = cut(&event.time, MAX_WORD);
    event.kind = cut(&event.kind, MAX_WORD);
    event.outcome = cut(&event.outcome, MAX_WORD);
    event.message = cut(&event.message, MAX_MESSAGE);
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

/// Writes all records.
pub(in crate::gateway) fn save(path: &Path, records: &[Arc<Record>]) -> Result<()> {
    let hosts = records.iter().map(|record| &**record).collect();
    let content = FileOut { version: 1, hosts };
    store::replace_with(path, Access::Private, |file| {
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, &content)?;
        out.write_all(b"\n")?;
        out.flush()
    })
}

/// Reads all records; none where there is no file.
pub(in crate::gateway) fn load(path: &Path) -> Result<Vec<Record>> {
    let Some(bytes) = store::read(path, MAX_FILE_BYTES)? else { return Ok(Vec::new()) };
    let file: FileIn = serde_json::from_slice(&bytes)
        .with_context(|| format!("cannot read {}: it is not what was written there", path.display()))?;
    Ok(file.hosts)
}
