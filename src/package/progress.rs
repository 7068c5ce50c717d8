//! Reports progress and checks for cancellation: on each chunk, and every half second while waiting.

use std::fmt;
use std::time::{Duration, Instant};

use super::Progress;
use crate::platform;

/// The longest wait between two checks for cancellation.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The caller cancelled the fetch.
#[derive(Debug)]
pub(super) struct DownloadCancelled;

impl fmt::Display for DownloadCancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the package is no longer wanted")
    }
}

impl std::error::Error for DownloadCancelled {}

/// The state of a download, and the callback that receives it.
pub(super) struct DownloadProgress<'a> {
    progress: &'a mut Progress<'a>,
    done: u64,
    total: Option<u64>,
}

impl<'a> DownloadProgress<'a> {
    pub(super) fn new(progress: &'a mut Progress<'a>) -> DownloadProgress<'a> {
        DownloadProgress { progress, done: 0, total: None }
    }

    /// Reports `done` of `total` bytes.
    pub(super) fn report(&mut self, done: u64, total: Option<u64>) -> Result<(), DownloadCancelled> {
        (self.done, self.total) = (done, total);
        self.still_wanted()
    }

    pub(super) fn still_wanted(&mut self) -> Result<(), DownloadCancelled> {
        if (self.progress)(self.done, self.total) { Ok(()) } else { Err(DownloadCancelled) }
    }

    /// Waits for this time, or until the fetch is cancelled.
    pub(super) fn pause(&mut self, time: Duration) -> Result<(), DownloadCancelled> {
        let until = Instant::now() + time;
        loop {
            self.still_wanted()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            platform::pause(left.min(CHECK_INTERVAL));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancellation_ends_a_pause() {
        let mut calls = 0;
        let start = Instant::now();
        let mut progress = |_: u64, _: Option<u64>| {
            calls += 1;
            calls < 3
        };
        assert!(DownloadProgress::new(&mut progress).pause(Duration::from_secs(3600)).is_err());
        assert_eq!(calls, 3);
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
