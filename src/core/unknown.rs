//! Fields that a later version wrote and this one does not know: kept, and written back as they were.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Flattened into a type of machine-written state.
pub type Unknown = BTreeMap<String, Any>;

/// A JSON value of any kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Any {
    Null(()),
    Bool(bool),
    Natural(u64),
    Integer(i64),
    Number(f64),
    Text(String),
    List(Vec<Any>),
    Map(BTreeMap<String, Any>),
}

/// Their names and values, bytes: about as many as they have in a file.
pub fn bytes(unknown: &Unknown) -> usize {
    unknown.iter().map(|(name, value)| name.len() + value.bytes()).sum()
}

impl Any {
    fn bytes(&self) -> usize {
        /// A number, a word of the format, or the punctuation of any other value.
        const ALONE: usize = 8;
        ALONE
            + match self {
                Any::Text(text) => text.len(),
                Any::List(values) => values.iter().map(Any::bytes).sum(),
                Any::Map(values) => bytes(values),
                Any::Null(()) | Any::Bool(_) | Any::Natural(_) | Any::Integer(_) | Any::Number(_) => 0,
            }
    }
}
