//! Every later version takes over a home of an earlier one and loses nothing of its state: the homes in `tests/data/state-v*`, each under
//! the executable under test.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::support::aops;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::{Package, arch};
use crate::support::release::{self, NAME};
use crate::support::wait::wait_for;
use crate::upgrades::self_upgrades::wait_for_release;

/// The endpoint and the path in the stored home.
const ENDPOINT: &str = "https://127.0.0.1:8888";
const HOME: &str = "/srv/aops";
/// The state files that keep fields of a later version. A home of version 0 has only some of them.
const KEEPING: [&str; 10] = [
    "desired.json",
    "epochs.json",
    "events.json",
    "history.json",
    "install.json",
    "instance.json",
    "keys.json",
    "manager.json",
    "releases.json",
    "upgrade.json",
];
/// Those of them that the manager writes when a release is committed and a skip is lifted.
const WRITTEN: [&str; 5] = ["desired.json", "events.json", "history.json", "releases.json", "upgrade.json"];
/// The releases of `native`.
const ACTIVE: &str = "2.0.0";
const BACKUP: &str = "1.0.0";
/// The active release of `classic`.
const CLASSIC: &str = "3.1";
/// The env of `native` in the desired state.
const ENV: &str = "env = { COLOUR = \"blue\" }";

/// A home of `tests/data`, and what its gateway offered and last ordered.
struct StoredHome {
    name: &'static str,
    /// Name, version and epoch.
    packages: &'static [(&'static str, &'static str, &'static str)],
    /// The versions of `native` and `classic`.
    ordered: [&'static str; 2],
}

const V0: StoredHome = StoredHome {
    name: "state-v0",
    packages: &[("native", ACTIVE, "2"), ("classic", CLASSIC, "1")],
    ordered: [ACTIVE, CLASSIC],
};
/// The ordered release of `native` failed and is skipped; that of `classic` is overruled by the operator. So are 3.0.0 and 4.0.0 of the
/// manager.
const V1: StoredHome = StoredHome {
    name: "state-v1",
    packages: &[
        ("native", ACTIVE, "2"),
        ("native", "3.0.0", "2"),
        ("classic", CLASSIC, "1"),
        ("classic", "3.2", "1"),
        (NAME, "3.0.0", "1"),
        (NAME, "4.0.0", "1"),
    ],
    ordered: ["3.0.0", "3.2"],
};

/// A stored home on a host of its own, under the executable under test.
struct EarlierHome {
    host: TestHost,
    gateway: Gateway,
    /// `state/desired.json` as it was stored.
    desired: Value,
}

impl EarlierHome {
    /// The home of `tests/data/<name>`, and its gateway, which does not run.
    fn over(kept: &StoredHome) -> EarlierHome {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(kept.name);
        let read = |file: &str| fs::read_to_string(data.join("home").join(file)).expect("it is kept");
        let json = |file: &str| serde_json::from_str::<Value>(&read(file)).expect("it is JSON");
        let desired = json("state/desired.json");

        let mut gateway = Gateway::stopped();
        for (name, version, epoch) in kept.packages {
            let archive = data.join(format!("packages/{name}-{version}_linux_amd64.tar.zst")).display().to_string();
            let of = ["--name", name, "--version", version, "--os", "linux", "--arch", arch(), "--epoch", epoch];
            gateway.publish_with(&[&of[..], &[&archive]].concat()).expect_success();
        }
        let [native, classic] = kept.ordered;
        gateway.want(&[("native", native, ENV), ("classic", classic, "")]);
        let lineage = desired["lineage"].as_str().expect("it is kept");
        fs::write(gateway.path("state/lineage"), format!("{lineage}\n")).expect("a temporary directory can be written");
        // It has a port from now on.
        gateway.run();
        gateway.stop();

        let host = TestHost::new();
        let keys = json("state/keys.json");
        let key = keys["brought"][0]["key"].as_str().expect("it is kept").to_owned();
        let own_key = fs::read_to_string(gateway.path("keys/aops.pub")).expect("it was created");
        let own_key = own_key.lines().last().expect("a key has two lines").to_owned();
        let pins = json("state/pins.json");
        let pin = pins["pins"][ENDPOINT]["certificate"].as_str().expect("it is kept").to_owned();
        let certificate = CertificateDer::from_pem_file(gateway.path("tls/cert.pem")).expect("it was created");
        let digest: String = Sha256::digest(&certificate).iter().map(|byte| format!("{byte:02x}")).collect();
        let own_pin = format!("sha256:{digest}");
        let home = host.home().display().to_string();
        let mut exchanged = vec![
            (key.as_str(), own_key.as_str()),
            (pin.as_str(), own_pin.as_str()),
            (ENDPOINT, gateway.url()),
            (HOME, home.as_str()),
        ];
        let has_backup = data.join("home/state/upgrade.json").exists();
        let upgrade = if has_backup { json("state/upgrade.json") } else { Value::Null };
        let backup = release::executable("2.0.0");
        let own_backup: String = Sha256::digest(&backup).iter().map(|byte| format!("{byte:02x}")).collect();
        if let Some(kept_backup) = upgrade["previous"]["executable"].as_str() {
            exchanged.push((kept_backup, &own_backup));
        }
        copy(&data.join("home"), &host.home(), &exchanged);
        fs::copy(aops(), host.home().join("bin/aops")).expect("a copy");
        if has_backup {
            let path = host.home().join("bin/aops.prev");
            fs::write(&path, backup).expect("a temporary directory can be written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
        }
        for directory in ["state", "cache", "run", "run/agents", "staging", "log", "log/agents"] {
            let directory = host.home().join(directory);
            fs::create_dir_all(&directory).expect("a temporary directory can be written");
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).expect("it is ours");
        }
        let machine = ["/var/lib/dbus/machine-id", "/etc/machine-id"];
        let machine = machine.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let taken = EarlierHome { host, gateway, desired };
        taken.change("instance.json", |instance| instance["machineId"] = json!(machine.trim()));
        taken
    }

    /// The state files of [`KEEPING`] that this home has.
    fn keeping(&self) -> Vec<&'static str> {
        KEEPING.into_iter().filter(|file| self.host.home().join("state").join(file).exists()).collect()
    }

    /// Runs the gateway, and waits until the running manager has accepted its desired state and reported again.
    #[track_caller]
    fn follow_gateway(&mut self) -> Value {
        let kept_generation = self.desired["generation"].as_u64().expect("it is kept");
        self.gateway.run();
        // A manager contacts the gateway at once when it starts.
        self.host.control(&["restart"]).expect_code(0);
        let status = self.host.wait_for_status("the gateway's desired state", SOON, |status| {
            status["gateway"]["connected"] == true && status["generation"].as_u64() > Some(kept_generation)
        });
        self.wait_for_heartbeat(&status)
    }

    /// Waits for a heartbeat after that of `status`.
    #[track_caller]
    fn wait_for_heartbeat(&self, status: &Value) -> Value {
        let last = |status: &Value| status["gateway"]["lastHeartbeat"].as_str().map(str::to_owned);
        self.host.wait_for_status("a later heartbeat", SOON, |now| last(now) > last(status))
    }

    /// Orders this release of the manager in addition to the orders of sub-agents.
    fn order_manager(&self, kept: &StoredHome, version: &str) {
        let [native, classic] = kept.ordered;
        self.gateway.fleet(&format!(
            "heartbeatInterval = \"1s\"\nmanager.version = {version:?}\n\
             [agents.native]\nversion = {native:?}\n{ENV}\n[agents.classic]\nversion = {classic:?}\n"
        ));
    }

    fn state(&self, file: &str) -> Value {
        let bytes = fs::read(self.host.home().join("state").join(file)).expect("it exists");
        serde_json::from_slice(&bytes).expect("it is JSON")
    }

    fn change(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.state(file);
        change(&mut value);
        let path = self.host.home().join("state").join(file);
        fs::write(&path, serde_json::to_vec_pretty(&value).expect("it is JSON")).expect("it is ours");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("it is ours");
    }

    /// Waits until both sub-agents run at the versions of the stored home; returns their pids.
    #[track_caller]
    fn wait_until_up(&self) -> [u32; 2] {
        let status = self.host.wait_for_status("every sub-agent at its version", SOON, |status| {
            let up = |name: &str, version: &str| {
                agent(status, name).is_some_and(|agent| agent["state"] == "running" && agent["version"] == version)
            };
            up("native", ACTIVE) && up("classic", CLASSIC) && pid(&status["spa"]["pid"]).is_some()
        });
        wait_for("the ledger to say what is on disk", SOON, || {
            let ledger = fs::read(self.host.home().join("state/releases.json")).ok()?;
            let ledger: Value = serde_json::from_slice(&ledger).ok()?;
            let native = &ledger["agents"]["native"];
            (native["active"]["version"] == ACTIVE && native["backup"]["version"] == BACKUP).then_some(())
        });
        ["native", "classic"].map(|name| pid(&agent(&status, name).expect("it exists")["pid"]).expect("it runs"))
    }

    fn has_release(&self, version: &str) -> bool {
        self.host.home().join("agents/native").join(version).join(".complete").exists()
    }
}

/// Copies a tree with its links; texts in `exchanged` are replaced.
fn copy(from: &Path, to: &Path, exchanged: &[(&str, &str)]) {
    fs::create_dir_all(to).expect("a temporary directory can be written");
    let entries = fs::read_dir(from).expect("it is kept").map(|entry| entry.expect("it is kept"));
    for (path, target) in entries.map(|entry| (entry.path(), to.join(entry.file_name()))) {
        if path.is_symlink() {
            symlink(fs::read_link(&path).expect("it is a link"), &target)
                .expect("a temporary directory can be written");
        } else if path.is_dir() {
            copy(&path, &target, exchanged);
        } else {
            let text = fs::read_to_string(&path).expect("every file of a kept home is text");
            let text = exchanged.iter().fold(text, |text, (kept, own)| text.replace(kept, own));
            fs::write(&target, text).expect("a temporary directory can be written");
            let is_private = path.parent().is_some_and(|parent| parent.ends_with("state"));
            let kept = fs::metadata(&path).expect("it is kept").permissions().mode() & 0o755;
            let mode = if is_private { 0o600 } else { kept | 0o644 };
            fs::set_permissions(&target, fs::Permissions::from_mode(mode)).expect("it is ours");
        }
    }
}

#[test]
fn every_kept_home_is_tested() {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let entries = fs::read_dir(data).expect("it is kept").map(|entry| entry.expect("it is kept").file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with("state-v"));
    names.sort();
    assert_eq!(names, [V0.name, V1.name]);
}

#[test]
fn an_earlier_home_starts_without_a_gateway_and_can_be_stopped_and_removed() {
    for kept in [V0, V1] {
        let (taken, name) = (EarlierHome::over(&kept), kept.name);
        taken.host.control(&["status"]).expect_code(3);
        taken.host.control(&["start"]).expect_code(0);
        taken.wait_until_up();
        let status = taken.host.status();
        assert_eq!(status["gateway"]["connected"], false, "{name}: {status:#}");
        assert_eq!(status["generation"], taken.desired["generation"], "{name}: {status:#}");
        assert!(taken.has_release(BACKUP) && taken.has_release(ACTIVE), "{name}: a release is gone");

        // A restart finds the same again.
        taken.host.control(&["restart"]).expect_code(0);
        taken.wait_until_up();
        assert!(taken.has_release(BACKUP) && taken.has_release(ACTIVE), "{name}: a release is gone");
        taken.host.control(&["stop"]).expect_code(0);
        assert_eq!(taken.host.processes(), [], "{name}");
        taken.host.control(&["uninstall", "--yes"]).expect_code(0);
        assert!(!taken.host.home().exists(), "{name}: files are left");
    }
}

#[test]
fn an_earlier_home_follows_its_gateway_and_keeps_its_state() {
    for kept in [V0, V1] {
        let (mut taken, name) = (EarlierHome::over(&kept), kept.name);
        // As a later version may have left it before this one was restored.
        let unknown = json!({ "form": 7, "names": ["native"] });
        let keeping = taken.keeping();
        assert!(kept.name == V0.name || keeping == KEEPING, "{name}: {keeping:?}");
        for file in &keeping {
            taken.change(file, |value| value["ofALaterVersion"] = unknown.clone());
        }
        let [keys, instance, install, epochs, events] =
            ["keys.json", "instance.json", "install.json", "epochs.json", "events.json"].map(|file| taken.state(file));
        let pins = taken.state("pins.json");
        let inode = |file: &str| fs::metadata(taken.host.home().join("state").join(file)).map(|file| file.ino()).ok();
        let inodes = WRITTEN.map(inode);
        taken.host.control(&["start"]).expect_code(0);
        let pids = taken.wait_until_up();

        // The gateway orders what it ordered before: its state is accepted, and nothing is restarted.
        taken.follow_gateway();
        assert_eq!(taken.wait_until_up(), pids, "{name}: a sub-agent was restarted");
        assert_eq!(taken.state("desired.json")["lineage"], taken.desired["lineage"], "{name}");
        wait_for("the earlier events to be reported to the gateway", SOON, || {
            let status = taken.gateway.status();
            let kept = &events["events"][0]["id"];
            status["hosts"][0]["events"].as_array()?.iter().any(|event| event["id"] == *kept).then_some(())
        });

        // A new release of one of them: the running one becomes its backup.
        taken.gateway.publish(&Package::sleeper("native", "5.0.0"));
        taken.gateway.want(&[("native", "5.0.0", ENV), ("classic", kept.ordered[1], "")]);
        taken.host.wait_for_status("the other release", SOON, |status| {
            agent(status, "native").is_some_and(|agent| agent["version"] == "5.0.0" && agent["state"] == "running")
        });
        let status = taken.host.status();
        assert_eq!(pid(&agent(&status, "classic").expect("it exists")["pid"]), Some(pids[1]), "{name}");
        assert!(taken.has_release(ACTIVE), "{name}: the backup is gone");

        taken.host.control(&["retry", NAME]).expect_success();
        wait_for("what changed to be written", SOON, || {
            let path = |file: &str| taken.host.home().join("state").join(file);
            let is_written = |(file, before): (&&str, Option<u64>)| {
                let now = fs::metadata(path(file)).map(|file| file.ino()).ok();
                now != before || (now.is_none() && kept.name == V0.name)
            };
            WRITTEN.iter().zip(inodes).all(is_written).then_some(())
        });
        let lost: Vec<_> = keeping.iter().filter(|file| taken.state(file)["ofALaterVersion"] != unknown).collect();
        assert_eq!(lost, [&""; 0], "{name}: these lost what a later version wrote");
        // It has gained the public key, and is unchanged for an older version.
        let mut gained = taken.state("pins.json");
        let pinned = gained["pins"].as_object_mut().and_then(|pins| pins.values_mut().next()).expect("it has one");
        let key = pinned.as_object_mut().and_then(|pinned| pinned.remove("key"));
        assert!(key.is_some_and(|key| key.as_str().is_some_and(|key| key.starts_with("sha256:"))), "{name}: {gained}");
        assert_eq!(gained, without_key(pins), "{name}");
        for (file, field, before) in [
            ("keys.json", "brought", &keys),
            ("instance.json", "instanceId", &instance),
            ("install.json", "createdDirectories", &install),
        ] {
            assert_eq!(taken.state(file)[field], before[field], "{name}: {file}");
        }
        let epochs_now = taken.state("epochs.json");
        for (agent, epoch) in epochs["epochs"].as_object().expect("they are kept") {
            let now = &epochs_now["epochs"][agent];
            assert!(now.as_u64() >= epoch.as_u64(), "{name}: the epoch of {agent} is {now}, it was {epoch}");
        }
        assert!(taken.state("events.json")["lastId"].as_u64() >= events["lastId"].as_u64(), "{name}");
        taken.host.control(&["uninstall", "--yes"]).expect_code(0);
    }
}

#[test]
fn a_skipped_release_and_a_hold_of_a_sub_agent_outlast_a_change_of_version() {
    let mut taken = EarlierHome::over(&V1);
    let (ledger, history) = (taken.state("releases.json"), taken.state("history.json"));
    let log = taken.host.home().join("log/agents/native.log");
    let starts = || fs::read_to_string(&log).expect("it is kept").matches("native 3.0.0 runs").count();
    let starts_before = starts();
    assert_eq!(starts_before, 3);
    taken.host.control(&["start"]).expect_code(0);
    taken.wait_until_up();
    let status = taken.follow_gateway();
    let (native, classic) =
        (agent(&status, "native").expect("it exists"), agent(&status, "classic").expect("it exists"));
    let kept = &ledger["agents"]["native"]["skipped"][0];
    assert_eq!(kept["version"], "3.0.0");
    assert_eq!(native["skipped"], json!([{ "version": "3.0.0", "reason": kept["reason"] }]), "{status:#}");
    assert_eq!((&native["version"], &native["heldByOperator"]), (&json!(ACTIVE), &Value::Null), "{status:#}");
    assert_eq!((&classic["version"], &classic["heldByOperator"]), (&json!(CLASSIC), &json!(true)), "{status:#}");
    assert_eq!(starts(), starts_before, "it was tried again");
    let shown = taken.host.control(&["status", "--history", "--json"]).json();
    assert_eq!(shown["history"], history["history"]);

    taken.host.control(&["retry", "classic"]).expect_success();
    taken.host.wait_for_status("the ordered release of classic", SOON, |status| {
        agent(status, "classic")
            .is_some_and(|agent| agent["version"] == "3.2" && agent["heldByOperator"] == Value::Null)
    });
}

/// The displayed problem of the manager's release.
fn problem(status: &Value) -> Option<&str> {
    status["problems"].as_array()?.iter().filter_map(Value::as_str).find(|problem| problem.starts_with(NAME))
}

#[test]
fn a_skipped_release_and_a_hold_of_the_manager_outlast_a_change_of_version() {
    let mut taken = EarlierHome::over(&V1);
    let (record, history) = (taken.state("upgrade.json"), taken.state("history.json"));
    assert_eq!((&record["overruled"]["version"], &record["skipped"][0]["version"]), (&json!("4.0.0"), &json!("3.0.0")));
    taken.order_manager(&V1, "4.0.0");
    taken.host.control(&["start"]).expect_code(0);
    let pids = taken.wait_until_up();
    let status = taken.follow_gateway();
    let status = taken.wait_for_heartbeat(&status);
    assert_eq!((&status["version"], &status["heldByOperator"]), (&json!("1.0.0"), &json!(true)), "{status:#}");
    assert_eq!((&status["upgrade"], problem(&status)), (&Value::Null, None), "{status:#}");

    // A new order ends the hold; that release failed before.
    taken.order_manager(&V1, "3.0.0");
    let reason = record["skipped"][0]["reason"].as_str().expect("it is kept");
    let status = taken.host.wait_for_status("the order to be refused", SOON, |status| problem(status).is_some());
    let text = problem(&status).expect("it was waited for");
    assert!(text.contains("3.0.0 failed and is skipped") && text.contains(reason), "{text}");
    let status = taken.wait_for_heartbeat(&status);
    assert_eq!((&status["version"], &status["heldByOperator"]), (&json!("1.0.0"), &Value::Null), "{status:#}");
    assert_eq!(taken.state("upgrade.json")["previous"], record["previous"]);
    assert_eq!(taken.state("history.json"), history);

    // The operator can still roll back to the previous release.
    taken.host.control(&["rollback"]).expect_success();
    wait_for_release(&taken.host, "2.0.0");
    assert_eq!(taken.wait_until_up(), pids);
}

/// Pins as they were before they had public keys.
fn without_key(mut pins: Value) -> Value {
    for pinned in pins["pins"].as_object_mut().into_iter().flat_map(|pins| pins.values_mut()) {
        pinned.as_object_mut().map(|pinned| pinned.remove("key"));
    }
    pins
}
