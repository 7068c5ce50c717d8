//! `gateway schema`: the protocol as JSON Schema, generated from the types that this program serializes.

use anyhow::Result;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use crate::core::model::MANAGER_PACKAGE;
use crate::core::protocol::{AGENT_ID_HEADER, Answer, DOWNLOAD_PATH, HEARTBEAT_PATH, Heartbeat, Offer, RELEASES_PATH};
use crate::output::result;

/// The schema, with every message under `$defs`.
pub(super) fn document() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    generator.subschema_for::<Heartbeat>();
    generator.subschema_for::<Answer>();
    generator.subschema_for::<Offer>();
    let definitions = generator.take_definitions(true);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "aops protocol, version 1",
        "description": format!(
            "POST <endpoint>{HEARTBEAT_PATH} accepts a Heartbeat and returns an Answer; GET <endpoint>{DOWNLOAD_PATH}/<file> \
             returns a package, and <file>.minisig its signature; GET <endpoint>{RELEASES_PATH}/<name>?os=&arch= returns an \
             Offer, or 404. Each request has the header {AGENT_ID_HEADER}. The certificate of an endpoint needs a subjectAltName. \
             Both sides ignore unknown fields. A status other than 200 is a rejection: its body can be a JSON object with an \
             errorMessage, and hosts respect Retry-After. An Answer has at most 4 MiB. A package is named \
             {{name}}-{{version}}_{{os}}_{{arch}}.{{tar.zst|tar.gz|zip}}; the package of the manager is named {MANAGER_PACKAGE} and \
             contains bin/aops. A signature is a prehashed minisign signature with the trusted comment \
             `name={{name}} version={{version}} os={{os}} arch={{arch}} epoch={{number}}`, each word once, in any order. \
             assets/protocol.md in the source has the rules that a schema cannot express."
        ),
        "$defs": definitions,
    })
}

pub(super) fn print() -> Result<()> {
    result!("{}", serde_json::to_string_pretty(&document())?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_defined_and_a_minimal_heartbeat_is_valid() {
        let mut document = document();
        for name in ["Heartbeat", "Answer", "Offer", "AgentOrder", "Event"] {
            assert!(document["$defs"][name].is_object(), "{name}");
        }
        document["$ref"] = json!("#/$defs/Heartbeat");
        let validator = jsonschema::validator_for(&document).unwrap();
        let mut heartbeat = json!({
            "agentId": "5402", "instanceId": "i", "hostname": "h", "os": "linux", "arch": "amd64",
            "manager": {"version": "c57f6a1d", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3}, "later": true,
        });
        assert!(validator.is_valid(&heartbeat));
        serde_json::from_value::<Heartbeat>(heartbeat.clone()).unwrap();
        heartbeat["arch"] = json!("z80");
        assert!(!validator.is_valid(&heartbeat));
    }
}
