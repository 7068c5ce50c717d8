//! `cargo xtask test-packages`: installs what `dist` and `rpm` have built, in containers with systemd, as an operator does.
//!
//! ```text
//! archive     offline: `aops install --package`, no gateway runs
//! bootstrap   the old platform's command line, with the installer that the gateway serves
//! rpm, deb    an older package, enrolled; the package of this version; a self-upgrade; a newer package; erased
//! ```
//!
//! The pids of the sub-agents stay the same until the end, and an erased package leaves nothing.

mod root;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::command::{is_root, run_quietly, say};
use crate::container::Container;
use crate::dist::{self, Target};
use crate::fleet::{agent, next_manager, pid};
use crate::package::Package;
use crate::wait::try_for;
use crate::{apt, files, packages, rootfs, test};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The profile that `dist` and `rpm` were run with
    #[arg(long, value_name = "NAME", default_value = dist::RELEASE)]
    profile: String,
    /// What to test; may be repeated [default: all]
    #[arg(long, value_enum)]
    only: Vec<Kind>,
    /// The architecture of the executables, which run on a 64-bit kernel in either case
    #[arg(long, value_enum, default_value_t = Target::LinuxAmd64)]
    target: Target,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Archive,
    Bootstrap,
    Rpm,
    Deb,
}

const ALL: [Kind; 4] = [Kind::Archive, Kind::Bootstrap, Kind::Rpm, Kind::Deb];

/// For an upgrade with its trial, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// An older package, the release of a self-upgrade, and a newer package.
const OLDER: &str = "0.0.9";
const SELF: &str = "90.0.0";
const NEWER: &str = "91.0.0";
/// Where the gateway is in a container.
const GATEWAY: &str = "/srv/gateway";
const SERVER: &str = "/srv/aops-gateway";
const URL: &str = "https://127.0.0.1:8888";
const AGENT: &str = "keeper";
/// How the gateway is trusted and reached.
const ENROL: &str = "--agent-id 5402 --endpoint https://127.0.0.1:8888 --trusted-key /srv/gateway/keys/aops.pub --ca-cert \
                     /srv/gateway/tls/cert.pem";
/// In addition to what containers change: the gateway, and the databases of the package managers.
const CHANGED_BY_PACKAGES: &[&str] =
    &["/srv", "/root/.rpmdb", "/var/lib/dpkg", "/var/lib/rpm", "/var/log", "/var/cache", "/var/lib/apt"];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !is_root() {
        bail!("cannot start containers without root");
    }
    apt::install(test::NEEDS)?;
    let built = dist::directory(&arguments.profile);
    let kinds = if arguments.only.is_empty() { ALL.to_vec() } else { arguments.only.clone() };
    let trial = Trial { built: &built, target: arguments.target, profile: &arguments.profile };
    let test = |kind: Kind| {
        let began = Instant::now();
        let outcome = match kind {
            Kind::Archive => trial.archive(),
            Kind::Bootstrap => trial.bootstrap(),
            Kind::Rpm | Kind::Deb => trial.package(kind),
        };
        outcome.with_context(|| format!("the installation from the {kind:?} failed"))?;
        say(&format!("{kind:?}: passed in {} s", began.elapsed().as_secs()));
        Ok(())
    };
    // Each is a host of its own, and mostly waits.
    let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
        let tests: Vec<_> = kinds.into_iter().map(|kind| scope.spawn(move || test(kind))).collect();
        let ended = tests.into_iter().map(|test| test.join().unwrap_or_else(|_| bail!("a thread has panicked")));
        ended.collect()
    });
    let failed: Vec<_> = outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
}

struct Trial<'a> {
    built: &'a Path,
    target: Target,
    profile: &'a str,
}

impl Trial<'_> {
    fn executable(&self) -> PathBuf {
        self.built.join(self.target.executable())
    }

    fn archive_name(&self, packing: &str) -> String {
        let (os, arch) = self.target.words();
        format!("aops-spm-{}_{os}_{arch}.{packing}", dist::VERSION)
    }

    /// Without any gateway: what the installation needs is in the archive.
    fn archive(&self) -> Result<()> {
        let host = Host::boot(rootfs::get()?)?;
        for packing in ["tar.gz", "tar.zst"] {
            let name = self.archive_name(packing);
            for file in [name.clone(), format!("{name}.minisig"), "aops.pub".to_owned()] {
                host.container.copy_in(self.built.join(&file), format!("/tmp/{file}"), 0o644);
            }
        }
        let unpack = format!("mkdir /tmp/unpacked && tar -xzf /tmp/{} -C /tmp/unpacked", self.archive_name("tar.gz"));
        host.done(&unpack)?;
        host.done("test -x /tmp/unpacked/control && test -f /tmp/unpacked/etc/conf.toml")?;
        let before = host.container.files();
        host.done(&format!(
            "/tmp/unpacked/bin/aops install --agent-id 7 --endpoint {URL} --pin {} --trusted-key /tmp/aops.pub --package /tmp/{}",
            "0".repeat(64),
            self.archive_name("tar.zst")
        ))?;
        host.wait("the manager to run without a gateway", |status| {
            pid(&status["spm"]["pid"]).is_some() && status["version"] == dist::VERSION
        })?;
        host.done("/opt/aops/control uninstall --yes")?;
        host.expect_as_before(&before, &[])
    }

    /// As the old platform does, with what `gateway publish` makes of the archive.
    fn bootstrap(&self) -> Result<()> {
        let host = Host::boot(rootfs::get()?)?;
        host.gateway(self)?;
        let (os, arch) = self.target.words();
        let installer = format!("aops-agent-service-{os}-{arch}");
        host.done(&format!("cd /root && curl -kfs {URL}/api/download/{installer} -H 'x-agent-id: 5402' -o {installer} && chmod +x {installer}"))?;
        host.done(&format!(
            "/root/{installer} --control install --version {} --agentId 5402 --endpoint {URL}",
            dist::VERSION
        ))?;
        host.agent()?;
        host.done("/opt/aops/control uninstall --yes").map(drop)
    }

    fn package(&self, kind: Kind) -> Result<()> {
        let scratch = tempfile::tempdir().context("cannot create a temporary directory")?;
        let package = |version: &str| -> Result<PathBuf> {
            if version == dist::VERSION {
                return Ok(self.built.join(packages::file_name(self.target, version, kind == Kind::Rpm)));
            }
            let other = next_manager(&self.executable(), version)?;
            packages::build(self.target, self.profile, version, &other.path().join("bin/aops"), scratch.path())?;
            Ok(scratch.path().join(packages::file_name(self.target, version, kind == Kind::Rpm)))
        };
        let root = if kind == Kind::Rpm { root::with_rpm()? } else { rootfs::get()? };
        let mut host = Host::boot(root)?;
        let before = host.container.files();
        host.gateway(self)?;
        let install = |host: &Host, version: &str, is_upgrade: bool| -> Result<()> {
            let from = package(version)?;
            let name = from.file_name().context("a package has a name")?.to_string_lossy().into_owned();
            host.container.copy_in(&from, format!("/tmp/{name}"), 0o644);
            let verb = if is_upgrade { "-U" } else { "-i" };
            let command = match kind {
                Kind::Rpm => format!("rpm {verb} --nodeps --ignorearch /tmp/{name}"),
                _ => format!("dpkg --force-architecture -i /tmp/{name}"),
            };
            host.done(&command).map(drop)
        };

        // Nothing overwrites an installation of the old platform.
        host.done("mkdir -p /opt/aops/etc && echo 'heartbeatSrv: https://old:1' >/opt/aops/etc/conf.yml")?;
        let refused = install(&host, OLDER, false).err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(refused.contains("an installation of the old platform is in /opt/aops"), "not refused: {refused}");
        host.done("grep -q old /opt/aops/etc/conf.yml && test ! -e /opt/aops/bin && rm -r /opt/aops")?;

        // An older package on a host that nobody has enrolled.
        if kind == Kind::Deb {
            host.done(&format!(
                "mkdir -p /etc/aops && printf '%s\\n' 'agentId = \"5402\"' 'endpoint = \"{URL}\"' 'trustedKeys = \
                 [\"{GATEWAY}/keys/aops.pub\"]' 'caCert = \"{GATEWAY}/tls/cert.pem\"' >/etc/aops/enrol.toml"
            ))?;
            install(&host, OLDER, false)?;
        } else {
            install(&host, OLDER, false)?;
            let status = host.container.run(&["aops", "control", "status"]);
            ensure!(status.code == 4 && status.text().contains("aops install --agent-id"), "{status}");
            host.done("systemctl start aops-spm && ! systemctl is-failed aops-spm aops-spa")?;
            host.done(&format!("aops install {ENROL}"))?;
        }
        host.wait("the older release", |status| status["version"] == OLDER && is_settled(status))?;
        let agent = host.agent()?;
        host.done("systemctl is-enabled aops-spm aops-spa && sed -i 's/^#upgradeTrial.*/upgradeTrial = \"5s\"/' /opt/aops/etc/conf.toml")?;

        install(&host, dist::VERSION, true)?;
        host.expect(dist::VERSION, agent)?;
        host.verify(kind)?;

        host.order(SELF)?;
        host.wait("the self-upgrade", |status| status["version"] == SELF && is_settled(status))?;
        host.expect(SELF, agent)?;
        host.verify(kind)?;

        // From now on, the package decides.
        host.order("")?;
        install(&host, NEWER, true)?;
        host.expect(NEWER, agent)?;
        host.verify(kind)?;
        host.done("grep -q '^upgradeTrial' /opt/aops/etc/conf.toml && systemctl is-enabled aops-spm aops-spa")?;
        host.container.reboot();
        host.serve()?;
        host.wait("a reboot", is_settled)?;

        host.done(if kind == Kind::Rpm { "rpm -e aops" } else { "dpkg -P aops" })?;
        let left = host.container.processes();
        let ours: Vec<_> = left.iter().filter(|(_, words)| words.contains("/opt/aops")).collect();
        ensure!(ours.is_empty(), "processes are left: {ours:?}");
        host.done("rm -rf /etc/aops")?;
        host.expect_as_before(&before, CHANGED_BY_PACKAGES)
    }
}

/// A container with the gateway in it.
struct Host {
    container: Container,
}

impl Host {
    fn boot(root: PathBuf) -> Result<Host> {
        Ok(Host { container: Container::systemd_of(root) })
    }

    /// Runs a script that must succeed.
    fn done(&self, script: &str) -> Result<String> {
        let output = self.container.run_within(PATIENCE, &["sh", "-c", script]);
        ensure!(output.success(), "{output}");
        Ok(output.stdout)
    }

    /// Creates the gateway with the archive of `dist`, the release of the self-upgrade and a sub-agent, and starts it.
    fn gateway(&self, trial: &Trial<'_>) -> Result<()> {
        self.container.copy_in(trial.built.join(Target::Gateway.executable()), SERVER, 0o755);
        self.done(&format!("{SERVER} init --dir {GATEWAY} --name 127.0.0.1"))?;
        // The archive is signed with the key of `dist`.
        self.container.copy_in(trial.built.join("aops.pub"), format!("{GATEWAY}/keys/dist.pub"), 0o644);
        let name = trial.archive_name("tar.zst");
        for file in [name.clone(), format!("{name}.minisig")] {
            self.container.copy_in(trial.built.join(&file), format!("/tmp/{file}"), 0o644);
        }
        self.done(&format!("{SERVER} publish --dir {GATEWAY} /tmp/{name}"))?;
        let (os, arch) = trial.target.words();
        for package in [next_manager(&trial.executable(), SELF)?, Package::sleeper(AGENT, "1.0")] {
            let to = self.container.path("/tmp/package");
            run_quietly(Command::new("cp").arg("-a").arg(package.path()).arg(&to))?;
            let mut identity = package.arguments();
            // The last argument is its path outside.
            identity.pop();
            let identity = identity.join(" ");
            self.done(&format!(
                "{SERVER} publish --dir {GATEWAY} {identity} --os {os} --arch {arch} /tmp/package && rm -r /tmp/package"
            ))?;
        }
        self.order("")?;
        self.serve()
    }

    /// Orders a release of the manager; empty: whichever is installed.
    fn order(&self, version: &str) -> Result<()> {
        let manager = if version.is_empty() { String::new() } else { format!("[manager]\nversion = \"{version}\"\n") };
        let text = format!("heartbeatInterval = \"1s\"\n{manager}[agents.{AGENT}]\nversion = \"1.0\"\n");
        self.container.write(format!("{GATEWAY}/fleet.toml"), text, 0o644);
        Ok(())
    }

    fn serve(&self) -> Result<()> {
        self.done(&format!(
            "systemd-run --quiet --unit gateway-of-test --collect {SERVER} run --dir {GATEWAY} --listen 127.0.0.1:8888"
        ))?;
        let answers = || {
            let asked = self.container.run(&["sh", "-c", &format!("curl -ksf {URL}/healthz")]);
            asked.success().then_some(())
        };
        try_for(PATIENCE, answers).context("the gateway does not answer")
    }

    fn status(&self) -> Value {
        let output = self.container.run(&["/opt/aops/control", "status", "--json"]);
        serde_json::from_str(&output.stdout).unwrap_or_default()
    }

    fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        let found = try_for(PATIENCE, || {
            last = self.status();
            wanted(&last).then(|| last.clone())
        });
        let journal =
            || self.container.run(&["sh", "-c", "tail -n 30 /opt/aops/log/*.log; journalctl -n 30 --no-pager"]).text();
        found.with_context(|| format!("timed out waiting for {what}: {last:#}\n{}", journal()))
    }

    /// The pid of the sub-agent, once it runs.
    fn agent(&self) -> Result<u32> {
        let running = |status: &Value| {
            agent(status, AGENT).filter(|agent| agent["state"] == "running").and_then(|agent| pid(&agent["pid"]))
        };
        let status = self.wait("the sub-agent", |status| running(status).is_some())?;
        running(&status).context("it was waited for")
    }

    /// The manager has this version, and the sub-agent the same pid as before.
    fn expect(&self, version: &str, before: u32) -> Result<()> {
        self.wait(version, |status| status["version"] == version && is_settled(status))?;
        let now = self.agent()?;
        ensure!(now == before, "the sub-agent restarted: its pid was {before} and is {now}");
        Ok(())
    }

    /// The package manager finds its files as they should be.
    fn verify(&self, kind: Kind) -> Result<()> {
        let said = self.done(if kind == Kind::Rpm { "rpm -V aops --nodeps" } else { "dpkg -V aops" })?;
        ensure!(said.trim().is_empty(), "files differ from those of the package: {said}");
        Ok(())
    }

    fn expect_as_before(&self, before: &files::Files, except: &[&str]) -> Result<()> {
        let difference = files::difference(before, &self.container.files());
        // dpkg removes an empty /opt: no package of the minimal system has it.
        let is_relevant = |line: &&String| *line != "- /opt" && !except.iter().any(|path| line.contains(path));
        let left: Vec<_> = difference.iter().filter(is_relevant).collect();
        ensure!(left.is_empty(), "it left or changed: {left:#?}");
        Ok(())
    }
}

fn is_settled(status: &Value) -> bool {
    status["state"] == "running"
        && status["upgrade"].is_null()
        && pid(&status["spm"]["pid"]).is_some()
        && pid(&status["spa"]["pid"]).is_some()
}
