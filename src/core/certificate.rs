//! When the end of a certificate is worth a warning: the gateway and its hosts use the same rule.

/// A certificate that ends sooner than this, seconds, is worth a warning: time for a renewal that failed over a holiday.
pub const WARN_BEFORE: u64 = 21 * 86_400;

/// How a certificate stands to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// The end is far away.
    Long,
    /// It ends soon.
    Ending {
        days: u64,
    },
    Ended,
}

/// `end` and `now` are seconds since 1970.
pub fn validity(end: u64, now: u64) -> Validity {
    match end.checked_sub(now) {
        None => Validity::Ended,
        Some(left) if left < WARN_BEFORE => Validity::Ending { days: left / 86_400 },
        Some(_) => Validity::Long,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_within_three_weeks_is_near() {
        for (left, expected) in [
            (WARN_BEFORE as i64, Validity::Long),
            (WARN_BEFORE as i64 - 1, Validity::Ending { days: 20 }),
            (86_400, Validity::Ending { days: 1 }),
            (0, Validity::Ending { days: 0 }),
            (-1, Validity::Ended),
        ] {
            let now = 1_800_000_000_u64;
            assert_eq!(validity(now.saturating_add_signed(left), now), expected, "{left}");
        }
    }
}
