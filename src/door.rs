//! Placeholder: the real one is written elsewhere; only the signatures count here.
#![allow(dead_code, unused)]
use std::time::Duration;

use crate::home::Home;

pub struct Status {
    pub spm: RoleStatus,
}
pub struct RoleStatus {
    pub pid: Option<u32>,
}
/// Asks the manager of a home how it is.
pub fn status(home: &Home, timeout: Duration) -> anyhow::Result<Status> {
    anyhow::bail!("placeholder")
}
