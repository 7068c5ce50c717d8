//! The conversation with the gateway: what goes up, and what becomes of the answer.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{LONGEST_INTERVAL, Manager, SHORTEST_INTERVAL};
use crate::core::desired::{self, Verdict};
use crate::core::generation::Clocks;
use crate::core::protocol::{Answer, Heartbeat, ManagerReport};
use crate::core::schedule;
use crate::core::status::GatewayStatus;
use crate::core::text::cut;
use crate::spm::agent::Agent;
use crate::spm::journal::{About, MAX_MESSAGE_BYTES};
use crate::spm::timestamp;
use crate::uplink::sender::Outcome;
use crate::{platform, store};

/// More than this, in seconds, is a clock that is wrong.
const CLOCKS_APART: u64 = 60;

/// Of a word that nobody here knows, so much is told, bytes.
const MAX_WORD_BYTES: usize = 64;
/// Of the orders of one answer that nobody here knows, so many are told one by one.
const UNSUPPORTED_TOLD: usize = 10;

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
            clock_offset_seconds: self.gateway.clock_offset_seconds,
        };
        self.next_heartbeat = None;
        if let Err(error) = self.uplink.send(Box::new(heartbeat)) {
            let why = format!("cannot start a thread: {error}");
            self.heartbeat_done(Outcome::Failed { why, refused: None, retry_after: None }, Instant::now());
        }
    }

    pub(super) fn heartbeat_done(&mut self, outcome: Outcome, now: Instant) {
        let outcome = match outcome {
            Outcome::Answered { passed_over, refused, endpoint, answer, clock_offset } => {
                if !self.gateway.connected {
                    tracing::info!(%endpoint, "the gateway answers");
                }
                self.failures = 0;
                self.tell_of_refused(refused.as_deref());
                match &refused {
                    Some(refused) => self
                        .problems
                        .insert("endpoint", cut(&format!("an endpoint is passed over: {refused}"), MAX_MESSAGE_BYTES)),
                    None => self.problems.remove("endpoint"),
                };
                self.compare_clocks(clock_offset);
                self.gateway = GatewayStatus {
                    endpoint: Some(endpoint.to_string()),
                    connected: true,
                    last_heartbeat: Some(timestamp()),
                    clock_offset_seconds: clock_offset.or(self.gateway.clock_offset_seconds),
                    last_error: None,
                };
                self.take_answer(&answer, clock_offset, passed_over.as_deref());
                schedule::Outcome::Answered
            }
            Outcome::Failed { why, refused, retry_after } => {
                let why = cut(&why, MAX_MESSAGE_BYTES);
                self.failures = self.failures.saturating_add(1);
                if self.gateway.last_error.as_ref() != Some(&why) {
                    tracing::warn!(
                        error = why,
                        "the gateway cannot be reached; what runs goes on as it was wanted last"
                    );
                }
                // Where nobody answers, what was refused before is no news.
                if refused.is_some() {
                    self.tell_of_refused(refused.as_deref());
                }
                self.gateway.connected = false;
                self.gateway.last_error = Some(why);
                schedule::Outcome::Failed { times: self.failures, retry_after }
            }
        };
        self.next_heartbeat = Some(now + schedule::next_heartbeat(self.interval, outcome, fastrand::f64()));
    }

    /// Tells of endpoints that answered and were not believed, once as long as they say the same.
    fn tell_of_refused(&mut self, refused: Option<&str>) {
        if let Some(refused) = refused.filter(|refused| self.refused_answer.as_deref() != Some(refused)) {
            self.journal.note("heartbeat", "refused", About::default(), refused);
        }
        self.refused_answer = refused.map(str::to_owned);
    }

    /// Tells of a list that would have removed everything, once as long as such lists come.
    fn tell_of_an_empty_list(&mut self, kept: usize) {
        if kept == 0 {
            self.problems.remove("empty");
            return;
        }
        let text = format!(
            "an empty list of sub-agents came as a complete one; it removes nothing, and the {kept} that were wanted stay: only an \
             explicit uninstall removes the last one"
        );
        if self.problems.get("empty") != Some(&text) {
            self.journal.note("desired", "refused", About::default(), text.as_str());
        }
        self.problems.insert("empty", text);
    }

    /// Tells of a clock that is wrong, and of one that is right again.
    fn compare_clocks(&mut self, offset: Option<i64>) {
        let Some(offset) = offset else { return };
        let was_off = is_clock_off(self.gateway.clock_offset_seconds);
        if is_clock_off(Some(offset)) && !was_off {
            self.journal.note("clock", "failed", About::default(), clock_words(offset));
        } else if was_off && !is_clock_off(Some(offset)) {
            self.journal.note("clock", "ok", About::default(), "this host's clock agrees with the gateway's again");
        }
    }

    /// `passed_over`: why who is asked first did not answer.
    pub(super) fn take_answer(&mut self, answer: &Answer, clock_offset: Option<i64>, passed_over: Option<&str>) {
        let told =
            answer.interval.map(|seconds| Duration::from_secs(seconds).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL));
        self.interval = told.unwrap_or(self.config.heartbeat_interval.0);
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
        if let Some(cmd) = &answer.cmd {
            let cmd = cut(cmd, MAX_WORD_BYTES);
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
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let clocks = Clocks::new(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), clock_offset);
        let judge = if passed_over.is_some() { desired::judge_stand_in } else { desired::judge };
        match judge(&self.desired, &present, answer, clocks) {
            Verdict::Unchanged => {
                let held = answer.lineage.as_deref().unwrap_or_default() == self.desired.lineage
                    && answer.generation == self.desired.generation;
                // What was refused in between is not asked for any more.
                if held {
                    self.problems.remove("desired");
                }
            }
            Verdict::Refuse(why) => {
                let why = cut(&why, MAX_MESSAGE_BYTES);
                if self.problems.get("desired") != Some(&why) {
                    self.journal.note("desired", "refused", About::default(), why.as_str());
                }
                self.problems.insert("desired", why);
            }
            Verdict::Take { desired, unsupported, new_lineage, led_back, kept } => {
                // On disk before it is acted on: what is begun must be known after a crash.
                if let Err(error) = store::save(&self.home.desired(), &*desired) {
                    let text = format!("the new desired state is not acted on: {error:#}");
                    self.journal.note("desired", "failed", About::default(), text.as_str());
                    self.problems.insert("desired", text);
                    return;
                }
                self.problems.remove("desired");
                if new_lineage {
                    tracing::warn!(lineage = desired.lineage, "another store counts the generations from now on");
                    if let Some(why) = passed_over {
                        tracing::warn!(
                            why,
                            "it stands in for another; what its list does not name stays until that changes"
                        );
                    }
                }
                if led_back {
                    let text = format!(
                        "generation {} takes the place of {}, which was further ahead than any clock explains",
                        desired.generation, self.desired.generation
                    );
                    self.journal.note("desired", "ok", About::default(), text);
                }
                tracing::info!(
                    generation = desired.generation,
                    agents = desired.agents.len(),
                    "a new desired state is taken"
                );
                self.tell_of_an_empty_list(kept);
                for (name, cmd) in unsupported.iter().take(UNSUPPORTED_TOLD) {
                    let about = About { agent: Some(name), version: None };
                    let text = format!("cannot {cmd} {name}: this version does not know how");
                    self.journal.note("command", "unsupported", about, text);
                }
                let untold = unsupported.len().saturating_sub(UNSUPPORTED_TOLD);
                if untold > 0 {
                    let text =
                        format!("{untold} more orders are such that this version does not know how to follow them");
                    self.journal.note("command", "unsupported", About::default(), text);
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
