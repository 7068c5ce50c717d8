//! `cargo xtask stranded`: kills upgrades at each of their steps, and checks that no host is ever stranded.
//!
//! ```text
//! reference runs   an upgrade under the tracer, nothing killed        every step, in its order
//! one run a step   the same upgrade, a process killed before the step alone, and together with every other role
//!                  recovery: what is left, or a new start as at a boot
//!                  -> old or new release, both roles, every sub-agent, reported to the gateway
//!                  second try -> the new release; nothing left over
//! ```
//!
//! The enumeration is complete because the tracer sees each system call of each process before the kernel carries it out, and every call is
//! either in the list of steps or in the list of those that change nothing (`trace::syscalls`); one in neither fails the task. Between two
//! steps nothing changes but memory, so a death there is a death before the next step. Of the writes to an unfinished download or unpacked
//! file only the first two count, and of the polls of a lock file.
//!
//! Each slot is a home with a gateway of its own. Its upgrades go round three releases, so that each is fetched again and every run is also the next one's beginning.
#![allow(clippy::print_stdout, reason = "the report is its output")]

mod slot;
mod step;
mod watch;

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};

use self::slot::{Outcome, Slot};
use self::step::Step;
use self::watch::Target;
use crate::bench;
use crate::command::say;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Which change is killed [default: each]
    #[arg(long, value_enum)]
    only: Option<Change>,
    /// The number of steps that are killed of each change, drawn at random [default: all]
    #[arg(long, value_name = "N")]
    sample: Option<usize>,
    /// Draws the sample [default: the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The number of homes that are worked on at the same time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    homes: u16,
    /// Only the steps whose name contains this text
    #[arg(long, value_name = "TEXT")]
    step: Option<String>,
    /// Print the steps and kill nothing
    #[arg(long)]
    list: bool,
    /// The executable to use [default: the release is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

/// What is changed on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Change {
    /// A sub-agent gets another release
    SubAgent,
    /// The manager upgrades itself
    Manager,
    /// `aops install` over a running home
    Install,
}

const CHANGES: [Change; 3] = [Change::SubAgent, Change::Manager, Change::Install];
/// Upgrades under the tracer of which the steps are taken; what a second one adds was a matter of scheduling.
const REFERENCE_RUNS: usize = 2;
/// A step that does not come in so many runs is reported, not killed.
const TRIES: u32 = 3;

/// What the runs of one change came to.
#[derive(Default)]
struct Tally {
    killed: usize,
    old: usize,
    new: usize,
    /// Steps that did not come again.
    missed: Vec<String>,
    stranded: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let executable = match &arguments.executable {
        Some(executable) => std::path::absolute(executable)?,
        None => bench::build(&[], "aops-stranded")?,
    };
    let seed = arguments
        .seed
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_millis() as u64));
    say(&format!("stranded: seed {seed}"));
    let mut stranded = 0;
    for change in CHANGES.into_iter().filter(|change| arguments.only.is_none_or(|only| only == *change)) {
        stranded += kill_each(&executable, change, arguments, seed)?.stranded.len();
    }
    println!(
        "\n{stranded} stranded, in {} s; again with: cargo xtask stranded --seed {seed}",
        started.elapsed().as_secs()
    );
    if stranded > 0 { bail!("{stranded} hosts were stranded") } else { Ok(()) }
}

fn kill_each(executable: &Path, change: Change, arguments: &Arguments, seed: u64) -> Result<Tally> {
    let mut slot = Slot::new(executable, change)?;
    let mut steps: Vec<Step> = Vec::new();
    let mut known = BTreeSet::new();
    for run in 1..=REFERENCE_RUNS {
        say(&format!("{change:?}: reference run {run} of {REFERENCE_RUNS}"));
        for step in slot.reference()? {
            if known.insert(step.clone()) {
                steps.push(step);
            }
        }
    }
    println!("\n{change:?}: {} steps", steps.len());
    if arguments.list {
        steps.iter().for_each(|step| println!("  {step}"));
        return Ok(Tally::default());
    }
    let mut targets: Vec<Target> = steps
        .iter()
        .filter(|step| arguments.step.as_ref().is_none_or(|text| step.to_string().contains(text)))
        .flat_map(|step| [false, true].map(|together| Target { step: step.clone(), together }))
        .collect();
    if let Some(sample) = arguments.sample {
        shuffle(&mut targets, seed);
        targets.truncate(sample);
    }
    let total = targets.len();
    let queue: Mutex<VecDeque<(Target, u32)>> = Mutex::new(targets.into_iter().map(|target| (target, 1)).collect());
    let tally = Mutex::new(Tally::default());
    let locked = || tally.lock().unwrap_or_else(PoisonError::into_inner);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = |mut slot: Slot| -> Result<()> {
        while let Some((target, attempt)) = next() {
            let name = format!("{}{}", target.step, if target.together { ", together" } else { "" });
            match slot.kill_at(&target) {
                Ok(Outcome::Old) => locked().old += 1,
                Ok(Outcome::New) => locked().new += 1,
                Ok(Outcome::Missed) if attempt < TRIES => {
                    queue.lock().unwrap_or_else(PoisonError::into_inner).push_back((target, attempt + 1));
                    continue;
                }
                Ok(Outcome::Missed) => {
                    locked().missed.push(name);
                    continue;
                }
                Err(error) => {
                    println!("\nSTRANDED {change:?} at {name}: {error:#}\n{}", slot.logs());
                    locked().stranded.push(name);
                    slot = Slot::new(executable, change)?;
                }
            }
            let mut tally = locked();
            tally.killed += 1;
            if tally.killed % 25 == 0 {
                say(&format!("{change:?}: {} of {total}, {} stranded", tally.killed, tally.stranded.len()));
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let homes = usize::from(arguments.homes).min(total.max(1));
        let others: Vec<_> =
            (1..homes).map(|_| scope.spawn(|| Slot::new(executable, change).and_then(&work))).collect();
        let mut outcomes = vec![work(slot)];
        outcomes.extend(others.into_iter().map(|other| other.join().unwrap_or_else(|_| bail!("a slot has panicked"))));
        outcomes.into_iter().collect::<Result<Vec<()>>>()
    })?;
    let tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{change:?}: {} killed: {} ended in the old release before the second try, {} in the new one, {} stranded",
        tally.killed,
        tally.old,
        tally.new,
        tally.stranded.len()
    );
    if !tally.missed.is_empty() {
        println!("{change:?}: {} steps did not come again in {TRIES} runs:", tally.missed.len());
        tally.missed.iter().for_each(|step| println!("  {step}"));
    }
    Ok(tally)
}

/// Fisher and Yates, by a xorshift generator: the same seed gives the same sample.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut state = seed | 1;
    for last in (1..items.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        items.swap(last, (state % (last as u64 + 1)) as usize);
    }
}
