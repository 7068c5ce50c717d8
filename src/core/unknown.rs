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
