//! The conversation with the gateway: what goes up, and what becomes of the answer.

use std::time::{Duration, Instant};

use super::{LONGEST_INTERVAL, Manager, SHORTEST_INTERVAL};
use crate::core::desired::{self, Verdict};
use crate::core::protocol::{Answer, Heartbeat, ManagerReport};
use crate::core::schedule;
use crate::core::status::GatewayStatus;
use crate::spm::agent::Agent;
use crate::spm::heartbeats::Outcome;
use crate::spm::journal::About;
use crate::spm::timestamp;
use crate::{platform, store};

impl Manager {
    pub(super) fn send_heartbeat(&mut self) {
        self.sequence += 1;
        let heartbeat = Heartbeat {
            agent_id: self.agent_id.clone(),
            instance_id: self.instance_id.clone(),
            hostname: gethostname::gethostname().to_string_lossy().into_owned(),
            os: platform::OS,
            arch: platform::ARCH,
            manager: ManagerReport {
                version: self.version.clone(),
                pid: std::process::id(),
                uptime_seconds: self.started.elapsed().as_secs(),
                memory_bytes: platform::memory_bytes(std::process::id()).unwrap_or(0),
            },
            lineage: Some(self.desired.lineage.clone()).filter(|lineage| !lineage.is_empty()),
            generation: self.desired.generation,
            sequence: self.sequence,
            agents: self.agents.values().map(Agent::report).collect(),
            events: self.journal.pending(),
        };
        self.next_heartbeat = None;
        if let Err(error) = self.uplink.send(Box::new(heartbeat)) {
            let why = format!("cannot start a thread: {error}");
            self.heartbeat_done(Outcome::Failed { why, retry_after: None }, Instant::now());
        }
    }

    pub(super) fn heartbeat_done(&mut self, outcome: Outcome, now: Instant) {
        let outcome = match outcome {
            Outcome::Answered { endpoint, answer } => {
                if !self.gateway.connected {
                    tracing::info!(%endpoint, "the gateway answers");
                }
                self.failures = 0;
                self.gateway = GatewayStatus {
                    endpoint: Some(endpoint.to_string()),
                    connected: true,
                    last_heartbeat: Some(timestamp()),
                    last_error: None,
                };
                self.take_answer(&answer);
                schedule::Outcome::Answered
            }
            Outcome::Failed { why, retry_after } => {
                self.failures = self.failures.saturating_add(1);
                if self.gateway.last_error.as_ref() != Some(&why) {
                    tracing::warn!(
                        error = why,
                        "the gateway cannot be reached; what runs goes on as it was wanted last"
                    );
                }
                self.gateway.connected = false;
                self.gateway.last_error = Some(why);
                schedule::Outcome::Failed { times: self.failures, retry_after }
            }
        };
        self.next_heartbeat = Some(now + schedule::next_heartbeat(self.interval, outcome, fastrand::f64()));
    }

    pub(super) fn take_answer(&mut self, answer: &Answer) {
        if let Some(seconds) = answer.interval {
            self.interval = Duration::from_secs(seconds).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL);
        }
        if let Some(id) = answer.ack {
            self.journal.acknowledge(id);
        }
        match &answer.error_message {
            Some(message) => drop(self.problems.insert("gateway", format!("the gateway says: {message}"))),
            None => drop(self.problems.remove("gateway")),
        }
        if let Some(cmd) = &answer.cmd {
            let wanted = answer.manager.as_ref().map(|order| format!(" to {}", order.version)).unwrap_or_default();
            if self.answered.len() < 100 && self.answered.insert(format!("{cmd}{wanted}")) {
                self.journal.note(
                    "command",
                    "unsupported",
                    About::default(),
                    format!("cannot {cmd}{wanted}: this version does not know how"),
                );
            }
        }
        let present = self.agents.keys().cloned().collect();
        match desired::judge(&self.desired, &present, answer) {
            Verdict::Unchanged => {
                let held = answer.lineage.as_deref().unwrap_or_default() == self.desired.lineage
                    && answer.generation == self.desired.generation;
                // What was refused in between is not asked for any more.
                if held {
                    self.problems.remove("desired");
                }
            }
            Verdict::Refuse(why) => {
                if self.problems.get("desired") != Some(&why) {
                    self.journal.note("desired", "refused", About::default(), why.as_str());
                }
                self.problems.insert("desired", why);
            }
            Verdict::Take { desired, unsupported, new_lineage } => {
                // On disk before it is acted on: what is begun must be known after a crash.
                if let Err(error) = store::save(&self.home.state_file("desired.json"), &*desired) {
                    let text = format!("the new desired state is not acted on: {error:#}");
                    self.journal.note("desired", "failed", About::default(), text.as_str());
                    self.problems.insert("desired", text);
                    return;
                }
                self.problems.remove("desired");
                if new_lineage {
                    tracing::warn!(lineage = desired.lineage, "another store counts the generations from now on");
                }
                tracing::info!(
                    generation = desired.generation,
                    agents = desired.agents.len(),
                    "a new desired state is taken"
                );
                for (name, cmd) in unsupported {
                    let about = About { agent: Some(&name), version: None };
                    self.journal.note(
                        "command",
                        "unsupported",
                        about,
                        format!("cannot {cmd} {name}: this version does not know how"),
                    );
                }
                self.desired = *desired;
                self.agents.values_mut().for_each(Agent::release_hold);
                for (name, agent) in &mut self.agents {
                    agent.keep_staging_only(self.desired.agents.get(name).map(|order| &order.version));
                }
                self.trim_cache(Instant::now());
            }
        }
    }
}
