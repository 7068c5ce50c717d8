//! A host that goes through every change of its releases, recorded.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::event::Recording;
use super::layout::Layout;
use super::recorder::Recorder;
use crate::command::say;
use crate::fleet::{Fleet, agent, next_manager, pid, quietly};
use crate::package::Package;
use crate::trace::{Observer, Trace};
use crate::wait::try_every;

/// For one change under the tracer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);
const POLL: Duration = Duration::from_millis(300);

/// A sub-agent that is upgraded, one that must not notice, and one with a `control` script that is removed in the end.
const CHANGED: &str = "changed";
const BYSTANDER: &str = "bystander";
const REMOVED: &str = "removed";

/// The releases of the sub-agent and of the manager: installed, good, bad.
const RELEASES: [&str; 3] = ["7.1.0", "7.1.1", "7.1.2"];
const MANAGERS: [&str; 3] = ["0.1.0", "0.1.1", "0.1.2"];
/// The release that the installer replaces the manager with.
const INSTALLED: &str = "0.1.3";
/// Of every release but the first ones, so that a commit raises it.
const EPOCH: &str = "1";

/// A program that is good in every role but the manager's.
const BAD_MANAGER: &str = r#"#!/bin/sh
case "$0 $*" in
*preflight*|*--version*) exec @GOOD@ "$@" ;;
*aops-spm\ *) exit 1 ;;
*aops-spa\ *) exec @GOOD@ spa "$@" ;;
*) exec @GOOD@ "$@" ;;
esac
"#;

struct Host {
    fleet: Fleet,
    started: Instant,
    trace: Trace,
    recorder: Arc<Recorder>,
    executable: PathBuf,
    /// The ordered releases; no manager is ordered before the first upgrade.
    manager: Option<&'static str>,
    release: &'static str,
    has_removed: bool,
}

/// Takes a new host through every change; returns what its processes did.
pub(super) fn record(executable: &Path) -> Result<(Layout, Recording)> {
    let mut host = Host::new(executable)?;
    let outcome = host.change_everything();
    outcome.with_context(|| format!("the recorded host fails\n{}", host.fleet.logs()))?;
    host.trace.check()?;
    host.trace.end()?;
    Ok((Layout::new(&host.fleet.home()), host.recorder.take()))
}

impl Host {
    fn new(executable: &Path) -> Result<Host> {
        let fleet = Fleet::new(executable)?;
        quietly(&mut fleet.gateway("init"))?;
        publish(&fleet, executable)?;
        let recorder = Arc::new(Recorder::new(&fleet.home()));
        let trace = Trace::new(Arc::clone(&recorder) as Arc<dyn Observer>);
        let executable = executable.to_owned();
        let started = Instant::now();
        let (manager, release, has_removed) = (None, RELEASES[0], true);
        let mut host = Host { fleet, started, trace, recorder, executable, manager, release, has_removed };
        // The gateway has the order when the first heartbeat comes; the next one would come half a minute later.
        host.order()?;
        host.fleet.start_gateway()?;
        Ok(host)
    }

    fn change_everything(&mut self) -> Result<()> {
        self.begin("a first installation");
        self.install(MANAGERS[0])?;
        // Before the manager reads it next: the shortest trial.
        let settings = self.fleet.home().join("etc/conf.toml");
        let text = std::fs::read_to_string(&settings).context("cannot read the settings")?;
        std::fs::write(&settings, text + "\nupgradeTrial = \"5s\"\n").context("cannot write the settings")?;
        self.wait("the sub-agents to run", |status| agents(status) == 3)?;

        self.begin("a sub-agent's upgrade");
        self.release = RELEASES[1];
        self.order()?;
        self.wait("the sub-agent's upgrade", |status| version(status) == Some(RELEASES[1]))?;

        self.begin("a sub-agent's roll back");
        self.release = RELEASES[2];
        self.order()?;
        let is_back = |status: &Value| {
            let is_skipped = agent(status, CHANGED).is_some_and(|agent| !agent["skipped"].is_null());
            is_skipped && version(status) == Some(RELEASES[1])
        };
        self.wait("the sub-agent's roll back", is_back)?;

        self.begin("a self-upgrade");
        self.manager = Some(MANAGERS[1]);
        self.order()?;
        self.wait("the self-upgrade", |status| status["version"] == MANAGERS[1])?;

        self.begin("a self-upgrade's roll back");
        self.manager = Some(MANAGERS[2]);
        self.order()?;
        self.wait("the self-upgrade's roll back", |status| {
            status["version"] == MANAGERS[1] && problems(status).contains(MANAGERS[2])
        })?;

        self.begin("an installation's roll back");
        self.manager = None;
        self.order()?;
        let code = self.try_install(MANAGERS[2])?;
        ensure!(code == 1, "the installation of a bad manager ends with exit code {code}");
        self.wait("the previous manager", |status| status["version"] == MANAGERS[1])?;

        self.begin("an installation over the running home");
        self.install(INSTALLED)?;
        self.wait("the new manager", |status| status["version"] == INSTALLED)?;

        self.begin("a sub-agent's removal");
        self.has_removed = false;
        self.order()?;
        self.wait("the sub-agent's removal", |status| agents(status) == 2)?;

        self.begin("a stop");
        self.control(&["stop"])?;
        self.begin("a start");
        self.control(&["start"])?;
        self.wait("the start", |status| agents(status) == 2)
    }

    fn begin(&self, change: &'static str) {
        say(&format!("durability: {change}, after {} s", self.started.elapsed().as_secs()));
        self.recorder.begin(change);
    }

    fn order(&self) -> Result<()> {
        let manager = self.manager.map(|version| format!("manager.version = {version:?}\n")).unwrap_or_default();
        let removed = if self.has_removed { format!("[agents.{REMOVED}]\nversion = \"1\"\n") } else { String::new() };
        self.fleet.write_fleet(&format!(
            "heartbeatInterval = \"1s\"\nremovalDelay = \"0s\"\n{manager}{removed}\
             [agents.{BYSTANDER}]\nversion = \"1\"\n[agents.{CHANGED}]\nversion = {:?}\n",
            self.release
        ))
    }

    fn install(&self, version: &str) -> Result<()> {
        let code = self.try_install(version)?;
        ensure!(code == 0, "the installation of {version} ends with exit code {code}");
        Ok(())
    }

    fn try_install(&self, version: &str) -> Result<i32> {
        let mut command = words(&self.fleet.install(&self.executable));
        command.extend(["--version".to_owned(), version.to_owned()]);
        self.trace.run(&command, &[])
    }

    fn control(&self, arguments: &[&str]) -> Result<()> {
        let home = self.fleet.home().display().to_string();
        let code = self.trace.run(&words(&self.fleet.control(arguments)), &[("AOPS_HOME".to_owned(), home)])?;
        ensure!(code == 0, "`aops control {}` ends with exit code {code}", arguments.join(" "));
        Ok(())
    }

    /// Waits until the host has settled and is as `wanted`.
    fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        let is_reached = |status: &Value| is_settled(status) && wanted(status);
        let reached = try_every(POLL, PATIENCE, || self.fleet.status().ok().filter(is_reached));
        reached.map(drop).with_context(|| match self.fleet.status() {
            Ok(status) => format!("timed out after {PATIENCE:?} waiting for {what}; the last status: {status:#}"),
            Err(error) => format!("timed out after {PATIENCE:?} waiting for {what}: {error:#}"),
        })
    }
}

fn publish(fleet: &Fleet, executable: &Path) -> Result<()> {
    let key = second_key(fleet)?;
    let bad = BAD_MANAGER.replace("@GOOD@", &executable.display().to_string());
    let first = [
        Package::sleeper(BYSTANDER, "1"),
        Package::control_sleeper(REMOVED, "1"),
        Package::sleeper(CHANGED, RELEASES[0]),
        next_manager(executable, MANAGERS[0])?,
    ];
    let later = [
        Package::sleeper(CHANGED, RELEASES[1]),
        Package::script(CHANGED, RELEASES[2], "exit 1", ""),
        next_manager(executable, MANAGERS[1])?.with_file("keys/second.pub", &key, 0o644),
        Package::plain("aops-spm", MANAGERS[2]).with_file("bin/aops", bad, 0o755),
        next_manager(executable, INSTALLED)?,
    ];
    for package in &first {
        quietly(fleet.gateway("publish").args(package.arguments()))?;
    }
    for package in &later {
        quietly(fleet.gateway("publish").args(["--epoch", EPOCH]).args(package.arguments()))?;
    }
    Ok(())
}

/// Another package key, which a release of the manager brings.
fn second_key(fleet: &Fleet) -> Result<String> {
    let directory = fleet.path("second");
    let mut command = std::process::Command::new(fleet.gateway("init").get_program());
    quietly(command.args(["gateway", "init", "--dir"]).arg(&directory))?;
    std::fs::read_to_string(directory.join("keys/aops.pub")).context("cannot read a package key")
}

fn version(status: &Value) -> Option<&str> {
    agent(status, CHANGED)?["version"].as_str()
}

fn agents(status: &Value) -> usize {
    status["agents"].as_array().map_or(0, Vec::len)
}

fn is_settled(status: &Value) -> bool {
    let mut agents = status["agents"].as_array().into_iter().flatten();
    matches!(status["state"].as_str(), Some("running" | "degraded"))
        && status["upgrade"].is_null()
        && pid(&status["spm"]["pid"]).is_some()
        && pid(&status["spa"]["pid"]).is_some()
        && agents.all(|agent| agent["state"] == "running" && agent["upgrade"].is_null())
        && status["gateway"]["connected"] == true
}

fn words(command: &std::process::Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}

/// What the host reports as problems; a skipped release is one.
fn problems(status: &Value) -> String {
    status["problems"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}
