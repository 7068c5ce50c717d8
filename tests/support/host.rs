//! A host: a home in a temporary directory, installed and driven as an operator does it, without a service manager and without root.

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

/// For something to come up, or to be noticed and mended, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

/// A host; every process of its home is ended, and its files removed, when this is dropped.
#[derive(Debug)]
pub struct TestHost {
    directory: TempDir,
    agent_id: String,
}

impl TestHost {
    /// One with nothing on it.
    pub fn new() -> TestHost {
        let directory = tempfile::Builder::new().prefix("aops-host-").tempdir().expect("a temporary directory");
        TestHost { directory, agent_id: "5402204854438".to_owned() }
    }

    /// One that has joined the gateway's fleet; the gateway must offer a manager.
    #[track_caller]
    pub fn joined(gateway: &Gateway) -> TestHost {
        let host = TestHost::new();
        host.join(gateway, &[]).expect_success();
        host
    }

    /// Installs from a gateway that is trusted, with further arguments.
    #[track_caller]
    pub fn join(&self, gateway: &Gateway, more: &[&str]) -> Output {
        let mut arguments = vec!["--agent-id", &self.agent_id, "--endpoint", gateway.url()];
        let trust = gateway.trust();
        arguments.extend(trust.iter().map(String::as_str));
        arguments.extend(more);
        self.install(&arguments)
    }

    /// `aops install --service none` with these arguments.
    #[track_caller]
    pub fn install(&self, arguments: &[&str]) -> Output {
        let home = self.home().display().to_string();
        let mut all = vec!["install", "--service", "none", "--home", &home];
        all.extend(arguments);
        self.aops(&all)
    }

    /// Runs the program under test with this host's home in its environment.
    #[track_caller]
    pub fn aops(&self, arguments: &[&str]) -> Output {
        command::run(self.command(&aops()).args(arguments), LIMIT)
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

    /// What `aops control status --json` says; its exit code is not looked at.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.control(&["status", "--json"]).json()
    }

    /// Waits until the status is as wanted, and gives it; panics with the last one when `deadline` has passed.
    #[track_caller]
    pub fn wait_for_status(&self, what: &str, deadline: Duration, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = try_for(deadline, || {
            last = self.status();
            wanted(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|| panic!("waited {deadline:?} in vain for {what}; the last status: {last:#}"))
    }

    /// Waits until a sub-agent runs, and gives its pid.
    #[track_caller]
    pub fn wait_for_agent(&self, name: &str) -> u32 {
        let status = self.wait_for_status(&format!("{name} to run"), SOON, |status| {
            agent(status, name).is_some_and(|agent| agent["state"] == "running" && pid(&agent["pid"]).is_some())
        });
        agent(&status, name).and_then(|agent| pid(&agent["pid"])).expect("it was waited for")
    }

    /// Waits until a sub-agent runs with another pid than `old`, and gives it.
    #[track_caller]
    pub fn wait_for_new_pid(&self, name: &str, old: u32) -> u32 {
        wait_for(&format!("{name} to run with a new pid"), SOON, || {
            let status = self.status();
            let agent = agent(&status, name)?;
            pid(&agent["pid"]).filter(|new| agent["state"] == "running" && *new != old)
        })
    }

    /// The pid of a role, `spm` or `spa`, as `status` says.
    #[track_caller]
    pub fn role_pid(&self, role: &str) -> Option<u32> {
        pid(&self.status()[role]["pid"])
    }

    /// Every process at once, as when the power fails.
    pub fn crash(&self) {
        if let Err(left) = processes::end_all(&self.home()) {
            panic!("cannot end {left:?}");
        }
    }

    /// Kills one process.
    pub fn kill(&self, pid: u32) {
        processes::signal(pid, Signal::KILL);
    }

    /// The processes that belong to this home.
    pub fn processes(&self) -> Vec<Process> {
        processes::of_home(&self.home())
    }

    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// A temporary place beside the home, for a test's own files.
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
        // Roles start each other and sub-agents again, so this goes on until all is quiet. Whatever is found is found by this directory.
        let ended = processes::end_all(self.directory.path());
        processes::remove_groups(&self.home());
        // A test of a read-only home must not keep us from removing it.
        let _ = fs::set_permissions(self.home(), std::os::unix::fs::PermissionsExt::from_mode(0o755));
        if !thread::panicking() {
            assert!(ended.is_ok(), "processes are left: {ended:?}");
        }
    }
}

/// One sub-agent's part of a status.
pub fn agent<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["agents"].as_array()?.iter().find(|agent| agent["name"] == name)
}

/// A pid of a status; `None` where it is null.
pub fn pid(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}
