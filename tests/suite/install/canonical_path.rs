//! A home that several paths lead to, on a host with systemd: one pair of units, whichever path is used and whatever unit names an earlier
//! release created.

use serde_json::Value;

use crate::install::systemd::{fleet_of_two, runs};
use crate::support::container::Container;
use crate::support::files::difference;
use crate::support::host::{SOON, agent, pid};
use crate::support::inside::{BOOTSTRAP, Inside, PROGRAM, VERBATIM, done, processes_of_aops, wait_for_agents};
use crate::support::wait::wait_for;

/// The names of our unit files.
fn unit_files(container: &Container) -> Vec<String> {
    let list = "cd /etc/systemd/system; ls -d aops* multi-user.target.wants/aops* 2>/dev/null || true";
    done(container, list).stdout.lines().map(str::to_owned).collect()
}

/// The number of processes of each role.
fn roles(container: &Container) -> (usize, usize) {
    let processes = processes_of_aops(container);
    let count =
        |name: &str| processes.iter().filter(|(_, words)| words.contains(name) && words.contains("--home")).count();
    (count("bin/aops-spm"), count("bin/aops-spa"))
}

#[test]
fn a_home_behind_a_link_is_one_home_by_every_path() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    done(&container, "rmdir /opt && mkdir -p /data/opt && ln -s /data/opt /opt");
    let before = container.files();
    let units = [
        "aops-agents.service",
        "aops-spa.service",
        "aops-spm.service",
        "multi-user.target.wants/aops-spa.service",
        "multi-user.target.wants/aops-spm.service",
    ];

    container.run(&["sh", "-c", VERBATIM]).expect_code(0);
    let agents = wait_for_agents(&container, &["native", "script"]);
    assert_eq!(done(&container, "readlink /usr/local/bin/aops").stdout, "/opt/aops/bin/aops\n");
    for renew in ["/usr/local/bin/aops install", "/data/opt/aops/bin/aops install", "aops install --home /opt/aops/"] {
        container.run(&["sh", "-c", renew]).expect_code(0);
        assert_eq!(unit_files(&container), units, "after `{renew}`");
        assert_eq!(wait_for_agents(&container, &["native", "script"]), agents, "after `{renew}`");
        assert_eq!(roles(&container), (1, 1), "after `{renew}`");
    }
    for (stop, start) in [("/opt/aops/control", "/data/opt/aops/control"), ("aops control", "/opt/aops/control")] {
        done(&container, &format!("{stop} stop && {start} start"));
        wait_for_agents(&container, &["native", "script"]);
    }
    done(&container, "/data/opt/aops/control restart");
    assert_eq!(unit_files(&container), units);

    container.run(&["/data/opt/aops/control", "uninstall", "--yes"]).expect_code(0);
    assert_eq!(processes_of_aops(&container), []);
    assert_eq!(unit_files(&container), Vec::<String>::new());
    assert_eq!(difference(&before, &container.files()), [format!("+ {BOOTSTRAP}")]);
}

#[test]
fn units_named_after_another_spelling_of_the_home_are_replaced() {
    let container = Container::systemd();
    let _gateway = Inside::start(&container, fleet_of_two());
    let before = container.files();
    // The trailing slash of shell completion.
    container.run(&["sh", "-c", &format!("{VERBATIM} --home /srv/aops/")]).expect_code(0);
    let units = unit_files(&container);
    let status = || container.run(&["/srv/aops/control", "status", "--json"]).json();
    let agents = || {
        let pids = |status: &Value| -> Option<Vec<u32>> {
            let running = |name| agent(status, name).filter(|agent| agent["state"] == "running");
            ["native", "script"].iter().map(|name| pid(&running(name)?["pid"])).collect()
        };
        wait_for("the sub-agents", SOON, || Some(status()).filter(runs).as_ref().and_then(pids))
    };
    let first = agents();
    done(&container, "/srv/aops/control stop && /srv/aops/control start");
    assert_ne!(agents(), first, "a stop stops the sub-agents");

    // Units of a release that used the path as it was spelled: alone, and beside a pair with the correct name.
    let strays = "cd /etc/systemd/system; name=$(ls aops-spm-*.service); digits=${name#aops-spm-}; digits=${digits%.service}
        for role in agents spm spa; do
            sed \"s/-$digits/-0123abcd/g; s,--home ./srv/aops.,--home \\\"/srv/aops/\\\",\" aops-$role-$digits.service >aops-$role-0123abcd.service
        done";
    let alone = format!(
        "{strays}; mkdir aops-spm-0123abcd.service.d; printf '[Service]\\nNice=3\\n' >aops-spm-0123abcd.service.d/nice.conf
        systemctl disable --now aops-spa-$digits aops-spm-$digits; rm aops-*-$digits.service; systemctl daemon-reload
        systemctl enable --now aops-spm-0123abcd aops-spa-0123abcd"
    );
    let beside =
        format!("{strays}; systemctl daemon-reload; systemctl enable --now aops-spm-0123abcd aops-spa-0123abcd");

    done(&container, &alone);
    let running = agents();
    let own = "/srv/aops/bin/aops install";
    container.run(&["sh", "-c", own]).expect_code(0);
    assert_eq!(agents(), running, "the sub-agents stay");
    let mut expected = units.clone();
    let added = units.iter().find(|unit| unit.starts_with("aops-spm-")).expect("it is registered");
    expected.insert(units.iter().position(|unit| unit == added).map_or(0, |at| at + 1), format!("{added}.d"));
    assert_eq!(unit_files(&container), expected, "what the operator added is kept");
    assert_eq!(roles(&container), (1, 1));

    done(&container, &beside);
    done(&container, "/srv/aops/control stop && /srv/aops/control start");
    agents();
    assert_eq!(unit_files(&container), expected);
    assert_eq!(roles(&container), (1, 1));

    done(&container, &beside);
    container.run(&["/srv/aops/control", "uninstall", "--yes"]).expect_code(0);
    assert_eq!(unit_files(&container), Vec::<String>::new());
    assert_eq!(processes_of_aops(&container), []);
    assert_eq!(done(&container, "systemctl list-units --all --plain --no-legend 'aops*'").stdout, "");
    assert_eq!(difference(&before, &container.files()), [format!("+ {BOOTSTRAP}")]);
    let again = container.run(&[PROGRAM, "control", "uninstall", "--yes", "--home", "/srv/aops/"]).expect_code(4);
    assert!(again.stderr.contains("nothing is installed in /srv/aops"), "{again}");
}
