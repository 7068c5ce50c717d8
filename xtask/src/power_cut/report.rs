//! What the events came to: a line for each, and a table by kind and phase.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;

use super::host::{Event, Outcome, Plan, Release};
use super::progress::Phase;

#[derive(Default)]
struct Count {
    old: usize,
    new: usize,
    skipped: usize,
    stranded: usize,
}

#[derive(Default)]
pub(super) struct Report {
    counts: BTreeMap<(Event, Phase), Count>,
    took: Vec<Duration>,
}

impl Report {
    /// Counts an event; returns its line.
    pub(super) fn add(&mut self, plan: &Plan, outcome: &Result<Outcome>) -> String {
        let phase = outcome.as_ref().map_or(plan.target, |outcome| outcome.phase);
        let count = self.counts.entry((plan.event, phase)).or_default();
        let with = if plan.both { ", both ordered" } else { "" };
        let place = format!("{} in {phase}{with}", name(plan.event));
        let Ok(outcome) = outcome else {
            count.stranded += 1;
            return format!("{place}: STRANDED");
        };
        let found = match outcome.found {
            Release::Old => {
                count.old += 1;
                "old"
            }
            Release::New => {
                count.new += 1;
                "new"
            }
        };
        count.skipped += usize::from(!outcome.skipped.is_empty());
        self.took.push(outcome.took);
        let skipped: String = outcome.skipped.iter().map(|why| format!(", tried again after: {why}")).collect();
        format!("{place}: {found} release on the disk, recovered{skipped}; {} s", outcome.took.as_secs())
    }

    pub(super) fn events(&self) -> usize {
        self.counts.values().map(Count::events).sum()
    }

    pub(super) fn stranded(&self) -> usize {
        self.counts.values().map(|count| count.stranded).sum()
    }

    /// The table, and the seconds that an event took with its recovery and the next upgrade.
    pub(super) fn table(&self) -> String {
        let columns = |first: &str, rest: [&str; 5]| {
            format!("{first:<40} {:>6} {:>5} {:>5} {:>8} {:>9}\n", rest[0], rest[1], rest[2], rest[3], rest[4])
        };
        let mut table = String::new();
        let mut shown = None;
        for ((event, phase), count) in &self.counts {
            if shown != Some(*event) {
                table += "\n";
                table += &columns(&format!("{} in", name(*event)), ["events", "old", "new", "skipped", "stranded"]);
                shown = Some(*event);
            }
            let numbers = [count.events(), count.old, count.new, count.skipped, count.stranded].map(|n| n.to_string());
            table += &columns(&format!("  {phase}"), numbers.each_ref().map(String::as_str));
        }
        let sum: Duration = self.took.iter().sum();
        let mean = sum.as_secs_f64() / self.took.len().max(1) as f64;
        let slowest = self.took.iter().max().map_or(0.0, Duration::as_secs_f64);
        table + &format!("\nseconds for each: {mean:.0} on average, {slowest:.0} at most\n")
    }
}

impl Count {
    fn events(&self) -> usize {
        self.old + self.new + self.stranded
    }
}

fn name(event: Event) -> String {
    match event {
        Event::PowerCut => "power cut".to_owned(),
        Event::ClockJump(days) => format!("clock {days:+} day"),
        Event::PowerCutAndClock(days) => format!("power cut, clock {days:+} day at boot"),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn events_are_counted_by_kind_and_phase() {
        let phases = Phase::targets();
        let plan = |event, phase| Plan { event, target: phase, fraction: 0.5, both: false };
        let ended = |phase, found| Ok(Outcome { phase, found, skipped: vec![], took: Duration::from_secs(40) });
        let mut report = Report::default();
        report.add(&plan(Event::PowerCut, phases[0]), &ended(phases[0], Release::Old));
        let line = report.add(&plan(Event::PowerCut, phases[0]), &ended(phases[1], Release::New));
        assert_eq!(line, format!("power cut in {}: new release on the disk, recovered; 40 s", phases[1]));
        report.add(&plan(Event::ClockJump(-1), phases[0]), &Err(anyhow!("no heartbeat")));
        assert_eq!((report.events(), report.stranded()), (3, 1));
        let table = report.table();
        let rows: Vec<_> = table.lines().filter(|line| line.starts_with("  ")).collect();
        assert_eq!(rows.len(), 3, "{table}");
        assert!(table.contains("clock -1 day in") && table.contains("40 on average"), "{table}");
    }
}
