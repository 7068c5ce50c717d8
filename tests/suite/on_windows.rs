//! What is different on Windows: the roles are services, and files that are in use cannot be replaced. `cargo xtask test-windows --scenarios`
//! runs these scenarios, and those of other themes that windows.txt lists; `cargo xtask test` leaves them out.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::release;
use crate::support::wait::wait_for;
use crate::upgrades::self_upgrades::{ENDED, order, runs};

const NAMES: [&str; 2] = ["one", "two"];
/// The installation directory of the old command.
const DEFAULT_HOME: &str = r"C:\Program Files\aops";

fn gateway(releases: &[&Package]) -> Gateway {
    let agents = [Package::sleeper("one", "1"), Package::control_sleeper("two", "1")];
    let gateway = Gateway::with(&agents.iter().chain(releases.iter().copied()).collect::<Vec<_>>(), &[]);
    order(&gateway, "1.0.0");
    gateway
}

/// A host whose roles are services.
#[track_caller]
fn with_services(gateway: &Gateway) -> TestHost {
    let host = TestHost::new();
    let (home, trust) = (host.home().display().to_string(), gateway.trust());
    let mut words = vec!["install", "--home", &home, "--agent-id", host.agent_id(), "--endpoint", gateway.url()];
    words.extend(["--version", "1.0.0"]);
    words.extend(trust.iter().map(String::as_str));
    host.aops(&words).expect_success();
    agents_of(&host);
    host
}

#[track_caller]
fn agents_of(host: &TestHost) -> [u32; 2] {
    NAMES.map(|name| host.wait_for_agent(name))
}

/// The name of a role's service in a home other than the default one.
fn service(host: &TestHost, role: &str) -> String {
    let shown = host.control(&["status", "--json"]).json();
    let home = shown["home"].as_str().expect("a path").to_owned();
    let digest = <sha2::Sha256 as sha2::Digest>::digest(home.as_bytes());
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("aops-{role}-{digits}")
}

/// The state of a service as `sc` shows it: `RUNNING`; `None`: it does not exist.
fn state(host: &TestHost, name: &str) -> Option<String> {
    let shown = host.run("sc", &["query", name]);
    let line = shown.stdout.lines().find(|line| line.contains("STATE"))?.to_owned();
    line.split_whitespace().last().map(str::to_owned)
}

#[track_caller]
fn wait_for_state(host: &TestHost, name: &str, wanted: &str) {
    wait_for(&format!("{name} to be {wanted}"), SOON, || (state(host, name).as_deref() == Some(wanted)).then_some(()));
}

#[track_caller]
fn wait_until_up(host: &TestHost) -> Value {
    host.wait_for_status("both roles", SOON, |status| {
        ["spm", "spa"].iter().all(|role| pid(&status[role]["pid"]).is_some())
            && NAMES.iter().all(|name| agent(status, name).is_some_and(|agent| agent["state"] == "running"))
    })
}

#[test]
fn services_are_stopped_and_started_by_sc_and_by_control() {
    let gateway = gateway(&[]);
    let host = with_services(&gateway);
    let (spm, spa) = (service(&host, "spm"), service(&host, "spa"));
    for name in [&spm, &spa] {
        assert_eq!(state(&host, name).as_deref(), Some("RUNNING"));
    }
    assert_eq!(host.status()["state"], "running", "{:#}", host.status());

    for stop in ["sc", "control"] {
        if stop == "sc" {
            host.run("sc", &["stop", &spm]).expect_success();
        } else {
            host.control(&["stop"]).expect_success();
        }
        for name in [&spm, &spa] {
            wait_for_state(&host, name, "STOPPED");
        }
        let status = host.control(&["status", "--json"]).expect_code(3).json();
        assert_eq!(status["state"], "stopped", "{status:#}");
        assert_eq!(host.processes(), []);
        if stop == "sc" {
            host.run("sc", &["start", &spm]).expect_success();
        } else {
            host.control(&["start"]).expect_success();
        }
        wait_until_up(&host);
        for name in [&spm, &spa] {
            wait_for_state(&host, name, "RUNNING");
        }
    }

    // The watchdog's service alone.
    let before = agents_of(&host);
    host.run("sc", &["stop", &spa]).expect_success();
    wait_for_state(&host, &spa, "STOPPED");
    let status = host.wait_for_status("the missing watchdog", SOON, |status| status["state"] == "degraded");
    assert!(pid(&status["spa"]["pid"]).is_none(), "{status:#}");
    assert_eq!(agents_of(&host), before);
    host.control(&["start"]).expect_success();
    wait_until_up(&host);
}

#[test]
fn a_restart_of_the_services_keeps_the_sub_agents() {
    let gateway = gateway(&[]);
    let host = with_services(&gateway);
    let before = agents_of(&host);
    let roles = |host: &TestHost| ["spm", "spa"].map(|role| host.role_pid(role));
    for _ in 0..2 {
        let old = roles(&host);
        host.control(&["restart"]).expect_success();
        let status = wait_until_up(&host);
        assert!(roles(&host).iter().zip(&old).all(|(new, old)| new != old), "{status:#}");
        assert_eq!((&status["spm"]["restarts"], &status["spa"]["restarts"]), (&0.into(), &0.into()), "{status:#}");
    }
    assert_eq!(agents_of(&host), before);
    for role in ["spm", "spa"] {
        assert_eq!(state(&host, &service(&host, role)).as_deref(), Some("RUNNING"));
    }
}

#[test]
fn a_killed_service_is_restarted_and_the_sub_agents_keep_running() {
    let gateway = gateway(&[]);
    let host = with_services(&gateway);
    let before = agents_of(&host);
    for role in ["spm", "spa"] {
        let old = host.role_pid(role).expect("it runs");
        host.kill(old);
        host.wait_for_status(&format!("another {role}"), SOON, |status| {
            pid(&status[role]["pid"]).is_some_and(|new| new != old) && status["state"] == "running"
        });
    }
    assert_eq!(agents_of(&host), before);
}

#[test]
fn the_services_start_at_boot_also_after_a_stop() {
    let gateway = gateway(&[]);
    let mut host = with_services(&gateway);
    host.reboot();
    wait_until_up(&host);
    host.control(&["stop"]).expect_success();
    host.reboot();
    wait_until_up(&host);
}

#[test]
fn a_manager_that_is_a_service_is_upgraded_and_rolled_back() {
    let gateway = gateway(&[&release::good("2.0.0")]);
    let host = with_services(&gateway);
    let settings = host.home().join("etc/conf.toml");
    let text = fs::read_to_string(&settings).expect("it exists");
    fs::write(&settings, text + "\nupgradeTrial = \"20s\"\n").expect("the home is ours");
    let before = agents_of(&host);
    order(&gateway, "2.0.0");
    host.wait_for_status("the release 2.0.0", ENDED, |status| runs(status, "2.0.0"));
    assert!(fs::read(host.program("bin/aops")).expect("it exists") == release::executable("2.0.0"));
    host.control(&["rollback"]).expect_success();
    host.wait_for_status("the release 1.0.0", ENDED, |status| runs(status, "1.0.0"));
    assert_eq!(agents_of(&host), before);
    // What was moved away is removed when no process runs it any more.
    let left = || {
        let entries = fs::read_dir(host.home().join("bin")).expect("a directory").flatten();
        entries.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().ends_with(".old")).count()
    };
    host.control(&["restart"]).expect_success();
    wait_until_up(&host);
    wait_for("the replaced executables to be removed", SOON * 3, || (left() == 0).then_some(()));
}

#[test]
fn files_that_another_program_holds_open_delay_an_upgrade_and_do_not_break_it() {
    let gateway = gateway(&[&release::good("2.0.0")]);
    let host = TestHost::new();
    host.join(&gateway, &["--version", "1.0.0"]).expect_success();
    let before = agents_of(&host);
    let settings = host.home().join("etc/conf.toml");
    let text = fs::read_to_string(&settings).expect("it exists");
    fs::write(&settings, text + "\nupgradeTrial = \"20s\"\n").expect("the home is ours");
    let files = ["bin/aops.exe", "state/releases.json", "state/upgrade.json", "control.exe"];
    let held = files.map(|file| {
        let path = host.home().join(file).display().to_string();
        let mut command = host.spawn(r"Z:\program\tool.exe", &["hold", &path]);
        let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cannot run nsenter");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("a pipe can be read");
        (holder, line.trim() == "holding")
    });
    assert!(held[0].1 && held[1].1, "the files are there");
    order(&gateway, "2.0.0");
    // As long as the files are held, nothing is half replaced.
    let status = host.wait_for_status("the attempt to be reported", ENDED, |status| {
        status["problems"].to_string().contains("2.0.0") || runs(status, "2.0.0")
    });
    assert_eq!(agents_of(&host), before, "{status:#}");
    for (mut holder, _) in held {
        drop(holder.stdin.take());
        holder.wait().expect("it is our child");
    }
    host.control(&["retry", release::NAME]);
    host.wait_for_status("the release 2.0.0", ENDED, |status| runs(status, "2.0.0"));
    assert_eq!(agents_of(&host), before);
}

#[test]
fn the_old_command_installs_the_default_home_and_uninstalling_leaves_nothing() {
    let gateway = gateway(&[]);
    let host = TestHost::new();
    let depot = fs::read_dir(gateway.path("depot")).expect("a directory").flatten().map(|entry| entry.path());
    let is_bootstrap = |path: &std::path::PathBuf| path.to_string_lossy().contains("aops-agent-service-windows");
    let bootstrap = depot.into_iter().find(is_bootstrap).expect("it was published").display().to_string();
    let installed = host.run(
        &bootstrap,
        &["--control", "install", "--version", "1.0.0", "--agentId", host.agent_id(), "--endpoint", gateway.url()],
    );
    installed.expect_success();
    let control = format!(r"{DEFAULT_HOME}\control.exe");
    wait_for("both sub-agents", SOON, || {
        let status = host.run(&control, &["status", "--json"]).json();
        NAMES.iter().all(|name| agent(&status, name).is_some_and(|agent| agent["state"] == "running")).then_some(())
    });
    assert_eq!(state(&host, "aops-spm").as_deref(), Some("RUNNING"));
    host.run(&bootstrap, &["--control", "status"]).expect_success();

    host.run(&control, &["uninstall", "--yes"]).expect_success();
    for name in ["aops-spm", "aops-spa"] {
        assert_eq!(state(&host, name), None);
    }
    let there = |path: &str| host.run("cmd", &["/d", "/c", "dir", "/b", path]).success();
    assert!(!there(DEFAULT_HOME), "the home is left");
    wait_for("the program that uninstalled to be removed", SOON, || {
        (!there(r"C:\users\root\Temp\aops-*.old")).then_some(())
    });
    host.run(&bootstrap, &["--control", "status"]).expect_code(4);
}

#[test]
fn a_package_with_a_batch_file_as_control_runs() {
    let batch = "@echo off\r\ncd /d \"%~dp0\"\r\n\"%~dp0tools\\control.exe\" %1\r\n";
    let classic = Package::control_sleeper("inner", "1");
    let bytes = fs::read(classic.path().join("control.exe")).expect("it was created");
    let package = Package::plain("batch", "1")
        .with_program("bin/app", "exec sleep 1000000")
        .with_file("control.bat", batch, 0o644)
        .with_file("tools/control.exe", bytes, 0o755);
    let gateway = Gateway::with(&[&package], &[("batch", "1", "")]);
    let host = TestHost::joined(&gateway);
    let first = host.wait_for_agent("batch");
    host.kill(first);
    host.wait_for_new_pid("batch", first);
    host.control(&["stop"]).expect_success();
    assert_eq!(host.processes(), []);
}
