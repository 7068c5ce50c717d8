//! What `status` shows, on the wire between manager and operator and as `status --json`.

use serde::{Deserialize, Serialize};

use super::model::{AgentName, Version};
use super::protocol::AgentState;
use super::unknown::UnknownFields;

/// The document of `status --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Of the release installed; null where nothing is.
    pub version: Option<Version>,
    pub home: String,
    pub state: HomeState,
    pub spm: RoleStatus,
    pub spa: RoleStatus,
    pub gateway: GatewayStatus,
    pub generation: u64,
    pub agents: Vec<AgentStatus>,
    /// The change of the manager's release that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeStatus>,
    /// An operator at the host keeps the manager's release, against what the gateway orders.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held_by_operator: bool,
    /// What an operator should mend: a bad configuration, a refused desired state.
    #[serde(default)]
    pub problems: Vec<String>,
    /// What an operator should know and need not mend: that nothing starts the home at boot.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// The state of an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HomeState {
    Running,
    /// It runs, but not all of it as wanted.
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
    /// Resident memory.
    pub memory_bytes: Option<u64>,
    /// Restarts that nobody asked for, since it was last started on purpose.
    pub restarts: u64,
}

impl Status {
    /// Of a home whose manager does not answer.
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

/// The way to the gateway.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// The one that answered last, else the first configured.
    pub endpoint: Option<String>,
    /// The last heartbeat succeeded.
    pub connected: bool,
    /// When the last one succeeded, RFC 3339.
    pub last_heartbeat: Option<String>,
    /// Seconds by which this host's clock is ahead of the gateway's, as the `Date` of its last answer said; negative: behind.
    #[serde(default)]
    pub clock_offset_seconds: Option<i64>,
    /// Why the last one did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// One sub-agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    pub name: AgentName,
    /// The release of its process; without one, that which would run.
    pub version: Option<Version>,
    /// The active release, where its process is one of another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_version: Option<Version>,
    pub state: AgentState,
    pub pid: Option<u32>,
    pub uptime_seconds: Option<u64>,
    pub restarts: u64,
    pub memory_bytes: Option<u64>,
    pub last_error: Option<String>,
    /// Its process lives outside of the group that was made for it, where other sub-agents have theirs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside_group: bool,
    /// Of the release that is being staged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<DownloadStatus>,
    /// The change of release that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeStatus>,
    /// An operator at the host keeps this release, against what the gateway orders.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held_by_operator: bool,
    /// The gateway's complete list omits it; so many seconds until it is removed, at the first heartbeat after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed_in_seconds: Option<u64>,
    /// Releases that failed here and are not tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<SkippedStatus>,
}

/// A change of release that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeStatus {
    pub from: Option<Version>,
    pub to: Version,
    /// Of a sub-agent `staging`, `activating`, `probation` or `rollingBack`; of the manager `staging`, `switching`, `trial`, `unproven`
    /// (neither release reaches the gateway), `paused` (the home is stopped), `committing` or `rollingBack`.
    pub phase: String,
    /// When it is given up unless it has succeeded by then, RFC 3339; null where that does not go by time.
    pub deadline: Option<String>,
    /// So often it may still fail.
    pub tries_left: Option<u64>,
    /// What is wrong with it, or why it is given up.
    pub reason: Option<String>,
    /// How far its download is; of a sub-agent it stands beside this.
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

/// The document of `status --history --json`: what came of each change of release, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    #[serde(default)]
    pub history: Vec<HistoryEntry>,
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

/// What came of one change of release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// RFC 3339, UTC.
    pub time: String,
    /// When the change began, RFC 3339, UTC; an upgrade of the manager is reported once by it.
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

/// How far the download of a release is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DownloadStatus {
    pub version: Version,
    pub bytes: u64,
    /// Null where nobody has told yet.
    pub total_bytes: Option<u64>,
}

/// The state of a home whose manager answers.
pub fn home_state(spa_alive: bool, agents: &[AgentStatus], problems: &[String]) -> HomeState {
    let as_wanted = |agent: &AgentStatus| {
        matches!(agent.state, AgentState::Running | AgentState::Stopped | AgentState::Starting | AgentState::Updating)
    };
    if spa_alive && problems.is_empty() && agents.iter().all(as_wanted) {
        HomeState::Running
    } else {
        HomeState::Degraded
    }
}
