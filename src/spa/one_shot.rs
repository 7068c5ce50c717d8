//! Modes in which the watchdog's program runs as a one-shot during an upgrade: a heartbeat, which needs the network, and the proof that the
//! new program works.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::config::Config;
use crate::control_socket::{ControlClient, Request};
use crate::core::desired::DesiredState;
use crate::core::protocol::{AgentReport, AgentState, Heartbeat, ManagerReport};
use crate::core::role::Role;
use crate::core::watch::silence::PING;
use crate::home::Home;
use crate::process::{launch, record};
use crate::uplink::sender::{SendOutcome, Sender};
use crate::{installation, platform, role, store};

/// How long the manager must answer pings.
const PROOF_DURATION: Duration = Duration::from_secs(10);
const PING_INTERVAL: Duration = Duration::from_millis(500);

/// Sends one heartbeat, as the manager would; succeeds if the gateway answers. The answer is not applied.
pub(super) fn probe(home: &Home) -> Result<ExitCode> {
    let config = Config::load(home)?.config;
    let agent_id =
        installation::agent_id(home)?.context("this host has no agent id; run `aops install --agent-id ID`")?;
    let manager = installation::ManagerRecord::load(home)?
        .context("the manager's release is not recorded; run `aops install`")?;
    let desired: DesiredState = store::load(&home.desired())?.unwrap_or_default();
    let pid = role::living(home, Role::Spm).map_or(0, |holder| holder.pid);
    let instance_id = installation::instance_id(home);
    let env_hash = |record: &record::ProcessRecord| {
        let ordered = desired.agents.get(&record.head.name).map(|order| &order.spec.env);
        let ordered = ordered.filter(|env| launch::env_hash(env) == record.head.env_hash)?;
        Some(launch::reported_env_hash(&agent_id, &instance_id, ordered))
    };
    let alive = record::all(home).into_iter().filter(record::ProcessRecord::is_alive);
    let agents: Vec<AgentReport> = alive
        .map(|record| AgentReport {
            env_hash: env_hash(&record),
            name: record.head.name,
            version: Some(record.head.version),
            state: AgentState::Running,
            pid: Some(record.pid),
            restarts: record.head.restarts,
            message: None,
        })
        .collect();
    let mut heartbeat = Heartbeat {
        agent_id: agent_id.clone(),
        instance_id,
        hostname: gethostname::gethostname().to_string_lossy().into_owned(),
        os: platform::OS,
        arch: platform::ARCH,
        manager: ManagerReport {
            version: manager.version,
            pid,
            uptime_seconds: 0,
            memory_bytes: platform::memory_bytes(pid).unwrap_or(0),
        },
        lineage: Some(desired.lineage).filter(|lineage| !lineage.is_empty()),
        generation: desired.generation,
        sequence: 0,
        agents,
        events: Vec::new(),
        clock_offset_seconds: None,
        trust: None,
    };
    match Sender::new(home, &agent_id, Arc::new(config)).send(&mut heartbeat) {
        SendOutcome::Answered { .. } => Ok(ExitCode::SUCCESS),
        SendOutcome::Failed { why, .. } => bail!("cannot send a heartbeat: {why}"),
    }
}

/// Proves that this program can run as the watchdog: it reads the settings, and the manager answers its pings for a while. Takes no lock
/// and supervises nothing.
pub(super) fn prove(home: &Home) -> Result<ExitCode> {
    role::require_installation(home)?;
    Config::load(home)?;
    let began = Instant::now();
    let mut client = ControlClient::open(home, PING)?.context("the manager does not accept connections")?;
    while began.elapsed() < PROOF_DURATION {
        client.request(&Request::Ping).context("the manager does not answer")?;
        platform::pause(PING_INTERVAL);
    }
    Ok(ExitCode::SUCCESS)
}
