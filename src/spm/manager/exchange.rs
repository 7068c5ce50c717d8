//! The exchange with the gateway: heartbeats are built and sent, and their answers handled.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::Manager;
use crate::config::Config;
use crate::core::certificate::{Validity, validity};
use crate::core::item::MessageItem;
use crate::core::model::AgentId;
use crate::core::protocol::{Answer, Heartbeat, ManagerReport};
use crate::core::schedule;
use crate::core::status::GatewayStatus;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::endpoint::Endpoint;
use crate::home::Home;
use crate::platform;
use crate::spm::agent::SubAgent;
use crate::spm::heartbeats::Uplink;
use crate::spm::input::Inputs;
use crate::spm::journal::EventSubject;
use crate::spm::{timestamp, unix_now};
use crate::uplink::sender::SendOutcome;

/// After a recent boot the host may be one of many that boot at the same time: its first heartbeat is delayed at random.
const JUST_BOOTED: Duration = Duration::from_secs(300);
/// The limits of an interval that the gateway requests; an operator's have the same.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);
/// Difference in seconds from which a clock counts as wrong.
const CLOCKS_APART: u64 = 60;
/// Maximum length of an unknown command in an event.
const MAX_WORD_BYTES: usize = 64;

/// The connection to the gateway, and its state.
#[derive(Debug)]
pub(super) struct GatewayLink {
    uplink: Uplink,
    pub(super) gateway: GatewayStatus,
    /// Why the last answer was rejected, until one is accepted.
    refused_answer: Option<String>,
    /// Commands already reported as unsupported.
    answered: BTreeSet<String>,
    interval: Duration,
    sequence: u64,
    failures: u32,
    /// A heartbeat has succeeded.
    has_connected: bool,
    /// Requests the current list again: another version of the manager may have rejected orders of it that this version supports.
    pub(super) asks_anew: bool,
    /// `None` while a heartbeat is in progress.
    pub(super) next_heartbeat: Option<Instant>,
}

impl GatewayLink {
    /// Whether a heartbeat of this manager has succeeded.
    pub(super) fn has_connected(&self) -> bool {
        self.has_connected
    }

    /// Whether the last heartbeat failed.
    pub(super) fn fails(&self) -> bool {
        self.failures > 0
    }

    /// `is_known`: the host has a desired state, so it may be one of many that boot at the same time.
    pub(super) fn new(
        home: &Home,
        agent_id: &AgentId,
        config: &Config,
        is_known: bool,
        inputs: &Inputs,
        now: Instant,
    ) -> GatewayLink {
        let after_boot = platform::uptime().is_some_and(|uptime| uptime < JUST_BOOTED) && is_known;
        let interval = config.heartbeat_interval.0;
        let gateway = GatewayStatus {
            endpoint: config.heartbeat_srv.first().map(ToString::to_string),
            ..GatewayStatus::default()
        };
        GatewayLink {
            uplink: Uplink::new(home, agent_id, config, inputs),
            gateway,
            refused_answer: None,
            answered: BTreeSet::new(),
            next_heartbeat: Some(now + schedule::first_heartbeat(interval, after_boot, fastrand::f64())),
            interval,
            sequence: 0,
            failures: 0,
            has_connected: false,
            asks_anew: false,
        }
    }

    /// Applies changed settings, and sends a heartbeat now: the old settings may be why the gateway was unreachable.
    pub(super) fn configure(&mut self, config: &Config) {
        self.interval = config.heartbeat_interval.0;
        self.uplink.configure(config);
        self.failures = 0;
        self.next_heartbeat = self.next_heartbeat.map(|_| Instant::now());
    }
}

/// Whether a clock is off by so much that an operator should know.
pub(super) fn is_clock_off(offset: Option<i64>) -> bool {
    offset.is_some_and(|offset| offset.unsigned_abs() > CLOCKS_APART)
}

/// Describes a wrong clock for an operator.
pub(super) fn clock_words(offset: i64) -> String {
    let side = if offset > 0 { "ahead of" } else { "behind" };
    format!("this host's clock is {} seconds {side} the gateway's; correct the wrong one", offset.unsigned_abs())
}

impl Manager {
    pub(super) fn send_heartbeat(&mut self) {
        self.line.sequence += 1;
        let report = |agent: &SubAgent| agent.report(&self.identity.agent_id, &self.identity.instance_id);
        let heartbeat = Heartbeat {
            agent_id: self.identity.agent_id.clone(),
            instance_id: self.identity.instance_id.clone(),
            hostname: gethostname::gethostname().to_string_lossy().into_owned(),
            os: platform::OS,
            arch: platform::ARCH,
            manager: ManagerReport {
                version: self.identity.version.clone(),
                pid: std::process::id(),
                uptime_seconds: self.identity.started.elapsed().as_secs(),
                memory_bytes: platform::memory_bytes(std::process::id()).unwrap_or(0),
            },
            lineage: Some(self.orders.held.lineage.clone()).filter(|lineage| !lineage.is_empty()),
            generation: if self.line.asks_anew { 0 } else { self.orders.held.generation },
            sequence: self.line.sequence,
            agents: self.agents.values().map(report).collect(),
            events: self.journal.pending(),
            clock_offset_seconds: self.line.gateway.clock_offset_seconds,
            // Filled in by the sender, for the endpoint that it uses.
            trust: None,
        };
        self.line.next_heartbeat = None;
        if let Err(error) = self.line.uplink.send(Box::new(heartbeat)) {
            let why = format!("cannot start a thread: {error}");
            self.heartbeat_done(SendOutcome::Failed { why, refused: None, retry_after: None }, Instant::now());
        }
    }

    pub(super) fn heartbeat_done(&mut self, outcome: SendOutcome, now: Instant) {
        let outcome = match outcome {
            SendOutcome::Answered { passed_over, refused, endpoint, answer, clock_offset, certificate_end } => {
                if !self.line.gateway.connected {
                    tracing::info!(%endpoint, "connected to the gateway");
                }
                self.line.failures = 0;
                self.line.has_connected = true;
                self.line.asks_anew = false;
                self.tell_of_refused(refused.as_deref());
                match &refused {
                    Some(refused) => self.problems.insert(
                        "endpoint",
                        cut(
                            &format!("an endpoint is skipped because its answer was rejected: {refused}"),
                            MAX_MESSAGE_BYTES,
                        ),
                    ),
                    None => self.problems.remove("endpoint"),
                };
                self.compare_clocks(clock_offset);
                self.watch_certificate(&endpoint, certificate_end);
                self.line.gateway = GatewayStatus {
                    endpoint: Some(endpoint.to_string()),
                    connected: true,
                    last_heartbeat: Some(timestamp()),
                    clock_offset_seconds: clock_offset.or(self.line.gateway.clock_offset_seconds),
                    last_error: None,
                };
                self.take_answer(&answer, clock_offset, passed_over.as_deref());
                schedule::HeartbeatOutcome::Answered
            }
            SendOutcome::Failed { why, refused, retry_after } => {
                let why = cut(&why, MAX_MESSAGE_BYTES);
                self.line.failures = self.line.failures.saturating_add(1);
                if self.line.gateway.last_error.as_ref() != Some(&why) {
                    match &refused {
                        Some(_) => tracing::warn!(
                            error = why,
                            "the gateway's answer is rejected; the last desired state stays in force"
                        ),
                        None => {
                            tracing::warn!(error = why, "the heartbeat failed; the last desired state stays in force")
                        }
                    }
                }
                // Without any answer, an earlier rejection is not reported again.
                if refused.is_some() {
                    self.tell_of_refused(refused.as_deref());
                }
                self.line.gateway.connected = false;
                self.line.gateway.last_error = Some(why);
                schedule::HeartbeatOutcome::Failed { times: self.line.failures, retry_after }
            }
        };
        self.line.next_heartbeat = Some(now + schedule::next_heartbeat(self.line.interval, outcome, fastrand::f64()));
    }

    /// Reports endpoints whose answers were rejected, once for each text.
    fn tell_of_refused(&mut self, refused: Option<&str>) {
        if let Some(refused) = refused.filter(|refused| self.line.refused_answer.as_deref() != Some(refused)) {
            self.journal.note("heartbeat", "refused", EventSubject::default(), refused);
        }
        self.line.refused_answer = refused.map(str::to_owned);
    }

    /// Reports a clock that is wrong, and one that is right again.
    fn compare_clocks(&mut self, offset: Option<i64>) {
        let Some(offset) = offset else { return };
        let was_off = is_clock_off(self.line.gateway.clock_offset_seconds);
        if is_clock_off(Some(offset)) && !was_off {
            self.journal.note("clock", "failed", EventSubject::default(), clock_words(offset));
        } else if was_off && !is_clock_off(Some(offset)) {
            self.journal.note(
                "clock",
                "ok",
                EventSubject::default(),
                "this host's clock agrees with the gateway's again",
            );
        }
    }

    /// Reports a certificate of the gateway that expires soon, and its renewal.
    fn watch_certificate(&mut self, endpoint: &Endpoint, end: Option<u64>) {
        let now = unix_now();
        let date = end.and_then(|end| jiff::Timestamp::from_second(i64::try_from(end).ok()?).ok());
        let text = match (end.map(|end| validity(end, now)), date) {
            (Some(Validity::Ending { .. }), Some(date)) => {
                format!(
                    "the certificate of {endpoint}, or of its issuer, expires on {date}; have the gateway's operator renew it"
                )
            }
            (Some(Validity::Ended), Some(date)) => format!(
                "the certificate of {endpoint}, or of its issuer, expired on {date}; have the gateway's operator renew it"
            ),
            _ => {
                if self.problems.remove("certificate").is_some() {
                    let text = format!("the certificate of {endpoint} was renewed");
                    self.journal.note("certificate", "ok", EventSubject::default(), text);
                }
                return;
            }
        };
        if self.problems.get("certificate") != Some(&text) {
            self.journal.note("certificate", "failed", EventSubject::default(), text.as_str());
            self.problems.insert("certificate", text);
        }
    }

    /// `passed_over`: why the preferred endpoint did not answer.
    pub(super) fn take_answer(&mut self, answer: &Answer, clock_offset: Option<i64>, passed_over: Option<&str>) {
        let told =
            answer.interval.map(|seconds| Duration::from_secs(seconds).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL));
        self.line.interval = told.unwrap_or(self.config.heartbeat_interval.0);
        if let Some(id) = answer.ack {
            self.journal.acknowledge(id);
        }
        match &answer.error_message {
            Some(message) => {
                let text = cut(&format!("the gateway reports: {message}"), MAX_MESSAGE_BYTES);
                self.problems.insert("gateway", text);
            }
            None => drop(self.problems.remove("gateway")),
        }
        let wants = answer.cmd.as_deref() == Some("upgrade");
        let unreadable = match &answer.manager {
            // The last readable order stays in force.
            Some(MessageItem::Unreadable(unreadable)) => Some(format!(
                "cannot read the order for the manager: {}; its last readable order stays in force",
                unreadable.why
            )),
            Some(MessageItem::Read(order)) => {
                self.upgrade_ordered(Some(order.clone()), wants, Instant::now());
                None
            }
            None => {
                self.upgrade_ordered(None, wants, Instant::now());
                None
            }
        };
        self.tell_of("manager", "refused", unreadable);
        if let Some(cmd) = answer.cmd.as_ref().filter(|_| !wants) {
            let cmd = cut(cmd, MAX_WORD_BYTES);
            if self.line.answered.len() < 100 && self.line.answered.insert(cmd.clone()) {
                self.journal.note(
                    "command",
                    "unsupported",
                    EventSubject::default(),
                    format!("cannot run the command {cmd}: this version does not support it"),
                );
            }
        }
        self.take_orders(answer, clock_offset, passed_over);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_document_states_the_limits_of_the_interval() {
        let words = format!("used from {} to {}", SHORTEST_INTERVAL.as_secs(), LONGEST_INTERVAL.as_secs());
        assert!(crate::core::protocol::document().contains(&words), "{words}");
    }
}
