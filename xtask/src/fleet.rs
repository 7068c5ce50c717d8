//! A gateway and one host without a service manager, on loopback in a temporary directory; for the demo and the benchmarks.
//!
//! The command line or environment of each of its processes has that directory, so all of them can be found and killed after any failure.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::{describe, read};
use crate::package::Package;
use crate::processes;
use crate::wait::try_for;

/// The deadline for a start, or for a failure to be noticed and fixed, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// The deadline for the removal of a directory that is still being written.
const REMOVAL: Duration = Duration::from_secs(5);

/// Dropping it kills its processes and removes its files, unless [`Fleet::keep`] was called.
pub(crate) struct Fleet {
    directory: PathBuf,
    gateway: PathBuf,
    url: String,
    is_kept: bool,
}

impl Fleet {
    /// Creates an empty directory; `gateway` is the executable of its gateway. From now on Ctrl-C cleans up before this process exits.
    pub(crate) fn new(gateway: &Path) -> Result<Fleet> {
        let directory =
            tempfile::Builder::new().prefix("aops-fleet-").tempdir().context("cannot create a temporary directory")?;
        let fleet =
            Fleet { directory: directory.keep(), gateway: gateway.to_owned(), url: String::new(), is_kept: false };
        clean_up_when_interrupted(&fleet.directory)?;
        Ok(fleet)
    }

    /// A path in the fleet's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The gateway's directory.
    pub(crate) fn depot(&self) -> PathBuf {
        self.path("gateway")
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.path("home")
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// `aops gateway <subcommand> --dir …`.
    pub(crate) fn gateway(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.gateway);
        command.args(["gateway", subcommand, "--dir"]).arg(self.depot());
        command
    }

    /// Has the running gateway put a fleet file into effect; returns when it is.
    pub(crate) fn apply(&self, text: &str) -> Result<()> {
        let file = self.path("new.toml");
        fs::write(&file, text).context("cannot write a fleet file")?;
        let mut apply = Command::new(&self.gateway);
        quietly(apply.args(["gateway", "fleet", "apply", "--dir"]).arg(self.depot()).arg(&file))
    }

    /// Starts the gateway on a port that the system chooses, and returns its pid. It outlives this process.
    pub(crate) fn start_gateway(&mut self) -> Result<u32> {
        let said = self.path("gateway.out");
        let mut command = self.gateway("run");
        command.args(["--listen", "127.0.0.1:0"]).stdin(Stdio::null());
        command.stdout(fs::File::create(&said)?).stderr(fs::File::create(self.path("gateway.log"))?);
        let mut child = command.process_group(0).spawn().context("cannot start the gateway")?;
        let line = try_for(SOON, || match (fs::read_to_string(&said), child.try_wait()) {
            (Ok(text), _) if text.ends_with('\n') => Some(text),
            (_, Ok(None)) => None,
            _ => Some(String::new()),
        });
        let line = line.unwrap_or_default();
        let url =
            line.lines().find_map(|line| line.strip_prefix("listening on ")).context("the gateway does not start")?;
        let port = url.rsplit_once(':').map(|(_, port)| port).context("the gateway printed no port")?;
        self.url = format!("https://127.0.0.1:{port}");
        Ok(child.id())
    }

    /// Replaces `fleet.toml` atomically.
    pub(crate) fn write_fleet(&self, text: &str) -> Result<()> {
        write_fleet(&self.depot(), text)
    }

    /// `aops install` from this gateway, whose key and certificate are trusted, without a service manager.
    pub(crate) fn install(&self, executable: &Path) -> Command {
        let mut command = Command::new(executable);
        command.args(["install", "--service", "none", "--agent-id", "demo", "--endpoint", &self.url, "--home"]);
        command.arg(self.home());
        command.arg("--trusted-key").arg(self.depot().join("keys/aops.pub"));
        command.arg("--ca-cert").arg(self.depot().join("tls/cert.pem"));
        command
    }

    /// The installed `aops control`.
    pub(crate) fn control(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.home().join("bin/aops"));
        command.arg("control").args(arguments).env("AOPS_HOME", self.home());
        command
    }

    /// The output of `aops control status --json`, whatever its exit code.
    pub(crate) fn status(&self) -> Result<Value> {
        let mut command = self.control(&["status", "--json"]);
        let output = command.output().with_context(|| format!("cannot run {}", describe(&command)))?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("`{}` printed no JSON: {}", describe(&command), String::from_utf8_lossy(&output.stderr).trim())
        })
    }

    /// Waits until `wanted` accepts the status, and returns it.
    pub(crate) fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = None;
        let found = try_for(SOON, || {
            let status = self.status();
            let is_wanted = status.as_ref().is_ok_and(&wanted);
            last = Some(status);
            is_wanted.then_some(())
        });
        match (found, last) {
            (Some(()), Some(status)) => status,
            (_, Some(Ok(status))) => {
                bail!("timed out after {SOON:?} waiting for {what}; the last status: {status:#}")
            }
            (_, Some(Err(error))) => Err(error.context(format!("timed out after {SOON:?} waiting for {what}"))),
            (_, None) => bail!("timed out waiting for {what}"),
        }
    }

    /// Waits until a sub-agent runs with a pid other than `old`.
    pub(crate) fn wait_for_pid(&self, name: &str, old: Option<u32>) -> Result<u32> {
        let is_new = |status: &Value| running_pid(status, name).is_some_and(|new| Some(new) != old);
        let status = self.wait_for(&format!("{name} to run"), is_new)?;
        running_pid(&status, name).context("the awaited status has no pid")
    }

    /// Keeps everything running when this is dropped.
    pub(crate) fn keep(&mut self) {
        self.is_kept = true;
    }

    /// The last lines of all logs, to diagnose a failure.
    pub(crate) fn logs(&self) -> String {
        logs(&self.path("gateway.log"), &self.home())
    }
}

/// Replaces the `fleet.toml` of a gateway's directory atomically.
pub(crate) fn write_fleet(depot: &Path, text: &str) -> Result<()> {
    let new = depot.join("fleet.toml.new");
    fs::write(&new, text)?;
    fs::rename(&new, depot.join("fleet.toml")).context("cannot replace fleet.toml")
}

/// The last lines of a gateway's log and of a home's logs.
pub(crate) fn logs(gateway: &Path, home: &Path) -> String {
    const LINES: usize = 30;
    let mut files = vec![gateway.to_owned()];
    for directory in ["log", "log/agents"] {
        let entries = fs::read_dir(home.join(directory)).into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()).filter(|path| path.is_file()));
    }
    let shown = files.iter().filter_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        let lines: Vec<_> = text.lines().collect();
        Some(format!("--- {}\n{}\n", file.display(), lines[lines.len().saturating_sub(LINES)..].join("\n")))
    });
    shown.collect()
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if !self.is_kept {
            clean_up(&self.directory);
        }
    }
}

/// A release of the manager whose executable differs only in bytes after the sections of the ELF file, which change nothing.
pub(crate) fn next_manager(executable: &Path, version: &str) -> Result<Package> {
    let mut bytes = fs::read(executable).with_context(|| format!("cannot read {}", executable.display()))?;
    bytes.extend_from_slice(version.as_bytes());
    Ok(Package::plain("aops-spm", version).with_file("bin/aops", bytes, 0o755))
}

/// From now on Ctrl-C kills the processes of `directory` and removes it before this process exits.
pub(crate) fn clean_up_when_interrupted(directory: &Path) -> Result<()> {
    static DIRECTORIES: Mutex<Vec<PathBuf>> = Mutex::new(vec![]);
    let directories = || DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner);
    directories().push(directory.to_owned());
    if directories().len() > 1 {
        return Ok(());
    }
    let handler = move || {
        INTERRUPTED.store(true, Ordering::Relaxed);
        directories().iter().for_each(|directory| clean_up(directory));
        std::process::exit(130);
    };
    ctrlc::set_handler(handler).context("cannot handle Ctrl-C")
}

/// Whether Ctrl-C is cleaning up.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// After Ctrl-C, waits for the end of this process: what fails because of the clean-up is no result.
pub(crate) fn wait_if_interrupted() {
    while INTERRUPTED.load(Ordering::Relaxed) {
        std::thread::park();
    }
}

/// Kills every process that names `directory`, and removes it.
pub(crate) fn clean_up(directory: &Path) {
    if let Err(left) = processes::end_all(directory) {
        crate::command::say(&format!("cannot kill {left:?}"));
    }
    processes::remove_groups(&directory.join("home"));
    // Another thread may be creating a file in it, until it notices that its processes are gone.
    let mut last = Ok(());
    try_for(REMOVAL, || {
        last = crate::workspace::remove(directory);
        last.is_ok().then_some(())
    });
    if let Err(error) = last {
        crate::command::say(&format!("{error:#}"));
    }
}

/// The entry of a sub-agent in a status.
pub(crate) fn agent<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["agents"].as_array()?.iter().find(|agent| agent["name"] == name)
}

/// A sub-agent's process in a status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AgentProcess {
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) restarts: u64,
}

/// The process of each sub-agent in a status; an error if one has none.
pub(crate) fn agent_processes(status: &Value) -> Result<Vec<AgentProcess>> {
    let agents = status["agents"].as_array().context("the status has no sub-agents")?;
    let one = |agent: &Value| {
        let name = agent["name"].as_str().unwrap_or_default().to_owned();
        let pid = pid(&agent["pid"]).with_context(|| format!("the status has no pid for {name}"))?;
        Ok(AgentProcess { name, pid, restarts: agent["restarts"].as_u64().unwrap_or(0) })
    };
    agents.iter().map(one).collect()
}

/// A pid in a status; `None` if it is null.
pub(crate) fn pid(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

fn running_pid(status: &Value, name: &str) -> Option<u32> {
    agent(status, name).filter(|agent| agent["state"] == "running").and_then(|agent| pid(&agent["pid"]))
}

/// A free port on loopback.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").context("cannot find a free port")?.local_addr()?.port())
}

/// The response of a plain HTTP server on loopback.
pub(crate) fn http_get(port: u16, path: &str) -> Result<String> {
    let get = || -> std::io::Result<String> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(16 << 20).read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    get().with_context(|| format!("cannot get http://127.0.0.1:{port}{path}"))
}

/// Runs a set-up command and shows its output only when it fails.
pub(crate) fn quietly(command: &mut Command) -> Result<()> {
    read(command).map(drop)
}
