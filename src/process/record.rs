//! The record of a sub-agent's process, by which the next manager adopts it and any role can stop it.
//!
//! It is a convenience: where it cannot be written (a full or read-only disk), the group and the mark of the process stand in. Where it
//! cannot be removed, it names a process that is dead, as pid, start time and boot tell.

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

/// What is known of a process before it is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordHead {
    pub format: u32,
    pub name: AgentName,
    pub version: Version,
    pub kind: PackageKind,
    /// Of the environment that the gateway told.
    pub env_hash: String,
    /// Restarts that nobody asked for, so far.
    pub restarts: u64,
    pub stop_signal: StopSignal,
    pub grace_seconds: u64,
    pub kill_mode: KillMode,
    pub boot_id: String,
    /// It is `control start`'s own, and no process that this started is known yet, or can be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unseen: bool,
}

/// A process that was started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessRecord {
    #[serde(flatten)]
    pub head: RecordHead,
    pub pid: u32,
    /// As the platform counts it; with the pid it names a process for good, within one boot.
    pub start_time: u64,
    /// What holds its process tree; `None`: it began outside of any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// A session that is its own though another process began it, which has ended: a program that forks twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<u32>,
    /// Its end, where a manager has reported it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<ProcessExit>,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessExit {
    /// `None`: its exit status is not known.
    pub success: Option<bool>,
    pub how: String,
}

impl RecordHead {
    /// The record's JSON up to where the child puts its pid.
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
    /// Whether the process that was recorded runs now.
    pub fn is_alive(&self) -> bool {
        self.is_of_this_boot() && platform::lives(self.pid, self.start_time)
    }

    /// Whether its numbers mean what they meant. A container that was started anew counts its pids from one, within the same boot of its
    /// host: nothing of before is older than its first process.
    pub fn is_of_this_boot(&self) -> bool {
        static FIRST: OnceLock<u64> = OnceLock::new();
        let first = FIRST.get_or_init(|| platform::start_time(1).unwrap_or(0));
        self.head.boot_id == platform::boot_id() && self.start_time >= *first
    }

    /// Whether a process lives in a session of its own. The number of one is given to nobody else while anybody lives in it; a process of that
    /// number that is younger than ours means that it is another's by now.
    pub fn owns_session_of(&self, process: &ProcessInfo, leader: Option<&ProcessInfo>) -> bool {
        let younger = |leader: &ProcessInfo| leader.pid != self.pid && leader.start_time > self.start_time;
        let taken_over = |leader: &ProcessInfo| leader.pid == self.pid && leader.start_time != self.start_time;
        [Some(self.pid), self.session].contains(&Some(process.session))
            && !leader.is_some_and(|leader| younger(leader) || taken_over(leader))
    }

    /// The group that it began in.
    pub fn group(&self) -> Option<Group> {
        self.group.as_deref().map(Group::named)
    }

    /// Writes it where that can be done, without waiting for the disk: after a power cut it would mean nothing.
    pub fn save(&self, home: &Home) {
        let name = &self.head.name;
        if let Err(error) = store::save_unsynced(&home.process_record(name), self) {
            let error = format!("{error:#}");
            tracing::warn!(agent = %name, error, "a process record cannot be written; the mark stands in");
        }
    }
}

/// How long ago the record of a sub-agent was written.
pub fn age(home: &Home, name: &AgentName) -> Option<Duration> {
    std::fs::metadata(home.process_record(name)).and_then(|metadata| metadata.modified()).ok()?.elapsed().ok()
}

/// One that cannot be read says nothing and is as good as none: the marks stand in.
fn read(path: &Path) -> Option<ProcessRecord> {
    match store::load(path) {
        Ok(record) => record,
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "a process record cannot be read; its sub-agent is looked for by its mark"
            );
            None
        }
    }
}

/// The record of a sub-agent, where there is one.
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

/// Removes the record of a process that is gone, where that can be done.
pub fn discard(home: &Home, name: &AgentName) {
    if let Err(error) = remove(home, name) {
        let error = format!("{error:#}");
        tracing::warn!(agent = %name, error, "a process record cannot be removed; it names a process that is dead");
    }
}

/// Removes the record of a sub-agent that is being uninstalled.
pub fn remove(home: &Home, name: &AgentName) -> Result<()> {
    let path = home.process_record(name);
    // The one before, which a launch keeps to write the next one into.
    store::remove(&path.with_extension("json.old"))?;
    store::remove(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_child_completes_reads_back_as_a_record() {
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
