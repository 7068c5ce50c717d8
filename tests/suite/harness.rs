//! Tests of the test harness: containers behave as documented, and are removed without leftovers.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use crate::support::command::{LIMIT, describe, run};
use crate::support::container::Container;
use crate::support::files::difference;
use crate::support::host::SOON;
use crate::support::wait::{try_for, wait_for};

#[test]
fn a_systemd_container_runs_commands_as_services_of_a_real_systemd() {
    let container = Container::systemd();
    let init = container.run(&["cat", "/proc/1/comm"]).expect_success();
    assert_eq!(init, "systemd\n");
    let state = container.run(&["systemctl", "is-system-running"]);
    assert!(["running\n", "degraded\n"].contains(&state.stdout.as_str()), "{state}");
    let cgroup = container.shell("cat /proc/self/cgroup").expect_success();
    assert!(cgroup.contains("system.slice/run-"), "{cgroup}");
    let output = container.shell("echo \"$HOME $PWD $((1 + 1))\"; echo aside >&2; exit 7");
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (7, "/root /root 2\n", "aside\n"),
        "{output}"
    );
    assert_loopback_only(&container);
}

#[test]
fn a_bare_container_has_no_service_manager() {
    let container = Container::bare();
    assert!(!container.run(&["sh", "-c", "command -v systemctl"]).success());
    assert!(!container.path("/run/systemd/system").exists());
    assert_ne!(container.run(&["cat", "/proc/1/comm"]).expect_success(), "systemd\n");
    let output = container.shell("echo \"$HOME $PWD $((1 + 1))\"; echo aside >&2; exit 7");
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (7, "/root /root 2\n", "aside\n"),
        "{output}"
    );
    assert_loopback_only(&container);
    // Its init process reaps orphans.
    container.shell("setsid sh -c 'sleep 0.05 & exec true' </dev/null >/dev/null 2>&1 & wait").expect_success();
    wait_for("orphans to be reaped", SOON, || {
        container.run(&["pgrep", "-x", "sleep", "-r", "Z"]).stdout.is_empty().then_some(())
    });
}

#[test]
fn processes_outlive_their_command_until_a_reboot_and_files_survive_it() {
    for mut container in [Container::systemd(), Container::bare()] {
        container.shell("setsid sleep 1234 </dev/null >/dev/null 2>&1 & echo kept >/root/kept").expect_success();
        let running = |container: &Container| container.processes().iter().any(|(_, words)| words == "sleep 1234");
        wait_for("the command left running", SOON, || running(&container).then_some(()));
        container.reboot();
        assert!(!running(&container));
        assert_eq!(container.run(&["cat", "/root/kept"]).expect_success(), "kept\n");
        container.crash();
        assert_eq!(container.run(&["cat", "/root/kept"]).expect_success(), "kept\n");
    }
}

#[test]
fn a_spawned_command_runs_until_it_is_stopped() {
    for container in [Container::systemd(), Container::bare()] {
        let spawned = container.spawn(&["sh", "-c", "echo up; exec sleep 4321"]);
        assert_eq!(spawned.line(), "up");
        let running = || container.processes().iter().any(|(_, words)| words == "sleep 4321");
        wait_for("the command", SOON, || running().then_some(()));
        spawned.end();
        wait_for("the command's end", SOON, || (!running()).then_some(()));
    }
}

#[test]
fn every_change_of_a_file_is_detected() {
    let container = Container::bare();
    let before = container.files();
    assert!(before.len() > 1000);
    container.shell("touch /etc/passwd; chmod 644 /etc/passwd").expect_success();
    assert_eq!(difference(&before, &container.files()), Vec::<String>::new());
    container
        .shell(
            "mkdir -p /opt/new/below; ln -s there /opt/link; rm /etc/issue; echo more >>/etc/profile; chmod 600 /etc/bash.bashrc
            chown 1 /etc/debian_version; rm -r /usr/share/base-files; mkdir /usr/share/base-files; touch /tmp/not-seen /run/not-seen",
        )
        .expect_success();
    let after = container.files();
    let changed = difference(&before, &after);
    let paths: Vec<_> = changed.iter().map(|line| line.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    for expected in [
        "+ /opt/new",
        "+ /opt/new/below",
        "+ /opt/link",
        "- /etc/issue",
        "~ /etc/profile",
        "~ /etc/bash.bashrc",
        "~ /etc/debian_version",
    ] {
        assert!(paths.iter().any(|path| path == expected), "{expected}: {changed:?}");
    }
    assert!(paths.iter().any(|path| path.starts_with("- /usr/share/base-files/")), "{changed:?}");
    assert!(!paths.iter().any(|path| path.contains("not-seen")), "{changed:?}");
}

#[test]
fn nothing_of_a_container_outlives_its_owner_even_if_the_owner_is_killed() {
    // An owner that is killed: a shell that starts a keeper as the harness does, and waits.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/container.sh");
    let rootfs = std::env::var("AOPS_TEST_ROOTFS").expect("run `cargo xtask test`");
    let mut owner = Command::new("bash")
        .args(["-c", r#"exec unshare --mount --propagation private -- bash "$1" bare "aops-test-$$-killed" "$2""#])
        .args(["owner", script, &rootfs])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cannot run bash");
    let name = format!("aops-test-{}-killed", owner.id());
    let described = describe(&Command::new(&name));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(owner.stdout.take().expect("it is piped")), &mut line)
        .expect("a pipe can be read");
    assert!(line.starts_with("ready "), "{described}: {line}");
    owner.kill().expect("it is our child");
    owner.wait().expect("it is our child");
    let alive = || {
        let processes = fs::read_dir("/proc").expect("/proc can be read").flatten();
        processes
            .filter_map(|process| fs::read_to_string(process.path().join("cgroup")).ok())
            .any(|all| all.contains(&name))
    };
    assert!(try_for(SOON, || (!alive()).then_some(())).is_some(), "processes of {name} are left");
    drop(Container::bare());
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts can be read");
    let trees = mounts.lines().filter_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        fields[2].starts_with("cgroup").then(|| fields[1].to_owned())
    });
    for tree in trees {
        assert!(!std::path::Path::new(&tree).join(&name).exists(), "a cgroup of {name} is left in {tree}");
    }
}

#[test]
fn every_scenario_that_is_listed_for_windows_exists() {
    let listed = include_str!("windows.txt").lines().filter(|line| !line.starts_with('#'));
    let listed: BTreeSet<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    let own = std::env::current_exe().expect("this program has a file");
    let output = run(Command::new(own).arg("--list"), LIMIT).expect_success();
    let all: BTreeSet<&str> = output.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    assert_eq!(listed.difference(&all).collect::<Vec<_>>(), Vec::<&&str>::new());
    // Those of `cargo xtask test-windows --kill-steps` have hosts of another kind.
    let is_to_list = |name: &&&str| name.starts_with("on_windows::") && !name.starts_with("on_windows::steps::");
    let own = all.iter().filter(is_to_list);
    assert!(own.into_iter().all(|name| listed.contains(name)), "a scenario of on_windows is not listed");
}

#[track_caller]
fn assert_loopback_only(container: &Container) {
    let links = container.run(&["ip", "-brief", "address"]).expect_success();
    assert_eq!(links.lines().count(), 1, "{links}");
    assert!(links.starts_with("lo") && links.contains("127.0.0.1/8"), "{links}");
}
