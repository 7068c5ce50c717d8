//! Whether the aims of a measurement were reached, as lines for a person to read.

use std::fmt::Write as _;

use super::statistics::short;

/// What was aimed at, and whether it was reached.
#[derive(Default)]
pub(super) struct Verdicts {
    text: String,
}

impl Verdicts {
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// `value` is to be at most `limit`.
    pub(super) fn at_most(&mut self, what: &str, value: Option<f64>, limit: f64, unit: &str) {
        let (word, value) = match value {
            Some(value) if value <= limit => ("met   ", short(value)),
            Some(value) => ("MISSED", short(value)),
            None => ("?     ", "not measured".to_owned()),
        };
        let _ = writeln!(self.text, "{word} {what}: {value} (at most {} {unit})", short(limit));
    }

    /// `what` is a sentence that is to hold.
    pub(super) fn is(&mut self, what: &str, holds: bool) {
        let _ = writeln!(self.text, "{} {what}", if holds { "met   " } else { "MISSED" });
    }
}
