//! What happened on the host and the gateway has not acknowledged: kept on disk, capped, told again with every heartbeat until it is.
//!
//! It is everybody's, so nobody may fill it: a message has its length, all events together theirs, and what is told again and again of the
//! same thing, in whatever words, is told less and less often. How much was not told is said with the next that is.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::disk::StateFile;
use super::input::{Inputs, StateFileName};
use crate::core::model::{AgentName, Version};
use crate::core::protocol::Event;
use crate::core::schedule::RateLimiter;
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::core::unknown::{self, UnknownFields};
use crate::home::Home;
use crate::store;

/// Of a word in a file that somebody else may have written.
const MAX_WORD_BYTES: usize = 64;
/// Beyond this the oldest are forgotten: a host that cannot reach its gateway for weeks must not fill its disk.
const MAX_EVENTS: usize = 500;
const MAX_BYTES: usize = 256 << 10;
/// So many go up with one heartbeat.
const MAX_PER_HEARTBEAT: usize = 100;
const MAX_BYTES_PER_HEARTBEAT: usize = 64 << 10;
/// Of one kind, outcome and sub-agent, so many are told at once, and one more each so often.
const TOLD_AT_ONCE: u32 = 20;
const TOLD_EVERY: Duration = Duration::from_secs(300);
/// So many kinds and sub-agents are counted apart; what comes then is counted together.
const MAX_COUNTED: usize = 1_024;

/// So long after an event it is on disk.
const FLUSH: Duration = Duration::from_secs(1);

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
    /// Of all events.
    bytes: usize,
    told: BTreeMap<RateKey, RateLimiter>,
    changed: Option<Instant>,
}

/// What may come again and again: kind, outcome and sub-agent.
type RateKey = (String, String, Option<AgentName>);

/// What an event is about.
#[derive(Debug, Default)]
pub(super) struct EventSubject<'a> {
    pub agent: Option<&'a AgentName>,
    pub version: Option<&'a Version>,
}

impl Journal {
    /// What an earlier manager left. An unreadable file is begun anew: its events are lost, which the log says.
    pub(super) fn load(home: &Home) -> Journal {
        let path = home.events();
        let stored = store::load(&path).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the events kept for the gateway cannot be read and are lost");
            None
        });
        let mut stored: StoredEvents = stored.unwrap_or_default();
        let events = std::mem::take(&mut stored.events);
        let file = StateFile::new(StateFileName::Events, path);
        let mut journal = Journal { file, stored, bytes: 0, told: BTreeMap::new(), changed: None };
        events.into_iter().for_each(|event| journal.keep(event));
        journal
    }

    /// Notes an event, if not too many of its like were noted. Its id grows even where the last ones could not be kept: it is never behind
    /// the clock's milliseconds.
    pub(super) fn note(&mut self, kind: &str, outcome: &str, about: EventSubject<'_>, message: impl AsRef<str>) {
        self.note_at(kind, outcome, about, message.as_ref(), Instant::now());
    }

    fn note_at(&mut self, kind: &str, outcome: &str, about: EventSubject<'_>, message: &str, now: Instant) {
        let Some(untold) = self.allowance(kind, outcome, about.agent, now).take(now) else { return };
        let mut message = cut(message, MAX_MESSAGE_BYTES);
        if untold > 0 {
            message.push_str(&format!(" (before that, {untold} of its kind were not told)"));
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
        self.keep(Event {
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

    fn allowance(&mut self, kind: &str, outcome: &str, agent: Option<&AgentName>, now: Instant) -> &mut RateLimiter {
        let mut subject = (kind.to_owned(), outcome.to_owned(), agent.cloned());
        if self.told.len() >= MAX_COUNTED && !self.told.contains_key(&subject) {
            self.told.retain(|_, allowance| !allowance.is_full(now));
            if self.told.len() >= MAX_COUNTED {
                subject = RateKey::default();
            }
        }
        self.told.entry(subject).or_insert_with(|| RateLimiter::new(TOLD_AT_ONCE, TOLD_EVERY))
    }

    /// Keeps an event, and forgets the oldest where there is no room.
    fn keep(&mut self, event: Event) {
        // One that another version kept may be of any length.
        let is_short = unknown::bytes(&event.unknown) <= MAX_MESSAGE_BYTES;
        let event = Event {
            time: cut(&event.time, MAX_WORD_BYTES),
            kind: cut(&event.kind, MAX_WORD_BYTES),
            outcome: cut(&event.outcome, MAX_WORD_BYTES),
            message: cut(&event.message, MAX_MESSAGE_BYTES + MAX_WORD_BYTES),
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

    /// Forgets what the gateway has seen.
    pub(super) fn acknowledge(&mut self, id: u64) {
        let before = self.stored.events.len();
        self.stored.events.retain(|event| event.id > id);
        if before != self.stored.events.len() {
            self.bytes = self.stored.events.iter().map(Event::size).sum();
            self.changed.get_or_insert_with(Instant::now);
        }
    }

    /// The oldest ones, for the next heartbeat.
    pub(super) fn pending(&self) -> Vec<Event> {
        let mut sum = 0;
        let within = |event: &&Event| {
            sum += event.size();
            sum <= MAX_BYTES_PER_HEARTBEAT
        };
        self.stored.events.iter().take(MAX_PER_HEARTBEAT).take_while(within).cloned().collect()
    }

    /// When what changed is to be written, so that a crash loses little and a crowd of events is one write.
    pub(super) fn flush_at(&self) -> Option<Instant> {
        self.changed.map(|since| since + FLUSH)
    }

    /// Begins to write what changed since the last time.
    pub(super) fn flush(&mut self, inputs: &Inputs) {
        if self.changed.take().is_some() {
            self.file.save(inputs, self.stored.clone());
        }
    }

    /// Takes in that a write has ended.
    pub(super) fn saved(&mut self, result: Result<(), String>, inputs: &Inputs) {
        self.file.saved(inputs);
        if let Err(error) = result {
            tracing::warn!(error, "the events for the gateway cannot be written; they are in memory alone");
        }
    }

    /// Writes what is not written yet, at the end of the process.
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
    async fn fields_of_a_later_version_are_written_back() {
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

        // Not where they would fill it.
        let mut long = stored.clone();
        long["events"][0]["later"] = "x".repeat(MAX_MESSAGE_BYTES + 1).into();
        std::fs::write(home.events(), long.to_string()).unwrap();
        assert_eq!(Journal::load(&home).pending()[0].unknown, UnknownFields::new());
    }

    #[test]
    fn the_document_names_the_bounds() {
        let (kept, told) = (MAX_BYTES >> 10, MAX_BYTES_PER_HEARTBEAT >> 10);
        let document = crate::core::protocol::document();
        for words in [
            format!("at most {MAX_EVENTS} events with {kept} KiB"),
            format!("at most {MAX_PER_HEARTBEAT} with {told} KiB"),
            format!("a burst of {TOLD_AT_ONCE}, then one every {} minutes", TOLD_EVERY.as_secs() / 60),
        ] {
            assert!(document.contains(&words), "{words}");
        }
    }

    #[test]
    fn a_long_silence_forgets_the_oldest() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::load(&Home::new(directory.path()));
        let start = Instant::now();
        for n in 0..MAX_EVENTS as u32 + 10 {
            journal.note_at("exit", "ok", EventSubject::default(), &n.to_string(), start + TOLD_EVERY * n);
        }
        assert_eq!(journal.stored.events.len(), MAX_EVENTS);
        assert_eq!(journal.pending()[0].message, "10");
    }

    #[test]
    fn refusals_in_ever_other_words_are_told_less_and_less_often() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::load(&Home::new(directory.path()));
        let start = Instant::now();
        let (a, b): (AgentName, AgentName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut refuse = |kind: &str, agent: Option<&AgentName>, second: u64| {
            let about = EventSubject { agent, version: None };
            journal.note_at(kind, "refused", about, &format!("number {second}"), start + Duration::from_secs(second));
        };
        (0..3_600).for_each(|second| refuse("desired", None, second));
        // What else is refused is told all the same.
        (0..3_600).for_each(|second| refuse("stage", Some(&a), second));
        refuse("stage", Some(&b), 3_600);
        refuse("heartbeat", None, 3_600);
        let of = |kind: &str| journal.stored.events.iter().filter(|event| event.kind == kind).count();
        assert_eq!((of("desired"), of("stage"), of("heartbeat")), (31, 32, 1));
        let last = journal.stored.events.iter().rfind(|event| event.kind == "desired").unwrap();
        assert_eq!(last.message, "number 3300 (before that, 299 of its kind were not told)");
    }

    #[test]
    fn however_many_are_counted_apart_it_comes_to_an_end() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::load(&Home::new(directory.path()));
        let start = Instant::now();
        for n in 0..3 * MAX_COUNTED {
            let name: AgentName = format!("a{n}").parse().unwrap();
            journal.note_at("stage", "failed", EventSubject { agent: Some(&name), version: None }, "no", start);
        }
        assert!(journal.told.len() <= MAX_COUNTED + 1);
        // Those who were quiet for long enough make room.
        let name: AgentName = "new".parse().unwrap();
        journal.note_at(
            "stage",
            "failed",
            EventSubject { agent: Some(&name), version: None },
            "no",
            start + TOLD_EVERY * 20,
        );
        assert_eq!(journal.told.len(), 1);
    }

    #[test]
    fn neither_one_text_nor_all_together_grow_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir(home.state()).unwrap();
        let long = "\u{1b}[2J".to_owned() + &"x".repeat(1 << 20);
        // As an older version left it.
        let event =
            |id: u64| serde_json::json!({"id": id, "time": long, "kind": long, "outcome": long, "message": long});
        let stored = serde_json::json!({ "lastId": 3, "events": [event(1), event(2), event(3)] });
        std::fs::write(home.events(), stored.to_string()).unwrap();
        let mut journal = Journal::load(&home);
        assert_eq!(journal.pending().len(), 3);
        let start = Instant::now();
        for n in 0..MAX_EVENTS as u32 {
            journal.note_at("stage", "failed", EventSubject::default(), &long, start + TOLD_EVERY * n);
        }
        let all = &journal.stored.events;
        assert!(all.iter().all(|event| event.message.len() <= 1_100 && !event.message.contains('\u{1b}')));
        assert!((200..300).contains(&all.len()), "{}", all.len());
        let told = serde_json::to_vec(&journal.pending()).unwrap().len();
        assert!((50 << 10..70 << 10).contains(&told), "{told}");
        journal.acknowledge(u64::MAX);
        assert_eq!((journal.bytes, journal.pending().len()), (0, 0));
        journal.note("exit", "ok", EventSubject::default(), "one");
        assert_eq!(journal.pending().len(), 1);
    }
}
