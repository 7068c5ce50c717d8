//! Environment variables that a gateway sets for a sub-agent: plain texts, or secrets.
//!
//! ```text
//! fleet.toml   env = { GOGC = "50", TOKEN = { secret = "…" } }
//! protocol     "env": {"GOGC": "50", "TOKEN": {"secret": "…"}}
//! ```
//!
//! A secret is passed to the sub-agent like any other value, and is never printed, logged or quoted in an error. Files that contain it, on
//! the host and at the gateway, are readable by their owner only. It is stored unencrypted, and any client that can reach the gateway and
//! knows the host's agent id can request it, because hosts do not authenticate.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Variables by name.
pub type Env = BTreeMap<String, EnvValue>;

/// Limit for the variables of one sub-agent; more are a mistake.
const MAX_VARIABLES: usize = 1_000;
/// Limit for the names and values of one sub-agent together, bytes: the size that Linux allows for a single variable.
const MAX_BYTES: usize = 128 << 10;
/// Limit for the name of a variable, bytes.
pub const MAX_NAME_BYTES: usize = 255;

/// Whether the number and the size of the variables are within the limits.
pub fn check(env: &Env) -> Result<(), String> {
    if env.len() > MAX_VARIABLES {
        return Err(format!("it has {} variables: at most {MAX_VARIABLES}", env.len()));
    }
    let bytes = bytes(env);
    if bytes > MAX_BYTES {
        return Err(format!("it has {bytes} bytes: at most {MAX_BYTES}"));
    }
    Ok(())
}

/// Size of all names and values, bytes.
pub fn bytes(env: &Env) -> usize {
    env.iter().map(|(name, value)| name.len() + value.reveal().len()).sum()
}

/// The value of one variable.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "gateway", schemars(rename = "EnvValue"))]
#[serde(untagged)]
pub enum EnvValue {
    /// A value that may be shown.
    Plain(String),
    /// A value that is never shown in `status`, a log, an event or an error. The gateway sends it to any client that uses the host's agent
    /// id, which is a name and not a password.
    Secret { secret: String },
}

impl EnvValue {
    /// The value, for the sub-agent's environment only.
    pub fn reveal(&self) -> &str {
        match self {
            EnvValue::Plain(text) | EnvValue::Secret { secret: text } => text,
        }
    }

    #[cfg(any(feature = "gateway", test))]
    pub fn is_secret(&self) -> bool {
        matches!(self, EnvValue::Secret { .. })
    }
}

impl From<&str> for EnvValue {
    fn from(text: &str) -> EnvValue {
        EnvValue::Plain(text.to_owned())
    }
}

impl fmt::Debug for EnvValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EnvValue::Plain(text) => fmt::Debug::fmt(text, f),
            EnvValue::Secret { .. } => f.write_str("(secret)"),
        }
    }
}

/// An error must not quote the value, which may be a secret in the wrong notation.
const EXPECTED: &str = "cannot read the value of a variable: expected a text in quotes, or { secret = \"…\" }";

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = EnvValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text in quotes, or { secret = \"…\" }")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<EnvValue, E> {
        Ok(EnvValue::Plain(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<EnvValue, E> {
        Ok(EnvValue::Plain(text))
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<EnvValue, E> {
        Err(E::custom(EXPECTED))
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<EnvValue, E> {
        Err(E::custom(EXPECTED))
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<EnvValue, E> {
        Err(E::custom(EXPECTED))
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<EnvValue, E> {
        Err(E::custom(EXPECTED))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<EnvValue, A::Error> {
        let mut secret = None;
        while let Some(key) = map.next_key::<String>()? {
            match map.next_value::<EnvValue>()? {
                EnvValue::Plain(text) if key == "secret" && secret.is_none() => secret = Some(text),
                _ => return Err(de::Error::custom(EXPECTED)),
            }
        }
        secret.map(|secret| EnvValue::Secret { secret }).ok_or_else(|| de::Error::custom(EXPECTED))
    }
}

impl<'de> Deserialize<'de> for EnvValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<EnvValue, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(json: &str) -> Result<Env, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn a_secret_is_read_and_written_as_one_and_never_printed() {
        let text = r#"{"A":"1","TOKEN":{"secret":"hunter2"}}"#;
        let read = env(text).unwrap();
        assert_eq!(read["TOKEN"].reveal(), "hunter2");
        assert!(read["TOKEN"].is_secret() && !read["A"].is_secret());
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert_eq!(format!("{read:?}"), r#"{"A": "1", "TOKEN": (secret)}"#);
        let toml: Env = toml::from_str("A = '1'\nTOKEN = { secret = 'hunter2' }").unwrap();
        assert_eq!(toml, read);
    }

    #[test]
    fn an_invalid_value_is_rejected_without_being_quoted() {
        for bad in [
            "8675309",
            "-8675309",
            "8675309.5",
            "true",
            "[\"8675309\"]",
            "null",
            r#"{"secret": 8675309}"#,
            r#"{"secret": {"secret": "8675309"}}"#,
            r#"{"secrets": "8675309"}"#,
            r#"{"secret": "8675309", "secret": "8675309"}"#,
            r#"{"secret": "8675309", "more": "8675309"}"#,
            "{}",
        ] {
            let error = env(&format!("{{\"TOKEN\": {bad}}}")).unwrap_err();
            assert!(!error.contains("8675309"), "{bad}: {error}");
            assert!(error.contains("secret"), "{bad}: {error}");
        }
        for bad in ["8675309", "true", "{ secret = 8675309 }", "[8675309]", "1979-05-27"] {
            let error = toml::from_str::<Env>(&format!("TOKEN = {bad}")).unwrap_err();
            assert!(!error.message().contains("8675309") && !error.message().contains("1979"), "{bad}: {error}");
        }
    }
}
