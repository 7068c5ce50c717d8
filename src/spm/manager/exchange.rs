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
const RECENT_BOOT: Duration = Duration::from_secs(300);
/// The limits of an interval that the gateway requests; an operator's have the same.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
const MAX_INTERVAL: Duration = Duration::from_secs(3600);
/// Difference in seconds from which a clock counts as wrong.
const MAX_CLOCK_OFFSET: u64 = 60;
/// Maximum length of an unknown command in an event.
const MAX_COMMAND_BYTES: usize = 64;

/// The connection to the gateway, and its state.
#[derive(Debug)]
pub(super) struct GatewayLink {
    uplink: Uplink,
    pub(super) status: GatewayStatus,
    /// Why the last answer was rejected, until one is accepted.
    rejected_answer: Option<String>,
    /// Commands already reported as unsupported.
    answered: BTreeSet<String>,
    interval: Duration,
    sequence: u64,
    failures: u32,
    /// A heartbeat has succeeded.
    has_connected: bool,
    /// Requests the current list again: another version of the manager may have rejected orders of it that this version supports.
    pub(super) requests_current_list: bool,
    /// `None` while a heartbeat is in progress.
    pub(super) next_heartbeat: Option<Instant>,
}

impl GatewayLink {
    /// Whether a heartbeat of this manager has succeeded.
    pub(super) fn has_connected(&self) -> bool {
        self.has_connected
    }

    /// Whether the last heartbeat failed.
    pub(super) fn is_failing(&self) -> bool {
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
        let after_boot = platform::uptime().is_some_and(|uptime| uptime < RECENT_BOOT) && is_known;
        let interval = config.heartbeat_interval.0;
        let status = GatewayStatus {
            endpoint: config.heartbeat_srv.first().map(ToString::to_string),
            ..GatewayStatus::default()
        };
        GatewayLink {
            uplink: Uplink::new(home, agent_id, config, inputs),
            status,
            rejected_answer: None,
            answered: BTreeSet::new(),
            next_heartbeat: Some(now + schedule::first_heartbeat(interval, after_boot, fastrand::f64())),
            interval,
            sequence: 0,
            failures: 0,
            has_connected: false,
            requests_current_list: false,
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
    offset.is_some_and(|offset| offset.unsigned_abs() > MAX_CLOCK_OFFSET)
}

/// Describes a wrong clock for an operator.
pub(super) fn describe_clock_offset(offset: i64) -> String {
    let side = if offset > 0 { "ahead of" } else { "behind" };
    format!("this host's clock is {} seconds {side} the gateway's; correct the wrong one", offset.unsigned_abs())
}

impl Manager {
    pub(super) fn send_heartbeat(&mut self) {
        self.gateway.sequence += 1;
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
            generation: if self.gateway.requests_current_list { 0 } else { self.orders.held.generation },
            sequence: self.gateway.sequence,
            agents: self.agents.values().map(report).collect(),
            events: self.journal.pending(),
            clock_offset_seconds: self.gateway.status.clock_offset_seconds,
            // Filled in by the sender, for the endpoint that it uses.
            trust: None,
        };
        self.gateway.next_heartbeat = None;
        if let Err(error) = self.gateway.uplink.send(Box::new(heartbeat)) {
            let why = format!("cannot start a thread: {error}");
            self.heartbeat_done(SendOutcome::Failed { why, refused: None, retry_after: None }, Instant::now());
        }
    }

    pub(super) fn heartbeat_done(&mut self, outcome: SendOutcome, now: Instant) {
        let outcome = match outcome {
            SendOutcome::Answered { passed_over, refused, endpoint, answer, clock_offset, certificate_end } => {
                if !self.gateway.status.connected {
                    tracing::info!(%endpoint, "connected to the gateway");
                }
                self.gateway.failures = 0;
                self.gateway.has_connected = true;
                self.gateway.requests_current_list = false;
                self.report_rejected_answer(refused.as_deref());
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
                self.check_clock(clock_offset);
                self.check_certificate(&endpoint, certificate_end);
                self.gateway.status = GatewayStatus {
                    endpoint: Some(endpoint.to_string()),
                    connected: true,
                    last_heartbeat: Some(timestamp()),
                    clock_offset_seconds: clock_offset.or(self.gateway.status.clock_offset_seconds),
                    last_error: None,
                };
                self.handle_answer(&answer, clock_offset, passed_over.as_deref());
                schedule::HeartbeatOutcome::Answered
            }
            SendOutcome::Failed { why, refused, retry_after } => {
                let why = cut(&why, MAX_MESSAGE_BYTES);
                self.gateway.failures = self.gateway.failures.saturating_add(1);
                if self.gateway.status.last_error.as_ref() != Some(&why) {
                    match &refused {
                        Some(_) => tracing::warn!(
                            error = why,
                            "the gateway's answer is rejected; the last desired state stays in effect"
                        ),
                        None => {
                            tracing::warn!(error = why, "the heartbeat failed; the last desired state stays in effect")
                        }
                    }
                }
                // Without any answer, an earlier rejection is not reported again.
                if refused.is_some() {
                    self.report_rejected_answer(refused.as_deref());
                }
                self.gateway.status.connected = false;
                self.gateway.status.last_error = Some(why);
                schedule::HeartbeatOutcome::Failed { times: self.gateway.failures, retry_after }
            }
        };
        self.gateway.next_heartbeat =
            Some(now + schedule::next_heartbeat(self.gateway.interval, outcome, fastrand::f64()));
    }

    /// Reports endpoints whose answers were rejected, once for each text.
    fn report_rejected_answer(&mut self, refused: Option<&str>) {
        if let Some(refused) = refused.filter(|refused| self.gateway.rejected_answer.as_deref() != Some(refused)) {
            self.journal.note("heartbeat", "refused", EventSubject::default(), refused);
        }
        self.gateway.rejected_answer = refused.map(str::to_owned);
    }

    /// Reports a clock that is wrong, and one that is right again.
    fn check_clock(&mut self, offset: Option<i64>) {
        let Some(offset) = offset else { return };
        let was_off = is_clock_off(self.gateway.status.clock_offset_seconds);
        if is_clock_off(Some(offset)) && !was_off {
            self.journal.note("clock", "failed", EventSubject::default(), describe_clock_offset(offset));
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
    fn check_certificate(&mut self, endpoint: &Endpoint, end: Option<u64>) {
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
    pub(super) fn handle_answer(&mut self, answer: &Answer, clock_offset: Option<i64>, passed_over: Option<&str>) {
        let requested = answer.interval.map(|seconds| Duration::from_secs(seconds).clamp(MIN_INTERVAL, MAX_INTERVAL));
        self.gateway.interval = requested.unwrap_or(self.config.heartbeat_interval.0);
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
        let orders_upgrade = answer.cmd.as_deref() == Some("upgrade");
        let unreadable = match &answer.manager {
            // The last readable order stays in effect.
            Some(MessageItem::Unreadable(unreadable)) => Some(format!(
                "cannot read the order for the manager: {}; its last readable order stays in effect",
                unreadable.why
            )),
            Some(MessageItem::Read(order)) => {
                self.upgrade_ordered(Some(order.clone()), orders_upgrade, Instant::now());
                None
            }
            None => {
                self.upgrade_ordered(None, orders_upgrade, Instant::now());
                None
            }
        };
        self.report_problem("manager", "refused", unreadable);
        if let Some(cmd) = answer.cmd.as_ref().filter(|_| !orders_upgrade) {
            let cmd = cut(cmd, MAX_COMMAND_BYTES);
            if self.gateway.answered.len() < 100 && self.gateway.answered.insert(cmd.clone()) {
                self.journal.note(
                    "command",
                    "unsupported",
                    EventSubject::default(),
                    format!("cannot run the command {cmd}: this version does not support it"),
                );
            }
        }
        self.handle_orders(answer, clock_offset, passed_over);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_document_states_the_limits_of_the_interval() {
        let words = format!("used from {} to {}", MIN_INTERVAL.as_secs(), MAX_INTERVAL.as_secs());
        assert!(crate::core::protocol::document().contains(&words), "{words}");
    }
}
