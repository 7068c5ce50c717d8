//! When to warn that a certificate expires. The gateway and its hosts use the same rule.

/// Warn about a certificate that expires sooner than this, seconds: enough to repair a renewal that failed over a holiday.
pub const WARN_BEFORE: u64 = 21 * 86_400;

/// How close a certificate is to its expiry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// It expires in three weeks or later.
    Long,
    /// It expires within three weeks.
    Ending { days: u64 },
    /// It has expired.
    Ended,
}

/// The validity at `now` of a certificate that expires at `end`, both in seconds since 1970.
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
    fn an_expiry_within_three_weeks_is_soon() {
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
