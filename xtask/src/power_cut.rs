//! `cargo xtask power-cut`: cuts the power of virtual machines in mid-upgrade, and checks that no host is ever stranded.
//!
//! ```text
//! this machine                                 virtual machine: a kernel of its own, systemd, one NVMe drive
//! gateway  ◀── heartbeats, downloads ────────  manager, watchdog, sub-agents
//! order of an upgrade
//!          ◀── phases on the console ────────  fetching, unpacking, switching, trial ...
//! kill of QEMU in a phase drawn at random
//!                                              boot on the same drive: the old or the new release, both roles, every sub-agent,
//!          ◀── reported ─────────────────────  no file half-written, nothing left over
//! next order                                   is carried out
//! ```
//!
//! A killed QEMU is a power cut: what the guest had in its page cache is lost. The moments are spread over the phases of both kinds of
//! upgrades, not over the time, of which a trial takes most.
#![allow(clippy::print_stdout, reason = "the report is its output")]

mod host;
mod image;
mod kernel;
mod machine;
mod progress;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use self::host::{Cut, Host, Parts, Plan, Release};
use self::machine::NEEDS;
use self::progress::Phase;
use crate::command::{is_root, read, say};
use crate::rootfs::Suite;
use crate::{apt, dist, rootfs, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The number of power cuts
    #[arg(long, value_name = "N", default_value_t = 10)]
    cuts: usize,
    /// Draws the moments of the cuts [default: the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The number of machines that run at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    machines: u16,
    /// Whose kernel and systemd the machines have
    #[arg(long, value_enum, default_value_t = Suite::Bookworm)]
    suite: Suite,
    /// The executable to install [default: the static one of `dist` is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

/// What the cuts in one phase came to.
#[derive(Default)]
struct Count {
    old: usize,
    new: usize,
    skipped: usize,
    stranded: usize,
}

/// What all of them came to.
#[derive(Default)]
struct Tally {
    phases: BTreeMap<Phase, Count>,
    done: usize,
    took: Vec<Duration>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !is_root() {
        bail!("cannot make a disk image with the files of a system without root");
    }
    let started = Instant::now();
    apt::install(NEEDS)?;
    let (root, kernel) = (rootfs::of(arguments.suite)?, kernel::get(arguments.suite)?);
    let executable = match &arguments.executable {
        Some(executable) => std::path::absolute(executable)?,
        None => dist::build(dist::Target::LinuxAmd64, dist::RELEASE)?,
    };
    let gateway = gateway(&executable)?;
    let parts = Parts { executable: &executable, gateway: &gateway, root: &root, kernel: &kernel };
    let seed = arguments
        .seed
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_millis() as u64));
    say(&format!("power-cut: seed {seed}, {} with the kernel {}", arguments.suite.name(), kernel.release));
    let tally = cut_all(&parts, plans(arguments.cuts, seed), arguments.machines)?;
    let stranded: usize = tally.phases.values().map(|count| count.stranded).sum();
    print!("{}", tally.table());
    println!(
        "{} cuts, {stranded} stranded, in {} s; again with: cargo xtask power-cut --cuts {} --suite {} --seed {seed}",
        tally.done,
        started.elapsed().as_secs(),
        arguments.cuts,
        arguments.suite.name(),
    );
    if stranded > 0 { bail!("{stranded} hosts were stranded") } else { Ok(()) }
}

/// The given executable if it has the gateway, otherwise the one of `cargo build`.
fn gateway(executable: &Path) -> Result<PathBuf> {
    let asked = read(std::process::Command::new(executable).args(["gateway", "--help"]));
    if asked.is_ok() { Ok(executable.to_owned()) } else { dist::gateway() }
}

/// The phases in a random order, each as often as any other, at a random moment of each.
fn plans(cuts: usize, seed: u64) -> Vec<Plan> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bag = Vec::new();
    let draw = |_| {
        if bag.is_empty() {
            bag = Phase::targets();
            random.shuffle(&mut bag);
        }
        let target = bag.pop()?;
        Some(Plan { target, fraction: random.f64(), both: random.u8(0..4) == 0 })
    };
    (0..cuts).map_while(draw).collect()
}

fn cut_all(parts: &Parts<'_>, plans: Vec<Plan>, machines: u16) -> Result<Tally> {
    let total = plans.len();
    let machines = usize::from(machines).min(total);
    let queue: Mutex<VecDeque<Plan>> = Mutex::new(plans.into());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let tally = Mutex::new(Tally::default());
    let work = || -> Result<()> {
        let mut host: Option<Host<'_>> = None;
        while let Some(plan) = next() {
            let mut current = match host.take() {
                Some(host) => host,
                None => Host::new(parts)?,
            };
            let outcome = current.cut(&plan);
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            let line = tally.add(&plan, &outcome);
            say(&format!("cut {} of {total}: {line}", tally.done));
            match outcome {
                Ok(_) => host = Some(current),
                Err(error) => {
                    let kept = keep(&current, tally.done);
                    drop(tally);
                    println!("\nSTRANDED, {}: {error:#}\n{}\n{kept}", plan.target, current.logs());
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..machines).map(|_| scope.spawn(work)).collect();
        let ended = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a thread has panicked")));
        ended.collect::<Vec<_>>().into_iter().collect::<Result<Vec<()>>>()
    })?;
    Ok(tally.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Keeps the disk of a stranded host, to boot it again; says where.
fn keep(host: &Host<'_>, number: usize) -> String {
    let kept = workspace::cache_path(&format!("stranded-{number}.img"));
    let copied = read(std::process::Command::new("cp").arg("--sparse=always").arg(host.disk_after_cut()).arg(&kept));
    match copied.context("cannot keep its disk") {
        Ok(_) => format!("its disk as the cut left it: {}", kept.display()),
        Err(error) => format!("{error:#}"),
    }
}

impl Tally {
    fn add(&mut self, plan: &Plan, outcome: &Result<Cut>) -> String {
        self.done += 1;
        let phase = outcome.as_ref().map_or(plan.target, |cut| cut.phase);
        let count = self.phases.entry(phase).or_default();
        let Ok(cut) = outcome else {
            count.stranded += 1;
            return format!("{phase}: STRANDED");
        };
        let found = match cut.found {
            Release::Old => {
                count.old += 1;
                "old release"
            }
            Release::New => {
                count.new += 1;
                "new release"
            }
        };
        count.skipped += usize::from(cut.was_skipped);
        self.took.push(cut.took);
        let with = if plan.both { ", both ordered" } else { "" };
        let skipped = if cut.was_skipped { ", skipped once" } else { "" };
        format!("{phase}{with}: {found}{skipped}, recovered; {} s", cut.took.as_secs())
    }

    fn table(&self) -> String {
        let mut table = format!(
            "\n{:<28} {:>6} {:>6} {:>6} {:>8} {:>9}\n",
            "power cut in the phase", "cuts", "old", "new", "skipped", "stranded"
        );
        for (phase, count) in &self.phases {
            let Count { old, new, skipped, stranded } = count;
            let cuts = old + new + stranded;
            let name = phase.to_string();
            table += &format!("{name:<28} {cuts:>6} {old:>6} {new:>6} {skipped:>8} {stranded:>9}\n");
        }
        let sum: Duration = self.took.iter().sum();
        let mean = sum.as_secs_f64() / self.took.len().max(1) as f64;
        let slowest = self.took.iter().max().map_or(0.0, Duration::as_secs_f64);
        table + &format!("\nseconds for each cut: {mean:.0} on average, {slowest:.0} at most\n")
    }
}
