//! The desired state of one sub-agent, in one shape from `fleet.toml` to the running process.
//!
//! ```text
//! fleet.toml            Order (version only)     the gateway's file
//! Order + the depot  -> AgentOrder               on the wire: name, Package, cmd, Spec
//! AgentOrder         -> Order                    state/desired.json: Package, run, Spec
//! Order              -> ReconcileStep            executed with the data that it needs
//! ```
//!
//! A new setting of a sub-agent is a field of [`Spec`]; it is then sent, stored and compared like the others.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::env::Env;
use super::model::{AgentName, Arch, Digest, Os, Release, Version};
use super::unknown::UnknownFields;

/// A version, and where its package is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "gateway", schemars(rename = "ManagerOrder"))]
#[serde(rename_all = "camelCase")]
pub struct Package {
    pub version: Version,
    /// Absolute URL of the directory that contains the package, without user, query and fragment; absent: the endpoint's download path. It
    /// is tried before the endpoints. A package from there is verified by its signature like any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tarball: Option<String>,
    /// File name of the package below `tarball`: `{name}-{version}_{os}_{arch}.{tar.zst|tar.gz|zip}`; absent: the one that ends in tar.zst.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// SHA-256 of the package.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// Size of the package, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

impl Package {
    /// A package of which only the version is known.
    #[cfg(any(feature = "gateway", test))]
    pub fn new(version: Version) -> Package {
        Package { version, tarball: None, file: None, sha256: None, size: None }
    }

    /// The release that the package contains, for a sub-agent of this name.
    pub fn release(&self, name: &AgentName, os: Os, arch: Arch) -> Release {
        Release { name: name.clone(), version: self.version.clone(), os, arch }
    }
}

/// Whether a sub-agent should run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Run {
    Start,
    Stop,
}

/// How to run a sub-agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// Environment variables; they override those of the package. A value is a text, or `{"secret": "…"}`, which is never shown.
    #[serde(default)]
    pub env: Env,
}

/// The desired state of one sub-agent. Two orders are equal if this version carries out both in the same way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    #[serde(flatten)]
    pub package: Package,
    pub run: Run,
    #[serde(flatten)]
    pub spec: Spec,
    /// A release that is skipped because it failed is tried again if an order has a higher number here.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry: u64,
    /// Fields of a later version, which finds them again after an upgrade.
    #[serde(flatten)]
    pub unknown: UnknownFields,
}

impl PartialEq for Order {
    fn eq(&self, other: &Order) -> bool {
        let Order { package, run, spec, retry, unknown: _ } = self;
        (package, run, spec, retry) == (&other.package, &other.run, &other.spec, &other.retry)
    }
}

impl Eq for Order {}

impl Order {
    /// The ordered release as the ledger identifies it: version, checksum and `retry`.
    pub fn asks_for(&self) -> (&Version, Option<&Digest>, u64) {
        (&self.package.version, self.package.sha256.as_ref(), self.retry)
    }
}

/// For serde: a zero is not written.
pub fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The command of an order on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Cmd {
    Run(Run),
    Uninstall,
    /// A command of a later version.
    Unknown(String),
}

impl Cmd {
    pub fn as_str(&self) -> &str {
        match self {
            Cmd::Run(Run::Start) => "start",
            Cmd::Run(Run::Stop) => "stop",
            Cmd::Uninstall => "uninstall",
            Cmd::Unknown(word) => word,
        }
    }
}

impl Default for Cmd {
    fn default() -> Cmd {
        Cmd::Run(Run::Start)
    }
}

impl From<String> for Cmd {
    fn from(word: String) -> Cmd {
        match word.as_str() {
            "start" => Cmd::Run(Run::Start),
            "stop" => Cmd::Run(Run::Stop),
            "uninstall" => Cmd::Uninstall,
            _ => Cmd::Unknown(word),
        }
    }
}

impl From<Cmd> for String {
    fn from(cmd: Cmd) -> String {
        match cmd {
            Cmd::Unknown(word) => word,
            known => known.as_str().to_owned(),
        }
    }
}

impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(feature = "gateway")]
impl schemars::JsonSchema for Cmd {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Cmd".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        String::json_schema(generator)
    }
}
