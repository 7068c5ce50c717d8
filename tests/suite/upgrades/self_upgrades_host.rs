//! Upgrades of the manager on realistic hosts: under systemd, under a product that starts the home, and on hosts short of resources.
//!
//! Each kind of host tests a sample of the bad releases and of the amounts of free space, drawn by `AOPS_UPGRADE_SEED`; with
//! `AOPS_UPGRADES=all` it tests every one.

use std::time::Duration;

use serde_json::Value;

use crate::install::systemd::{fleet_of_two, runs};
use crate::support::container::Container;
use crate::support::host::SOON;
use crate::support::inside::{self, Inside, Space, URL, VERBATIM, done, mount_home, wait_for_agents};
use crate::support::package::Package;
use crate::support::release::{self, NAME};
use crate::support::wait::try_for;
use crate::upgrades::self_upgrades::seed;
use crate::upgrades::self_upgrades_bad::{BAD_MANAGERS, unfit};

/// A trial of five seconds, the watchdog's checks, three attempts with growing delays, and the delays of a busy machine.
const ENDED: Duration = Duration::from_secs(180);
/// As the command of the old platform installs it.
const FIRST: &str = "c57f6a1d";
/// The path inside of the good program that bad ones run.
const REAL: &str = "/tmp/real";

fn fleet(manager: &str) -> String {
    format!(
        "heartbeatInterval = \"1s\"\nmanager.version = \"{manager}\"\nagents.native.version = \"1.0.0\"\nagents.script.version = \"1.0.0\"\n"
    )
}

#[track_caller]
fn wait_for_status(container: &Container, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    inside::wait_within(container, ENDED, what, wanted)
}

fn runs_release(status: &Value, version: &str) -> bool {
    status["version"] == version && status["upgrade"] == Value::Null && status["spa"]["pid"].is_u64()
}

fn is_skipped(status: &Value, version: &str) -> bool {
    status["problems"].to_string().contains(&format!("{NAME} {version} failed and is skipped"))
}

/// A host that runs the first release and both sub-agents; the gateway has these releases too.
fn host<'a>(container: &'a Container, install: &str, releases: &[&Package]) -> (Inside<'a>, Vec<u32>) {
    let gateway = Inside::start(container, fleet_of_two());
    container.copy_in(release::real(), REAL, 0o755);
    gateway.fleet(&fleet(FIRST));
    done(container, install);
    // Published now: each replaces the bootstrap executable.
    gateway.publish(|gateway| releases.iter().for_each(|release| gateway.publish(release)));
    done(container, "echo 'upgradeTrial = \"5s\"' >>/opt/aops/etc/conf.toml");
    inside::wait_for_status(container, "everything to run", runs);
    let agents = wait_for_agents(container, &["native", "script"]);
    (gateway, agents)
}

fn bad(manager: &str) -> Package {
    release::bad_manager("3.0.0", REAL, manager)
}

/// A good release, the operator's rollback, and a bad release.
#[track_caller]
fn there_and_back(container: &Container, install: &str) {
    let (gateway, agents) = host(container, install, &[&release::good("2.0.0"), &bad("exit 1")]);
    gateway.fleet(&fleet("2.0.0"));
    wait_for_status(container, "the good release", |status| runs_release(status, "2.0.0") && runs(status));
    assert_eq!(wait_for_agents(container, &["native", "script"]), agents);
    container.run(&["/opt/aops/control", "rollback"]).expect_code(0);
    wait_for_status(container, "the release before", |status| {
        runs_release(status, FIRST) && status["heldByOperator"] == true
    });
    assert_eq!(wait_for_agents(container, &["native", "script"]), agents);
    gateway.fleet(&fleet("3.0.0"));
    wait_for_status(container, "the roll back", |status| runs_release(status, FIRST) && is_skipped(status, "3.0.0"));
    assert_eq!(wait_for_agents(container, &["native", "script"]), agents);
    // The backup is the running release.
    let refused = container.run(&["/opt/aops/control", "rollback"]).expect_code(1);
    assert!(refused.stderr.contains("no previous release"), "{refused}");
}

/// A unit file of an earlier release: a committed release replaces it with its own.
const OLD_UNIT: &str =
    "sed -i 's/--service systemd stop-hook/stop-hook/' /etc/systemd/system/aops-spm.service && systemctl daemon-reload";

#[test]
fn under_systemd_the_manager_is_upgraded_and_a_bad_release_is_rolled_back() {
    let container = Container::systemd();
    there_and_back(&container, &format!("{VERBATIM} && {OLD_UNIT}"));
    done(&container, "grep -q -- '--service systemd stop-hook' /etc/systemd/system/aops-spm.service");
    // No unit was disabled or replaced meanwhile.
    done(&container, "systemctl is-enabled aops-spm aops-spa && systemctl is-active aops-spm aops-spa");
}

fn by_the_product() -> String {
    format!(
        "/tmp/aops install --product hci --agent-id 1 --endpoint {URL} --trusted-key /tmp/gateway/keys/aops.pub \
         --ca-cert /tmp/gateway/tls/cert.pem --version {FIRST} --home /opt/aops"
    )
}

#[test]
fn under_a_product_the_manager_is_upgraded_and_a_bad_release_is_rolled_back() {
    there_and_back(&Container::bare(), &by_the_product());
}

/// The number of drawn cases.
const SAMPLE: usize = 2;

fn all_is_wanted() -> bool {
    std::env::var_os("AOPS_UPGRADES").is_some_and(|which| which == "all")
}

/// Bad releases, one after the other on the same host.
#[track_caller]
fn each_is_rolled_back(container: &Container, install: &str) {
    let managers = BAD_MANAGERS.iter().enumerate().map(|(number, (name, manager, why))| {
        (format!("3.0.{number}"), *name, release::bad_manager(&format!("3.0.{number}"), REAL, manager), *why)
    });
    let unfit = (0..3).map(|number| {
        let version = format!("3.1.{number}");
        let (name, package, why) = unfit(&version, REAL).into_iter().nth(number).expect("there are three");
        (version, name, package, why)
    });
    let mut cases: Vec<_> = managers.chain(unfit).collect();
    if !all_is_wanted() {
        fastrand::Rng::with_seed(seed()).shuffle(&mut cases);
        cases.truncate(SAMPLE);
    }
    let (gateway, agents) = host(container, install, &cases.iter().map(|(_, _, bad, _)| bad).collect::<Vec<_>>());
    for (version, name, _, why) in &cases {
        gateway.fleet(&fleet(version));
        let status = wait_for_status(container, &format!("a release that {name} to be skipped"), |status| {
            runs_release(status, FIRST) && is_skipped(status, version)
        });
        let problems = status["problems"].to_string();
        // A service manager restarts a role before the watchdog can notice its death.
        let is_unseen = why == &"died repeatedly" && problems.contains("did not answer in time");
        assert!(problems.contains(why) || is_unseen, "{name}: {problems}");
        assert_eq!(wait_for_agents(container, &["native", "script"]), agents, "{name}");
        let left = || -> Vec<_> {
            container.processes().into_iter().filter(|(_, words)| words.contains("sleep 1000001")).collect()
        };
        assert!(try_for(SOON, || left().is_empty().then_some(())).is_some(), "{name}: {:?}", left());
    }
}

#[test]
fn under_systemd_each_bad_release_is_rolled_back() {
    each_is_rolled_back(&Container::systemd(), VERBATIM);
}

#[test]
fn under_a_product_each_bad_release_is_rolled_back() {
    each_is_rolled_back(&Container::bare(), &by_the_product());
}

#[test]
fn under_systemd_a_trial_survives_a_power_cut_and_the_death_of_both_roles() {
    let mut container = Container::systemd();
    let begin = |container: &Container| {
        wait_for_status(container, "the trial", |status| {
            status["upgrade"]["to"] == "2.0.0" && status["upgrade"]["phase"] == "trial"
        });
    };
    {
        let (gateway, agents) = host(&container, VERBATIM, &[&release::good("2.0.0")]);
        gateway.fleet(&fleet("2.0.0"));
        begin(&container);
        done(&container, "systemctl kill -s KILL aops-spm aops-spa");
        begin(&container);
        assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);
    }
    container.crash();
    // The gateway is gone after the power cut: the new release stays unproven, and the operator decides.
    let status = wait_for_status(&container, "an unproven trial", |status| status["upgrade"]["phase"] == "unproven");
    assert_eq!(status["version"], "2.0.0", "{status:#}");
    container.run(&["/opt/aops/control", "upgrade", "--abort"]).expect_code(0);
    wait_for_status(&container, "the release before", |status| runs_release(status, FIRST));
    wait_for_agents(&container, &["native", "script"]);
}

/// The ways in which a home becomes unwritable during a trial; whether the roll back has to wait until it is writable, and the command that
/// makes it so.
const FAULTS: [(&str, &str, bool, &str); 3] = [
    ("no byte is left", "cat /dev/zero >/opt/aops/log/filler 2>/dev/null || true", false, "rm /opt/aops/log/filler"),
    (
        "no inode is left",
        "mkdir /opt/aops/log/fillers; cd /opt/aops/log/fillers; touch $(seq 3000) 2>/dev/null || true",
        false,
        "rm -r /opt/aops/log/fillers",
    ),
    (
        "it is read-only",
        "mount --bind /opt/aops /opt/aops && mount -o remount,bind,ro /opt/aops",
        true,
        "mount -o remount,bind,rw /opt/aops",
    ),
];

#[test]
fn a_bad_release_is_rolled_back_on_a_full_or_read_only_home() {
    for (trouble, begin, has_to_wait, end) in FAULTS {
        let container = Container::bare();
        mount_home(&container, Space { executables: 4, mebibytes: 26, inodes: 800 });
        let manager = bad("(sleep 3; kill -KILL $$) & exec $A spm \"$@\"");
        let (gateway, agents) = host(&container, VERBATIM, &[&manager]);
        gateway.fleet(&fleet("3.0.0"));
        wait_for_status(&container, "the trial", |status| {
            status["upgrade"]["phase"] == "trial" && status["version"] == "3.0.0"
        });
        done(&container, begin);
        let is_rolled_back = |status: &Value| runs_release(status, FIRST) && is_skipped(status, "3.0.0");
        if has_to_wait {
            // What cannot be written is reported, and retried until it succeeds.
            let said = try_for(ENDED, || {
                let log = container.run(&["cat", "/opt/aops/log/spa.log"]).stdout;
                (log + &inside::status(&container).to_string()).contains("3.0.0").then_some(())
            });
            assert!(said.is_some(), "nothing is reported where {trouble}");
            done(&container, end);
        }
        wait_for_status(&container, &format!("the roll back where {trouble}"), is_rolled_back);
        assert_eq!(wait_for_agents(&container, &["native", "script"]), agents, "{trouble}");
        if !has_to_wait {
            done(&container, end);
        }
        // There may be a second attempt.
        container.run(&["/opt/aops/control", "retry", NAME]).expect_code(0);
        gateway.fleet(&fleet(FIRST));
        wait_for_status(&container, &format!("peace after {trouble}"), |status| {
            runs_release(status, FIRST) && runs(status)
        });
    }
}

/// Leaves this amount of the home's file system free, in KiB or in inodes.
fn leave_free(free: Free) -> String {
    match free {
        Free::Kibibytes(free) => format!(
            "n=$(($(df --output=avail -k /opt/aops | tail -1) - {free})); \
             [ $n -le 0 ] || dd if=/dev/zero of=/opt/aops/log/filler bs=1k count=$n status=none"
        ),
        Free::Inodes(free) => format!(
            "mkdir /opt/aops/log/fillers; n=$(($(df --output=iavail /opt/aops | tail -1) - {free})); \
             [ $n -le 0 ] || (cd /opt/aops/log/fillers && seq $n | xargs touch)"
        ),
    }
}

#[derive(Debug, Clone, Copy)]
enum Free {
    Kibibytes(u32),
    Inodes(u32),
}

/// However far an upgrade gets before the space is used up: it succeeds, or the previous release continues and the reason is shown; and it
/// succeeds once there is space.
#[test]
fn with_little_disk_space_the_manager_is_upgraded_or_the_reason_is_reported() {
    // The download, the unpacked tree, the backup and the new executable take at most four times the size of the executable.
    let executable = std::fs::metadata(release::real()).expect("it exists").len() / 1024;
    let most = u32::try_from(executable * 4).expect("it is small");
    let bytes = (0..16).map(|step| Free::Kibibytes(most / 15 * step));
    let mut rooms: Vec<Free> = bytes.chain((0..24).map(Free::Inodes)).collect();
    if !all_is_wanted() {
        fastrand::Rng::with_seed(seed()).shuffle(&mut rooms);
        rooms.truncate(SAMPLE);
    }
    let container = Container::bare();
    mount_home(&container, Space { executables: 6, mebibytes: 200, inodes: 800 });
    let (gateway, agents) = host(&container, VERBATIM, &[&release::good("2.0.0")]);
    let mut others = ["2.0.0", FIRST].iter().cycle();
    for room in rooms {
        let (version, before) =
            (*others.next().expect("they never end"), wait_for_agents(&container, &["native", "script"]));
        done(&container, &leave_free(room));
        gateway.fleet(&fleet(version));
        wait_for_status(&container, &format!("{version} to run, or why not, with {room:?} free"), |status| {
            runs_release(status, version)
                || status["problems"].to_string().contains(&format!("cannot upgrade the manager to {version}"))
        });
        assert_eq!(wait_for_agents(&container, &["native", "script"]), before, "{room:?}");
        done(&container, "rm -rf /opt/aops/log/filler /opt/aops/log/fillers");
        done(&container, "/opt/aops/control upgrade");
        wait_for_status(&container, &format!("{version} after {room:?} was free"), |status| {
            runs_release(status, version) && runs(status)
        });
    }
    assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);
}

#[test]
fn a_host_short_of_a_resource_is_upgraded_once_it_is_available() {
    let container = Container::bare();
    let (gateway, agents) = host(&container, VERBATIM, &[&release::good("2.0.0")]);
    // Nothing of an upgrade is run from there; the gateway runs already.
    done(&container, "mount --bind /tmp /tmp && mount -o remount,bind,noexec /tmp");
    let manager = inside::status(&container)["spm"]["pid"].clone();
    // The number that it has open, and one for a client of the control socket.
    let limit = format!("prlimit --pid {manager} --nofile=$(($(ls /proc/{manager}/fd | wc -l) + 1)):1024");
    done(&container, &limit);
    gateway.fleet(&fleet("2.0.0"));
    let mut log = String::new();
    let said = try_for(ENDED, || {
        log = container.run(&["cat", "/opt/aops/log/spm.log"]).stdout;
        (log.contains("an upgrade of the manager starts") && log.contains("(os error 24)")).then_some(())
    });
    assert!(said.is_some(), "the shortage is not logged:\n{log}");
    done(&container, &format!("prlimit --pid {manager} --nofile=1024:1024"));
    wait_for_status(&container, "the new release", |status| runs_release(status, "2.0.0"));
    assert_eq!(wait_for_agents(&container, &["native", "script"]), agents);
}
