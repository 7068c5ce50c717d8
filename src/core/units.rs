//! Durations and sizes with units: `"30s"`, `"64MiB"`. A bare number is seconds or MiB, as in the files of the old system.

use std::fmt;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A duration in whole milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const SPAN_UNITS: &[(&str, u64)] = &[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const SIZE_UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

impl Span {
    /// A number and one of ms, s, m, h, d; a bare number is seconds.
    pub fn parse(text: &str) -> Option<Span> {
        scaled(text, SPAN_UNITS, 1_000).map(|millis| Span(Duration::from_millis(millis)))
    }
}

impl Size {
    /// A number and one of B, KiB, MiB, GiB, kB, MB, GB; a bare number is MiB.
    pub fn parse(text: &str) -> Option<Size> {
        scaled(text, SIZE_UNITS, 1 << 20).map(Size)
    }
}

fn scaled(text: &str, units: &[(&str, u64)], bare: u64) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit = text[digits..].trim();
    let factor = if unit.is_empty() { bare } else { units.iter().find(|(name, _)| *name == unit)?.1 };
    number.checked_mul(factor)
}

fn shown(value: u64, units: &[(&str, u64)], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (name, factor) = units
        .iter()
        .filter(|(_, factor)| value.is_multiple_of(*factor) && value / factor > 0)
        .max_by_key(|(_, factor)| *factor)
        .unwrap_or(&units[0]);
    write!(f, "{}{name}", value / factor)
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        shown(self.0.as_millis() as u64, SPAN_UNITS, f)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        shown(self.0, &SIZE_UNITS[..4], f)
    }
}

/// Parses a whole number, or a text with a unit.
struct UnitVisitor<T> {
    expected: &'static str,
    parse: fn(&str) -> Option<T>,
}

impl<T> Visitor<'_> for UnitVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        (self.parse)(&number.to_string()).ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        (self.parse)(&number.to_string()).ok_or_else(|| E::invalid_value(de::Unexpected::Signed(number), &self))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        let expected = "a duration such as \"30s\", \"5m\" or a whole number of seconds";
        deserializer.deserialize_any(UnitVisitor { expected, parse: Span::parse })
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        let expected = "a size such as \"64MiB\" or a whole number of MiB";
        deserializer.deserialize_any(UnitVisitor { expected, parse: Size::parse })
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn spans_and_sizes_are_parsed_with_and_without_units() {
        let span = |text| Span::parse(text).map(|span| span.0.as_millis());
        assert_eq!(span("30s"), Some(30_000));
        assert_eq!(span("5 m"), Some(300_000));
        assert_eq!(span("250ms"), Some(250));
        assert_eq!(span("60"), Some(60_000));
        assert_eq!(Size::parse("64MiB"), Some(Size(64 << 20)));
        assert_eq!(Size::parse("64"), Some(Size(64 << 20)));
        for bad in ["", "s", "-1s", "1.5s", "1w", "99999999999999999999s", "18446744073709551615d"] {
            assert_eq!(span(bad), None, "{bad}");
        }
    }

    #[test]
    fn spans_and_sizes_print_in_the_notation_that_they_parse() {
        for text in ["30s", "5m", "250ms", "1h", "36h"] {
            assert_eq!(Span::parse(text).unwrap().to_string(), text);
        }
        for text in ["64MiB", "1GiB", "1500B"] {
            assert_eq!(Size::parse(text).unwrap().to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn a_printed_value_parses_back(value: u64) {
            prop_assert_eq!(Span::parse(&Span(Duration::from_millis(value)).to_string()), Some(Span(Duration::from_millis(value))));
            prop_assert_eq!(Size::parse(&Size(value).to_string()), Some(Size(value)));
        }

        #[test]
        fn any_text_is_parsed_or_rejected(text in "[0-9]{0,21} ?[a-zA-Zµ]{0,4}") {
            if let Some(span) = Span::parse(&text) {
                prop_assert_eq!(Span::parse(&span.to_string()), Some(span));
            }
            let _ = Size::parse(&text);
        }
    }
}
