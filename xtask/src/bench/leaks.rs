//! `cargo xtask bench leaks`: checks that the manager does not grow over thousands of restarts and heartbeats.
//!
//! Sub-agents are killed and restarted by request in turn, as often as the restart policy allows, with a heartbeat every second: two
//! thousand take half an hour. The manager's resources half way are compared with those at the end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::contestant::{Contestant, PATIENCE};
use super::control_socket::ControlSocket;
use super::heading;
use super::probe::{Memory, open_files, threads};
use super::supervise::programs;
use super::verdicts::Verdicts;
use crate::command::say;
use crate::processes::zombies;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The number of restarts and of heartbeats; a heartbeat takes a second
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    times: u32,
}

const SUB_AGENTS: usize = 100;
/// Idle worker threads exit after ten seconds; before that, two samples differ by chance.
const QUIET: Duration = Duration::from_secs(15);
const SAMPLES: u32 = 20;
/// The interval between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// The manager's resources.
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
        // Threads exit a while after the last event.
        super::contestant::pass(QUIET);
        ensure!(aops.role("spm")? == manager, "the manager was restarted during the measurement");
        let held = look(manager)?;
        say(&format!("after {rounds} restarts and {} heartbeats: {held:?}", heartbeats.seen));
        looks.push(held);
    }
    let [middle, end] = looks[..] else { bail!("two samples are taken") };
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
        verdicts
            .is(&format!("the number of {what} is the same half way and at the end: {middle}, {end}"), middle == end);
    }
    println!("{}", verdicts.text());
    Ok(())
}

/// Every second restart follows a kill: of a sub-agent whose last restart was requested.
fn restart_one(aops: &mut Contestant, round: u32) -> Result<()> {
    let name = aops.names[(round / 2) as usize % aops.names.len()].clone();
    if round.is_multiple_of(2) {
        return aops.restart(&[name]);
    }
    let (old, _) = aops.kill(&name)?;
    aops.successor(&name, old).map(drop)
}

/// The minimum of several samples: a heartbeat in progress has a thread and perhaps a connection.
fn look(manager: u32) -> Result<Held> {
    let mut least: Option<Held> = None;
    for _ in 0..SAMPLES {
        let held = Held {
            dirty_kib: Memory::of(&[manager])?.dirty,
            open_files: open_files(manager),
            threads: threads(manager).len(),
            zombies: zombies(manager).len(),
        };
        let before = least.unwrap_or(held);
        least = Some(Held {
            dirty_kib: held.dirty_kib.min(before.dirty_kib),
            open_files: held.open_files.min(before.open_files),
            threads: held.threads.min(before.threads),
            zombies: held.zombies.min(before.zombies),
        });
        std::thread::park_timeout(SAMPLE_INTERVAL);
    }
    least.context("no sample")
}

/// Counts answered heartbeats by the time of the last one. It has seconds, so several in one second count as one.
struct Heartbeats {
    socket: ControlSocket,
    seen: u32,
    last: String,
}

impl Heartbeats {
    fn of(aops: &Contestant) -> Result<Heartbeats> {
        Ok(Heartbeats { socket: ControlSocket::open(&aops.home()?)?, seen: 0, last: String::new() })
    }

    fn wait_for_next(&mut self) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let status = self.socket.status()?;
            let last = status["gateway"]["lastHeartbeat"].as_str().unwrap_or_default();
            if last != self.last {
                self.last = last.to_owned();
                self.seen += 1;
                return Ok(());
            }
            std::thread::park_timeout(SAMPLE_INTERVAL);
        }
        bail!("heartbeats are no longer answered")
    }
}
