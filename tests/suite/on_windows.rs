//! What is different on Windows: the roles are services, and files that are in use cannot be replaced. `cargo xtask test-windows --scenarios`
//! runs these scenarios, and those of other themes that windows.txt lists; `cargo xtask test` leaves them out.

mod steps;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent, pid};
use crate::support::package::Package;
use crate::support::release;
use crate::support::wait::wait_for;
use crate::support::windows;
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

/// Installs on a host, with the roles as services.
#[track_caller]
fn with_services(host: TestHost, gateway: &Gateway) -> TestHost {
    let (home, trust) = (host.home().display().to_string(), gateway.trust());
    let mut words = vec!["install", "--home", &home, "--agent-id", host.agent_id(), "--endpoint", gateway.url()];
    words.extend(["--version", "1.0.0"]);
    words.extend(trust.iter().map(String::as_str));
    host.aops(&words).expect_success();
    agents_of(&host);
    host
}

/// How long a new release of the manager is on trial.
fn set_trial(host: &TestHost, duration: &str) {
    let settings = host.home().join("etc/conf.toml");
    let text = fs::read_to_string(&settings).expect("it exists");
    fs::write(&settings, format!("{text}\nupgradeTrial = \"{duration}\"\n")).expect("the home is ours");
}

#[track_caller]
fn agents_of(host: &TestHost) -> [u32; 2] {
    NAMES.map(|name| host.wait_for_agent(name))
}

/// The name of a role's service in a home other than the default one.
fn service(host: &TestHost, role: &str) -> String {
    let shown = host.control(&["status", "--json"]).json();
    name_in(shown["home"].as_str().expect("a path"), role)
}

fn name_in(home: &str, role: &str) -> String {
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
    let host = with_services(TestHost::new(), &gateway);
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
    let host = with_services(TestHost::new(), &gateway);
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
    let host = with_services(TestHost::new(), &gateway);
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
    let mut host = with_services(TestHost::new(), &gateway);
    host.reboot();
    wait_until_up(&host);
    host.control(&["stop"]).expect_success();
    host.reboot();
    wait_until_up(&host);
}

#[test]
fn a_manager_that_is_a_service_is_upgraded_and_rolled_back() {
    let gateway = gateway(&[&release::good("2.0.0")]);
    let host = with_services(TestHost::new(), &gateway);
    set_trial(&host, "20s");
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
    set_trial(&host, "20s");
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

/// An installation of the replaced system: its manager and its watchdog as services, a sub-agent, its control program, and its settings.
/// The services have the names of ours.
fn old_installation(host: &TestHost, gateway: &Gateway) {
    let program = windows::under_test().expect("the scenario is for Windows").agent();
    let home = host.home();
    for directory in ["bin", "etc", "log", "agents/monitor/bin"] {
        fs::create_dir_all(home.join(directory)).expect("the directory is ours");
    }
    let programs = ["control", "bin/aops-spm", "bin/aops-spa", "agents/monitor/control", "agents/monitor/bin/monitor"];
    for name in programs {
        fs::copy(&program, home.join(format!("{name}.exe"))).expect("the directory is ours");
    }
    fs::write(home.join("agents/monitor/bin/monitor.script"), "exec sleep 1000003").expect("the directory is ours");
    fs::write(home.join("agentId"), "5402\r\n").expect("the directory is ours");
    let settings = format!("heartbeatSrv: {}\r\nheartbeatInterval: 7\r\nlogLevel: info\r\n", gateway.url());
    fs::write(home.join("etc/conf.yml"), settings).expect("the directory is ours");
    for (role, name) in OLD_SERVICES.iter().zip(old_services(host)) {
        let program = host.name(&home.join(format!("bin/{role}.exe")));
        let command = format!(r#""{program}" service {name}"#);
        host.run("sc", &["create", &name, "binpath=", &command, "start=", "auto"]).expect_success();
        host.run("sc", &["start", &name]).expect_success();
    }
    let script = host.name(&home.join("agents/monitor"));
    host.run("cmd", &["/d", "/c", &format!("cd /d {script} && control.exe start >nul")]).expect_success();
    runs_as_before(host, true);
}

/// Their programs.
const OLD_SERVICES: [&str; 2] = ["aops-spm", "aops-spa"];

/// The first has the name of our manager's service in this home.
fn old_services(host: &TestHost) -> [String; 2] {
    [name_in(&host.name(&host.home()), "spm"), "aops-agent-watch".to_owned()]
}

/// Its services run, and its sub-agent unless the host was booted.
#[track_caller]
fn runs_as_before(host: &TestHost, has_agent: bool) {
    for name in old_services(host) {
        wait_for_state(host, &name, "RUNNING");
    }
    let is_old = |words: &str| OLD_SERVICES.iter().any(|role| words.contains(&format!(r"\bin\{role}.exe")));
    let running = host.processes();
    let count = running.iter().filter(|process| is_old(&process.command)).count();
    assert_eq!(count, OLD_SERVICES.len(), "{running:?}");
    let agents = running.iter().filter(|process| process.command.contains("monitor.exe")).count();
    assert_eq!(agents, usize::from(has_agent), "{running:?}");
}

#[test]
fn an_old_installation_with_its_services_is_taken_over_or_runs_as_before() {
    let broken = Package::plain(release::NAME, "broken").with_program("bin/aops", "echo broken");
    let monitor = Package::control_sleeper("monitor", "3.2");
    let gateway = Gateway::with(&[&broken, &monitor], &[("monitor", "3.2", "")]);
    let mut host = TestHost::new();
    old_installation(&host, &gateway);
    let home = host.home().display().to_string();
    let trust = gateway.trust();
    let install = |host: &TestHost, version: &str| {
        let mut words = vec!["install", "--home", &home, "--version", version];
        words.extend(trust.iter().map(String::as_str));
        host.aops(&words)
    };

    // A manager that cannot run: the old one is put back, and starts at boot as before.
    let failed = install(&host, "broken");
    assert_eq!(failed.code, 1, "{failed}");
    runs_as_before(&host, false);
    assert!(host.home().join("etc/conf.yml").exists() && host.home().join("agentId").exists());
    host.reboot();
    runs_as_before(&host, false);

    install(&host, "1.0.0").expect_success();
    host.wait_for_agent("monitor");
    let status = host.wait_for_status("both roles", SOON, |status| status["state"] == "running");
    assert_eq!(status["gateway"]["endpoint"], gateway.url(), "{status:#}");
    wait_for("the gateway to know the host by its old id", SOON, || {
        gateway.status()["hosts"].to_string().contains("\"5402\"").then_some(())
    });
    let [ours, other] = old_services(&host);
    assert_eq!((state(&host, &ours).as_deref(), state(&host, &other)), (Some("RUNNING"), None));
    assert!(!host.home().join("etc/conf.yml").exists());
    assert!(
        !host
            .processes()
            .iter()
            .any(|process| process.command.contains(" service ") && process.command.contains("watch"))
    );

    host.control(&["uninstall", "--yes"]).expect_success();
    assert_eq!((state(&host, &ours), state(&host, &other)), (None, None));
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
