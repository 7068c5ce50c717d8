//! `cargo xtask bench supervise`: compares supervision by the executable for hosts with a floor written in C and with other supervisors.
//!
//! All run at the same time, each with N sleeping programs, and are measured in turn within each round, so that a disturbance of the
//! machine affects all alike. A program itself reports when it started; the clock starts just before the kill.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::contestant::{Contestant, PATIENCE, Programs, compile, pass};
use super::probe::{Cpu, Memory, wake_ups};
use super::reports::Moment;
use super::rivals::{self, RIVALS, Rival, floor};
use super::statistics::Samples;
use super::trace::{Seen, Trace};
use super::verdicts::Verdicts;
use super::{heading, manager_restart};
use crate::command::say;
use crate::dist::{self, Target};
use crate::{apt, workspace};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// How many programs each supervisor keeps running, with a table for each
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 10, 100], value_parser = clap::value_parser!(u16).range(1..=500))]
    counts: Vec<u16>,
    /// The number of kills of one program each
    #[arg(long, value_name = "N", default_value_t = 30)]
    rounds: u32,
    /// Installed supervisors to leave out
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = rivals::names())]
    without: Vec<String>,
    /// How many seconds idle supervisors are observed, twice
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    idle: u64,
}

const NEEDS: &[apt::Need] = &[("strace", "strace"), ("musl-gcc", "musl-tools")];

/// About twenty heartbeats, before memory is read.
const HEARTBEATS: Duration = Duration::from_secs(20);
/// The time after a restart in which the supervisor finishes its work for it.
const AFTERMATH: Duration = Duration::from_millis(30);
/// The age at which a young program is killed.
const YOUNG_MILLISECONDS: f64 = 50.0;
/// The limit of a restart without delay: a back-off is at least 750 ms, and the machine may be busy.
const AT_ONCE_MILLISECONDS: f64 = 250.0;
const YOUNG_ROUNDS: u32 = 10;
const ALL_ROUNDS: u32 = 7;
/// A supervisor that is slower than this is not measured further: the result is clear.
const SLOW_MILLISECONDS: f64 = 5_000.0;

/// Builds and compiles the programs that every measurement needs.
pub(super) fn programs() -> Result<Programs> {
    let [floor, sleeper] = compiled()?;
    let agent = dist::build(Target::LinuxAmd64, dist::RELEASE)?;
    Ok(Programs { sleeper, floor, agent, gateway: dist::gateway()? })
}

/// Compiles the floor, and the program that every supervisor runs.
pub(super) fn compiled() -> Result<[PathBuf; 2]> {
    apt::install(NEEDS)?;
    let at = |name: &str| workspace::cache_path(&format!("bench-{name}"));
    std::fs::create_dir_all(workspace::cache_path(""))?;
    let programs = ["floor", "sleeper"];
    for name in programs {
        compile(&workspace::root().join(format!("xtask/src/floor/{name}.c")), &at(name))?;
    }
    Ok(programs.map(at))
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let programs = programs()?;
    let missing: Vec<_> = RIVALS.iter().filter(|rival| !rival.is_installed()).collect();
    println!("\n{}", heading("cargo xtask bench supervise")?);
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|rival| rival.name).collect();
        let packages: Vec<_> = missing.iter().map(|rival| rival.package).collect();
        println!("Not installed, so not measured: {}; apt-get install {}", names.join(", "), packages.join(" "));
    }
    let mut verdicts = Verdicts::default();
    let measured = measure_all(&programs, arguments, &mut verdicts);
    // Print the verdicts even if a later step failed.
    println!("\n{}", verdicts.text());
    measured
}

fn measure_all(programs: &Programs, arguments: &Arguments, verdicts: &mut Verdicts) -> Result<()> {
    for count in &arguments.counts {
        let mut table = Table::set_up(programs, usize::from(*count), &arguments.without)?;
        table.measure(arguments)?;
        print!("{}", table.shown());
        table.evaluate(verdicts);
        if *count >= 100 {
            manager_restart::measure(table.aops()?, verdicts)?;
        }
    }
    Ok(())
}

/// The measurements of one supervisor. Times in milliseconds.
#[derive(Default)]
struct Figures {
    memory: Memory,
    memory_after: Memory,
    wake_ups_per_second: f64,
    seen: Seen,
    restart: Samples,
    /// The time beyond the floor's in the same round.
    added: Samples,
    cpu: Samples,
    young: Samples,
    all: Samples,
}

impl Figures {
    /// It did not restart a program, and is not measured further.
    fn gave_up(&self) -> bool {
        [&self.restart, &self.young, &self.all].iter().any(|samples| samples.slowest() == Some(f64::INFINITY))
    }
}

struct Table {
    count: usize,
    idle: Duration,
    rows: Vec<(Contestant, Figures)>,
}

/// The rows of the floor and of aops.
const FLOOR: usize = 0;
const AOPS: usize = 1;

impl Table {
    fn set_up(programs: &Programs, count: usize, without: &[String]) -> Result<Table> {
        say(&format!("setting up all with {count} programs each"));
        let mut contestants = vec![floor(programs, count)?, Contestant::aops(programs, count)?];
        let is_wanted = |rival: &&Rival| rival.is_installed() && !without.iter().any(|name| name == rival.name);
        for rival in RIVALS.iter().filter(is_wanted) {
            contestants.push(rival.set_up(programs, count)?);
        }
        let rows = contestants.into_iter().map(|contestant| (contestant, Figures::default())).collect();
        Ok(Table { count, idle: Duration::ZERO, rows })
    }

    fn aops(&mut self) -> Result<&mut Contestant> {
        self.rows.get_mut(AOPS).map(|(contestant, _)| contestant).context("aops is always measured")
    }

    fn measure(&mut self, arguments: &Arguments) -> Result<()> {
        say("heartbeats, then memory");
        pass(HEARTBEATS);
        for (contestant, figures) in &mut self.rows {
            figures.memory = contestant.memory()?;
        }
        self.idle = Duration::from_secs(arguments.idle);
        self.watch_idle()?;
        say("killing one program at a time");
        for round in 0..arguments.rounds {
            self.kill_one(round)?;
        }
        say("killing one program 50 ms after its start");
        for round in 0..YOUNG_ROUNDS {
            self.kill_young(round)?;
        }
        if self.count > 1 {
            say("killing all programs at once");
            for _ in 0..ALL_ROUNDS {
                self.kill_all()?;
            }
        }
        for (contestant, figures) in &mut self.rows {
            figures.memory_after = contestant.memory()?;
        }
        Ok(())
    }

    /// Observes once undisturbed, for wake-ups, and once under strace, for system calls.
    fn watch_idle(&mut self) -> Result<()> {
        say(&format!("idle, two times {} s", self.idle.as_secs()));
        for (contestant, _) in &self.rows {
            contestant.silence_heartbeats()?;
        }
        let supervisors = self.rows.iter().map(|(row, _)| row.supervisors()).collect::<Result<Vec<_>>>()?;
        let before: Vec<_> = supervisors.iter().map(|pids| wake_ups(pids)).collect();
        pass(self.idle);
        for (((_, figures), pids), before) in self.rows.iter_mut().zip(&supervisors).zip(before) {
            figures.wake_ups_per_second = wake_ups(pids).saturating_sub(before) as f64 / self.idle.as_secs_f64();
        }
        let output =
            |contestant: &Contestant| workspace::cache_path(&format!("bench-trace-{}-{}", contestant.name, self.count));
        let traces = supervisors.iter().zip(&self.rows).map(|(pids, (row, _))| Trace::begin(pids, output(row)));
        let traces = traces.collect::<Result<Vec<_>>>()?;
        pass(self.idle);
        for ((_, figures), trace) in self.rows.iter_mut().zip(traces) {
            figures.seen = trace.end()?;
        }
        Ok(())
    }

    /// The row indices, starting with a different row each round.
    fn in_turn(&self, round: u32) -> Vec<usize> {
        let rows = self.rows.len();
        (0..rows).map(|row| (row + round as usize) % rows).collect()
    }

    fn kill_one(&mut self, round: u32) -> Result<()> {
        for row in self.in_turn(round) {
            let Some((contestant, figures)) = self.rows.get_mut(row) else { continue };
            if figures.gave_up() {
                continue;
            }
            let name = contestant.names[round as usize % contestant.names.len()].clone();
            contestant.settle(std::slice::from_ref(&name))?;
            pass(AFTERMATH);
            let supervisors = contestant.supervisors()?;
            let before = Cpu::of(&supervisors);
            let (old, killed) = contestant.kill(&name)?;
            figures.restart.add(contestant.down_time(&name, old, killed)?);
            pass(AFTERMATH);
            if let Some(spent) = Cpu::of(&supervisors).since(&before) {
                figures.cpu.add(spent);
            }
        }
        let floor =
            self.rows.get(FLOOR).and_then(|(_, figures)| figures.restart.last()).context("the floor is measured")?;
        for (_, figures) in &mut self.rows {
            if let Some(own) = figures.restart.last() {
                figures.added.add(own - floor);
            }
        }
        Ok(())
    }

    fn kill_young(&mut self, round: u32) -> Result<()> {
        for row in self.in_turn(round) {
            let Some((contestant, figures)) = self.rows.get_mut(row) else { continue };
            if figures.young.is_slow() || figures.gave_up() {
                continue;
            }
            let name = contestant.names[round as usize % contestant.names.len()].clone();
            let start = contestant.start_without_delay(&name)?;
            while Moment::now().since(start.at) < YOUNG_MILLISECONDS {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            let (old, killed) = contestant.kill(&name)?;
            figures.young.add(contestant.down_time(&name, old, killed)?);
        }
        Ok(())
    }

    fn kill_all(&mut self) -> Result<()> {
        for (contestant, figures) in &mut self.rows {
            if figures.all.is_slow() || figures.gave_up() {
                continue;
            }
            let names = contestant.names.clone();
            contestant.settle(&names)?;
            let killed = Moment::now();
            let old = names.iter().map(|name| Ok(contestant.kill(name)?.0)).collect::<Result<Vec<_>>>()?;
            let mut last: f64 = 0.0;
            for (name, old) in names.iter().zip(old) {
                last = last.max(contestant.down_time(name, old, killed)?);
                if last.is_infinite() {
                    break;
                }
            }
            figures.all.add(last);
        }
        Ok(())
    }

    fn shown(&self) -> String {
        let mut text = format!(
            "\nN = {}: milliseconds as median/p95; added: beyond the floor in the same round; memory: dirty KiB when idle, dirty KiB at the end, and PSS\n",
            self.count
        );
        let _ = writeln!(
            text,
            "{:<12} {:>15} {:>15} {:>13} {:>15} {:>15} {:>8} {:>8} {:>8} {:>10} {:>10}",
            "",
            "restart",
            "added",
            "CPU",
            "killed at 50ms",
            "all at once",
            "dirty",
            "after",
            "PSS",
            "wakes/s",
            "calls/s"
        );
        for (contestant, figures) in &self.rows {
            let calls = f64::from(figures.seen.calls) / self.idle.as_secs_f64();
            let _ = writeln!(
                text,
                "{:<12} {:>15} {:>15} {:>13} {:>15} {:>15} {:>8} {:>8} {:>8} {:>10.2} {:>10.2}",
                contestant.name,
                figures.restart.shown(),
                figures.added.shown(),
                figures.cpu.shown(),
                figures.young.shown(),
                figures.all.shown(),
                figures.memory.dirty,
                figures.memory_after.dirty,
                figures.memory.proportional,
                figures.wake_ups_per_second,
                calls
            );
        }
        if let Some((_, figures)) = self.rows.get(AOPS) {
            let each = |number: u32| f64::from(number) / self.idle.as_secs_f64();
            let _ = writeln!(
                text,
                "aops, idle, under strace: {:.2} wake-ups/s and {:.2} calls/s; of these {:.2} and {:.2} for the roles' pings and the checks of \
                 log sizes; the whole trace: {}",
                each(figures.seen.wake_ups),
                each(figures.seen.calls),
                each(figures.seen.interval_wake_ups),
                each(figures.seen.interval_calls),
                workspace::cache_path(&format!("bench-trace-aops-{}", self.count)).display()
            );
        }
        text
    }

    fn evaluate(&self, verdicts: &mut Verdicts) {
        let count = self.count;
        let (Some((_, floor)), Some((_, aops))) = (self.rows.get(FLOOR), self.rows.get(AOPS)) else { return };
        verdicts.at_most(&format!("N={count}: added to a restart, median"), aops.added.median(), 2.0, "ms");
        verdicts.at_most(&format!("N={count}: CPU of a restart, median"), aops.cpu.median(), 1.0, "ms");
        let slowest = aops.young.slowest();
        verdicts.at_most(
            &format!("N={count}: killed 50 ms after its start, slowest"),
            slowest,
            AT_ONCE_MILLISECONDS,
            "ms",
        );
        if count >= 10 {
            let limit = if count <= 10 { 1.2 } else { 1.6 };
            let dirty = aops.memory.dirty as f64 / 1024.0;
            verdicts.at_most(&format!("N={count}: dirty memory of spm and spa"), Some(dirty), limit, "MiB");
        }
        if count >= 100 {
            let limit = floor.all.median().unwrap_or(0.0) + 60.0;
            verdicts.at_most(&format!("N={count}: all at once, median"), aops.all.median(), limit, "ms");
            for (rival, figures) in self.rows.iter().skip(AOPS + 1) {
                if figures.all.median() > floor.all.median() {
                    let ahead = aops.all.median() < figures.all.median();
                    verdicts.is(&format!("N={count}: all at once: ahead of {}", rival.name), ahead);
                }
            }
            let rest = |all: u32, due: u32| Some(f64::from(all.saturating_sub(due)) / self.idle.as_secs_f64());
            let (seen, aside) = (aops.seen, "without pings, log checks and heartbeats");
            let woken = rest(seen.wake_ups, seen.interval_wake_ups);
            verdicts.at_most(&format!("N={count}: idle wake-ups/s, {aside}"), woken, 0.2, "");
            let called = rest(seen.calls, seen.interval_calls);
            verdicts.at_most(&format!("N={count}: idle system calls/s, {aside}"), called, 2.0, "");
        }
    }
}

impl Samples {
    fn is_slow(&self) -> bool {
        self.last().is_some_and(|last| last > SLOW_MILLISECONDS.min(PATIENCE.as_secs_f64() * 1e3))
    }
}
