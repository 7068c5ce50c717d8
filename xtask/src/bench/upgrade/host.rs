//! Upgrades one host and measures each upgrade.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::super::contestant::{PATIENCE, pass};
use super::super::control_socket::ControlSocket;
use super::super::reports::{Moment, Reports};
use super::super::spent::Spent;
use super::figures::{Cost, Figures};
use super::location::{FLOOR_PROGRAM, Location};
use super::{Arguments, CHANGED, RELEASES, SUB_AGENT_RELEASES, wanted};
use crate::command::say;
use crate::fleet::{AgentProcess, agent, agent_processes, logs, pid, write_fleet};

/// The shortest trial that is allowed.
const SETTINGS: &str = "\nupgradeTrial = \"5s\"\n";
/// The interval between two attempts to reach the new manager.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// The interval between two requests for the status where the time is not critical: each costs CPU time of the manager.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);
/// How long a host at rest is observed.
const REST: Duration = Duration::from_secs(10);

pub(super) struct Host<'a> {
    location: Location<'a>,
    arguments: &'a Arguments,
    reports: Reports,
    /// Which releases are ordered.
    manager: usize,
    sub_agent: usize,
}

impl<'a> Host<'a> {
    pub(super) fn new(location: Location<'a>, arguments: &'a Arguments, reports: Reports) -> Host<'a> {
        Host { location, arguments, reports, manager: 0, sub_agent: 0 }
    }

    pub(super) fn measure(&mut self, figures: &mut Figures) -> Result<()> {
        let measured = self.upgrade_all(figures);
        if measured.is_err() {
            println!("Logs:\n{}", logs(&self.location.gateway_log(), &self.location.home()));
        }
        measured
    }

    fn upgrade_all(&mut self, figures: &mut Figures) -> Result<()> {
        let settings = self.location.home().join("etc/conf.toml");
        let shortened = fs::read_to_string(&settings).context("cannot read the settings")? + SETTINGS;
        fs::write(&settings, shortened).context("cannot write the settings")?;
        self.wait_for_all("the host to start")?;
        // The manager that the installation started is not the watchdog's child, so its cost would be lost.
        say("upgrading the manager, not measured");
        self.upgrade_manager(&mut Figures::default())?;
        self.rest(figures)?;
        for round in 1..=self.arguments.rounds {
            say(&format!("upgrading the manager and a sub-agent, {round} of {}", self.arguments.rounds));
            self.upgrade_manager(figures)?;
            self.upgrade_sub_agent(figures)?;
            if let Location::Systemd(_) = self.location {
                self.restart_floor(figures)?;
            }
            figures.rounds = round;
        }
        Ok(())
    }

    fn rest(&self, figures: &mut Figures) -> Result<()> {
        let before = self.spent()?;
        pass(REST);
        figures.idle_cpu.add(self.spent()?.since(before).context("the CPU time at rest decreased")?.cpu);
        Ok(())
    }

    fn upgrade_manager(&mut self, figures: &mut Figures) -> Result<()> {
        self.manager = (self.manager + 1) % RELEASES.len();
        let version = RELEASES[self.manager];
        let mut socket = ControlSocket::open(&self.location.home())?;
        let status = socket.status()?;
        let (processes_before, old) =
            (agent_processes(&status)?, manager(&status).context("the status has no manager")?);
        let before = self.spent()?;
        let ordered = self.order()?;
        socket.wait_for_end()?;
        let ended = Moment::now();
        figures.gap.add(self.first_answer(old, ended)?.since(ended));
        let is_on_trial = |status: &Value| status["version"] == version && status["upgrade"]["phase"] == "trial";
        let (on_trial, _) = self.wait_for("the trial", POLL_INTERVAL, is_on_trial)?;
        figures.trial.add(on_trial.since(ordered));
        let (committed, _) = self.wait_for("the commit", STATUS_INTERVAL, |status| is_committed(status, version))?;
        figures.commit.add(committed.since(ordered));
        let status = self.wait_for_all("all to run")?;
        figures.manager.add(before, self.spent()?)?;
        let processes_now = agent_processes(&status)?;
        figures.touched |= processes_before != processes_now;
        ensure!(
            !figures.touched,
            "the manager's upgrade changed sub-agents from {processes_before:?} to {processes_now:?}"
        );
        let restarts = |role: &str| status[role]["restarts"].as_u64().unwrap_or(0);
        figures.role_restarts = restarts("spm") + restarts("spa");
        Ok(())
    }

    fn upgrade_sub_agent(&mut self, figures: &mut Figures) -> Result<()> {
        self.sub_agent = (self.sub_agent + 1) % SUB_AGENT_RELEASES.len();
        let version = SUB_AGENT_RELEASES[self.sub_agent];
        let others = other_processes(&ControlSocket::open(&self.location.home())?.status()?)?;
        let before = self.spent()?;
        let mut ordered = Moment::now();
        let down = self.down(CHANGED, || {
            ordered = self.order()?;
            Ok(())
        })?;
        figures.down.add(down);
        let runs = |status: &Value| {
            agent(status, CHANGED).is_some_and(|agent| {
                agent["version"] == version && agent["state"] == "running" && agent["upgrade"].is_null()
            })
        };
        let (committed, status) = self.wait_for("the sub-agent's commit", STATUS_INTERVAL, runs)?;
        figures.sub_agent_commit.add(committed.since(ordered));
        figures.sub_agent.add(before, self.spent()?)?;
        let now = other_processes(&status)?;
        figures.touched |= others != now;
        ensure!(!figures.touched, "a sub-agent's upgrade changed others from {others:?} to {now:?}");
        Ok(())
    }

    /// A plain restart of a supervisor that does nothing else, and of its program.
    fn restart_floor(&self, figures: &mut Figures) -> Result<()> {
        let before = self.spent()?;
        figures.floor.add(self.down(FLOOR_PROGRAM, || self.location.systemctl(&["restart", "floor"]))?);
        figures.floor_cpu.add(self.spent()?.since(before).context("the CPU time of the container decreased")?.cpu);
        Ok(())
    }

    /// Calls `cause`, which replaces a program, and returns how long no program of that name ran, by the programs' own clocks.
    fn down(&self, name: &str, cause: impl FnOnce() -> Result<()>) -> Result<f64> {
        let old = self.reports.of(name).with_context(|| format!("{name} has not reported its start"))?;
        cause()?;
        let new = self.reports.successor(name, old.pid, PATIENCE);
        let new = new.with_context(|| format!("{name} is not restarted within {PATIENCE:?}"))?;
        let end = self.reports.end(name, old.pid).with_context(|| format!("{name} was killed instead of stopped"))?;
        Ok(new.at.since(end))
    }

    /// Orders the current releases; returns the time.
    fn order(&self) -> Result<Moment> {
        let releases = (RELEASES[self.manager], SUB_AGENT_RELEASES[self.sub_agent]);
        write_fleet(&self.location.depot(), &wanted(self.arguments, releases.0, releases.1))?;
        Ok(Moment::now())
    }

    fn spent(&self) -> Result<Spent> {
        let watchdog = match self.location {
            Location::Alone(_) => pid(&ControlSocket::open(&self.location.home())?.status()?["spa"]["pid"]),
            // Not used: all of the container's processes count, by their pids here.
            Location::Systemd(_) => Some(0),
        };
        Ok(self.location.spent(watchdog.context("the status has no pid of the watchdog")?))
    }

    /// The time when a manager other than `old` answers.
    fn first_answer(&self, old: u32, ended: Moment) -> Result<Moment> {
        loop {
            let answer = ControlSocket::open(&self.location.home()).and_then(|mut socket| socket.status());
            let now = Moment::now();
            if answer.is_ok_and(|status| manager(&status).is_some_and(|pid| pid != old)) {
                return Ok(now);
            }
            ensure!(now.since(ended) < PATIENCE.as_secs_f64() * 1e3, "no new manager answers");
            std::thread::park_timeout(POLL_INTERVAL);
        }
    }

    /// Waits until the ordered releases and all sub-agents run.
    fn wait_for_all(&self, what: &str) -> Result<Value> {
        let version = RELEASES[self.manager];
        let count = usize::from(self.arguments.agents) + 1;
        let runs = |status: &Value| is_committed(status, version) && all_run(status, count);
        self.wait_for(what, STATUS_INTERVAL, runs).map(|(_, status)| status)
    }

    /// Waits until `is_wanted` accepts the status; returns the time and the status.
    fn wait_for(&self, what: &str, pause: Duration, is_wanted: impl Fn(&Value) -> bool) -> Result<(Moment, Value)> {
        let began = Moment::now();
        let mut last = Value::Null;
        loop {
            if let Ok(status) = ControlSocket::open(&self.location.home()).and_then(|mut socket| socket.status()) {
                if is_wanted(&status) {
                    return Ok((Moment::now(), status));
                }
                last = status;
            }
            if Moment::now().since(began) >= PATIENCE.as_secs_f64() * 1e3 {
                bail!("timed out after {PATIENCE:?} waiting for {what}; the last status: {last:#}");
            }
            std::thread::park_timeout(pause);
        }
    }
}

impl Cost {
    fn add(&mut self, before: Spent, after: Spent) -> Result<()> {
        let spent =
            after.since(before).context("the figures of a process were lost: no measured process waited for it")?;
        self.cpu.add(spent.cpu);
        if spent.written_bytes > 0 {
            self.written.add(spent.written_bytes as f64 / 1024.0);
        }
        Ok(())
    }

    /// Reads the sizes of a package and of its content.
    pub(super) fn set_sizes(&mut self, package: &Path, unpacked: u64) -> Result<()> {
        let metadata = fs::metadata(package).with_context(|| format!("cannot read {}", package.display()))?;
        (self.package, self.unpacked) = (metadata.len(), unpacked);
        Ok(())
    }
}

fn manager(status: &Value) -> Option<u32> {
    pid(&status["spm"]["pid"])
}

fn is_committed(status: &Value, version: &str) -> bool {
    status["version"] == version && status["upgrade"].is_null()
}

/// Whether both roles and `count` sub-agents run.
fn all_run(status: &Value, count: usize) -> bool {
    let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
    status["state"] == "running" && agents.iter().filter(|agent| agent["state"] == "running").count() == count
}

/// Of each sub-agent but the one that is upgraded.
fn other_processes(status: &Value) -> Result<Vec<AgentProcess>> {
    let mut processes = agent_processes(status)?;
    processes.retain(|process| process.name != CHANGED);
    Ok(processes)
}
