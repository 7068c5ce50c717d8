//! Upgrades of sub-agents on hosts in trouble: a failed release is rolled back although the home has no free space, no free inode, or is
//! read-only; and under systemd, even if roles die.

use std::time::Duration;

use serde_json::Value;

use crate::install::systemd::fleet_of_two;
use crate::support::container::Container;
use crate::support::host::{agent, pid};
use crate::support::inside::{self, Inside, Space, VERBATIM, done, mount_home, wait_for_agents};
use crate::support::package::Package;

/// Three attempts of six seconds each with growing delays, and the delays of a busy machine.
const ROLLED_BACK: Duration = Duration::from_secs(120);

/// Runs long enough for the fault to be set up, and then exits each time.
fn bad() -> Package {
    Package::script("native", "2.0.0", "sleep 6; exit 1", "probation = \"60s\"")
}

const WANTED: &str =
    "heartbeatInterval = \"1s\"\nagents.native.version = \"2.0.0\"\nagents.script.version = \"1.0.0\"\n";

fn is_on_probation(status: &Value) -> bool {
    agent(status, "native").is_some_and(|agent| agent["upgrade"]["phase"] == "probation" && agent["pid"].is_u64())
}

fn is_rolled_back(status: &Value) -> bool {
    agent(status, "native").is_some_and(|agent| {
        agent["version"] == "1.0.0" && agent["state"] == "running" && agent["skipped"][0]["version"] == "2.0.0"
    })
}

/// A host that has started the bad release, and the pid of the other sub-agent.
fn begun(container: &Container) -> (Inside<'_>, u32) {
    let gateway = Inside::start(container, fleet_of_two());
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let [_, other] = wait_for_agents(container, &["native", "script"])[..] else { panic!("there are two") };
    gateway.publish(|gateway| gateway.publish(&bad()));
    gateway.fleet(WANTED);
    inside::wait_for_status(container, "the probation", is_on_probation);
    (gateway, other)
}

/// The ways in which a home becomes unwritable, and the command that makes it writable again.
const FAULTS: [(&str, &str, &str); 3] = [
    ("no byte is left", "cat /dev/zero >/opt/aops/log/filler 2>/dev/null || true", "rm /opt/aops/log/filler"),
    (
        "no inode is left",
        "mkdir /opt/aops/log/fillers; cd /opt/aops/log/fillers; touch $(seq 1000) 2>/dev/null || true",
        "rm -r /opt/aops/log/fillers",
    ),
    (
        "it is read-only",
        "mount --bind /opt/aops /opt/aops && mount -o remount,bind,ro /opt/aops",
        // Processes started meanwhile have it as working directory, so it cannot be unmounted.
        "mount -o remount,bind,rw /opt/aops",
    ),
];

#[test]
fn a_failed_release_is_rolled_back_on_a_full_or_read_only_home() {
    for (trouble, begin, end) in FAULTS {
        let container = Container::bare();
        mount_home(&container, Space { inodes: 600, ..Space::SMALL });
        let (_gateway, other) = begun(&container);
        done(&container, begin);
        inside::wait_within(&container, ROLLED_BACK, &format!("the roll back where {trouble}"), is_rolled_back);
        // Nothing of it is on disk. Both roles are killed, and the release may be retried once, but it is never active.
        let status = inside::status(&container);
        done(&container, &format!("kill -9 {} {}", status["spm"]["pid"], status["spa"]["pid"]));
        done(&container, end);
        container.run(&["/opt/aops/control", "start"]).expect_code(0);
        inside::wait_within(&container, ROLLED_BACK, &format!("the roll back after {trouble}"), is_rolled_back);
        assert_eq!(wait_for_agents(&container, &["script"]), [other], "{trouble}");
    }
}

#[test]
fn on_a_read_only_home_sub_agents_and_roles_are_restarted() {
    let container = Container::bare();
    done(&container, "mkdir /opt/aops && mount -t tmpfs tmpfs /opt/aops");
    let _gateway = Inside::start(&container, fleet_of_two());
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let [first, other] = wait_for_agents(&container, &["native", "script"])[..] else { panic!("there are two") };
    let restarted = |before: u32, loses_output: bool| {
        done(&container, &format!("kill -9 {before}"));
        let status = inside::wait_for_status(&container, "the sub-agent to be restarted", |status| {
            agent(status, "native").is_some_and(|agent| agent["pid"].is_u64() && pid(&agent["pid"]) != Some(before))
        });
        let problems = status["problems"].to_string();
        assert_eq!(problems.contains("the output of native is lost"), loses_output, "{status:#}");
        pid(&agent(&status, "native").expect("it was waited for")["pid"]).expect("it was waited for")
    };
    done(&container, "mount --bind /opt/aops /opt/aops && mount -o remount,bind,ro /opt/aops");
    let second = restarted(first, true);
    let status = inside::status(&container);
    done(&container, &format!("kill -9 {} {}", status["spm"]["pid"], status["spa"]["pid"]));
    container.run(&["/opt/aops/control", "start"]).expect_code(0);
    // The record on disk names the process that was killed first.
    assert_eq!(wait_for_agents(&container, &["native", "script"]), [second, other]);
    let third = restarted(second, true);
    done(&container, "mount -o remount,bind,rw /opt/aops");
    let fourth = restarted(third, false);
    assert_eq!(wait_for_agents(&container, &["native", "script"]), [fourth, other]);
}

#[test]
fn under_systemd_a_failed_release_is_rolled_back_even_if_roles_die() {
    let container = Container::systemd();
    let (_gateway, other) = begun(&container);
    for blow in ["systemctl restart aops-spm", "systemctl kill -s KILL aops-spm aops-spa"] {
        let before = inside::status(&container)["spm"]["pid"].clone();
        done(&container, blow);
        inside::wait_for_status(&container, "another manager", |status| {
            status["spm"]["pid"].is_u64() && status["spm"]["pid"] != before
        });
    }
    inside::wait_within(&container, ROLLED_BACK, "the roll back", is_rolled_back);
    assert_eq!(wait_for_agents(&container, &["script"]), [other]);
}
