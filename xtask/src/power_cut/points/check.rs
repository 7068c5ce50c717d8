//! The check of points: the drive of each is rebuilt, and many are started in one virtual machine at the same time.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::super::machine::{Drive, Hardware};
use super::draw::Point;
use super::hosts::{Facts, Hosts, Wanted, is_settled};
use super::recording::Recording;
use super::setup::{CHANGED, Setup, order_file};
use super::{UPGRADES, Upgrade};
use crate::fleet::agent;
use crate::workspace;

/// How many points a machine checks at the same time. Two emulated processors are busy with them, and each keeps its files in memory.
pub(super) const AT_ONCE: usize = 12;
/// Mebibytes of memory: of a machine, and for each of its hosts.
const MEMORY: usize = 384;
const MEMORY_OF_HOST: usize = 128;

/// From the start of the homes until each runs the ordered release, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(900);
/// The interval of the queries of all hosts.
const POLL_INTERVAL: Duration = Duration::from_secs(4);

/// What a status tells the operator to do if a release of the manager was rolled back.
const RETRY_MANAGER: &str = "control retry aops-spm";

/// What a point came to.
pub(super) enum Outcome {
    /// The power cut left the old release; the host came to the new one.
    Old,
    /// The power cut left the new release.
    New,
    /// Why, and the logs.
    Stranded(String),
}

/// What a batch of points came to.
pub(super) struct Checked {
    /// In the order of the points.
    pub(super) outcomes: Vec<Outcome>,
    /// How many releases were rolled back and retried.
    pub(super) retried: usize,
    /// How many mounts replayed a journal.
    pub(super) replayed: usize,
    /// The time from the start of the machine until its agent answered.
    pub(super) booted_in: Duration,
}

/// A host that is under way.
struct Host<'a> {
    name: usize,
    upgrade: Upgrade,
    wanted: Wanted,
    point: &'a Point,
    /// The power cut left the new release.
    is_new: bool,
    /// How often the ordered release was rolled back and retried, and whether it is skipped now.
    retries: usize,
    is_skipped: bool,
    outcome: Option<Outcome>,
    problem: String,
    last: Value,
}

/// Starts each point, and waits until its host runs the ordered release.
pub(super) fn check(setup: &Setup<'_>, recording: &Recording, points: &[Point]) -> Result<Checked> {
    let mut hosts: Vec<Host> = points.iter().zip(1..).map(|(point, name)| Host::new(name, point)).collect();
    let mut drives = vec![Drive::new("root", &setup.root), Drive::new("tools", &setup.tools)];
    for host in &hosts {
        let image = setup.directory.join(format!("host-{}.img", host.name));
        recording.rebuild(&host.point.cut, &image)?;
        drives.push(Drive::new(&format!("host-{}", host.name), &image));
    }
    let hardware =
        Hardware { kernel: setup.kernel, drives: &drives, memory: MEMORY + MEMORY_OF_HOST * hosts.len(), clock: None };
    let mut machine = Hosts::boot(&setup.directory.join("machine"), &hardware)?;
    // A drive that cannot be mounted is a fault of the log or of the file system, not of the home.
    machine
        .together(hosts.iter().map(|host| format!("open {} {}", host.name, order_file(Some(host.upgrade)))))
        .with_context(|| format!("cannot mount what a power cut left: {}", recipes(points)))?;
    let names: Vec<usize> = hosts.iter().map(|host| host.name).collect();
    let mut left = machine.left(&names)?;
    for host in &mut hosts {
        let left = left.remove(&host.name).context("a host was not inspected")?;
        host.inspect(&left, &mut machine);
    }
    machine.together(hosts.iter().map(|host| format!("start {}", host.name)))?;
    let started = Instant::now();
    while hosts.iter().any(|host| host.outcome.is_none()) && started.elapsed() < PATIENCE {
        let queried = Instant::now();
        let under_way: Vec<usize> = hosts.iter().filter(|host| host.outcome.is_none()).map(|host| host.name).collect();
        let mut statuses = machine.statuses(&under_way)?;
        for host in &mut hosts {
            if let Some(status) = statuses.remove(&host.name) {
                host.observe(status, &mut machine, setup)?;
            }
        }
        std::thread::park_timeout(POLL_INTERVAL.saturating_sub(queried.elapsed()));
    }
    for host in hosts.iter_mut().filter(|host| host.outcome.is_none()) {
        let logs = machine.logs(host.name);
        host.outcome = Some(Outcome::Stranded(format!("{}{:#}\n{logs}", host.problem, host.last)));
    }
    let replayed = check_kernel(&mut machine)?;
    let booted_in = machine.booted_in();
    machine.cut()?;
    drives.iter().skip(2).try_for_each(|drive| workspace::remove(&drive.file))?;
    Ok(Checked {
        replayed,
        booted_in,
        retried: hosts.iter().map(|host| host.retries).sum(),
        outcomes: hosts.into_iter().filter_map(|host| host.outcome).collect(),
    })
}

/// Keeps the drive of a stranded host, as the power cut left it.
pub(super) fn keep(recording: &Recording, point: &Point, number: usize) -> Result<PathBuf> {
    let kept = workspace::cache_path(&format!("power-cut-stranded-{number}.img"));
    recording.rebuild(&point.cut, &kept)?;
    Ok(kept)
}

/// The kernel must have no complaint; returns the number of replayed journals.
fn check_kernel(machine: &mut Hosts) -> Result<usize> {
    let messages = machine.shell("dmesg")?;
    let is_fault = |line: &&str| {
        let line = line.to_lowercase();
        ["ext4-fs error", "i/o error", "corrupt", "out of memory", "hung task"].iter().any(|word| line.contains(word))
    };
    let faults: Vec<&str> = messages.lines().filter(is_fault).collect();
    ensure!(faults.is_empty(), "the kernel of the virtual machine reports faults:\n{}", faults.join("\n"));
    let replays = |line: &&str| line.contains("recovery complete") || line.contains("Ending recovery");
    Ok(messages.lines().filter(replays).count())
}

fn recipes(points: &[Point]) -> String {
    points.iter().map(|point| format!("\n  {}", point.cut)).collect()
}

impl Host<'_> {
    fn new(name: usize, point: &Point) -> Host<'_> {
        let upgrade = UPGRADES[point.window];
        Host {
            name,
            upgrade,
            wanted: Upgrade::wanted(Some(upgrade)),
            point,
            is_new: false,
            retries: 0,
            is_skipped: false,
            outcome: None,
            problem: String::new(),
            last: Value::Null,
        }
    }

    /// Inspects what the power cut left, before the home is started.
    fn inspect(&mut self, left: &Facts, machine: &mut Hosts) {
        self.is_new = match self.upgrade {
            Upgrade::Manager => left.releases().0 == self.wanted.manager,
            Upgrade::SubAgent => left.releases().1 == self.wanted.release,
        };
        if let Err(error) = left.check_states() {
            self.outcome = Some(Outcome::Stranded(format!("{error:#}\n{}", machine.logs(self.name))));
        }
    }

    fn observe(&mut self, status: Value, machine: &mut Hosts, setup: &Setup<'_>) -> Result<()> {
        let is_reached = self.wanted.is_reached(&status);
        // The gateway writes what it has received with a delay, so the check waits for a second status.
        if is_reached && self.wanted.is_reached(&self.last) {
            match machine.check(self.name, self.wanted, setup) {
                Ok(()) => self.outcome = Some(if self.is_new { Outcome::New } else { Outcome::Old }),
                Err(error) => self.problem = format!("{error:#}\n"),
            }
        }
        // On a busy machine, a manager may not answer in time; the release is then rolled back.
        let was_skipped = self.is_skipped;
        self.is_skipped = is_settled(&status) && self.skips_ordered(&status);
        if self.is_skipped && !was_skipped {
            self.retries += 1;
            let name = if self.upgrade == Upgrade::Manager { "aops-spm" } else { CHANGED };
            machine.verb(&format!("control {} retry {name}", self.name))?;
        }
        self.last = status;
        Ok(())
    }

    /// Whether the ordered release was rolled back, so that only an operator has it tried again.
    fn skips_ordered(&self, status: &Value) -> bool {
        match self.upgrade {
            Upgrade::Manager => {
                let problems = status["problems"].as_array().map(Vec::as_slice).unwrap_or_default();
                problems.iter().any(|problem| problem.as_str().is_some_and(|text| text.contains(RETRY_MANAGER)))
            }
            Upgrade::SubAgent => agent(status, CHANGED).is_some_and(|agent| !agent["skipped"].is_null()),
        }
    }
}

/// What the points of each kind came to.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) old: usize,
    pub(super) new: usize,
    pub(super) stranded: usize,
}

impl Tally {
    pub(super) fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Old => self.old += 1,
            Outcome::New => self.new += 1,
            Outcome::Stranded(_) => self.stranded += 1,
        }
    }

    pub(super) fn points(&self) -> usize {
        self.old + self.new + self.stranded
    }
}

/// By window and kind.
pub(super) type Tallies = BTreeMap<(usize, super::draw::Kind), Tally>;
