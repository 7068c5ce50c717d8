//! A host joins the fleet and is uninstalled: the commands of an operator of the old platform, and what is left afterwards.

use std::time::Duration;

use crate::support::aops;
use crate::support::container::{Container, Running};
use crate::support::files::difference;
use crate::support::gateway::Gateway;
use crate::support::host::{TestHost, agent, pid};
use crate::support::package::{Package, bootstrap};
use crate::support::wait::wait_for;

/// The deadline for a complete start of a host.
const UP: Duration = Duration::from_secs(60);
const AGENT_ID: &str = "5402204854438";
const VERSION: &str = "c57f6a1d";

#[test]
fn a_host_joins_runs_both_kinds_of_sub_agents_and_is_uninstalled_without_leftovers() {
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    gateway.publish(&Package::sleeper("native", "1.0"));
    gateway.publish(&Package::control_sleeper("classic", "3.1"));
    gateway
        .fleet("heartbeatInterval = \"1s\"\n[agents.native]\nversion = \"1.0\"\n[agents.classic]\nversion = \"3.1\"\n");
    gateway.run();

    let host = TestHost::joined(&gateway);
    let status = host.wait_for_status("everything to run", UP, |status| {
        let runs =
            |name| agent(status, name).is_some_and(|agent| agent["state"] == "running" && pid(&agent["pid"]).is_some());
        status["state"] == "running"
            && pid(&status["spm"]["pid"]).is_some()
            && pid(&status["spa"]["pid"]).is_some()
            && runs("native")
            && runs("classic")
    });
    assert_eq!(status["version"], "1.0.0");
    assert_eq!(status["gateway"]["connected"], true, "{status:#}");
    let reported = wait_for("the gateway to know the host", UP, || {
        let status = gateway.status();
        status.to_string().contains(host.agent_id()).then_some(status)
    });
    assert!(reported.to_string().contains("1.0.0"), "{reported:#}");

    host.control(&["uninstall", "--yes"]).expect_success();
    assert_eq!(host.processes(), []);
    assert!(!host.home().exists());
    host.control(&["status"]).expect_code(4);
}

#[test]
fn the_old_command_installs_with_systemd_and_uninstalling_leaves_nothing() {
    let container = Container::systemd();
    let (before, _gateway) = join_by_the_old_command(&container);
    for unit in ["aops-spm", "aops-spa"] {
        assert_eq!(container.run(&["systemctl", "is-active", unit]).stdout, "active\n");
        assert_eq!(container.run(&["systemctl", "is-enabled", unit]).stdout, "enabled\n");
    }
    leave(&container, &before);
    let units = container
        .shell("systemctl list-unit-files --no-legend 'aops*'; systemctl list-units --all --no-legend 'aops*'");
    assert_eq!(units.stdout, "");
}

#[test]
fn the_old_command_installs_without_a_service_manager_and_uninstalling_leaves_nothing() {
    let container = Container::bare();
    let (before, _gateway) = join_by_the_old_command(&container);
    leave(&container, &before);
}

/// Starts a gateway inside and runs the old platform's command verbatim. Returns the files as they were before the command.
fn join_by_the_old_command(container: &Container) -> (crate::support::files::Files, Running<'_>) {
    container.copy_in(aops(), "/srv/aops", 0o755);
    for file in ["agent.toml", "bin/run"] {
        let package = Package::sleeper("native", "1.0");
        container.copy_in(package.path().join(file), format!("/srv/native/{file}"), 0o755);
    }
    container
        .shell(&format!(
            "cd /srv; ./aops gateway init --dir gw; ./aops gateway publish --dir gw --self --version {VERSION}
            ./aops gateway publish --dir gw native; printf 'heartbeatInterval = \"1s\"\\n[agents.native]\\nversion = \"1.0\"\\n' >gw/fleet.toml"
        ))
        .expect_success();
    let gateway = container.spawn(&["/srv/aops", "gateway", "run", "--dir", "/srv/gw", "--listen", "127.0.0.1:8888"]);
    assert!(gateway.line().starts_with("listening on https://"));
    let before = container.files();

    container
        .shell(&format!(
            "curl -kf4 -m 30 -X GET https://127.0.0.1:8888/api/download/{file} -H 'x-agent-id: {AGENT_ID}' -o {file} && chmod +x {file} && \
             ./{file} --control install --version {VERSION} --agentId {AGENT_ID} --endpoint https://127.0.0.1:8888",
            file = bootstrap()
        ))
        .expect_success();
    let status = wait_for("everything to run", UP, || {
        let status = container.run(&["aops", "control", "status", "--json"]).json();
        let runs = agent(&status, "native").is_some_and(|agent| agent["state"] == "running");
        (runs && status["state"] == "running" && pid(&status["spa"]["pid"]).is_some()).then_some(status)
    });
    assert!(pid(&status["spm"]["pid"]).is_some(), "{status:#}");
    assert_eq!(status["version"], VERSION);
    (before, gateway)
}

fn leave(container: &Container, before: &crate::support::files::Files) {
    container.run(&["aops", "control", "uninstall", "--yes"]).expect_success();
    let processes = container.processes();
    let left: Vec<_> =
        processes.iter().filter(|(_, words)| words.contains("/opt/aops") || words.contains("sleep 1000000")).collect();
    assert!(left.is_empty(), "{left:?}");
    container.run(&["rm", &bootstrap()]).expect_success();
    // The gateway's state of its hosts is not compared.
    let changed = difference(before, &container.files());
    let changed: Vec<_> = changed.iter().filter(|line| !line.contains("/srv/gw")).collect();
    assert!(changed.is_empty(), "{changed:#?}");
}
