//! One measured supervisor with N sleeping programs: aops, the floor (a minimal supervisor in C), or an installed rival.

use std::collections::HashSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::control_socket::ControlSocket;
use super::probe::{self, Memory};
use super::reports::{Moment, Reports, Start};
use crate::command::read;
use crate::fleet::{Fleet, SOON, pid, quietly};
use crate::package::Package;
use crate::processes;
use crate::wait::try_for;

/// The deadline for a restart: one rival takes half a minute.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);
/// Some supervisors delay the restart of a program that ran for less than a second.
const SETTLED_MILLISECONDS: f64 = 1_200.0;

/// The number of memory samples of a supervisor's processes.
const SAMPLES: u32 = 5;

/// The executables that the contestants run.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) sleeper: PathBuf,
    pub(super) floor: PathBuf,
    /// The executable as installed on a host.
    pub(super) agent: PathBuf,
    pub(super) gateway: PathBuf,
}

enum Kind {
    Aops(Fleet),
    Other { child: Child, directory: PathBuf },
}

pub(super) struct Contestant {
    pub(super) name: &'static str,
    /// Neither aops nor the floor: its failure does not fail the measurement.
    is_rival: bool,
    /// The names of its programs.
    pub(super) names: Vec<String>,
    pub(super) reports: Reports,
    kind: Kind,
    /// Programs that have died since they were last started on purpose: their next restart may be delayed.
    used: HashSet<String>,
}

impl Contestant {
    /// aops installed from packages, without a service manager, with a heartbeat every second.
    pub(super) fn aops(programs: &Programs, count: usize) -> Result<Contestant> {
        let mut fleet = Fleet::new(&programs.gateway)?;
        let socket = fleet.path("reports");
        let reports = Reports::listen(&socket)?;
        quietly(&mut fleet.gateway("init"))?;
        let manager = fleet.path("manager");
        fs::create_dir_all(manager.join("bin"))?;
        fs::copy(&programs.agent, manager.join("bin/aops"))?;
        quietly(fleet.gateway("publish").args(["--name", "aops-spm", "--version", "0.1.0"]).arg(&manager))?;
        let names: Vec<_> = (0..count).map(|number| format!("sleeper-{number:03}")).collect();
        let sleeper = fs::read(&programs.sleeper)?;
        let socket = socket.display().to_string();
        for name in &names {
            let package = Package::native(name, "1", &["bin/sleeper", &socket, name], "");
            let package = package.with_file("bin/sleeper", &sleeper, 0o755);
            quietly(fleet.gateway("publish").args(package.arguments()))?;
        }
        fleet.write_fleet(&desired(&names, "1s"))?;
        fleet.start_gateway()?;
        quietly(&mut fleet.install(&programs.agent))?;
        let contestant =
            Contestant { name: "aops", is_rival: false, names, reports, kind: Kind::Aops(fleet), used: HashSet::new() };
        contestant.come_up()?;
        contestant.wait_until_all_run()?;
        Ok(contestant)
    }

    /// A supervisor that is a single command; `prepare` writes its files into a directory of its own and returns the command.
    pub(super) fn other(
        name: &'static str,
        names: Vec<String>,
        prepare: impl FnOnce(&Setting<'_>) -> Result<Command>,
    ) -> Result<Contestant> {
        let directory = tempfile::Builder::new().prefix("aops-bench-").tempdir()?.keep();
        crate::fleet::clean_up_when_interrupted(&directory)?;
        let socket = directory.join("reports");
        let reports = Reports::listen(&socket)?;
        let mut command = prepare(&Setting { directory: &directory, socket: &socket, names: &names })?;
        let said = fs::File::create(directory.join("said"))?;
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot run {name}"))?;
        let kind = Kind::Other { child, directory };
        let contestant = Contestant { name, is_rival: name != "floor", names, reports, kind, used: HashSet::new() };
        contestant.come_up()?;
        Ok(contestant)
    }

    fn come_up(&self) -> Result<()> {
        if self.reports.wait_for(self.names.len(), PATIENCE) {
            return Ok(());
        }
        let said = match &self.kind {
            Kind::Aops(fleet) => fleet.logs(),
            Kind::Other { directory, .. } => fs::read_to_string(directory.join("said")).unwrap_or_default(),
        };
        bail!("{} does not start its {} programs: {said}", self.name, self.names.len())
    }

    /// The pids of the supervisor itself: all of its processes except the programs.
    pub(super) fn supervisors(&self) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::Aops(_) => Ok(vec![self.role("spm")?, self.role("spa")?]),
            Kind::Other { child, .. } => {
                let programs: HashSet<u32> =
                    self.names.iter().filter_map(|name| self.reports.of(name)).map(|start| start.pid).collect();
                Ok(probe::family(child.id()).into_iter().filter(|pid| !programs.contains(pid)).collect())
            }
        }
    }

    /// The memory of all its processes. A rival's helper process may exit during a sample: then all are sampled again.
    pub(super) fn memory(&self) -> Result<Memory> {
        let mut memory = Memory::of(&self.supervisors()?);
        for _ in 1..SAMPLES {
            if memory.is_ok() {
                break;
            }
            memory = Memory::of(&self.supervisors()?);
        }
        memory.with_context(|| format!("cannot measure {}", self.name))
    }

    /// The pid of one of aops' roles, from its record.
    pub(super) fn role(&self, role: &str) -> Result<u32> {
        let record = self.home()?.join("run").join(format!("{role}.json"));
        let read = || pid(&serde_json::from_slice::<Value>(&fs::read(&record).ok()?).ok()?["pid"]);
        read().with_context(|| format!("cannot read the pid of {role} from {}", record.display()))
    }

    pub(super) fn home(&self) -> Result<PathBuf> {
        match &self.kind {
            Kind::Aops(fleet) => Ok(fleet.home()),
            Kind::Other { .. } => bail!("{} has no home", self.name),
        }
    }

    /// Makes heartbeats so rare that none is sent during a measurement; waits until the setting is applied.
    pub(super) fn silence_heartbeats(&self) -> Result<()> {
        let Kind::Aops(fleet) = &self.kind else { return Ok(()) };
        fleet.write_fleet(&desired(&self.names, "1h"))?;
        let mut last = Value::Null;
        let mut since = Moment::now();
        let quiet = try_for(SOON, || {
            let seen =
                ControlSocket::open(&fleet.home()).and_then(|mut socket| socket.status()).ok()?["gateway"]["lastHeartbeat"].take();
            if seen != last {
                (last, since) = (seen, Moment::now());
            }
            (Moment::now().since(since) > 3_000.0).then_some(())
        });
        quiet.context("the longer heartbeat interval is not applied")
    }

    pub(super) fn wait_until_all_run(&self) -> Result<()> {
        let home = self.home()?;
        let run = || {
            let status = ControlSocket::open(&home).and_then(|mut socket| socket.status()).ok()?;
            let agents = status["agents"].as_array()?;
            let all = agents.len() == self.names.len() && agents.iter().all(|agent| agent["state"] == "running");
            all.then_some(())
        };
        try_for(PATIENCE, run).context("not all sub-agents are running")
    }

    /// Waits until each of these programs has run for a while, so that a restart after its next death is not delayed.
    pub(super) fn settle(&mut self, names: &[String]) -> Result<()> {
        if matches!(self.kind, Kind::Aops(_)) {
            let worn: Vec<_> = names.iter().filter(|name| self.used.contains(*name)).cloned().collect();
            self.restart(&worn)?;
        }
        for name in names {
            let start = self.reports.of(name).with_context(|| format!("{} does not run {name}", self.name))?;
            let left = SETTLED_MILLISECONDS - Moment::now().since(start.at);
            if left > 0.0 {
                pass(Duration::from_secs_f64(left / 1e3));
            }
        }
        Ok(())
    }

    /// Restarts these programs through aops: a restart after their next death is then not delayed.
    pub(super) fn restart(&mut self, names: &[String]) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let old: Vec<_> = names.iter().map(|name| self.reports.of(name).map_or(0, |start| start.pid)).collect();
        let mut socket = ControlSocket::open(&self.home()?)?;
        for name in names {
            socket.restart(name)?;
        }
        for (name, old) in names.iter().zip(old) {
            self.successor(name, old)?;
            self.used.remove(name);
        }
        Ok(())
    }

    /// Starts the program without a delay from earlier deaths.
    pub(super) fn start_without_delay(&mut self, name: &String) -> Result<Start> {
        match self.kind {
            Kind::Aops(_) => {
                self.restart(std::slice::from_ref(name))?;
                self.reports.of(name).context("no report of the program")
            }
            Kind::Other { .. } => {
                self.settle(std::slice::from_ref(name))?;
                let (old, _) = self.kill(name)?;
                self.successor(name, old)
            }
        }
    }

    /// Kills a program; returns its pid and the time.
    pub(super) fn kill(&mut self, name: &str) -> Result<(u32, Moment)> {
        let start = self.reports.of(name).with_context(|| format!("{} does not run {name}", self.name))?;
        self.used.insert(name.to_owned());
        let now = Moment::now();
        processes::signal(start.pid, Signal::KILL);
        Ok((start.pid, now))
    }

    /// The time that a program was down, in milliseconds; infinite if a rival does not restart it.
    pub(super) fn down_time(&self, name: &str, old: u32, killed: Moment) -> Result<f64> {
        match (self.reports.successor(name, old, PATIENCE), self.is_rival) {
            (Some(start), _) => Ok(start.at.since(killed)),
            (None, true) => Ok(f64::INFINITY),
            (None, false) => bail!("{} does not restart {name} within {PATIENCE:?}", self.name),
        }
    }

    pub(super) fn successor(&self, name: &str, old: u32) -> Result<Start> {
        let start = self.reports.successor(name, old, PATIENCE);
        start.with_context(|| format!("{} does not restart {name} within {PATIENCE:?}", self.name))
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        if let Kind::Other { child, directory } = &mut self.kind {
            crate::fleet::clean_up(directory);
            // It was ended there.
            let _ = child.wait();
        }
    }
}

/// Where a rival is set up, and the socket that its programs report to (`sleeper SOCKET NAME` each).
pub(super) struct Setting<'a> {
    pub(super) directory: &'a Path,
    pub(super) socket: &'a Path,
    pub(super) names: &'a [String],
}

/// A `fleet.toml` with these programs.
pub(super) fn desired(names: &[String], interval: &str) -> String {
    let listed: String = names.iter().map(|name| format!("[agents.{name}]\nversion = \"1\"\n")).collect();
    format!("heartbeatInterval = {interval:?}\n{listed}")
}

/// Waits for a time that is part of the measurement.
pub(super) fn pass(duration: Duration) {
    try_for(duration, || None::<()>);
}

/// Compiles a C program of this task, static like the agent.
pub(super) fn compile(source: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("musl-gcc");
    command.args(["-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror", "-o"]).arg(to).arg(source);
    read(&mut command).map(drop)?;
    ensure!(to.is_file(), "the compiler did not create {}", source.display());
    Ok(())
}
