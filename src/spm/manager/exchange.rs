//! The conversation with the gateway: what goes up, and what becomes of the answer.

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

/// A host that booted so recently comes back together with many others.
const JUST_BOOTED: Duration = Duration::from_secs(300);
/// What a gateway may ask for, as an operator may.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);
/// More than this, in seconds, is a clock that is wrong.
const CLOCKS_APART: u64 = 60;
/// Of a word that nobody here knows, so much is told, bytes.
const MAX_WORD_BYTES: usize = 64;

/// The line to the gateway.
#[derive(Debug)]
pub(super) struct GatewayLink {
    uplink: Uplink,
    pub(super) gateway: GatewayStatus,
    /// Why the last answer was not believed, until one is.
    refused_answer: Option<String>,
    /// Commands already answered as unsupported.
    answered: BTreeSet<String>,
    interval: Duration,
    sequence: u64,
    failures: u32,
    /// One has succeeded.
    has_connected: bool,
    /// The list that is held is asked for once more: another version of the manager may have refused orders of it that this one follows.
    pub(super) asks_anew: bool,
    /// `None` while one is under way.
    pub(super) next_heartbeat: Option<Instant>,
}

impl GatewayLink {
    /// Whether a heartbeat of this manager has succeeded.
    pub(super) fn has_connected(&self) -> bool {
        self.has_connected
    }

    /// Whether the last one did not.
    pub(super) fn fails(&self) -> bool {
        self.failures > 0
    }

    /// `is_known`: the host holds a desired state, and may be one of many that come back together.
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

    /// The settings have changed: they may be what kept the gateway from being reached.
    pub(super) fn configure(&mut self, config: &Config) {
        self.interval = config.heartbeat_interval.0;
        self.uplink.configure(config);
        self.failures = 0;
        self.next_heartbeat = self.next_heartbeat.map(|_| Instant::now());
    }
}

/// Whether a clock is so far off that somebody should look at it.
pub(super) fn is_clock_off(offset: Option<i64>) -> bool {
    offset.is_some_and(|offset| offset.unsigned_abs() > CLOCKS_APART)
}

/// How far off a clock is, for a person to read.
pub(super) fn clock_words(offset: i64) -> String {
    let side = if offset > 0 { "ahead of" } else { "behind" };
    format!("this host's clock is {} seconds {side} the gateway's; set whichever is wrong", offset.unsigned_abs())
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
            // The sender knows it, for the endpoint that it sends to.
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
                    tracing::info!(%endpoint, "the gateway answers");
                }
                self.line.failures = 0;
                self.line.has_connected = true;
                self.line.asks_anew = false;
                self.tell_of_refused(refused.as_deref());
                match &refused {
                    Some(refused) => self
                        .problems
                        .insert("endpoint", cut(&format!("an endpoint is passed over: {refused}"), MAX_MESSAGE_BYTES)),
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
                            "the gateway's answer is refused; the last orders stay in force"
                        ),
                        None => tracing::warn!(error = why, "the heartbeat failed; the last orders stay in force"),
                    }
                }
                // Where nobody answers, what was refused before is no news.
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

    /// Tells of endpoints that answered and were not believed, once as long as they say the same.
    fn tell_of_refused(&mut self, refused: Option<&str>) {
        if let Some(refused) = refused.filter(|refused| self.line.refused_answer.as_deref() != Some(refused)) {
            self.journal.note("heartbeat", "refused", EventSubject::default(), refused);
        }
        self.line.refused_answer = refused.map(str::to_owned);
    }

    /// Tells of a clock that is wrong, and of one that is right again.
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

    /// Tells of a gateway's certificate that ends soon, and of one that was renewed in time.
    fn watch_certificate(&mut self, endpoint: &Endpoint, end: Option<u64>) {
        let now = unix_now();
        let date = end.and_then(|end| jiff::Timestamp::from_second(i64::try_from(end).ok()?).ok());
        let text = match (end.map(|end| validity(end, now)), date) {
            (Some(Validity::Ending { .. }), Some(date)) => {
                format!(
                    "the certificate of {endpoint}, or of who issued it, expires on {date}; have the gateway's operator renew it"
                )
            }
            (Some(Validity::Ended), Some(date)) => format!(
                "the certificate of {endpoint}, or of who issued it, expired on {date}; have the gateway's operator renew it"
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

    /// `passed_over`: why who is asked first did not answer.
    pub(super) fn take_answer(&mut self, answer: &Answer, clock_offset: Option<i64>, passed_over: Option<&str>) {
        let told =
            answer.interval.map(|seconds| Duration::from_secs(seconds).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL));
        self.line.interval = told.unwrap_or(self.config.heartbeat_interval.0);
        if let Some(id) = answer.ack {
            self.journal.acknowledge(id);
        }
        match &answer.error_message {
            Some(message) => {
                let text = cut(&format!("the gateway says: {message}"), MAX_MESSAGE_BYTES);
                self.problems.insert("gateway", text);
            }
            None => drop(self.problems.remove("gateway")),
        }
        let wants = answer.cmd.as_deref() == Some("upgrade");
        let unreadable = match &answer.manager {
            // What was ordered before stays.
            Some(MessageItem::Unreadable(unreadable)) => Some(format!(
                "cannot read the order for the manager: {}; its release stays as it was ordered before",
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
                    format!("cannot {cmd}: this version does not know how"),
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
    fn the_document_names_the_bounds_of_the_interval() {
        let words = format!("used from {} to {}", SHORTEST_INTERVAL.as_secs(), LONGEST_INTERVAL.as_secs());
        assert!(crate::core::protocol::document().contains(&words), "{words}");
    }
}
