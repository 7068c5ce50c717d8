//! Protocol version 1: the messages between a host and a gateway, in JSON with camelCase keys.
//!
//! `POST <endpoint>/api/heartbeat` sends a [`Heartbeat`] and returns an [`Answer`]; `GET <endpoint>/api/releases/<name>?os=&arch=` returns
//! an [`Offer`]. Both sides ignore unknown fields. The JSON Schema (`aops gateway schema`) is generated from these types and their
//! comments.

use serde::{Deserialize, Serialize};

use super::item::MessageItem;
use super::model::{AgentId, AgentName, Arch, Digest, Os, Version};
use super::order::{Cmd, Package, Spec, is_zero};
use super::unknown::{self, UnknownFields};

/// The header that names the host in every request.
pub const AGENT_ID_HEADER: &str = "x-agent-id";
/// Path of the heartbeat below an endpoint.
pub const HEARTBEAT_PATH: &str = "/api/heartbeat";
/// Path below an endpoint under which packages are served, by file name.
pub const DOWNLOAD_PATH: &str = "/api/download";
/// Path below an endpoint under which the current release of a package is offered, by name.
pub const RELEASES_PATH: &str = "/api/releases";

/// Limit for announced public keys: the present one, and the next ones.
pub const MAX_PINS: usize = 4;
/// Limit for the sub-agents of one host, and for the orders of one answer.
pub const MAX_AGENTS: usize = 1_000;
/// Limit for the JSON values of a message: a thousand sub-agents with forty values each. Their number determines how much memory a message
/// of a few MiB needs.
pub const MAX_VALUES: usize = 50_000;

/// An upper bound for the number of values in a JSON text: one more than its commas and opening brackets outside of strings.
pub fn values(json: &[u8]) -> usize {
    let (mut count, mut in_string, mut escaped) = (1, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

/// The periodic report of a host: its actual state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    /// The id given to the host at install; also in the header `x-agent-id`.
    pub agent_id: AgentId,
    /// A UUID that is created at the first start and bound to the machine. The same `agentId` with two of them is two machines.
    pub instance_id: String,
    /// The host name of the machine; the rules of a fleet can match it.
    pub hostname: String,
    pub os: Os,
    pub arch: Arch,
    pub manager: ManagerReport,
    /// Lineage of `generation`; absent before the first desired state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<String>,
    /// The generation that the host holds; 0 before the first one, and to request the list again.
    #[serde(default)]
    pub generation: u64,
    /// Number of this heartbeat, counted from 1 since the start of the manager. A heartbeat that is sent again over a new connection has
    /// the same number.
    #[serde(default)]
    pub sequence: u64,
    /// Every sub-agent that is installed or ordered.
    #[serde(default)]
    pub agents: Vec<AgentReport>,
    /// Events that were not yet acknowledged, oldest first: at most 100 with 64 KiB. A host keeps at most 500 with 256 KiB and discards the
    /// oldest beyond that.
    #[serde(default)]
    pub events: Vec<Event>,
    /// Seconds by which the host's clock was ahead of the gateway's, computed from the `Date` header of the last answer; negative: behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_offset_seconds: Option<i64>,
    /// How the host verifies the certificate of the endpoint that receives this heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<TrustReport>,
}

/// How a host verifies the certificate of its gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TrustReport {
    /// `system` or `caCert`: by its issuer; `pin` or `firstContact`: by `pins`; `insecure`: not at all.
    pub by: String,
    /// The pins that the host accepts: SHA-256 of public keys, as in an answer's `pins`, or of certificates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<String>,
    /// When the last certificate chain that the host received expires, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_end: Option<String>,
}

#[cfg(any(feature = "gateway", test))]
impl TrustReport {
    /// Whether the host accepts certificates by its pins only.
    pub fn is_pinned(&self) -> bool {
        matches!(self.by.as_str(), "pin" | "firstContact")
    }

    pub fn accepts(&self, pin: &str) -> bool {
        self.pins.iter().any(|known| known == pin)
    }
}

/// The manager of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManagerReport {
    /// The version in the signed comment of the installed release.
    pub version: Version,
    pub pid: u32,
    pub uptime_seconds: u64,
    /// Resident memory, bytes.
    pub memory_bytes: u64,
}

/// One sub-agent's actual state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct AgentReport {
    pub name: AgentName,
    /// Version of the active release; absent before the first activation.
    #[serde(default)]
    pub version: Option<Version>,
    pub state: AgentState,
    /// Process id of its main process; absent if none runs.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Number of restarts after failures, since its last start by an order or an operator.
    #[serde(default)]
    pub restarts: u64,
    /// SHA-256 of the environment that the gateway ordered, in lower-case hexadecimal digits, over these bytes: `agentId`, a zero byte,
    /// `instanceId`, a zero byte, and for each variable, sorted by name, the name, `=`, the value and a zero byte. The ids are a salt, so
    /// that the same environment has different hashes on different hosts.
    #[serde(default)]
    pub env_hash: Option<String>,
    /// The last error, for a person to read; absent: none.
    #[serde(default)]
    pub message: Option<String>,
}

/// The state of a sub-agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum AgentState {
    /// It was started and is in its start period.
    Starting,
    /// It runs.
    Running,
    /// Its health check fails.
    Unhealthy,
    /// It exited, and is restarted after a delay.
    Backoff,
    /// It does not run, as ordered.
    Stopped,
    /// It cannot be run now, because no release could be fetched or verified, or its manifest is invalid; this is retried.
    Failed,
    /// A release is being staged or activated, or is on probation.
    Updating,
    /// A state of a later version.
    #[serde(other)]
    Unknown,
}

impl AgentState {
    /// The value on the wire, in `status` and in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            AgentState::Starting => "starting",
            AgentState::Running => "running",
            AgentState::Unhealthy => "unhealthy",
            AgentState::Backoff => "backoff",
            AgentState::Stopped => "stopped",
            AgentState::Failed => "failed",
            AgentState::Updating => "updating",
            AgentState::Unknown => "unknown",
        }
    }
}

/// Something that happened on the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Only increases on one host, and is at least the unix milliseconds of its clock; acknowledged by the `ack` of an answer.
    pub id: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// The kind, such as `start`, `exit`, `health`, `restart` (because of failed health checks), `backoff`, `stage`, `activate`, `upgrade`
    /// (a new release was committed, or failed), `rollback` (the previous release runs again), `skip` (a failed release is not tried
    /// again), `uninstall`, `config`, `command`, `desired`, `env`, `order` (an order was rejected), `manager` (the order for the manager
    /// was rejected), `heartbeat` (an answer was rejected or cannot be read), `certificate` (of the gateway: it expires soon), `clock`,
    /// `memory` (a role was restarted because of its memory use), `home` (files of the installation are unsafe or unusable), `keys`, `door`
    /// (a request at the control socket was denied). An open list: treat unknown kinds as text.
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Version>,
    /// `ok`, `failed`, `refused` or `unsupported`. An open list: treat unknown outcomes as text.
    pub outcome: String,
    /// For a person to read.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Fields of a later version.
    #[serde(flatten)]
    #[cfg_attr(feature = "gateway", schemars(skip))]
    pub unknown: UnknownFields,
}

/// Size of an event besides its texts, for its number and the names of its fields, bytes.
const EVENT_BYTES: usize = 128;

impl Event {
    /// Its approximate size in memory and in a file, bytes.
    pub fn size(&self) -> usize {
        let Event { id: _, time, kind, agent, version, outcome, message, unknown } = self;
        let name = agent.as_ref().map_or(0, |name| name.as_str().len());
        let version = version.as_ref().map_or(0, |version| version.as_str().len());
        let texts = time.len() + kind.len() + name + version + outcome.len() + message.len();
        EVENT_BYTES + texts + unknown::bytes(unknown)
    }
}

/// The answer of a gateway to a heartbeat. It contains the desired state if that differs from the one that the host holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// The id of the host that the answer is for; a host rejects an answer with a different id.
    pub agent_id: AgentId,
    /// A message to the operator, shown in `control status` until an answer arrives without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
    /// Seconds until the next heartbeat, from 1 to 3600; a value outside of that is replaced by the nearest bound. Absent: the setting of
    /// the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<u64>,
    /// Seconds for which a sub-agent must be omitted from complete lists, without interruption, before the host removes it; absent: 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removal_delay: Option<u64>,
    /// Identifies the store that counts the generations; at most 128 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<String>,
    /// Number of the desired state: `max(previous + 1, unix milliseconds)`. Within a lineage, a lower number is rejected, and so is the
    /// same number with different content. In any lineage, a number more than 7 days ahead of the clocks is rejected, and 2^53 or more.
    #[serde(default)]
    pub generation: u64,
    /// A command to the manager. `upgrade`: to the release in `manager`; without this command, the manager is not upgraded. Unknown
    /// commands are reported by an event of outcome `unsupported`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<String>,
    /// The desired release of the manager, from the package `aops-spm`. A value that cannot be read is rejected alone and reported by an
    /// event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manager: Option<MessageItem<Package>>,
    /// Whether `agents` names every sub-agent of the host. The host then removes those that the list omits, after `removalDelay`. An empty
    /// list, or one with an order whose name cannot be read, removes none.
    #[serde(default)]
    pub complete: bool,
    /// The orders, at most 1,000; present if lineage or generation differ from those in the heartbeat. An invalid order is rejected alone
    /// and reported by an event that names the sub-agent, which stays unchanged and does not count as omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agents: Option<Vec<MessageItem<AgentOrder>>>,
    /// The public keys of the gateway's certificate, the present one and the next ones, each as `sha256:` and the SHA-256 of its
    /// SubjectPublicKeyInfo in hexadecimal digits; at most 4. A host that uses pins adds them to its pins if the certificate of the
    /// connection matched these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<String>,
    /// The id of the last event that the gateway has stored: the host discards that event and all earlier ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack: Option<u64>,
}

/// The desired state of one sub-agent. The name `aops-spm` and the version `current` are reserved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct AgentOrder {
    pub name: AgentName,
    #[serde(flatten)]
    pub package: Package,
    /// `start` (the default), `stop` or `uninstall`. An order with an unknown command changes nothing and is reported as unsupported.
    #[serde(default)]
    pub cmd: Cmd,
    #[serde(flatten)]
    pub spec: Spec,
    /// A release that failed on the host is skipped until an order has a higher number here, or a different release.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry: u64,
    /// Fields of a later version.
    #[serde(flatten)]
    #[cfg_attr(feature = "gateway", schemars(skip))]
    pub unknown: UnknownFields,
}

/// The current release of a package for one os and arch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Offer {
    pub version: Version,
    /// The package's file name below the endpoint's download path.
    pub file: String,
    pub sha256: Digest,
    /// Size of the package, bytes.
    pub size: u64,
}

impl From<Offer> for Package {
    fn from(offer: Offer) -> Package {
        let Offer { version, file, sha256, size } = offer;
        Package { version, tarball: None, file: Some(file), sha256: Some(sha256), size: Some(size) }
    }
}

/// The protocol document in one line. Tests compare it with the code.
#[cfg(test)]
pub fn document() -> String {
    include_str!("../../assets/protocol.md").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_a_later_version_is_read_as_unknown() {
        let report: AgentReport = serde_json::from_str(r#"{"name":"a","state":"dreaming"}"#).unwrap();
        assert_eq!((report.state, report.state.as_str()), (AgentState::Unknown, "unknown"));
        assert_eq!(serde_json::to_string(&AgentState::Backoff).unwrap(), r#""backoff""#);
    }

    #[test]
    fn the_protocol_document_states_the_limits_of_messages() {
        assert_eq!((MAX_AGENTS, MAX_VALUES), (1_000, 50_000));
        for words in [
            "more than 1,000 orders",
            "50,000 JSON values",
            AGENT_ID_HEADER,
            HEARTBEAT_PATH,
            DOWNLOAD_PATH,
            RELEASES_PATH,
        ] {
            assert!(document().contains(words), "{words}");
        }
    }

    #[test]
    fn values_are_counted_outside_of_strings() {
        for (json, most) in [
            ("1", 1),
            (r#"{"a":1,"b":[1,2,3],"c":{}}"#, 8),
            (r#"{"a":"[,,,{","b\",,":"\\"}"#, 3),
            (r#"["\\",",",","]"#, 4),
            ("", 1),
        ] {
            assert_eq!(values(json.as_bytes()), most, "{json}");
        }
    }
}
