//! Whether a measurement reached its targets, as lines to read.

use std::fmt::Write as _;

use super::statistics::short;

/// The targets, and whether each was reached.
#[derive(Default)]
pub(super) struct Verdicts {
    text: String,
}

impl Verdicts {
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// A target: `value` is at most `limit`.
    pub(super) fn at_most(&mut self, what: &str, value: Option<f64>, limit: f64, unit: &str) {
        let (word, value) = match value {
            Some(value) if value <= limit => ("met   ", short(value)),
            Some(value) => ("MISSED", short(value)),
            None => ("?     ", "not measured".to_owned()),
        };
        let _ = writeln!(self.text, "{word} {what}: {value} (at most {} {unit})", short(limit));
    }

    /// A target: the sentence `what` holds.
    pub(super) fn is(&mut self, what: &str, holds: bool) {
        let _ = writeln!(self.text, "{} {what}", if holds { "met   " } else { "MISSED" });
    }
}
