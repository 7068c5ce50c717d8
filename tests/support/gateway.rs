//! A gateway on loopback, in a temporary directory, on its own port.

use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::aops;
use super::command::{self, LIMIT, Output};
use super::package::Package;
use super::{processes, release, windows};

/// The deadline for a started gateway to respond.
const START: Duration = Duration::from_secs(30);
/// The deadline for a killed gateway to exit.
const END: Duration = Duration::from_secs(10);

/// A gateway; dropping it stops it and removes its directory.
#[derive(Debug)]
pub struct Gateway {
    directory: TempDir,
    running: Option<Child>,
    url: String,
}

impl Gateway {
    /// Creates keys, a certificate and an empty depot, and starts the gateway without sub-agents; it responds when this returns.
    pub fn start() -> Gateway {
        let mut gateway = Gateway::stopped();
        gateway.run();
        gateway
    }

    /// Starts a gateway that offers a manager, version 1.0.0, and these packages, and orders these sub-agents: name, version, further
    /// lines.
    #[track_caller]
    pub fn with(packages: &[&Package], wanted: &[(&str, &str, &str)]) -> Gateway {
        let mut gateway = Gateway::stopped();
        gateway.publish_self("1.0.0");
        packages.iter().for_each(|package| gateway.publish(package));
        gateway.want(wanted);
        gateway.run();
        gateway
    }

    /// Orders exactly these sub-agents from now on: name, version, further lines of `fleet.toml`. Hosts report every second, and remove
    /// omitted sub-agents at once.
    pub fn want(&self, wanted: &[(&str, &str, &str)]) {
        let tables =
            wanted.iter().map(|(name, version, more)| format!("[agents.{name}]\nversion = {version:?}\n{more}\n"));
        self.fleet(&format!("heartbeatInterval = \"1s\"\nremovalDelay = \"0s\"\n{}", tables.collect::<String>()));
    }

    /// Creates a gateway without starting it.
    pub fn stopped() -> Gateway {
        let directory = tempfile::Builder::new().prefix("aops-gateway-").tempdir().expect("a temporary directory");
        let gateway = Gateway { directory, running: None, url: "https://127.0.0.1:0".to_owned() };
        gateway.init();
        gateway
    }

    /// Creates missing keys and a missing certificate.
    #[track_caller]
    pub fn init(&self) {
        self.command(&["init"], &[]).expect_success();
    }

    /// Starts it, on its previous port if it ran before.
    pub fn run(&mut self) {
        self.run_by(&[]);
    }

    /// As [`Gateway::run`], with a delay of each sync of a file in seconds.
    pub fn run_with_slow_syncs(&mut self, seconds: u32) {
        let injection = format!("--inject=fsync,fdatasync:delay_enter={seconds}s");
        self.run_by(&["strace", "-f", "-qq", "-I2", "-o", "/dev/null", &injection, "--"]);
    }

    /// Starts it as the last words of a command.
    fn run_by(&mut self, starter: &[&str]) {
        assert!(self.running.is_none(), "the gateway runs already");
        let listen = self.url.trim_start_matches("https://").to_owned();
        let log = fs::File::create(self.log()).expect("a temporary directory can be written");
        let own = self.aops(&["run"], &["--listen", &listen]);
        let words = starter.iter().map(OsStr::new).chain([own.get_program()]).chain(own.get_args());
        let words: Vec<_> = words.collect();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("cannot run aops");
        let receiver = command::lines(child.stdout.take().expect("it is piped"));
        self.running = Some(child);
        let line = receiver.recv_timeout(START).unwrap_or_else(|error| {
            panic!(
                "the gateway does not say where it listens: {error}\n{}",
                fs::read_to_string(self.log()).unwrap_or_default()
            )
        });
        let url = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("not where it listens: {line}"));
        let address: SocketAddr = url.trim_start_matches("https://").parse().expect("an address and a port");
        self.url = format!("https://127.0.0.1:{}", address.port());
    }

    /// Kills it. Its directory stays, and [`Gateway::run`] starts it again.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.running.take() {
            // A tracer exits with the gateway that it traces.
            processes::children(child.id()).into_iter().for_each(|pid| processes::signal(pid, Signal::KILL));
            let _ = child.kill();
            command::wait(&mut child, END).expect("a killed gateway ends");
        }
    }

    /// Stops it with a signal, as a service manager does, and returns its exit code.
    #[track_caller]
    pub fn terminate(&mut self) -> i32 {
        let mut child = self.running.take().expect("the gateway does not run");
        processes::signal(child.id(), Signal::TERM);
        command::wait(&mut child, END + END).expect("the gateway exits after its stop signal")
    }

    /// Publishes a package. A running gateway offers it some moments later: publish first, or wait for the effect.
    #[track_caller]
    pub fn publish(&self, package: &Package) {
        let arguments = package.arguments();
        self.publish_with(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).expect_success();
    }

    /// Publishes the program under test as the manager's package and as the bootstrap executable.
    #[track_caller]
    pub fn publish_self(&self, version: &str) {
        match windows::under_test() {
            None => drop(self.publish_with(&["--self", "--version", version]).expect_success()),
            Some(_) => self.publish(&release::with_executable(version, release::tested())),
        }
    }

    pub fn publish_with(&self, arguments: &[&str]) -> Output {
        self.command(&["publish"], arguments)
    }

    /// Replaces `fleet.toml` atomically, and applies it at once if it is valid.
    pub fn fleet(&self, text: &str) {
        let new = self.path("fleet.toml.new");
        fs::write(&new, text).expect("a temporary directory can be written");
        if !self.command(&["fleet", "apply"], &[&new.display().to_string()]).success() {
            self.edit_fleet(text);
        }
    }

    /// Replaces `fleet.toml` atomically as an editor does: a running gateway applies it after it has been unchanged for a while.
    pub fn edit_fleet(&self, text: &str) {
        let new = self.path("fleet.toml.new");
        fs::write(&new, text).expect("a temporary directory can be written");
        fs::rename(&new, self.path("fleet.toml")).expect("a temporary directory can be written");
    }

    /// The pid of the running gateway.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.running.as_ref().expect("the gateway does not run").id()
    }

    /// Makes it read its files again.
    pub fn reload(&self) {
        processes::signal(self.pid(), Signal::HUP);
    }

    /// The output of `aops gateway status --json`.
    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        let output = self.command(&["status"], &["--json"]);
        assert!(output.success(), "{output}");
        output.json()
    }

    /// `https://127.0.0.1:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A file of the gateway's directory, such as `keys/aops.pub` or `tls/cert.pem`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The arguments of an installation that trusts this gateway.
    pub fn trust(&self) -> Vec<String> {
        let path = |name| self.path(name).display().to_string();
        vec!["--trusted-key".to_owned(), path("keys/aops.pub"), "--ca-cert".to_owned(), path("tls/cert.pem")]
    }

    /// The path of its log.
    pub fn log(&self) -> PathBuf {
        self.path("gateway.log")
    }

    /// `aops gateway` with this subcommand, for this gateway's directory.
    pub fn command(&self, subcommand: &[&str], arguments: &[&str]) -> Output {
        command::run(&mut self.aops(subcommand, arguments), LIMIT)
    }

    fn aops(&self, subcommand: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::new(aops());
        command.arg("gateway").args(subcommand).arg("--dir").arg(self.directory.path()).args(arguments);
        command
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            show(&self.log());
        }
    }
}

/// Prints the end of a log with the output of a failed test.
#[allow(clippy::print_stderr, reason = "the test program shows it with the failure")]
pub fn show(log: &Path) {
    const LINES: usize = 40;
    if let Ok(text) = fs::read_to_string(log) {
        let lines: Vec<_> = text.lines().collect();
        anstream::eprintln!("--- {}\n{}", log.display(), lines[lines.len().saturating_sub(LINES)..].join("\n"));
    }
}
