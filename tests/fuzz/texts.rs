//! Texts from the gateway, from packages, from operators and from earlier versions of the program.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::OnceLock;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{Config, edit, import, render};
use crate::core::desired::{AnswerContext, AnswerOutcome, DesiredState, evaluate};
use crate::core::fleet::{Fleet, HostFacts};
use crate::core::generation::Clocks;
use crate::core::item::MessageItem;
use crate::core::manifest::admit_env;
use crate::core::model::{Arch, Binding, Os};
use crate::core::order::Cmd;
use crate::core::protocol::{AgentOrder, Answer, Event, Heartbeat, Offer};
use crate::core::range::{RequestedRange, part};
use crate::installation::{Epochs, InstallRecord, ManagerRecord};
use crate::package::{Completed, Keys, claimed};
use crate::process::launch;
use crate::process::record::ProcessRecord;

fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}

/// A parsed value is the same after it is written and read again.
fn reads_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(data).ok()?;
    let written = serde_json::to_vec(&value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(again, value);
    Some(value)
}

/// The gateway's answer to a heartbeat, and the plan that follows for a host with two sub-agents.
pub fn answer(data: &[u8]) {
    let Ok(answer) = serde_json::from_slice::<Answer>(data) else { return };
    let is_whole = answer.agents.iter().flatten().all(|item| matches!(item, MessageItem::Read(_)))
        && !matches!(answer.manager, Some(MessageItem::Unreadable(_)));
    // An unreadable order is kept as an error, and is never written.
    if is_whole {
        let _ = reads_back::<Answer>(data);
    }
    let held: DesiredState = serde_json::from_str(
        r#"{"lineage": "l", "generation": 5, "agents": {
            "a": {"version": "1", "run": "start"}, "b": {"version": "1", "run": "stop"}}}"#,
    )
    .expect("it is a desired state");
    let present = BTreeSet::new();
    let clocks = Clocks { host: 1_790_000_000_000, gateway: None };
    let host = AnswerContext { os: Os::Linux, arch: Arch::Amd64, clocks, present: &present, from_fallback: false };
    let verdict = evaluate(&held, &answer, host);
    assert_eq!(verdict, evaluate(&held, &answer, host), "two evaluations of the same answer differ");
    let AnswerOutcome::Accept(accepted) = verdict else { return };
    let desired = accepted.desired;
    let orders = answer.agents.as_deref().unwrap_or_default();
    if orders.is_empty() {
        assert_eq!(desired.agents, held.agents, "an empty list removes");
    }
    for name in held.agents.keys().filter(|name| !desired.agents.contains_key(*name)) {
        let uninstalls = |item: &MessageItem<AgentOrder>| match item {
            MessageItem::Read(order) => order.name == *name && order.cmd == Cmd::Uninstall,
            MessageItem::Unreadable(_) => false,
        };
        let omitted = answer.complete && answer.removal_delay == Some(0);
        assert!(omitted || orders.iter().any(uninstalls), "{name} is removed without an order");
    }
    for order in desired.agents.values() {
        let (admitted, _) = admit_env(&order.spec.env, &["PATH".to_owned()]);
        assert!(!admitted.keys().any(|name| name.starts_with("LD_") || name.starts_with("AOPS_")));
    }
    // An accepted state is held, and is not accepted again each time.
    let kept = serde_json::to_vec(&desired).expect("a desired state can be written");
    assert_eq!(serde_json::from_slice::<DesiredState>(&kept).expect("and read"), desired);
    let again = evaluate(&desired, &answer, host);
    assert!(!matches!(again, AnswerOutcome::Accept(accepted) if accepted.new_lineage));
}

pub fn agent_toml(data: &[u8]) {
    let Some(manifest) = text(data).and_then(|text| launch::parse(text).ok()) else { return };
    let program = manifest.run.command.first().expect("it runs something");
    assert!(!program.starts_with(['/', '\\']) && !program.split(['/', '\\']).any(|part| part == ".."));
}

pub fn conf_toml(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let Ok(parsed) = Config::parse(text) else { return };
    for unknown in &parsed.unknown {
        assert!(unknown.line >= 1 && unknown.line <= text.lines().count() + 1, "{unknown}");
        let _ = unknown.to_string();
    }
    let again = |text: &str| Config::parse(text).expect("what was written can be read").config;
    assert_eq!(again(&render(&parsed.config)), parsed.config);
    assert_eq!(edit(text, &parsed.config, &parsed.config), text);
    let changed = Config { spm_max_mem: crate::core::units::Size(77 << 20), ..parsed.config.clone() };
    assert_eq!(again(&edit(text, &parsed.config, &changed)), changed);
}

/// The settings of the old platform.
pub fn conf_yml(data: &[u8]) {
    if let Some(text) = text(data) {
        let _ = import::parse(text);
    }
}

pub fn fleet_toml(data: &[u8]) {
    let Some(fleet) = text(data).and_then(|text| toml::from_str::<Fleet>(text).ok()) else { return };
    for (agent_id, hostname, os) in [("a", "web-1", Os::Linux), ("54321", "", Os::Windows)] {
        let host = HostFacts {
            agent_id: agent_id.parse().expect("it is an id"),
            hostname: hostname.to_owned(),
            os,
            arch: Arch::Amd64,
        };
        let desired = fleet.desired(&host);
        assert_eq!(desired, fleet.desired(&host));
        let names = fleet.names();
        assert!(desired.agents.keys().all(|name| names.contains(name)));
    }
}

/// A file of `state/`, `run/` or a release: the first byte selects which.
pub fn state(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 9 {
        0 => drop(reads_back::<DesiredState>(data)),
        1 => drop(reads_back::<InstallRecord>(data)),
        2 => drop(reads_back::<ManagerRecord>(data)),
        3 => drop(reads_back::<Epochs>(data)),
        4 => drop(reads_back::<Completed>(data)),
        5 => drop(reads_back::<ProcessRecord>(data)),
        6 => drop(reads_back::<Event>(data)),
        7 => drop(reads_back::<Heartbeat>(data)),
        _ => drop(reads_back::<Offer>(data)),
    }
}

/// Signature files, their trusted comments, and key files.
pub fn signature(data: &[u8]) {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    let package = FILE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        directory.keep().join("package.tar.zst")
    });
    let file = package.with_file_name("package.tar.zst.minisig");
    std::fs::write(&file, data).expect("it is ours");
    let _ = claimed(package);
    let Some(text) = text(data) else { return };
    for line in text.lines() {
        if let Ok(binding) = line.parse::<Binding>() {
            assert_eq!(binding.to_string().parse::<Binding>().as_ref(), Ok(&binding));
        }
    }
    if let Ok(keys) = Keys::parse(text) {
        assert_eq!(Keys::parse(&keys.texts().concat()).expect("what was written can be read"), keys);
    }
}

/// The header `Range`, after eight bytes with a file's size.
pub fn range(data: &[u8]) {
    let Some((size, header)) = data.split_first_chunk() else { return };
    let size = u64::from_le_bytes(*size);
    let Some(header) = text(header) else { return };
    if let RequestedRange::Range(range) = part(header, size) {
        assert!(range.start < range.end && range.end <= size, "{header} of {size}: {range:?}");
    }
}
