//! Median and tail of a small number of samples.

/// Samples of one kind, in milliseconds.
#[derive(Debug, Default, Clone)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn add(&mut self, milliseconds: f64) {
        self.0.push(milliseconds);
    }

    pub(crate) fn last(&self) -> Option<f64> {
        self.0.last().copied()
    }

    /// The smallest sample that at least `share` of all samples do not exceed; `None` without samples.
    fn at(&self, share: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let index = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(index.saturating_sub(1)).copied()
    }

    pub(crate) fn median(&self) -> Option<f64> {
        self.at(0.5)
    }

    pub(crate) fn p95(&self) -> Option<f64> {
        self.at(0.95)
    }

    pub(crate) fn slowest(&self) -> Option<f64> {
        self.at(1.0)
    }

    /// `median/p95`, in milliseconds.
    pub(crate) fn shown(&self) -> String {
        match (self.median(), self.p95()) {
            (Some(median), Some(p95)) => format!("{}/{}", short(median), short(p95)),
            _ => "-".to_owned(),
        }
    }
}

/// Three significant digits: such a measurement has no more.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_p95_are_samples() {
        let mut samples = Samples::default();
        assert_eq!(samples.shown(), "-");
        samples.add(7.0);
        assert_eq!(samples.shown(), "7.00/7.00");
        (1..=19).rev().for_each(|value| samples.add(f64::from(value)));
        assert_eq!((samples.median(), samples.p95()), (Some(9.0), Some(18.0)));
    }
}
