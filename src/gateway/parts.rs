//! The state of each part of a gateway. A part with a problem keeps its last good content, and does not affect other parts.

use serde::{Deserialize, Serialize};

/// Problems shown per part; a depot can have thousands.
const MAX_SHOWN: usize = 10;

/// The state of one part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct PartStatus {
    pub(super) ok: bool,
    pub(super) problems: Vec<String>,
}

impl Default for PartStatus {
    fn default() -> PartStatus {
        PartStatus { ok: true, problems: Vec::new() }
    }
}

impl PartStatus {
    /// A part with these problems; those beyond [`MAX_SHOWN`] are only counted.
    pub(super) fn with(problems: impl IntoIterator<Item = String>) -> PartStatus {
        let mut problems: Vec<String> = problems.into_iter().collect();
        let more = problems.len().saturating_sub(MAX_SHOWN);
        problems.truncate(MAX_SHOWN);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        PartStatus { ok: problems.is_empty(), problems }
    }

    /// Adds a problem, unless it is listed already.
    pub(super) fn add(&mut self, problem: String) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
        self.ok = false;
    }
}

/// The state of all parts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct GatewayParts {
    /// `keys/`: the public keys, and the permissions of the private key.
    pub(super) keys: PartStatus,
    pub(super) depot: PartStatus,
    /// `fleet.toml`.
    pub(super) fleet: PartStatus,
    /// `tls/`.
    pub(super) certificate: PartStatus,
    /// `state/`.
    pub(super) state: PartStatus,
}

impl GatewayParts {
    /// Whether no part has a problem.
    pub(super) fn are_ok(&self) -> bool {
        self.each().iter().all(|(_, part)| part.ok)
    }

    /// Each part with its name.
    pub(super) fn each(&self) -> [(&'static str, &PartStatus); 5] {
        let GatewayParts { keys, depot, fleet, certificate, state } = self;
        [("keys", keys), ("depot", depot), ("fleet", fleet), ("certificate", certificate), ("state", state)]
    }
}
