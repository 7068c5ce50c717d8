//! Whether a measurement reached its targets, as lines to read.

use std::fmt::Write as _;

use super::statistics::short;

const MET: &str = "met   ";

/// The targets, and whether each was reached.
#[derive(Default)]
pub(crate) struct Verdicts {
    text: String,
    missed: u32,
}

impl Verdicts {
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The number of targets that were not reached or not measured.
    pub(crate) fn missed(&self) -> u32 {
        self.missed
    }

    /// A target: `value` is at most `limit`.
    pub(crate) fn at_most(&mut self, what: &str, value: Option<f64>, limit: f64, unit: &str) {
        let (word, value) = match value {
            Some(value) if value <= limit => (MET, short(value)),
            Some(value) => ("MISSED", short(value)),
            None => ("?     ", "not measured".to_owned()),
        };
        self.missed += u32::from(word != MET);
        let _ = writeln!(self.text, "{word} {what}: {value} (at most {} {unit})", short(limit));
    }

    /// A target: the sentence `what` holds.
    pub(crate) fn is(&mut self, what: &str, holds: bool) {
        self.missed += u32::from(!holds);
        let _ = writeln!(self.text, "{} {what}", if holds { MET } else { "MISSED" });
    }
}
