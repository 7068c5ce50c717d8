//! `cargo xtask endurance`: upgrades the manager many times in a row on several homes at a time, and checks that no home is stranded, no
//! sub-agent is restarted, and nothing is leaked.
//!
//! ```text
//! each home, with a gateway of its own:   upgrade x 3   census   upgrade x N   census
//!   after each upgrade    committed and reported to the gateway, both roles alive and running its program, every sub-agent with the
//!                         process and the restart count that it had before the first one
//!   between the censuses  no more files, bytes, cgroups, processes, zombies, descriptors, threads; memory that does not grow; logs
//!                         within their limit
//! ```
//!
//! An upgrade is mostly waiting: the shortest trial, then the proof of the new watchdog. So a thousand are done in an hour by having many
//! homes (the fast mode). With `--load`, processes spin and a thread writes meanwhile. Three releases go round, so that each is fetched
//! again in its turn.
#![allow(clippy::print_stdout, reason = "the report is its output")]

mod census;
mod host;
mod load;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Result, bail, ensure};

use self::census::Census;
use self::host::{Host, RELEASES, Upgrade};
use self::load::Load;
use crate::bench;
use crate::bench::spent::Spent;
use crate::bench::statistics::{Samples, short};
use crate::bench::verdicts::Verdicts;
use crate::command::say;
use crate::fleet::Fleet;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The number of upgrades, on all homes together; at least 9 for each home
    #[arg(long, value_name = "N", default_value_t = 144)]
    upgrades: u32,
    /// The number of homes that are upgraded at the same time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=64))]
    homes: u16,
    /// The number of running sub-agents of each home
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=500))]
    agents: u16,
    /// Keep the processors and the disk busy meanwhile
    #[arg(long)]
    load: bool,
    /// The executable to use [default: the release is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

/// Upgrades before the first census: each release has been fetched, run and replaced.
const WARM_UP: usize = RELEASES.len();
/// The least number of upgrades after it: the memory after the first third of them is compared with that after the last.
const LEAST: usize = 6;
/// What the dirty memory of a role may grow by, KiB: each runs a new program after each upgrade. The manager reads the history of changes,
/// which has a limit.
const MANAGER_KIB: f64 = 256.0;
const WATCHDOG_KIB: f64 = 64.0;
/// What the dirty memory of a gateway may grow by, KiB: it runs on, and its allocator has several arenas.
const GATEWAY_KIB: f64 = 1_024.0;
/// The limit of a log, and a little: a line may go beyond it.
const LOG_BYTES: u64 = (8 << 20) + (64 << 10);

/// What the upgrades of one home came to.
#[derive(Default)]
struct Endured {
    upgrades: Vec<Upgrade>,
    /// At the first census.
    early: Census,
    /// What is held beyond that at the end.
    growth: Vec<String>,
    largest_log: u64,
    failure: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let homes = u32::from(arguments.homes);
    let least = homes * (WARM_UP + LEAST) as u32;
    ensure!(
        arguments.upgrades >= least,
        "cannot compare the beginning with the end of {} upgrades on {homes} homes; use --upgrades {least} or more, or fewer --homes",
        arguments.upgrades
    );
    let executable = match &arguments.executable {
        Some(executable) => std::path::absolute(executable)?,
        None => bench::build(&[], "aops-endurance")?,
    };
    say(&format!("publishing {} packages", RELEASES.len() + usize::from(arguments.agents)));
    let template = host::template(&executable, arguments.agents)?;
    let load = arguments.load.then(Load::start).transpose()?;
    let started = Instant::now();
    let endured = endure_all(&executable, &template, arguments);
    let seconds = started.elapsed().as_secs_f64();
    let load = load.map(Load::end).transpose();
    println!("\n{}", bench::heading("cargo xtask endurance")?);
    let done: usize = endured.iter().map(|home| home.upgrades.len()).sum();
    println!(
        "{done} self-upgrades on {homes} homes with {} sub-agents each in {seconds:.0} s; load: {}",
        arguments.agents,
        load?.as_deref().unwrap_or("none")
    );
    print!("{}", figures(&endured));
    let verdicts = verdicts(&endured, arguments);
    println!("\n{}", verdicts.text());
    if verdicts.missed() > 0 { bail!("{} checks failed", verdicts.missed()) } else { Ok(()) }
}

fn endure_all(executable: &Path, template: &Fleet, arguments: &Arguments) -> Vec<Endured> {
    let homes = u32::from(arguments.homes);
    let done = AtomicU32::new(0);
    let count = || {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        if done.is_multiple_of(25) {
            say(&format!("{done} of {} upgrades", arguments.upgrades));
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..homes)
            .map(|home| {
                let quota = (arguments.upgrades + homes - 1 - home) / homes;
                scope.spawn(move || endure(executable, template, arguments.agents, quota, &count))
            })
            .collect();
        let joined = threads.into_iter().map(|thread| {
            let panicked = |_| Endured { failure: Some("its thread has panicked".to_owned()), ..Endured::default() };
            thread.join().unwrap_or_else(panicked)
        });
        joined.collect()
    })
}

/// Upgrades one home so many times. A failure ends it, with the logs.
fn endure(executable: &Path, template: &Fleet, agents: u16, quota: u32, count: &impl Fn()) -> Endured {
    let mut endured = Endured::default();
    let mut host = match Host::new(executable, template, agents) {
        Ok(host) => host,
        Err(error) => return Endured { failure: Some(format!("{error:#}")), ..endured },
    };
    let mut upgrade_all = || -> Result<()> {
        for number in 1..=quota as usize {
            endured.upgrades.push(host.upgrade()?);
            count();
            if number == WARM_UP {
                endured.early = host.census()?;
            }
        }
        endured.growth = host.growth(&endured.early)?;
        endured.largest_log = host.largest_log()?;
        Ok(())
    };
    if let Err(error) = upgrade_all() {
        let failure = format!("upgrade {} failed: {error:#}", endured.upgrades.len() + 1);
        println!("\nFAILED: {failure}\n{}", host.logs());
        endured.failure = Some(failure);
    }
    endured
}

/// The upgrades after the warm-up.
fn measured(endured: &[Endured]) -> impl Iterator<Item = &Upgrade> {
    endured.iter().flat_map(|home| home.upgrades.iter().skip(WARM_UP))
}

fn samples(values: impl Iterator<Item = f64>) -> Samples {
    let mut samples = Samples::default();
    values.for_each(|value| samples.add(value));
    samples
}

/// The median memory of a role after the first and after the last third of a home's upgrades.
fn memory(home: &Endured, role: usize) -> Option<(f64, f64)> {
    let upgrades = home.upgrades.get(WARM_UP..)?;
    let third = upgrades.len() / 3;
    let median = |part: &[Upgrade]| samples(part.iter().map(|upgrade| upgrade.dirty[role] as f64)).median();
    Some((median(&upgrades[..third])?, median(&upgrades[upgrades.len() - third..])?))
}

const ROLES: [&str; 3] = ["manager", "watchdog", "gateway"];

fn figures(endured: &[Endured]) -> String {
    let mut text = format!("\n{:<46} {:>8} {:>8} {:>8}\n", "after the warm-up", "median", "p95", "largest");
    let mut row = |what: &str, samples: &Samples| {
        let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
        let [median, p95, largest] = [samples.median(), samples.p95(), samples.slowest()].map(shown);
        let _ = writeln!(text, "{what:<46} {median:>8} {p95:>8} {largest:>8}");
    };
    row("order until it is committed, s", &samples(measured(endured).map(|upgrade| upgrade.seconds)));
    let of = |spent: fn(&Upgrade) -> Option<Spent>, figure: fn(Spent) -> f64| {
        samples(measured(endured).filter_map(spent).map(figure))
    };
    row("CPU of the roles in that time, ms", &of(|upgrade| upgrade.spent, |spent| spent.cpu));
    row("CPU of the gateway in that time, ms", &of(|upgrade| upgrade.gateway, |spent| spent.cpu));
    let kib = |spent: Spent| spent.written_bytes as f64 / 1024.0;
    row("written by the roles in that time, KiB", &of(|upgrade| upgrade.spent, kib));
    for (at, role) in ROLES.into_iter().enumerate() {
        let values = measured(endured).map(|upgrade| upgrade.dirty[at] as f64);
        row(&format!("dirty memory of the {role} after it, KiB"), &samples(values));
    }
    if let Some(home) = endured.iter().find(|home| home.failure.is_none()) {
        let _ = writeln!(text, "\nheld by one home after the warm-up:");
        for (what, start) in [
            ("files and directories besides logs", "file "),
            ("bytes in them", "bytes "),
            ("cgroups", "cgroup "),
            ("processes", "process "),
            ("descriptors of the manager", "descriptor of the manager"),
            ("descriptors of the watchdog", "descriptor of the watchdog"),
            ("descriptors of the gateway", "descriptor of the gateway"),
            ("threads of all three", "threads "),
            ("zombies of all three", "zombies "),
        ] {
            let _ = writeln!(text, "{what:<46} {:>8}", home.early.count(start));
        }
    }
    text
}

fn verdicts(endured: &[Endured], arguments: &Arguments) -> Verdicts {
    let mut verdicts = Verdicts::default();
    let done: usize = endured.iter().map(|home| home.upgrades.len()).sum();
    let failures: Vec<&str> = endured.iter().filter_map(|home| home.failure.as_deref()).collect();
    verdicts.is(
        &format!(
            "{done} of {} upgrades were committed, with both roles alive, no sub-agent restarted and the release reported",
            arguments.upgrades
        ),
        done == arguments.upgrades as usize,
    );
    verdicts.is(&format!("{} homes failed", failures.len()), failures.is_empty());
    let deaths: u64 = endured.iter().filter_map(|home| home.upgrades.last()).map(|upgrade| upgrade.deaths).sum();
    verdicts.is(&format!("{deaths} deaths of a role were counted"), deaths == 0);
    for failure in failures {
        println!("a home failed: {}", failure.lines().next().unwrap_or_default());
    }
    let mut growth: Vec<&String> = endured.iter().flat_map(|home| &home.growth).collect();
    growth.sort_unstable();
    verdicts.is(
        &format!(
            "{} files, cgroups, processes, zombies, descriptors or threads more than after the warm-up",
            growth.len()
        ),
        growth.is_empty(),
    );
    for more in growth {
        println!("more at the end: {more}");
    }
    for (at, (role, limit)) in ROLES.into_iter().zip([MANAGER_KIB, WATCHDOG_KIB, GATEWAY_KIB]).enumerate() {
        let grown = samples(endured.iter().filter_map(|home| memory(home, at)).map(|(early, late)| late - early));
        verdicts.at_most(
            &format!("growth of the {role}'s dirty memory from the first third to the last, largest of all homes"),
            grown.slowest(),
            limit,
            "KiB",
        );
    }
    let largest = endured.iter().map(|home| home.largest_log).max().unwrap_or(0);
    verdicts.at_most("largest log", Some(largest as f64 / 1024.0), LOG_BYTES as f64 / 1024.0, "KiB");
    verdicts
}
