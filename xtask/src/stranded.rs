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
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use std::{fmt, thread};

use anyhow::{Context, Result, bail};

use self::slot::{Depot, Outcome, Slot};
use self::step::Step;
use self::watch::Target;
use crate::bench;
use crate::command::say;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Which change is killed [default: each]
    #[arg(long, value_enum)]
    only: Option<Change>,
    /// The number of kills, drawn at random [default: all]
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

/// A kill that is to be tried.
#[derive(Clone)]
struct Kill {
    change: Change,
    target: Target,
    attempt: u32,
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let together = if self.target.together { ", together" } else { "" };
        write!(f, "{:?} at {}{together}", self.change, self.target.step)
    }
}

/// What the runs came to.
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
    say(&format!("stranded: seed {seed}; again with `cargo xtask stranded --seed {seed}`"));
    let depot = Depot::new(&executable)?;
    let changes: Vec<Change> =
        CHANGES.into_iter().filter(|change| arguments.only.is_none_or(|only| only == *change)).collect();
    let Reference { steps, usual } = Reference::new(&depot, &changes)?;
    for change in &changes {
        let of_change: Vec<_> = steps.iter().filter(|(of, _)| of == change).collect();
        println!("\n{change:?}: {} steps", of_change.len());
        if arguments.list {
            of_change.iter().for_each(|(_, step)| println!("  {step}"));
        }
    }
    if arguments.list {
        return Ok(());
    }
    let chosen = |step: &Step| arguments.step.as_ref().is_none_or(|text| step.to_string().contains(text));
    let mut kills: Vec<Kill> = steps
        .into_iter()
        .filter(|(_, step)| chosen(step))
        .flat_map(|(change, step)| {
            [false, true].map(|together| Kill { change, target: Target { step: step.clone(), together }, attempt: 1 })
        })
        .collect();
    shuffle(&mut kills, seed);
    kills.truncate(arguments.sample.unwrap_or(usize::MAX));
    let tally = kill_each(&depot, &usual, kills, arguments.homes)?;
    let Tally { killed, old, new, missed, stranded } = tally;
    println!(
        "\n{killed} killed: {old} ended in the old release before the second try, {new} in the new one, {} stranded; {} s",
        stranded.len(),
        started.elapsed().as_secs()
    );
    if !missed.is_empty() {
        println!("{} steps did not come again in {TRIES} runs:", missed.len());
        missed.iter().for_each(|step| println!("  {step}"));
    }
    if stranded.is_empty() { Ok(()) } else { bail!("{} hosts were stranded: {}", stranded.len(), stranded.join("; ")) }
}

/// What upgrades that nothing disturbs do.
#[derive(Default)]
struct Reference {
    steps: Vec<(Change, Step)>,
    /// The files that a home has before and after them.
    usual: BTreeSet<String>,
}

impl Reference {
    /// Upgrades a home for each change, at the same time.
    fn new(depot: &Depot, changes: &[Change]) -> Result<Reference> {
        let mut all = Reference::default();
        let outcomes: Vec<_> = thread::scope(|scope| {
            let runs: Vec<_> = changes.iter().map(|change| scope.spawn(|| Reference::of(depot, *change))).collect();
            runs.into_iter().map(|run| run.join().unwrap_or_else(|_| bail!("a reference run has panicked"))).collect()
        });
        for outcome in outcomes {
            let reference = outcome?;
            all.steps.extend(reference.steps);
            all.usual.extend(reference.usual);
        }
        Ok(all)
    }

    fn of(depot: &Depot, change: Change) -> Result<Reference> {
        let mut slot = Slot::new(depot)?;
        let mut reference = Reference { steps: vec![], usual: slot.files()? };
        for run in 1..=REFERENCE_RUNS {
            say(&format!("{change:?}: reference run {run} of {REFERENCE_RUNS}"));
            for step in slot.reference(change).with_context(|| slot.logs())? {
                if !reference.steps.contains(&(change, step.clone())) {
                    reference.steps.push((change, step));
                }
            }
            reference.usual.extend(slot.files()?);
        }
        Ok(reference)
    }
}

/// Carries out the kills on several homes at the same time.
fn kill_each(depot: &Depot, usual: &BTreeSet<String>, kills: Vec<Kill>, homes: u16) -> Result<Tally> {
    let total = kills.len();
    let queue: Mutex<VecDeque<Kill>> = Mutex::new(kills.into());
    let tally = Mutex::new(Tally::default());
    let locked = || tally.lock().unwrap_or_else(PoisonError::into_inner);
    let queued = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    let next = || queued().pop_front();
    let work = || -> Result<()> {
        let mut slot = Slot::new(depot)?;
        while let Some(kill) = next() {
            match slot.kill_at(kill.change, &kill.target, usual) {
                Ok(Outcome::Old) => locked().old += 1,
                Ok(Outcome::New) => locked().new += 1,
                Ok(Outcome::Missed) if kill.attempt < TRIES => {
                    queued().push_back(Kill { attempt: kill.attempt + 1, ..kill });
                    continue;
                }
                Ok(Outcome::Missed) => {
                    locked().missed.push(kill.to_string());
                    continue;
                }
                Err(error) => {
                    println!("\nSTRANDED {kill}: {error:#}\n{}", slot.logs());
                    locked().stranded.push(kill.to_string());
                    slot = Slot::new(depot)?;
                }
            }
            let mut tally = locked();
            tally.killed += 1;
            if tally.killed.is_multiple_of(25) {
                say(&format!("{} of {total}, {} stranded", tally.killed, tally.stranded.len()));
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let homes = usize::from(homes).min(total);
        let workers: Vec<_> = (0..homes).map(|_| scope.spawn(work)).collect();
        let outcomes =
            workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a worker has panicked")));
        outcomes.collect::<Result<Vec<()>>>()
    })?;
    Ok(tally.into_inner().unwrap_or_else(PoisonError::into_inner))
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
