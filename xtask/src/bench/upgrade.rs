//! `cargo xtask bench upgrade`: measures how long a host is without a manager during an upgrade, without a service manager and under
//! systemd.
//!
//! The manager is upgraded back and forth between two releases that differ only in their bytes. A client holds a connection to the old
//! manager, which closes it on exit, and then tries every millisecond until the new manager answers. systemd runs in a disposable
//! container: nothing is installed on this machine.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::contestant::{PATIENCE, desired};
use super::control_socket::ControlSocket;
use super::reports::Moment;
use super::statistics::{Samples, short};
use super::verdicts::Verdicts;
use super::{build, heading};
use crate::command::{is_root, read, say};
use crate::container::Container;
use crate::fleet::{Fleet, logs, next_manager, pid, quietly, write_fleet};
use crate::package::Package;
use crate::wait::try_for;
use crate::{apt, rootfs, test};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The number of upgrades
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The number of running sub-agents
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=500))]
    agents: u16,
    /// Which service manager starts the manager
    #[arg(long, value_enum, default_value_t = Services::Both)]
    service: Services,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Services {
    None,
    Systemd,
    Both,
}

/// A service manager, and the limit of the time without a manager, in milliseconds.
struct Service {
    name: &'static str,
    most: f64,
    measure: fn(&Path, &Arguments, &mut Figures) -> Result<()>,
}

const NONE: Service = Service { name: "without a service manager", most: 100.0, measure: alone };
/// Its units have `RestartSec=1`.
const SYSTEMD: Service = Service { name: "under systemd", most: 1_500.0, measure: under_systemd };

/// The installed release and the other one.
const RELEASES: [&str; 2] = ["0.1.0", "0.1.1"];
/// The shortest trial that is allowed.
const SETTINGS: &str = "\nupgradeTrial = \"5s\"\n";
/// The interval between two attempts to reach the new manager.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Where the container has the executable, the gateway and the home.
const PROGRAM: &str = "/tmp/aops";
const DEPOT: &str = "/tmp/gateway";
const GATEWAY_LOG: &str = "/tmp/gateway.log";
const ADDRESS: &str = "127.0.0.1:8888";
const HOME: &str = "/opt/aops";

/// Milliseconds, a sample for each upgrade.
#[derive(Default)]
struct Figures {
    gap: Samples,
    trial: Samples,
    commit: Samples,
    rounds: u32,
    /// A sub-agent has a new process, or was restarted.
    touched: bool,
    /// The restarts of both roles, as the last status counts them.
    role_restarts: u64,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let aops = build(&[], "aops-gateway")?;
    println!("\n{}", heading("cargo xtask bench upgrade")?);
    let services = match arguments.service {
        Services::None => &[NONE][..],
        Services::Systemd => &[SYSTEMD],
        Services::Both => &[NONE, SYSTEMD],
    };
    for service in services {
        let mut figures = Figures::default();
        let measured = (service.measure)(&aops, arguments, &mut figures);
        // Print the figures even if a later step failed.
        print!("{}", figures.shown(service, arguments));
        measured?;
    }
    Ok(())
}

impl Figures {
    fn shown(&self, service: &Service, arguments: &Arguments) -> String {
        let name = service.name;
        let mut text =
            format!("\n{name}: {} upgrades with {} sub-agents, milliseconds\n", self.rounds, arguments.agents);
        let _ = writeln!(text, "{:<46} {:>8} {:>8} {:>8}", "", "median", "p95", "slowest");
        for (what, samples) in [
            ("exit of the old manager until the new one answers", &self.gap),
            ("order until the release is on trial", &self.trial),
            ("order until it is committed", &self.commit),
        ] {
            let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
            let [median, p95, slowest] = [samples.median(), samples.p95(), samples.slowest()].map(shown);
            let _ = writeln!(text, "{what:<46} {median:>8} {p95:>8} {slowest:>8}");
        }
        let mut verdicts = Verdicts::default();
        verdicts.at_most(&format!("{name}: without a manager, median"), self.gap.median(), service.most, "ms");
        if self.rounds > 0 {
            verdicts.is(&format!("{name}: every sub-agent kept its process without a restart"), !self.touched);
            let counted =
                format!("{name}: no restart of the manager or the watchdog was counted: {}", self.role_restarts);
            verdicts.is(&counted, self.role_restarts == 0);
        }
        text + "\n" + verdicts.text()
    }
}

fn alone(aops: &Path, arguments: &Arguments, figures: &mut Figures) -> Result<()> {
    let mut fleet = prepare(aops, arguments)?;
    fleet.start_gateway()?;
    quietly(&mut fleet.install(aops))?;
    let host = Host { home: fleet.home(), depot: fleet.depot(), gateway_log: fleet.path("gateway.log") };
    host.measure(arguments, figures)
}

fn under_systemd(aops: &Path, arguments: &Arguments, figures: &mut Figures) -> Result<()> {
    let rootfs = match root_file_system() {
        Ok(rootfs) => rootfs,
        Err(error) => {
            say(&format!("skipping the measurement under systemd: {error:#}"));
            return Ok(());
        }
    };
    let fleet = prepare(aops, arguments)?;
    say("booting a container");
    let container = Container::systemd_of(rootfs);
    container.copy_in(aops, PROGRAM, 0o755);
    read(Command::new("cp").arg("-a").args([fleet.depot(), container.path(DEPOT)]))?;
    let serve = format!("exec {PROGRAM} gateway run --dir {DEPOT} --listen {ADDRESS} 2>{GATEWAY_LOG}");
    let gateway = container.spawn(&["sh", "-c", &serve]);
    gateway.line();
    let install = format!(
        "{PROGRAM} install --agent-id demo --endpoint https://{ADDRESS} --home {HOME} \
         --trusted-key {DEPOT}/keys/aops.pub --ca-cert {DEPOT}/tls/cert.pem; systemctl is-active aops-spm"
    );
    container.shell(&install).expect_success();
    let [home, depot, gateway_log] = [HOME, DEPOT, GATEWAY_LOG].map(|inside| container.path(inside));
    Host { home, depot, gateway_log }.measure(arguments, figures)
}

/// The root file system of containers.
fn root_file_system() -> Result<PathBuf> {
    ensure!(is_root(), "cannot boot a container without root");
    apt::install(test::NEEDS)?;
    rootfs::get()
}

/// A gateway that is not started yet, with both releases of the manager and the sub-agents.
fn prepare(aops: &Path, arguments: &Arguments) -> Result<Fleet> {
    say(&format!("publishing {} packages", usize::from(arguments.agents) + RELEASES.len()));
    let fleet = Fleet::new(aops)?;
    quietly(&mut fleet.gateway("init"))?;
    let publish = |package: &Package| quietly(fleet.gateway("publish").args(package.arguments()));
    for version in RELEASES {
        publish(&next_manager(aops, version)?)?;
    }
    for name in names(arguments) {
        publish(&Package::sleeper(&name, "1"))?;
    }
    fleet.write_fleet(&wanted(arguments, RELEASES[0]))?;
    Ok(fleet)
}

fn names(arguments: &Arguments) -> Vec<String> {
    (0..arguments.agents).map(|number| format!("sleeper-{number:03}")).collect()
}

fn wanted(arguments: &Arguments, manager: &str) -> String {
    format!("manager.version = {manager:?}\n{}", desired(&names(arguments), "1s"))
}

/// The paths of a host and its gateway, as seen from this process.
struct Host {
    home: PathBuf,
    depot: PathBuf,
    gateway_log: PathBuf,
}

impl Host {
    fn measure(&self, arguments: &Arguments, figures: &mut Figures) -> Result<()> {
        let measured = self.upgrade_all(arguments, figures);
        if measured.is_err() {
            println!("Logs:\n{}", logs(&self.gateway_log, &self.home));
        }
        measured
    }

    fn upgrade_all(&self, arguments: &Arguments, figures: &mut Figures) -> Result<()> {
        let settings = self.home.join("etc/conf.toml");
        let shortened = fs::read_to_string(&settings).context("cannot read the settings")? + SETTINGS;
        fs::write(&settings, shortened).context("cannot write the settings")?;
        let count = usize::from(arguments.agents);
        let runs =
            |version: &'static str| move |status: &Value| is_committed(status, version) && all_run(status, count);
        let (_, status) = self.wait_for("the host to start", runs(RELEASES[0]))?;
        let before = processes(&status)?;
        for (round, version) in (1..=arguments.rounds).zip(RELEASES.iter().copied().cycle().skip(1)) {
            say(&format!("upgrading the manager, {round} of {}", arguments.rounds));
            self.upgrade(&wanted(arguments, version), version, figures)?;
            let (_, status) = self.wait_for("all to run", runs(version))?;
            let after = processes(&status)?;
            figures.rounds = round;
            figures.touched = before != after;
            ensure!(!figures.touched, "the manager's upgrade changed sub-agents from {before:?} to {after:?}");
            let restarts = |role: &str| status[role]["restarts"].as_u64().unwrap_or(0);
            figures.role_restarts = restarts("spm") + restarts("spa");
        }
        Ok(())
    }

    fn upgrade(&self, wanted: &str, version: &str, figures: &mut Figures) -> Result<()> {
        let mut socket = ControlSocket::open(&self.home)?;
        let old = manager(&socket.status()?).context("the status has no pid of the manager")?;
        write_fleet(&self.depot, wanted)?;
        let ordered = Moment::now();
        socket.wait_for_end()?;
        let ended = Moment::now();
        figures.gap.add(self.first_answer(old, ended)?.since(ended));
        let is_on_trial = |status: &Value| status["version"] == version && status["upgrade"]["phase"] == "trial";
        let (on_trial, _) = self.wait_for("the trial", is_on_trial)?;
        figures.trial.add(on_trial.since(ordered));
        let (committed, _) = self.wait_for("the commit", |status| is_committed(status, version))?;
        figures.commit.add(committed.since(ordered));
        Ok(())
    }

    /// The time when a manager other than `old` answers.
    fn first_answer(&self, old: u32, ended: Moment) -> Result<Moment> {
        loop {
            let answer = ControlSocket::open(&self.home).and_then(|mut socket| socket.status());
            let now = Moment::now();
            if answer.is_ok_and(|status| manager(&status).is_some_and(|pid| pid != old)) {
                return Ok(now);
            }
            ensure!(now.since(ended) < PATIENCE.as_secs_f64() * 1e3, "no new manager answers");
            std::thread::park_timeout(POLL_INTERVAL);
        }
    }

    /// Waits until `is_wanted` accepts the status; returns the time and the status.
    fn wait_for(&self, what: &str, is_wanted: impl Fn(&Value) -> bool) -> Result<(Moment, Value)> {
        let mut last = Value::Null;
        let found = try_for(PATIENCE, || {
            last = ControlSocket::open(&self.home).and_then(|mut socket| socket.status()).ok()?;
            is_wanted(&last).then(Moment::now)
        });
        match found {
            Some(moment) => Ok((moment, last)),
            None => bail!("timed out after {PATIENCE:?} waiting for {what}; the last status: {last:#}"),
        }
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

/// Name, pid and restart count of each sub-agent.
fn processes(status: &Value) -> Result<Vec<(String, u32, u64)>> {
    let agents = status["agents"].as_array().context("the status has no sub-agents")?;
    let one = |agent: &Value| {
        let name = agent["name"].as_str().unwrap_or_default().to_owned();
        let pid = pid(&agent["pid"]).with_context(|| format!("the status has no pid for {name}"))?;
        Ok((name, pid, agent["restarts"].as_u64().unwrap_or(0)))
    };
    agents.iter().map(one).collect()
}
