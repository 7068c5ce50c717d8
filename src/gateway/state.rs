//! How the running gateway stands, as it tells `gateway status` by a file and whoever asks over the network.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::parts::GatewayParts;
use super::{certificate, fleet_file};

/// How the running gateway stands; `status` reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct GatewayState {
    pub(super) pid: u32,
    pub(super) listening: Option<String>,
    /// Unix milliseconds.
    pub(super) started: u64,
    pub(super) fleet: fleet_file::FleetFileStatus,
    pub(super) certificate: certificate::CertificateStatus,
    /// How many packages are on offer.
    pub(super) packages: usize,
    /// Why files of the depot are not on offer.
    pub(super) problems: BTreeMap<String, String>,
    pub(super) parts: GatewayParts,
}
