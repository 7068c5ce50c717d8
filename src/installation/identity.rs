//! The identity of this host: the agent id given at install, and the id of the machine.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::core::model::AgentId;
use crate::home::Home;
use crate::store::{self, UnknownJson};

/// Size limit of the file of the agent id.
const MAX_AGENT_ID_BYTES: u64 = 4 << 10;

/// `state/instance.json`: identifies the machine, so that a clone of it is detected.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Instance {
    instance_id: String,
    /// The system's machine id when the instance id was created; empty if the system has none.
    machine_id: String,
    #[serde(flatten)]
    unknown: UnknownJson,
}

/// A UUID, created at the first start on this machine; a clone of the machine gets a new one.
pub fn instance_id(home: &Home) -> String {
    let path = home.instance();
    let machine_id = machine_uid::get().unwrap_or_default();
    // An unreadable file does not prevent the start: the host is reported as a new one.
    let recorded = store::load::<Instance>(&path).ok().flatten().filter(|recorded| recorded.machine_id == machine_id);
    if let Some(recorded) = recorded {
        return recorded.instance_id;
    }
    let new = Instance { instance_id: uuid::Uuid::new_v4().to_string(), machine_id, unknown: UnknownJson::new() };
    if let Err(error) = store::save(&path, &new) {
        tracing::warn!(
            error = format!("{error:#}"),
            "cannot save the instance id; the next start creates a different one"
        );
    }
    new.instance_id
}

/// The agent id given at install; `None`: the file does not exist.
pub fn agent_id(home: &Home) -> Result<Option<AgentId>> {
    let path = home.agent_id();
    let Some(bytes) = store::read(&path, MAX_AGENT_ID_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    text.trim().parse().map(Some).with_context(|| format!("cannot use {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir_all(home.etc()).unwrap();
        (directory, home)
    }

    #[test]
    fn an_invalid_agent_id_is_an_error_and_a_missing_one_is_not() {
        let (_directory, home) = home();
        assert_eq!(agent_id(&home).unwrap(), None);
        std::fs::write(home.agent_id(), "540\n").unwrap();
        assert_eq!(agent_id(&home).unwrap(), Some("540".parse().unwrap()));
        std::fs::write(home.agent_id(), "a b").unwrap();
        assert!(agent_id(&home).is_err());
    }
}
