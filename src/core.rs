//! Decisions, and the types that they use: pure functions from values to values.
//!
//! Nothing here reads a clock, a file or the environment. The modules import `std`, `serde`, `schemars`, `semver` and each other only,
//! which `cargo xtask tidy` checks.

pub mod agent;
pub mod certificate;
pub mod desired;
pub mod env;
#[cfg(feature = "gateway")]
pub mod fleet;
pub mod generation;
#[cfg(feature = "gateway")]
pub mod glob;
mod guards;
pub mod health;
pub mod item;
pub mod ledger;
pub mod manifest;
pub mod model;
pub mod names;
pub mod order;
mod paths;
pub mod program;
pub mod protocol;
#[cfg(feature = "gateway")]
pub mod range;
pub mod reconcile;
pub mod role;
pub mod schedule;
pub mod service_manager;
pub mod status;
pub mod supervise;
pub mod text;
pub mod throughput;
pub mod units;
pub mod unknown;
pub mod upgrade;
pub mod watch;
