//! Whether a package is still wanted: asked by whoever works on it, and by whoever waits for something, every half second at least.

use std::fmt;
use std::time::{Duration, Instant};

use super::Progress;
use crate::platform;

/// For so long nobody waits without asking.
const LOOK: Duration = Duration::from_millis(500);

/// Who ordered the package does not want it any more.
#[derive(Debug)]
pub(super) struct Unwanted;

impl fmt::Display for Unwanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is not wanted any more")
    }
}

impl std::error::Error for Unwanted {}

/// How far a package is, and who is told.
pub(super) struct Watch<'a> {
    progress: &'a mut Progress<'a>,
    done: u64,
    total: Option<u64>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(progress: &'a mut Progress<'a>) -> Watch<'a> {
        Watch { progress, done: 0, total: None }
    }

    /// So many bytes are there, of so many.
    pub(super) fn at(&mut self, done: u64, total: Option<u64>) -> Result<(), Unwanted> {
        (self.done, self.total) = (done, total);
        self.still_wanted()
    }

    pub(super) fn still_wanted(&mut self) -> Result<(), Unwanted> {
        if (self.progress)(self.done, self.total) { Ok(()) } else { Err(Unwanted) }
    }

    /// Waits for so long, if it is wanted as long.
    pub(super) fn pause(&mut self, time: Duration) -> Result<(), Unwanted> {
        let until = Instant::now() + time;
        loop {
            self.still_wanted()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            platform::pause(left.min(LOOK));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_ends_when_nobody_waits_for_its_end_any_more() {
        let mut asked = 0;
        let began = Instant::now();
        let mut progress = |_: u64, _: Option<u64>| {
            asked += 1;
            asked < 3
        };
        assert!(Watch::new(&mut progress).pause(Duration::from_secs(3600)).is_err());
        assert_eq!(asked, 3);
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}
