//! The lock on what the host trusts: its epochs and its keyring are read, changed and written back by one process at a time, as an
//! installation does it beside a manager that runs.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::home::Home;
use crate::lock::{self, LockGuard};

/// The holder writes two or three files.
const DEADLINE: Duration = Duration::from_secs(5);

/// No other process changes what the host trusts while this is held.
pub(super) fn lock(home: &Home) -> Result<LockGuard> {
    let path = home.trust_lock();
    lock::take(&path, DEADLINE)?.with_context(|| {
        format!(
            "cannot change what this host trusts: another process has held {} for too long; try again",
            path.display()
        )
    })
}
