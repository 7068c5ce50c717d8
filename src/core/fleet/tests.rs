//! Which fleet files are rejected, what rules override, and which orders a host gets.

use proptest::prelude::*;

use super::*;
use crate::core::model::Digest;

fn fleet(text: &str) -> Fleet {
    toml::from_str(text).unwrap_or_else(|error| panic!("{error}"))
}

fn rejection(text: &str) -> String {
    toml::from_str::<Fleet>(text).expect_err(text).to_string()
}

fn host(agent_id: &str, hostname: &str) -> HostFacts {
    HostFacts { agent_id: agent_id.parse().unwrap(), hostname: hostname.to_owned(), os: Os::Linux, arch: Arch::Amd64 }
}

fn version_of(desired: &HostDesired, name: &str) -> Option<String> {
    desired.agents.get(&name.parse::<AgentName>().unwrap()).map(|order| order.package.version.to_string())
}

fn offer(name: &str, version: &Version) -> Option<Offer> {
    (name != "absent").then(|| Offer {
        version: version.clone(),
        file: format!("{name}-{version}_linux_amd64.tar.zst"),
        sha256: "ab".repeat(32).parse::<Digest>().unwrap(),
        size: 7,
    })
}

const EXAMPLE: &str = r#"
heartbeatInterval = "10s"
[manager]
version = "0.1.0"
[agents.node-exporter]
version = "1.5.0"
env = { GOGC = "50", A = "1" }
[agents.legacy]
version = "c57f6a1d"
cmd = "stop"
[[rules]]
match = { agentId = ["54*", "99"], hostname = ["web-*"], os = ["linux"], arch = ["amd64"] }
agents.node-exporter.version = "1.6.0"
agents.node-exporter.env = { A = "2", B = "3" }
[[rules]]
match = { hostname = ["web-9"] }
manager.version = "0.2.0"
agents.node-exporter.cmd = "stop"
agents.extra.version = "1"
"#;

#[test]
fn rules_change_fields_and_variables_and_later_ones_win() {
    let fleet = fleet(EXAMPLE);
    assert_eq!(fleet.interval, Duration::from_secs(10));

    let plain = fleet.desired(&host("1", "db-1"));
    assert_eq!(version_of(&plain, "node-exporter").as_deref(), Some("1.5.0"));
    assert_eq!(version_of(&plain, "extra"), None);
    assert_eq!(plain.manager.as_ref().map(Version::as_str), Some("0.1.0"));

    let web = fleet.desired(&host("5402", "WEB-1"));
    let exporter = &web.agents[&"node-exporter".parse::<AgentName>().unwrap()];
    assert_eq!(exporter.package.version.as_str(), "1.6.0");
    assert_eq!(exporter.run, Run::Start);
    let env: Vec<(&str, &str)> = exporter.spec.env.iter().map(|(k, v)| (k.as_str(), v.reveal())).collect();
    assert_eq!(env, [("A", "2"), ("B", "3"), ("GOGC", "50")]);

    // The first rule does not match because of its agent ids. The second does.
    let nine = fleet.desired(&host("1", "web-9"));
    assert_eq!(version_of(&nine, "node-exporter").as_deref(), Some("1.5.0"));
    assert_eq!(nine.agents[&"node-exporter".parse::<AgentName>().unwrap()].run, Run::Stop);
    assert_eq!(version_of(&nine, "extra").as_deref(), Some("1"));
    assert_eq!(nine.manager.as_ref().map(Version::as_str), Some("0.2.0"));
}

#[test]
fn a_secret_is_sent_to_the_host_and_never_printed() {
    assert!(!fleet(EXAMPLE).has_secrets());
    let secret = "[agents.a]\nversion = \"1\"\nenv.TOKEN = { secret = \"hunter2\" }\n";
    let ruled = format!("{EXAMPLE}agents.extra.env.TOKEN.secret = \"hunter2\"\n");
    assert!(fleet(secret).has_secrets() && fleet(&ruled).has_secrets());
    let fleet = fleet(secret);
    let host = host("1", "h");
    let orders = orders_for(&fleet.desired(&host), &host, offer);
    assert_eq!(orders.agents[0].spec.env["TOKEN"].reveal(), "hunter2");
    assert!(!format!("{fleet:?}{orders:?}").contains("hunter2"));
    for bad in
        ["{ secrets = \"hunter2\" }", "[\"hunter2\"]", "{ secret = [\"hunter2\"] }", "{ secret = \"hunter2\", a = 1 }"]
    {
        let error = rejection(&format!("[agents.a]\nversion = \"1\"\nenv.TOKEN = {bad}\n"));
        let message = error.lines().last().unwrap_or_default();
        assert!(!message.contains("hunter2"), "{bad}: {message}");
    }
}

#[test]
fn every_condition_of_a_match_must_hold() {
    let fleet = fleet(EXAMPLE);
    for (id, name) in [("1", "web-1"), ("5402", "db-1"), ("990", "web-1")] {
        assert_eq!(
            version_of(&fleet.desired(&host(id, name)), "node-exporter").as_deref(),
            Some("1.5.0"),
            "{id} {name}"
        );
    }
    let mut windows = host("99", "web-1");
    assert_eq!(version_of(&fleet.desired(&windows), "node-exporter").as_deref(), Some("1.6.0"));
    windows.os = Os::Windows;
    assert_eq!(version_of(&fleet.desired(&windows), "node-exporter").as_deref(), Some("1.5.0"));
}

#[test]
fn an_invalid_file_is_rejected_with_the_name_and_line() {
    for (text, words) in [
        ("\n\nhartbeatInterval = 3", &["line 3", "hartbeatInterval"][..]),
        ("[agents.a]\nversion = \"1\"\nlimits = { memory = \"1MiB\" }", &["line 3", "limits"]),
        ("[agents.a]\nversion = \"1\"\ncmd = \"uninstall\"", &["line 3", "uninstall"]),
        ("[agents.a]\nversion = \"../1\"", &["line 2", "../1"]),
        ("[agents.A]\nversion = \"1\"", &["line 1", "\"A\""]),
        ("[agents.a]\nversion = \"1\"\nenv = { \"A-B\" = \"x\" }", &["line 3", "A-B"]),
        ("[agents.a]\nversion = \"1\"\nenv = { A = 1 }", &["line 3", "text"]),
        ("[agents.a]\ncmd = \"stop\"", &["agents.a", "no version"]),
        ("[[rules]]\nmatch = { host = [\"x\"] }", &["line 2", "host"]),
        ("[[rules]]\nmatch = { hostname = [\"[x]\"] }", &["line 2", "[x]"]),
        ("[[rules]]\nmatch = { }", &["rule 1", "names nothing"]),
        ("[[rules]]\nagents.a.version = \"1\"", &["match"]),
        ("[[rules]]\nmatch = { os = [] }", &["rule 1", "empty list"]),
        ("[[rules]]\nmatch = { os = [\"*\"] }\nagents.a.cmd = \"stop\"", &["agents.a", "rule 1", "no version"]),
        ("[agents.aops-spm]\nversion = \"1\"", &["[manager]"]),
        ("heartbeatInterval = \"500ms\"", &["heartbeatInterval"]),
        ("heartbeatInterval = \"2d\"", &["heartbeatInterval"]),
        ("heartbeatInterval = 0", &["heartbeatInterval"]),
        ("removalDelay = \"500ms\"", &["removalDelay", "whole seconds"]),
        ("removalDelay = \"31d\"", &["removalDelay", "from 0s to 30d"]),
        ("[agents.a]\nversion = \"1\"\n[agents.a]\nversion = \"2\"", &["line 3"]),
        ("[agents.a", &["line 1"]),
    ] {
        let error = rejection(text);
        for word in words {
            assert!(error.contains(word), "{text}\n{error}\n{word}");
        }
    }
}

#[test]
fn an_empty_file_is_a_fleet_without_sub_agents() {
    let empty = fleet("");
    assert_eq!(evaluate(&empty, None, &[], |_, _| false), Ok(()));
    assert_eq!((empty.interval, empty.removal_delay), (DEFAULT_INTERVAL, DEFAULT_REMOVAL_DELAY));
    assert_eq!(fleet("removalDelay = \"0s\"").removal_delay, Duration::ZERO);
    let orders = orders_for(&empty.desired(&host("1", "a")), &host("1", "a"), offer);
    assert!(orders.agents.is_empty() && !orders.complete && orders.missing.is_none());
}

fn agents(names: &[&str]) -> String {
    names.iter().map(|name| format!("[agents.{name}]\nversion = \"1\"\n")).collect()
}

#[test]
fn a_file_that_removes_most_sub_agents_needs_allow_removal() {
    let last_good = fleet(&agents(&["a", "b", "c", "d"]));
    let evaluated = |text: &str| evaluate(&fleet(text), Some(&last_good), &[], |_, _| true);
    assert_eq!(evaluated(&agents(&["a", "b"])), Ok(()));
    assert!(matches!(evaluated(&agents(&["a"])), Err(FleetRejection::Drops { dropped: 3, of: 4, .. })));
    assert!(matches!(evaluated(&agents(&["e", "f", "g", "h"])), Err(FleetRejection::Drops { dropped: 4, of: 4, .. })));
    assert_eq!(evaluated(&format!("allowRemoval = true\n{}", agents(&["a"]))), Ok(()));
    assert_eq!(evaluated(""), Err(FleetRejection::Empty));
    assert_eq!(evaluated("allowRemoval = true"), Err(FleetRejection::Empty));
}

#[test]
fn a_rule_that_removes_most_sub_agents_from_the_hosts_needs_allow_removal() {
    let last_good = fleet(&agents(&["a", "b"]));
    let narrowed = "[[rules]]\nmatch = { hostname = [\"one\"] }\nagents.a.version = \"1\"\nagents.b.version = \"1\"\n";
    let hosts: Vec<HostFacts> = ["one", "two", "three"].map(|name| host("1", name)).to_vec();
    let evaluated = |text: &str| evaluate(&fleet(text), Some(&last_good), &hosts, |_, _| true);
    assert_eq!(evaluated(narrowed), Err(FleetRejection::DropsFromHosts { dropped: 4, of: 6 }));
    assert_eq!(evaluated(&format!("allowRemoval = true\n{narrowed}")), Ok(()));
}

#[test]
fn a_file_that_names_unpublished_releases_is_rejected() {
    let published = |name: &str, version: &Version| name == "node-exporter" && version.as_str() == "1.5.0";
    let Err(FleetRejection::NoPackage(missing)) = evaluate(&fleet(EXAMPLE), None, &[], published) else {
        panic!("it was accepted")
    };
    assert_eq!(missing, ["aops-spm 0.1.0", "aops-spm 0.2.0", "extra 1", "legacy c57f6a1d", "node-exporter 1.6.0"]);
}

#[test]
fn a_reserved_version_is_rejected_for_a_sub_agent_and_allowed_for_the_manager() {
    let current = fleet("[manager]\nversion = \"current\"\n[agents.a]\nversion = \"Current\"\n");
    let Err(FleetRejection::Reserved(why)) = evaluate(&current, None, &[], |_, _| true) else {
        panic!("it was accepted")
    };
    assert!(why.contains("agents.a: the version Current is reserved"), "{why}");
    assert_eq!(evaluate(&fleet("[manager]\nversion = \"current\"\n"), None, &[], |_, _| true), Ok(()));
}

#[test]
fn a_list_with_missing_packages_is_not_complete() {
    let fleet = fleet(&agents(&["a", "absent", "b"]));
    let host = host("1", "x");
    let orders = orders_for(&fleet.desired(&host), &host, offer);
    let names: Vec<&str> = orders.agents.iter().map(|order| order.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(!orders.complete);
    assert!(orders.missing.unwrap().contains("linux/amd64 of absent 1"));
}

#[test]
fn the_newest_version_is_by_semver_if_both_are_semver_else_by_publication() {
    for (published, expected) in [
        (&["1.9.0", "1.10.0", "1.2.0"][..], "1.10.0"),
        (&["c57f", "a1d2"], "a1d2"),
        (&["2.0.0", "c57f", "1.0.0"], "1.0.0"),
        (&["1.0.0-rc.1", "1.0.0"], "1.0.0"),
        (&["1.0.0", "1.0.0-rc.1"], "1.0.0"),
        (&["7"], "7"),
    ] {
        let versions: Vec<Version> = published.iter().map(|version| version.parse().unwrap()).collect();
        assert_eq!(newest(&versions).unwrap().as_str(), expected, "{published:?}");
    }
    assert_eq!(newest([]), None);
}

proptest! {
    #[test]
    fn rules_that_do_not_match_have_no_effect(count in 0usize..6, swap in 0usize..6) {
        let base = agents(&["a", "b"]);
        let rule = |i: usize| format!("[[rules]]\nmatch = {{ hostname = [\"other-{i}\"] }}\nagents.a.version = \"{i}\"\n");
        let mut order: Vec<usize> = (0..count).collect();
        if count > 0 { order.rotate_left(swap % count) }
        let text: String = std::iter::once(base.clone()).chain(order.into_iter().map(rule)).collect();
        prop_assert_eq!(fleet(&text).desired(&host("1", "web")), fleet(&base).desired(&host("1", "web")));
    }

    #[test]
    fn a_file_may_always_replace_itself(names in prop::collection::btree_set("[a-z]{1,4}", 1..8)) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let same = fleet(&agents(&names));
        prop_assert_eq!(evaluate(&same, Some(&same), &[host("1", "x")], |_, _| true), Ok(()));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = toml::from_str::<Fleet>(&text);
    }
}
