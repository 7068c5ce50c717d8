//! Who this host is: the identity given at install, and the machine that it runs on.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::core::model::AgentId;
use crate::home::Home;
use crate::store::{self, UnknownJson};

/// An id with its line end; what is longer is something else.
const MAX_AGENT_ID_BYTES: u64 = 4 << 10;

/// `state/instance.json`: which machine this is, so that a clone of it shows.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Instance {
    instance_id: String,
    /// The machine that it was made for, as the system names it; empty where it does not.
    machine_id: String,
    #[serde(flatten)]
    unknown: UnknownJson,
}

/// A UUID made at the first start on this machine, and made anew on a clone of it.
pub fn instance_id(home: &Home) -> String {
    let path = home.instance();
    let machine_id = machine_uid::get().unwrap_or_default();
    // What cannot be read is no reason not to start: the host only looks like a new one.
    let known = store::load::<Instance>(&path).ok().flatten().filter(|known| known.machine_id == machine_id);
    if let Some(known) = known {
        return known.instance_id;
    }
    let new = Instance { instance_id: uuid::Uuid::new_v4().to_string(), machine_id, unknown: UnknownJson::new() };
    if let Err(error) = store::save(&path, &new) {
        tracing::warn!(error = format!("{error:#}"), "the instance id cannot be kept; the next start makes another");
    }
    new.instance_id
}

/// The identity given at install; `None` where there is none.
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
    fn an_agent_id_that_is_none_is_told_from_a_missing_one() {
        let (_directory, home) = home();
        assert_eq!(agent_id(&home).unwrap(), None);
        std::fs::write(home.agent_id(), "540\n").unwrap();
        assert_eq!(agent_id(&home).unwrap(), Some("540".parse().unwrap()));
        std::fs::write(home.agent_id(), "a b").unwrap();
        assert!(agent_id(&home).is_err());
    }
}
