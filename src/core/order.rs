//! What is wanted of one sub-agent, in one shape from `fleet.toml` to the running process.
//!
//! ```text
//! fleet.toml            Order (version only)     the gateway's file
//! Order + the depot  -> AgentOrder               on the wire: name, Package, cmd, Spec
//! AgentOrder         -> Order                    state/desired.json: Package, run, Spec
//! Order              -> reconcile::Step          carried out with what it needs
//! ```
//!
//! A new setting of a sub-agent is a field of [`Spec`]; it then travels on the wire, is stored and is compared like the others.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::env::Env;
use super::model::{AgentName, Arch, Digest, Os, Release, Version};
use super::unknown::UnknownFields;

/// A version on offer, and where its archive is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "gateway", schemars(rename = "ManagerOrder"))]
#[serde(rename_all = "camelCase")]
pub struct Package {
    pub version: Version,
    /// Absolute URL of the directory that holds the package, without user, query and fragment; absent: the endpoint's own download path. It is
    /// asked first, then each endpoint. What comes from there is accepted by its signature alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tarball: Option<String>,
    /// The package's file name below `tarball`, `{name}-{version}_{os}_{arch}.{tar.zst|tar.gz|zip}`; absent: that of tar.zst.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// Of the package, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

impl Package {
    /// Nothing is known but the version.
    #[cfg(any(feature = "gateway", test))]
    pub fn new(version: Version) -> Package {
        Package { version, tarball: None, file: None, sha256: None, size: None }
    }

    /// The release that it carries, under the name that it was ordered by.
    pub fn release(&self, name: &AgentName, os: Os, arch: Arch) -> Release {
        Release { name: name.clone(), version: self.version.clone(), os, arch }
    }
}

/// Whether a sub-agent is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Run {
    Start,
    Stop,
}

/// How a sub-agent is to be run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// Environment variables; they win over the package's own. A value is a text, or `{"secret": "…"}`, which is shown to nobody.
    #[serde(default)]
    pub env: Env,
}

/// What is wanted of one sub-agent. Two orders are equal where this version follows both in the same way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    #[serde(flatten)]
    pub package: Package,
    pub run: Run,
    #[serde(flatten)]
    pub spec: Spec,
    /// A release that is skipped because it failed is tried again by an order with a higher number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry: u64,
    /// Of a later version's order: that version finds it when it takes over.
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
    /// The release that it asks for, as the ledger takes it.
    pub fn asks_for(&self) -> (&Version, Option<&Digest>, u64) {
        (&self.package.version, self.package.sha256.as_ref(), self.retry)
    }
}

/// For serde: a number that says nothing is not written.
pub fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The word of an order on the wire.
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
