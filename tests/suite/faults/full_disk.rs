//! Full and read-only disks: what cannot be written is reported, running sub-agents continue, and dead ones are restarted.

use crate::install::refusals::{LIVING, assert_refused, event};
use crate::install::systemd::{fleet_of_two, runs};
use crate::support::container::Container;
use crate::support::files::{difference, snapshot};
use crate::support::host::{SOON, agent, pid};
use crate::support::inside::{self, BOOTSTRAP, Inside, Space, URL, VERBATIM, done, mount_home, wait_for_agents};
use crate::support::package::Package;
use crate::support::wait::wait_for;

#[test]
fn a_full_disk_is_reported_and_running_sub_agents_continue() {
    let container = Container::bare();
    let gateway = Inside::start(&container, fleet_of_two());
    done(&container, "mkdir /opt/aops && mount -t tmpfs -o size=4m tmpfs /opt/aops");
    let output = container.run(&["sh", "-c", VERBATIM]);
    assert_refused(&output, 1, &["not enough disk space in /opt/aops", "free"]);
    assert_eq!(done(&container, "ls -A /opt/aops").stdout, "");
    // Enough space for the package and its tree, but not for a second one; then none at all.
    done(&container, "umount /opt/aops && rmdir /opt/aops");
    mount_home(&container, Space::SMALL);
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    wait_for_agents(&container, &["native", "script"]);
    let before = inside::wait_for_status(&container, "both roles", runs);
    done(&container, "cat /dev/zero >/opt/aops/log/filler 2>/dev/null || true");
    let files = snapshot(&container.path("/opt/aops"), LIVING);

    let output = container.run(&[BOOTSTRAP, "install"]);
    assert_refused(&output, 1, &["free some space for /opt/aops"]);
    assert_eq!(difference(&files, &snapshot(&container.path("/opt/aops"), LIVING)), Vec::<String>::new());
    gateway.publish(|gateway| gateway.publish(&Package::sleeper("native", "2.0.0")));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"2.0.0\"\nagents.script.version = \"1.0.0\"\n");
    // The manager reports that it cannot store the desired state, and changes nothing.
    let status = inside::wait_for_status(&container, "the full disk to be reported", |status| {
        let native = agent(status, "native").map(|agent| agent["lastError"].to_string()).unwrap_or_default();
        let told = format!("{native}{}", status["problems"]);
        told.contains("No space left") || told.contains("not enough disk space")
    });
    for who in ["spm", "spa"] {
        assert_eq!(status[who]["pid"], before[who]["pid"]);
    }
    for name in ["native", "script"] {
        assert_eq!(agent(&status, name).expect("it exists")["pid"], agent(&before, name).expect("it exists")["pid"]);
        assert_eq!(agent(&status, name).expect("it exists")["version"], "1.0.0");
    }
    // Both roles are killed and cannot write records for their successors; they are started nevertheless.
    done(
        &container,
        "rm -f /opt/aops/run/spm.json /opt/aops/run/spa.json; cat /dev/zero >>/opt/aops/log/filler 2>/dev/null || true",
    );
    for who in ["spm", "spa"] {
        done(&container, &format!("kill -9 {}", status[who]["pid"]));
    }
    container.run(&["/opt/aops/control", "start"]).expect_code(0);
    let again = inside::wait_for_status(&container, "both roles", |status| {
        pid(&status["spm"]["pid"]).is_some() && status["spm"]["pid"] != before["spm"]["pid"]
    });
    for name in ["native", "script"] {
        assert_eq!(agent(&again, name).map(|agent| &agent["pid"]), agent(&before, name).map(|agent| &agent["pid"]));
    }
    // With free space it continues automatically.
    done(&container, "rm /opt/aops/log/filler");
    inside::wait_for_status(&container, "the new version", |status| {
        agent(status, "native").is_some_and(|agent| agent["version"] == "2.0.0" && agent["state"] == "running")
    });
    container.run(&[BOOTSTRAP, "install"]).expect_code(0);
    inside::wait_for_status(&container, "both roles", runs);
    // Uninstalling works too.
    done(&container, "cat /dev/zero >/opt/aops/log/filler 2>/dev/null || true");
    container.run(&["/opt/aops/control", "uninstall", "--yes"]).expect_code(0);
    assert_eq!(inside::processes_of_aops(&container), []);
    assert_eq!(done(&container, "ls -A /opt/aops").stdout, "");
}

#[test]
fn a_full_disk_during_staging_is_reported_and_the_old_release_continues() {
    let container = Container::bare();
    let gateway = Inside::start(&container, fleet_of_two());
    mount_home(&container, Space::SMALL);
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let agents = wait_for_agents(&container, &["native", "script"]);
    // More than the free space, and incompressible.
    let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(1 << 20).collect();
    let mut big = Package::sleeper("native", "2.0.0");
    for number in 0..64 {
        let mut noise = noise.clone();
        noise.iter_mut().for_each(|byte| *byte ^= fastrand::u8(..));
        big = big.with_file(&format!("noise/{number}"), noise, 0o644);
    }
    gateway.publish(|gateway| gateway.publish(&big));
    gateway.fleet("heartbeatInterval = \"1s\"\nagents.native.version = \"2.0.0\"\nagents.script.version = \"1.0.0\"\n");
    let status = inside::wait_for_status(&container, "the full disk to be reported", |status| {
        agent(status, "native").is_some_and(|agent| {
            let error = agent["lastError"].as_str().unwrap_or_default();
            agent["state"] == "running" && (error.contains("not enough disk space"))
        })
    });
    assert_eq!(agent(&status, "native").expect("it exists")["version"], "1.0.0");
    assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);
    wait_for("the gateway to receive it", SOON, || {
        event(&gateway.status(), "stage", "native").filter(|event| event["outcome"] == "failed")
    });
    // The incomplete release is removed.
    let free = done(&container, "df --output=avail -k /opt/aops | tail -n 1").stdout;
    let free: u64 = free.trim().parse().expect("a number");
    assert!(free > 120 << 10, "{free} kB are free");
}

#[test]
fn a_read_only_home_is_reported_and_running_sub_agents_continue() {
    let container = Container::bare();
    let _gateway = Inside::start(&container, fleet_of_two());
    let read_only = "mount --bind /opt/aops /opt/aops && mount -o remount,bind,ro /opt/aops";
    done(&container, &format!("mkdir /opt/aops && {read_only}"));
    let output = container.run(&["sh", "-c", VERBATIM]);
    assert_refused(&output, 1, &["make /opt/aops writable", "another --home"]);
    done(&container, "umount /opt/aops && ls -A /opt/aops | wc -l");
    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let agents = wait_for_agents(&container, &["native", "script"]);
    let before = inside::wait_for_status(&container, "both roles", runs);
    done(&container, read_only);
    let files = snapshot(&container.path("/opt/aops"), LIVING);
    for refused in [&[BOOTSTRAP, "install"][..], &["/opt/aops/control", "uninstall", "--yes"]] {
        let output = container.run(refused);
        assert_eq!(output.code, 1, "{output}");
        assert!(output.stderr.contains("ead-only file system"), "{output}");
    }
    assert_eq!(difference(&files, &snapshot(&container.path("/opt/aops"), LIVING)), Vec::<String>::new());
    let status = inside::status(&container);
    assert_eq!((&status["spm"]["pid"], &status["spa"]["pid"]), (&before["spm"]["pid"], &before["spa"]["pid"]));
    assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);
    done(&container, "umount /opt/aops");
    container.run(&[BOOTSTRAP, "install", "--agent-id", "5402204854438", "--endpoint", URL]).expect_code(0);
    assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);
}
