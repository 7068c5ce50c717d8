//! A host in a virtual machine, with a gateway of its own: it is upgraded, loses power, and must recover without help.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use super::image::Image;
use super::kernel::Kernel;
use super::machine::{Drive, HOST_ADDRESS, Hardware, Machine};
use super::progress::{CHANGES, Change, Phase, Progress};
use super::releases::{BYSTANDER, CHANGED, MANAGERS, RELEASES, publish};
use crate::command::{read, say};
use crate::fleet::{Fleet, agent, pid, quietly};
use crate::wait::try_for;

/// For an upgrade, and for a recovery with an upgrade after it, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(400);
/// For a command in the guest.
const ANSWER: Duration = Duration::from_secs(120);
/// The interval in which the guest itself is queried while the gateway does not show the ordered releases.
const QUERY_INTERVAL: Duration = Duration::from_secs(5);

/// A short trial. The first answer of a new manager may take twice as long: an emulated processor needs some of it.
const TRIAL: &str = "8s";

/// What a home has at rest once it has been upgraded, beside what an installation creates.
const AFTER_UPGRADES: [&str; 5] = [
    "./bin/aops.prev",
    "./run/agents/bystander.json.old",
    "./run/agents/changed.json.old",
    "./state/history.json",
    "./state/upgrade.json",
];

const PROGRESS: &str = include_str!("progress.sh");
const PROGRESS_PATH: &str = "/usr/local/sbin/upgrade-progress";
const PROGRESS_UNIT: &str = "[Unit]\nDescription=Phases of upgrades on the console\nDefaultDependencies=no\n\n[Service]\n\
     ExecStart=/usr/local/sbin/upgrade-progress\n\n[Install]\nWantedBy=multi-user.target\n";

const DEB_PATH: &str = "/root/aops.deb";

/// What hosts are made of.
pub(super) struct Parts<'a> {
    /// What is installed in the guest.
    pub(super) executable: &'a Path,
    pub(super) gateway: &'a Path,
    /// The Debian package with which it is installed, if any.
    pub(super) deb: Option<&'a Path>,
    pub(super) root: &'a Path,
    pub(super) kernel: &'a Kernel,
}

/// What happens to a host in mid-upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    PowerCut,
    /// The clock is set so many days forward, or back.
    ClockJump(i32),
    /// A power cut, and at the boot the clock of the hardware is so many days ahead, or behind.
    PowerCutAndClock(i32),
}

/// An event at a moment of an upgrade.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) event: Event,
    pub(super) target: Phase,
    /// The part of the target's usual time that passes before the event, from 0 to 1.
    pub(super) fraction: f64,
    /// The other change is ordered at the same time.
    pub(super) both: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Release {
    Old,
    New,
}

/// What one event came to.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The phase of the targeted change at the event.
    pub(super) phase: Phase,
    /// The release on the disk after it.
    pub(super) found: Release,
    /// Why the new release was rolled back and skipped, as the host reports it; it was tried again.
    pub(super) skipped: Vec<String>,
    pub(super) took: Duration,
}

pub(super) struct Host<'a> {
    machine: Option<Machine>,
    kernel: &'a Kernel,
    drives: [Drive; 1],
    directory: PathBuf,
    progress: Progress,
    /// Which releases are ordered.
    manager: usize,
    release: usize,
    /// SHA-256 of the executables of [`MANAGERS`].
    executables: Vec<String>,
    /// The files of a home at rest.
    usual: BTreeSet<String>,
    /// Those beyond it after the last cut.
    left_over: BTreeSet<String>,
    fleet: Fleet,
}

impl<'a> Host<'a> {
    /// Installs the first releases in a new machine.
    pub(super) fn new(parts: &Parts<'a>) -> Result<Host<'a>> {
        let fleet = Fleet::new(parts.gateway)?;
        quietly(fleet.gateway("init").args(["--name", HOST_ADDRESS, "--name", "127.0.0.1"]))?;
        let executables = publish(parts.executable, &fleet)?;
        let directory = fleet.path("machine");
        std::fs::create_dir_all(&directory).context("cannot create the directory of a machine")?;
        let disk = directory.join("disk.img");
        image(parts, &fleet).write(&disk)?;
        let started = Instant::now();
        let mut host = Host {
            machine: None,
            kernel: parts.kernel,
            drives: [Drive::new("root", &disk)],
            progress: Progress::of(&directory.join("console.log")),
            directory,
            manager: 0,
            release: 0,
            executables,
            usual: BTreeSet::new(),
            left_over: BTreeSet::new(),
            fleet,
        };
        host.write_order()?;
        host.fleet.start_gateway()?;
        host.boot(None)?;
        let installed = if parts.deb.is_some() { host.install_deb() } else { host.install() };
        installed.with_context(|| format!("cannot install\n{}", host.logs()))?;
        host.reached(Instant::now()).with_context(|| format!("the host does not run\n{}", host.logs()))?;
        let boot = host.machine()?.booted_in().as_secs();
        say(&format!(
            "a machine is up after {boot} s and runs what is ordered after {} s",
            started.elapsed().as_secs()
        ));
        host.usual = host.files()?;
        host.usual.extend(AFTER_UPGRADES.map(str::to_owned));
        Ok(host)
    }

    /// Orders an upgrade, disturbs it at the planned moment, and checks all that must hold after it.
    pub(super) fn disturb(&mut self, plan: &Plan) -> Result<Outcome> {
        let started = Instant::now();
        let changes = if plan.both { CHANGES.to_vec() } else { vec![plan.target.change] };
        self.order(&changes)?;
        let reached = try_for(PATIENCE, || (self.progress.phase(plan.target.change) >= plan.target).then_some(()));
        reached.with_context(|| format!("an upgrade never came to the phase {}", plan.target))?;
        let delay = self.progress.usual(plan.target).mul_f64(plan.fraction);
        try_for(delay, || None::<()>);
        self.machine()?.is_running()?;
        let phase = self.progress.phase(plan.target.change);

        let happened = Instant::now();
        match plan.event {
            Event::PowerCut => self.cut(None)?,
            Event::PowerCutAndClock(days) => self.cut(Some(days))?,
            Event::ClockJump(days) => self.set_clock(days)?,
        }
        let found = self.on_disk(plan.target.change)?;
        let mut skipped = self.reached(happened)?;
        self.check_files()?;
        if found == Release::New {
            self.order(&changes)?;
            skipped.extend(self.reached(happened)?);
            self.check_files()?;
        }
        Ok(Outcome { phase, found, skipped, took: started.elapsed() })
    }

    fn cut(&mut self, clock: Option<i32>) -> Result<()> {
        self.machine.take().context("the machine does not run")?.cut()?;
        self.keep_disk()?;
        self.boot(clock)?;
        self.state_is_whole()
    }

    /// In the guest alone.
    fn set_clock(&mut self, days: i32) -> Result<()> {
        self.machine()?.read(&format!("date -s '{days:+} day'"), ANSWER).map(drop)
    }

    /// The last check: a host that has recovered shuts down in order.
    pub(super) fn shut_down(mut self) -> Result<()> {
        self.machine.take().context("the machine does not run")?.power_off()
    }

    /// Everything that helps to diagnose a failure.
    pub(super) fn logs(&mut self) -> String {
        let script = "cd /opt/aops; tail -n 40 log/*.log | tr -d '\\0'; bin/aops control status --json; \
             cat state/upgrade.json state/releases.json; ls -l bin agents/*; journalctl --no-pager -n 60 -u 'aops-*'";
        match &mut self.machine {
            Some(machine) => match machine.run(script, ANSWER) {
                Ok(ran) => format!("{}{}", ran.stdout, ran.stderr),
                Err(error) => format!("{error:#}\n{}", machine.console()),
            },
            None => "the machine does not run".to_owned(),
        }
    }

    /// The disk as the last cut left it.
    pub(super) fn disk_after_cut(&self) -> PathBuf {
        self.directory.join("after-cut.img")
    }

    fn keep_disk(&self) -> Result<()> {
        let mut copy = Command::new("cp");
        read(copy.args(["--sparse=always", "--"]).arg(&self.drives[0].file).arg(self.disk_after_cut())).map(drop)
    }

    /// With the clock of the hardware so many days ahead, or behind.
    fn boot(&mut self, clock: Option<i32>) -> Result<()> {
        let date = |days| read(Command::new("date").args(["-u", "+%FT%T", "-d"]).arg(format!("{days:+} day")));
        let hardware =
            Hardware { kernel: self.kernel, drives: &self.drives, memory: 512, clock: clock.map(date).transpose()? };
        self.progress.restart();
        self.machine = Some(Machine::boot(&self.directory, &hardware)?);
        Ok(())
    }

    fn machine(&mut self) -> Result<&mut Machine> {
        self.machine.as_mut().context("the machine does not run")
    }

    fn install(&mut self) -> Result<()> {
        let endpoint = self.fleet.url().replace("127.0.0.1", HOST_ADDRESS);
        let script = format!(
            "/root/aops install --version {} --agent-id machine --endpoint {endpoint} --trusted-key /root/aops.pub \
             --ca-cert /root/cert.pem && printf '\\nupgradeTrial = \"{TRIAL}\"\\n' >>/opt/aops/etc/conf.toml && sync",
            MANAGERS[0]
        );
        self.machine()?.read(&script, PATIENCE).map(drop)
    }

    /// As an image or a configuration management does: enrolled unattended, then booted again.
    fn install_deb(&mut self) -> Result<()> {
        let endpoint = self.fleet.url().replace("127.0.0.1", HOST_ADDRESS);
        let script = format!(
            "mkdir -p /etc/aops && printf '%s\\n' 'agentId = \"machine\"' 'endpoint = \"{endpoint}\"' \
             'trustedKeys = [\"/root/aops.pub\"]' 'caCert = \"/root/cert.pem\"' >/etc/aops/enrol.toml && dpkg -i {DEB_PATH} && \
             printf '\\nupgradeTrial = \"{TRIAL}\"\\n' >>/opt/aops/etc/conf.toml && sync"
        );
        self.machine()?.read(&script, PATIENCE)?;
        self.reached(Instant::now()).context("the package does not run what is ordered")?;
        self.machine.take().context("the machine does not run")?.power_off()?;
        self.boot(None)
    }

    /// Orders the next release of each of these.
    fn order(&mut self, changes: &[Change]) -> Result<()> {
        try_for(PATIENCE, || self.progress.is_idle().then_some(()))
            .context("the guest does not show the end of an upgrade")?;
        for change in changes {
            match change {
                Change::Manager => self.manager = (self.manager + 1) % MANAGERS.len(),
                Change::SubAgent => self.release = (self.release + 1) % RELEASES.len(),
            }
            self.progress.begin(*change);
        }
        self.write_order()
    }

    fn write_order(&self) -> Result<()> {
        self.fleet.write_fleet(&format!(
            "heartbeatInterval = \"1s\"\nremovalDelay = \"0s\"\nmanager.version = {:?}\n[agents.{BYSTANDER}]\nversion = \"1\"\n\
             [agents.{CHANGED}]\nversion = {:?}\n",
            MANAGERS[self.manager], RELEASES[self.release]
        ))
    }

    /// What the gateway knows from a heartbeat after `since`.
    fn reported(&self, since: Instant) -> Result<Option<Value>> {
        let status: Value = serde_json::from_str(&read(self.fleet.gateway("status").arg("--json"))?)?;
        let host = &status["hosts"][0];
        let age = host["secondsSinceHeartbeat"].as_u64().map(Duration::from_secs);
        Ok(age.is_some_and(|age| age + Duration::from_secs(1) < since.elapsed()).then(|| host.clone()))
    }

    /// The release that the home has. The executables of the manager end with their version.
    fn on_disk(&mut self, change: Change) -> Result<Release> {
        let (script, ordered) = match change {
            Change::Manager => ("tail -c 5 /opt/aops/bin/aops", MANAGERS[self.manager]),
            Change::SubAgent => ("readlink /opt/aops/agents/changed/current", RELEASES[self.release]),
        };
        let version = self.machine()?.read(script, ANSWER)?;
        Ok(if version.trim() == ordered { Release::New } else { Release::Old })
    }

    /// Waits until both roles and every sub-agent run in the ordered releases, and the gateway has it from a heartbeat after `since`.
    /// A skipped release is tried again; returns why it was skipped.
    fn reached(&mut self, since: Instant) -> Result<Vec<String>> {
        let mut skipped = Vec::new();
        let mut queried = Instant::now();
        let mut last = (Value::Null, Value::Null);
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            let reported = self.reported(since)?.filter(|host| self.is_target(host, &host["manager"]["version"]));
            if reported.is_some() || queried.elapsed() >= QUERY_INTERVAL {
                queried = Instant::now();
                let ran = self.machine()?.run("/opt/aops/bin/aops control status --json", ANSWER)?;
                let status = serde_json::from_str(&ran.stdout).unwrap_or(Value::Null);
                if reported.is_some() && is_settled(&status) && self.is_target(&status, &status["version"]) {
                    return Ok(skipped);
                }
                skipped.extend(self.retry_skipped(&status)?);
                last = (reported.unwrap_or_default(), status);
            }
            try_for(Duration::from_millis(250), || None::<()>);
        }
        bail!(
            "timed out after {PATIENCE:?} waiting for the releases {} and {}; the gateway has: {:#}; the last status: {:#}",
            MANAGERS[self.manager],
            RELEASES[self.release],
            last.0,
            last.1
        )
    }

    /// Whether a status or report shows every sub-agent running, and all of it in the ordered releases.
    fn is_target(&self, shown: &Value, manager: &Value) -> bool {
        let runs = |name: &str, version: &str| {
            agent(shown, name).is_some_and(|agent| agent["state"] == "running" && agent["version"] == version)
        };
        manager == MANAGERS[self.manager] && runs(CHANGED, RELEASES[self.release]) && runs(BYSTANDER, "1")
    }

    /// Tries a skipped release again. What the status says of one names the command for it.
    fn retry_skipped(&mut self, status: &Value) -> Result<Option<String>> {
        let agents = status["agents"].as_array().into_iter().flatten().map(|agent| &agent["lastError"]);
        let said: Vec<_> =
            status["problems"].as_array().into_iter().flatten().chain(agents).filter_map(Value::as_str).collect();
        for name in ["aops-spm", CHANGED] {
            let retry = format!("control retry {name}");
            if let Some(why) = said.iter().find(|text| text.contains(&retry)) {
                self.machine()?.read(&format!("/opt/aops/bin/aops {retry}"), ANSWER)?;
                return Ok(Some((*why).to_owned()));
            }
        }
        Ok(None)
    }

    /// Every state file is JSON, also before the next manager has rewritten any.
    fn state_is_whole(&mut self) -> Result<()> {
        let script = "cd /opt/aops/state && for file in *.json; do echo \"$file $(base64 -w0 \"$file\")\"; done";
        let files = self.machine()?.read(script, ANSWER)?;
        for line in files.lines() {
            let (name, content) = line.split_once(' ').unwrap_or((line, ""));
            let content = BASE64.decode(content).with_context(|| format!("cannot read state/{name}"))?;
            let parsed = serde_json::from_slice::<Value>(&content);
            let shown = || format!("state/{name} is half-written: {:?}", String::from_utf8_lossy(&content));
            parsed.with_context(shown)?;
        }
        Ok(())
    }

    /// The executable and the active release have their content, and what the last cut left is gone.
    fn check_files(&mut self) -> Result<()> {
        let script =
            "cd /opt/aops && sha256sum <bin/aops && cd agents/changed/current && sha256sum --quiet -c SUMS >&2";
        let sum = self.machine()?.read(script, ANSWER).context("a release is damaged")?;
        ensure!(sum.starts_with(&self.executables[self.manager]), "bin/aops has the checksum {sum}");
        let now: BTreeSet<String> = self.files()?.difference(&self.usual).cloned().collect();
        let stays: Vec<_> = now.intersection(&self.left_over).cloned().collect();
        ensure!(stays.is_empty(), "left over after a second upgrade: {}", stays.join(", "));
        self.left_over = now;
        Ok(())
    }

    /// Every file of the home but sub-agents' own, by its name without versions.
    fn files(&mut self) -> Result<BTreeSet<String>> {
        let listed = self.machine()?.read("cd /opt/aops && find . -path './agents/*/*/*' -prune -o -print", ANSWER)?;
        let neutral = |line: &str| {
            let versions = MANAGERS.iter().chain(&RELEASES);
            versions.fold(line.to_owned(), |line, version| line.replace(version, "VERSION"))
        };
        Ok(listed.lines().map(neutral).collect())
    }
}

fn image<'a>(parts: &Parts<'a>, fleet: &Fleet) -> Image<'a> {
    let mut image = Image::new(parts.root, parts.kernel);
    image.copy("/root/aops", parts.executable, 0o755);
    if let Some(deb) = parts.deb {
        image.copy(DEB_PATH, deb, 0o644);
    }
    image.copy("/root/aops.pub", &fleet.depot().join("keys/aops.pub"), 0o644);
    image.copy("/root/cert.pem", &fleet.depot().join("tls/cert.pem"), 0o644);
    image.file(PROGRESS_PATH, PROGRESS, 0o755);
    image.unit("upgrade-progress.service", PROGRESS_UNIT);
    image
}

/// Whether both roles run, and nothing is under way.
fn is_settled(status: &Value) -> bool {
    let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
    matches!(status["state"].as_str(), Some("running" | "degraded"))
        && status["upgrade"].is_null()
        && pid(&status["spm"]["pid"]).is_some()
        && pid(&status["spa"]["pid"]).is_some()
        && agents.iter().all(|agent| agent["upgrade"].is_null())
        && status["gateway"]["connected"] == true
}
