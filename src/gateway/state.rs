//! The state of the running gateway, for `gateway status` (in a file) and for `/healthz`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::parts::GatewayParts;
use super::{certificate, fleet_file};

/// The content of `state/gateway.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct GatewayState {
    pub(super) pid: u32,
    pub(super) listening: Option<String>,
    /// Unix milliseconds.
    pub(super) started: u64,
    pub(super) fleet: fleet_file::FleetFileStatus,
    pub(super) certificate: certificate::CertificateStatus,
    /// The number of packages on offer.
    pub(super) packages: usize,
    /// Files of the depot that are not on offer, with the reason.
    pub(super) problems: BTreeMap<String, String>,
    pub(super) parts: GatewayParts,
}
