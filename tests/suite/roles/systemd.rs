//! The two roles under a real systemd: which stops count, what a restart does not touch, and what a boot starts.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::support::aops;
use crate::support::command::Output;
use crate::support::container::Container;
use crate::support::host::{FORKING, SOON, agent, pid};
use crate::support::inside::{Space, mount_home};
use crate::support::package::Package;
use crate::support::wait::{try_for, wait_for};

/// Longer than the delay of an automatic restart (1 s), and than the watchdog's interval between two checks of a unit.
const QUIET: Duration = Duration::from_secs(4);
/// The deadline for a home to be complete again, even if the service manager's turn of 10 s comes first.
const BACK: Duration = Duration::from_secs(60);
const NAMES: [&str; 2] = ["native", "classic"];

#[test]
fn sub_agents_survive_a_restart_and_a_crash_but_not_a_stop_of_the_unit() {
    let container = joined();
    let before = up(&container);

    for verb in ["restart aops-spm", "restart aops-spa", "restart aops-spm aops-spa", "try-restart aops-spm"] {
        let (spm, spa) = roles(&container);
        container.shell(&format!("systemctl {verb}")).expect_success();
        let new = roles(&container);
        assert_eq!(new.0 != spm, verb.contains("spm"), "{verb}");
        assert_eq!(new.1 != spa, verb.contains("spa"), "{verb}");
        assert_eq!(up(&container), before, "{verb}");
    }
    let old = roles(&container);
    container.shell("aops control restart").expect_success();
    assert!(roles(&container).0 != old.0 && roles(&container).1 != old.1);
    assert_eq!(up(&container), before);

    for (unit, signal) in [("aops-spm", "KILL"), ("aops-spa", "KILL"), ("aops-spm", "TERM"), ("aops-spa", "TERM")] {
        let old = main_pid(&container, unit);
        container.shell(&format!("kill -{signal} {old}")).expect_success();
        wait_for(&format!("{unit} after {signal}"), BACK, || {
            let new = main_pid(&container, unit);
            (new != 0 && new != old && status(&container)["state"] == "running").then_some(())
        });
        assert_eq!(up(&container), before, "{unit} {signal}");
    }
    assert_eq!(status(&container)["spm"]["restarts"], 1);

    container.shell("systemctl stop aops-spm").expect_success();
    stays_stopped(&container);
    // Starting one unit starts the home.
    container.shell("systemctl start aops-spm").expect_success();
    let after = up(&container);
    assert!(after.iter().all(|(name, pid)| before[name] != *pid));
    assert_eq!(container.run(&["systemctl", "is-active", "aops-spa"]).stdout, "active\n");

    container.shell("aops control stop").expect_success();
    stays_stopped(&container);
    container.shell("aops control stop").expect_success();
    container.shell("aops control start").expect_success();
    up(&container);
    one_of_each(&container);
}

#[test]
fn a_stop_before_an_automatic_restart_is_honoured() {
    let container = joined();
    container.write("/etc/systemd/system/aops-spm.service.d/pause.conf", "[Service]\nRestartSec=6\n", 0o644);
    container.shell("systemctl daemon-reload").expect_success();
    let before = up(&container);
    container.shell("kill -KILL $(systemctl show --property=MainPID --value aops-spm)").expect_success();
    wait_for("the pause", SOON, || sub_state(&container, "aops-spm").contains("auto-restart").then_some(()));
    assert!(before.values().all(|pid| container.path(format!("/proc/{pid}")).exists()));
    container.shell("systemctl stop aops-spm").expect_success();
    wait_until_stopped(&container);
    // The delay would be over by then.
    assert_eq!(try_for(Duration::from_secs(8), || (status(&container)["state"] != "stopped").then_some(())), None);
    stays_stopped(&container);
    container.shell("aops control start").expect_success();
    up(&container);

    // The same with the operator's `control stop`.
    container.shell("kill -KILL $(systemctl show --property=MainPID --value aops-spm)").expect_success();
    wait_for("the pause", SOON, || sub_state(&container, "aops-spm").contains("auto-restart").then_some(()));
    container.shell("aops control stop").expect_success();
    assert_eq!(try_for(Duration::from_secs(8), || (status(&container)["state"] != "stopped").then_some(())), None);
    stays_stopped(&container);
}

#[test]
fn a_stopped_watchdog_unit_and_a_masked_unit_are_not_started() {
    let container = joined();
    let before = up(&container);
    container.shell("systemctl stop aops-spa").expect_success();
    let shown = wait_for("the manager to report it", BACK, || {
        let status = status(&container);
        (status["state"] == "degraded" && status["problems"].to_string().contains("watchdog")).then_some(status)
    });
    assert_eq!(pid(&shown["spa"]["pid"]), None);
    // Twice as long as the service manager's turn.
    let back = try_for(Duration::from_secs(25), || (main_pid(&container, "aops-spa") != 0).then_some(()));
    assert_eq!(back, None);
    assert_eq!(roles_running(&container, "aops-spa"), 0);
    container.shell("systemctl start aops-spa").expect_success();
    wait_for("everything to run", BACK, || (status(&container)["state"] == "running").then_some(()));
    assert_eq!(up(&container), before);

    container
        .shell(
            "pid=$(systemctl show --property=MainPID --value aops-spm); cd /etc/systemd/system; mv aops-spm.service /root
            ln -s /dev/null aops-spm.service; systemctl daemon-reload; kill -KILL $pid",
        )
        .expect_success();
    // systemd does not restart it, and neither does the watchdog, whose turn comes twice within this time.
    let back = try_for(Duration::from_secs(25), || (roles_running(&container, "aops-spm") > 0).then_some(()));
    assert!(back.is_none(), "{}", evidence(&container));
    // systemd kills the processes left in a masked unit's cgroup; the sub-agents are in another.
    assert!(
        before.values().all(|pid| container.shell(&format!("kill -0 {pid}")).success()),
        "{}",
        evidence(&container)
    );
    container
        .shell("mv /root/aops-spm.service /etc/systemd/system/; systemctl daemon-reload; systemctl start aops-spm")
        .expect_success();
    assert_eq!(up(&container), before);
    one_of_each(&container);
}

#[test]
fn a_role_started_by_the_other_yields_to_the_service_managers() {
    let container = joined();
    let before = up(&container);
    for (role, other) in [("spm", "spa"), ("spa", "spm")] {
        let (unit, drop_in) = (format!("aops-{role}"), format!("/etc/systemd/system/aops-{role}.service.d"));
        // systemd gives up on the unit, and cannot start it on request.
        container.write(
            format!("{drop_in}/broken.conf"),
            "[Service]\nRestart=no\nExecStartPre=/bin/false\nWatchdogSec=0\n",
            0o644,
        );
        let old = main_pid(&container, &unit);
        container.shell(&format!("systemctl daemon-reload; kill -KILL {old}")).expect_success();
        let started = wait_for("the last resort", BACK, || {
            let status = status(&container);
            pid(&status[role]["pid"]).filter(|new| *new != old && status["state"] == "running")
        });
        assert_eq!(main_pid(&container, &unit), 0, "{}", evidence(&container));
        // systemd was tried first.
        container.shell(&format!("grep -q 'starting its unit' /opt/aops/log/{other}.log")).expect_success();
        assert_eq!(up(&container), before);

        container.shell(&format!("rm -r {drop_in}; systemctl daemon-reload; systemctl start {unit}")).expect_success();
        let new = main_pid(&container, &unit);
        let status = wait_for("the service manager's own", BACK, || {
            let status = status(&container);
            (pid(&status[role]["pid"]) == Some(new) && status["state"] == "running").then_some(status)
        });
        assert_ne!(new, started, "{status:#}");
        assert_eq!(up(&container), before);
        one_of_each(&container);
    }
}

#[test]
fn a_boot_starts_everything_whatever_the_previous_state() {
    let mut container = joined_with(false);
    let first = up(&container);
    container.reboot();
    // The gateway does not run from here on.
    let second = up(&container);
    assert_eq!(status(&container)["gateway"]["connected"], false);
    one_of_each(&container);
    assert_ne!(first, second);

    // After a power cut the pid file of a `control` package names an unrelated process: certainly, if it is pid 1.
    container.write("/opt/aops/agents/classic/1.0/var/app.pid", "1\n", 0o644);
    container.crash();
    up(&container);
    one_of_each(&container);

    container.shell("aops control stop").expect_success();
    stays_stopped(&container);
    container.reboot();
    up(&container);
    one_of_each(&container);
    assert!(status(&container)["spa"]["pid"].is_u64());
}

#[test]
fn a_stop_works_with_hung_and_dead_roles() {
    let container = joined();
    let signal = |name: &str, unit: &str| {
        container.shell(&format!("kill -{name} $(systemctl show --property=MainPID --value {unit})")).expect_success();
    };
    up(&container);
    // A hung manager.
    signal("STOP", "aops-spm");
    container.shell("aops control stop").expect_success();
    stays_stopped(&container);
    container.shell("aops control start").expect_success();
    up(&container);
    // Both dead at the same time.
    container
        .shell("systemctl kill --kill-who=main --signal=KILL aops-spm aops-spa; aops control stop")
        .expect_success();
    stays_stopped(&container);
    container.shell("aops control start").expect_success();
    up(&container);
    // A hung manager, and the stop of its unit.
    signal("STOP", "aops-spm");
    container.run_within(Duration::from_secs(200), &["systemctl", "stop", "aops-spm"]);
    wait_until_stopped(&container);
    stays_stopped(&container);
    container.shell("systemctl start aops-spm").expect_success();
    up(&container);
    // A manually started role beside the unit's.
    let old = roles(&container);
    let output = container.run(&["/opt/aops/bin/aops-spm", "--home", "/opt/aops"]);
    assert_eq!(output.code, 1, "{output}");
    assert_eq!(roles(&container), old);
    one_of_each(&container);
}

#[test]
fn a_stop_of_the_unit_is_honoured_on_a_full_disk() {
    let container = Container::systemd();
    mount_home(&container, Space::SMALL);
    let container = joined_in(container, true);
    let before = up(&container);
    container.shell("cat /dev/zero >/opt/aops/log/filler 2>/dev/null || true").expect_success();
    for path in ["/opt/aops/run/spm.json", "/opt/aops/run/spa.json"] {
        // Space that becomes free is filled at once.
        container
            .shell(&format!("rm -f {path}; cat /dev/zero >>/opt/aops/log/filler 2>/dev/null || true"))
            .expect_success();
    }
    container.shell("systemctl stop aops-spm").expect_success();
    wait_until_stopped(&container);
    stays_stopped(&container);
    container.shell("rm /opt/aops/log/filler; aops control start").expect_success();
    assert!(up(&container).iter().all(|(name, pid)| before[name] != *pid));
    // Each in a cgroup of its own, which is no role's.
    for pid in up(&container).values() {
        let cgroup = container.shell(&format!("cat /proc/{pid}/cgroup")).stdout;
        assert!(cgroup.contains("aops-agents") && !cgroup.contains("aops-sp"), "{cgroup}");
    }
}

/// A container with a home that has joined a gateway inside, by the old platform's command.
fn joined() -> Container {
    joined_with(true)
}

/// With or without a gateway that starts at boot.
fn joined_with(gateway_at_boot: bool) -> Container {
    joined_in(Container::systemd(), gateway_at_boot)
}

fn joined_in(container: Container, gateway_at_boot: bool) -> Container {
    container.copy_in(aops(), "/srv/aops", 0o755);
    for (package, files) in [
        (Package::sleeper("native", "1.0"), ["agent.toml", "bin/run"]),
        (Package::control_sleeper("classic", "1.0"), ["control", "bin/classic"]),
    ] {
        for file in files {
            container.copy_in(package.path().join(file), format!("/srv/{}/{file}", package.name()), 0o755);
        }
    }
    let unit = "[Service]\nExecStart=/srv/aops gateway run --dir /srv/gw --listen 127.0.0.1:8888\n[Install]\nWantedBy=multi-user.target\n";
    container.write("/etc/systemd/system/gateway.service", unit, 0o644);
    let at_boot = if gateway_at_boot { "systemctl enable gateway" } else { "true" };
    container
        .shell(&format!(
            "cd /srv; ./aops gateway init --dir gw; ./aops gateway publish --dir gw --self --version 1.0.0
            ./aops gateway publish --dir gw native; ./aops gateway publish --dir gw --name classic --version 1.0 classic
            printf 'heartbeatInterval = \"1s\"\\n[agents.native]\\nversion = \"1.0\"\\n[agents.classic]\\nversion = \"1.0\"\\n' >gw/fleet.toml
            systemctl daemon-reload; {at_boot}; systemctl start gateway
            until curl -skf https://127.0.0.1:8888/healthz; do sleep 0.1; done
            ./aops install --agent-id 5402204854438 --endpoint https://127.0.0.1:8888 --trusted-key gw/keys/aops.pub --ca-cert gw/tls/cert.pem"
        ))
        .expect_success();
    container
}

fn status(container: &Container) -> Value {
    container.shell("aops control status --json || true").json()
}

/// Waits until both sub-agents run under both roles, and returns their pids.
#[track_caller]
fn up(container: &Container) -> BTreeMap<&'static str, u32> {
    let running = |status: &Value, name: &str| {
        agent(status, name).filter(|agent| agent["state"] == "running").and_then(|agent| pid(&agent["pid"]))
    };
    let mut last = Value::Null;
    let found = try_for(BACK, || {
        last = status(container);
        let roles = ["spm", "spa"].iter().all(|role| pid(&last[role]["pid"]).is_some());
        let pids: BTreeMap<_, _> = NAMES.iter().filter_map(|name| Some((*name, running(&last, name)?))).collect();
        (roles && pids.len() == NAMES.len()).then_some(pids)
    });
    found.unwrap_or_else(|| panic!("not everything runs: {last:#}\n{}", evidence(container)))
}

/// The logs of the roles and of systemd, to diagnose a failure.
fn evidence(container: &Container) -> Output {
    container.shell(
        "tail -n 30 /opt/aops/log/spm.log /opt/aops/log/spa.log; journalctl -n 40 --no-pager || true
        systemctl show --property=LoadState,ActiveState,SubState,Result,MainPID,UnitFileState,Job aops-spm aops-spa",
    )
}

/// Waits until `status` reports that the home is stopped.
#[track_caller]
fn wait_until_stopped(container: &Container) {
    let stopped = try_for(BACK, || (status(container)["state"] == "stopped").then_some(()));
    assert!(stopped.is_some(), "not stopped: {:#}\n{}", status(container), evidence(container));
}

/// The pids of manager and watchdog inside the container, once both run.
#[track_caller]
fn roles(container: &Container) -> (u32, u32) {
    wait_for("both roles", BACK, || {
        let status = status(container);
        Some((pid(&status["spm"]["pid"])?, pid(&status["spa"]["pid"])?))
    })
}

fn main_pid(container: &Container, unit: &str) -> u32 {
    let shown = container.run(&["systemctl", "show", "--property=MainPID", "--value", unit]).expect_success();
    shown.trim().parse().expect("a number")
}

fn sub_state(container: &Container, unit: &str) -> String {
    container.run(&["systemctl", "show", "--property=SubState", "--value", unit]).expect_success()
}

/// The number of processes of a role.
fn roles_running(container: &Container, role: &str) -> usize {
    let program = format!("/opt/aops/bin/{role} ");
    container
        .processes()
        .iter()
        .filter(|(_, words)| words.starts_with(&program) && !words.contains("stop-hook"))
        .count()
}

/// Every process of the home, sub-agents included.
fn of_home(container: &Container) -> Vec<(u32, String)> {
    let all = container.processes().into_iter();
    all.filter(|(_, words)| words.contains("/opt/aops") || words.contains("sleep 1000000")).collect()
}

#[track_caller]
fn one_of_each(container: &Container) {
    // Until it executes its program, a child that a role has forked has the role's command line.
    let single = try_for(FORKING, || (of_home(container).len() == 4).then_some(()));
    assert!(single.is_some(), "{:?}\n{}", of_home(container), evidence(container));
}

/// Nothing runs, `status` reports it, and it stays so for a while.
#[track_caller]
fn stays_stopped(container: &Container) {
    let output = container.run(&["aops", "control", "status", "--json"]);
    assert_eq!((output.code, &output.json()["state"]), (3, &"stopped".into()), "{output}");
    let back = try_for(QUIET, || Some(of_home(container)).filter(|left| !left.is_empty()));
    assert_eq!(back, None);
    for unit in ["aops-spm", "aops-spa"] {
        let state = container.run(&["systemctl", "is-active", unit]).stdout;
        assert!(["inactive\n", "failed\n"].contains(&&*state), "{unit}: {state}");
    }
}
