//! Every failure is reported with a remedy, and running sub-agents continue: rejections of the installer on an empty host and over a
//! running installation, and rejections of the manager.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::install::systemd::runs;
use crate::support::command::{self, LIMIT, Output};
use crate::support::files::{Files, difference, snapshot};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::{Package, arch};
use crate::support::processes::is_alive;
use crate::support::wait::wait_for;

/// Files that change while a host runs.
pub(crate) const LIVING: &[&str] = &["/log", "/state/desired.json", "/state/events.json"];

/// A gateway with a manager and one sub-agent.
fn gateway() -> Gateway {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    gateway.publish(&Package::sleeper("native", "1.0.0"));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\n");
    gateway.run();
    gateway
}

/// A running host, and its files and processes when this was created.
struct RunningHost {
    host: TestHost,
    files: Files,
    pids: [u32; 3],
}

impl RunningHost {
    fn of(host: TestHost) -> RunningHost {
        host.wait_for_agent("native");
        let status = host.wait_for_status("everything to be as wanted", SOON, runs);
        let files = snapshot(&host.home(), LIVING);
        let pids = pids(&status);
        RunningHost { host, files, pids }
    }

    fn joined(gateway: &Gateway) -> RunningHost {
        RunningHost::of(TestHost::joined(gateway))
    }

    /// No file has changed, and the same processes run.
    #[track_caller]
    fn assert_untouched(&self) {
        assert_eq!(difference(&self.files, &snapshot(&self.host.home(), LIVING)), Vec::<String>::new());
        self.assert_same_processes();
    }

    #[track_caller]
    fn assert_same_processes(&self) {
        let status = self.host.status();
        assert_eq!(pids(&status), self.pids, "{status:#}");
        assert!(self.pids.iter().all(|pid| self.host.is_alive(*pid)));
    }
}

/// The pids of the roles and of the sub-agent.
#[track_caller]
fn pids(status: &Value) -> [u32; 3] {
    let agent = agent(status, "native").unwrap_or_else(|| panic!("no sub-agent in {status:#}"));
    [&status["spm"]["pid"], &status["spa"]["pid"], &agent["pid"]].map(|value| pid(value).expect("it runs"))
}

/// A rejection that changed nothing, and whose message contains these words.
#[track_caller]
pub(crate) fn assert_refused(output: &Output, code: i32, words: &[&str]) {
    assert_eq!(output.code, code, "{output}");
    assert_eq!(output.stdout, "", "messages go to stderr: {output}");
    for word in words {
        assert!(output.stderr.contains(word), "no word of {word:?} in {output}");
    }
    assert!(code != 1 || output.stderr.contains("nothing was changed"), "{output}");
}

/// On an empty host nothing is left.
#[track_caller]
fn assert_empty(host: &TestHost) {
    assert!(!host.home().exists(), "{:?}", snapshot(&host.home(), &[]).keys());
    assert_eq!(host.processes(), []);
}

/// Replaces the gateway's certificate or keys.
fn renew(gateway: &Gateway, directory: &str) {
    fs::remove_dir_all(gateway.path(directory)).expect("it is ours");
    gateway.init();
}

/// Changes one byte in the middle of a file and keeps its time, so that a running gateway does not read it again.
fn tamper(file: &Path) {
    let mut bytes = fs::read(file).expect("it exists");
    let modified = fs::metadata(file).and_then(|metadata| metadata.modified()).expect("it exists");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).expect("it is ours");
    fs::File::options().write(true).open(file).and_then(|file| file.set_modified(modified)).expect("it is ours");
}

fn package(gateway: &Gateway, release: &str) -> PathBuf {
    gateway.path("depot").join(format!("{release}_linux_{}.tar.zst", arch()))
}

#[test]
fn an_untrusted_certificate_is_rejected() {
    let gateway = gateway();
    let host = TestHost::new();
    let key = gateway.path("keys/aops.pub").display().to_string();
    let install = |more: &[&str]| {
        let common = ["--agent-id", "1", "--endpoint", gateway.url(), "--trusted-key", &key];
        host.install(&[&common[..], more].concat())
    };
    assert_refused(&install(&[]), 1, &["certificate", "--ca-cert", "--pin"]);
    assert_refused(&install(&["--pin", &"ab".repeat(32)]), 1, &["certificate", "matches no pin"]);
    let other = Gateway::stopped();
    let ca = other.path("tls/cert.pem").display().to_string();
    assert_refused(&install(&["--ca-cert", &ca]), 1, &["certificate", "--ca-cert", "--pin"]);
    assert_refused(&install(&["--ca-cert", &key]), 1, &["--ca-cert", "PEM"]);
    assert_refused(&install(&["--ca-cert", "/nowhere"]), 1, &["/nowhere"]);
    assert_empty(&host);
}

#[test]
fn a_certificate_that_differs_from_the_first_contact_is_rejected() {
    let mut gateway = gateway();
    let host = TestHost::new();
    let key = gateway.path("keys/aops.pub").display().to_string();
    let url = gateway.url().to_owned();
    let install = |more: &[&str]| {
        let common = ["--agent-id", "1", "--endpoint", &url, "--trusted-key", &key, "--pin-first-contact"];
        host.install(&[&common[..], more].concat())
    };
    install(&[]).expect_code(0);
    let standing = RunningHost::of(host);
    gateway.stop();
    renew(&gateway, "tls");
    gateway.run();

    let install = |more: &[&str]| {
        let common = ["--agent-id", "1", "--endpoint", &url, "--trusted-key", &key, "--pin-first-contact"];
        standing.host.install(&[&common[..], more].concat())
    };
    assert_refused(&install(&[]), 1, &["first contact", "state/pins.json", "certificate was replaced"]);
    standing.assert_untouched();
    // The manager rejects it too, reports why, and keeps everything running.
    let status = standing.host.wait_for_status("the manager to refuse it", SOON, |status| {
        status["gateway"]["lastError"].as_str().is_some_and(|error| error.contains("first contact"))
    });
    assert_eq!(status["gateway"]["connected"], false);
    standing.assert_same_processes();
    // Deleting or losing the pin file does not make the next contact a first one.
    let pins = standing.host.home().join("state/pins.json");
    fs::remove_file(&pins).expect("it exists");
    let words = ["pins.json is missing", "backup", "--pin", "write {} into that file"];
    assert_refused(&install(&[]), 1, &words);
    standing.host.wait_for_status("the manager to refuse it too", SOON, |status| {
        status["gateway"]["lastError"].as_str().is_some_and(|error| words.iter().all(|word| error.contains(word)))
    });
    standing.assert_same_processes();
    assert!(!pins.exists());
    // Both remedies of the message work.
    fs::write(&pins, "{}").expect("it is ours");
    install(&[]).expect_code(0);
    assert!(fs::read_to_string(&pins).expect("it is there").contains(&url));
    let connected = |status: &Value| status["gateway"]["connected"] == true;
    standing.host.wait_for_status("the gateway", SOON, connected);
    assert_eq!(standing.host.wait_for_agent("native"), standing.pids[2]);
}

#[test]
fn a_manager_signed_by_an_untrusted_key_is_rejected() {
    let mut gateway = gateway();
    let host = TestHost::new();
    let other = Gateway::stopped();
    let (key, ca) = (other.path("keys/aops.pub"), gateway.path("tls/cert.pem"));
    let (key, ca) = (key.display().to_string(), ca.display().to_string());
    let common = ["--agent-id", "1", "--endpoint", gateway.url(), "--ca-cert", &ca];
    let signed = ["signed by the key", "not trusted", "--trusted-key"];
    assert_refused(&host.install(&[&common[..], &["--trusted-key", &key]].concat()), 1, &signed);
    assert_refused(&host.install(&common), 1, &["no key", "--trusted-key"]);
    assert_empty(&host);

    let standing = RunningHost::joined(&gateway);
    gateway.stop();
    renew(&gateway, "keys");
    gateway.publish_self("2.0.0");
    gateway.run();
    // Without the new key.
    let output = standing.host.install(&["--version", "2.0.0"]);
    assert_refused(&output, 1, &signed);
    standing.assert_untouched();
}

#[test]
fn a_tampered_manager_is_rejected() {
    let gateway = gateway();
    let standing = RunningHost::joined(&gateway);
    tamper(&package(&gateway, "aops-spm-1.0.0"));
    assert_refused(&standing.host.install(&[]), 1, &["tampered with"]);
    standing.assert_untouched();
    let host = TestHost::new();
    assert_refused(&host.join(&gateway, &[]), 1, &["tampered with"]);
    assert_refused(&host.join(&gateway, &["--version", "1.0.0"]), 1, &["tampered with"]);
    assert_empty(&host);
}

#[test]
fn a_missing_version_is_rejected() {
    let gateway = gateway();
    let host = TestHost::new();
    assert_refused(&host.join(&gateway, &["--version", "9.9.9"]), 1, &["no package", "9.9.9", "publish", "--version"]);
    assert_empty(&host);
    let standing = RunningHost::joined(&gateway);
    assert_refused(&standing.host.install(&["--version", "9.9.9"]), 1, &["no package", "9.9.9", "--version"]);
    standing.assert_untouched();

    let empty = Gateway::start();
    assert_refused(&host.join(&empty, &[]), 1, &["no current version", "publish"]);
    assert_empty(&host);
}

#[test]
fn invalid_settings_are_rejected_and_a_running_manager_keeps_the_last_good_ones() {
    let gateway = gateway();
    let mut standing = RunningHost::joined(&gateway);
    let config = standing.host.home().join("etc/conf.toml");
    let good = fs::read_to_string(&config).expect("it exists");
    let broken = [
        (good.clone() + "\nheartbeatSrv = [\n", ["conf.toml", "line", "--fresh"]),
        (good.clone() + "\nheartbeatIntervall = \"5s\"\n", ["conf.toml", "heartbeatIntervall", "heartbeatInterval"]),
        (good.clone() + "\nspmMaxMem = \"much\"\n", ["conf.toml", "spmMaxMem", "--fresh"]),
    ];
    for (text, words) in broken {
        fs::write(&config, text).expect("it is ours");
        standing.files = snapshot(&standing.host.home(), LIVING);
        assert_refused(&standing.host.install(&[]), 1, &words);
        standing.assert_untouched();
    }

    // A start with an unreadable file.
    fs::write(&config, "heartbeatSrv = [\n").expect("it is ours");
    standing.host.control(&["restart"]).expect_code(0);
    let status = standing.host.wait_for_status("the problem to show", SOON, |status| {
        status["problems"].to_string().contains("conf.toml") && status["gateway"]["connected"] == true
    });
    assert_eq!(status["state"], "degraded");
    assert!(status["problems"].to_string().contains("last good"), "{status:#}");
    assert_eq!(standing.host.wait_for_agent("native"), standing.pids[2]);
    wait_for("the gateway to receive it", SOON, || {
        let status = gateway.status();
        let events = status["hosts"][0]["events"].as_array()?.clone();
        events.iter().any(|event| event["kind"] == "config" && event["outcome"] == "failed").then_some(())
    });
    // An unknown key only warns at a start.
    fs::write(&config, good + "\nheartbeatIntervall = \"5s\"\n").expect("it is ours");
    standing.host.control(&["restart"]).expect_code(0);
    let status = standing.host.wait_for_status("no problem", SOON, runs);
    assert_eq!(pids(&status)[2], standing.pids[2]);
}

#[test]
fn missing_arguments_are_wrong_usage() {
    let host = TestHost::new();
    let id = ["--agent-id", "1"];
    assert_refused(&host.install(&["--endpoint", "https://127.0.0.1:1"]), 2, &["--agent-id", "--help"]);
    assert_refused(&host.install(&id), 2, &["--endpoint", "--help"]);
    assert_refused(&host.install(&["--agent-id", "a b", "--endpoint", "https://127.0.0.1:1"]), 2, &["a b"]);
    assert_refused(&host.install(&["--agent-id", "1", "--endpoint", "gateway"]), 2, &["gateway"]);
    assert_refused(&host.install(&["--no-such-option"]), 2, &["--no-such-option"]);
    let plain = ["--agent-id", "1", "--endpoint", "http://127.0.0.1:1"];
    assert_refused(&host.install(&plain), 1, &["http://", "https://", "--insecure"]);
    let bootstrap = host.beside("aops-agent-service-linux-amd64");
    fs::copy(crate::support::aops(), &bootstrap).expect("a copy");
    let old = command::run(
        host.command(&bootstrap).args(["--control", "install", "--endpoint", "https://127.0.0.1:1"]),
        LIMIT,
    );
    assert_refused(&old, 2, &["--agent-id"]);
    assert_empty(&host);

    // A foreign directory is not used as a home.
    fs::create_dir(host.home()).and_then(|()| fs::write(host.home().join("thesis.txt"), "x")).expect("it is ours");
    let output = host.install(&[&id[..], &["--endpoint", "https://127.0.0.1:1"]].concat());
    assert_eq!(output.code, 1, "{output}");
    assert!(output.stderr.contains("thesis.txt") && output.stderr.contains("another --home"), "{output}");
    assert_eq!(snapshot(&host.home(), &[]).len(), 1);
}

/// A gateway that accepts connections and never responds.
struct Stalling {
    listener: TcpListener,
}

impl Stalling {
    fn start() -> Stalling {
        Stalling { listener: TcpListener::bind("127.0.0.1:0").expect("a free port") }
    }

    fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().expect("it is bound"))
    }
}

#[test]
fn a_concurrent_installation_is_rejected_and_a_killed_one_can_be_repeated() {
    let gateway = gateway();
    let stalling = Stalling::start();
    let host = TestHost::new();
    let key = gateway.path("keys/aops.pub").display().to_string();
    let home = host.home().display().to_string();
    let start = |host: &TestHost| {
        let url = stalling.url();
        let arguments =
            ["install", "--service", "none", "--home", &home, "--agent-id", "1", "--endpoint", &url, "--insecure"];
        let mut command = host.command(&crate::support::aops());
        command.args(arguments).args(["--trusted-key", &key]).stdin(Stdio::null()).stderr(Stdio::null());
        let first = command.spawn().expect("it can be run");
        let (connection, _) = stalling.listener.accept().expect("it asks");
        (first, connection)
    };
    let (mut first, connection) = start(&host);
    assert_refused(&host.join(&gateway, &[]), 1, &["another installation is in progress", "wait"]);
    let output = host.control(&["uninstall", "--yes"]);
    assert!(!output.success(), "{output}");
    first.kill().and_then(|()| first.wait()).expect("it is ours");
    drop(connection);
    // Its leftovers do not prevent the next installation.
    host.join(&gateway, &[]).expect_code(0);
    let standing = RunningHost::of(host);

    let (mut first, connection) = start(&standing.host);
    assert_refused(&standing.host.install(&[]), 1, &["another installation is in progress"]);
    assert_refused_uninstall(&standing.host.control(&["uninstall", "--yes"]));
    standing.assert_same_processes();
    first.kill().and_then(|()| first.wait()).expect("it is ours");
    drop(connection);
    standing.host.install(&[]).expect_code(0);
    assert_eq!(standing.host.wait_for_agent("native"), standing.pids[2]);
}

#[track_caller]
fn assert_refused_uninstall(output: &Output) {
    assert!(output.code == 1 && output.stderr.contains("another installation is in progress"), "{output}");
}

/// Starts `command`, kills it when it prints a line with `word`, and waits until it has exited.
fn kill_at(command: &mut Command, word: &str) {
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it can be run");
    let stderr = child.stderr.take().expect("it is piped");
    let reached = BufReader::new(stderr).lines().map_while(Result::ok).any(|line| line.contains(word));
    child.kill().and_then(|()| child.wait()).expect("it is ours");
    assert!(reached, "it never says {word:?}");
}

/// An installation on `host`, with further arguments.
fn installation(host: &TestHost, gateway: &Gateway, more: &[&str]) -> Command {
    let mut command = host.command(&crate::support::aops());
    command.args(["install", "--service", "none", "--agent-id", "1", "--endpoint", gateway.url(), "--home"]);
    command.arg(host.home()).args(gateway.trust()).args(more);
    command
}

const STEPS: [&str; 4] = ["downloading", "downloaded 50%", "installing version", "starting"];

#[test]
fn an_installation_killed_at_any_step_can_be_repeated_and_uninstalled() {
    let gateway = gateway();
    let host = TestHost::new();
    for step in STEPS {
        kill_at(&mut installation(&host, &gateway, &[]), step);
        command::run(&mut installation(&host, &gateway, &[]), LIMIT).expect_code(0);
        host.wait_for_agent("native");
        host.control(&["uninstall", "--yes"]).expect_code(0);
        assert_empty(&host);
    }
    // Neither does an installation that never succeeds.
    for step in ["downloading", "installing version"] {
        kill_at(&mut installation(&host, &gateway, &[]), step);
        command::run(&mut installation(&host, &gateway, &["--version", "9.9.9"]), LIMIT).expect_code(1);
        assert_empty(&host);
    }
}

#[test]
fn a_reinstallation_killed_at_any_step_can_be_repeated() {
    let gateway = gateway();
    let host = TestHost::new();
    command::run(&mut installation(&host, &gateway, &[]), LIMIT).expect_code(0);
    let agent = host.wait_for_agent("native");
    for step in STEPS {
        kill_at(&mut installation(&host, &gateway, &[]), step);
        assert!(is_alive(agent), "after a kill at {step:?}");
        command::run(&mut installation(&host, &gateway, &[]), LIMIT).expect_code(0);
        host.wait_for_status("both roles", SOON, runs);
        assert_eq!(host.wait_for_agent("native"), agent, "after a kill at {step:?}");
    }
    // With `--fresh`, the older installation is stopped and removed first.
    for step in ["stopping the existing", "installing version", "starting"] {
        kill_at(&mut installation(&host, &gateway, &["--fresh"]), step);
        command::run(&mut installation(&host, &gateway, &["--fresh"]), LIMIT).expect_code(0);
        host.wait_for_status("both roles", SOON, runs);
        host.wait_for_agent("native");
    }
    assert!(!host.home().join(".install").exists());
    host.control(&["uninstall", "--yes"]).expect_code(0);
    assert_empty(&host);
}

/// The last event of a kind about a sub-agent that the gateway has received.
pub(crate) fn event(status: &Value, kind: &str, name: &str) -> Option<Value> {
    let events = status["hosts"][0]["events"].as_array()?;
    events.iter().rev().find(|event| event["kind"] == kind && event["agent"] == name).cloned()
}

#[test]
fn a_release_that_cannot_be_verified_or_run_leaves_the_old_one_running() {
    let gateway = gateway();
    let standing = RunningHost::joined(&gateway);
    let fleet = |version: &str| {
        gateway.fleet(&format!("heartbeatInterval = \"1s\"\nagents.native.version = {version:?}\n"));
    };
    let told = |version: &str, words: &[&str]| {
        fleet(version);
        let status =
            standing.host.wait_for_status(&format!("{version} to be refused with {words:?}"), SOON, |status| {
                // The error of the previous one may contain the same words.
                agent(status, "native").is_some_and(|agent| {
                    let error = agent["lastError"].to_string();
                    agent["state"] == "running" && words.iter().all(|word| error.contains(word))
                })
            });
        let native = agent(&status, "native").expect("it exists");
        assert_eq!((&native["version"], &native["state"]), (&"1.0.0".into(), &"running".into()), "{status:#}");
        standing.assert_same_processes();
        wait_for("the gateway to receive it", SOON, || {
            let event = event(&gateway.status(), "stage", "native")?;
            let message = event["message"].as_str()?;
            (event["version"] == version && event["outcome"] != "ok" && message.contains(words[0])).then_some(())
        });
    };

    // Tampered with in the depot.
    gateway.publish(&Package::sleeper("native", "2.0.0"));
    wait_for("the gateway to offer it", SOON, || (gateway.status()["gateway"]["packages"] == 3).then_some(()));
    tamper(&package(&gateway, "native-2.0.0"));
    told("2.0.0", &["tampered with", "Publish it again"]);

    // Signed by another key.
    let other = Gateway::stopped();
    let key = other.path("keys/aops.key").display().to_string();
    let untrusted = Package::sleeper("native", "3.0.0");
    gateway.publish_with(&["--key", &key, &untrusted.path().display().to_string()]).expect_code(0);
    told("3.0.0", &["not trusted", "--trusted-key"]);

    // Publishing rejects an invalid manifest; the host rejects one that reached the depot by other means.
    for (version, manifest, words) in [
        (
            "4.0.0",
            "name = \"native\"\nversion = \"4.0.0\"\n[run]\ncommand = [\"bin/run\"]\nstopsignal = \"TERM\"\n",
            ["agent.toml", "stopsignal"],
        ),
        ("5.0.0", "name = \"native\"\nversion = \"5.0.0\"\n[run\n", ["agent.toml", "line"]),
    ] {
        let malformed = Package::sleeper("native", version).with_file("agent.toml", manifest, 0o644);
        let refused = gateway.publish_with(&[&malformed.path().display().to_string()]);
        assert!(refused.code == 1 && words.iter().all(|word| refused.stderr.contains(word)), "{refused}");
        place(&gateway, &malformed);
        told(version, &words);
    }

    // A valid one is installed at once.
    gateway.publish(&Package::sleeper("native", "7.0.0"));
    fleet("7.0.0");
    let status = standing.host.wait_for_status("a good release", SOON, |status| {
        agent(status, "native").is_some_and(|agent| agent["version"] == "7.0.0" && agent["state"] == "running")
    });
    assert_eq!(agent(&status, "native").expect("it exists")["lastError"], Value::Null);
}

/// Puts a package into the depot without `publish`, signed with the gateway's key.
fn place(gateway: &Gateway, package: &Package) {
    let (name, version) = (package.name(), package.version());
    let file = gateway.path("depot").join(format!("{name}-{version}_linux_{}.tar.gz", arch()));
    let beside = gateway.path("unsigned.tar.gz");
    command::run(Command::new("tar").arg("-C").arg(package.path()).arg("-czf").arg(&beside).arg("."), LIMIT)
        .expect_code(0);
    let comment = format!("name={name} version={version} os=linux arch={} epoch=1", arch());
    let signature = PathBuf::from(format!("{}.minisig", file.display()));
    let mut sign = Command::new("minisign");
    sign.arg("-S").arg("-s").arg(gateway.path("keys/aops.key")).arg("-m").arg(&beside).arg("-x").arg(signature);
    command::run(sign.args(["-t", &comment]), LIMIT).expect_code(0);
    fs::rename(beside, file).expect("it is ours");
}
