//! Variables of a sub-agent's environment as a gateway tells them: a text, or a secret.
//!
//! ```text
//! fleet.toml   env = { GOGC = "50", TOKEN = { secret = "…" } }
//! protocol     "env": {"GOGC": "50", "TOKEN": {"secret": "…"}}
//! ```
//!
//! A secret is given to the sub-agent as any other value, and shown to nobody: it is not printed, logged or quoted in an error. Where it
//! must be kept, on the host and at the gateway, the file is its owner's alone. What it is not is encrypted there, nor kept from whoever can
//! reach the gateway and knows the host's agent id: hosts do not prove who they are.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Variables by their names.
pub type Env = BTreeMap<String, EnvValue>;

/// More variables than this for one sub-agent are a mistake.
const MAX_VARIABLES: usize = 1_000;
/// Names and values of one sub-agent, bytes: more than Linux takes in a single one.
const MAX_BYTES: usize = 128 << 10;
/// The longest name of a variable, bytes.
pub const MAX_NAME_BYTES: usize = 255;

/// Whether that many variables, and that long ones, can be given to a sub-agent.
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

/// Of all names and values.
pub fn bytes(env: &Env) -> usize {
    env.iter().map(|(name, value)| name.len() + value.reveal().len()).sum()
}

/// The value of one variable.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "gateway", schemars(rename = "EnvValue"))]
#[serde(untagged)]
pub enum EnvValue {
    /// One that anybody may see.
    Plain(String),
    /// One that is never shown: not in `status`, in a log, in an event or in an error. The gateway tells it to whoever goes by the host's
    /// agent id, which is a name and no password.
    Secret { secret: String },
}

impl EnvValue {
    /// For the sub-agent's environment alone.
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

/// What is expected of a value; errors must not quote what came instead, which may be a secret in the wrong notation.
const EXPECTED: &str = "cannot take the value of a variable: expected a text in quotes, or { secret = \"…\" }";

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
    fn what_is_no_value_is_refused_without_being_quoted() {
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
