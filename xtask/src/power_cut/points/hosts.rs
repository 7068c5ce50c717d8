//! The hosts in a virtual machine (`guest.sh`), and what must hold for each of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::super::machine::{Hardware, Machine};
use super::setup::{BYSTANDER, CHANGED, PROGRAM, Setup};
use crate::fleet::{agent, pid};

/// The deadline for one command, on a busy machine.
const SOON: Duration = Duration::from_secs(400);

/// The releases that a host is to have in the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) manager: &'static str,
    pub(super) release: &'static str,
}

/// A virtual machine whose hosts have names: numbers.
pub(super) struct Hosts(Machine);

impl Hosts {
    pub(super) fn boot(directory: &Path, hardware: &Hardware<'_>) -> Result<Hosts> {
        let mut hosts = Hosts(Machine::boot(directory, hardware)?);
        hosts.verb("set-up")?;
        Ok(hosts)
    }

    /// Runs one verb of `guest.sh`; returns its output.
    pub(super) fn verb(&mut self, words: &str) -> Result<String> {
        self.0.read(&format!("{PROGRAM} {words}"), SOON)
    }

    /// Runs verbs at the same time.
    pub(super) fn together(&mut self, verbs: impl Iterator<Item = String>) -> Result<()> {
        let verbs: Vec<String> = verbs.collect();
        self.verb(&format!("together <<'END'\n{}\nEND", verbs.join("\n"))).map(drop)
    }

    /// Runs a shell script outside of the hosts.
    pub(super) fn shell(&mut self, script: &str) -> Result<String> {
        self.0.read(script, SOON)
    }

    /// The status of each of these hosts whose manager answers.
    pub(super) fn statuses(&mut self, names: &[usize]) -> Result<BTreeMap<usize, Value>> {
        let lines = self.verb(&words("status", names))?;
        let parsed = lines.lines().filter_map(|line| {
            let (name, reply) = line.split_once(' ')?;
            let mut reply: Value = serde_json::from_str(reply).ok()?;
            Some((name.parse().ok()?, reply["status"].take()))
        });
        Ok(parsed.filter(|(_, status)| status.is_object()).collect())
    }

    /// What a power cut left of each of these homes, before it is started.
    pub(super) fn left(&mut self, names: &[usize]) -> Result<BTreeMap<usize, Facts>> {
        let lines = self.verb(&words("left", names))?;
        Ok(names.iter().map(|name| (*name, Facts::parse(&lines, *name))).collect())
    }

    /// The ends of a host's logs.
    pub(super) fn logs(&mut self, name: usize) -> String {
        self.verb(&format!("logs {name}")).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Checks what a host has on its disk and has reported, once it is settled in what is wanted.
    pub(super) fn check(&mut self, name: usize, wanted: Wanted, setup: &Setup<'_>) -> Result<()> {
        Facts::parse(&self.verb(&words("facts", &[name]))?, name).check(wanted, setup)
    }

    pub(super) fn booted_in(&self) -> Duration {
        self.0.booted_in()
    }

    pub(super) fn cut(self) -> Result<()> {
        self.0.cut()
    }
}

/// A verb and the hosts that it is for.
fn words(verb: &str, names: &[usize]) -> String {
    names.iter().fold(verb.to_owned(), |words, name| format!("{words} {name}"))
}

/// Whether a host runs one release or another with both roles and every sub-agent, no upgrade under way, and has reported it.
pub(super) fn is_settled(status: &Value) -> bool {
    let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
    matches!(status["state"].as_str(), Some("running" | "degraded"))
        && status["upgrade"].is_null()
        && ["spm", "spa"].iter().all(|role| pid(&status[*role]["pid"]).is_some())
        && agents.len() == 2
        && agents.iter().all(|agent| agent["state"] == "running" && agent["upgrade"].is_null())
        && status["gateway"]["connected"] == true
}

impl Wanted {
    pub(super) fn is_reached(self, status: &Value) -> bool {
        is_settled(status)
            && status["version"] == self.manager
            && agent(status, CHANGED).is_some_and(|agent| agent["version"] == self.release)
    }
}

/// Values by kind and name.
pub(super) struct Facts(BTreeMap<(String, String), String>);

impl Facts {
    /// The lines of one host.
    fn parse(lines: &str, host: usize) -> Facts {
        let parsed = lines.lines().filter_map(|line| {
            let mut words = line.splitn(4, ' ').map(str::to_owned);
            let mut next = || words.next().unwrap_or_default();
            (next() == host.to_string()).then(|| ((next(), next()), next()))
        });
        Facts(parsed.collect())
    }

    fn get(&self, kind: &str, name: &str) -> Result<&str> {
        let found = self.0.get(&(kind.to_owned(), name.to_owned()));
        found.map(String::as_str).with_context(|| format!("there is no {name} ({kind})"))
    }

    /// The releases of the manager and of the sub-agent that is upgraded.
    pub(super) fn releases(&self) -> (&str, &str) {
        let current = format!("agents/{CHANGED}/current");
        (self.get("version", "bin/aops").unwrap_or_default(), self.get("link", &current).unwrap_or_default())
    }

    /// Checks that no state file is half-written.
    pub(super) fn check_states(&self) -> Result<()> {
        let mut states = 0;
        for (kind, name) in self.0.keys().filter(|(_, name)| name.ends_with(".json")) {
            let text = self.get(kind, name)?;
            serde_json::from_str::<Value>(text).with_context(|| format!("{name} is half-written: {text:?}"))?;
            states += 1;
        }
        ensure!(states > 1, "there are {states} state files");
        let agent_id = self.get("content", "etc/agent-id")?;
        ensure!(agent_id.trim() == "demo", "etc/agent-id has {agent_id:?}");
        Ok(())
    }

    /// Checks that a home has what is wanted, whole, and that the gateway and `control status` show it.
    fn check(&self, wanted: Wanted, setup: &Setup<'_>) -> Result<()> {
        self.check_states()?;
        let changed = format!("agents/{CHANGED}/current");
        for (kind, name, value) in [
            ("digest", "bin/aops", setup.managers[wanted.manager].as_str()),
            ("digest", &format!("{changed}/SUMS"), setup.releases[wanted.release].as_str()),
            ("link", "bin/aops-spm", "aops"),
            ("link", "bin/aops-spa", "aops"),
            ("link", "bin/aops-agent-service", "aops"),
            ("link", &changed, wanted.release),
            ("complete", &format!("agents/{CHANGED}/{}/.complete", wanted.release), ""),
            ("sums", &changed, "right"),
        ] {
            let found = self.get(kind, name)?;
            ensure!(found == value, "the {kind} of {name} is {found} instead of {value}");
        }
        let shown = |what: &str| -> Result<Value> {
            serde_json::from_str(self.get("shown", what)?).with_context(|| format!("the status of {what} is no JSON"))
        };
        let operator = shown("control")?;
        ensure!(wanted.is_reached(&operator), "`control status` does not show {wanted:?}: {operator}");
        check_report(&shown("gateway")?, wanted)
    }
}

/// Checks what the host has reported: its gateway was started with it, and knew nothing of it.
fn check_report(gateway: &Value, wanted: Wanted) -> Result<()> {
    let hosts = gateway["hosts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let [host] = hosts else { bail!("the gateway shows {} hosts: {gateway}", hosts.len()) };
    let release = agent(host, CHANGED);
    let is_reported = host["agentId"] == "demo"
        && host["manager"]["version"] == wanted.manager
        && release.is_some_and(|agent| agent["version"] == wanted.release && agent["state"] == "running")
        && agent(host, BYSTANDER).is_some_and(|agent| agent["state"] == "running");
    ensure!(is_reported, "the gateway does not show {wanted:?}: {host}");
    Ok(())
}
