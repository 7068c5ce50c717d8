//! When a file that somebody writes counts: not while it may still be half of itself. A file that is written in place, over a slow link or
//! onto a full disk, is well formed at the end of many a line; so it counts once it has stood still for a while.

use std::time::{Duration, Instant, SystemTime};

/// How long a file must have stood still: longer than a network file system or an editor pauses between two writes.
pub(super) const STILL: Duration = Duration::from_secs(2);

/// What was found at a file's place at the last looks.
#[derive(Debug)]
pub(super) struct SettledFile<T> {
    required: Duration,
    /// And since when it is so.
    found: Option<(T, Instant)>,
}

impl<T: PartialEq> SettledFile<T> {
    pub(super) fn new(required: Duration) -> SettledFile<T> {
        SettledFile { required, found: None }
    }

    /// Notes what a look has found, last modified then, and says whether it has stood still for long enough. The time of a modification
    /// counts at the first look alone, when nothing else is known.
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
