//! Protocol version 1: what a host and a gateway say to each other, in JSON with camelCase keys.
//!
//! `POST <endpoint>/api/heartbeat` carries a [`Heartbeat`] up and an [`Answer`] down; `GET <endpoint>/api/releases/<name>?os=&arch=`
//! answers an [`Offer`]. Both ends ignore fields that they do not know. The JSON Schema (`aops gateway schema`) is made from these types.

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
/// Path below an endpoint under which the current release of a package is told, by name.
pub const RELEASES_PATH: &str = "/api/releases";

/// More public keys than this are not announced, and not taken: the present one, and those to come.
pub const MAX_PINS: usize = 4;
/// More sub-agents than this on one host are a mistake, and more orders in one answer too.
pub const MAX_AGENTS: usize = 1_000;
/// A message with more values than this is not read: a thousand sub-agents with forty words each. What a text of a few MiB becomes in
/// memory goes by their number.
pub const MAX_VALUES: usize = 50_000;

/// How many values a JSON text has at the most: one more than the commas outside of its strings and the brackets that open.
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

/// The host's periodic report: its actual state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    /// The identity given at install; also in the header `x-agent-id`.
    pub agent_id: AgentId,
    /// A UUID made at the host's first start and kept with the machine, so that a cloned host shows.
    pub instance_id: String,
    /// As the machine calls itself; rules may go by it.
    pub hostname: String,
    pub os: Os,
    pub arch: Arch,
    pub manager: ManagerReport,
    /// Whose generation it is; absent before the first desired state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<String>,
    /// The generation that the host holds; 0 before the first, and where it asks for the list once more.
    #[serde(default)]
    pub generation: u64,
    /// Counts this manager's heartbeats from 1; begins anew when it starts. One that was sent again over a new connection has the same.
    #[serde(default)]
    pub sequence: u64,
    /// Every sub-agent that is installed, or wanted.
    #[serde(default)]
    pub agents: Vec<AgentReport>,
    /// What happened and was not yet acknowledged, oldest first: at most 100 with 64 KiB. A host keeps 500 with 256 KiB, and forgets the oldest.
    #[serde(default)]
    pub events: Vec<Event>,
    /// Seconds by which the host's clock was ahead of the gateway's, as the `Date` of its last answer said; negative: behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_offset_seconds: Option<i64>,
    /// How the host checks the gateway's certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<TrustReport>,
}

/// How a host checks the certificate of the gateway that it reports to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TrustReport {
    /// `system` and `caCert`: by who issued it; `pin` and `firstContact`: by `pins`; `insecure`: not at all.
    pub by: String,
    /// What it is accepted by: SHA-256 of public keys, or of certificates, as in an answer's `pins`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<String>,
    /// When the chain that the host was shown last ends, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_end: Option<String>,
}

#[cfg(any(feature = "gateway", test))]
impl TrustReport {
    /// Whether the host accepts what it has pinned, and nothing else.
    pub fn is_pinned(&self) -> bool {
        matches!(self.by.as_str(), "pin" | "firstContact")
    }

    pub fn accepts(&self, pin: &str) -> bool {
        self.pins.iter().any(|known| known == pin)
    }
}

/// The manager about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ManagerReport {
    /// The version of the release installed, as its verified comment said.
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
    /// The active release; absent while none was activated.
    #[serde(default)]
    pub version: Option<Version>,
    pub state: AgentState,
    /// Absent while no process of it runs.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Restarts that nobody asked for, since it was last started on purpose.
    #[serde(default)]
    pub restarts: u64,
    /// Of the environment that the gateway ordered: SHA-256, in lower-case hexadecimal digits, of `agentId`, a zero byte, `instanceId`, a zero
    /// byte, and for each variable in the order of their names the name, `=`, the value and a zero byte. The ids are a salt, so that the same
    /// environment has another hash on another host.
    #[serde(default)]
    pub env_hash: Option<String>,
    /// The last error, if there is one to know.
    #[serde(default)]
    pub message: Option<String>,
}

/// The state of a sub-agent as operators read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum AgentState {
    /// Started, still in its start period.
    Starting,
    Running,
    /// Its health check fails.
    Unhealthy,
    /// Waiting to be started again.
    Backoff,
    /// Not running, as wanted.
    Stopped,
    /// Cannot be run now: no release could be fetched or verified, or its manifest is bad; tried again.
    Failed,
    /// A release is being staged, or is on trial.
    Updating,
    /// A word of a later version.
    #[serde(other)]
    Unknown,
}

impl AgentState {
    /// The word on the wire, in `status` and in logs.
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
    /// Only grows on one host, and is at least the clock's unix milliseconds; acknowledged by the `ack` of an answer.
    pub id: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// What it was about, such as `start`, `exit`, `health`, `restart` (because of its health), `backoff`, `stage`, `activate`,
    /// `upgrade` (a new release was committed, or not), `rollback` (the release before runs again), `skip` (a release is not tried again), `uninstall`, `config`, `command`, `desired`, `env`; `order` (it cannot be followed), `manager` (likewise the manager's),
    /// `heartbeat` (an answer that was not believed or cannot be read), `certificate` (of the gateway: it ends soon), `clock`, `memory` (a role was
    /// restarted for it), `home` (it cannot be relied on), `keys`, `door` (a request at the control socket was denied).
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Version>,
    /// `ok`, `failed`, `refused` or `unsupported`.
    pub outcome: String,
    /// For a person to read.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Of a later version.
    #[serde(flatten)]
    #[cfg_attr(feature = "gateway", schemars(skip))]
    pub unknown: UnknownFields,
}

/// What an event has besides its texts: its number, and the names of its fields.
const EVENT_BYTES: usize = 128;

impl Event {
    /// What it takes, in memory and in a file, bytes.
    pub fn size(&self) -> usize {
        let Event { id: _, time, kind, agent, version, outcome, message, unknown } = self;
        let name = agent.as_ref().map_or(0, |name| name.as_str().len());
        let version = version.as_ref().map_or(0, |version| version.as_str().len());
        let texts = time.len() + kind.len() + name + version + outcome.len() + message.len();
        EVENT_BYTES + texts + unknown::bytes(unknown)
    }
}

/// The gateway's answer to a heartbeat: the desired state where it differs from what the host holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Whom the answer is for; a host refuses another's.
    pub agent_id: AgentId,
    /// What the gateway wants an operator to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
    /// Seconds until the next heartbeat, from 1 to 3600: what is outside counts as the nearer bound; absent: as the host is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<u64>,
    /// Seconds for which a complete list must have omitted a sub-agent, without a break, before the host removes it; absent: 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removal_delay: Option<u64>,
    /// Names the store that counts the generations, in at most 128 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<String>,
    /// Numbers the desired state; only grows within a lineage: `max(previous + 1, unix milliseconds)`. A lower one is refused, and so are the
    /// same one with another content, one more than 7 days ahead of the clocks, and 2^53 and above.
    #[serde(default)]
    pub generation: u64,
    /// A command to the manager: `upgrade` (to the release in `manager`; without it nothing is upgraded). Unknown ones are answered with an
    /// event of outcome `unsupported`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<String>,
    /// The manager's desired release; its package is named `aops-spm`. One that cannot be read is refused alone, with an event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manager: Option<MessageItem<Package>>,
    /// Whether `agents` names every sub-agent of the host, so that absence means removal, after `removalDelay`. An empty list never does, nor
    /// one with an order whose name cannot be read.
    #[serde(default)]
    pub complete: bool,
    /// Present only when lineage or generation differ from what the host sent. At most 1,000. An order that does not fit is refused alone, with
    /// an event that names it; its sub-agent stays as it is, and is not absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agents: Option<Vec<MessageItem<AgentOrder>>>,
    /// The public keys of the gateway's certificate, as `sha256:` and the SHA-256 of each SubjectPublicKeyInfo in hexadecimal: the present
    /// one, and those to come. A host that pins accepts them from now on, if the connection has passed its present pin. At most 4.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<String>,
    /// The id of the last event that the gateway has seen: the host forgets that one and all before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack: Option<u64>,
}

/// What the gateway wants of one sub-agent. The name `aops-spm` and the version `current` are reserved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct AgentOrder {
    pub name: AgentName,
    #[serde(flatten)]
    pub package: Package,
    /// `start`, `stop` or `uninstall`. An order with another word is answered as unsupported and changes nothing.
    #[serde(default)]
    pub cmd: Cmd,
    #[serde(flatten)]
    pub spec: Spec,
    /// A release that a host skips because it failed there is tried again by an order with a higher number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry: u64,
    /// Of a later version.
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
    /// Bytes.
    pub size: u64,
}

impl From<Offer> for Package {
    fn from(offer: Offer) -> Package {
        let Offer { version, file, sha256, size } = offer;
        Package { version, tarball: None, file: Some(file), sha256: Some(sha256), size: Some(size) }
    }
}

/// The protocol's document, in one line: what it says is compared with the code.
#[cfg(test)]
pub fn document() -> String {
    include_str!("../../assets/protocol.md").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_a_later_version_is_unknown_and_no_error() {
        let report: AgentReport = serde_json::from_str(r#"{"name":"a","state":"dreaming"}"#).unwrap();
        assert_eq!((report.state, report.state.as_str()), (AgentState::Unknown, "unknown"));
        assert_eq!(serde_json::to_string(&AgentState::Backoff).unwrap(), r#""backoff""#);
    }

    #[test]
    fn the_document_names_the_bounds_of_messages() {
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
    fn values_are_counted_but_not_in_strings() {
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
