//! The lock on the epochs and the keyring, which an installation and a running manager may change at the same time: only the holder loads,
//! changes and saves them.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::home::Home;
use crate::lock::{self, LockGuard};

/// The holder writes two or three files.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Takes the lock.
pub(super) fn lock(home: &Home) -> Result<LockGuard> {
    let path = home.trust_lock();
    lock::take(&path, LOCK_TIMEOUT)?.with_context(|| {
        format!(
            "cannot lock {}: another process has held the lock for more than {} seconds; try again",
            path.display(),
            LOCK_TIMEOUT.as_secs()
        )
    })
}
