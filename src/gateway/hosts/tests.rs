//! The records of hosts: generations, events, acknowledgements, limits.

use std::collections::BTreeMap;

use super::*;
use crate::core::protocol::{AgentReport, Event, ManagerReport};
use crate::core::unknown::AnyValue;

const NOW: u64 = 1_000_000;

fn hosts() -> Hosts {
    Hosts::new("ours".to_owned(), Vec::new())
}

fn snapshot(revision: u64, fleet: &str) -> Snapshot {
    Snapshot {
        revision,
        fleet: Some(Arc::new(toml::from_str(fleet).unwrap())),
        index: Arc::new(Index::default()),
        pins: Vec::new(),
    }
}

fn heartbeat(agent_id: &str, held: Option<(&str, u64)>) -> Heartbeat {
    Heartbeat {
        clock_offset_seconds: None,
        trust: None,
        agent_id: agent_id.parse().unwrap(),
        instance_id: "one".to_owned(),
        hostname: "web-1".to_owned(),
        os: crate::core::model::Os::Linux,
        arch: crate::core::model::Arch::Amd64,
        manager: ManagerReport { version: "1".parse().unwrap(), pid: 1, uptime_seconds: 1, memory_bytes: 1 },
        lineage: held.map(|(lineage, _)| lineage.to_owned()),
        generation: held.map_or(0, |(_, generation)| generation),
        sequence: 1,
        agents: Vec::new(),
        events: Vec::new(),
    }
}

fn event(id: u64) -> Event {
    Event {
        id,
        time: "t".to_owned(),
        kind: "exit".to_owned(),
        agent: None,
        version: None,
        outcome: "ok".to_owned(),
        message: "m".repeat(10_000),
        unknown: BTreeMap::from([("later".to_owned(), AnyValue::Text("x".repeat(10_000)))]),
    }
}

fn answer(hosts: &Hosts, heartbeat: Heartbeat, snapshot: &Snapshot, now: u64) -> Answer {
    hosts.heartbeat(heartbeat, None, snapshot, now).unwrap()
}

#[test]
fn the_list_is_sent_until_the_host_has_it_and_again_when_it_changes() {
    let hosts = hosts();
    let first = answer(&hosts, heartbeat("1", None), &snapshot(1, ""), NOW);
    assert!(first.agents.is_some());
    assert_eq!((first.lineage.as_deref(), first.generation, first.interval), (Some("ours"), NOW, Some(30)));
    assert_eq!(first.removal_delay, Some(300));

    let held = heartbeat("1", Some(("ours", NOW)));
    let second = answer(&hosts, held.clone(), &snapshot(1, ""), NOW + 5);
    assert_eq!((second.agents, second.generation), (None, NOW));
    // Another snapshot with the same orders for the host.
    let third = answer(&hosts, held.clone(), &snapshot(2, "heartbeatInterval = 5\nremovalDelay = 7"), NOW + 6);
    assert_eq!((third.agents, third.generation), (None, NOW));
    assert_eq!((third.interval, third.removal_delay), (Some(5), Some(7)));
    // A fleet with a missing package: the content differs, though nothing can be sent.
    let missing_package = snapshot(3, "[agents.a]\nversion = \"1\"");
    let fourth = answer(&hosts, held, &missing_package, NOW + 7);
    assert_eq!((fourth.agents.as_deref(), fourth.complete, fourth.generation), (Some(&[][..]), false, NOW + 7));
    assert!(fourth.error_message.unwrap().contains("no package"));
    // Equal generations of different lineages are different desired states.
    let other_lineage = answer(&hosts, heartbeat("1", Some(("theirs", NOW + 7))), &missing_package, NOW + 8);
    assert!(other_lineage.agents.is_some());
    assert_eq!(other_lineage.generation, NOW + 7);
}

#[test]
fn generations_increase_after_the_records_are_lost() {
    let before = hosts();
    let given = answer(&before, heartbeat("1", None), &snapshot(1, ""), NOW).generation;
    // An hour earlier by the clock, and without records.
    let after = answer(&hosts(), heartbeat("1", Some(("ours", given))), &snapshot(1, ""), NOW - 3_600);
    assert_eq!(after.generation, given + 1);
    assert!(after.agents.is_some());
}

#[test]
fn a_gateway_without_a_fleet_sends_no_orders() {
    let nothing = Snapshot { revision: 1, fleet: None, index: Arc::new(Index::default()), pins: Vec::new() };
    let received = answer(&hosts(), heartbeat("1", Some(("ours", 7))), &nothing, NOW);
    assert_eq!((received.lineage, received.generation, received.agents, received.complete), (None, 0, None, false));
    assert!(received.error_message.is_some());
}

#[test]
fn events_are_acknowledged_and_stored_once_and_limited_in_number() {
    let hosts = hosts();
    let send = |ids: &[u64]| {
        let heartbeat = Heartbeat { events: ids.iter().map(|id| event(*id)).collect(), ..heartbeat("1", None) };
        answer(&hosts, heartbeat, &snapshot(1, ""), NOW).ack
    };
    let kept = || {
        hosts.mark_changed();
        hosts.changed().unwrap()[0].events.iter().map(|event| event.id).collect::<Vec<_>>()
    };
    assert_eq!(send(&[]), None);
    assert_eq!(send(&[1, 2]), Some(2));
    // The answer was lost: the host sends them again with another one.
    assert_eq!(send(&[1, 2, 3]), Some(3));
    assert_eq!(kept(), [1, 2, 3]);
    // A new installation counts from 1.
    assert_eq!(send(&[1]), Some(1));
    assert_eq!(kept(), [1, 2, 3, 1]);
    send(&(2..200).collect::<Vec<_>>());
    assert_eq!((kept().len(), kept()[49]), (50, 199));
    let records = hosts.changed();
    assert!(records.is_none(), "nothing has changed since");
    hosts.mark_changed();
    assert!(hosts.changed().unwrap()[0].events.iter().all(|event| event.message.len() == 300));
}

#[test]
fn records_are_read_back_with_the_fields_of_a_newer_version() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hosts.json");
    assert_eq!(load(&path).unwrap(), []);
    let first = hosts();
    answer(&first, Heartbeat { events: vec![event(4)], ..heartbeat("1", None) }, &snapshot(1, ""), NOW);
    answer(&first, heartbeat("2", None), &snapshot(1, ""), NOW);
    save(&path, &first.changed().unwrap()).unwrap();
    let text = std::fs::read_to_string(&path).unwrap().replace("\"held\":0", "\"held\":0,\"later\":{\"a\":1}");
    std::fs::write(&path, text).unwrap();

    let second = Hosts::new("ours".to_owned(), load(&path).unwrap());
    assert_eq!(second.count(), 2);
    let received = answer(&second, heartbeat("1", Some(("ours", NOW))), &snapshot(1, ""), NOW + 9);
    assert_eq!((received.generation, received.agents), (NOW, None));
    save(&path, &second.changed().unwrap()).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap().matches("\"later\":{\"a\":1}").count(), 2);
}

#[test]
fn two_machines_with_one_agent_id_are_reported() {
    let hosts = hosts();
    answer(&hosts, heartbeat("1", None), &snapshot(1, ""), NOW);
    let clone = Heartbeat { instance_id: "two".to_owned(), hostname: "web-2".to_owned(), ..heartbeat("1", None) };
    answer(&hosts, clone, &snapshot(1, ""), NOW);
    let twin = hosts.changed().unwrap()[0].twin.clone().unwrap();
    assert_eq!((twin.instance_id.as_str(), twin.hostname.as_str()), ("one", "web-1"));
}

#[test]
fn the_number_of_hosts_is_limited_and_a_silent_host_is_replaced() {
    let hosts = hosts();
    let snapshot = snapshot(1, "");
    for number in 0..MAX_HOSTS {
        answer(&hosts, heartbeat(&number.to_string(), None), &snapshot, NOW + 1);
    }
    assert_eq!(hosts.heartbeat(heartbeat("new", None), None, &snapshot, NOW + 2), Err(HostLimitReached));
    assert!(hosts.heartbeat(heartbeat("7", None), None, &snapshot, NOW + 2).is_ok(), "a known one is answered");
    let later = NOW + 2 + REPLACEABLE_AFTER.as_millis() as u64;
    assert!(hosts.heartbeat(heartbeat("new", None), None, &snapshot, later).is_ok());
    assert_eq!(hosts.count(), MAX_HOSTS);
}

/// A report with the longest texts.
fn longest_report(number: usize) -> AgentReport {
    AgentReport {
        name: format!("agent-{number}").parse().unwrap(),
        version: Some("1".parse().unwrap()),
        state: crate::core::protocol::AgentState::Failed,
        pid: None,
        restarts: u64::MAX,
        env_hash: Some("0".repeat(1 << 20)),
        message: Some("m\x1b\"".repeat(1 << 20)),
    }
}

fn record(hosts: &Hosts, agent_id: &str) -> Arc<Record> {
    hosts.mark_changed();
    let records = hosts.changed().unwrap();
    records.into_iter().find(|record| record.agent_id.as_str() == agent_id).unwrap()
}

#[test]
fn the_size_of_a_record_is_limited() {
    let hosts = hosts();
    let largest = Heartbeat {
        agents: (0..20).map(longest_report).collect(),
        events: (0..60).map(event).collect(),
        hostname: "h".repeat(1 << 20),
        ..heartbeat("1", None)
    };
    let reported = |agents: usize| Heartbeat { agents: (0..agents).map(longest_report).collect(), ..largest.clone() };
    answer(&hosts, reported(20), &snapshot(1, ""), NOW);
    let known = record(&hosts, "1");
    assert_eq!((known.agents.len(), known.events.len(), known.hostname.len()), (20, 50, 255));
    assert!(known.agents.iter().all(|report| report.message.as_ref().is_some_and(|message| message.len() == 300)));
    assert!(!known.agents[0].message.as_ref().unwrap().contains('\x1b'));
    assert!(known.bytes() < 50_000, "{}", known.bytes());

    // With little memory: events are removed first, then messages, then sub-agents.
    hosts.lock().bytes = 2 * FULL_BYTES;
    answer(&hosts, reported(20), &snapshot(1, ""), NOW);
    let known = record(&hosts, "1");
    assert_eq!((known.agents.len(), known.events.len()), (20, 0));
    assert!(known.bytes() <= MAX_RECORD_BYTES_WHEN_FULL && known.agents.iter().any(|report| report.message.is_none()));
    hosts.lock().bytes = 2 * FULL_BYTES;
    let many = Heartbeat { agents: (0..100).map(longest_report).collect(), ..heartbeat("1", None) };
    answer(&hosts, many, &snapshot(1, ""), NOW);
    let known = record(&hosts, "1");
    assert!(
        (20..100).contains(&known.agents.len()) && known.bytes() <= MAX_RECORD_BYTES_WHEN_FULL,
        "{}",
        known.agents.len()
    );
    assert_eq!(known.agents[0].name.as_str(), "agent-0");
}

#[test]
fn the_bytes_of_all_hosts_are_counted() {
    let all = hosts();
    let snapshot = snapshot(1, "");
    let sum = |hosts: &Hosts| {
        hosts.mark_changed();
        hosts.changed().unwrap().iter().map(|record| record.bytes()).sum::<usize>()
    };
    for round in 0..3 {
        for (id, agents) in [("1", 3), ("2", 0), ("3", 9)] {
            let agents = (0..agents * round).map(longest_report).collect();
            answer(&all, Heartbeat { agents, events: vec![event(7)], ..heartbeat(id, None) }, &snapshot, NOW);
        }
        let expected = sum(&all);
        assert_eq!(all.lock().bytes, expected);
    }
    let known = all.lock().hosts.values().map(|known| (*known.record).clone()).collect();
    let (again, expected) = (Hosts::new("ours".to_owned(), known), sum(&all));
    assert_eq!(again.lock().bytes, expected);
}

#[test]
fn a_host_cannot_push_the_generations_of_other_hosts_out_of_range() {
    const TODAY: u64 = 1_790_000_000_000;
    let hosts = hosts();
    let (first, second) = (snapshot(1, ""), snapshot(2, "[agents.a]\nversion = \"1\""));
    let given = answer(&hosts, heartbeat("1", None), &first, TODAY).generation;
    for reported in [u64::MAX, u64::MAX - 1, 1 << 53, TODAY * 2] {
        answer(&hosts, heartbeat("1", Some(("ours", reported))), &first, TODAY + 1);
        answer(&hosts, heartbeat("1", Some(("ours", reported))), &second, TODAY + 2);
        answer(&hosts, heartbeat("1", Some(("ours", reported))), &first, TODAY + 3);
    }
    let received = answer(&hosts, heartbeat("1", Some(("ours", given))), &second, TODAY + 4);
    assert!(received.agents.is_some());
    assert!((given + 1..TODAY + 100).contains(&received.generation), "{}", received.generation);
}
