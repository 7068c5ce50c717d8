//! Installing and uninstalling on a host with systemd, by the command that the old platform prints.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::container::Container;
use crate::support::files::difference;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, pid};
use crate::support::inside::{
    self, BOOTSTRAP, DIRECTORY, Inside, PROGRAM, URL, VERBATIM, done, processes_of_aops, wait_for_agents,
};
use crate::support::package::{Package, bootstrap};
use crate::support::wait::wait_for;

/// A gateway directory: the manager's package and two sub-agents, one of each kind.
pub(crate) fn fleet_of_two() -> Gateway {
    let gateway = Gateway::stopped();
    gateway.publish_self("c57f6a1d");
    gateway.publish(&Package::sleeper("native", "1.0.0"));
    gateway.publish(&Package::control_sleeper("script", "1.0.0"));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"1.0.0\"\nagents.script.version = \"1.0.0\"\n");
    gateway
}

/// Both roles run, and the state is as desired.
pub(crate) fn runs(status: &Value) -> bool {
    status["state"] == "running" && pid(&status["spm"]["pid"]).is_some() && pid(&status["spa"]["pid"]).is_some()
}

/// One for each of the two roles, and one that holds the sub-agents.
const UNITS_OF_A_HOME: usize = 3;

/// Our units that are loaded, on disk, or have a cgroup.
fn units(container: &Container) -> Vec<String> {
    let list = "systemctl list-units --all --plain --no-legend 'aops*'; systemctl list-unit-files --no-legend 'aops*'; \
        find /sys/fs/cgroup /run/systemd /etc/systemd -name '*aops*'";
    done(container, list).stdout.lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_active_and_enabled(container: &Container, unit: &str, main_pid: &Value) {
    let shown = done(container, &format!("systemctl show -P ActiveState -P UnitFileState -P MainPID {unit}")).stdout;
    let words: BTreeSet<&str> = shown.split_whitespace().collect();
    let main_pid = main_pid.to_string();
    assert_eq!(words, BTreeSet::from(["active", "enabled", &main_pid]), "{unit}");
}

#[test]
fn the_platforms_command_installs_and_uninstalling_leaves_nothing() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    let before = container.files();

    let uninstalls = [
        "aops control uninstall --yes".to_owned(),
        "/opt/aops/control uninstall --yes".to_owned(),
        format!("{BOOTSTRAP} --control uninstall --agentId 5402204854438"),
    ];
    for uninstall in uninstalls {
        let output = container.run(&["sh", "-c", VERBATIM]).expect_code(0);
        assert!(output.stderr.contains("this is the first contact"), "what is trusted is said: {output}");

        let output = container.run(&["aops", "control", "status", "--json"]);
        let status = output.json();
        assert!(output.success() && runs(&status), "{output}");
        assert_eq!((&status["version"], &status["home"]), (&"c57f6a1d".into(), &"/opt/aops".into()));
        assert_active_and_enabled(&container, "aops-spm", &status["spm"]["pid"]);
        assert_active_and_enabled(&container, "aops-spa", &status["spa"]["pid"]);
        assert_eq!(done(&container, "readlink /usr/local/bin/aops").stdout, "/opt/aops/bin/aops\n");
        wait_for_agents(&container, &["native", "script"]);

        container.run(&["sh", "-c", &uninstall]).expect_code(0);
        assert_eq!(processes_of_aops(&container), [], "after `{uninstall}`");
        assert_eq!(units(&container), Vec::<String>::new(), "after `{uninstall}`");
        let changed = difference(&before, &container.files());
        assert_eq!(changed, [format!("+ {BOOTSTRAP}")], "after `{uninstall}`");
        let again = container.run(&[PROGRAM, "control", "uninstall", "--yes"]).expect_code(4);
        assert!(again.stderr.contains("nothing is installed in /opt/aops"), "{again}");
    }
}

#[test]
fn reinstalling_keeps_the_sub_agents_and_shows_a_newer_version() {
    let container = Container::systemd();
    let gateway = Inside::start(&container, fleet_of_two());
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let agents = wait_for_agents(&container, &["native", "script"]);
    let first = inside::status(&container);

    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let second = inside::wait_for_status(&container, "both roles", runs);
    assert_ne!(second["spm"]["pid"], first["spm"]["pid"], "the roles are renewed");
    assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);

    gateway.publish(|gateway| gateway.publish_self("d68a7b2e"));
    let newer = format!("{BOOTSTRAP} --control install --version d68a7b2e --agentId 5402204854438 --endpoint {URL}");
    wait_for("the gateway to offer the newer version", SOON, || {
        container.run(&["sh", "-c", &newer]).success().then_some(())
    });
    let third = inside::wait_for_status(&container, "both roles and the newer version", |status| {
        runs(status) && status["version"] == "d68a7b2e"
    });
    assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);
    assert_active_and_enabled(&container, "aops-spm", &third["spm"]["pid"]);
    assert_active_and_enabled(&container, "aops-spa", &third["spa"]["pid"]);
    wait_for("the newer version to be reported to the gateway", SOON, || {
        (gateway.status()["hosts"][0]["manager"]["version"] == "d68a7b2e").then_some(())
    });

    // From systemd to none and back: nothing runs twice.
    container.run(&["sh", "-c", &format!("{newer} --service none")]).expect_code(0);
    assert_eq!(
        units(&container).into_iter().filter(|unit| !unit.contains("/aops-agents")).collect::<Vec<_>>(),
        Vec::<String>::new()
    );
    inside::wait_for_status(&container, "both roles", runs);
    wait_for_agents(&container, &["native", "script"]);
    container.run(&["sh", "-c", &newer]).expect_code(0);
    let last = inside::wait_for_status(&container, "both roles", runs);
    assert_active_and_enabled(&container, "aops-spm", &last["spm"]["pid"]);
    assert_active_and_enabled(&container, "aops-spa", &last["spa"]["pid"]);
    let named =
        |name: &str| processes_of_aops(&container).into_iter().filter(|(_, words)| words.contains(name)).count();
    assert_eq!((named("bin/aops-spm"), named("bin/aops-spa")), (1, 1));
}

#[test]
fn uninstalling_works_with_dead_roles_and_manually_removed_units() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    let before = container.files();
    let breakages = [
        // Masked units are not restarted.
        "systemctl mask --runtime aops-spm aops-spa; systemctl kill -s KILL aops-spm aops-spa",
        "rm /etc/systemd/system/aops-spm.service; systemctl daemon-reload",
        "rm /etc/systemd/system/aops-sp?.service /etc/systemd/system/*.wants/aops-*; systemctl daemon-reload",
        "systemctl stop aops-spm aops-spa",
        "rm -r /opt/aops/run",
    ];
    for breakage in breakages {
        container.run(&["sh", "-c", VERBATIM]).expect_code(0);
        wait_for_agents(&container, &["native", "script"]);
        done(&container, breakage);
        container.run(&["aops", "control", "uninstall", "--yes"]).expect_code(0);
        done(&container, "systemctl unmask --runtime aops-spm aops-spa");
        assert_eq!(processes_of_aops(&container), [], "after `{breakage}`");
        assert_eq!(units(&container), Vec::<String>::new(), "after `{breakage}`");
        assert_eq!(difference(&before, &container.files()), [format!("+ {BOOTSTRAP}")], "after `{breakage}`");
    }
}

#[test]
fn two_homes_have_separate_units_and_are_independent() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    let before = container.files();
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let first = wait_for_agents(&container, &["native", "script"]);

    let install =
        [BOOTSTRAP, "install", "--agent-id", "77", "--endpoint", URL, "--ca-cert", "/tmp/gateway/tls/cert.pem"];
    let refused = container.run(&[&install[..], &["--home", "/srv/a \"home\""]].concat()).expect_code(1);
    assert!(refused.stderr.contains("nothing was changed") && refused.stderr.contains("another --home"), "{refused}");
    let other = "/srv/another home/100% $HOME";
    container.run(&[&install[..], &["--home", other]].concat()).expect_code(0);
    let status = || container.run(&[&format!("{other}/control"), "status", "--json"]).json();
    let theirs = wait_for("the other home's sub-agents", SOON, || {
        let status = status();
        let agents = status["agents"].as_array()?;
        let running = agents.len() == 2 && agents.iter().all(|agent| agent["state"] == "running");
        (running && runs(&status)).then_some(status)
    });
    assert_eq!(theirs["home"], other);
    assert_eq!(wait_for_agents(&container, &["native", "script"]), first);
    // The rejected installation has left nothing.
    let files = done(&container, "systemctl list-unit-files --no-legend 'aops*' | cut -d' ' -f1; ls /srv").stdout;
    let files = files.strip_suffix("another home\n").expect("one home");
    assert_eq!(files.lines().count(), 2 * UNITS_OF_A_HOME, "{files}");
    assert_eq!(done(&container, "readlink /usr/local/bin/aops").stdout, "/opt/aops/bin/aops\n");

    container.run(&["aops", "control", "uninstall", "--yes"]).expect_code(0);
    let now = status();
    assert_eq!(now["spm"]["pid"], theirs["spm"]["pid"]);
    // Everything except values that change with time.
    let lasting = |status: &Value| {
        let mut agents = status["agents"].clone();
        for agent in agents.as_array_mut().into_iter().flatten() {
            (agent["uptimeSeconds"], agent["memoryBytes"]) = (Value::Null, Value::Null);
        }
        agents
    };
    assert_eq!(lasting(&now), lasting(&theirs));
    container.run(&[&format!("{other}/control"), "uninstall", "--yes"]).expect_code(0);
    assert_eq!(processes_of_aops(&container), []);
    assert_eq!(units(&container), Vec::<String>::new());
    assert_eq!(difference(&before, &container.files()), [format!("+ {BOOTSTRAP}")]);
}

#[test]
fn hci_and_scp_are_not_registered_with_a_service_manager() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    let before = container.files();
    done(&container, &format!("cp {DIRECTORY}/depot/{} {BOOTSTRAP}", bootstrap()));
    let install = format!("{BOOTSTRAP} --control install --agentId 1 --endpoint {URL}");
    for product in [format!("{install} --product hci"), format!("AOPS_PRODUCT=scp {install}")] {
        // Given once, the product is remembered when the platform's command is repeated.
        for command in [&product, &install] {
            let output = container.run(&["sh", "-c", command]).expect_code(0);
            assert!(output.stderr.contains("/opt/aops/control start"), "who starts it at boot is said: {output}");
        }
        inside::wait_for_status(&container, "both roles", runs);
        wait_for_agents(&container, &["native", "script"]);
        let files = done(
            &container,
            "systemctl list-unit-files --no-legend 'aops*'; systemctl list-units --all --plain --no-legend 'aops*'",
        );
        assert_eq!(files.stdout, "");
        container.run(&["/opt/aops/control", "uninstall", "--yes"]).expect_code(0);
        assert_eq!(processes_of_aops(&container), []);
        assert_eq!(difference(&before, &container.files()), [format!("+ {BOOTSTRAP}")]);
    }
    let output = container.run(&["sh", "-c", &format!("{install} --product other")]).expect_code(2);
    assert!(output.stderr.contains("generic, hci, scp"), "{output}");
}

#[test]
fn the_link_to_the_command_is_optional() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    let read_only = "mount --bind /usr/local /usr/local && mount -o remount,bind,ro /usr/local";
    done(&container, read_only);
    let output = container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    for words in ["warning", "/usr/local/bin/aops", "use /opt/aops/control"] {
        assert!(output.stderr.contains(words), "{output}");
    }
    wait_for_agents(&container, &["native", "script"]);
    container.run(&["/opt/aops/control", "uninstall", "--yes"]).expect_code(0);

    done(&container, "umount /usr/local");
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    done(&container, read_only);
    // A correct link is not written again.
    let output = container.run(&["/opt/aops/bin/aops", "install"]).expect_code(0);
    assert!(!output.stderr.contains("/usr/local/bin/aops"), "{output}");
    let output = container.run(&["/opt/aops/control", "uninstall", "--yes"]).expect_code(1);
    assert!(output.stderr.contains("the dangling link /usr/local/bin/aops"), "{output}");
    assert_eq!(processes_of_aops(&container), []);
    assert_eq!(units(&container), Vec::<String>::new());
    assert!(!container.path("/opt/aops").exists());
}

#[test]
fn impossible_installations_fail_before_anything_is_stopped() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    // An old installation in the lower layer of an overlay, whose directories cannot be moved.
    let control = "#!/bin/sh\ncd /srv/old\ncase $1 in start) setsid bin/old-agent 1000003 >/dev/null 2>&1 & echo $! >var/pid ;; stop) kill $(cat var/pid) ;; esac\n";
    container.write("/srv/lower/control", control, 0o755);
    container.write("/srv/lower/agentId", "77\n", 0o644);
    container.write("/srv/lower/etc/conf.yml", format!("heartbeatSrv: {URL}\n"), 0o644);
    container.write("/srv/lower/var/keep", "", 0o644);
    done(
        &container,
        "mkdir -p /srv/lower/bin /srv/upper /srv/old; cp /bin/sleep /srv/lower/bin/old-agent; mount -t tmpfs tmpfs /srv/upper
        mkdir /srv/upper/files /srv/upper/work
        mount -t overlay -o redirect_dir=off,lowerdir=/srv/lower,upperdir=/srv/upper/files,workdir=/srv/upper/work overlay /srv/old
        /srv/old/control start",
    );
    let old = || -> Vec<u32> {
        let mut found = container.processes();
        found.retain(|(_, words)| words.contains("old-agent 1000003"));
        found.into_iter().map(|(pid, _)| pid).collect()
    };
    let before = wait_for("the old agent", SOON, || Some(old()).filter(|found| found.len() == 1));
    let install = [PROGRAM, "install", "--home", "/srv/old", "--ca-cert", "/tmp/gateway/tls/cert.pem"];
    let key = done(&container, "ls /tmp/gateway/keys/*.pub").stdout;
    let install = [&install[..], &["--trusted-key", key.trim()]].concat();
    let refused = |words: &[&str]| {
        let output = container.run(&install).expect_code(1);
        for words in [words, &["nothing was changed"]].concat() {
            assert!(output.stderr.contains(words), "{words}: {output}");
        }
        assert_eq!(old(), before, "it runs as before");
    };
    refused(&["cannot set /srv/old/", "lower layer of an overlay", "cp -a"]);
    done(&container, "cd /srv/old; for d in bin etc var; do cp -a $d $d.new; rm -r $d; mv $d.new $d; done");
    // The copy of its program is a different file from the running one; its own script stops it.
    let closed = "mount --bind /etc/systemd/system /etc/systemd/system && mount -o remount,bind,ro /etc/systemd/system";
    done(&container, closed);
    refused(&["cannot register with systemd", "/etc/systemd/system is not writable", "--service none"]);
    done(&container, "umount /etc/systemd/system");
    container.run(&install).expect_code(0);
    assert_eq!(old(), Vec::<u32>::new());

    // Nor is it removed while its units cannot be.
    let control = "/srv/old/control";
    let roles = || {
        let status = container.run(&[control, "status", "--json"]).json();
        (pid(&status["spm"]["pid"]), pid(&status["spa"]["pid"]))
    };
    let running = roles();
    done(&container, closed);
    let output = container.run(&[control, "uninstall", "--yes"]).expect_code(1);
    assert!(output.stderr.contains("cannot remove the units: /etc/systemd/system is not writable"), "{output}");
    assert_eq!(roles(), running);
    done(&container, "umount /etc/systemd/system");
    container.run(&[control, "uninstall", "--yes"]).expect_code(0);
    assert_eq!(processes_of_aops(&container), []);
}

#[test]
fn programs_started_by_a_deployment_agent_outlive_a_unit_stop_and_an_uninstall() {
    let container = Container::systemd();
    let gateway = Gateway::stopped();
    gateway.publish_self("c57f6a1d");
    let script = "env -i setsid sleep 1000001 & while :; do sleep 1; done";
    gateway.publish(&Package::script("deploy", "1.0", script, "killMode = \"process\""));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.deploy.version = \"1.0\"\n");
    let _gateway = Inside::start(&container, gateway);
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let others = |count: usize| {
        wait_for("the programs of others", SOON, || {
            let mut found = container.processes();
            found.retain(|(_, command)| command == "sleep 1000001");
            (found.len() == count).then_some(found)
        })
    };
    let first = wait_for_agents(&container, &["deploy"]);
    let customers = others(1);

    done(&container, "systemctl stop aops-spm");
    assert!(!container.path(format!("/proc/{}", first[0])).exists());
    assert_eq!(others(1), customers);

    done(&container, "systemctl start aops-spm");
    assert_ne!(wait_for_agents(&container, &["deploy"]), first);
    let customers = others(2);
    container.run(&["aops", "control", "uninstall", "--yes"]).expect_code(0);
    assert_eq!(processes_of_aops(&container), []);
    assert_eq!(others(2), customers);
}
