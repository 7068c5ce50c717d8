//! Waits for an event itself, with a deadline: no test relies on a sleep.

use std::time::{Duration, Instant};

/// The interval between two attempts.
const PAUSE: Duration = Duration::from_millis(15);

/// Calls `attempt` until it returns a value; panics with `what` after `deadline`.
#[track_caller]
pub fn wait_for<T>(what: &str, deadline: Duration, attempt: impl FnMut() -> Option<T>) -> T {
    match try_for(deadline, attempt) {
        Some(found) => found,
        None => panic!("timed out after {deadline:?} waiting for {what}"),
    }
}

/// As [`wait_for`]; `None` after `deadline`.
pub fn try_for<T>(deadline: Duration, attempt: impl FnMut() -> Option<T>) -> Option<T> {
    try_every(PAUSE, deadline, attempt)
}

/// As [`try_for`], with another interval between two attempts.
pub fn try_every<T>(interval: Duration, deadline: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return Some(found);
        }
        if started.elapsed() >= deadline {
            return None;
        }
        // No thread unparks this one; an early wake-up does no harm.
        std::thread::park_timeout(interval);
    }
}
