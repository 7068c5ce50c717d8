//! The desired state of the sub-agents: accepted from an answer, written to disk before it is in effect, and applied.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Manager;
use crate::core::agent::AgentEvent;
use crate::core::desired::{self, AcceptedState, AnswerContext, AnswerOutcome, DesiredState, RejectedOrder};
use crate::core::generation::Clocks;
use crate::core::model::AgentName;
use crate::core::protocol::Answer;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::platform;
use crate::spm::disk::StateFile;
use crate::spm::journal::EventSubject;

/// Number of rejected orders of one answer that are reported one by one.
const MAX_REPORTED_REJECTIONS: usize = 10;
/// Number of sub-agents named in one message.
const MAX_NAMED: usize = 5;
/// Interval in seconds for writing the omission times, or a tenth of the removal delay if longer. A crash loses at most this much waiting
/// time.
const OMISSION_WRITE_INTERVAL: u64 = 10;

/// The desired state, and its file.
#[derive(Debug)]
pub(super) struct DesiredStateStore {
    pub(super) held: DesiredState,
    file: StateFile<DesiredState>,
    /// The next desired state, which is in effect when this revision of the file is durable.
    pending: Option<(u64, Box<AcceptedState>)>,
    /// Until when the omission times are counted. Monotonic and only while a manager runs: setting the clock cannot shorten the delay.
    counted_until: Instant,
    /// Seconds counted, but not yet written.
    unwritten: u64,
    /// Removal delay in seconds from the last answer; before the first answer nothing is removed.
    delay: Option<u64>,
}

impl DesiredStateStore {
    pub(super) fn new(held: DesiredState, file: StateFile<DesiredState>, now: Instant) -> DesiredStateStore {
        DesiredStateStore { held, file, pending: None, counted_until: now, unwritten: 0, delay: None }
    }

    /// The state that answers are compared with: the one being written, or else the one in effect.
    fn newest(&self) -> &DesiredState {
        self.pending.as_ref().map_or(&self.held, |(_, taken)| &taken.desired)
    }

    /// Counts the omission time since the last count, in whole seconds.
    fn count(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.counted_until).as_secs();
        self.counted_until += Duration::from_secs(seconds);
        if !self.held.omitted().is_empty() {
            self.held.count_omission(seconds);
            self.unwritten = self.unwritten.saturating_add(seconds);
        }
    }

    /// Seconds until a sub-agent is removed because the list omits it; `None`: the list has it.
    pub(super) fn removed_in(&self, name: &AgentName, now: Instant) -> Option<u64> {
        let so_far = self.held.omitted().get(name)?;
        let so_far = so_far.saturating_add(now.saturating_duration_since(self.counted_until).as_secs());
        Some(self.delay.unwrap_or(desired::REMOVAL_DELAY).saturating_sub(so_far))
    }

    /// Writes pending changes before the process exits.
    pub(super) async fn finish(mut self) {
        self.count(Instant::now());
        let last = (self.unwritten > 0 && self.pending.is_none()).then_some(self.held);
        self.file.finish(last).await;
    }
}

impl Manager {
    /// Handles the orders of an answer. `passed_over`: why the preferred endpoint did not answer.
    pub(super) fn handle_orders(&mut self, answer: &Answer, clock_offset: Option<i64>, passed_over: Option<&str>) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let present = self.agents.keys().cloned().collect();
        let host = AnswerContext {
            os: platform::OS,
            arch: platform::ARCH,
            clocks: Clocks::new(millis, clock_offset),
            present: &present,
            from_fallback: passed_over.is_some(),
        };
        let delay = desired::removal_delay(answer);
        self.orders.count(Instant::now());
        self.orders.delay = Some(delay);
        match desired::evaluate(self.orders.newest(), answer, host) {
            AnswerOutcome::Unchanged => {
                let held = answer.lineage.as_deref().unwrap_or_default() == self.orders.held.lineage
                    && answer.generation == self.orders.held.generation;
                if held {
                    // A list that was rejected in the meantime is not offered any more.
                    self.problems.remove("desired");
                    self.remove_omitted(delay);
                }
            }
            AnswerOutcome::Reject(why) => {
                let why = cut(&why, MAX_MESSAGE_BYTES);
                if self.problems.get("desired") != Some(&why) {
                    self.journal.note("desired", "refused", EventSubject::default(), why.as_str());
                }
                self.problems.insert("desired", why);
            }
            // Written to disk before it is applied: after a crash the manager must know what it started.
            AnswerOutcome::Accept(taken) => self.store_orders(taken, passed_over),
        }
    }

    /// Handles an answer with the list in effect: sub-agents omitted for the whole delay are removed.
    fn remove_omitted(&mut self, delay: u64) {
        if self.orders.pending.is_some() {
            return;
        }
        if let Some(desired) = self.orders.held.without_omitted(delay) {
            let taken = AcceptedState { desired, new_lineage: false, moved_back: false, kept: 0 };
            return self.store_orders(Box::new(taken), None);
        }
        if self.orders.unwritten >= OMISSION_WRITE_INTERVAL.max(delay / 10) {
            self.orders.unwritten = 0;
            self.orders.file.save(&self.inputs, self.orders.held.clone());
        }
    }

    /// Starts writing a new desired state; it is in effect when the write ends.
    fn store_orders(&mut self, taken: Box<AcceptedState>, passed_over: Option<&str>) {
        if let Some(why) = passed_over.filter(|_| taken.new_lineage) {
            tracing::warn!(
                why,
                "a fallback endpoint answered with the desired state of a different gateway (its lineage differs); sub-agents missing in its list are kept until its list changes"
            );
        }
        self.orders.unwritten = 0;
        let revision = self.orders.file.save(&self.inputs, taken.desired.clone());
        self.orders.pending = Some((revision, taken));
    }

    pub(super) fn orders_saved(&mut self, revision: u64, result: Result<(), String>, now: Instant) {
        self.orders.file.saved(&self.inputs);
        let Some((_, taken)) = self.orders.pending.take_if(|(pending, _)| *pending <= revision) else { return };
        match result {
            Ok(()) => self.apply(*taken, now),
            Err(error) => {
                let text = format!("cannot store the new desired state, so it is not applied: {error}");
                self.journal.note("desired", "failed", EventSubject::default(), text.as_str());
                self.problems.insert("desired", text);
            }
        }
    }

    /// Applies a desired state that is durable.
    fn apply(&mut self, taken: AcceptedState, now: Instant) {
        let AcceptedState { desired, new_lineage, moved_back, kept } = taken;
        self.problems.remove("desired");
        if new_lineage {
            tracing::warn!(lineage = desired.lineage, "the desired state is from another gateway: its lineage changed");
        }
        if moved_back {
            let text = format!(
                "generation {} replaces generation {}, which was too far ahead for a wrong clock to explain",
                desired.generation, self.orders.held.generation
            );
            self.journal.note("desired", "ok", EventSubject::default(), text);
        }
        tracing::info!(
            generation = desired.generation,
            agents = desired.agents.len(),
            "a new desired state is in effect"
        );
        self.report_empty_list(kept);
        let before = std::mem::replace(&mut self.orders.held, desired);
        self.orders.counted_until = now;
        self.report_rejected_orders(&before);
        self.report_omitted(&before);
        self.replan = true;
        for name in self.agents.keys().cloned().collect::<Vec<_>>() {
            let order = self.orders.held.agents.get(&name).cloned();
            self.step(&name, AgentEvent::OrderChanged(order), now);
        }
        self.trim_cache(now);
    }

    /// Reports a list that would have removed every sub-agent, once while such lists arrive.
    fn report_empty_list(&mut self, kept: usize) {
        if kept == 0 {
            self.problems.remove("empty");
            return;
        }
        let text = format!(
            "an empty list of sub-agents was sent as complete; it removes nothing, and the {kept} ordered sub-agents are kept: only an \
             explicit uninstall removes the last one"
        );
        if self.problems.get("empty") != Some(&text) {
            self.journal.note("desired", "refused", EventSubject::default(), text.as_str());
        }
        self.problems.insert("empty", text);
    }

    /// Reports the rejected orders, each once.
    fn report_rejected_orders(&mut self, before: &DesiredState) {
        let known: Vec<&RejectedOrder> = before.rejected().collect();
        let new: Vec<RejectedOrder> =
            self.orders.held.rejected().filter(|refusal| !known.contains(refusal)).cloned().collect();
        for refusal in new.iter().take(MAX_REPORTED_REJECTIONS) {
            let about = EventSubject { agent: refusal.name.as_ref(), version: None };
            match refusal.is_unsupported {
                true => self.journal.note("command", "unsupported", about, refusal.why.as_str()),
                false => self.journal.note("order", "refused", about, describe_rejection(refusal)),
            }
        }
        let unreported = new.len().saturating_sub(MAX_REPORTED_REJECTIONS);
        if unreported > 0 {
            let text = format!("{unreported} more orders are rejected; `control status` lists some");
            self.journal.note("order", "refused", EventSubject::default(), text);
        }
        self.show_rejected_orders();
    }

    /// Shows the rejected orders as long as they are in effect.
    pub(super) fn show_rejected_orders(&mut self) {
        let words: Vec<String> = self.orders.held.rejected().take(MAX_NAMED).map(describe_rejection).collect();
        let more = self.orders.held.rejected().count().saturating_sub(MAX_NAMED);
        match words.is_empty() {
            true => drop(self.problems.remove("orders")),
            false => {
                let more = if more > 0 { format!("; and {more} more") } else { String::new() };
                self.problems.insert("orders", format!("{}{more}", words.join("; ")));
            }
        }
    }

    /// Reports the sub-agents that the list omits from now on.
    fn report_omitted(&mut self, before: &DesiredState) {
        let omitted = self.orders.held.omitted().keys();
        let new: Vec<&str> =
            omitted.filter(|name| !before.omitted().contains_key(*name)).map(AgentName::as_str).collect();
        if new.is_empty() {
            return;
        }
        let more = new.len().saturating_sub(MAX_NAMED);
        let names = new.iter().take(MAX_NAMED).copied().collect::<Vec<_>>().join(", ");
        let names = if more > 0 { format!("{names} and {more} more") } else { names };
        let delay = self.orders.delay.unwrap_or(desired::REMOVAL_DELAY);
        let text = format!("the gateway's list omits {names}: removed in {delay} s unless listed again by then");
        self.journal.note("desired", "ok", EventSubject::default(), text);
    }
}

/// Describes a rejected order for an operator.
fn describe_rejection(refusal: &RejectedOrder) -> String {
    let RejectedOrder { name, why, .. } = refusal;
    match name {
        Some(name) => format!("the order for {name} is rejected, and {name} stays unchanged: {why}"),
        None => format!("an order without a readable name is rejected, so its list removes nothing: {why}"),
    }
}
