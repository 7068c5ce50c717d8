//! Detects when a file is complete. A file that is written in place, over a slow link or to a full disk, may be well formed although half of
//! it is missing. So it is read only after it has not changed for a while.

use std::time::{Duration, Instant, SystemTime};

/// How long a file must not have changed: longer than the pause of an editor or a network file system between two writes.
pub(super) const SETTLE_TIME: Duration = Duration::from_secs(2);

/// The content, or the stamp, of a file at the last polls.
#[derive(Debug)]
pub(super) struct SettledFile<T> {
    required: Duration,
    /// The last value, and since when it is unchanged.
    last: Option<(T, Instant)>,
}

impl<T: PartialEq> SettledFile<T> {
    pub(super) fn new(required: Duration) -> SettledFile<T> {
        SettledFile { required, last: None }
    }

    /// Records the value of a poll; returns whether it has been unchanged for long enough. At the first poll this is the time since
    /// `modified`.
    pub(super) fn poll(&mut self, value: T, modified: Option<SystemTime>, now: Instant) -> bool {
        match &self.last {
            Some((last, since)) if *last == value => now.duration_since(*since) >= self.required,
            Some(_) => {
                self.last = Some((value, now));
                self.required.is_zero()
            }
            None => {
                let age = modified.and_then(|modified| modified.elapsed().ok()).unwrap_or_default().min(self.required);
                self.last = Some((value, now.checked_sub(age).unwrap_or(now)));
                age == self.required
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_file_settles() {
        let at = |seconds: u64| Instant::now() + Duration::from_secs(seconds);
        let mut file = SettledFile::new(Duration::from_secs(2));
        let start = at(100);
        let poll =
            |file: &mut SettledFile<u32>, value, millis| file.poll(value, None, start + Duration::from_millis(millis));
        let settled: Vec<bool> =
            [(1, 0), (1, 1_999), (1, 2_000), (2, 2_500), (2, 4_499), (3, 4_500), (2, 6_000), (2, 8_000)]
                .into_iter()
                .map(|(value, millis)| poll(&mut file, value, millis))
                .collect();
        assert_eq!(settled, [false, false, true, false, false, false, false, true]);
    }

    #[test]
    fn the_modification_time_counts_at_the_first_poll() {
        let required = Duration::from_secs(2);
        let first = |modified| SettledFile::new(required).poll(1, modified, Instant::now());
        let now = SystemTime::now();
        assert!(first(Some(now - Duration::from_secs(3))));
        assert!(!first(Some(now)));
        assert!(!first(Some(now + Duration::from_secs(3_600))), "a clock that is ahead proves nothing");
        assert!(!first(None));
    }
}
