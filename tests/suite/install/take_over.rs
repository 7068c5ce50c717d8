//! An installation of the replaced system is taken over: identity and settings are kept, its processes and units go, its sub-agents are
//! installed again. If the new manager cannot run, the old one runs as before.
//!
//! The old installation is a dummy with the layout and the processes of the real one: a manager that systemd restarts, a watchdog in a unit of
//! its own, sub-agents with a `control` script, an agent id, settings in YAML, and a `control` script for people.

use std::collections::BTreeMap;

use crate::support::container::Container;
use crate::support::gateway::Gateway;
use crate::support::host::SOON;
use crate::support::inside::{DIRECTORY, Inside, PROGRAM, URL, done, wait_for_agents};
use crate::support::package::Package;
use crate::support::wait::wait_for;

const HOME: &str = "/opt/aops";
const MANAGER_UNIT: &str = "/etc/systemd/system/aops-spm.service";
/// A link to a file in the home, as `systemctl enable` makes of a path.
const WATCHDOG_UNIT: &str = "/etc/systemd/system/aops-agent-watch.service";
/// An operator's, which only mentions the home.
const BACK_UP_UNIT: &str = "/etc/systemd/system/backup.service";
/// It would have our manager's unit run as somebody else.
const DROP_IN: &str = "/etc/systemd/system/aops-spm.service.d/user.conf";

/// What is left with `aops` in its name: the units of a home, enabled.
const OURS: &str = "/etc/systemd/system/aops-agents.service\n/etc/systemd/system/aops-spa.service\n\
    /etc/systemd/system/aops-spm.service\n/etc/systemd/system/multi-user.target.wants/aops-spa.service\n\
    /etc/systemd/system/multi-user.target.wants/aops-spm.service\nenabled\n";

/// As a library for services in Go writes it.
fn unit(program: &str, script: &str) -> String {
    format!(
        "[Unit]\nDescription={program}\nConditionFileIsExecutable={HOME}/bin/{program}\n\n[Service]\nStartLimitInterval=5\nStartLimitBurst=10\n\
         ExecStart={HOME}/bin/{program} {HOME}/lib/{script}\nRestart=always\nRestartSec=1\nKillMode=process\n\n[Install]\nWantedBy=multi-user.target\n"
    )
}

/// Waits without a child process.
const FOREVER: &str = "exec 3<>$home/var/$name.fifo; read -r -u 3 _";

/// Lays the installation out and starts it by its units.
fn old_installation(container: &Container) {
    let script = |name: &str, work: &str| {
        format!(
            "home={HOME}; name={name}; mkdir -p $home/var; [ -p $home/var/$name.fifo ] || mkfifo $home/var/$name.fifo\n\
             echo $$ >$home/var/$name.pid; {work}\n{FOREVER}\n"
        )
    };
    let start_all = "for agent in $home/agents/*; do $agent/control start; done";
    container.write(format!("{HOME}/lib/spm.sh"), script("spm", start_all), 0o644);
    container.write(format!("{HOME}/lib/spa.sh"), script("spa", ":"), 0o644);
    container.write(format!("{HOME}/agentId"), "5402204854438\n", 0o644);
    let settings = format!(
        "heartbeatSrv: {URL}\nheartbeatInterval: 7\nspmMaxMem: 80\ncpuLimit: 3\nlogLevel: info\ndownloadSrv: {URL}/api/download\n"
    );
    container.write(format!("{HOME}/etc/conf.yml"), settings, 0o644);
    let control = format!(
        "#!/bin/bash\ncd {HOME}\ncase $1 in\nstart) systemctl start aops-spm aops-agent-watch ;;\n\
         stop) kill $(cat var/spa.pid) $(cat var/spm.pid); for agent in agents/*; do $agent/control stop; done ;;\n\
         status) kill -0 $(cat var/spm.pid) && echo running ;;\nesac\n"
    );
    container.write(format!("{HOME}/control"), control, 0o755);
    for agent in ["monitor", "deploy"] {
        let control = format!(
            "#!/bin/bash\ncd \"$(dirname \"$0\")\"\ncase $1 in\n\
             start) kill -0 $(cat pid 2>/dev/null) 2>/dev/null || {{ setsid bin/{agent} 1000003 >/dev/null 2>&1 & echo $! >pid; }} ;;\n\
             stop) kill $(cat pid) ;;\nstatus) kill -0 $(cat pid) ;;\nesac\n"
        );
        container.write(format!("{HOME}/agents/{agent}/control"), control, 0o755);
        container.write(format!("{HOME}/agents/{agent}/version"), "3.1\n", 0o644);
    }
    done(
        container,
        &format!(
            "cd {HOME}; mkdir -p bin log var agents/monitor/bin agents/deploy/bin; cp /bin/bash bin/aops-spm; cp /bin/bash bin/aops-spa
            for agent in monitor deploy; do cp /bin/sleep agents/$agent/bin/$agent; done"
        ),
    );
    container.write(MANAGER_UNIT, unit("aops-spm", "spm.sh"), 0o600);
    container.write(DROP_IN, "[Service]\nGroup=games\n", 0o644);
    container.write(format!("{HOME}/lib/aops-agent-watch.service"), unit("aops-spa", "spa.sh"), 0o644);
    let back_up =
        format!("[Service]\nExecStart=/bin/cp -r {HOME}/etc /var/tmp\n[Install]\nWantedBy=multi-user.target\n");
    container.write(BACK_UP_UNIT, back_up, 0o644);
    done(
        container,
        &format!(
            "systemctl daemon-reload; systemctl enable --now aops-spm {HOME}/lib/aops-agent-watch.service; systemctl enable backup"
        ),
    );
    runs_as_before(container);
}

/// Its processes, by their programs.
fn old_processes(container: &Container) -> BTreeMap<String, u32> {
    let is_old = |words: &String| words.contains("/lib/sp") || words.ends_with(" 1000003");
    let processes = container.processes().into_iter().filter(|(_, words)| is_old(words));
    processes.map(|(pid, words)| (words, pid)).collect()
}

/// Each of its programs runs, in units that start at boot.
#[track_caller]
fn runs_as_before(container: &Container) -> BTreeMap<String, u32> {
    let found = wait_for("the old installation", SOON, || {
        Some(old_processes(container)).filter(|processes| processes.len() == 4)
    });
    let shown = "systemctl is-active aops-spm aops-agent-watch; systemctl is-enabled aops-spm aops-agent-watch";
    assert_eq!(done(container, shown).stdout, "active\nactive\nenabled\nenabled\n");
    assert_eq!(done(container, &format!("{HOME}/control status")).stdout, "running\n");
    found
}

/// The manager's release that prints its version and does nothing else.
fn broken_manager() -> Package {
    let script = "#!/bin/sh\ncase \"$1\" in --version) echo broken ;; *) exit 3 ;; esac\n";
    Package::control("aops-spm", "broken", "exit 0").with_file("bin/aops", script, 0o755)
}

#[test]
fn an_old_installation_under_systemd_is_taken_over_or_runs_as_before() {
    let mut container = Container::systemd();
    let outside = Gateway::stopped();
    outside.publish(&broken_manager());
    outside.publish_self("1.0.0");
    for agent in ["monitor", "deploy"] {
        outside.publish(&Package::control_sleeper(agent, "3.2"));
    }
    outside.fleet("heartbeatInterval = \"1s\"\nagents.monitor.version = \"3.2\"\nagents.deploy.version = \"3.2\"\n");
    {
        let _gateway = Inside::start(&container, outside);
        old_installation(&container);
        let key = done(&container, &format!("ls {DIRECTORY}/keys/*.pub")).stdout;
        let certificate = format!("{DIRECTORY}/tls/cert.pem");
        let install = |version: &str| {
            let words =
                [PROGRAM, "install", "--version", version, "--trusted-key", key.trim(), "--ca-cert", &certificate];
            container.run(&words)
        };
        let state = || {
            let list = format!(
                "cd {HOME}; find . -not -path './var*' -not -name pid -not -path './run*' | sort; cat {MANAGER_UNIT} {WATCHDOG_UNIT} {DROP_IN}; \
                 find /etc/systemd/system -name '*aops*' -printf '%p %m %l\\n' | sort"
            );
            done(&container, &list).stdout
        };
        let before = state();
        install("broken").expect_code(1);
        runs_as_before(&container);
        assert_eq!(state(), before);
        // It is still restarted, and it still starts at boot.
        let processes = old_processes(&container);
        let (manager, pid) = processes.iter().find(|(words, _)| words.ends_with("spm.sh")).expect("it runs");
        done(&container, "systemctl kill --kill-who=main --signal=KILL aops-spm");
        wait_for("its restart", SOON, || old_processes(&container).get(manager).filter(|new| *new != pid).copied());

        // An installer that is killed leaves it stopped. The next one starts it, although it then fails before it stops anything.
        let kill = format!(
            "cd {HOME}; cp control /tmp/control; sed -i 's/^stop)/stop) kill -KILL $PPID; exit ;;\\nnever)/' control"
        );
        done(&container, &kill);
        assert!(!install("1.0.0").success());
        assert!(!old_processes(&container).keys().any(|words| words.contains("/lib/sp")));
        done(&container, &format!("cp /tmp/control {HOME}/control"));
        let refused = install("7.0.0").expect_code(1);
        assert!(
            refused.stderr.contains("starting the old installation") && refused.stderr.contains("nothing was changed"),
            "{refused}"
        );
        runs_as_before(&container);

        let output = install("1.0.0");
        assert!(output.text().contains("cpuLimit"), "{output}");
        output.expect_success();
        assert_eq!(old_processes(&container), BTreeMap::new());
        let units =
            done(&container, "find /etc/systemd/system -name '*aops*' | sort; systemctl is-enabled backup").stdout;
        assert_eq!(units, OURS, "the others are gone, with drop-ins and links; the operator's stays");
        assert!(done(&container, &format!("cat {MANAGER_UNIT}")).stdout.starts_with("# Written by `aops install`"));
        let shown =
            "systemctl is-active aops-spm aops-spa; systemctl is-enabled aops-spm aops-spa; cat /opt/aops/etc/agent-id";
        assert_eq!(done(&container, shown).stdout, "active\nactive\nenabled\nenabled\n5402204854438\n");
        let config = done(&container, "cat /opt/aops/etc/conf.toml").stdout;
        for line in ["heartbeatInterval = \"7s\"", "spmMaxMem = \"80MiB\""] {
            assert!(config.lines().any(|found| found == line), "{line}\n{config}");
        }
        for gone in ["agentId", "etc/conf.yml", "lib", "var", ".install"] {
            assert!(!container.path(format!("{HOME}/{gone}")).exists(), "{gone}");
        }
        wait_for_agents(&container, &["monitor", "deploy"]);
        let log = done(&container, "systemctl list-units --all --plain --no-legend 'aops-agent-watch*'").stdout;
        assert_eq!(log, "");
    }
    container.reboot();
    wait_for_agents(&container, &["monitor", "deploy"]);
    let shown =
        "systemctl is-active aops-spm aops-spa; systemctl list-units --all --plain --no-legend 'aops-agent-watch*'";
    assert_eq!(done(&container, shown).stdout, "active\nactive\n");
}
