//! What an old installation leaves to a new one: its flat `etc/conf.yml` and the file that holds its agent id.
//!
//! The old file is somebody's who cannot be asked, so only what makes it unreadable as a whole is an error; a key or a value that cannot
//! be taken over is told, and the default stands.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use super::keys::{self, KEYS, RawValue};
use super::{Config, read_text};
use crate::core::model::AgentId;
use crate::store;

/// Where an old installation keeps its settings.
pub const OLD_CONFIG: &str = "etc/conf.yml";

/// Where an old installation may keep its agent id.
pub const OLD_AGENT_IDS: &[&str] = &["agentId", "etc/agentId", "etc/agent-id", "agent-id"];

/// The settings that only an old installation's file has under these names.
const OLD_KEYS: &[&str] = &["heartbeatSrv", "heartbeatInterval", "spmMaxMem", "spaMaxMem", "downloadTimeout"];

/// An id with its line end; what is longer is something else.
const MAX_AGENT_ID_BYTES: u64 = 4 << 10;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// The settings, where there were any. `heartbeat_srv` may be empty.
    pub config: Option<Config>,
    pub agent_id: Option<AgentId>,
    /// What could not be taken over, one line each.
    pub warnings: Vec<String>,
}

/// Whether the settings of an old installation lie below `root`, readable as a whole or not: a file of that name with one of its settings.
pub fn has_settings(root: &Path) -> bool {
    let text = read_text(&root.join(OLD_CONFIG)).ok().flatten().unwrap_or_default();
    let key = |line: &str| line.split_once(':').map(|(key, _)| key.trim_matches(['"', '\'']).to_owned());
    text.lines().filter_map(key).any(|key| OLD_KEYS.contains(&key.as_str()))
}

/// Whether a file of the names that an old installation uses holds an agent id.
pub fn has_agent_id(root: &Path) -> bool {
    OLD_AGENT_IDS.iter().any(|name| {
        let bytes = store::read(&root.join(name), MAX_AGENT_ID_BYTES).ok().flatten().unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim().parse::<AgentId>().is_ok()
    })
}

/// Reads the old installation below `root`.
pub fn read(root: &Path) -> Result<Imported> {
    let path = root.join(OLD_CONFIG);
    let mut imported = Imported::default();
    if let Some(text) = read_text(&path)? {
        let (config, warnings) =
            parse(&text).with_context(|| format!("cannot read the old settings in {}", path.display()))?;
        imported.config = Some(config);
        imported.warnings = warnings;
    }
    for name in OLD_AGENT_IDS {
        let path = root.join(name);
        if !path.is_file() {
            continue;
        }
        let bytes = store::read(&path, MAX_AGENT_ID_BYTES)?.unwrap_or_default();
        match String::from_utf8_lossy(&bytes).trim().parse() {
            Ok(id) => {
                imported.agent_id = Some(id);
                break;
            }
            Err(error) => imported.warnings.push(format!("{}: {error}", path.display())),
        }
    }
    Ok(imported)
}

/// Reads the text of an old settings file; also what could not be taken over.
pub fn parse(text: &str) -> Result<(Config, Vec<String>)> {
    let mut config = Config::default();
    let mut warnings = Vec::new();
    if text.trim().is_empty() {
        return Ok((config, warnings));
    }
    let entries: BTreeMap<String, serde_json::Value> = serde_saphyr::from_str(text)?;
    for (key, value) in entries {
        if !KEYS.contains(&key.as_str()) {
            warnings.push(format!("the key {key} is not known any more and was left out"));
        } else if let Err(expected) = keys::set(&mut config, &key, &given(value)) {
            warnings.push(format!("the value of {key} cannot be used and was left out: expected {expected}"));
        }
    }
    Ok((config, warnings))
}

fn given(value: serde_json::Value) -> RawValue {
    use serde_json::Value;
    match value {
        Value::String(text) => RawValue::Text(text),
        Value::Number(number) => RawValue::Number(number.to_string()),
        Value::Bool(truth) => RawValue::Truth(truth),
        Value::Array(items) => RawValue::List(items.into_iter().map(given).collect()),
        Value::Null | Value::Object(_) => RawValue::Other,
    }
}
