//! Installing, reinstalling, replacing and uninstalling, on hosts in a temporary home and in containers.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::support::command::{self, LIMIT, Output};
use crate::support::container::{Container, Running};
use crate::support::files::{Files, difference, snapshot};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::inside::VERBATIM;
use crate::support::package::Package;
use crate::support::wait::wait_for;
use crate::support::{aops, processes};

/// The files that a running manager changes at any time.
const ALIVE: &[&str] =
    &["/log", "/run", "/state/events.json", "/state/desired.json", "/state/conf.good.toml", "/cache", "/staging"];

/// An executable that prints its version and does nothing else.
fn broken_manager() -> Package {
    let script = "#!/bin/sh\ncase \"$1\" in --version) echo broken ;; *) exit 3 ;; esac\n";
    Package::control("aops-spm", "broken", "exit 0").with_file("bin/aops", script, 0o755)
}

/// A host of a fleet with one running sub-agent.
fn joined() -> (Gateway, TestHost, u32) {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("2.0.0");
    gateway.publish(&broken_manager());
    gateway.publish_self("1.0.0");
    gateway.publish(&Package::sleeper("sleeper", "1"));
    gateway.fleet("heartbeatInterval = \"1s\"\n[manager]\nversion = \"1.0.0\"\n[agents.sleeper]\nversion = \"1\"\n");
    gateway.run();
    let host = TestHost::joined(&gateway);
    let pid = host.wait_for_agent("sleeper");
    (gateway, host, pid)
}

fn standing(host: &TestHost) -> Files {
    snapshot(&host.home(), ALIVE)
}

#[test]
fn reinstalling_keeps_identity_settings_comments_and_the_pids_of_sub_agents() {
    let (gateway, host, pid) = joined();
    let config = host.home().join("etc/conf.toml");
    let text = fs::read_to_string(&config).unwrap();
    let edited = text.replace("#spmMaxMem = \"64MiB\"", "# by hand\nspmMaxMem = 99 # because\n");
    assert_ne!(text, edited);
    fs::write(&config, &edited).unwrap();
    let spm = host.role_pid("spm");

    host.install(&["--version", "2.0.0"]).expect_success();
    let status = host.wait_for_status("the new version", SOON, |status| {
        status["version"] == "2.0.0" && status["state"] == "running"
    });
    assert_eq!(host.wait_for_agent("sleeper"), pid);
    assert_ne!(host.role_pid("spm"), spm);
    assert_eq!(fs::read_to_string(&config).unwrap(), edited);
    assert_eq!(status["gateway"]["endpoint"], gateway.url());
    assert_eq!(fs::read_to_string(host.home().join("etc/agent-id")).unwrap().trim(), host.agent_id());

    let output = host.install(&["--version", "2.0.0", "--agent-id", "99"]);
    assert!(output.text().contains("the agent id changes"), "{output}");
    output.expect_success();
    assert_eq!(host.wait_for_agent("sleeper"), pid);
}

#[test]
fn an_early_failure_of_a_reinstallation_changes_nothing() {
    let (gateway, host, pid) = joined();
    let spm = host.role_pid("spm");
    let config = host.home().join("etc/conf.toml");
    let good = fs::read_to_string(&config).unwrap();
    let epochs = host.home().join("state/epochs.json");
    let other = Gateway::stopped();
    other.publish_self("2.0.0");
    let mut depot = fs::read_dir(other.path("depot")).unwrap().flatten().map(|entry| entry.path());
    let foreign = depot.find(|path| path.extension().is_some_and(|end| end == "zst")).unwrap().display().to_string();
    let zeros = "00".repeat(32);

    let check = |what: &str, code: i32, words: &str, arguments: &[&str]| {
        let before = standing(&host);
        let output = host.install(arguments);
        assert!(output.text().contains(words), "{what}: {output}");
        output.expect_code(code);
        assert_eq!(difference(&before, &standing(&host)), Vec::<String>::new(), "{what}");
        assert_eq!((host.role_pid("spm"), host.wait_for_agent("sleeper")), (spm, pid), "{what}");
    };
    check("a missing version", 1, "no package of aops-spm 9.9.9", &["--version", "9.9.9"]);
    check("no gateway", 1, "refused", &["--endpoint", "https://127.0.0.1:1"]);
    check("a wrong certificate", 1, "matches no pin", &["--pin", &zeros]);
    check("an untrusted key", 1, "key", &["--package", &foreign]);
    check("plain http", 1, "--insecure", &["--endpoint", "http://127.0.0.1:1"]);
    check("a bad id", 2, "an agent id", &["--agent-id", "a b"]);
    check("a contradiction", 2, "cannot be used with", &["--insecure", "--pin", &zeros]);
    check("an unknown product", 2, "as a product", &["--product", "other"]);

    fs::write(&config, format!("{good}\nspmmaxmem = 3\n")).unwrap();
    check("an unknown key", 1, "unknown key \"spmmaxmem\"", &["--version", "2.0.0"]);
    fs::write(&config, format!("{good}\nspmMaxMem =\n")).unwrap();
    check("malformed settings", 1, "conf.toml", &["--version", "2.0.0"]);
    fs::write(&config, &good).unwrap();

    let aside = host.beside("epochs.json");
    fs::rename(&epochs, &aside).unwrap();
    check("missing epochs", 1, "epochs.json", &["--version", "2.0.0"]);
    fs::rename(&aside, &epochs).unwrap();

    let lock = host.home().join("run/install.lock");
    let file = fs::File::create(&lock).unwrap();
    file.lock().unwrap();
    check("a second one at the same time", 1, "another installation", &["--version", "2.0.0"]);
    drop(file);
    host.install(&["--version", "2.0.0"]).expect_success();
    drop(gateway);
}

#[test]
fn a_new_version_that_does_not_start_is_rolled_back_to_the_old_one() {
    let (_gateway, host, pid) = joined();
    let before = standing(&host);
    let output = host.install(&["--version", "broken"]);
    assert!(output.text().contains("step wait") && output.text().contains("is restored"), "{output}");
    output.expect_code(1);
    host.wait_for_status("the old version", SOON, |status| {
        status["version"] == "1.0.0" && status["state"] == "running"
    });
    assert_eq!(difference(&before, &standing(&host)), Vec::<String>::new());
    assert_eq!(host.wait_for_agent("sleeper"), pid);
}

#[test]
fn a_failed_first_installation_leaves_nothing() {
    let mut gateway = Gateway::stopped();
    gateway.publish(&broken_manager());
    gateway.run();
    let host = TestHost::new();
    for version in ["broken", "9.9.9"] {
        host.join(&gateway, &["--version", version]).expect_code(1);
        assert!(!host.home().exists(), "{version}");
        assert!(host.processes().is_empty(), "{version}");
    }
    fs::create_dir(host.home()).unwrap();
    fs::write(host.home().join("photo"), "mine").unwrap();
    let output = host.join(&gateway, &[]);
    assert!(output.text().contains("it contains photo"), "{output}");
    output.expect_code(1);
    assert_eq!(fs::read_dir(host.home()).unwrap().count(), 1);
}

#[test]
fn foreign_files_are_not_treated_as_an_old_installation_and_not_removed() {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    gateway.run();
    let host = TestHost::new();
    let home = host.home();
    fs::create_dir_all(home.join("data")).unwrap();
    fs::write(home.join("data/customers.db"), "precious").unwrap();
    fs::create_dir(home.join("etc")).unwrap();
    for mark in ["etc/agent-id", "agentId", "etc/conf.yml"] {
        let content = if mark == "etc/conf.yml" { "heartbeatSrv: https://other:1\n" } else { "af31\n" };
        fs::write(home.join(mark), content).unwrap();
        let before = snapshot(&home, &[]);
        let output = host.join(&gateway, &[]).expect_code(1);
        assert!(output.text().contains("at least two of these") && output.text().contains("--import"), "{output}");
        host.control(&["uninstall", "--yes"]).expect_code(4);
        assert_eq!(difference(&before, &snapshot(&home, &[])), Vec::<String>::new(), "{mark}");
        fs::remove_file(home.join(mark)).unwrap();
    }
    fs::remove_dir_all(&home).unwrap();

    // Files that are added to a home later are kept too.
    host.join(&gateway, &[]).expect_success();
    fs::create_dir(home.join("data")).unwrap();
    fs::write(home.join("data/customers.db"), "precious").unwrap();
    host.join(&gateway, &["--fresh"]).expect_success();
    let output = host.control(&["uninstall", "--yes"]).expect_code(0);
    assert!(output.stderr.contains(&format!("are kept: {}", home.join("data").display())), "{output}");
    assert_eq!(fs::read_dir(&home).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(home.join("data/customers.db")).unwrap(), "precious");
}

#[test]
fn fresh_keeps_nothing_of_an_older_installation() {
    let (gateway, host, pid) = joined();
    fs::write(host.home().join("etc/own"), "x").unwrap();
    host.install(&["--fresh", "--version", "2.0.0"]).expect_code(2);
    assert_eq!(host.wait_for_agent("sleeper"), pid);
    host.join(&gateway, &["--fresh", "--version", "2.0.0"]).expect_success();
    host.wait_for_new_pid("sleeper", pid);
    assert!(!host.home().join("etc/own").exists() && !host.home().join(".install").exists());
}

/// A running installation of the system that aops replaces.
fn old_installation(host: &TestHost, endpoint: &str) {
    let home = host.home();
    for directory in ["etc", "bin", "var"] {
        fs::create_dir_all(home.join(directory)).unwrap();
    }
    fs::copy("/bin/sleep", home.join("bin/old-agent")).unwrap();
    fs::write(home.join("agentId"), "5402204854438\n").unwrap();
    let settings = format!("heartbeatSrv: {endpoint}\nheartbeatInterval: 7\nspmMaxMem: 80\ncpuLimit: 3\n");
    fs::write(home.join("etc/conf.yml"), settings).unwrap();
    let control = "#!/bin/sh\ncd \"$(dirname \"$0\")\"\ncase $1 in\nstart) setsid ./bin/old-agent 1000000 >/dev/null 2>&1 & ;;\n\
                   stop) echo stop >>var/told ;;\nesac\n";
    fs::write(home.join("control"), control).unwrap();
    fs::set_permissions(home.join("control"), fs::Permissions::from_mode(0o755)).unwrap();
    command::run(host.command(&home.join("control")).arg("start"), LIMIT).expect_success();
    wait_for("the old agent", SOON, || old_agent(host));
}

fn old_agent(host: &TestHost) -> Option<u32> {
    let executable = host.home().join("bin/old-agent");
    processes_running(&executable).first().copied()
}

fn processes_running(executable: &Path) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| path == executable)).collect()
}

#[test]
fn an_old_installation_is_replaced_and_its_settings_are_imported() {
    let mut gateway = Gateway::stopped();
    gateway.publish(&broken_manager());
    gateway.publish_self("1.0.0");
    gateway.run();
    let host = TestHost::new();
    old_installation(&host, gateway.url());
    let trust = gateway.trust();
    let with = |version: &str| -> Output {
        let mut arguments = vec!["--version", version];
        arguments.extend(trust.iter().map(String::as_str));
        host.install(&arguments)
    };
    let except = ["/var"];
    let before = snapshot(&host.home(), &except);
    with("broken").expect_code(1);
    assert_eq!(difference(&before, &snapshot(&host.home(), &except)), Vec::<String>::new());
    assert_eq!(fs::read_to_string(host.home().join("var/told")).unwrap(), "stop\n");
    wait_for("the old agent to run again", SOON, || old_agent(&host));

    let output = with("1.0.0");
    assert!(output.text().contains("cpuLimit"), "{output}");
    output.expect_success();
    assert_eq!(old_agent(&host), None);
    for gone in ["agentId", "etc/conf.yml", "bin/old-agent", "var", ".install"] {
        assert!(!host.home().join(gone).exists(), "{gone}");
    }
    assert_eq!(fs::read_to_string(host.home().join("etc/agent-id")).unwrap(), "5402204854438\n");
    let config = fs::read_to_string(host.home().join("etc/conf.toml")).unwrap();
    for line in ["heartbeatInterval = \"7s\"", "spmMaxMem = \"80MiB\"", "caCert = \"etc/ca.pem\""] {
        assert!(config.lines().any(|found| found == line), "{line}\n{config}");
    }
    host.wait_for_status("it to run", SOON, |status| status["state"] == "running");
    host.control(&["uninstall", "--yes"]).expect_success();
    assert!(!host.home().exists());
}

#[test]
fn uninstalling_asks_first_and_works_with_dead_roles_once() {
    let (_gateway, host, _) = joined();
    let output = host.control(&["uninstall"]);
    assert!(output.text().contains("--yes"), "{output}");
    output.expect_code(2);
    for role in ["spa", "spm"] {
        if let Some(pid) = host.role_pid(role) {
            host.kill(pid);
        }
    }
    // With the home's own executable, which is removed with the home.
    let control = host.home().join("control");
    command::run(host.command(&control).args(["uninstall", "--yes"]), LIMIT).expect_success();
    assert!(!host.home().exists());
    assert!(processes::of_home(&host.home()).is_empty());
    host.control(&["uninstall", "--yes"]).expect_code(4);
}

/// A gateway inside a container, below /tmp, which is not compared.
fn gateway_in(container: &Container) -> Running<'_> {
    container.copy_in(aops(), "/tmp/aops", 0o755);
    container
        .shell("cd /tmp; ./aops gateway init --dir gw; ./aops gateway publish --dir gw --self --version c57f6a1d")
        .expect_success();
    let gateway = container.spawn(&["/tmp/aops", "gateway", "run", "--dir", "/tmp/gw", "--listen", "127.0.0.1:8888"]);
    assert!(gateway.line().starts_with("listening on https://"));
    gateway
}

fn status_in(container: &Container) -> serde_json::Value {
    container.shell("aops control status --json || true").json()
}

#[test]
fn units_survive_a_reboot_and_are_replaced_removed_or_rejected_as_systemd_reports() {
    let mut container = Container::systemd();
    {
        let _gateway = gateway_in(&container);
        container.shell("systemctl mask aops-spm").expect_success();
        let output = container.shell(&format!("cd /tmp; {VERBATIM}"));
        assert!(output.text().contains("systemctl unmask aops-spm"), "{output}");
        output.expect_code(1);
        container.shell("systemctl unmask aops-spm").expect_success();
        container.shell(&format!("cd /tmp; {VERBATIM}")).expect_success();
        let shown = container
            .shell("systemctl is-active aops-spm aops-spa; systemctl is-enabled aops-spm aops-spa")
            .expect_success();
        assert_eq!(shown, "active\nactive\nenabled\nenabled\n");
    }
    container.reboot();
    wait_for("the home after a boot", SOON, || {
        let status = status_in(&container);
        (status["spm"]["pid"].is_u64() && status["spa"]["pid"].is_u64()).then_some(())
    });
    // A unit is removed manually.
    container
        .shell("systemctl stop aops-spa; rm /etc/systemd/system/aops-spa.service; systemctl daemon-reload")
        .expect_success();
    container.shell("aops control uninstall --yes").expect_success();
    assert!(!container.path("/opt/aops").exists());
    assert_eq!(container.shell("ls /etc/systemd/system | grep aops || true").stdout, "");
}

#[test]
fn mounts_below_a_home_are_not_removed_with_it() {
    let container = Container::bare();
    let _gateway = gateway_in(&container);
    container.shell(&format!("cd /tmp; {VERBATIM}")).expect_success();
    container.shell("mkdir /srv/data; echo precious >/srv/data/file").expect_success();
    for place in ["/opt/aops/agents/mine/1/data", "/opt/aops/log"] {
        container.shell(&format!("mkdir -p {place}; mount --bind /srv/data {place}")).expect_success();
        let output = container.shell("/opt/aops/control uninstall --yes").expect_code(1);
        assert!(
            output.stderr.contains(&format!("mounted at {place}")) && output.stderr.contains("unmount"),
            "{output}"
        );
        assert_eq!(container.shell("cat /srv/data/file").stdout, "precious\n");
        container.shell(&format!("umount {place}")).expect_success();
    }
    container.shell("/opt/aops/control uninstall --yes").expect_success();
    assert_eq!(container.shell("cat /srv/data/file; ls /opt").stdout, "precious\n");
}

#[test]
fn linked_and_lost_settings_are_kept_in_place() {
    let (gateway, host, pid) = joined();
    let (config, managed) = (host.home().join("etc/conf.toml"), host.beside("managed.toml"));
    let text = fs::read_to_string(&config).unwrap().replace("#spmMaxMem = \"64MiB\"", "spmMaxMem = 99");
    fs::write(&managed, &text).unwrap();
    fs::set_permissions(&managed, fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink(&managed, &config).unwrap();
    let mode = || fs::metadata(&managed).unwrap().permissions().mode() & 0o777;
    host.install(&["--version", "2.0.0"]).expect_success();
    assert!(config.is_symlink());
    assert_eq!((fs::read_to_string(&managed).unwrap(), mode()), (text.clone(), 0o600));
    // The file behind the link is changed, and restored after a failure.
    let second = format!("{}/", gateway.url());
    host.install(&["--version", "broken", "--endpoint", "https://127.0.0.1:1", "--endpoint", &second]).expect_code(1);
    assert_eq!(fs::read_to_string(&managed).unwrap(), text);
    host.install(&["--version", "2.0.0", "--endpoint", gateway.url(), "--endpoint", "https://127.0.0.1:1"])
        .expect_success();
    let changed = fs::read_to_string(&managed).unwrap();
    assert!(
        config.is_symlink() && changed.contains("127.0.0.1:1\"") && changed.contains("spmMaxMem = 99"),
        "{changed}"
    );
    assert_eq!(mode(), 0o600);

    fs::remove_file(&config).unwrap();
    let output = host.install(&["--version", "2.0.0"]).expect_code(0);
    assert!(output.stderr.contains("conf.toml is missing; using its last good copy"), "{output}");
    assert_eq!(fs::read_to_string(&config).unwrap(), changed);
    assert_eq!(host.wait_for_agent("sleeper"), pid);
}

#[test]
fn a_damaged_agent_id_is_fixed_by_the_suggested_command() {
    let (_gateway, host, pid) = joined();
    let file = host.home().join("etc/agent-id");
    fs::write(&file, "").unwrap();
    let refused = host.install(&[]).expect_code(1);
    assert!(refused.stderr.contains("etc/agent-id") && refused.stderr.contains("--agent-id"), "{refused}");
    host.install(&["--agent-id", host.agent_id()]).expect_success();
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), host.agent_id());
    assert_eq!(host.wait_for_agent("sleeper"), pid);
}

#[test]
fn a_read_only_home_and_a_full_disk_are_reported_and_leave_nothing() {
    let container = Container::bare();
    let _gateway = gateway_in(&container);
    container
        .shell("mkdir /srv/ro /srv/full; mount -t tmpfs -o ro none /srv/ro; mount -t tmpfs -o size=3m none /srv/full")
        .expect_success();
    for (directory, words) in [("/srv/ro", "Read-only file system"), ("/srv/full", "not enough disk space")] {
        let output = container.shell(&format!("cd /tmp; {VERBATIM} --home {directory}/home"));
        assert!(output.text().contains(words) && output.text().contains("nothing was changed"), "{output}");
        output.expect_code(1);
        assert_eq!(container.shell(&format!("ls -A {directory}")).stdout, "", "{directory}");
    }
}
