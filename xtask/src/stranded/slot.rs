//! A home whose upgrades are killed, with a gateway of its own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Change;
use super::step::{Naming, Step};
use super::watch::{Target, Watch};
use crate::command::{read, say};
use crate::fleet::{Fleet, agent, next_manager, pid, quietly};
use crate::package::Package;
use crate::wait::try_every;

/// For an upgrade under the tracer, and for a recovery, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// The poll interval of a status: each costs the traced manager hundreds of stops.
const POLL: Duration = Duration::from_millis(300);

/// For the removal of what an upgrade no longer needs.
const SWEPT: Duration = Duration::from_secs(60);

/// The releases of the manager, and of the sub-agent that is upgraded. A host keeps two, so each of three must be fetched again in its turn.
const MANAGERS: [&str; 3] = ["0.1.0", "0.1.1", "0.1.2"];
const RELEASES: [&str; 3] = ["7.1.0", "7.1.1", "7.1.2"];
/// The sub-agent that is upgraded, and one that must not notice.
const CHANGED: &str = "changed";
const BYSTANDER: &str = "bystander";

/// Where a run ended before the second try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Old,
    New,
    /// The step did not come.
    Missed,
}

/// A gateway's directory with every package, which each home's gateway gets a copy of.
pub(super) struct Depot {
    executable: PathBuf,
    fleet: Fleet,
}

impl Depot {
    pub(super) fn new(executable: &Path) -> Result<Depot> {
        say("publishing packages");
        let fleet = Fleet::new(executable)?;
        quietly(&mut fleet.gateway("init"))?;
        let mut packages = vec![Package::sleeper(BYSTANDER, "1")];
        packages.extend(RELEASES.map(|version| Package::sleeper(CHANGED, version)));
        for version in MANAGERS {
            packages.push(next_manager(executable, version)?);
        }
        for package in &packages {
            quietly(fleet.gateway("publish").args(package.arguments()))?;
        }
        Ok(Depot { executable: executable.to_owned(), fleet })
    }
}

pub(super) struct Slot {
    fleet: Fleet,
    watch: Watch,
    /// Which releases are ordered.
    manager: usize,
    release: usize,
    /// Whether the gateway orders a release of the manager.
    is_manager_ordered: bool,
    /// What was beyond the usual files after the last run.
    left_over: BTreeSet<String>,
    bystander: Option<u32>,
}

impl Slot {
    /// A host that runs the first releases, traced.
    pub(super) fn new(depot: &Depot) -> Result<Slot> {
        let fleet = Fleet::new(&depot.executable)?;
        quietly(Command::new("cp").arg("-a").args([depot.fleet.depot(), fleet.depot()]))?;
        let watch = Watch::new(&fleet.home(), Naming::default());
        let (left_over, bystander) = (BTreeSet::new(), None);
        let mut slot = Slot { fleet, watch, manager: 0, release: 0, is_manager_ordered: false, left_over, bystander };
        slot.order(Change::SubAgent)?;
        slot.fleet.start_gateway()?;
        ensure!(slot.install(&depot.executable, MANAGERS[0])? == 0, "cannot install\n{}", slot.logs());
        let settings = slot.fleet.home().join("etc/conf.toml");
        let text = std::fs::read_to_string(&settings).context("cannot read the settings")?;
        std::fs::write(&settings, text + "\nupgradeTrial = \"5s\"\n").context("cannot write the settings")?;
        let status = slot.settled("the host to run")?;
        slot.bystander = agent(&status, BYSTANDER).and_then(|agent| pid(&agent["pid"]));
        Ok(slot)
    }

    pub(super) fn logs(&self) -> String {
        self.fleet.logs()
    }

    /// One upgrade that nothing disturbs: its steps.
    pub(super) fn reference(&mut self, change: Change) -> Result<Vec<Step>> {
        self.prepare(change)?;
        self.watch.arm(self.naming(change), None);
        self.begin(change)?;
        self.reached()?;
        let quiet = || (self.watch.is_quiet() && !self.has_a_third_release()).then_some(());
        try_every(POLL, PATIENCE, quiet).context("the host does not come to rest after an upgrade")?;
        self.watch.check()?;
        Ok(self.watch.disarm())
    }

    /// One upgrade, a process killed at the target, and all that must hold after it.
    pub(super) fn kill_at(&mut self, change: Change, target: &Target, usual: &BTreeSet<String>) -> Result<Outcome> {
        self.prepare(change)?;
        self.watch.arm(self.naming(change), Some(target.clone()));
        let exit = self.begin(change)?;
        let killed = try_every(POLL, PATIENCE, || {
            let is_over = || self.has_reached().is_ok_and(|reached| reached) && self.watch.is_quiet();
            self.watch.killed().map(Some).or_else(|| is_over().then_some(None))
        });
        self.watch.check()?;
        match killed {
            None => bail!("neither the step nor the end of the upgrade came"),
            Some(None) => {
                self.watch.disarm();
                self.no_left_over(usual)?;
                return Ok(Outcome::Missed);
            }
            Some(Some(_)) => (),
        }
        if target.together {
            // A sentinel or the installer may have started others already.
            let runs = || self.fleet.status().is_ok_and(|status| is_settled(&status));
            try_every(POLL, PATIENCE, || (self.watch.live() == 0 || runs()).then_some(()))
                .context("killed processes do not end")?;
            self.start()?;
        }
        self.watch.disarm();
        let interrupted = change == Change::Install && exit != 0;
        let status = self.settled("the host to run again")?;
        let outcome = if self.is_target(&status) { Outcome::New } else { Outcome::Old };
        if outcome == Outcome::Old || interrupted {
            self.try_again(change, &status)?;
        }
        self.reached()?;
        self.no_left_over(usual)?;
        Ok(outcome)
    }

    /// The release before and after the change that is next.
    fn naming(&self, change: Change) -> Naming {
        let (versions, now) = match change {
            Change::SubAgent => (RELEASES, self.release),
            Change::Manager | Change::Install => (MANAGERS, self.manager),
        };
        let [from, to, older] = [now, next(now), next(next(now))].map(|index| versions[index].to_owned());
        Naming { from, to, older }
    }

    /// What is no step of the change.
    fn prepare(&mut self, change: Change) -> Result<()> {
        if change == Change::Install { self.revoke_order() } else { Ok(()) }
    }

    /// Orders the other release; of an installation, its exit code.
    fn begin(&mut self, change: Change) -> Result<i32> {
        match change {
            Change::SubAgent => self.release = next(self.release),
            Change::Manager | Change::Install => self.manager = next(self.manager),
        }
        if change == Change::Install {
            return self.install_ordered();
        }
        self.is_manager_ordered |= change == Change::Manager;
        self.order(change).map(|()| 0)
    }

    fn order(&self, change: Change) -> Result<()> {
        self.fleet.write_fleet(&self.fleet_file(change))
    }

    fn fleet_file(&self, change: Change) -> String {
        let manager = if change == Change::Manager {
            format!("manager.version = {:?}\n", MANAGERS[self.manager])
        } else {
            String::new()
        };
        format!(
            "heartbeatInterval = \"1s\"\nremovalDelay = \"0s\"\n{manager}[agents.{BYSTANDER}]\nversion = \"1\"\n[agents.{CHANGED}]\nversion = {:?}\n",
            RELEASES[self.release]
        )
    }

    /// From now on the gateway orders no release of the manager: it would replace the installed one.
    fn revoke_order(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.is_manager_ordered) {
            return Ok(());
        }
        self.fleet.apply(&self.fleet_file(Change::Install))?;
        // The answer to an earlier heartbeat may still be on its way.
        let last = || Some(self.fleet.status().ok()?["gateway"]["lastHeartbeat"].clone());
        let (first, mut seen) = (last(), BTreeSet::new());
        let is_newer = || {
            seen.extend(last().filter(|now| Some(now) != first.as_ref()).map(|now| now.to_string()));
            (seen.len() > 1).then_some(())
        };
        try_every(POLL, PATIENCE, is_newer).context("the host does not send heartbeats")
    }

    fn install_ordered(&self) -> Result<i32> {
        let installer = self.fleet.home().join("bin/aops");
        let installer = if installer.is_file() { installer } else { self.fleet.home().join("bin/aops.prev") };
        self.install(&installer, MANAGERS[self.manager])
    }

    /// `aops install` under the tracer; its exit code.
    fn install(&self, executable: &Path, version: &str) -> Result<i32> {
        let mut words = words(&self.fleet.install(executable));
        words.extend(["--version".to_owned(), version.to_owned()]);
        self.watch.run(&words, &[])
    }

    /// Starts both roles, as a boot does.
    fn start(&self) -> Result<()> {
        let control = self.fleet.control(&["start"]);
        let home = self.fleet.home().display().to_string();
        self.watch.run(&words(&control), &[("AOPS_HOME".to_owned(), home)]).map(drop)
    }

    fn try_again(&mut self, change: Change, status: &Value) -> Result<()> {
        match change {
            Change::Install => {
                let code = self.install_ordered()?;
                ensure!(code == 0, "the second installation failed with exit code {code}");
            }
            Change::Manager | Change::SubAgent => {
                let name = if change == Change::Manager { "aops-spm" } else { CHANGED };
                let problems = status["problems"].as_array().map(Vec::as_slice).unwrap_or_default();
                let advice = format!("control retry {name}");
                if problems.iter().any(|problem| problem.as_str().is_some_and(|text| text.contains(&advice))) {
                    read(&mut self.fleet.control(&["retry", name]))?;
                }
            }
        }
        Ok(())
    }

    /// Waits until the host runs one release or the other, with both roles and every sub-agent, and has reported it.
    fn settled(&self, what: &str) -> Result<Value> {
        let status = self.wait_for(what, is_settled)?;
        if let Some(bystander) = self.bystander {
            let now = agent(&status, BYSTANDER).and_then(|agent| pid(&agent["pid"]));
            ensure!(now == Some(bystander), "{BYSTANDER} has the process {now:?} instead of {bystander}");
        }
        Ok(status)
    }

    fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = None;
        let found = try_every(POLL, PATIENCE, || {
            let status = self.fleet.status();
            let found = status.as_ref().ok().filter(|status| wanted(status)).cloned();
            last = Some(status);
            found
        });
        let last = || match last {
            Some(Ok(status)) => format!("{status:#}"),
            Some(Err(error)) => format!("{error:#}"),
            None => "none".to_owned(),
        };
        found.with_context(|| format!("timed out after {PATIENCE:?} waiting for {what}; the last status: {}", last()))
    }

    fn is_target(&self, status: &Value) -> bool {
        let release = agent(status, CHANGED).is_some_and(|agent| agent["version"] == RELEASES[self.release]);
        release && status["version"] == MANAGERS[self.manager]
    }

    fn has_reached(&self) -> Result<bool> {
        let status = self.fleet.status()?;
        Ok(is_settled(&status) && self.is_target(&status))
    }

    fn reached(&self) -> Result<()> {
        let status = self.wait_for("the ordered release", |status| is_settled(status) && self.is_target(status))?;
        let now = agent(&status, BYSTANDER).and_then(|agent| pid(&agent["pid"]));
        ensure!(self.bystander.is_none() || now == self.bystander, "{BYSTANDER} was restarted");
        Ok(())
    }

    /// What a killed run left must be gone after the next one.
    fn no_left_over(&mut self, usual: &BTreeSet<String>) -> Result<()> {
        let beyond = || -> Result<BTreeSet<String>> { Ok(self.files()?.difference(usual).cloned().collect()) };
        // The host removes old releases after it has reported the new one.
        let is_swept = || beyond().is_ok_and(|now| now.is_disjoint(&self.left_over));
        if try_every(POLL, SWEPT, || is_swept().then_some(())).is_none() {
            let stays: Vec<_> = beyond()?.intersection(&self.left_over).cloned().collect();
            bail!("left over after a second run: {}", stays.join(", "));
        }
        self.left_over = beyond()?;
        Ok(())
    }

    /// The releases of the changed sub-agent in the home.
    fn kept(&self) -> Vec<&'static str> {
        let releases = self.fleet.home().join("agents").join(CHANGED);
        RELEASES.into_iter().filter(|version| releases.join(version).is_dir()).collect()
    }

    /// Whether the host has not removed yet what it no longer needs.
    fn has_a_third_release(&self) -> bool {
        self.kept().len() > 2
    }

    /// Every file of the home by its name. Which two of the three releases a host keeps differs from run to run, so they are numbered.
    pub(super) fn files(&self) -> Result<BTreeSet<String>> {
        let home = self.fleet.home();
        let mut found = BTreeSet::new();
        let kept = self.kept();
        let mut directories = vec![home.clone()];
        while let Some(directory) = directories.pop() {
            let entries = match std::fs::read_dir(&directory) {
                // Removed since its parent was listed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                entries => entries.with_context(|| format!("cannot list {}", directory.display()))?,
            };
            for entry in entries {
                let Ok(entry) = entry else { continue };
                let path = entry.path();
                let name = path.strip_prefix(&home).unwrap_or(&path).display().to_string();
                // A sub-agent that was ever restarted has its previous record, which its next start reuses.
                if !(name.starts_with("run/agents/") && name.ends_with(".json.old")) {
                    found.insert(numbered(&name, &kept));
                }
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    directories.push(path);
                }
            }
        }
        Ok(found)
    }
}

/// The name of a file, with its release of the changed sub-agent as a number among those that are kept.
fn numbered(name: &str, kept: &[&str]) -> String {
    let name = MANAGERS.iter().fold(name.to_owned(), |name, version| name.replace(version, "VERSION"));
    let number =
        |version: &str| kept.iter().position(|kept| *kept == version).map_or("?".to_owned(), |at| at.to_string());
    RELEASES.iter().fold(name, |name, version| name.replace(version, &format!("RELEASE-{}", number(version))))
}

fn next(release: usize) -> usize {
    (release + 1) % MANAGERS.len()
}

fn is_settled(status: &Value) -> bool {
    let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
    matches!(status["state"].as_str(), Some("running" | "degraded"))
        && status["upgrade"].is_null()
        && pid(&status["spm"]["pid"]).is_some()
        && pid(&status["spa"]["pid"]).is_some()
        && agents.len() == 2
        && agents.iter().all(|agent| agent["state"] == "running" && agent["upgrade"].is_null())
        && status["gateway"]["connected"] == true
}

fn words(command: &std::process::Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}
