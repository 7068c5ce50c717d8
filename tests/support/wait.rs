//! Waiting for a thing itself, with a deadline: no test sleeps and hopes.

use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(15);

/// Looks until `attempt` finds what it looks for; panics, naming `what`, when `deadline` has passed.
#[track_caller]
pub fn wait_for<T>(what: &str, deadline: Duration, attempt: impl FnMut() -> Option<T>) -> T {
    match try_for(deadline, attempt) {
        Some(found) => found,
        None => panic!("waited {deadline:?} in vain for {what}"),
    }
}

/// As [`wait_for`]; `None` when `deadline` has passed.
pub fn try_for<T>(deadline: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return Some(found);
        }
        if started.elapsed() >= deadline {
            return None;
        }
        // Nobody unparks us; waking early does no harm.
        std::thread::park_timeout(PAUSE);
    }
}
