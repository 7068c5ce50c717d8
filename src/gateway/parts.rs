//! How each part of a gateway stands. A part with a problem keeps what was good last, and takes no other part along.

use serde::{Deserialize, Serialize};

/// Of one part, so many problems are shown; a depot can have thousands.
const MAX_SHOWN: usize = 10;

/// One part.
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
    /// The part that has these problems, of which not all may be shown.
    pub(super) fn with(problems: impl IntoIterator<Item = String>) -> PartStatus {
        let mut problems: Vec<String> = problems.into_iter().collect();
        let more = problems.len().saturating_sub(MAX_SHOWN);
        problems.truncate(MAX_SHOWN);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        PartStatus { ok: problems.is_empty(), problems }
    }

    /// Adds a problem that is not among them yet.
    pub(super) fn add(&mut self, problem: String) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
        self.ok = false;
    }
}

/// Every part.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct GatewayParts {
    /// `keys/`: the depot's public keys, and who can read the private one.
    pub(super) keys: PartStatus,
    pub(super) depot: PartStatus,
    /// `fleet.toml`.
    pub(super) fleet: PartStatus,
    /// `tls/`.
    pub(super) certificate: PartStatus,
    /// What the gateway itself writes.
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
