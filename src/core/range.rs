//! The part of a file that a request asks for by its `Range` header (RFC 9110, section 14). Only a single range is supported; a request for
//! several gets the whole file.

use std::ops::Range;

/// The requested part of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestedRange {
    Whole,
    Range(Range<u64>),
    /// The range is outside of the file: status 416.
    Unsatisfiable,
}

/// Parses `Range: bytes=a-b`, `a-` or `-n` for a file of `size` bytes; anything else requests the whole file.
pub fn part(header: &str, size: u64) -> RequestedRange {
    let Some(spec) = header.trim().strip_prefix("bytes=").map(str::trim) else { return RequestedRange::Whole };
    let Some((first, last)) = spec.split_once('-').filter(|_| !spec.contains(',')) else {
        return RequestedRange::Whole;
    };
    let number = |text: &str| if text.bytes().all(|b| b.is_ascii_digit()) { text.parse::<u64>().ok() } else { None };
    let range = match (first, last) {
        ("", last) => match number(last) {
            Some(last) => size.saturating_sub(last)..size,
            None => return RequestedRange::Whole,
        },
        (first, "") => match number(first) {
            Some(first) => first..size,
            None => return RequestedRange::Whole,
        },
        (first, last) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(size),
            _ => return RequestedRange::Whole,
        },
    };
    if range.start < range.end { RequestedRange::Range(range) } else { RequestedRange::Unsatisfiable }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_single_range_is_served_and_anything_else_is_the_whole_file() {
        for (header, expected) in [
            ("bytes=0-9", RequestedRange::Range(0..10)),
            ("bytes=0-0", RequestedRange::Range(0..1)),
            ("bytes=90-", RequestedRange::Range(90..100)),
            ("bytes=90-1000", RequestedRange::Range(90..100)),
            ("bytes=0-18446744073709551615", RequestedRange::Range(0..100)),
            ("bytes=-10", RequestedRange::Range(90..100)),
            ("bytes=-1000", RequestedRange::Range(0..100)),
            ("bytes=100-", RequestedRange::Unsatisfiable),
            ("bytes=200-300", RequestedRange::Unsatisfiable),
            ("bytes=-0", RequestedRange::Unsatisfiable),
            ("bytes=9-0", RequestedRange::Whole),
            ("bytes=0-1,5-6", RequestedRange::Whole),
            ("bytes=+1-2", RequestedRange::Whole),
            ("bytes=", RequestedRange::Whole),
            ("bytes=-", RequestedRange::Whole),
            ("bytes=a-b", RequestedRange::Whole),
            ("bytes=99999999999999999999-", RequestedRange::Whole),
            ("lines=1-2", RequestedRange::Whole),
        ] {
            assert_eq!(part(header, 100), expected, "{header}");
        }
        assert_eq!(part("bytes=0-", 0), RequestedRange::Unsatisfiable);
    }

    proptest! {
        /// A served range is not empty and is within the file.
        #[test]
        fn a_range_is_within_the_file(header in "(bytes=)?[0-9]{0,3}-?[0-9]{0,3}(,1-2)?", size in 0_u64..500) {
            if let RequestedRange::Range(range) = part(&header, size) {
                prop_assert!(range.start < range.end && range.end <= size, "{header} of {size}: {range:?}");
            }
        }

        #[test]
        fn a_range_parses_back(first in 0_u64..1000, length in 1_u64..1000, rest in 0_u64..1000) {
            let (last, size) = (first + length - 1, first + length + rest);
            prop_assert_eq!(part(&format!("bytes={first}-{last}"), size), RequestedRange::Range(first..last + 1));
            prop_assert_eq!(part(&format!("bytes={first}-"), size), RequestedRange::Range(first..size));
        }
    }
}
