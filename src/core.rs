//! Decisions and the words they are made of: pure functions from values to values.
//!
//! Nothing here reads a clock, a file or the environment. It imports `std`, `serde`, `schemars`, `semver` and its own files only,
//! which `cargo xtask tidy` checks.

pub mod manifest;
pub mod model;
pub mod protocol;
pub mod units;
