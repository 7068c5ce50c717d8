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
//! upgrades, not over the time, of which a trial takes most. What lies between two writes is up to `points`: drives that are rebuilt from a
//! log of the writes of an upgrade.
#![allow(clippy::print_stdout, reason = "the report is its output")]

mod block_log;
mod host;
mod image;
mod kernel;
mod machine;
mod points;
mod progress;
mod releases;
mod report;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use self::host::{Event, Host, Parts, Plan};
pub(crate) use self::machine::NEEDS;
use self::points::FileSystem;
use self::progress::Phase;
use self::report::Report;
use crate::command::{is_root, read, say};
use crate::rootfs::Suite;
use crate::{apt, dist, fleet, rootfs, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The number of power cuts
    #[arg(long, value_name = "N", default_value_t = 10)]
    cuts: usize,
    /// The number of clock jumps of a day forward or back, half of them at a boot after a power cut
    #[arg(long, value_name = "N", default_value_t = 0)]
    clock_jumps: usize,
    /// The number of points between two writes of an upgrade from which a host is started
    #[arg(long, value_name = "N", default_value_t = 10)]
    points: usize,
    /// The file system whose writes are recorded for the points
    #[arg(long, value_enum, default_value_t = FileSystem::Ext4)]
    filesystem: FileSystem,
    /// Draws the moments and the points [default: the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The number of machines that run at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    machines: u16,
    /// Whose kernel and systemd the machines have
    #[arg(long, value_enum, default_value_t = Suite::Bookworm)]
    suite: Suite,
    /// Install the Debian package instead, with the documents of `dist`, which was run before; no points
    #[arg(long)]
    deb: bool,
    /// The executable to install [default: the static one of `dist` is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !is_root() {
        bail!("cannot make a disk image with the files of a system without root");
    }
    let started = Instant::now();
    apt::install(NEEDS)?;
    // Whatever is created meanwhile is removed, also after Ctrl-C.
    let scratch = tempfile::Builder::new().prefix("aops-power-cut-").tempdir().context("cannot create a directory")?;
    fleet::clean_up_when_interrupted(scratch.path())?;
    if let Err(other) = tempfile::env::override_temp_dir(scratch.path()) {
        bail!("cannot use {} for temporary files: {} is used already", scratch.path().display(), other.display());
    }
    let (root, kernel) = (rootfs::of(arguments.suite)?, kernel::get(arguments.suite)?);
    let executable = match &arguments.executable {
        Some(executable) => std::path::absolute(executable)?,
        None => dist::build(dist::Target::LinuxAmd64, dist::RELEASE)?,
    };
    let gateway = gateway(&executable)?;
    let deb = arguments.deb.then(|| releases::deb(&executable, scratch.path())).transpose()?;
    let parts = Parts { executable: &executable, gateway: &gateway, deb: deb.as_deref(), root: &root, kernel: &kernel };
    let seed = arguments
        .seed
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_millis() as u64));
    let suite = arguments.suite.name();
    say(&format!("power-cut: seed {seed}, {suite} with the kernel {}", kernel.release));
    let stranded_points = match arguments.points {
        _ if arguments.deb => 0,
        0 => 0,
        count => points::run(&parts, count, seed, arguments.filesystem)?,
    };
    if arguments.cuts + arguments.clock_jumps == 0 {
        return outcome(stranded_points);
    }
    let report = disturb_all(&parts, plans(arguments.cuts, arguments.clock_jumps, seed), arguments.machines)?;
    let stranded = report.stranded();
    print!("{}", report.table());
    println!(
        "{} events, {stranded} stranded, in {} s; again with: cargo xtask power-cut --cuts {} --clock-jumps {} --points 0 --suite {}{} --seed {seed}",
        report.events(),
        started.elapsed().as_secs(),
        arguments.cuts,
        arguments.clock_jumps,
        suite,
        if arguments.deb { " --deb" } else { "" },
    );
    outcome(stranded + stranded_points)
}

fn outcome(stranded: usize) -> Result<()> {
    if stranded > 0 { bail!("{stranded} hosts were stranded") } else { Ok(()) }
}

/// Fetches the kernel of the tests' suite.
pub(crate) fn set_up() -> Result<()> {
    kernel::get(Suite::Bookworm).map(drop)
}

/// The given executable if it has the gateway, otherwise the one of `cargo build`.
fn gateway(executable: &Path) -> Result<PathBuf> {
    let asked = read(std::process::Command::new(executable).args(["gateway", "--help"]));
    if asked.is_ok() { Ok(executable.to_owned()) } else { dist::gateway() }
}

/// The events in a random order. The phases are drawn like cards: each as often as any other, and a random moment of it.
fn plans(cuts: usize, clock_jumps: usize, seed: u64) -> Vec<Plan> {
    let mut random = fastrand::Rng::with_seed(seed);
    let jumps = [1, -1].map(|days| [Event::ClockJump(days), Event::PowerCutAndClock(days)]);
    let jumps = jumps.into_iter().flatten().cycle().take(clock_jumps);
    let mut events: Vec<_> = std::iter::repeat_n(Event::PowerCut, cuts).chain(jumps).collect();
    random.shuffle(&mut events);
    let mut cards = Vec::new();
    let plan = |event| {
        if cards.is_empty() {
            cards = Phase::targets();
            random.shuffle(&mut cards);
        }
        let target = cards.pop()?;
        Some(Plan { event, target, fraction: random.f64(), both: random.u8(0..4) == 0 })
    };
    events.into_iter().map_while(plan).collect()
}

fn disturb_all(parts: &Parts<'_>, plans: Vec<Plan>, machines: u16) -> Result<Report> {
    let total = plans.len();
    let machines = usize::from(machines).min(total);
    let queue: Mutex<VecDeque<Plan>> = Mutex::new(plans.into());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let report = Mutex::new(Report::default());
    let work = || -> Result<()> {
        let mut host: Option<Host<'_>> = None;
        while let Some(plan) = next() {
            let current = host.take().map_or_else(|| Host::new(parts), Ok);
            let outcome = current.map(|mut host| (host.disturb(&plan), host));
            fleet::wait_if_interrupted();
            let (outcome, mut current) = outcome?;
            let number = {
                let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
                let line = report.add(&plan, &outcome);
                say(&format!("{} of {total}: {line}", report.events()));
                report.events()
            };
            match outcome {
                Ok(_) => host = Some(current),
                Err(error) => {
                    let kept = keep(&current, number);
                    println!("\nSTRANDED, {}: {error:#}\n{}\n{kept}", plan.target, current.logs());
                }
            }
        }
        host.map_or(Ok(()), Host::shut_down)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..machines).map(|_| scope.spawn(work)).collect();
        let ended = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a thread has panicked")));
        ended.collect::<Vec<_>>().into_iter().collect::<Result<Vec<()>>>()
    })?;
    Ok(report.into_inner().unwrap_or_else(PoisonError::into_inner))
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
