//! Fields that a later version wrote and this one does not know: kept, and written back as they were.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Flattened into a type of machine-written state.
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

/// Their names and values, bytes: about as many as they have in a file.
pub fn bytes(unknown: &UnknownFields) -> usize {
    unknown.iter().map(|(name, value)| name.len() + value.bytes()).sum()
}

impl AnyValue {
    fn bytes(&self) -> usize {
        /// A number, a word of the format, or the punctuation of any other value.
        const ALONE: usize = 8;
        ALONE
            + match self {
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
