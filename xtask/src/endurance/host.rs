//! A home that is upgraded again and again, with a gateway of its own.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::census::{Census, Pids, largest_log};
use crate::bench::control_socket::ControlSocket;
use crate::bench::probe::Memory;
use crate::bench::spent::Spent;
use crate::command::read;
use crate::fleet::{AgentProcess, Fleet, SOON, agent_processes, next_manager, pid, quietly};
use crate::package::Package;
use crate::processes;

/// For an upgrade and for a start of all sub-agents, under load. A home that needs longer is stranded.
const PATIENCE: Duration = Duration::from_secs(600);
/// The interval between two requests for the status: their cost must be small beside that of an upgrade.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// A host keeps two releases, so each of three must be fetched again in its turn.
pub(super) const RELEASES: [&str; 3] = ["0.1.0", "0.1.1", "0.1.2"];
/// The shortest trial that is allowed.
const SETTINGS: &str = "\nupgradeTrial = \"5s\"\n";
/// The number of times that resources are counted at the beginning; the least counts.
const COUNTS: u32 = 10;

/// A gateway's directory with all packages, to copy: to pack the manager takes longer than to upgrade it.
pub(super) fn template(executable: &Path, agents: u16) -> Result<Fleet> {
    let fleet = Fleet::new(executable)?;
    quietly(&mut fleet.gateway("init"))?;
    let managers = RELEASES.iter().map(|version| next_manager(executable, version));
    for package in managers.chain(names(agents).map(|name| Ok(Package::sleeper(&name, "1")))) {
        quietly(fleet.gateway("publish").args(package?.arguments()))?;
    }
    Ok(fleet)
}

fn names(agents: u16) -> impl Iterator<Item = String> {
    (0..agents).map(|number| format!("sleeper-{number:03}"))
}

/// What one upgrade took and what its processes hold after it.
#[derive(Debug, Clone)]
pub(super) struct Upgrade {
    /// From the order until the commit is seen.
    pub(super) seconds: f64,
    /// Of both roles and what they started; `None` if a process was not waited for by a role.
    pub(super) spent: Option<Spent>,
    pub(super) gateway: Option<Spent>,
    /// Dirty memory of the manager, the watchdog and the gateway, in KiB.
    pub(super) dirty: [u64; 3],
    /// How many deaths of a role have been counted since the start.
    pub(super) deaths: u64,
}

pub(super) struct Host {
    fleet: Fleet,
    agents: u16,
    gateway: u32,
    /// Which release runs.
    release: usize,
    /// As they were before the first upgrade.
    sub_agents: Vec<AgentProcess>,
}

impl Host {
    /// A host that runs the first release and all sub-agents.
    pub(super) fn new(executable: &Path, template: &Fleet, agents: u16) -> Result<Host> {
        let mut fleet = Fleet::new(executable)?;
        read(Command::new("cp").arg("-a").args([template.depot(), fleet.depot()]))?;
        fleet.write_fleet(&desired(agents, RELEASES[0]))?;
        let gateway = fleet.start_gateway()?;
        let mut host = Host { fleet, agents, gateway, release: 0, sub_agents: vec![] };
        host.install(executable).with_context(|| format!("cannot set up a home\n{}", host.logs()))?;
        Ok(host)
    }

    fn install(&mut self, executable: &Path) -> Result<()> {
        quietly(self.fleet.install(executable).args(["--version", RELEASES[0]]))?;
        let settings = self.fleet.home().join("etc/conf.toml");
        let text = std::fs::read_to_string(&settings).context("cannot read the settings")?;
        std::fs::write(&settings, text + SETTINGS).context("cannot write the settings")?;
        let status = self.wait_for_release("the host to run")?;
        self.sub_agents = agent_processes(&status)?;
        ensure!(self.sub_agents.len() == usize::from(self.agents), "not all sub-agents run: {:?}", self.sub_agents);
        Ok(())
    }

    pub(super) fn logs(&self) -> String {
        self.fleet.logs()
    }

    /// Upgrades the manager to the next release, and checks all that must hold after it.
    pub(super) fn upgrade(&mut self) -> Result<Upgrade> {
        let before = self.spent()?;
        self.release = (self.release + 1) % RELEASES.len();
        let ordered = Instant::now();
        self.fleet.write_fleet(&desired(self.agents, RELEASES[self.release]))?;
        let status = self.wait_for_release("the upgrade to be committed")?;
        let seconds = ordered.elapsed().as_secs_f64();
        let after = self.spent()?;
        self.check(&status)?;
        let dirty = self.pids()?.named().map(|(role, pid)| {
            Memory::of(&[pid]).map(|memory| memory.dirty).with_context(|| format!("the {role} does not run"))
        });
        let [manager, watchdog, gateway] = dirty;
        Ok(Upgrade {
            seconds,
            spent: after.0.since(before.0),
            gateway: after.1.since(before.1),
            dirty: [manager?, watchdog?, gateway?],
            deaths: ["spm", "spa"].iter().filter_map(|role| status[role]["restarts"].as_u64()).sum(),
        })
    }

    /// What the roles, and what the gateway, have spent.
    fn spent(&self) -> Result<(Spent, Spent)> {
        Ok((Spent::of_family(self.pids()?.watchdog), Spent::of(&[self.gateway])))
    }

    fn check(&self, status: &Value) -> Result<()> {
        let version = RELEASES[self.release];
        let now = agent_processes(status)?;
        ensure!(now == self.sub_agents, "sub-agents changed from {:?} to {now:?}", self.sub_agents);
        let gone: Vec<_> = now.iter().filter(|process| !processes::is_alive(process.pid)).collect();
        ensure!(gone.is_empty(), "sub-agents do not run: {gone:?}");
        for role in ["spm", "spa"] {
            let pid = pid(&status[role]["pid"]).with_context(|| format!("{role} does not run"))?;
            ensure!(processes::is_alive(pid), "{role} does not run: process {pid} has exited");
            self.runs_release(role, pid)?;
        }
        self.wait_for("the gateway to show the release", || {
            let shown = self.gateway_status()?;
            let host = &shown["hosts"][0];
            let is_reported = host["manager"]["version"] == version
                && host["manager"]["pid"] == status["spm"]["pid"]
                && host["running"] == self.agents;
            Ok(if is_reported { Ok(()) } else { Err(format!("{host:#}")) })
        })
    }

    /// Each release's executable ends with its version. A role's program is the file that the kernel holds open for it.
    fn runs_release(&self, role: &str, pid: u32) -> Result<()> {
        let version = RELEASES[self.release];
        self.wait_for("both roles to run the release", || {
            let file =
                File::open(format!("/proc/{pid}/exe")).with_context(|| format!("cannot read {role}'s program"))?;
            let mut end = vec![0; version.len()];
            file.read_exact_at(&mut end, file.metadata()?.len().saturating_sub(version.len() as u64))?;
            let end = String::from_utf8_lossy(&end).into_owned();
            Ok(if end == version { Ok(()) } else { Err(format!("{role} runs {end}")) })
        })
    }

    fn gateway_status(&self) -> Result<Value> {
        let text = read(self.fleet.gateway("status").arg("--json"))?;
        serde_json::from_str(&text).context("the gateway's status is not JSON")
    }

    /// Waits until the ordered release is committed and all runs. Fails at once if the release was rolled back.
    fn wait_for_release(&self, what: &str) -> Result<Value> {
        let version = RELEASES[self.release];
        self.wait_for(what, || {
            let Ok(status) = ControlSocket::open(&self.fleet.home()).and_then(|mut socket| socket.status()) else {
                return Ok(Err("the manager does not answer".to_owned()));
            };
            ensure!(status["skipped"].is_null(), "the release was rolled back: {status:#}");
            let runs = status["version"] == version
                && status["upgrade"].is_null()
                && status["state"] == "running"
                && status["gateway"]["connected"] == true
                && pid(&status["spa"]["pid"]).is_some()
                && status["agents"].as_array().is_some_and(|agents| {
                    agents.len() == usize::from(self.agents) && agents.iter().all(|agent| agent["state"] == "running")
                });
            Ok(if runs { Ok(status) } else { Err(format!("{status:#}")) })
        })
    }

    /// Calls `attempt` until it succeeds; its inner error is what was seen instead.
    fn wait_for<T>(&self, what: &str, attempt: impl Fn() -> Result<Result<T, String>>) -> Result<T> {
        let began = Instant::now();
        loop {
            match attempt()? {
                Ok(found) => return Ok(found),
                Err(seen) if began.elapsed() >= PATIENCE => {
                    bail!("timed out after {PATIENCE:?} waiting for {what}; the last state: {seen}")
                }
                Err(_) => std::thread::park_timeout(POLL_INTERVAL),
            }
        }
    }

    fn pids(&self) -> Result<Pids> {
        let status = ControlSocket::open(&self.fleet.home())?.status()?;
        let of = |role: &str| pid(&status[role]["pid"]).with_context(|| format!("{role} does not run"));
        Ok(Pids { manager: of("spm")?, watchdog: of("spa")?, gateway: self.gateway })
    }

    /// What the home and its processes hold at rest.
    pub(super) fn census(&self) -> Result<Census> {
        let mut least = self.count()?;
        for _ in 1..COUNTS {
            std::thread::park_timeout(POLL_INTERVAL);
            least = least.least(&self.count()?);
        }
        Ok(least)
    }

    /// What is held beyond an earlier census and stays.
    pub(super) fn growth(&self, early: &Census) -> Result<Vec<String>> {
        let began = Instant::now();
        let mut least = self.count()?;
        loop {
            let growth = least.growth(early);
            if growth.is_empty() || began.elapsed() >= SOON {
                return Ok(growth);
            }
            std::thread::park_timeout(POLL_INTERVAL);
            least = least.least(&self.count()?);
        }
    }

    fn count(&self) -> Result<Census> {
        Census::of(&self.fleet.home(), &self.pids()?)
    }

    pub(super) fn largest_log(&self) -> Result<u64> {
        largest_log(&self.fleet.home())
    }
}

/// The order to run this release of the manager and all sub-agents.
fn desired(agents: u16, manager: &str) -> String {
    let listed: String = names(agents).map(|name| format!("[agents.{name}]\nversion = \"1\"\n")).collect();
    format!("heartbeatInterval = \"1s\"\nmanager.version = {manager:?}\n{listed}")
}
