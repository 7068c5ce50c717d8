//! The keys that a host trusts, as they change: packages of the manager add and revoke keys.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::aops;
use crate::support::command::{self, LIMIT, Output};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::package::Package;
use crate::support::wait::wait_for;

/// A package of the manager that adds and revokes these keys.
fn manager(version: &str, brought: &[&Path], revoked: &[&Path]) -> Package {
    let read = |path: &Path| fs::read(path).expect("it was created");
    let mut package = Package::plain("aops-spm", version).with_file("bin/aops", read(&aops()), 0o755);
    for (directory, keys) in [("keys", brought), ("keys/revoked", revoked)] {
        for (number, key) in keys.iter().enumerate() {
            package = package.with_file(&format!("{directory}/{number}.pub"), read(key), 0o644);
        }
    }
    package
}

/// Installs with the executable that the gateway serves for it, which contains the gateway's present keys.
#[track_caller]
fn bootstrap(gateway: &Gateway, host: &TestHost, more: &[&str]) -> Output {
    let name = if cfg!(target_arch = "x86") { "386" } else { "amd64" };
    let served = gateway.path("depot").join(format!("aops-agent-service-linux-{name}"));
    let executable = host.beside("bootstrap");
    let _ = fs::remove_file(&executable);
    fs::copy(served, &executable).expect("it was published");
    let ca = gateway.path("tls/cert.pem");
    let mut command = host.command(&executable);
    command.args(["install", "--service", "none", "--agent-id", "1", "--endpoint", gateway.url()]);
    command::run(command.arg("--ca-cert").arg(ca).arg("--home").arg(host.home()).args(more), LIMIT)
}

fn verbose(host: &TestHost) -> String {
    let mut command: Command = host.command(&host.home().join("bin/aops"));
    command::run(command.args(["--version", "--verbose"]), LIMIT).expect_success()
}

fn id(gateway: &Gateway) -> String {
    let text = fs::read_to_string(gateway.path("keys/aops.pub")).expect("it was created");
    text.split_whitespace()
        .find(|word| word.len() == 16 && word.bytes().all(|b| b.is_ascii_hexdigit()))
        .map_or_else(|| panic!("no id in {text}"), str::to_owned)
}

#[test]
fn keys_rotate_by_a_signed_package_and_a_revoked_key_stays_revoked() {
    let (mut gateway, next) = (Gateway::stopped(), Gateway::stopped());
    let (old, new) = (gateway.path("keys/aops.pub"), next.path("keys/aops.pub"));
    let signed_by = |gateway: &Gateway, key: &Gateway, package: &Package| {
        let (key, mut arguments) = (key.path("keys/aops.key").display().to_string(), package.arguments());
        arguments.extend(["--key".to_owned(), key]);
        gateway.publish_with(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    gateway.publish_self("1.0.0");
    gateway.publish(&Package::sleeper("native", "1.0.0"));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\n");
    gateway.run();
    let host = TestHost::new();
    bootstrap(&gateway, &host, &["--version", "1.0.0"]).expect_code(0);
    let pid = host.wait_for_agent("native");
    // The running gateway offers a published package a moment later.
    let install = |version: &str, code: i32| {
        let output = wait_for("the gateway to have it", SOON, || {
            let output = host.install(&["--version", version]);
            (!output.stderr.contains("has no package of")).then_some(output)
        });
        output.expect_code(code)
    };
    let key_files = || fs::read_dir(host.home().join("etc/keys")).expect("it exists").count();
    assert_eq!(key_files(), 1, "that of the bootstrap");
    // For later: it contains the old key.
    fs::copy(host.beside("bootstrap"), host.beside("old-bootstrap")).expect("a copy");

    // Before the new key is added, packages signed by it are rejected.
    let by_new = manager("2.0.0", &[], &[]);
    signed_by(&gateway, &next, &by_new).expect_success();
    let refused = install("2.0.0", 1);
    assert!(refused.stderr.contains("not trusted here") && refused.stderr.contains("nothing was changed"), "{refused}");
    // A package that would leave no key is rejected as a whole; a contradictory one cannot even be published.
    signed_by(&gateway, &gateway, &manager("1.1.0", &[], &[&old])).expect_success();
    let refused = install("1.1.0", 1);
    assert!(
        refused.stderr.contains("revokes every key") && refused.stderr.contains("nothing was changed"),
        "{refused}"
    );
    let refused = signed_by(&gateway, &gateway, &manager("1.2.0", &[&new], &[&new]));
    assert!(!refused.success() && refused.stderr.contains("both brings and revokes"), "{refused}");

    signed_by(&gateway, &gateway, &manager("1.3.0", &[&new], &[])).expect_success();
    let brought = install("1.3.0", 0);
    assert!(brought.stderr.contains("brings the key") && brought.stderr.contains(&id(&next)), "{brought}");
    assert!(
        verbose(&host).contains(&format!("trusted key {} (brought by aops-spm 1.3.0)", id(&next))),
        "{}",
        verbose(&host)
    );
    install("2.0.0", 0);

    // A package signed by the new key revokes the old one: installer and manager then reject packages signed by the old key.
    signed_by(&gateway, &next, &manager("2.1.0", &[], &[&old])).expect_success();
    let revoked = install("2.1.0", 0);
    assert!(revoked.stderr.contains("revokes the key") && revoked.stderr.contains(&id(&gateway)), "{revoked}");
    assert_eq!(key_files(), 0, "the file of the bootstrap is gone");
    let refused = install("1.0.0", 1);
    assert!(refused.stderr.contains("was revoked by aops-spm 2.1.0"), "{refused}");
    gateway.publish(&Package::sleeper("native", "2.0.0"));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"2.0.0\"\n");
    let status = host.wait_for_status("the manager to refuse it", SOON, |status| {
        status["agents"][0]["lastError"].to_string().contains("was revoked by aops-spm 2.1.0")
    });
    assert_eq!(status["agents"][0]["version"], "1.0.0");

    // Neither a roll back to an earlier version nor its bootstrap brings it back.
    install("2.0.0", 0);
    fs::copy(host.beside("old-bootstrap"), host.beside("bootstrap")).expect("a copy");
    let mut command = host.command(&host.beside("old-bootstrap"));
    command.args(["install", "--service", "none", "--version", "1.0.0", "--home"]).arg(host.home());
    let refused = command::run(&mut command, LIMIT).expect_code(1);
    assert!(refused.stderr.contains("was revoked, and is not trusted"), "{refused}");
    assert!(refused.stderr.contains("was revoked by aops-spm 2.1.0"), "{refused}");
    assert_eq!(key_files(), 0);
    // Without the store the revocation is unknown.
    let store = host.home().join("state/keys.json");
    let kept = fs::read(&store).expect("it exists");
    fs::remove_file(&store).expect("it is ours");
    let refused = install("2.0.0", 1);
    assert!(refused.stderr.contains("keys.json") && refused.stderr.contains("--fresh"), "{refused}");
    fs::write(&store, kept).expect("it is ours");

    // Only the operator of the host can trust it again, and gets a warning.
    let given = old.display().to_string();
    let output = host.install(&["--version", "2.0.0", "--trusted-key", &given]).expect_code(0);
    assert!(output.stderr.contains("still trusted") || verbose(&host).contains("revoked key"), "{output}");
    let status = host.wait_for_status("native 2.0.0", SOON, |status| status["agents"][0]["version"] == "2.0.0");
    assert!(status["problems"].to_string().contains("still trusted"), "{status:#}");
    wait_for("the gateway to receive it", SOON, || {
        let events = gateway.status()["hosts"][0]["events"].as_array()?.clone();
        let is_it = |event: &&Value| event["kind"] == "stage" && event["outcome"] == "refused";
        events.iter().filter(is_it).any(|event| event["message"].to_string().contains("was revoked")).then_some(())
    });
    assert_ne!(host.wait_for_agent("native"), pid);
}

#[test]
fn a_stored_release_is_not_activated_after_its_key_was_revoked() {
    let (mut gateway, next) = (Gateway::stopped(), Gateway::stopped());
    gateway.publish_self("1.0.0");
    for version in ["1.0.0", "2.0.0"] {
        gateway.publish(&Package::sleeper("native", version));
    }
    let want = |gateway: &Gateway, version: &str| {
        gateway.fleet(&format!("heartbeatInterval = \"1s\"\nagents.native.version = \"{version}\"\n"));
    };
    want(&gateway, "1.0.0");
    gateway.run();
    let host = TestHost::new();
    bootstrap(&gateway, &host, &["--version", "1.0.0"]).expect_code(0);
    let first = host.wait_for_agent("native");
    want(&gateway, "2.0.0");
    let pid = host.wait_for_new_pid("native", first);

    let keys = [next.path("keys/aops.pub"), gateway.path("keys/aops.pub")];
    gateway.publish(&manager("1.1.0", &[&keys[0]], &[&keys[1]]));
    wait_for("the gateway to have it", SOON, || host.install(&["--version", "1.1.0"]).success().then_some(()));
    // The active release continues, although the same key has signed it.
    assert_eq!(host.wait_for_agent("native"), pid);
    let kept = host.home().join("agents/native/1.0.0");
    assert!(kept.join(".complete").exists());
    want(&gateway, "1.0.0");
    wait_for("the gateway to receive it", SOON, || {
        let events = gateway.status()["hosts"][0]["events"].as_array()?.clone();
        let is_it = |event: &&Value| event["kind"] == "activate" && event["outcome"] == "refused";
        let says = |event: &Value| event["message"].to_string().contains("was revoked by aops-spm 1.1.0");
        events.iter().filter(is_it).any(says).then_some(())
    });
    wait_for("it to be gone", SOON, || (!kept.exists()).then_some(()));
    assert_eq!(host.wait_for_agent("native"), pid);
    // After a power cut too.
    host.crash();
    host.control(&["start"]).expect_code(0);
    host.wait_for_agent("native");
    assert_eq!(host.status()["agents"][0]["version"], "2.0.0");
}

#[test]
fn a_failed_installation_reverts_neither_an_epoch_nor_a_revocation() {
    let (mut gateway, next) = (Gateway::stopped(), Gateway::stopped());
    gateway.publish(&Package::sleeper("native", "1.0.0"));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\n");
    let [old, new] = [&gateway, &next].map(|gateway| gateway.path("keys/aops.pub"));
    // An executable that prints its version and does nothing else.
    let script = "#!/bin/sh\ncase \"$1\" in --version) echo broken ;; *) exit 3 ;; esac\n";
    let broken = manager("broken", &[&new], &[&old]).with_file("bin/aops", script, 0o755);
    let arguments = broken.arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["--epoch", "7"]).collect();
    gateway.publish_with(&arguments).expect_success();
    // Last: the bootstrap is that of the last published package.
    gateway.publish_with(&["--self", "--version", "1.0.0", "--epoch", "1"]).expect_success();
    gateway.run();
    let host = TestHost::new();
    bootstrap(&gateway, &host, &["--version", "1.0.0"]).expect_code(0);
    let pid = host.wait_for_agent("native");

    let failed = host.install(&["--version", "broken"]).expect_code(1);
    assert!(
        failed.stderr.contains("step wait") && failed.stderr.contains("previous installation is restored"),
        "{failed}"
    );
    host.wait_for_status("the old version", SOON, |status| {
        status["version"] == "1.0.0" && status["state"] == "running"
    });
    assert_eq!(host.wait_for_agent("native"), pid);
    let said = verbose(&host);
    let expected = [format!("revoked key {} (by aops-spm broken)", id(&gateway)), format!("trusted key {}", id(&next))];
    assert!(expected.iter().all(|line| said.contains(line)), "{said}");
    let refused = host.install(&["--version", "1.0.0"]).expect_code(1);
    assert!(refused.stderr.contains("was revoked by aops-spm broken"), "{refused}");

    // Signed by the new key, but of a withdrawn epoch; then of the valid one.
    let key = next.path("keys/aops.key").display().to_string();
    for (version, epoch, code) in [("1.1.0", "6", 1), ("1.2.0", "7", 0)] {
        let more = ["--epoch", epoch, "--key", &key];
        let package = manager(version, &[], &[]);
        let arguments = package.arguments();
        gateway.publish_with(&arguments.iter().map(String::as_str).chain(more).collect::<Vec<_>>()).expect_success();
        let output = wait_for("the gateway to have it", SOON, || {
            let output = host.install(&["--version", version]);
            (!output.stderr.contains("has no package of")).then_some(output)
        });
        let output = output.expect_code(code);
        assert!(code == 0 || output.stderr.contains("has epoch 6, lower than the 7"), "{output}");
    }
    assert_eq!(host.wait_for_agent("native"), pid);
}

#[test]
fn a_home_without_a_keyring_is_reinstalled_with_rotated_keys() {
    let (mut gateway, next) = (Gateway::stopped(), Gateway::stopped());
    gateway.publish_self("1.0.0");
    gateway.publish(&Package::sleeper("native", "1.0.0"));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\n");
    let [old, new] = [&gateway, &next].map(|gateway| gateway.path("keys/aops.pub"));
    gateway.publish(&manager("1.1.0", &[&new], &[&old]));
    gateway.run();
    let host = TestHost::new();
    bootstrap(&gateway, &host, &["--version", "1.0.0"]).expect_code(0);
    let pid = host.wait_for_agent("native");
    // As such a home has it.
    let [keys, epochs] = ["keys", "epochs"].map(|name| host.home().join(format!("state/{name}.json")));
    fs::remove_file(&keys).expect("it exists");
    let text = fs::read_to_string(&epochs).expect("it exists");
    let mut of_before: Value = serde_json::from_str(&text).expect("it is JSON");
    assert!(of_before.as_object_mut().is_some_and(|object| object.remove("form").is_some()), "{text}");
    fs::write(&epochs, of_before.to_string()).expect("it is ours");

    let output = host.install(&["--version", "1.1.0"]).expect_code(0);
    assert!(output.stderr.contains("revokes the key"), "{output}");
    assert_eq!(host.wait_for_agent("native"), pid);
    let said = verbose(&host);
    let expected = [format!("revoked key {}", id(&gateway)), format!("trusted key {} (brought by", id(&next))];
    assert!(expected.iter().all(|line| said.contains(line)), "{said}");
    let refused = host.install(&["--version", "1.0.0"]).expect_code(1);
    assert!(refused.stderr.contains("was revoked by aops-spm 1.1.0"), "{refused}");
    // From now on it has a keyring.
    fs::remove_file(&keys).expect("it exists");
    let refused = host.install(&["--version", "1.1.0"]).expect_code(1);
    assert!(refused.stderr.contains("keys.json") && refused.stderr.contains("--fresh"), "{refused}");
}

#[test]
fn a_gateway_is_verified_by_system_roots_and_unverified_only_on_request() {
    let gateway = Gateway::with(&[], &[]);
    let key = gateway.path("keys/aops.pub").display().to_string();
    let installed = |host: &TestHost, more: &[&str], roots: Option<&Path>| {
        let mut command = host.command(&aops());
        command.args(["install", "--service", "none", "--agent-id", "1", "--trusted-key", &key]).args(more);
        command.args(["--endpoint", gateway.url(), "--home"]).arg(host.home());
        if let Some(roots) = roots {
            command.env("SSL_CERT_FILE", roots);
        }
        command::run(&mut command, LIMIT)
    };
    let host = TestHost::new();
    let refused = installed(&host, &[], None).expect_code(1);
    assert!(
        refused.stderr.contains("not issued by an authority that this host trusts") && !host.home().exists(),
        "{refused}"
    );
    // A certificate that an administrator has added to the system's roots.
    installed(&host, &[], Some(&gateway.path("tls/cert.pem"))).expect_code(0);
    host.wait_for_status("a heartbeat", SOON, |status| status["gateway"]["connected"] == true);
    // The old platform's command, which names no certificate, does not weaken the verification.
    let config = host.home().join("etc/conf.toml");
    let before = fs::read_to_string(&config).expect("it exists");
    let old_spelling = |roots: Option<&Path>| {
        let mut command = host.command(&aops());
        command.args(["--control", "install", "--agentId", "1", "--endpoint", gateway.url(), "--service", "none"]);
        if let Some(roots) = roots {
            command.env("SSL_CERT_FILE", roots);
        }
        command::run(command.arg("--home").arg(host.home()), LIMIT)
    };
    let refused = old_spelling(None).expect_code(1);
    assert!(refused.stderr.contains("not issued by an authority that this host trusts"), "{refused}");
    old_spelling(Some(&gateway.path("tls/cert.pem"))).expect_code(0);
    assert_eq!(fs::read_to_string(&config).expect("it exists"), before);
    assert!(!host.home().join("state/pins.json").exists());

    let host = TestHost::new();
    let warned = installed(&host, &["--insecure"], None).expect_code(0);
    assert!(warned.stderr.contains("not verified (--insecure)"), "{warned}");
    host.wait_for_status("a heartbeat", SOON, |status| status["gateway"]["connected"] == true);
    let log = fs::read_to_string(host.home().join("log/spm.log")).expect("it exists");
    assert!(log.contains("TLS certificates are not verified"), "{log}");
    // A repetition prints it again.
    let again = host.install(&[]).expect_code(0);
    assert!(again.stderr.contains("not verified (--insecure)"), "{again}");
}
