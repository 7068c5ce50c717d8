//! `cargo xtask demo`: sets up a gateway and one host, shows each operation step by step, and checks the results.
#![allow(clippy::print_stdout, reason = "the steps are its output")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::apt::Private;
use crate::command::{cargo, say};
use crate::fleet::{self, Fleet, agent, free_port, http_get, next_manager, pid};
use crate::package::Package;
use crate::wait::try_for;
use crate::{command, processes, rootfs, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Leave everything running at the end, to try it out
    #[arg(long)]
    keep: bool,
    /// The executable to use [default: it is built]
    #[arg(long, value_name = "FILE")]
    executable: Option<PathBuf>,
}

const EXPORTER: &str = "node-exporter";
const CLASSIC: &str = "classic";
/// The version of the exporter in Debian 12, and the same program packaged with one more collector.
const FIRST: &str = "1.5.0";
const SECOND: &str = "1.5.0-2";
/// A release with a flag that the program does not know.
const BAD: &str = "1.5.0-3";
/// The manager's own releases.
const MANAGER: &str = "0.1.0";
const NEXT_MANAGER: &str = "0.1.1";
/// The metric of the collector that the second release adds.
const ADDED_METRIC: &str = "node_load1 ";

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let exporter = exporter()?;
    let aops = arguments.executable.clone().map_or_else(build, Ok)?;
    let mut fleet = Fleet::new(&aops)?;
    let shown = Demo { fleet: &mut fleet, verified: Vec::new(), step: 0 }.show(&aops, &exporter, arguments.keep);
    if shown.is_err() {
        println!("\nThe demo failed. Logs:\n{}", fleet.logs());
    }
    shown
}

struct Demo<'a> {
    fleet: &'a mut Fleet,
    verified: Vec<String>,
    step: u32,
}

impl Demo<'_> {
    fn show(mut self, aops: &Path, exporter: &Path, keep: bool) -> Result<()> {
        let started = Instant::now();
        let port = free_port()?;
        self.set_up_gateway(aops, exporter, port)?;
        let gateway = self.fleet.start_gateway()?;
        println!("  listening on {}", self.fleet.url());
        self.join(aops)?;
        self.measure(port)?;
        self.kill_sub_agents()?;
        self.kill_manager()?;
        self.change_version(port)?;
        self.roll_back()?;
        self.upgrade_manager()?;
        if keep {
            self.leave(port, gateway);
        } else {
            self.stop_and_uninstall(port)?;
        }
        println!("\nVerified in {:.0} s:", started.elapsed().as_secs_f64());
        for fact in &self.verified {
            println!("  - {fact}");
        }
        Ok(())
    }

    fn set_up_gateway(&mut self, aops: &Path, exporter: &Path, port: u16) -> Result<()> {
        self.step("Set up a gateway: a signing key, a certificate, a depot");
        self.run(&mut self.fleet.gateway("init"))?;
        self.step("Publish signed packages: aops, Debian's node exporter (three releases, the last one bad), and one with a `control` script");
        self.run(self.fleet.gateway("publish").args(["--self", "--version", MANAGER]))?;
        let next = next_manager(aops, NEXT_MANAGER)?;
        self.run(self.fleet.gateway("publish").args(next.arguments()))?;
        let releases =
            [(FIRST, "--no-collector.loadavg"), (SECOND, "--collector.loadavg"), (BAD, "--no-such-collector")];
        for (version, flag) in releases {
            let package = exporter_package(exporter, version, flag, port)?;
            self.run(self.fleet.gateway("publish").args(package.arguments()))?;
        }
        let classic = Package::control(CLASSIC, "3.1", "while :; do date; sleep 5; done");
        self.run(self.fleet.gateway("publish").args(classic.arguments()))?;
        self.step("Write the desired state to fleet.toml and start the gateway");
        self.write_fleet(FIRST)
    }

    fn join(&mut self, aops: &Path) -> Result<()> {
        self.step("Install a host: verify, unpack and start, without root and without a service manager");
        self.run(&mut self.fleet.install(aops))?;
        self.fleet.wait_for("both roles and both sub-agents", |status| {
            let up = |name| agent(status, name).is_some_and(|agent| agent["state"] == "running");
            status["state"] == "running" && pid(&status["spa"]["pid"]).is_some() && up(EXPORTER) && up(CLASSIC)
        })?;
        self.run(&mut self.fleet.control(&["status"]))?;
        self.verified(
            "a host joins the fleet and runs a native sub-agent and one with a `control` script side by side",
        );
        Ok(())
    }

    fn measure(&mut self, port: u16) -> Result<()> {
        self.step("Read a metric from the exporter on the host");
        let metrics =
            try_for(fleet::SOON, || http_get(port, "/metrics").ok()).context("the exporter does not respond")?;
        let metric = metrics.lines().find(|line| line.starts_with("node_memory_MemTotal_bytes"));
        println!("  {}", metric.context("the exporter reports no memory size")?);
        ensure!(!has_metric(&metrics), "the first release already reports the load");
        self.verified("the exporter reports this machine's figures");
        Ok(())
    }

    fn kill_sub_agents(&mut self) -> Result<()> {
        for name in [EXPORTER, CLASSIC] {
            self.step(&format!("Kill {name}"));
            let old = self.fleet.wait_for_pid(name, None)?;
            let killed = Instant::now();
            processes::signal(old, Signal::KILL);
            let status = self.fleet.wait_for(&format!("{name} to be restarted"), |status| {
                agent(status, name).is_some_and(|agent| agent["state"] == "running" && agent["restarts"] == 1)
            })?;
            let new =
                agent(&status, name).and_then(|agent| pid(&agent["pid"])).context("the status has no pid for it")?;
            ensure!(new != old, "the status of {name} still has pid {old}, which was killed");
            println!("  kill -KILL {old}: restarted with pid {new} after {:.1} s", killed.elapsed().as_secs_f64());
        }
        self.verified("a killed sub-agent is restarted with a new pid");
        Ok(())
    }

    fn kill_manager(&mut self) -> Result<()> {
        self.step("Kill the manager");
        let before = self.fleet.wait_for_pid(EXPORTER, None)?;
        let status = self.fleet.status()?;
        let old = pid(&status["spm"]["pid"]).context("the status has no pid of the manager")?;
        let killed = Instant::now();
        processes::signal(old, Signal::KILL);
        let status = self.fleet.wait_for("a new manager", |status| {
            pid(&status["spm"]["pid"]).is_some_and(|new| new != old) && status["state"] == "running"
        })?;
        let new = pid(&status["spm"]["pid"]).context("it was waited for")?;
        println!("  kill -KILL {old}: the watchdog started pid {new} after {:.1} s", killed.elapsed().as_secs_f64());
        let after = self.fleet.wait_for_pid(EXPORTER, None)?;
        ensure!(before == after, "{EXPORTER} had pid {before} and has {after} now");
        println!("  {EXPORTER} still has pid {after}");
        self.verified("the watchdog restarts a killed manager, which adopts its running sub-agents");
        Ok(())
    }

    fn change_version(&mut self, port: u16) -> Result<()> {
        self.step(&format!("Set {EXPORTER} to {SECOND} in fleet.toml"));
        self.write_fleet(SECOND)?;
        let changed = Instant::now();
        self.fleet.wait_for("the new release", |status| {
            agent(status, EXPORTER).is_some_and(|agent| agent["version"] == SECOND && agent["state"] == "running")
        })?;
        println!("  running after {:.1} s", changed.elapsed().as_secs_f64());
        let load = try_for(fleet::SOON, || http_get(port, "/metrics").ok().filter(|metrics| has_metric(metrics)));
        let load = load.context("the new release does not report the load")?;
        println!("  {}", load.lines().find(|line| line.starts_with(ADDED_METRIC)).unwrap_or_default());
        self.run(&mut self.fleet.control(&["status"]))?;
        self.verified("a version changed in fleet.toml is installed and runs");
        Ok(())
    }

    fn roll_back(&mut self) -> Result<()> {
        self.step(&format!("Set {EXPORTER} to {BAD} in fleet.toml: its program exits at once"));
        let bystander = self.fleet.wait_for_pid(CLASSIC, None)?;
        self.write_fleet(BAD)?;
        let changed = Instant::now();
        self.fleet.wait_for("the bad release to be rolled back", |status| {
            agent(status, EXPORTER).is_some_and(|agent| {
                agent["version"] == SECOND && agent["state"] == "running" && agent["skipped"][0]["version"] == BAD
            })
        })?;
        println!("  {SECOND} runs again after {:.1} s", changed.elapsed().as_secs_f64());
        self.run(&mut self.fleet.control(&["status"]))?;
        self.run(&mut self.fleet.control(&["status", "--history"]))?;
        let after = self.fleet.wait_for_pid(CLASSIC, None)?;
        ensure!(bystander == after, "{CLASSIC} had pid {bystander} and has {after} now");
        self.verified("a bad release is rolled back automatically and skipped; other sub-agents keep running");
        Ok(())
    }

    fn upgrade_manager(&mut self) -> Result<()> {
        self.step(&format!("Set the manager to {NEXT_MANAGER} in fleet.toml, with a trial of 5 s instead of 30 s"));
        let settings = self.fleet.home().join("etc/conf.toml");
        fs::write(&settings, fs::read_to_string(&settings)? + "\nupgradeTrial = \"5s\"\n")?;
        let before = [EXPORTER, CLASSIC].map(|name| self.fleet.wait_for_pid(name, None));
        self.write_fleet_with(SECOND, NEXT_MANAGER)?;
        let changed = Instant::now();
        self.fleet.wait_for("the new manager on trial", |status| {
            status["version"] == NEXT_MANAGER && status["upgrade"]["phase"] == "trial"
        })?;
        println!(
            "  on trial after {:.1} s, supervised by the watchdog, which still runs {MANAGER}",
            changed.elapsed().as_secs_f64()
        );
        self.fleet.wait_for("the new manager to be committed", |status| {
            status["version"] == NEXT_MANAGER && status["upgrade"].is_null() && status["state"] == "running"
        })?;
        println!("  committed after {:.1} s", changed.elapsed().as_secs_f64());
        self.run(&mut self.fleet.control(&["status"]))?;
        for (name, before) in [EXPORTER, CLASSIC].into_iter().zip(before) {
            let (before, after) = (before?, self.fleet.wait_for_pid(name, None)?);
            ensure!(before == after, "{name} had pid {before} and has {after} now");
        }
        self.verified("the manager upgrades itself after a trial, and every sub-agent keeps its process");
        Ok(())
    }

    fn stop_and_uninstall(&mut self, port: u16) -> Result<()> {
        self.step("Stop the host");
        self.run(&mut self.fleet.control(&["stop"]))?;
        let left = processes::of_home(&self.fleet.home());
        ensure!(left.is_empty(), "still running after the stop: {left:?}");
        ensure!(http_get(port, "/metrics").is_err(), "the exporter still responds");
        let output = self.fleet.control(&["status"]).output()?;
        ensure!(
            output.status.code() == Some(3),
            "the status of a stopped installation exits with {}, not 3",
            output.status
        );
        println!("  no process is left, and the exporter's port is closed");
        self.verified("a stop stops every process, and the status then exits with code 3");

        self.step("Uninstall");
        self.run(&mut self.fleet.control(&["uninstall", "--yes"]))?;
        let left = processes::of_home(&self.fleet.home());
        ensure!(left.is_empty(), "still running after the uninstallation: {left:?}");
        if self.fleet.home().exists() {
            let names = fs::read_dir(self.fleet.home())?.flatten().map(|entry| entry.file_name());
            bail!("files left in {}: {:?}", self.fleet.home().display(), names.collect::<Vec<_>>());
        }
        println!("  no process and no file is left");
        self.verified("uninstalling leaves no process and no file");
        Ok(())
    }

    fn leave(&mut self, port: u16, gateway: u32) {
        self.fleet.keep();
        let home = self.fleet.home().display().to_string();
        let aops = format!("{home}/bin/aops");
        println!(
            "\nThe fleet is still running. Try:
  {aops} control status
  {aops} control logs -f
  {aops} control logs {EXPORTER}
  curl -s http://127.0.0.1:{port}/metrics | head
  edit {}      (versions, env, cmd = \"stop\"; applied within seconds)
  kill -KILL a pid of the status, and check the status again

To remove it:
  {aops} control uninstall --yes; kill {gateway}; rm -r {}",
            self.fleet.depot().join("fleet.toml").display(),
            self.fleet.path("").display(),
        );
    }

    fn write_fleet(&self, version: &str) -> Result<()> {
        self.write_fleet_with(version, MANAGER)
    }

    fn write_fleet_with(&self, version: &str, manager: &str) -> Result<()> {
        let text = format!(
            "heartbeatInterval = \"1s\"\n\n[manager]\nversion = \"{manager}\"\n\n[agents.{EXPORTER}]\nversion = \"{version}\"\nenv = {{ GOMAXPROCS = \"1\" }}\n\n\
             [agents.{CLASSIC}]\nversion = \"3.1\"\n"
        );
        show(&text);
        self.fleet.write_fleet(&text)
    }

    fn step(&mut self, what: &str) {
        self.step += 1;
        println!("\n{}. {what}", self.step);
    }

    fn verified(&mut self, fact: &str) {
        self.verified.push(fact.to_owned());
    }

    /// Runs a command and prints it, as a user would type it, with its output.
    fn run(&self, command: &mut Command) -> Result<()> {
        let directory = self.fleet.path("").display().to_string();
        println!("  $ {}", command::describe(command).replace(&directory, "…/"));
        let output = command.output().with_context(|| format!("cannot run {}", command::describe(command)))?;
        show(&String::from_utf8_lossy(&output.stderr));
        show(&String::from_utf8_lossy(&output.stdout));
        ensure!(output.status.success(), "`{}` failed: {}", command::describe(command), output.status);
        Ok(())
    }
}

fn show(text: &str) {
    for line in text.lines() {
        println!("    {line}");
    }
}

fn has_metric(metrics: &str) -> bool {
    metrics.lines().any(|line| line.starts_with(ADDED_METRIC))
}

fn exporter_package(program: &Path, version: &str, flag: &str, port: u16) -> Result<Package> {
    // A short probation, for the demo.
    let listen = format!("--web.listen-address=127.0.0.1:{port}");
    let content = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    Ok(Package::native(EXPORTER, version, &["bin/node_exporter", &listen, flag], "probation = \"3s\"").with_file(
        "bin/node_exporter",
        content,
        0o755,
    ))
}

/// The program of Debian's node exporter, unpacked from its package; nothing is installed.
fn exporter() -> Result<PathBuf> {
    let unpacked = workspace::cached("node-exporter", |unfinished| {
        say("fetching Debian's package prometheus-node-exporter (once; it is unpacked, not installed)");
        fs::create_dir_all(unfinished)?;
        Private::of(rootfs::SUITE)?.unpack("prometheus-node-exporter", unfinished)
    })?;
    Ok(unpacked.join("usr/bin/prometheus-node-exporter"))
}

fn build() -> Result<PathBuf> {
    command::run(cargo().current_dir(workspace::root()).args(["build", "--locked", "-p", "aops"]))?;
    Ok(workspace::target().join("debug/aops"))
}
