//! What is wanted of the sub-agents: taken from an answer, on disk before it is in force, and followed.

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

/// Of the orders of one answer that are not followed, so many are told one by one.
const REFUSED_TOLD: usize = 10;
/// So many sub-agents are named in one message.
const NAMED: usize = 5;
/// For how long something was omitted is written so often, or each tenth of the whole wait: what is lost with a crash is waited for again.
const WAIT_WRITTEN: u64 = 10;

/// The desired state.
#[derive(Debug)]
pub(super) struct DesiredStateStore {
    pub(super) held: DesiredState,
    file: StateFile<DesiredState>,
    /// Another one, which is in force when this revision of the file is durable.
    coming: Option<(u64, Box<AcceptedState>)>,
    /// Until when it is counted how long what a complete list omits has been omitted. By the monotonic clock, and only while a manager
    /// runs: no clock that is set cuts the wait short.
    counted: Instant,
    /// Seconds that were counted and are not on disk.
    unwritten: u64,
    /// Of the last answer: what is omitted for so many seconds is removed. Before the first answer nothing is.
    delay: Option<u64>,
}

impl DesiredStateStore {
    pub(super) fn new(held: DesiredState, file: StateFile<DesiredState>, now: Instant) -> DesiredStateStore {
        DesiredStateStore { held, file, coming: None, counted: now, unwritten: 0, delay: None }
    }

    /// What answers are compared with: a list that is being written counts.
    fn newest(&self) -> &DesiredState {
        self.coming.as_ref().map_or(&self.held, |(_, taken)| &taken.desired)
    }

    /// Counts the time since it was counted last, in whole seconds.
    fn count(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.counted).as_secs();
        self.counted += Duration::from_secs(seconds);
        if !self.held.omitted().is_empty() {
            self.held.count_omission(seconds);
            self.unwritten = self.unwritten.saturating_add(seconds);
        }
    }

    /// Seconds until a sub-agent is removed because the list omits it; `None`: it is not omitted.
    pub(super) fn removed_in(&self, name: &AgentName, now: Instant) -> Option<u64> {
        let so_far = self.held.omitted().get(name)?;
        let so_far = so_far.saturating_add(now.saturating_duration_since(self.counted).as_secs());
        Some(self.delay.unwrap_or(desired::REMOVAL_DELAY).saturating_sub(so_far))
    }

    /// Writes what is not written yet, at the end of the process.
    pub(super) async fn finish(mut self) {
        self.count(Instant::now());
        let last = (self.unwritten > 0 && self.coming.is_none()).then_some(self.held);
        self.file.finish(last).await;
    }
}

impl Manager {
    /// Takes in the orders of an answer. `passed_over`: why who is asked first did not answer.
    pub(super) fn take_orders(&mut self, answer: &Answer, clock_offset: Option<i64>, passed_over: Option<&str>) {
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
                    // What was refused in between is not asked for any more.
                    self.problems.remove("desired");
                    self.still_omitted(delay);
                }
            }
            AnswerOutcome::Reject(why) => {
                let why = cut(&why, MAX_MESSAGE_BYTES);
                if self.problems.get("desired") != Some(&why) {
                    self.journal.note("desired", "refused", EventSubject::default(), why.as_str());
                }
                self.problems.insert("desired", why);
            }
            // On disk before it is acted on: what is begun must be known after a crash.
            AnswerOutcome::Accept(taken) => self.keep_orders(taken, passed_over),
        }
    }

    /// The list in force still omits what it omitted: what has been omitted for long enough is removed.
    fn still_omitted(&mut self, delay: u64) {
        if self.orders.coming.is_some() {
            return;
        }
        if let Some(desired) = self.orders.held.without_omitted(delay) {
            let taken = AcceptedState { desired, new_lineage: false, moved_back: false, kept: 0 };
            return self.keep_orders(Box::new(taken), None);
        }
        if self.orders.unwritten >= WAIT_WRITTEN.max(delay / 10) {
            self.orders.unwritten = 0;
            self.orders.file.save(&self.inputs, self.orders.held.clone());
        }
    }

    /// Begins to write another desired state; it is in force when that is done.
    fn keep_orders(&mut self, taken: Box<AcceptedState>, passed_over: Option<&str>) {
        if let Some(why) = passed_over.filter(|_| taken.new_lineage) {
            tracing::warn!(why, "another gateway stands in; what its list does not name stays until that changes");
        }
        self.orders.unwritten = 0;
        let revision = self.orders.file.save(&self.inputs, taken.desired.clone());
        self.orders.coming = Some((revision, taken));
    }

    pub(super) fn orders_saved(&mut self, revision: u64, result: Result<(), String>, now: Instant) {
        self.orders.file.saved(&self.inputs);
        let Some((_, taken)) = self.orders.coming.take_if(|(coming, _)| *coming <= revision) else { return };
        match result {
            Ok(()) => self.follow(*taken, now),
            Err(error) => {
                let text = format!("the new desired state is not acted on: {error}");
                self.journal.note("desired", "failed", EventSubject::default(), text.as_str());
                self.problems.insert("desired", text);
            }
        }
    }

    /// Another desired state is in force.
    fn follow(&mut self, taken: AcceptedState, now: Instant) {
        let AcceptedState { desired, new_lineage, moved_back, kept } = taken;
        self.problems.remove("desired");
        if new_lineage {
            tracing::warn!(lineage = desired.lineage, "another store counts the generations from now on");
        }
        if moved_back {
            let text = format!(
                "generation {} takes the place of {}, which was further ahead than any clock explains",
                desired.generation, self.orders.held.generation
            );
            self.journal.note("desired", "ok", EventSubject::default(), text);
        }
        tracing::info!(generation = desired.generation, agents = desired.agents.len(), "a new desired state is taken");
        self.tell_of_an_empty_list(kept);
        let before = std::mem::replace(&mut self.orders.held, desired);
        self.orders.counted = now;
        self.tell_of_refused_orders(&before);
        self.tell_of_omitted(&before);
        self.replan = true;
        for name in self.agents.keys().cloned().collect::<Vec<_>>() {
            let order = self.orders.held.agents.get(&name).cloned();
            self.step(&name, AgentEvent::Ordered(order), now);
        }
        self.trim_cache(now);
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
            self.journal.note("desired", "refused", EventSubject::default(), text.as_str());
        }
        self.problems.insert("empty", text);
    }

    /// Tells of the orders that are not followed, of each once.
    fn tell_of_refused_orders(&mut self, before: &DesiredState) {
        let known: Vec<&RejectedOrder> = before.rejected().collect();
        let new: Vec<RejectedOrder> =
            self.orders.held.rejected().filter(|refusal| !known.contains(refusal)).cloned().collect();
        for refusal in new.iter().take(REFUSED_TOLD) {
            let about = EventSubject { agent: refusal.name.as_ref(), version: None };
            match refusal.is_unsupported {
                true => self.journal.note("command", "unsupported", about, refusal.why.as_str()),
                false => self.journal.note("order", "refused", about, refusal_words(refusal)),
            }
        }
        let untold = new.len().saturating_sub(REFUSED_TOLD);
        if untold > 0 {
            let text = format!("{untold} more orders cannot be followed; `control status` names some");
            self.journal.note("order", "refused", EventSubject::default(), text);
        }
        self.show_refused_orders();
    }

    /// Shows the orders that are not followed as long as they stand.
    pub(super) fn show_refused_orders(&mut self) {
        let words: Vec<String> = self.orders.held.rejected().take(NAMED).map(refusal_words).collect();
        let more = self.orders.held.rejected().count().saturating_sub(NAMED);
        match words.is_empty() {
            true => drop(self.problems.remove("orders")),
            false => {
                let more = if more > 0 { format!("; and {more} more") } else { String::new() };
                self.problems.insert("orders", format!("{}{more}", words.join("; ")));
            }
        }
    }

    /// Tells of what a list omits from now on.
    fn tell_of_omitted(&mut self, before: &DesiredState) {
        let omitted = self.orders.held.omitted().keys();
        let new: Vec<&str> =
            omitted.filter(|name| !before.omitted().contains_key(*name)).map(AgentName::as_str).collect();
        if new.is_empty() {
            return;
        }
        let more = new.len().saturating_sub(NAMED);
        let names = new.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        let names = if more > 0 { format!("{names} and {more} more") } else { names };
        let delay = self.orders.delay.unwrap_or(desired::REMOVAL_DELAY);
        let text = format!("the gateway's list omits {names}: removed in {delay} s unless listed again by then");
        self.journal.note("desired", "ok", EventSubject::default(), text);
    }
}

/// For a person to read: which order is not followed, and why.
fn refusal_words(refusal: &RejectedOrder) -> String {
    let RejectedOrder { name, why, .. } = refusal;
    match name {
        Some(name) => format!("the order for {name} is refused, and {name} stays as it is: {why}"),
        None => format!("an order without a readable name is refused, so its list removes nothing: {why}"),
    }
}
