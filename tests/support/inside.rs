//! A gateway inside a container, at the address that hosts of the old platform use: 127.0.0.1:8888.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::aops;
use super::command::{self, LIMIT, Output};
use super::container::{Container, Running};
use super::gateway::Gateway;
use super::host::{SOON, agent, pid};
use super::wait::try_for;

/// The program under test, in a path that is not compared.
pub const PROGRAM: &str = "/tmp/aops";
/// The gateway's directory.
pub const DIRECTORY: &str = "/tmp/gateway";
/// Its endpoint.
pub const URL: &str = "https://127.0.0.1:8888";

macro_rules! verbatim {
    ($arch:literal) => {
        concat!(
            "curl -kf4 -m 30 -X GET https://127.0.0.1:8888/api/download/aops-agent-service-linux-",
            $arch,
            " -H 'x-agent-id: 5402204854438' -o aops-agent-service-linux-",
            $arch,
            " && chmod +x aops-agent-service-linux-",
            $arch,
            " && ./aops-agent-service-linux-",
            $arch,
            " --control install --version c57f6a1d --agentId 5402204854438 --endpoint https://127.0.0.1:8888"
        )
    };
}

/// The command that the old platform prints, verbatim.
pub const VERBATIM: &str = if cfg!(target_arch = "x86") { verbatim!("386") } else { verbatim!("amd64") };
/// The file that it downloads.
pub const BOOTSTRAP: &str = if cfg!(target_arch = "x86") {
    "/root/aops-agent-service-linux-386"
} else {
    "/root/aops-agent-service-linux-amd64"
};

/// A gateway that runs inside a container; dropping it stops it.
#[derive(Debug)]
pub struct Inside<'a> {
    container: &'a Container,
    /// The gateway outside in which it was created; later packages are published there first.
    outside: Gateway,
    running: Option<Running<'a>>,
    /// Host and port.
    address: &'static str,
    /// The name of its network namespace inside the container; `None`: the container's own.
    network: Option<&'static str>,
}

impl<'a> Inside<'a> {
    /// Starts a gateway with the depot of `outside`, which does not run itself.
    pub fn start(container: &'a Container, outside: Gateway) -> Inside<'a> {
        Inside::start_at(container, outside, "127.0.0.1:8888", None)
    }

    /// As [`Inside::start`], at another address of the container's networks.
    pub fn start_at(
        container: &'a Container,
        outside: Gateway,
        address: &'static str,
        network: Option<&'static str>,
    ) -> Inside<'a> {
        container.copy_in(aops(), PROGRAM, 0o755);
        let mut inside = Inside { container, outside, running: None, address, network };
        inside.bring("");
        inside.run();
        inside
    }

    pub fn run(&mut self) {
        let enter = self.network.map(|network| format!("--net=/run/netns/{network}"));
        let mut words: Vec<&str> = enter.iter().flat_map(|network| ["nsenter", network]).collect();
        words.extend([PROGRAM, "gateway", "run", "--dir", DIRECTORY, "--listen", self.address]);
        let running = self.container.spawn(&words);
        assert_eq!(running.line(), format!("listening on https://{}", self.address));
        self.running = Some(running);
    }

    pub fn stop(&mut self) {
        self.running = None;
    }

    /// Publishes packages with the gateway outside, and copies the depot into the container.
    pub fn publish(&self, publish: impl FnOnce(&Gateway)) {
        publish(&self.outside);
        self.bring("depot");
    }

    /// Replaces `fleet.toml` atomically.
    pub fn fleet(&self, text: &str) {
        self.outside.fleet(text);
        self.container.write(Path::new(DIRECTORY).join("fleet.toml"), text, 0o644);
    }

    /// The output of `aops gateway status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.container.run(&[PROGRAM, "gateway", "status", "--dir", DIRECTORY, "--json"]).expect_code(0).json()
    }

    /// Replaces a part of the gateway's directory with a copy.
    fn bring(&self, part: &str) {
        let target = self.container.path(DIRECTORY).join(part);
        fs::create_dir_all(&target).expect("the container's files are ours");
        fs::set_permissions(self.container.path(DIRECTORY), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let source = self.outside.path(part).join(".");
        command::run(Command::new("cp").arg("-a").arg(source).arg(target), LIMIT).expect_success();
    }
}

/// The output of `aops control status --json` of the default home's `control`.
#[track_caller]
pub fn status(container: &Container) -> Value {
    container.run(&["/opt/aops/control", "status", "--json"]).json()
}

/// Waits until `wanted` accepts that status, and returns it.
#[track_caller]
pub fn wait_for_status(container: &Container, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    wait_within(container, SOON, what, wanted)
}

/// As [`wait_for_status`], with another deadline.
#[track_caller]
pub fn wait_within(container: &Container, limit: Duration, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let found = try_for(limit, || {
        last = status(container);
        wanted(&last).then(|| last.clone())
    });
    found.unwrap_or_else(|| panic!("timed out after {limit:?} waiting for {what}; the last status: {last:#}"))
}

/// Waits until these sub-agents run, and returns their pids as seen inside the container.
#[track_caller]
pub fn wait_for_agents(container: &Container, names: &[&str]) -> Vec<u32> {
    let pids = |status: &Value| -> Option<Vec<u32>> {
        let one = |name: &&str| {
            agent(status, name).filter(|agent| agent["state"] == "running").map(|agent| pid(&agent["pid"]))
        };
        names.iter().map(one).collect::<Option<Option<Vec<_>>>>()?
    };
    let status = wait_for_status(container, &format!("{names:?} to run"), |status| pids(status).is_some());
    pids(&status).expect("it was waited for")
}

/// The processes of an installation of aops.
pub fn processes_of_aops(container: &Container) -> Vec<(u32, String)> {
    let ours = |words: &str| !words.contains(PROGRAM) && (words.contains("aops") || words.contains("1000000"));
    container.processes().into_iter().filter(|(_, words)| ours(words)).collect()
}

/// The space of a home's file system.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    /// For this number of executables ...
    pub executables: u64,
    /// ... and this beside them, in MiB.
    pub mebibytes: u64,
    /// The number of files, or 0 for any number.
    pub inodes: u32,
}

impl Space {
    /// Enough for an installation, and for the download of another one.
    pub const SMALL: Space = Space { executables: 2, mebibytes: 92, inodes: 0 };
}

/// Gives the default home a file system of its own, in memory.
pub fn mount_home(container: &Container, space: Space) {
    let executable = fs::metadata(aops()).expect("it was built").len().div_ceil(1 << 20);
    let mebibytes = space.executables * executable + space.mebibytes;
    let options = format!("size={mebibytes}m,nr_inodes={}", space.inodes);
    done(container, &format!("mkdir /opt/aops && mount -t tmpfs -o {options} tmpfs /opt/aops"));
}

/// Runs a script inside, which must succeed.
#[track_caller]
pub fn done(container: &Container, script: &str) -> Output {
    container.run(&["sh", "-c", script]).expect_code(0)
}
