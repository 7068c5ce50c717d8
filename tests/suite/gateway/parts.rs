//! A gateway whose parts fail one by one: each failure is named, and no other part fails with it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::gateway::Gateway;
use crate::support::host::SOON;
use crate::support::https::Https;
use crate::support::package::{Package, arch};
use crate::support::wait::wait_for;

/// The answer to a host without a desired state.
fn first_answer(https: &Https) -> Value {
    let response = https.heartbeat(&json!({
        "agentId": "5402", "instanceId": "i", "hostname": "web-1", "os": "linux", "arch": arch(),
        "manager": { "version": "1", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3 },
    }));
    assert_eq!(response.status, 200, "{response:?}");
    response.json()
}

/// Waits until these parts have a problem, and returns their entries in `status`.
#[track_caller]
fn wait_for_problems(gateway: &Gateway, expected: &[(&str, &str)]) -> Value {
    wait_for(&format!("problems of {expected:?}"), SOON, || {
        let parts = gateway.status()["gateway"]["parts"].clone();
        let is_as_expected = parts.as_object()?.iter().all(|(name, part)| {
            match expected.iter().find(|(expected, _)| expected == name) {
                Some((_, word)) => part["ok"] == false && part["problems"].to_string().contains(word),
                None => part["ok"] == true,
            }
        });
        is_as_expected.then_some(parts)
    })
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
}

#[test]
fn a_failed_part_is_named_and_the_other_parts_run_also_at_start() {
    let mut gateway = Gateway::stopped();
    for version in ["1", "2"] {
        gateway.publish(&Package::sleeper("a", version));
    }
    gateway.want(&[("a", "1", "")]);
    gateway.run();
    let https = Https::to(&gateway);
    assert_eq!(first_answer(&https)["agents"][0]["version"], "1");
    wait_for_problems(&gateway, &[]);

    // A key of another type, and a private key that others can read.
    fs::write(gateway.path("keys/id_rsa.pub"), "ssh-rsa AAAAB3NzaC1yc2E someone@example\n").expect("it can be written");
    let key = gateway.path("keys/aops.key");
    set_mode(&key, 0o644);
    wait_for_problems(&gateway, &[("keys", "keys/id_rsa.pub is not used")]);
    wait_for_problems(&gateway, &[("keys", "can be read by others")]);
    let published = gateway.publish_with(&[&Package::sleeper("b", "1").path().display().to_string()]);
    assert!(published.success() && published.stderr.contains("keys/id_rsa.pub is not used"), "{published}");
    gateway.want(&[("a", "2", ""), ("b", "1", "")]);
    let answer = wait_for("what was published and ordered since", SOON, || {
        let answer = first_answer(&https);
        (answer["agents"].as_array()?.len() == 2).then_some(answer)
    });
    assert_eq!(answer["agents"][0]["version"], "2");
    gateway.edit_fleet("[[[");
    wait_for_problems(&gateway, &[("keys", "id_rsa.pub"), ("fleet", "fleet.toml is rejected")]);

    // The gateway starts with all these problems; a missing depot affects only the packages that it would offer.
    assert_eq!(gateway.terminate(), 0);
    let (depot, away) = (gateway.path("depot"), gateway.path("away"));
    fs::rename(&depot, &away).expect("it is ours");
    fs::write(gateway.path("state/hosts.json"), "{").expect("it is ours");
    fs::remove_file(gateway.path("state/lineage")).expect("it exists");
    fs::create_dir(gateway.path("state/lineage")).expect("it can be created");
    gateway.run();
    let all = [("keys", "id_rsa.pub"), ("fleet", "rejected"), ("depot", "cannot read the directory")];
    let parts = wait_for_problems(&gateway, &[&all[..], &[("state", "cannot keep this gateway's lineage")]].concat());
    assert!(parts["state"]["problems"].to_string().contains("hosts.json.damaged"), "{parts:#}");
    let health = https.get("/healthz").json();
    assert_eq!((&health["ok"], &health["parts"]), (&json!(false), &parts), "{health:#}");
    let table = gateway.command(&["status"], &[]).expect_success();
    for (_, word) in all {
        assert!(table.contains(word), "{word}: {table}");
    }
    let log = fs::read_to_string(gateway.log()).expect("it logs");
    assert!(log.contains("id_rsa.pub") && log.contains("can be read by others"), "{log}");
    let answer = first_answer(&https);
    assert!(answer["errorMessage"].to_string().contains("no package"), "{answer:#}");
    fs::rename(&away, &depot).expect("it is ours");
    wait_for("the depot to be back", SOON, || (first_answer(&https)["agents"].as_array()?.len() == 2).then_some(()));

    // All problems are fixed, without a restart except for the lineage.
    fs::remove_file(gateway.path("keys/id_rsa.pub")).expect("it is ours");
    set_mode(&key, 0o600);
    gateway.want(&[("a", "2", ""), ("b", "1", "")]);
    wait_for_problems(&gateway, &[("state", "lineage")]);
}

#[test]
fn a_fleet_file_is_applied_at_once_or_rejected_without_a_change() {
    let mut gateway = Gateway::stopped();
    for (name, version) in [("a", "1"), ("a", "2"), ("b", "1")] {
        gateway.publish(&Package::sleeper(name, version));
    }
    let file = gateway.path("new.toml");
    let apply = |gateway: &Gateway, text: &str| {
        fs::write(&file, text).expect("it can be written");
        gateway.command(&["fleet", "apply"], &[&file.display().to_string()])
    };
    let first = "[agents.a]\nversion = \"1\"\n[agents.b]\nversion = \"1\"\n";
    let said = apply(&gateway, first).expect_success();
    assert!(said.contains("comes into force when the gateway runs"), "{said}");
    gateway.run();
    let https = Https::to(&gateway);
    assert_eq!(first_answer(&https)["agents"][0]["version"], "1");
    // From now on the gateway remembers a host.
    let hosts = || gateway.status()["hosts"].as_array().map(Vec::len);
    wait_for("the host to be remembered", SOON, || (hosts() == Some(1)).then_some(()));

    for (bad, reason) in [
        ("[agents.a]\nverzion = \"1\"\n", "verzion"),
        ("[agents.a]\nversion = \"3\"\n[agents.b]\nversion = \"1\"\n", "the depot has no package of a 3"),
        ("", "it no longer names any sub-agent"),
    ] {
        let refused = apply(&gateway, bad).expect_code(1);
        assert!(refused.stderr.contains("cannot apply") && refused.stderr.contains(reason), "{refused}");
        assert_eq!(fs::read_to_string(gateway.path("fleet.toml")).expect("it exists"), first);
    }
    // The gateway's user can still read the file.
    set_mode(&gateway.path("fleet.toml"), 0o640);
    let said = apply(&gateway, "removalDelay = \"9s\"\n[agents.a]\nversion = \"2\"\n").expect_success();
    for words in ["changes 1 of 1 hosts", "a: 1 -> 2, on 1 host", "b: 1 removed, on 1 host", "in effect, as generation"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    let mode = fs::metadata(gateway.path("fleet.toml")).expect("it exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    // Nothing is pending.
    let answer = first_answer(&https);
    assert_eq!((&answer["agents"][0]["version"], &answer["removalDelay"]), (&json!("2"), &json!(9)), "{answer:#}");
}
