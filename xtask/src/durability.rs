//! `cargo xtask durability`: records what a home's processes do to the disk, and checks that a power cut at any moment loses nothing that
//! something depends on.
//!
//! ```text
//! host       a first installation, a sub-agent's upgrade and roll back, a self-upgrade and its roll back, an installation over a
//!            running home, a removal, a stop and a start: every system call of the roles and the installer       (trace, recorder)
//!   |  events
//! checker    a model of the disk: what a power cut would lose at each act, which sync has saved it    (disk, order, records, layout)
//!   |  findings
//! report     a missing sync, a wrong order, a useless sync; a rule that nothing was checked against
//! ```
//!
//! The checker knows nothing of kernels and file systems but POSIX: only a sync makes a content or a name last, in no other order than that of
//! the syncs. So the result holds for every file system, not only for those that keep the order of renames.
#![allow(clippy::print_stdout, reason = "the report is its output")]

mod checker;
mod disk;
mod event;
mod host;
mod layout;
mod order;
mod recorder;
mod records;
mod rule;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};

use self::checker::{Finding, Report};
use self::event::{Event, Recording};
use self::layout::Layout;
use self::rule::Rule;
use crate::bench;
use crate::command::say;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Print every recorded event
    #[arg(long)]
    list: bool,
    /// The executable to use [default: the release is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

/// Events of the same thread that are shown before and after a finding.
const AROUND: usize = 4;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let executable = match &arguments.executable {
        Some(executable) => std::path::absolute(executable)?,
        None => bench::build(&[], "aops-durability")?,
    };
    let (layout, recording) = host::record(&executable)?;
    if arguments.list {
        let events = recording.events.iter().enumerate();
        events.for_each(|(index, event)| println!("{}", shown(&layout, index, event)));
    }
    let report = checker::check(&layout, &recording);
    print(&layout, &recording, &report);
    say(&format!("durability: {} s", started.elapsed().as_secs()));
    let unchecked: Vec<_> =
        Rule::ALL.iter().filter(|rule| !report.checked.contains_key(rule)).map(ToString::to_string).collect();
    if !unchecked.is_empty() {
        bail!("nothing was checked against: {}; the recorded host no longer does it", unchecked.join("; "));
    }
    match report.findings.len() {
        0 => Ok(()),
        findings => bail!("{findings} findings"),
    }
}

fn print(layout: &Layout, recording: &Recording, report: &Report) {
    for finding in &report.findings {
        print_finding(layout, recording, finding);
    }
    println!("\n{} events, {} syncs", recording.events.len(), report.syncs);
    for rule in Rule::ALL {
        let found = report.findings.iter().filter(|finding| finding.rule == rule).count();
        let checked = report.checked.get(&rule).copied().unwrap_or_default();
        println!("{checked:6} checked {found:4} found  {rule}");
    }
}

fn print_finding(layout: &Layout, recording: &Recording, finding: &Finding) {
    let path = within(layout, &finding.path);
    println!("\nBROKEN: {}: {path}: {}", finding.rule, finding.why);
    println!("  in {}, event {} of {}", recording.change_of(finding.event), finding.event, recording.events.len());
    let thread = recording.events[finding.event].call.thread;
    let of_thread: Vec<(usize, &Event)> =
        recording.events.iter().enumerate().filter(|(_, event)| event.call.thread == thread).collect();
    let here = of_thread.iter().position(|(index, _)| *index == finding.event).unwrap_or_default();
    for (index, event) in &of_thread[here.saturating_sub(AROUND)..(here + AROUND + 1).min(of_thread.len())] {
        let mark = if *index == finding.event { ">" } else { " " };
        println!("  {mark} {}", shown(layout, *index, event));
    }
}

fn shown(layout: &Layout, index: usize, event: &Event) -> String {
    use crate::trace::Change;
    let what = match event.change() {
        Change::Rename { from, to } | Change::Link { from, to } => {
            format!("{} -> {}", within(layout, from), within(layout, to))
        }
        Change::SymbolicLink { target, to } => format!("{} (to {})", within(layout, to), target.display()),
        Change::Message(to) => to.clone(),
        Change::Lock(path) => within(layout, path),
        _ => event.call.subject().map(|subject| within(layout, Path::new(&subject))).unwrap_or_default(),
    };
    let agent = event.agent.as_ref().map(|agent| format!(" of {} {}", agent.name, agent.version)).unwrap_or_default();
    let outcome = match event.outcome {
        event::Outcome::Succeeded => "",
        event::Outcome::Failed => " (failed)",
        event::Outcome::NoReturn => " (no return)",
    };
    format!("{index} {} {}: {} {what}{agent}{outcome}", event.call.role, event.call.thread, event.call.name)
}

/// A path as it is shown: below the home, if it is there.
fn within(layout: &Layout, path: &Path) -> String {
    match layout.inside(path) {
        Some(inside) if inside.as_os_str().is_empty() => "<home>".to_owned(),
        Some(inside) => inside.display().to_string(),
        None => path.display().to_string(),
    }
}
