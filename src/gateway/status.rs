//! `gateway status`: the gateway's and the hosts' state, from the gateway's files. It works whether or not the gateway is running.

use std::path::PathBuf;

use anyhow::Result;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use super::certificate;
use super::hosts::{self, Record};
use super::parts::GatewayParts;
use super::state::GatewayState;
use super::watch::{exposed_keys, exposed_tls};
use super::{GatewayDirectory, now_millis};
use crate::core::protocol::{AgentReport, AgentState, Event, ManagerReport};
use crate::output::result;
use crate::{lock, store};

/// A host is silent after this many missed heartbeats, but not before [`SILENT_AFTER_MILLIS`].
const SILENT_AFTER_HEARTBEATS: u64 = 3;
const SILENT_AFTER_MILLIS: u64 = 90_000;
/// How long another machine with the same agent id is reported after its last heartbeat.
const TWIN_MILLIS: u64 = 3_600_000;
/// The largest difference of clocks that is not reported, seconds.
const MAX_CLOCK_DIFFERENCE: u64 = 60;

/// The arguments of `gateway status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// The output of `gateway status --json`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct StatusReport {
    running: bool,
    /// Absent if the gateway has not run yet.
    gateway: Option<GatewaySection>,
    hosts: Vec<HostSection>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GatewaySection {
    pid: Option<u32>,
    listening: Option<String>,
    packages: usize,
    /// Files of the depot that are not on offer, with the reason.
    problems: std::collections::BTreeMap<String, String>,
    fleet: FleetSection,
    certificate: CertificateSection,
    /// The state of each part.
    parts: GatewayParts,
}

/// The served certificate, and the pins that hosts report.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateSection {
    /// When the chain expires, RFC 3339.
    end: Option<String>,
    /// The pin of the public key.
    pin: Option<String>,
    /// The pins of the next public keys.
    next: Vec<String>,
    /// The number of hosts that trust only their pins.
    pinned: usize,
    /// Of these, the number that lack one of the next keys.
    lacking_next: usize,
    /// Of these, the number that have not pinned the served public key, only this certificate or another key.
    lacking_present: usize,
    /// The number of hosts of older versions that do not report their pins; some of these pin the certificate itself.
    not_told: usize,
}

impl CertificateSection {
    fn new(status: certificate::CertificateStatus, records: &[Record]) -> CertificateSection {
        let reports = || records.iter().filter_map(|record| record.trust.as_ref()).filter(|trust| trust.is_pinned());
        let lacking = |pins: &[String]| reports().filter(|trust| !pins.iter().all(|pin| trust.accepts(pin))).count();
        CertificateSection {
            end: status.end.and_then(|end| rfc3339(end.checked_mul(1_000)?)),
            pinned: reports().count(),
            lacking_next: lacking(&status.next),
            lacking_present: lacking(status.pin.as_slice()),
            not_told: records.iter().filter(|record| record.trust.is_none()).count(),
            pin: status.pin,
            next: status.next,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FleetSection {
    generation: Option<u64>,
    /// RFC 3339.
    accepted: Option<String>,
    agents: usize,
    rules: usize,
    last_error: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HostSection {
    agent_id: String,
    instance_id: String,
    hostname: String,
    address: Option<String>,
    os: &'static str,
    arch: &'static str,
    manager: ManagerReport,
    /// RFC 3339.
    last_heartbeat: Option<String>,
    seconds_since_heartbeat: u64,
    /// The generation that was sent to the host, and the one that it had at its last heartbeat.
    generation: Option<u64>,
    held_generation: u64,
    agents: Vec<AgentReport>,
    running: usize,
    events: Vec<Event>,
    problems: Vec<String>,
}

pub(super) fn run(args: &StatusArgs) -> Result<()> {
    let directory = GatewayDirectory::initialized(&args.dir)?;
    let status = gather(&directory)?;
    if args.json {
        result!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(());
    }
    result!("{}", headline(&status));
    for line in part_lines(&status) {
        result!("{line}");
    }
    if status.hosts.is_empty() {
        result!("hosts     none has sent a heartbeat yet");
    } else {
        result!("\n{}", table(&status.hosts));
        // Below the table: messages are long, and a narrow column would break their paths.
        for host in &status.hosts {
            for problem in &host.problems {
                result!(" {} ({}): {problem}", host.hostname, host.agent_id);
            }
        }
    }
    Ok(())
}

pub(super) fn gather(directory: &GatewayDirectory) -> Result<StatusReport> {
    let running = lock::is_held(&directory.lock());
    let now = now_millis();
    let state: Option<GatewayState> = match store::load(&directory.state_file()) {
        // It may be damaged by a power cut, because it is not synced; a starting gateway writes it again.
        Err(error) if !error.chain().any(|cause| cause.is::<std::io::Error>()) => None,
        loaded => loaded?,
    };
    let mut records = hosts::load(&directory.hosts())?;
    records.sort_by(|a, b| (&a.hostname, &a.agent_id).cmp(&(&b.hostname, &b.agent_id)));
    let interval = state.as_ref().map_or(0, |state| state.fleet.interval);
    let silent_after = (interval * 1_000 * SILENT_AFTER_HEARTBEATS).max(SILENT_AFTER_MILLIS);
    let mut state = state;
    if let Some(state) = &mut state {
        // Checked here too, because a gateway that is not running does not check it.
        let GatewayState { parts, certificate, .. } = state;
        exposed_keys(directory).into_iter().for_each(|problem| parts.keys.add(problem));
        let current = certificate.warning(now / 1_000).into_iter().chain(exposed_tls(directory));
        current.for_each(|problem| parts.certificate.add(problem));
    }
    let gateway = state.map(|state| GatewaySection {
        certificate: CertificateSection::new(state.certificate, &records),
        parts: state.parts,
        pid: running.then_some(state.pid),
        listening: state.listening.filter(|_| running),
        packages: state.packages,
        problems: state.problems,
        fleet: FleetSection {
            generation: state.fleet.generation,
            accepted: state.fleet.generation.and_then(rfc3339),
            agents: state.fleet.agents,
            rules: state.fleet.rules,
            last_error: state.fleet.error,
        },
    });
    Ok(StatusReport {
        running,
        gateway,
        hosts: records.into_iter().map(|record| host(record, now, silent_after)).collect(),
    })
}

fn host(record: Record, now: u64, silent_after: u64) -> HostSection {
    let problems = problems(&record, now, silent_after);
    let is_running = |agent: &&AgentReport| matches!(agent.state, AgentState::Running | AgentState::Starting);
    HostSection {
        running: record.agents.iter().filter(is_running).count(),
        agent_id: record.agent_id.to_string(),
        instance_id: record.instance_id,
        hostname: record.hostname,
        address: record.address,
        os: record.os.as_str(),
        arch: record.arch.as_str(),
        manager: record.manager,
        last_heartbeat: rfc3339(record.last_heartbeat),
        seconds_since_heartbeat: now.saturating_sub(record.last_heartbeat) / 1_000,
        generation: record.given.map(|given| given.generation),
        held_generation: record.held,
        agents: record.agents,
        events: record.events.into(),
        problems,
    }
}

/// The problems of a host, for the operator.
fn problems(record: &Record, now: u64, silent_after: u64) -> Vec<String> {
    let mut problems = Vec::new();
    if now.saturating_sub(record.last_heartbeat) > silent_after {
        problems.push("silent".to_owned());
    }
    if let Some(twin) = record.twin.as_ref().filter(|twin| now.saturating_sub(twin.last_heartbeat) < TWIN_MILLIS) {
        problems.push(format!(
            "its agent id is also used by {}; install one of the two with another --agent-id",
            twin.hostname
        ));
    }
    if let Some(offset) = record.clock_offset_seconds.filter(|offset| offset.unsigned_abs() > MAX_CLOCK_DIFFERENCE) {
        let side = if offset > 0 { "ahead" } else { "behind" };
        problems.push(format!(
            "its clock is {} seconds {side}; synchronize it, for instance by NTP",
            offset.unsigned_abs()
        ));
    }
    problems.extend(record.missing.clone());
    for agent in &record.agents {
        let word = match agent.state {
            AgentState::Unhealthy | AgentState::Backoff | AgentState::Failed => agent.state.as_str(),
            AgentState::Starting
            | AgentState::Running
            | AgentState::Stopped
            | AgentState::Updating
            | AgentState::Unknown => continue,
        };
        match &agent.message {
            Some(message) => problems.push(format!("{} {word}: {message}", agent.name)),
            None => problems.push(format!("{} {word}", agent.name)),
        }
    }
    problems
}

fn headline(status: &StatusReport) -> String {
    let listening = status.gateway.as_ref().and_then(|gateway| gateway.listening.as_deref());
    match (status.running, listening) {
        (true, Some(listening)) => format!("gateway   running on {listening}"),
        (true, None) => "gateway   starting".to_owned(),
        (false, _) => "gateway   not running; this is its last state".to_owned(),
    }
}

/// A line for each part of the gateway, followed by its problems.
fn part_lines(status: &StatusReport) -> Vec<String> {
    let Some(gateway) = &status.gateway else { return Vec::new() };
    let GatewaySection { packages, fleet, certificate, parts, .. } = gateway;
    let mut lines = Vec::new();
    for (name, part) in parts.each() {
        let (label, what) = match name {
            "fleet" => ("fleet", fleet_line(fleet)),
            "depot" => ("depot", format!("{packages} packages")),
            "certificate" => ("tls", certificate_line(certificate)),
            // These are shown only if they have problems.
            other if part.ok => {
                debug_assert!(matches!(other, "keys" | "state"));
                continue;
            }
            other => (other, "has problems".to_owned()),
        };
        lines.push(format!("{label:<10}{what}"));
        lines.extend(part.problems.iter().map(|problem| format!("          {problem}")));
    }
    lines
}

fn fleet_line(fleet: &FleetSection) -> String {
    match &fleet.accepted {
        Some(accepted) => format!("{} sub-agents, {} rules, in effect since {accepted}", fleet.agents, fleet.rules),
        None => "none in effect".to_owned(),
    }
}

fn certificate_line(certificate: &CertificateSection) -> String {
    let CertificateSection { end, pin, next, pinned, lacking_next, lacking_present, not_told } = certificate;
    let Some(pin) = pin else { return "no certificate is served".to_owned() };
    let mut line = format!("expires on {}, key {pin}", end.as_deref().unwrap_or("an unknown date"));
    if *lacking_present > 0 {
        line += &format!("\n          {lacking_present} of {pinned} hosts with pins have not pinned this key");
    }
    if !next.is_empty() {
        line +=
            &format!("\n          next key {}: {lacking_next} of {pinned} hosts with pins lack it", next.join(", "));
        if *not_told > 0 {
            line += &format!("; {not_told} of an older version do not report it");
        }
    }
    line
}

fn table(hosts: &[HostSection]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["HOST", "AGENT ID", "SYSTEM", "MANAGER", "HEARTBEAT", "RUNNING"]);
    for host in hosts {
        table.add_row([
            host.hostname.clone(),
            host.agent_id.clone(),
            format!("{}/{}", host.os, host.arch),
            host.manager.version.to_string(),
            ago(host.seconds_since_heartbeat),
            format!("{}/{}", host.running, host.agents.len()),
        ]);
    }
    table
}

/// An age as `12s ago`, in one unit.
fn ago(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s ago"),
        120..=7_199 => format!("{}m ago", seconds / 60),
        7_200..=172_799 => format!("{}h ago", seconds / 3_600),
        _ => format!("{}d ago", seconds / 86_400),
    }
}

fn rfc3339(millis: u64) -> Option<String> {
    let timestamp = jiff::Timestamp::from_millisecond(i64::try_from(millis).ok()?).ok()?;
    Some(timestamp.to_string())
}
