//! Every later version takes over a home that an earlier one left, and loses nothing of it: the homes in `tests/data/state-v*`, each under
//! the executable under test.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::aops;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::wait::wait_for;

/// What the kept home calls its gateway and itself.
const ENDPOINT: &str = "https://127.0.0.1:8888";
const HOME: &str = "/srv/aops";
/// The state files that keep fields of a later version.
// FIXME: desired.json and events.json do not.
const KEEPING: [&str; 5] = ["epochs.json", "install.json", "instance.json", "keys.json", "manager.json"];
/// The releases of `native`.
const ACTIVE: &str = "2.0.0";
const BACKUP: &str = "1.0.0";
/// The env of `native` in the desired state.
const ENV: &str = "env = { COLOUR = \"blue\" }";

/// A kept home on a host of its own, under the executable under test.
struct Taken {
    host: TestHost,
    gateway: Gateway,
    /// `state/desired.json` as it was kept.
    desired: Value,
}

impl Taken {
    /// The home of `tests/data/<name>`, and the gateway that it belongs to, which does not run.
    fn over(name: &str) -> Taken {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
        let read = |file: &str| fs::read_to_string(data.join("home").join(file)).expect("it is kept");
        let json = |file: &str| serde_json::from_str::<Value>(&read(file)).expect("it is JSON");
        let desired = json("state/desired.json");

        let mut gateway = Gateway::stopped();
        for (package, epoch) in [("native-2.0.0", "2"), ("classic-3.1", "1")] {
            let (name, version) = package.split_once('-').expect("a name and a version");
            let archive = data.join(format!("packages/{package}_linux_amd64.tar.zst")).display().to_string();
            let of = ["--name", name, "--version", version, "--os", "linux", "--arch", arch(), "--epoch", epoch];
            gateway.publish_with(&[&of[..], &[&archive]].concat()).expect_success();
        }
        gateway.want(&[("native", ACTIVE, ENV), ("classic", "3.1", "")]);
        let lineage = desired["lineage"].as_str().expect("it is kept");
        fs::write(gateway.path("state/lineage"), format!("{lineage}\n")).expect("a temporary directory can be written");
        // It has a port from now on.
        gateway.run();
        gateway.stop();

        let host = TestHost::new();
        let keys = json("state/keys.json");
        let key = keys["brought"][0]["key"].as_str().expect("it is kept").to_owned();
        let own_key = fs::read_to_string(gateway.path("keys/aops.pub")).expect("it was made");
        let own_key = own_key.lines().last().expect("a key has two lines").to_owned();
        let pins = json("state/pins.json");
        let pin = pins["pins"][ENDPOINT]["certificate"].as_str().expect("it is kept").to_owned();
        let own_pin = gateway.command(&["init"], &[]).expect_success();
        let own_pin = own_pin.lines().map(str::trim).find(|line| line.starts_with("sha256:")).expect("init prints it");
        let home = host.home().display().to_string();
        let exchanged = [
            (key.as_str(), own_key.as_str()),
            (pin.as_str(), own_pin),
            (ENDPOINT, gateway.url()),
            (HOME, home.as_str()),
        ];
        copy(&data.join("home"), &host.home(), &exchanged);
        fs::copy(aops(), host.home().join("bin/aops")).expect("a copy");
        for directory in ["state", "cache", "run", "run/agents", "staging", "log", "log/agents"] {
            let directory = host.home().join(directory);
            fs::create_dir_all(&directory).expect("a temporary directory can be written");
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).expect("it is ours");
        }
        let machine = ["/var/lib/dbus/machine-id", "/etc/machine-id"];
        let machine = machine.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let taken = Taken { host, gateway, desired };
        taken.change("instance.json", |instance| instance["machineId"] = json!(machine.trim()));
        taken
    }

    fn state(&self, file: &str) -> Value {
        let bytes = fs::read(self.host.home().join("state").join(file)).expect("it is there");
        serde_json::from_slice(&bytes).expect("it is JSON")
    }

    fn change(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.state(file);
        change(&mut value);
        let path = self.host.home().join("state").join(file);
        fs::write(&path, serde_json::to_vec_pretty(&value).expect("it is JSON")).expect("it is ours");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("it is ours");
    }

    /// Both sub-agents run at the versions of the kept home; their pids.
    #[track_caller]
    fn wait_until_up(&self) -> [u32; 2] {
        let status = self.host.wait_for_status("every sub-agent at its version", SOON, |status| {
            let up = |name: &str, version: &str| {
                agent(status, name).is_some_and(|agent| agent["state"] == "running" && agent["version"] == version)
            };
            up("native", ACTIVE) && up("classic", "3.1") && pid(&status["spa"]["pid"]).is_some()
        });
        wait_for("the ledger to say what is on disk", SOON, || {
            let ledger = fs::read(self.host.home().join("state/releases.json")).ok()?;
            let ledger: Value = serde_json::from_slice(&ledger).ok()?;
            let native = &ledger["agents"]["native"];
            (native["active"]["version"] == ACTIVE && native["backup"]["version"] == BACKUP).then_some(())
        });
        ["native", "classic"].map(|name| pid(&agent(&status, name).expect("it is there")["pid"]).expect("it runs"))
    }

    fn has_release(&self, version: &str) -> bool {
        self.host.home().join("agents/native").join(version).join(".complete").exists()
    }
}

fn arch() -> &'static str {
    if cfg!(target_arch = "x86") { "386" } else { "amd64" }
}

/// Copies a tree with its links; what is `exchanged` is written in the place of what is kept.
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

/// The names of all homes that are kept.
fn kept() -> Vec<String> {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let entries = fs::read_dir(data).expect("it is kept").map(|entry| entry.expect("it is kept").file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with("state-v"));
    assert!(names.contains(&"state-v0".to_owned()), "{names:?}");
    names
}

#[test]
fn an_earlier_home_comes_up_without_a_gateway_and_can_be_stopped_and_removed() {
    for name in kept() {
        let taken = Taken::over(&name);
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
fn an_earlier_home_follows_its_gateway_and_loses_nothing_of_its_state() {
    for name in kept() {
        let mut taken = Taken::over(&name);
        // As a later version may have left it before this one was put back.
        let unknown = json!({ "form": 7, "names": ["native"] });
        for file in KEEPING {
            taken.change(file, |value| value["ofALaterVersion"] = unknown.clone());
        }
        let [keys, instance, install, epochs, events] =
            ["keys.json", "instance.json", "install.json", "epochs.json", "events.json"].map(|file| taken.state(file));
        let pins = taken.state("pins.json");
        taken.host.control(&["start"]).expect_code(0);
        let pids = taken.wait_until_up();

        // The gateway wants what runs: it is taken over, and nothing is restarted.
        let kept_generation = taken.desired["generation"].as_u64().expect("it is kept");
        taken.gateway.run();
        // A manager that starts tries the gateway at once.
        taken.host.control(&["restart"]).expect_code(0);
        taken.host.wait_for_status("the gateway's desired state", SOON, |status| {
            status["gateway"]["connected"] == true && status["generation"].as_u64() > Some(kept_generation)
        });
        assert_eq!(taken.wait_until_up(), pids, "{name}: a sub-agent was restarted");
        assert_eq!(taken.state("desired.json")["lineage"], taken.desired["lineage"], "{name}");
        wait_for("the gateway to hear of what happened before", SOON, || {
            let status = taken.gateway.status();
            let kept = &events["events"][0]["id"];
            status["hosts"][0]["events"].as_array()?.iter().any(|event| event["id"] == *kept).then_some(())
        });

        // Another release of one of them: what ran is its backup now.
        taken.gateway.publish(&Package::sleeper("native", "3.0.0"));
        taken.gateway.want(&[("native", "3.0.0", ENV), ("classic", "3.1", "")]);
        taken.host.wait_for_status("the other release", SOON, |status| {
            agent(status, "native").is_some_and(|agent| agent["version"] == "3.0.0" && agent["state"] == "running")
        });
        let status = taken.host.status();
        assert_eq!(pid(&agent(&status, "classic").expect("it is there")["pid"]), Some(pids[1]), "{name}");
        assert!(taken.has_release(ACTIVE), "{name}: the backup is gone");

        let lost: Vec<_> = KEEPING.into_iter().filter(|file| taken.state(file)["ofALaterVersion"] != unknown).collect();
        assert_eq!(lost, [""; 0], "{name}: these lost what a later version wrote");
        assert_eq!(taken.state("pins.json"), pins, "{name}");
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
