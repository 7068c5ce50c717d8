//! The record of a sub-agent's process, by which the next manager adopts it and any role can stop it.
//!
//! It is optional: if it cannot be written (a full or read-only disk), the process is identified by its group and its environment marker.
//! If it cannot be removed, its pid, start time and boot show that the process has exited.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::core::manifest::{KillMode, StopSignal};
use crate::core::model::{AgentName, Version};
use crate::core::program::PackageKind;
use crate::home::Home;
use crate::platform::{Group, ProcessInfo};
use crate::{platform, store};

/// The part of a record that is known before the process exists.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordHead {
    pub format: u32,
    pub name: AgentName,
    pub version: Version,
    pub kind: PackageKind,
    /// Hash of the environment from the gateway's order.
    pub env_hash: String,
    /// Automatic restarts so far.
    pub restarts: u64,
    pub stop_signal: StopSignal,
    pub grace_seconds: u64,
    pub kill_mode: KillMode,
    pub boot_id: String,
    /// It is the process of `control start`, and no process that this started was found.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unseen: bool,
}

/// A started process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessRecord {
    #[serde(flatten)]
    pub head: RecordHead,
    pub pid: u32,
    /// In units of the platform; together with the pid it identifies a process permanently within one boot.
    pub start_time: u64,
    /// The group of its process tree; `None`: it started outside of any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// A session that belongs to it although another process, which has exited, started it: the program forks twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<u32>,
    /// Its exit, if a manager has reported it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<ProcessExit>,
}

/// How a process exited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessExit {
    /// `None`: the exit status is unknown.
    pub success: Option<bool>,
    pub how: String,
}

impl RecordHead {
    /// The record's JSON up to the pid, which the child appends.
    pub fn text_before_pid(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self)?;
        text.pop();
        text.extend_from_slice(b",\"pid\":");
        Ok(text)
    }

    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_seconds)
    }
}

impl ProcessRecord {
    /// Whether the recorded process is alive.
    pub fn is_alive(&self) -> bool {
        self.is_of_this_boot() && platform::is_alive(self.pid, self.start_time)
    }

    /// Whether pid and start time are still valid. A restarted container counts its pids from one again within the same boot of its host: a
    /// process from before is older than its first process.
    pub fn is_of_this_boot(&self) -> bool {
        static FIRST: OnceLock<u64> = OnceLock::new();
        let first = FIRST.get_or_init(|| platform::start_time(1).unwrap_or(0));
        self.head.boot_id == platform::boot_id() && self.start_time >= *first
    }

    /// Whether a process is in the session of the recorded one. A session's number is not reused while the session exists. If the process
    /// with that pid is younger than the recorded one, the number was reused.
    pub fn owns_session_of(&self, process: &ProcessInfo, leader: Option<&ProcessInfo>) -> bool {
        let younger = |leader: &ProcessInfo| leader.pid != self.pid && leader.start_time > self.start_time;
        let taken_over = |leader: &ProcessInfo| leader.pid == self.pid && leader.start_time != self.start_time;
        [Some(self.pid), self.session].contains(&Some(process.session))
            && !leader.is_some_and(|leader| younger(leader) || taken_over(leader))
    }

    /// The group that it started in.
    pub fn group(&self) -> Option<Group> {
        self.group.as_deref().map(Group::named)
    }

    /// Writes the record if possible, without waiting for the disk: after a power cut it would be invalid.
    pub fn save(&self, home: &Home) {
        let name = &self.head.name;
        if let Err(error) = store::save_unsynced(&home.process_record(name), self) {
            let error = format!("{error:#}");
            tracing::warn!(agent = %name, error, "cannot write a process record; the process is identified by its environment marker");
        }
    }
}

/// Time since the record of a sub-agent was written.
pub fn age(home: &Home, name: &AgentName) -> Option<Duration> {
    std::fs::metadata(home.process_record(name)).and_then(|metadata| metadata.modified()).ok()?.elapsed().ok()
}

/// Reads a record. An unreadable one counts as missing: processes are then found by their environment markers.
fn read(path: &Path) -> Option<ProcessRecord> {
    match store::load(path) {
        Ok(record) => record,
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot read a process record; its sub-agent is found by its environment marker"
            );
            None
        }
    }
}

/// The record of a sub-agent, if it exists.
pub fn of(home: &Home, name: &AgentName) -> Option<ProcessRecord> {
    read(&home.process_record(name))
}

/// Every record of a home.
pub fn all(home: &Home) -> Vec<ProcessRecord> {
    let Ok(entries) = std::fs::read_dir(home.process_records()) else { return vec![] };
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            (path.extension()? == "json").then(|| read(&path))?
        })
        .collect()
}

/// Removes the record of a process that has exited, if possible.
pub fn discard(home: &Home, name: &AgentName) {
    if let Err(error) = remove(home, name) {
        let error = format!("{error:#}");
        tracing::warn!(agent = %name, error, "cannot remove the record of a process that has exited");
    }
}

/// Removes the record of a sub-agent that is being uninstalled.
pub fn remove(home: &Home, name: &AgentName) -> Result<()> {
    let path = home.process_record(name);
    // The previous record, whose file the next launch reuses.
    store::remove(&path.with_extension("json.old"))?;
    store::remove(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_completed_by_the_child_can_be_read() {
        let head = RecordHead {
            format: 1,
            name: "a".parse().unwrap(),
            version: "1".parse().unwrap(),
            kind: PackageKind::Native,
            env_hash: "x".into(),
            restarts: 3,
            stop_signal: StopSignal::Int,
            grace_seconds: 10,
            kill_mode: KillMode::Process,
            boot_id: "b".into(),
            unseen: true,
        };
        let mut text = head.text_before_pid().unwrap();
        text.extend_from_slice(b"12,\"startTime\":34,\"group\":\"g\"}\n");
        let record: ProcessRecord = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            record,
            ProcessRecord { head, pid: 12, start_time: 34, group: Some("g".into()), session: None, ended: None }
        );
    }
}
