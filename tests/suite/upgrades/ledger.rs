//! The ledger of releases: its entries for a sub-agent, and their effect when a manager starts.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::Value;

use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost, agent};
use crate::support::package::Package;
use crate::support::wait::wait_for;

/// `None` if there is no readable ledger.
fn ledger(host: &TestHost) -> Option<Value> {
    let text = fs::read(host.home().join("state/releases.json")).ok()?;
    serde_json::from_slice(&text).ok()
}

#[track_caller]
fn wait_for_version(host: &TestHost, name: &str, wanted: &str) {
    host.wait_for_status(&format!("{name} {wanted} to run"), SOON, |status| {
        agent(status, name).is_some_and(|agent| agent["version"] == wanted && agent["state"] == "running")
    });
}

#[track_caller]
fn wait_for_places(host: &TestHost, name: &str, wanted: [Option<&str>; 3]) {
    wait_for(&format!("the ledger to say {wanted:?}"), SOON, || {
        let ledger = ledger(host)?;
        let places = ["active", "backup", "probation"];
        (places.map(|place| ledger["agents"][name][place]["version"].as_str()) == wanted).then_some(())
    });
}

/// A host whose only sub-agent was upgraded from 1.0 to 2.0.
#[track_caller]
fn upgraded() -> (Gateway, TestHost) {
    let packages = ["1.0", "2.0"].map(|version| Package::sleeper("one", version));
    let gateway = Gateway::with(&packages.each_ref(), &[("one", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    wait_for_version(&host, "one", "1.0");
    gateway.want(&[("one", "2.0", "")]);
    wait_for_version(&host, "one", "2.0");
    wait_for_places(&host, "one", [Some("2.0"), Some("1.0"), None]);
    (gateway, host)
}

#[test]
fn an_upgrade_is_committed_after_its_probation_and_the_previous_release_is_kept() {
    let packages = ["1.0", "2.0", "3.0"].map(|version| Package::sleeper("one", version));
    let gateway = Gateway::with(&packages.each_ref(), &[("one", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    wait_for_version(&host, "one", "1.0");
    wait_for_places(&host, "one", [Some("1.0"), None, None]);
    gateway.want(&[("one", "2.0", "")]);
    wait_for_version(&host, "one", "2.0");
    wait_for_places(&host, "one", [Some("2.0"), Some("1.0"), None]);
    gateway.want(&[("one", "3.0", "")]);
    wait_for_version(&host, "one", "3.0");
    wait_for_places(&host, "one", [Some("3.0"), Some("2.0"), None]);
    wait_for("the oldest to be swept", SOON, || {
        fs::symlink_metadata(host.home().join("agents/one/1.0")).is_err().then_some(())
    });
    assert!(host.home().join("agents/one/2.0/.complete").exists());
    let digest = ledger(&host).expect("there is a ledger")["agents"]["one"]["active"]["sha256"].as_str().map(str::len);
    assert_eq!(digest, Some(64), "a release is identified by its bytes, too");
}

#[test]
fn a_release_that_never_starts_is_rolled_back_to_the_previous_one() {
    let good = Package::sleeper("one", "1.0");
    let bad =
        Package::native("one", "2.0", &["bin/missing"], "").with_file("bin/missing", "#!/no/such/interpreter\n", 0o755);
    let mut gateway = Gateway::stopped();
    gateway.publish_self("1.0.0");
    gateway.publish(&good);
    let arguments = bad.arguments();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    arguments.extend(["--epoch", "7"]);
    gateway.publish_with(&arguments).expect_success();
    gateway.want(&[("one", "1.0", "")]);
    gateway.run();
    let host = TestHost::joined(&gateway);
    wait_for_version(&host, "one", "1.0");
    gateway.want(&[("one", "2.0", "")]);
    host.wait_for_status("the new release to be rolled back", SOON, |status| {
        agent(status, "one").is_some_and(|agent| agent["state"] == "running" && agent["skipped"][0]["version"] == "2.0")
    });
    wait_for_places(&host, "one", [Some("1.0"), None, None]);
    let epochs = fs::read_to_string(host.home().join("state/epochs.json")).expect("it exists");
    let epochs: Value = serde_json::from_str(&epochs).expect("it is JSON");
    assert_eq!(epochs["epochs"]["one"], 1, "nothing of epoch 7 has run");
    gateway.want(&[("one", "1.0", "")]);
    let is_forgotten = |status: &Value| agent(status, "one").is_some_and(|agent| agent["skipped"].is_null());
    host.wait_for_status("another order to let it be tried again", SOON, is_forgotten);
    wait_for_version(&host, "one", "1.0");
}

#[test]
fn a_lost_ledger_is_rebuilt_from_what_is_on_disk_and_reported() {
    let (gateway, host) = upgraded();
    let pid = host.wait_for_agent("one");
    for content in [None, Some("{\"agents\": [")] {
        wait_for("it to be known that there is a ledger", SOON, || {
            let epochs = fs::read_to_string(host.home().join("state/epochs.json")).ok()?;
            (serde_json::from_str::<Value>(&epochs).ok()?["form"] == 2).then_some(())
        });
        let path = host.home().join("state/releases.json");
        match content {
            None => fs::remove_file(&path).expect("it exists"),
            Some(text) => fs::write(&path, text).expect("it can be written"),
        }
        let manager = host.role_pid("spm").expect("it runs");
        host.kill(manager);
        wait_for("another manager", SOON, || host.role_pid("spm").filter(|pid| *pid != manager));
        wait_for_places(&host, "one", [Some("2.0"), Some("1.0"), None]);
        assert_eq!(host.wait_for_agent("one"), pid);
    }
    wait_for("the gateway to receive it", SOON, || {
        let status = gateway.status();
        let events = status.to_string();
        events.contains("the ledger of releases is lost").then_some(())
    });
}

#[test]
fn the_ledger_beats_the_link_of_the_active_release() {
    let (_gateway, host) = upgraded();
    host.control(&["stop"]).expect_success();
    let link = host.home().join("agents/one/current");
    fs::remove_file(&link).expect("it exists");
    symlink("1.0", &link).expect("a link can be created");
    host.control(&["start"]).expect_success();
    wait_for_version(&host, "one", "2.0");
    wait_for("the link to be created again", SOON, || (fs::read_link(&link).ok()?.to_str()? == "2.0").then_some(()));
}

/// As left by an earlier version that unpacked a release of the version `current`.
#[test]
fn a_release_directory_named_current_is_replaced_by_the_link() {
    let packages = ["1.0", "1.1"].map(|version| Package::sleeper("one", version));
    let gateway = Gateway::with(&packages.each_ref(), &[("one", "1.0", "")]);
    let host = TestHost::joined(&gateway);
    wait_for_version(&host, "one", "1.0");
    host.control(&["stop"]).expect_success();
    let (link, state) = (host.home().join("agents/one/current"), host.home().join("state/desired.json"));
    let in_the_way = || {
        fs::remove_file(&link).expect("it exists");
        fs::create_dir(&link).expect("it can be created");
        fs::write(link.join(".complete"), "{}").expect("it can be written");
    };
    in_the_way();
    host.control(&["start"]).expect_success();
    wait_for_version(&host, "one", "1.0");
    assert_eq!(fs::read_link(&link).expect("it is a link again").to_str(), Some("1.0"));

    // Also if that version is still ordered and no other release is on disk.
    host.control(&["stop"]).expect_success();
    let text = fs::read_to_string(&state).expect("it exists").replace("\"1.0\"", "\"current\"");
    fs::write(&state, text).expect("it can be written");
    in_the_way();
    fs::remove_dir_all(host.home().join("agents/one/1.0")).expect("it exists");
    fs::remove_file(host.home().join("state/releases.json")).expect("it exists");
    host.control(&["start"]).expect_success();
    host.wait_for_status("it to be refused", SOON, |status| {
        agent(status, "one").is_some_and(|one| one["lastError"].to_string().contains("the version current is reserved"))
    });
    gateway.want(&[("one", "1.1", "")]);
    wait_for_version(&host, "one", "1.1");
    assert_eq!(fs::read_link(&link).expect("it is a link again").to_str(), Some("1.1"));
}
