//! Homes of every kind: installed offline, with a certificate pin, beside another home, in a path with spaces or a very long one;
//! reinstalled without losing state.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::install::systemd::runs;
use crate::support::aops;
use crate::support::command::{self, LIMIT, Output};
use crate::support::files::snapshot;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::processes::{self, is_alive};
use crate::support::wait::wait_for;

/// A gateway with two versions of the manager and a sub-agent of each kind.
fn gateway() -> Gateway {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    gateway.publish(&Package::sleeper("native", "1.0.0"));
    gateway.publish(&Package::control_sleeper("script", "1.0.0"));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\nagents.script.version = \"1.0.0\"\n");
    gateway.run();
    gateway
}

fn depot_file(gateway: &Gateway, start: &str) -> String {
    let names = fs::read_dir(gateway.path("depot")).expect("it exists").flatten();
    let found = names.map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with(start) && !name.ends_with(".minisig")
    });
    found.expect("it was published").display().to_string()
}

/// Runs the `control` of a home.
#[track_caller]
fn control(host: &TestHost, home: &Path, arguments: &[&str]) -> Output {
    command::run(host.command(&home.join("control")).env_remove("AOPS_HOME").args(arguments), LIMIT)
}

#[track_caller]
fn status(host: &TestHost, home: &Path) -> Value {
    control(host, home, &["status", "--json"]).json()
}

/// Waits until both sub-agents and both roles of a home run, and returns the status.
#[track_caller]
fn wait_for_all(host: &TestHost, home: &Path) -> Value {
    wait_for("both sub-agents and both roles", SOON, || {
        let status = status(host, home);
        let up = |name| {
            agent(&status, name).is_some_and(|agent| agent["state"] == "running" && pid(&agent["pid"]).is_some())
        };
        (runs(&status) && up("native") && up("script")).then_some(status)
    })
}

fn pids(status: &Value) -> Vec<u32> {
    let agents =
        ["native", "script"].map(|name| agent(status, name).map(|agent| agent["pid"].clone()).unwrap_or_default());
    let roles = ["spm", "spa"].map(|role| status[role]["pid"].clone());
    agents
        .iter()
        .chain(&roles)
        .map(|value| pid(value).unwrap_or_else(|| panic!("not all of it runs: {status:#}")))
        .collect()
}

#[test]
fn a_local_package_is_installed_offline_if_it_matches_the_request() {
    let mut gateway = gateway();
    gateway.stop();
    let host = TestHost::new();
    let key = gateway.path("keys/aops.pub").display().to_string();
    let manager = depot_file(&gateway, "aops-spm-1.0.0");
    let other = depot_file(&gateway, "native-1.0.0");
    let install = |package: &str, more: &[&str]| {
        let common = ["--agent-id", "1", "--endpoint", gateway.url(), "--trusted-key", &key, "--package", package];
        host.install(&[&common[..], more].concat())
    };
    let refused = |output: Output, words: &[&str]| {
        let output = output.expect_code(1);
        assert!(output.stderr.contains("nothing was changed"), "{output}");
        assert!(words.iter().all(|word| output.stderr.contains(word)), "{words:?}: {output}");
        assert!(!host.home().exists(), "{output}");
    };
    refused(install(&other, &[]), &["native", "aops-spm"]);
    refused(install(&manager, &["--version", "2.0.0"]), &["1.0.0", "2.0.0"]);
    refused(install("/nowhere/aops.tar.zst", &[]), &["/nowhere/aops.tar.zst"]);
    let alone = host.beside("aops-spm-1.0.0.tar.zst");
    fs::copy(&manager, &alone).expect("a copy");
    refused(install(&alone.display().to_string(), &[]), &["minisig"]);
    // A copy under another name works with its signature beside it: the signature has the name and version.
    fs::copy(format!("{manager}.minisig"), host.beside("aops-spm-1.0.0.tar.zst.minisig")).expect("a copy");
    install(&alone.display().to_string(), &[]).expect_code(0);
    let status = host.wait_for_status("both roles", SOON, runs);
    assert_eq!((&status["version"], &status["gateway"]["connected"]), (&"1.0.0".into(), &false.into()));
    host.control(&["uninstall", "--yes"]).expect_code(0);
    assert!(!host.home().exists());
}

#[test]
fn a_certificate_pin_replaces_a_ca_and_stays_in_force() {
    let gateway = gateway();
    let host = TestHost::new();
    let key = gateway.path("keys/aops.pub").display().to_string();
    let cert = gateway.path("tls/cert.pem").display().to_string();
    let openssl = |arguments: &str| {
        let script = format!("openssl x509 -in '{cert}' {arguments}");
        command::run(std::process::Command::new("sh").args(["-c", &script]), LIMIT).expect_success().trim().to_owned()
    };
    // As openssl prints it, and the pin of the key alone.
    let printed = openssl("-noout -fingerprint -sha256");
    let certificate = printed.split_once('=').expect("a name and a value").1.to_owned();
    let public_key = openssl("-noout -pubkey | openssl pkey -pubin -outform DER | sha256sum | cut -d' ' -f1");
    for pin in [&certificate, &public_key] {
        host.install(&["--agent-id", "1", "--endpoint", gateway.url(), "--trusted-key", &key, "--pin", pin])
            .expect_code(0);
        host.wait_for_status("a heartbeat", SOON, |status| status["gateway"]["connected"] == true);
        // A later installation does not need the pin again.
        host.install(&[]).expect_code(0);
        host.control(&["uninstall", "--yes"]).expect_code(0);
    }
}

#[test]
fn reinstalling_keeps_keys_pins_epochs_and_settings_and_fresh_keeps_none() {
    let gateway = gateway();
    let host = TestHost::new();
    let key = gateway.path("keys/aops.pub").display().to_string();
    let first = ["--agent-id", "1", "--endpoint", gateway.url(), "--trusted-key", &key, "--pin-first-contact"];
    host.install(&first).expect_code(0);
    let before = wait_for_all(&host, &host.home());
    // An operator's own key and settings.
    let other = Gateway::stopped();
    let own_key = host.home().join("etc/keys/mine.pub");
    fs::copy(other.path("keys/aops.pub"), &own_key).expect("a copy");
    let config = host.home().join("etc/conf.toml");
    let text =
        fs::read_to_string(&config).expect("it exists") + "\n# mine, with reason\nlogMaxSize = \"3MiB\" # small\n";
    fs::write(&config, &text).expect("it is ours");
    let kept =
        ["etc/agent-id", "etc/conf.toml", "etc/keys", "state/pins.json", "state/epochs.json", "state/instance.json"];
    let content = || {
        let files = snapshot(&host.home(), &[]);
        let kept = kept.map(|name| Path::new("/").join(name));
        files.into_iter().filter(|(path, _)| kept.iter().any(|kept| path.starts_with(kept))).collect::<Vec<_>>()
    };
    let known = content();
    assert!(known.iter().any(|(path, _)| path.ends_with("pins.json")), "{known:?}");

    gateway.publish_self("2.0.0");
    for version in ["2.0.0", "1.0.0"] {
        wait_for("the gateway to offer it", SOON, || host.install(&["--version", version]).success().then_some(()));
        let status = wait_for_all(&host, &host.home());
        assert_eq!(status["version"], version);
        assert_eq!(pids(&status)[..2], pids(&before)[..2], "the sub-agents of {version}");
        assert_ne!(pids(&status)[2..], pids(&before)[2..], "the roles of {version}");
        assert_eq!(content(), known, "of {version}");
        wait_for("the gateway to know the version", SOON, || {
            (gateway.status()["hosts"][0]["manager"]["version"] == version).then_some(())
        });
    }
    // Also with the manager stopped, or dead.
    for end in ["stop", "kill"] {
        match end {
            "stop" => drop(host.control(&["stop"]).expect_code(0)),
            _ => host.crash(),
        }
        host.install(&[]).expect_code(0);
        wait_for_all(&host, &host.home());
        assert_eq!(content(), known, "after a {end}");
    }

    host.install(&["--fresh"]).expect_code(2);
    host.install(&[&first[..], &["--fresh"]].concat()).expect_code(0);
    wait_for_all(&host, &host.home());
    assert!(!own_key.exists());
    assert!(!fs::read_to_string(&config).expect("it is there").contains("mine"));
    let instance = |files: &[(std::path::PathBuf, _)]| -> Option<crate::support::files::Entry> {
        files
            .iter()
            .find(|(path, _)| path.ends_with("instance.json"))
            .map(|(_, entry): &(_, crate::support::files::Entry)| entry.clone())
    };
    assert_ne!(instance(&content()), instance(&known));
}

#[test]
fn homes_in_unusual_paths_work_and_are_independent() {
    let gateway = gateway();
    let host = TestHost::new();
    let trust = gateway.trust();
    let long = format!("long/{}", [&"l".repeat(90)[..]; 3].join("/"));
    let homes = ["with space/and \"quotes\" $HOME/100%", &long, "plain"].map(|name| host.beside(name));
    let install = |home: &Path| {
        let mut command = host.command(&aops());
        command.env_remove("AOPS_HOME").args(["install", "--service", "none", "--agent-id", "1", "--home"]).arg(home);
        command::run(command.args(["--endpoint", gateway.url()]).args(&trust), LIMIT)
    };
    let mut before = Vec::new();
    for home in &homes {
        install(home).expect_code(0);
        before.push(wait_for_all(&host, home));
    }
    let same = |at: usize| pids(&status(&host, &homes[at])) == pids(&before[at]);
    assert!((0..3).all(same), "installing one does not disturb another");
    control(&host, &homes[1], &["stop"]).expect_code(0);
    control(&host, &homes[1], &["status"]).expect_code(3);
    assert!(same(0) && same(2), "stopping one does not stop another");
    control(&host, &homes[1], &["start"]).expect_code(0);
    wait_for_all(&host, &homes[1]);
    // A relative path; it does not create a second home.
    let relative =
        host.command(&aops()).env_remove("AOPS_HOME").args(["control", "status", "--home", "plain"]).status();
    assert!(relative.expect("it can be run").success());

    control(&host, &homes[0], &["uninstall", "--yes"]).expect_code(0);
    assert!(!host.beside("with space").exists(), "directories created for the home are removed with it");
    assert!(same(2), "removing one does not disturb another");
    control(&host, &homes[1], &["uninstall", "--yes"]).expect_code(0);
    assert!(!host.beside("long").exists());
    assert!(same(2));
    control(&host, &homes[2], &["uninstall", "--yes"]).expect_code(0);
    assert_eq!(processes::of_home(&host.beside("")), []);
}

#[test]
fn an_old_installation_with_a_daemon_is_replaced_and_its_id_and_settings_are_kept() {
    let gateway = gateway();
    let host = TestHost::new();
    let home = host.home();
    for directory in ["etc", "bin", "log", "run"] {
        fs::create_dir_all(home.join(directory)).expect("it is ours");
    }
    // A daemon that ignores its control script and the stop signal, restarted by a second one.
    fs::copy("/bin/bash", home.join("bin/old-spm")).expect("a copy");
    let daemon = "trap '' TERM\nwhile :; do read -t 1000 <>run/pipe; done\n";
    fs::write(home.join("bin/daemon"), daemon).expect("it is ours");
    let script = "#!/bin/bash\ncd \"$(dirname \"$0\")\" || exit 1\ncase $1 in\nstart) mkfifo run/pipe\n    \
        setsid bin/old-spm bin/daemon >log/log 2>&1 </dev/null & echo $! >run/pid ;;\nstop) echo it does not stop; exit 1 ;;\nesac\n";
    fs::write(home.join("control"), script).expect("it is ours");
    fs::set_permissions(home.join("control"), fs::Permissions::from_mode(0o755)).expect("it is ours");
    fs::write(home.join("etc/agentId"), "5402204854438\n").expect("it is ours");
    let settings = format!("heartbeatSrv:\n  - {}\nheartbeatInterval: 2\nspaMaxMem: 48\nunheardOf: 1\n", gateway.url());
    fs::write(home.join("etc/conf.yml"), settings).expect("it is ours");
    command::run(host.command(&home.join("control")).arg("start"), LIMIT).expect_code(0);
    let old: u32 = wait_for("its pid", SOON, || fs::read_to_string(home.join("run/pid")).ok()?.trim().parse().ok());
    assert!(is_alive(old));

    let output = host.install(&gateway.trust().iter().map(String::as_str).collect::<Vec<_>>()).expect_code(0);
    assert!(output.stderr.contains("unheardOf") && output.stderr.contains("does not stop"), "{output}");
    assert!(!is_alive(old));
    let status = wait_for_all(&host, &home);
    assert_eq!(status["gateway"]["endpoint"], gateway.url());
    assert_eq!(fs::read_to_string(home.join("etc/agent-id")).expect("it exists").trim(), "5402204854438");
    for gone in
        ["etc/conf.yml", "etc/agentId", "bin/old-spm", "bin/daemon", "run/pid", "run/pipe", "log/log", ".install"]
    {
        assert!(home.join(gone).symlink_metadata().is_err(), "{gone}");
    }
    let config = fs::read_to_string(home.join("etc/conf.toml")).expect("it exists");
    for line in ["heartbeatInterval = \"2s\"", "spaMaxMem = \"48MiB\""] {
        assert!(config.lines().any(|found| found == line), "{line}\n{config}");
    }
    host.control(&["uninstall", "--yes"]).expect_code(0);
    assert!(!home.exists());
}
