//! The document that `status` shows: on the control socket, and as `status --json`.

use serde::{Deserialize, Serialize};

use super::model::{AgentName, Version};
use super::protocol::AgentState;
use super::unknown::UnknownFields;

/// The document of `status --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Version of the installed release; null: nothing is installed.
    pub version: Option<Version>,
    pub home: String,
    pub state: HomeState,
    pub spm: RoleStatus,
    pub spa: RoleStatus,
    pub gateway: GatewayStatus,
    pub generation: u64,
    pub agents: Vec<AgentStatus>,
    /// The upgrade of the manager that is in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeStatus>,
    /// An operator at the host holds the manager's release, whatever the gateway orders.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held_by_operator: bool,
    /// Problems that an operator should fix, such as an invalid configuration or a rejected desired state.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Information that needs no fix, such as that nothing starts the home at boot.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// The state of an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HomeState {
    Running,
    /// It runs with problems.
    Degraded,
    Stopped,
    NotInstalled,
}

impl HomeState {
    pub fn as_str(self) -> &'static str {
        match self {
            HomeState::Running => "running",
            HomeState::Degraded => "degraded",
            HomeState::Stopped => "stopped",
            HomeState::NotInstalled => "not installed",
        }
    }
}

/// One of the two resident roles.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoleStatus {
    pub pid: Option<u32>,
    pub uptime_seconds: Option<u64>,
    /// Resident memory, bytes.
    pub memory_bytes: Option<u64>,
    /// Number of restarts after failures, since it was last started on purpose.
    pub restarts: u64,
}

impl Status {
    /// The status of a home whose manager does not answer.
    pub fn silent(home: String, version: Option<Version>, state: HomeState) -> Status {
        Status {
            version,
            home,
            state,
            spm: RoleStatus::default(),
            spa: RoleStatus::default(),
            gateway: GatewayStatus::default(),
            generation: 0,
            agents: vec![],
            upgrade: None,
            held_by_operator: false,
            problems: vec![],
            notes: vec![],
        }
    }
}

/// The connection to the gateway.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// The endpoint that answered last, else the first configured one.
    pub endpoint: Option<String>,
    /// Whether the last heartbeat succeeded.
    pub connected: bool,
    /// Time of the last successful heartbeat, RFC 3339.
    pub last_heartbeat: Option<String>,
    /// Seconds by which this host's clock is ahead of the gateway's, from the `Date` header of the last answer; negative: behind.
    #[serde(default)]
    pub clock_offset_seconds: Option<i64>,
    /// Why the last heartbeat failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// One sub-agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    pub name: AgentName,
    /// The release of its process; without a process, the active release.
    pub version: Option<Version>,
    /// The active release, if its process is of a different one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_version: Option<Version>,
    pub state: AgentState,
    pub pid: Option<u32>,
    pub uptime_seconds: Option<u64>,
    pub restarts: u64,
    pub memory_bytes: Option<u64>,
    pub last_error: Option<String>,
    /// Its process is outside of its own cgroup or Job Object, although other sub-agents have one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside_group: bool,
    /// The download of the release that is being staged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<DownloadStatus>,
    /// The change of release that is in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeStatus>,
    /// An operator at the host holds this release, whatever the gateway orders.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held_by_operator: bool,
    /// The gateway's complete list omits it: seconds until it is removed, at the next heartbeat after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed_in_seconds: Option<u64>,
    /// Releases that failed on this host and are not tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<SkippedStatus>,
}

/// A change of release that is in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeStatus {
    pub from: Option<Version>,
    pub to: Version,
    /// For a sub-agent `staging`, `activating`, `probation` or `rollingBack`; for the manager `staging`, `switching`, `trial`, `unproven`
    /// (neither release reaches the gateway), `paused` (the home is stopped), `committing` or `rollingBack`.
    pub phase: String,
    /// When it fails unless it has succeeded by then, RFC 3339; null: there is no time limit.
    pub deadline: Option<String>,
    /// Number of failures that are still tolerated.
    pub tries_left: Option<u64>,
    /// The problem of the new release, or why it is rolled back.
    pub reason: Option<String>,
    /// The progress of the manager's download; a sub-agent's is in [`AgentStatus::download`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<DownloadStatus>,
}

/// A release that is not tried again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SkippedStatus {
    pub version: Version,
    pub reason: String,
}

/// The document of `status --history --json`: the result of each change of release, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    #[serde(default)]
    pub history: Vec<HistoryEntry>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The result of one change of release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// RFC 3339, UTC.
    pub time: String,
    /// When the change started, RFC 3339, UTC. It identifies an upgrade of the manager, which is reported once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<String>,
    /// `upgrade`, `rollback` or `skip`.
    pub kind: String,
    /// The sub-agent.
    pub agent: AgentName,
    pub from: Option<Version>,
    pub to: Version,
    /// `ok` or `failed`.
    pub outcome: String,
    pub seconds: u64,
    /// For a person to read.
    #[serde(default)]
    pub message: String,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// The progress of a download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DownloadStatus {
    pub version: Version,
    pub bytes: u64,
    /// Null: not known yet.
    pub total_bytes: Option<u64>,
}

/// The state of a home whose manager answers.
pub fn home_state(spa_alive: bool, agents: &[AgentStatus], problems: &[String]) -> HomeState {
    let is_as_ordered = |agent: &AgentStatus| {
        matches!(agent.state, AgentState::Running | AgentState::Stopped | AgentState::Starting | AgentState::Updating)
    };
    if spa_alive && problems.is_empty() && agents.iter().all(is_as_ordered) {
        HomeState::Running
    } else {
        HomeState::Degraded
    }
}
