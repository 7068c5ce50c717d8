//! The events that the gateway has not acknowledged: kept on disk, limited in size, and sent with every heartbeat until acknowledged.
//!
//! All sub-agents share it, so none may fill it: each message, and all events together, have a maximum size, and events of the same kind,
//! outcome and sub-agent are rate-limited, whatever their text. The next event of a kind reports how many were dropped.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::disk::StateFile;
use super::input::{Inputs, StateFileName};
use crate::core::model::{AgentName, MANAGER_PACKAGE, Version};
use crate::core::protocol::Event;
use crate::core::schedule::RateLimiter;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::core::unknown::{self, UnknownFields};
use crate::home::Home;
use crate::{platform, store};

/// Maximum length of a short field of an event read from disk.
const MAX_FIELD_BYTES: usize = 64;
/// The oldest events beyond this are dropped: a host that cannot reach its gateway for weeks must not fill its disk.
const MAX_EVENTS: usize = 500;
const MAX_BYTES: usize = 256 << 10;
/// Limits for one heartbeat.
const MAX_PER_HEARTBEAT: usize = 100;
const MAX_BYTES_PER_HEARTBEAT: usize = 64 << 10;
/// Rate limit for one kind, outcome and sub-agent: this burst, then one per interval.
const EVENT_BURST: u32 = 20;
const EVENT_INTERVAL: Duration = Duration::from_secs(300);
/// Number of rate limiters; beyond it, further keys share one.
const MAX_LIMITERS: usize = 1_024;

/// Delay until an event is written to disk, so that a burst of events is one write.
const FLUSH_DELAY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredEvents {
    #[serde(default)]
    last_id: u64,
    #[serde(default)]
    events: VecDeque<Event>,
    #[serde(flatten)]
    unknown: UnknownFields,
}

/// The events of one host.
#[derive(Debug)]
pub(super) struct Journal {
    file: StateFile<StoredEvents>,
    stored: StoredEvents,
    /// Size of all events.
    bytes: usize,
    limiters: BTreeMap<RateKey, RateLimiter>,
    changed: Option<Instant>,
}

/// The key of a rate limiter: kind, outcome and sub-agent.
type RateKey = (String, String, Option<AgentName>);

/// The subject of an event.
#[derive(Debug, Default)]
pub(super) struct EventSubject<'a> {
    pub agent: Option<&'a AgentName>,
    pub version: Option<&'a Version>,
}

impl Journal {
    /// Loads the events that an earlier manager left. An unreadable file is logged, and its events are lost.
    pub(super) fn load(home: &Home) -> Journal {
        let path = home.events();
        let stored = store::load(&path).unwrap_or_else(|error| {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot read the events queued for the gateway; they are lost"
            );
            None
        });
        let mut stored: StoredEvents = stored.unwrap_or_default();
        let events = std::mem::take(&mut stored.events);
        let file = StateFile::new(StateFileName::Events, path);
        let mut journal = Journal { file, stored, bytes: 0, limiters: BTreeMap::new(), changed: None };
        events.into_iter().for_each(|event| journal.store(event));
        journal
    }

    /// Adds an event, unless the rate limit is exceeded. Ids grow even if the last ones were not written: an id is at least the wall clock
    /// in milliseconds.
    pub(super) fn note(&mut self, kind: &str, outcome: &str, about: EventSubject<'_>, message: impl AsRef<str>) {
        self.note_at(kind, outcome, about, message.as_ref(), Instant::now());
    }

    fn note_at(&mut self, kind: &str, outcome: &str, about: EventSubject<'_>, message: &str, now: Instant) {
        let Some(dropped) = self.limiter(kind, outcome, about.agent, now).take(now) else { return };
        let mut message = cut(message, MAX_MESSAGE_BYTES);
        if dropped > 0 {
            message.push_str(&format!(" ({dropped} earlier events of this kind were dropped)"));
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = self.stored.last_id.saturating_add(1).max(since.as_millis() as u64);
        self.stored.last_id = id;
        let agent = about.agent.map(AgentName::as_str).unwrap_or_default();
        if outcome == "ok" {
            tracing::info!(kind, agent, message, "event");
        } else {
            tracing::warn!(kind, outcome, agent, message, "event");
        }
        // Of the manager itself, and what has failed.
        if outcome != "ok" || agent == MANAGER_PACKAGE {
            platform::log_milestone(&message, outcome != "ok");
        }
        self.store(Event {
            id,
            time: crate::spm::timestamp(),
            kind: kind.to_owned(),
            agent: about.agent.cloned(),
            version: about.version.cloned(),
            outcome: outcome.to_owned(),
            message,
            unknown: UnknownFields::new(),
        });
        self.changed.get_or_insert_with(Instant::now);
    }

    fn limiter(&mut self, kind: &str, outcome: &str, agent: Option<&AgentName>, now: Instant) -> &mut RateLimiter {
        let mut subject = (kind.to_owned(), outcome.to_owned(), agent.cloned());
        if self.limiters.len() >= MAX_LIMITERS && !self.limiters.contains_key(&subject) {
            self.limiters.retain(|_, limiter| !limiter.is_full(now));
            if self.limiters.len() >= MAX_LIMITERS {
                subject = RateKey::default();
            }
        }
        self.limiters.entry(subject).or_insert_with(|| RateLimiter::new(EVENT_BURST, EVENT_INTERVAL))
    }

    /// Stores an event, and drops the oldest ones beyond the limits.
    fn store(&mut self, event: Event) {
        // An event written by another version may have any length.
        let is_short = unknown::bytes(&event.unknown) <= MAX_MESSAGE_BYTES;
        let event = Event {
            time: cut(&event.time, MAX_FIELD_BYTES),
            kind: cut(&event.kind, MAX_FIELD_BYTES),
            outcome: cut(&event.outcome, MAX_FIELD_BYTES),
            message: cut(&event.message, MAX_MESSAGE_BYTES + MAX_FIELD_BYTES),
            unknown: if is_short { event.unknown } else { UnknownFields::new() },
            ..event
        };
        self.bytes += event.size();
        self.stored.events.push_back(event);
        while self.stored.events.len() > MAX_EVENTS || self.bytes > MAX_BYTES {
            let Some(oldest) = self.stored.events.pop_front() else { break };
            self.bytes -= oldest.size();
        }
    }

    /// Removes the events that the gateway has received.
    pub(super) fn acknowledge(&mut self, id: u64) {
        let before = self.stored.events.len();
        self.stored.events.retain(|event| event.id > id);
        if before != self.stored.events.len() {
            self.bytes = self.stored.events.iter().map(Event::size).sum();
            self.changed.get_or_insert_with(Instant::now);
        }
    }

    /// The oldest events, for the next heartbeat.
    pub(super) fn pending(&self) -> Vec<Event> {
        let mut sum = 0;
        let within = |event: &&Event| {
            sum += event.size();
            sum <= MAX_BYTES_PER_HEARTBEAT
        };
        self.stored.events.iter().take(MAX_PER_HEARTBEAT).take_while(within).cloned().collect()
    }

    /// When to write changes: late enough that a burst of events is one write, early enough that a crash loses little.
    pub(super) fn flush_at(&self) -> Option<Instant> {
        self.changed.map(|since| since + FLUSH_DELAY)
    }

    /// Starts writing the changes since the last write.
    pub(super) fn flush(&mut self, inputs: &Inputs) {
        if self.changed.take().is_some() {
            self.file.save(inputs, self.stored.clone());
        }
    }

    /// Handles the end of a write.
    pub(super) fn saved(&mut self, result: Result<(), String>, inputs: &Inputs) {
        self.file.saved(inputs);
        if let Err(error) = result {
            tracing::warn!(error, "cannot write the events queued for the gateway; they are lost if the manager exits");
        }
    }

    /// Writes pending changes before the process exits.
    pub(super) async fn finish(self) {
        self.file.finish(self.changed.map(|_| self.stored)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_kept_until_they_are_acknowledged() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir(home.state()).unwrap();
        let mut journal = Journal::load(&home);
        journal.note("exit", "failed", EventSubject::default(), "one");
        journal.note("exit", "failed", EventSubject::default(), "two");
        journal.finish().await;
        let mut journal = Journal::load(&home);
        let pending = journal.pending();
        assert_eq!(pending.len(), 2);
        assert!(pending[0].id < pending[1].id);
        journal.acknowledge(pending[0].id);
        assert_eq!(journal.pending(), pending[1..]);
    }

    #[tokio::test]
    async fn fields_of_a_later_version_are_preserved() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir(home.state()).unwrap();
        let event = serde_json::json!({
            "id": 1, "time": "t", "kind": "exit", "outcome": "ok", "message": "m", "later": { "of": [1, null] },
        });
        let stored = serde_json::json!({ "lastId": 1, "events": [event], "later": "x" });
        std::fs::write(home.events(), stored.to_string()).unwrap();
        let mut journal = Journal::load(&home);
        journal.note("exit", "ok", EventSubject::default(), "two");
        journal.finish().await;
        let kept: serde_json::Value = serde_json::from_slice(&std::fs::read(home.events()).unwrap()).unwrap();
        assert_eq!((&kept["later"], &kept["events"][0]), (&stored["later"], &event));

        // Oversized unknown fields are dropped.
        let mut long = stored.clone();
        long["events"][0]["later"] = "x".repeat(MAX_MESSAGE_BYTES + 1).into();
        std::fs::write(home.events(), long.to_string()).unwrap();
        assert_eq!(Journal::load(&home).pending()[0].unknown, UnknownFields::new());
    }

    #[test]
    fn the_protocol_document_states_the_limits() {
        let (kept, sent) = (MAX_BYTES >> 10, MAX_BYTES_PER_HEARTBEAT >> 10);
        let document = crate::core::protocol::document();
        for words in [
            format!("at most {MAX_EVENTS} events with {kept} KiB"),
            format!("at most {MAX_PER_HEARTBEAT} with {sent} KiB"),
            format!("a burst of {EVENT_BURST}, then one every {} minutes", EVENT_INTERVAL.as_secs() / 60),
        ] {
            assert!(document.contains(&words), "{words}");
        }
    }

    #[test]
    fn the_oldest_events_are_dropped_beyond_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::load(&Home::new(directory.path()));
        let start = Instant::now();
        for n in 0..MAX_EVENTS as u32 + 10 {
            journal.note_at("exit", "ok", EventSubject::default(), &n.to_string(), start + EVENT_INTERVAL * n);
        }
        assert_eq!(journal.stored.events.len(), MAX_EVENTS);
        assert_eq!(journal.pending()[0].message, "10");
    }

    #[test]
    fn repeated_events_with_differing_texts_are_rate_limited() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::load(&Home::new(directory.path()));
        let start = Instant::now();
        let (a, b): (AgentName, AgentName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut reject = |kind: &str, agent: Option<&AgentName>, second: u64| {
            let about = EventSubject { agent, version: None };
            journal.note_at(kind, "refused", about, &format!("number {second}"), start + Duration::from_secs(second));
        };
        (0..3_600).for_each(|second| reject("desired", None, second));
        // Events of other kinds and sub-agents are still reported.
        (0..3_600).for_each(|second| reject("stage", Some(&a), second));
        reject("stage", Some(&b), 3_600);
        reject("heartbeat", None, 3_600);
        let of = |kind: &str| journal.stored.events.iter().filter(|event| event.kind == kind).count();
        assert_eq!((of("desired"), of("stage"), of("heartbeat")), (31, 32, 1));
        let last = journal.stored.events.iter().rfind(|event| event.kind == "desired").unwrap();
        assert_eq!(last.message, "number 3300 (299 earlier events of this kind were dropped)");
    }

    #[test]
    fn the_number_of_rate_limiters_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::load(&Home::new(directory.path()));
        let start = Instant::now();
        for n in 0..3 * MAX_LIMITERS {
            let name: AgentName = format!("a{n}").parse().unwrap();
            journal.note_at("stage", "failed", EventSubject { agent: Some(&name), version: None }, "no", start);
        }
        assert!(journal.limiters.len() <= MAX_LIMITERS + 1);
        // Limiters that are full again are removed.
        let name: AgentName = "new".parse().unwrap();
        journal.note_at(
            "stage",
            "failed",
            EventSubject { agent: Some(&name), version: None },
            "no",
            start + EVENT_INTERVAL * 20,
        );
        assert_eq!(journal.limiters.len(), 1);
    }

    #[test]
    fn the_size_of_each_event_and_of_all_together_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir(home.state()).unwrap();
        let long = "\u{1b}[2J".to_owned() + &"x".repeat(1 << 20);
        // As an older version wrote it.
        let event =
            |id: u64| serde_json::json!({"id": id, "time": long, "kind": long, "outcome": long, "message": long});
        let stored = serde_json::json!({ "lastId": 3, "events": [event(1), event(2), event(3)] });
        std::fs::write(home.events(), stored.to_string()).unwrap();
        let mut journal = Journal::load(&home);
        assert_eq!(journal.pending().len(), 3);
        let start = Instant::now();
        for n in 0..MAX_EVENTS as u32 {
            journal.note_at("stage", "failed", EventSubject::default(), &long, start + EVENT_INTERVAL * n);
        }
        let all = &journal.stored.events;
        assert!(all.iter().all(|event| event.message.len() <= 1_100 && !event.message.contains('\u{1b}')));
        assert!((200..300).contains(&all.len()), "{}", all.len());
        let sent = serde_json::to_vec(&journal.pending()).unwrap().len();
        assert!((50 << 10..70 << 10).contains(&sent), "{sent}");
        journal.acknowledge(u64::MAX);
        assert_eq!((journal.bytes, journal.pending().len()), (0, 0));
        journal.note("exit", "ok", EventSubject::default(), "one");
        assert_eq!(journal.pending().len(), 1);
    }
}
