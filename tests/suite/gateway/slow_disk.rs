//! A gateway with a slow disk: strace(1) delays each sync of a file for longer than any client waits.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::gateway::Gateway;
use crate::support::https::Https;
use crate::support::package::{Package, arch};
use crate::support::wait::wait_for;

/// The delay of each sync, in seconds.
const SYNC: u32 = 60;
/// The limit of what must not wait for a sync, on a busy machine: half of one.
const QUICK: Duration = Duration::from_secs(SYNC as u64 / 2);

/// The answer to a host that holds the desired state of `held`.
fn answer_to(https: &Https, held: &Value) -> Value {
    let asked = Instant::now();
    let response = https.heartbeat(&json!({
        "agentId": "5402", "instanceId": "i", "hostname": "web-1", "os": "linux", "arch": arch(),
        "manager": { "version": "1", "pid": 1, "uptimeSeconds": 2, "memoryBytes": 3 },
        "lineage": held["lineage"], "generation": held["generation"].as_u64().unwrap_or(0),
    }));
    assert!(asked.elapsed() < QUICK, "a heartbeat was answered after {:?}", asked.elapsed());
    assert_eq!(response.status, 200, "{response:?}");
    response.json()
}

#[test]
fn slow_syncs_do_not_delay_heartbeats_and_a_crash_does_not_reuse_a_generation() {
    let mut gateway = Gateway::stopped();
    for version in ["1", "2", "3"] {
        gateway.publish(&Package::sleeper("a", version));
    }
    gateway.want(&[("a", "1", "")]);
    // It has a lineage and has stored its first fleet file.
    gateway.run();
    let https = Https::to(&gateway);
    let first = answer_to(&https, &Value::Null);
    assert_eq!(gateway.terminate(), 0);

    let started = Instant::now();
    gateway.run_with_slow_syncs(SYNC);
    assert!(started.elapsed() < QUICK, "it served after {:?}", started.elapsed());
    let mut held = answer_to(&https, &first);
    assert_eq!((&held["agents"], &held["generation"]), (&Value::Null, &first["generation"]));
    // The second one while the first is still being written.
    for version in ["2", "3"] {
        gateway.want(&[("a", version, "")]);
        held = wait_for(&format!("the fleet file with version {version}"), QUICK, || {
            let answer = answer_to(&https, &held);
            (answer["agents"][0]["version"] == version).then_some(answer)
        });
    }
    let shown = gateway.status();
    assert!(shown["gateway"]["fleet"]["generation"].as_u64() > first["generation"].as_u64(), "{shown:#}");
    let kept = fs::read_to_string(gateway.path("state/fleet.toml")).expect("it was kept");
    assert!(kept.contains("version = \"1\""), "the syncs are not slow: {kept}");

    // The unwritten state is lost, and the fleet file is now invalid: the previous one is in effect again, as a new generation.
    gateway.stop();
    gateway.fleet("[agents.a\n");
    gateway.run();
    let back = answer_to(&https, &held);
    assert_eq!(back["agents"][0]["version"], "1", "{back:#}");
    assert_eq!(back["lineage"], held["lineage"]);
    assert!(back["generation"].as_u64() > held["generation"].as_u64(), "{held:#} {back:#}");
}
