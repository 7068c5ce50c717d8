//! Roles keep nothing of their launcher: without a service manager they outlive the unit, tool or role that started them.

use std::time::Duration;

use crate::install::systemd::{fleet_of_two, runs};
use crate::support::container::Container;
use crate::support::inside::{self, BOOTSTRAP, DIRECTORY, Inside, URL, done, processes_of_aops, wait_for_agents};
use crate::support::package::bootstrap;
use crate::support::wait::wait_for;

/// The deadline for a role to be restarted by the other.
const BACK: Duration = Duration::from_secs(60);
/// Our sub-agents.
const NAMES: &[&str] = &["native", "script"];

/// The pids of both roles, once everything runs.
fn roles(container: &Container) -> [String; 2] {
    let status = inside::wait_for_status(container, "both roles", runs);
    wait_for_agents(container, NAMES);
    ["spm", "spa"].map(|role| status[role]["pid"].to_string())
}

/// In no unit, and without the caller's attributes.
#[track_caller]
fn assert_left(container: &Container, roles: &[String; 2]) {
    for pid in roles {
        let groups = done(container, &format!("cat /proc/{pid}/cgroup")).stdout;
        assert!(!groups.contains(".service") && !groups.contains(".scope"), "{groups}");
        let environment = done(container, &format!("tr '\\0' '\\n' </proc/{pid}/environ")).stdout;
        assert!(!environment.contains("SECRET") && environment.contains("https_proxy="), "{environment}");
        let of = |look: &str| done(container, &look.replace("PID", pid)).stdout;
        let ignored = of("sed -n 's/^SigIgn:\\s*//p' /proc/PID/status");
        let ignored = u64::from_str_radix(ignored.trim(), 16).expect("a mask of signals");
        assert_eq!(ignored & (1 << 14 | 1 << 2 | 1), 0, "TERM, QUIT and HUP: {ignored:x}");
        assert_eq!(of("cat /proc/PID/oom_score_adj; cut -d' ' -f19 /proc/PID/stat"), "0\n0\n");
        assert_eq!(of("sed -n 's/^Umask:\\s*//p' /proc/PID/status"), "0022\n");
        for shared in ["grep Cpus_allowed_list /proc/PID/status", "grep 'Max processes' /proc/PID/limits"] {
            assert_eq!(of(shared), of(&shared.replace("PID", "1")), "as of the first process");
        }
    }
}

#[test]
fn roles_outlive_the_unit_or_program_that_started_them() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    done(&container, &format!("cp {DIRECTORY}/depot/{} {BOOTSTRAP}", bootstrap()));
    let install = format!("{BOOTSTRAP} --control install --agentId 1 --endpoint {URL} --product hci");
    let with = "systemd-run --quiet -E SECRET=1 -E https_proxy= -p MemoryMax=1G -p Nice=10 -p OOMScoreAdjust=700 -p UMask=0077 \
                -p CPUAffinity=0 -p LimitNPROC=999:infinity";

    // The unit of a timer, which ends with its main process.
    done(&container, &format!("{with} --wait {install}"));
    let first = roles(&container);
    assert_left(&container, &first);
    // The product's script, after the unit that ran it has ended.
    done(&container, "/opt/aops/control stop");
    done(&container, &format!("{with} --wait /opt/aops/control start"));
    let started = roles(&container);
    assert_left(&container, &started);
    assert_ne!(started, first);

    // A tool that keeps running, and is restarted later.
    done(&container, "/opt/aops/control stop");
    done(&container, &format!("{with} --unit tool sh -c 'nohup /opt/aops/control start; exec sleep 1000002'"));
    let by_tool = roles(&container);
    assert_left(&container, &by_tool);
    let agents = wait_for_agents(&container, NAMES);
    done(&container, "systemctl stop tool");
    assert_eq!(roles(&container), by_tool);
    assert_eq!(wait_for_agents(&container, NAMES), agents);

    // One role starts the other.
    for (at, role) in ["spm", "spa"].into_iter().enumerate() {
        let before = roles(&container);
        done(&container, &format!("kill -KILL {}", before[at]));
        let after = wait_for(&format!("{role} to be restarted"), BACK, || {
            let status = inside::status(&container);
            runs(&status).then(|| roles(&container)).filter(|now| now[at] != before[at])
        });
        assert_left(&container, &after);
        assert_eq!(wait_for_agents(&container, NAMES), agents);
    }

    done(&container, "/opt/aops/control uninstall --yes");
    assert_eq!(processes_of_aops(&container), []);
    assert_eq!(done(&container, "find /sys/fs/cgroup -name '*aops*'").stdout, "");
}
