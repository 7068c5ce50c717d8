//! A host: a home in a temporary directory, installed and operated as by an operator, without a service manager and without root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::aops;
use super::command::{self, LIMIT, Output};
use super::gateway::{self, Gateway};
use super::processes::{self, Process};
use super::wait::{try_for, wait_for};
use super::windows::{self, Wine};

/// The deadline for a start, or for a failure to be noticed and fixed, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);
/// From a fork to the program of the child, on a busy machine.
pub const FORKING: Duration = Duration::from_secs(5);

/// A host; dropping it kills every process of its home and removes its files.
#[derive(Debug)]
pub struct TestHost {
    directory: TempDir,
    agent_id: String,
    /// The host's system, if the scenarios run on Windows.
    wine: Option<Wine>,
}

impl TestHost {
    /// A host without an installation.
    pub fn new() -> TestHost {
        TestHost::with_id("5402204854438")
    }

    /// As [`TestHost::new`], for one of several hosts of a gateway.
    pub fn with_id(agent_id: &str) -> TestHost {
        let directory = tempfile::Builder::new().prefix("aops-host-").tempdir().expect("a temporary directory");
        let wine = windows::under_test().map(|windows| Wine::start(&windows, directory.path()));
        TestHost { directory, agent_id: agent_id.to_owned(), wine }
    }

    /// A host that has joined the gateway's fleet; the gateway must offer a manager.
    #[track_caller]
    pub fn joined(gateway: &Gateway) -> TestHost {
        let host = TestHost::new();
        host.join(gateway, &[]).expect_success();
        host
    }

    /// Installs from a trusted gateway, with further arguments.
    #[track_caller]
    pub fn join(&self, gateway: &Gateway, more: &[&str]) -> Output {
        let mut arguments = vec!["--agent-id", &self.agent_id, "--endpoint", gateway.url()];
        let trust = gateway.trust();
        arguments.extend(trust.iter().map(String::as_str));
        arguments.extend(more);
        self.install(&arguments)
    }

    /// A path on this host, in the words of its system.
    pub fn name(&self, path: &Path) -> String {
        self.wine.as_ref().map_or_else(|| path.display().to_string(), |wine| wine.path(path))
    }

    /// An argument; a path in it is translated.
    fn word(&self, word: String) -> String {
        if word.starts_with("/tmp/") { self.name(word.as_ref()) } else { word }
    }

    /// `aops install --service none` with these arguments.
    #[track_caller]
    pub fn install(&self, arguments: &[&str]) -> Output {
        let home = self.name(&self.home());
        let mut all = vec!["install", "--service", "none", "--home", &home];
        all.extend(arguments);
        self.aops(&all)
    }

    /// Runs the program under test with this host's home in its environment.
    #[track_caller]
    pub fn aops(&self, arguments: &[&str]) -> Output {
        let arguments = arguments.iter().map(|word| self.word((*word).to_owned()));
        command::run(self.aops_command().args(arguments), LIMIT)
    }

    /// The program under test, with this host's home in its environment.
    fn aops_command(&self) -> Command {
        match &self.wine {
            None => self.command(&aops()),
            Some(wine) => {
                wine.command(r"Z:\program\aops.exe", &[("AOPS_HOME", &self.name(&self.home())), ("NO_COLOR", "1")])
            }
        }
    }

    /// A program of the home, such as `bin/aops`, as a file.
    pub fn program(&self, name: &str) -> PathBuf {
        let suffix = if self.wine.is_some() { ".exe" } else { "" };
        self.home().join(format!("{name}{suffix}"))
    }

    /// `aops control` with these arguments.
    #[track_caller]
    pub fn control(&self, arguments: &[&str]) -> Output {
        let mut all = vec!["control"];
        all.extend(arguments);
        self.aops(&all)
    }

    /// Any program, in this host's environment.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("AOPS_HOME", self.home())
            .env("NO_COLOR", "1")
            .env_remove("AOPS_PRODUCT")
            .current_dir(self.directory.path());
        command
    }

    /// The output of `aops control status --json`, whatever its exit code.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.control(&["status", "--json"]).json()
    }

    /// Waits until `wanted` accepts the status, and returns it; panics with the last status after `deadline`.
    #[track_caller]
    pub fn wait_for_status(&self, what: &str, deadline: Duration, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = try_for(deadline, || {
            let output = self.control(&["status", "--json"]);
            // On a busy machine, Wine sometimes cannot start a program.
            let is_missing = self.wine.is_some() && output.stdout.starts_with("Application could not be started");
            last = if is_missing { Value::Null } else { output.json() };
            wanted(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|| panic!("timed out after {deadline:?} waiting for {what}; the last status: {last:#}"))
    }

    /// Waits until a sub-agent runs, and returns its pid.
    #[track_caller]
    pub fn wait_for_agent(&self, name: &str) -> u32 {
        let status = self.wait_for_status(&format!("{name} to run"), SOON, |status| {
            agent(status, name).is_some_and(|agent| agent["state"] == "running" && pid(&agent["pid"]).is_some())
        });
        agent(&status, name).and_then(|agent| pid(&agent["pid"])).expect("it was waited for")
    }

    /// Waits until a sub-agent runs with a pid other than `old`, and returns it.
    #[track_caller]
    pub fn wait_for_new_pid(&self, name: &str, old: u32) -> u32 {
        wait_for(&format!("{name} to run with a new pid"), SOON, || {
            let status = self.status();
            let agent = agent(&status, name)?;
            pid(&agent["pid"]).filter(|new| agent["state"] == "running" && *new != old)
        })
    }

    /// The pid of a role, `spm` or `spa`, from the status.
    #[track_caller]
    pub fn role_pid(&self, role: &str) -> Option<u32> {
        pid(&self.status()[role]["pid"])
    }

    /// Kills every process at once, as in a power cut.
    pub fn crash(&self) {
        if self.wine.is_some() {
            self.processes().iter().for_each(|process| processes::signal(process.pid, Signal::KILL));
            return;
        }
        if let Err(left) = processes::end_all(&self.home()) {
            panic!("cannot end {left:?}");
        }
    }

    /// Kills one process, by a pid that the host knows it by.
    pub fn kill(&self, pid: u32) {
        match &self.wine {
            None => processes::signal(pid, Signal::KILL),
            Some(_) => drop(self.tool("kill", pid)),
        }
    }

    /// Whether a process runs, by a pid that the host knows it by.
    pub fn is_alive(&self, pid: u32) -> bool {
        if self.wine.is_some() { self.tool("alive", pid).success() } else { processes::is_alive(pid) }
    }

    /// Runs a program of Windows; a path below the temporary directory is translated.
    #[track_caller]
    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let wine = self.wine.as_ref().expect("the scenario is for Windows");
        let arguments = arguments.iter().map(|word| self.word((*word).to_owned()));
        command::run(wine.command(&self.word(program.to_owned()), &[]).args(arguments), LIMIT)
    }

    /// The same, while it runs.
    pub fn spawn(&self, program: &str, arguments: &[&str]) -> Command {
        let wine = self.wine.as_ref().expect("the scenario is for Windows");
        let mut command = wine.command(program, &[]);
        command.args(arguments.iter().map(|word| self.word((*word).to_owned())));
        command
    }

    /// Boots Windows again.
    pub fn reboot(&mut self) {
        self.wine.as_mut().expect("the scenario is for Windows").reboot();
    }

    /// A tool of the tests on Windows.
    #[track_caller]
    fn tool(&self, verb: &str, pid: u32) -> Output {
        let wine = self.wine.as_ref().expect("only Windows needs it");
        command::run(wine.command(r"Z:\program\tool.exe", &[]).args([verb, &pid.to_string()]), LIMIT)
    }

    /// The processes of this home.
    pub fn processes(&self) -> Vec<Process> {
        let Some(wine) = &self.wine else { return processes::of_home(&self.home()) };
        let home = self.name(&self.home());
        let all =
            wine.pids().into_iter().map(|pid| Process { pid, command: processes::words(pid, "cmdline").join(" ") });
        all.filter(|process| process.command.contains(&home)).collect()
    }

    /// The processes of a sub-agent.
    pub fn processes_of_agent(&self, name: &str) -> Vec<u32> {
        if self.wine.is_none() {
            return processes::marked(&self.home(), name);
        }
        let directory = format!(r"\agents\{name}\");
        let own = self.processes().into_iter().filter(|process| process.command.contains(&directory));
        own.map(|process| process.pid).collect()
    }

    /// The processes that run a role, `spm` or `spa`.
    pub fn processes_of_role(&self, role: &str) -> Vec<u32> {
        let runs = |command: &str| match (&self.wine, role) {
            (None, _) => command.split(' ').next().is_some_and(|program| program.ends_with(&format!("aops-{role}"))),
            (Some(_), "spm") => command.contains(r"\bin\aops.exe spm "),
            (Some(_), _) => command.contains(&format!(r"\bin\aops-{role}.exe ")),
        };
        self.processes().into_iter().filter(|process| runs(&process.command)).map(|process| process.pid).collect()
    }

    /// Whether the host runs Windows.
    pub fn is_windows(&self) -> bool {
        self.wine.is_some()
    }

    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// A temporary path beside the home, for a test's own files.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn agent_id(&self) -> &str {
        &self.agent_id
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        if thread::panicking() {
            for log in ["spm.log", "spa.log"] {
                gateway::show(&self.home().join("log").join(log));
            }
        }
        drop(self.wine.take());
        // Roles restart each other and sub-agents, so this is repeated until no process is left. Processes are identified by this
        // directory.
        let ended = processes::end_all(self.directory.path());
        processes::remove_groups(&self.home());
        // A test of a read-only home must not prevent its removal.
        let _ = fs::set_permissions(self.home(), std::os::unix::fs::PermissionsExt::from_mode(0o755));
        if !thread::panicking() {
            assert!(ended.is_ok(), "processes are left: {ended:?}");
        }
    }
}

/// The entry of a sub-agent in a status.
pub fn agent<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["agents"].as_array()?.iter().find(|agent| agent["name"] == name)
}

/// A pid in a status; `None` if it is null.
pub fn pid(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}
