//! `cargo xtask bench leaks`: whether the manager grows over thousands of restarts and heartbeats.
//!
//! Sub-agents are killed and asked to restart in turn while heartbeats go out every second, as often as they may: half an hour for two
//! thousand. What the manager holds half way is compared with what it holds at the end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::contestant::{Contestant, PATIENCE};
use super::door::Door;
use super::heading;
use super::probe::{Memory, open_files, threads, zombies};
use super::supervise::programs;
use super::verdicts::Verdicts;
use crate::command::say;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Restarts, and heartbeats; heartbeats take a second each
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    times: u32,
}

const SUB_AGENTS: usize = 100;
/// Threads that were needed for a moment are given up after ten seconds; before that, two looks differ by chance.
const QUIET: Duration = Duration::from_secs(15);
const LOOKS: u32 = 20;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// What the manager holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    dirty_kib: u64,
    open_files: usize,
    threads: usize,
    zombies: usize,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let programs = programs()?;
    let mut aops = Contestant::aops(&programs, SUB_AGENTS)?;
    let manager = aops.role("spm")?;
    let half = arguments.times / 2;
    let mut rounds = 0;
    let mut heartbeats = Heartbeats::of(&aops)?;
    let mut looks = vec![];
    for goal in [half, arguments.times] {
        say(&format!("up to {goal} restarts and heartbeats"));
        while rounds < goal || heartbeats.seen < goal {
            heartbeats.wait_for_next()?;
            if rounds < goal {
                restart_one(&mut aops, rounds)?;
                rounds += 1;
            }
        }
        // Its end is not its last word: threads go a while later.
        super::contestant::pass(QUIET);
        ensure!(aops.role("spm")? == manager, "the manager was replaced in between");
        let held = look(manager)?;
        say(&format!("after {rounds} restarts and {} heartbeats: {held:?}", heartbeats.seen));
        looks.push(held);
    }
    let [middle, end] = looks[..] else { bail!("two looks are taken") };
    println!("\n{}", heading("cargo xtask bench leaks")?);
    println!("half way: {middle:?}\nat the end: {end:?}");
    let mut verdicts = Verdicts::default();
    let grown = end.dirty_kib as f64 - middle.dirty_kib as f64;
    verdicts.at_most("growth of the manager's dirty memory in the second half", Some(grown), 64.0, "KiB");
    let pairs = [
        ("open files", middle.open_files, end.open_files),
        ("threads", middle.threads, end.threads),
        ("zombies", middle.zombies, end.zombies),
    ];
    for (what, middle, end) in pairs {
        verdicts.is(&format!("as many {what} as half way: {middle}, {end}"), middle == end);
    }
    println!("{}", verdicts.text());
    Ok(())
}

/// Every second one nobody asked for: a kill of a sub-agent whose last restart was asked for.
fn restart_one(aops: &mut Contestant, round: u32) -> Result<()> {
    let name = aops.names[(round / 2) as usize % aops.names.len()].clone();
    if round.is_multiple_of(2) {
        return aops.restart(&[name]);
    }
    let (old, _) = aops.kill(&name)?;
    aops.successor(&name, old).map(drop)
}

/// The least of several looks: a heartbeat under way has a thread and perhaps a connection of its own.
fn look(manager: u32) -> Result<Held> {
    let mut least: Option<Held> = None;
    for _ in 0..LOOKS {
        let held = Held {
            dirty_kib: Memory::of(&[manager])?.dirty,
            open_files: open_files(manager),
            threads: threads(manager).len(),
            zombies: zombies(manager),
        };
        let before = least.unwrap_or(held);
        least = Some(Held {
            dirty_kib: held.dirty_kib.min(before.dirty_kib),
            open_files: held.open_files.min(before.open_files),
            threads: held.threads.min(before.threads),
            zombies: held.zombies.min(before.zombies),
        });
        std::thread::park_timeout(LOOK);
    }
    least.context("there are looks")
}

/// Heartbeats that were answered, by the moment of the last one, which is told to the second: those that share one count as one.
struct Heartbeats {
    door: Door,
    seen: u32,
    last: String,
}

impl Heartbeats {
    fn of(aops: &Contestant) -> Result<Heartbeats> {
        Ok(Heartbeats { door: Door::open(&aops.home()?)?, seen: 0, last: String::new() })
    }

    fn wait_for_next(&mut self) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let status = self.door.status()?;
            let last = status["gateway"]["lastHeartbeat"].as_str().unwrap_or_default();
            if last != self.last {
                self.last = last.to_owned();
                self.seen += 1;
                return Ok(());
            }
            std::thread::park_timeout(LOOK);
        }
        bail!("no heartbeat is answered any more")
    }
}
