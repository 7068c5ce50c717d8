//! Detects when a file is complete. A file that is written in place, over a slow link or to a full disk, may be well formed although half of
//! it is missing. So it is read only after it has not changed for a while.

use std::time::{Duration, Instant, SystemTime};

/// How long a file must not have changed: longer than the pause of an editor or a network file system between two writes.
pub(super) const STILL: Duration = Duration::from_secs(2);

/// The content, or the stamp, of a file at the last polls.
#[derive(Debug)]
pub(super) struct SettledFile<T> {
    required: Duration,
    /// The last value, and since when it is unchanged.
    found: Option<(T, Instant)>,
}

impl<T: PartialEq> SettledFile<T> {
    pub(super) fn new(required: Duration) -> SettledFile<T> {
        SettledFile { required, found: None }
    }

    /// Records the value of a poll; returns whether it has been unchanged for long enough. At the first poll this is the time since
    /// `modified`.
    pub(super) fn look(&mut self, found: T, modified: Option<SystemTime>, now: Instant) -> bool {
        match &self.found {
            Some((known, since)) if *known == found => now.duration_since(*since) >= self.required,
            Some(_) => {
                self.found = Some((found, now));
                self.required.is_zero()
            }
            None => {
                let age = modified.and_then(|modified| modified.elapsed().ok()).unwrap_or_default().min(self.required);
                self.found = Some((found, now.checked_sub(age).unwrap_or(now)));
                age == self.required
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_stood_still_counts() {
        let at = |seconds: u64| Instant::now() + Duration::from_secs(seconds);
        let mut still = SettledFile::new(Duration::from_secs(2));
        let start = at(100);
        let look = |still: &mut SettledFile<u32>, found, millis| {
            still.look(found, None, start + Duration::from_millis(millis))
        };
        let seen: Vec<bool> =
            [(1, 0), (1, 1_999), (1, 2_000), (2, 2_500), (2, 4_499), (3, 4_500), (2, 6_000), (2, 8_000)]
                .into_iter()
                .map(|(found, millis)| look(&mut still, found, millis))
                .collect();
        assert_eq!(seen, [false, false, true, false, false, false, false, true]);
    }

    #[test]
    fn at_the_first_look_the_files_own_time_counts() {
        let required = Duration::from_secs(2);
        let first = |modified| SettledFile::new(required).look(1, modified, Instant::now());
        let now = SystemTime::now();
        assert!(first(Some(now - Duration::from_secs(3))));
        assert!(!first(Some(now)));
        assert!(!first(Some(now + Duration::from_secs(3_600))), "a clock that is ahead proves nothing");
        assert!(!first(None));
    }
}
