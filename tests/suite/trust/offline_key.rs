//! The packer's journey: packages are packed and signed on machines that hold a key and are never online, carried to the gateway, which has
//! only public keys, and installed on the hosts of a small fleet. Then the key is rotated; a host is away meanwhile.

use std::fs;

use serde_json::Value;

use crate::support::aops;
use crate::support::command::Output;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::package::Package;
use crate::support::wait::wait_for;
use crate::upgrades::self_upgrades::{ENDED, runs};

/// A machine with a signing key; it only publishes into its own directory.
struct Signer(Gateway);

impl Signer {
    fn new() -> Signer {
        Signer(Gateway::stopped())
    }

    fn public_key(&self) -> Vec<u8> {
        fs::read(self.0.path("keys/aops.pub")).expect("it was created")
    }

    /// Packs and signs a package, and carries the archive and its signature over; returns what publishing it there says.
    fn carry(&self, package: &Package, gateway: &Gateway) -> Output {
        let depot = self.0.path("depot");
        let archives = || -> Vec<String> {
            let names = fs::read_dir(&depot).into_iter().flatten().flatten().map(|entry| entry.file_name());
            names.filter_map(|name| name.into_string().ok()).filter(|name| name.ends_with(".tar.zst")).collect()
        };
        let before = archives();
        self.0.publish(package);
        let new: Vec<_> = archives().into_iter().filter(|name| !before.contains(name)).collect();
        let [name] = &new[..] else { panic!("not one new archive: {new:?}") };
        let carried = tempfile::tempdir().expect("a temporary directory");
        for file in [name.clone(), format!("{name}.minisig")] {
            fs::copy(depot.join(&file), carried.path().join(&file)).expect("it was published");
        }
        gateway.publish_with(&[&carried.path().join(name).display().to_string()])
    }
}

/// A release of the manager that adds and revokes keys.
fn manager(version: &str, brought: &[Vec<u8>], revoked: &[Vec<u8>]) -> Package {
    let program = fs::read(aops()).expect("the program under test can be read");
    let mut package = Package::plain("aops-spm", version).with_file("bin/aops", program, 0o755);
    for (directory, keys) in [("keys", brought), ("keys/revoked", revoked)] {
        for (number, key) in keys.iter().enumerate() {
            package = package.with_file(&format!("{directory}/{number}.pub"), key.clone(), 0o644);
        }
    }
    package
}

fn order(gateway: &Gateway, manager: &str, agent: &str, more: &str) {
    gateway.fleet(&format!(
        "heartbeatInterval = \"1s\"\nmanager.version = {manager:?}\nagents.hello.version = {agent:?}\n{more}"
    ));
}

#[track_caller]
fn wait_for_releases(host: &TestHost, manager: &str, agent: &str) -> Value {
    host.wait_for_status(&format!("the manager {manager} and the sub-agent {agent}"), ENDED, |status| {
        let hello = &status["agents"][0];
        runs(status, manager) && hello["version"] == agent && hello["state"] == "running"
    })
}

#[test]
fn a_fleet_follows_packages_signed_offline_and_a_rotation_of_the_key() {
    let (old, new, mut gateway) = (Signer::new(), Signer::new(), Gateway::stopped());
    let put = |name: &str, key: &[u8]| fs::write(gateway.path(name), key).expect("the directory is ours");
    fs::remove_file(gateway.path("keys/aops.key")).expect("it was created");
    put("keys/aops.pub", &old.public_key());

    // The gateway can sign nothing itself.
    let hello = |version: &str| Package::sleeper("hello", version);
    let refused = gateway.publish_with(&[&hello("1.0").path().display().to_string()]);
    assert!(!refused.success() && refused.stderr.contains("aops.key"), "{refused}");
    old.carry(&manager("1.0.0", &[], &[]), &gateway).expect_success();
    old.carry(&hello("1.0"), &gateway).expect_success();
    order(&gateway, "1.0.0", "1.0", "");
    gateway.run();
    let hosts = ["1", "2", "3"].map(TestHost::with_id);
    for host in &hosts {
        host.join(&gateway, &[]).expect_success();
        let settings = host.home().join("etc/conf.toml");
        let text = fs::read_to_string(&settings).expect("it exists");
        fs::write(&settings, text + "\nupgradeTrial = \"5s\"\n").expect("the home is ours");
        wait_for_releases(host, "1.0.0", "1.0");
    }
    let [one, two, away] = &hosts;

    // The packer is warned of a key that the hosts may not know.
    let early = new.carry(&hello("9.0"), &gateway);
    assert!(early.success() && early.stderr.contains("by a key that is not in"), "{early}");

    // The next key is announced by a release that the present one has signed.
    away.control(&["stop"]).expect_success();
    old.carry(&manager("1.1.0", &[new.public_key()], &[]), &gateway).expect_success();
    order(&gateway, "1.1.0", "1.0", "");
    for host in [one, two] {
        wait_for_releases(host, "1.1.0", "1.0");
    }
    // From now on the new key signs; it revokes the old one.
    fs::write(gateway.path("keys/new.pub"), new.public_key()).expect("the directory is ours");
    new.carry(&manager("1.2.0", &[], &[old.public_key()]), &gateway).expect_success();
    new.carry(&hello("2.0"), &gateway).expect_success();
    order(&gateway, "1.2.0", "2.0", "");
    for host in [one, two] {
        wait_for_releases(host, "1.2.0", "2.0");
    }

    // A host that was away does not know the new key. It keeps what it has, says so, and follows by way of the release between.
    away.control(&["start"]).expect_success();
    let status = away.wait_for_status("the host that was away to refuse it", ENDED, |status| {
        status["problems"].to_string().contains("not trusted") || status["agents"].to_string().contains("not trusted")
    });
    assert_eq!((&status["version"], &status["agents"][0]["version"]), (&"1.0.0".into(), &"1.0".into()), "{status:#}");
    wait_for("the gateway to show it", SOON, || {
        gateway.status()["hosts"].to_string().contains("not trusted").then_some(())
    });
    order(
        &gateway,
        "1.2.0",
        "2.0",
        "[[rules]]\nmatch = { agentId = [\"3\"] }\nmanager.version = \"1.1.0\"\nagents.hello.version = \"1.0\"\n",
    );
    wait_for_releases(away, "1.1.0", "1.0");
    order(&gateway, "1.2.0", "2.0", "");
    wait_for_releases(away, "1.2.0", "2.0");

    // No host runs anything that the old key signs, not even if the gateway accepts it.
    old.carry(&hello("3.0"), &gateway).expect_success();
    order(&gateway, "1.2.0", "3.0", "");
    for host in &hosts {
        let status = host.wait_for_status("the host to refuse it", ENDED, |status| {
            status["agents"][0]["lastError"].to_string().contains("was revoked by aops-spm 1.2.0")
        });
        assert_eq!(status["agents"][0]["version"], "2.0", "{status:#}");
    }
    // A new host trusts only the new key.
    fs::remove_file(gateway.path("keys/new.pub")).expect("it was put there");
    fs::write(gateway.path("keys/aops.pub"), new.public_key()).expect("the directory is ours");
    order(&gateway, "1.2.0", "2.0", "");
    let late = TestHost::with_id("4");
    late.join(&gateway, &[]).expect_success();
    wait_for_releases(&late, "1.2.0", "2.0");
}
