//! Placeholder: the real one is written elsewhere; only the signatures count here.
#![allow(dead_code, unused)]
use std::time::Duration;

use anyhow::Result;

use crate::home::Home;

/// Ends both roles and every sub-agent of a home, each with all that it started, and what else of the home runs. Twice is as good as once.
pub fn end_all(home: &Home, grace: Duration) -> Result<()> {
    Ok(())
}

/// Ends both roles of a home and nothing else: the sub-agents keep running, and it is not taken for a stop.
pub fn end_roles(home: &Home, grace: Duration) -> Result<()> {
    Ok(())
}

/// Somebody wants the home to run: an earlier stop counts no more.
pub fn forget_stop(home: &Home) -> Result<()> {
    Ok(())
}
