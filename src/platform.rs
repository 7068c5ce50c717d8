//! What differs between Unix and Windows, behind functions of the same names; the only place with `cfg(unix)`, `cfg(windows)` and `unsafe`.
#![allow(unsafe_code, reason = "the system's interfaces are called here and nowhere else")]

use std::time::Duration;

#[cfg(unix)]
mod unix;
#[cfg(unix)]
pub use unix::*;
#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub use windows::*;

/// Lets `duration` pass, in the few places where nothing can be waited for: between two tries at what the system does not announce.
#[allow(clippy::disallowed_methods, reason = "the one place")]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}
