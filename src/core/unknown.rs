//! Fields of a later version that this version does not know: they are kept, and written back unchanged.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A flattened field of a type of machine-written state.
pub type UnknownFields = BTreeMap<String, AnyValue>;

/// A JSON value of any kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AnyValue {
    Null(()),
    Bool(bool),
    Natural(u64),
    Integer(i64),
    Number(f64),
    Text(String),
    List(Vec<AnyValue>),
    Map(BTreeMap<String, AnyValue>),
}

/// Approximate size of the fields in a file, bytes.
pub fn bytes(unknown: &UnknownFields) -> usize {
    unknown.iter().map(|(name, value)| name.len() + value.bytes()).sum()
}

impl AnyValue {
    fn bytes(&self) -> usize {
        /// Size of a number, a literal, or the punctuation of any other value.
        const BASE: usize = 8;
        BASE + match self {
            AnyValue::Text(text) => text.len(),
            AnyValue::List(values) => values.iter().map(AnyValue::bytes).sum(),
            AnyValue::Map(values) => bytes(values),
            AnyValue::Null(())
            | AnyValue::Bool(_)
            | AnyValue::Natural(_)
            | AnyValue::Integer(_)
            | AnyValue::Number(_) => 0,
        }
    }
}
