//! Imports the settings of an old installation: its flat `etc/conf.yml`, and the file with its agent id.
//!
//! Its author cannot be asked, so the import fails only if a file cannot be read as a whole. A key or a value that cannot be imported is
//! reported, and the default is used.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use super::keys::{self, KEYS, RawValue};
use super::{Config, read_text};
use crate::core::model::AgentId;
use crate::store;

/// The settings file of an old installation.
pub const OLD_CONFIG: &str = "etc/conf.yml";

/// The files that may contain the agent id of an old installation.
pub const OLD_AGENT_IDS: &[&str] = &["agentId", "etc/agentId", "etc/agent-id", "agent-id"];

/// The keys by which a settings file of an old installation is recognized.
const OLD_KEYS: &[&str] = &["heartbeatSrv", "heartbeatInterval", "spmMaxMem", "spaMaxMem", "downloadTimeout"];

/// Limit for the file of an agent id, bytes.
const MAX_AGENT_ID_BYTES: u64 = 4 << 10;

/// The imported settings.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// `None`: there was no settings file. `heartbeat_srv` may be empty.
    pub config: Option<Config>,
    pub agent_id: Option<AgentId>,
    /// Problems with single keys and files, one line each.
    pub warnings: Vec<String>,
}

/// Whether there are settings of an old installation below `root`: a file of that name with one of its keys, valid or not.
pub fn has_settings(root: &Path) -> bool {
    let text = read_text(&root.join(OLD_CONFIG)).ok().flatten().unwrap_or_default();
    let key = |line: &str| line.split_once(':').map(|(key, _)| key.trim_matches(['"', '\'']).to_owned());
    text.lines().filter_map(key).any(|key| OLD_KEYS.contains(&key.as_str()))
}

/// Whether there is an agent id in one of the files of an old installation.
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

/// Parses an old settings file; also returns warnings about keys and values that cannot be used.
pub fn parse(text: &str) -> Result<(Config, Vec<String>)> {
    let mut config = Config::default();
    let mut warnings = Vec::new();
    if text.trim().is_empty() {
        return Ok((config, warnings));
    }
    let entries: BTreeMap<String, serde_json::Value> = serde_saphyr::from_str(text)?;
    for (key, value) in entries {
        if !KEYS.contains(&key.as_str()) {
            warnings.push(format!("the key {key} is no longer supported and is ignored"));
        } else if let Err(expected) = keys::set(&mut config, &key, &raw_value(value)) {
            warnings.push(format!("cannot use the value of {key}: expected {expected}; the default is used"));
        }
    }
    Ok((config, warnings))
}

fn raw_value(value: serde_json::Value) -> RawValue {
    use serde_json::Value;
    match value {
        Value::String(text) => RawValue::Text(text),
        Value::Number(number) => RawValue::Number(number.to_string()),
        Value::Bool(flag) => RawValue::Bool(flag),
        Value::Array(items) => RawValue::List(items.into_iter().map(raw_value).collect()),
        Value::Null | Value::Object(_) => RawValue::Other,
    }
}
