//! One item of a message, parsed on its own: an item that cannot be read does not affect the others.
//!
//! A later version may send a kind of value that this version does not support. If the whole message failed for that, it would stop every
//! older host. So lists are parsed item by item, and an invalid item is rejected alone, with its name if that can be read.

use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::de::value::{Error, MapDeserializer, SeqDeserializer, StringDeserializer};
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer, forward_to_deserialize_any};

use super::model::AgentName;
use super::text::cut;
use super::unknown::AnyValue;

/// Limit for the reason why an item cannot be read, bytes.
const MAX_WHY_BYTES: usize = 300;

/// An item of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum MessageItem<T> {
    Read(T),
    Unreadable(Unreadable),
}

/// An item that this version cannot read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The name of the sub-agent; `None`: it cannot be read either.
    pub name: Option<AgentName>,
    pub why: String,
    /// Distinguishes it from another item that cannot be read for the same reason.
    pub hash: u64,
}

/// A hash that distinguishes contents, to recognize a repeated one. Valid on one host and for one build of the program.
pub fn content_hash(content: &impl fmt::Debug) -> u64 {
    let mut hasher = DefaultHasher::new();
    format!("{content:?}").hash(&mut hasher);
    hasher.finish()
}

impl<T> From<T> for MessageItem<T> {
    fn from(item: T) -> MessageItem<T> {
        MessageItem::Read(item)
    }
}

impl<T: Serialize> Serialize for MessageItem<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            MessageItem::Read(item) => item.serialize(serializer),
            MessageItem::Unreadable(unreadable) => Err(serde::ser::Error::custom(&unreadable.why)),
        }
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for MessageItem<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MessageItem<T>, D::Error> {
        let value = AnyValue::deserialize(deserializer)?;
        let name = match &value {
            AnyValue::Map(fields) => match fields.get("name") {
                Some(AnyValue::Text(name)) => name.parse().ok(),
                _ => None,
            },
            _ => None,
        };
        let hash = content_hash(&value);
        Ok(match read(value) {
            Ok(item) => MessageItem::Read(item),
            Err(why) => MessageItem::Unreadable(Unreadable { name, why: cut(&why, MAX_WHY_BYTES), hash }),
        })
    }
}

/// Parses an item. An error never quotes a value of `env`, which may be a secret in an unknown notation.
fn read<T: DeserializeOwned>(value: AnyValue) -> Result<T, String> {
    if let AnyValue::Map(fields) = &value
        && !matches!(fields.get("env"), None | Some(AnyValue::Map(_)))
    {
        return Err("cannot read env: expected a table of variables by name".to_owned());
    }
    T::deserialize(value).map_err(|error| error.to_string())
}

#[cfg(feature = "gateway")]
impl<T: schemars::JsonSchema> schemars::JsonSchema for MessageItem<T> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> std::borrow::Cow<'static, str> {
        T::schema_id()
    }

    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        T::json_schema(generator)
    }
}

impl<'de> Deserializer<'de> for AnyValue {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            AnyValue::Null(()) => visitor.visit_unit(),
            AnyValue::Bool(value) => visitor.visit_bool(value),
            AnyValue::Natural(value) => visitor.visit_u64(value),
            AnyValue::Integer(value) => visitor.visit_i64(value),
            AnyValue::Number(value) => visitor.visit_f64(value),
            AnyValue::Text(text) => visitor.visit_string(text),
            AnyValue::List(values) => visitor.visit_seq(SeqDeserializer::new(values.into_iter())),
            AnyValue::Map(values) => visitor.visit_map(MapDeserializer::new(values.into_iter())),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            AnyValue::Null(()) => visitor.visit_none(),
            some => visitor.visit_some(some),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self {
            AnyValue::Text(text) => {
                let text: StringDeserializer<Error> = text.into_deserializer();
                text.deserialize_enum(name, variants, visitor)
            }
            other => other.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, Error> for AnyValue {
    type Deserializer = AnyValue;

    fn into_deserializer(self) -> AnyValue {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::super::order::Package;
    use super::super::protocol::AgentOrder;
    use super::*;

    fn order(json: &str) -> MessageItem<AgentOrder> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn an_item_is_read_like_the_type_itself() {
        let json = r#"{"name":"a","version":"1","file":null,"size":7,"env":{"A":"b","T":{"secret":"s"}},"retry":2,
            "cmd":"stop","later":{"of":[1,-1,1.5,null,true,"x"]}}"#;
        let alone: AgentOrder = serde_json::from_str(json).unwrap();
        assert_eq!(order(json), MessageItem::Read(alone.clone()));
        assert_eq!(serde_json::to_string(&order(json)).unwrap(), serde_json::to_string(&alone).unwrap());
    }

    #[test]
    fn an_unreadable_item_has_a_name_and_a_reason_and_shows_no_secret() {
        for (json, name, words) in [
            (r#"{"name":"a","version":"1","env":{"X":8675309}}"#, Some("a"), "value of a variable"),
            (r#"{"name":"a","version":"1","env":{"X":{"vault":"8675309"}}}"#, Some("a"), "value of a variable"),
            (r#"{"name":"a","version":"1","env":"8675309"}"#, Some("a"), "cannot read env"),
            (r#"{"name":"a","version":"1","sha256":"AA"}"#, Some("a"), "SHA-256"),
            (r#"{"name":"a","version":["1"]}"#, Some("a"), "sequence"),
            (r#"{"name":"a"}"#, Some("a"), "version"),
            (r#"{"name":"Beta","version":"1"}"#, None, "Beta"),
            (r#"{"version":"1"}"#, None, "name"),
            ("7", None, "7"),
            ("null", None, "unit"),
        ] {
            let MessageItem::Unreadable(unreadable) = order(json) else { panic!("{json} was read") };
            assert_eq!(unreadable.name.as_ref().map(AgentName::as_str), name, "{json}");
            assert!(unreadable.why.contains(words), "{json}: {}", unreadable.why);
            assert!(!unreadable.why.contains("8675309"), "{json}: {}", unreadable.why);
        }
        assert!(matches!(serde_json::from_str(r#"{"version":7}"#).unwrap(), MessageItem::<Package>::Unreadable(_)));
    }
}
