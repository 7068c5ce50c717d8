//! How one role watches the other: when a silence is a hang, when one that is gone is started again and by whom, and when one that uses too
//! much memory is renewed.

pub mod memory;
pub mod revival;
pub mod reviver;
pub mod silence;
