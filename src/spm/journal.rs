//! What happened on the host and the gateway has not acknowledged: kept on disk, capped, told again with every heartbeat until it is.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::core::model::{AgentName, Version};
use crate::core::protocol::Event;
use crate::home::Home;
use crate::store;

/// Beyond this the oldest are forgotten: a host that cannot reach its gateway for weeks must not fill its disk.
const MAX_EVENTS: usize = 500;
/// So many go up with one heartbeat.
const MAX_PER_HEARTBEAT: usize = 100;

/// So long after an event it is on disk.
const FLUSH: Duration = Duration::from_secs(1);

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    #[serde(default)]
    last_id: u64,
    #[serde(default)]
    events: Vec<Event>,
}

/// The events of one host.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    stored: Stored,
    changed: Option<Instant>,
}

/// What an event is about.
#[derive(Debug, Default)]
pub(super) struct About<'a> {
    pub agent: Option<&'a AgentName>,
    pub version: Option<&'a Version>,
}

impl Journal {
    /// What an earlier manager left. An unreadable file is begun anew: its events are lost, which the log says.
    pub(super) fn load(home: &Home) -> Journal {
        let path = home.state_file("events.json");
        let stored = store::load(&path).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the events kept for the gateway cannot be read and are lost");
            None
        });
        Journal { path, stored: stored.unwrap_or_default(), changed: None }
    }

    /// Notes an event. Its id grows even where the last ones could not be kept: it is never behind the clock's milliseconds.
    pub(super) fn note(&mut self, kind: &str, outcome: &str, about: About<'_>, message: impl Into<String>) {
        let message = message.into();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = (self.stored.last_id + 1).max(now.as_millis() as u64);
        self.stored.last_id = id;
        let agent = about.agent.map(AgentName::as_str).unwrap_or_default();
        if outcome == "ok" {
            tracing::info!(kind, agent, message, "event");
        } else {
            tracing::warn!(kind, outcome, agent, message, "event");
        }
        self.stored.events.push(Event {
            id,
            time: crate::spm::timestamp(),
            kind: kind.to_owned(),
            agent: about.agent.cloned(),
            version: about.version.cloned(),
            outcome: outcome.to_owned(),
            message,
        });
        if self.stored.events.len() > MAX_EVENTS {
            let surplus = self.stored.events.len() - MAX_EVENTS;
            self.stored.events.drain(..surplus);
        }
        self.changed.get_or_insert_with(Instant::now);
    }

    /// Forgets what the gateway has seen.
    pub(super) fn acknowledge(&mut self, id: u64) {
        let before = self.stored.events.len();
        self.stored.events.retain(|event| event.id > id);
        if before != self.stored.events.len() {
            self.changed.get_or_insert_with(Instant::now);
        }
    }

    /// The oldest ones, for the next heartbeat.
    pub(super) fn pending(&self) -> Vec<Event> {
        self.stored.events.iter().take(MAX_PER_HEARTBEAT).cloned().collect()
    }

    /// When what changed is to be written, so that a crash loses little and a crowd of events is one write.
    pub(super) fn flush_at(&self) -> Option<Instant> {
        self.changed.map(|since| since + FLUSH)
    }

    /// Writes what changed since the last time.
    pub(super) fn flush(&mut self) {
        if self.changed.take().is_none() {
            return;
        }
        if let Err(error) = store::save(&self.path, &self.stored) {
            tracing::warn!(
                error = format!("{error:#}"),
                "the events for the gateway cannot be kept; they are in memory alone"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_kept_until_they_are_acknowledged() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir(home.state()).unwrap();
        let mut journal = Journal::load(&home);
        journal.note("exit", "failed", About::default(), "one");
        journal.note("exit", "failed", About::default(), "two");
        journal.flush();
        let mut journal = Journal::load(&home);
        let pending = journal.pending();
        assert_eq!(pending.len(), 2);
        assert!(pending[0].id < pending[1].id);
        journal.acknowledge(pending[0].id);
        assert_eq!(journal.pending(), pending[1..]);
    }

    #[test]
    fn a_long_silence_forgets_the_oldest() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::load(&Home::new(directory.path()));
        for n in 0..MAX_EVENTS + 10 {
            journal.note("exit", "ok", About::default(), n.to_string());
        }
        assert_eq!(journal.stored.events.len(), MAX_EVENTS);
        assert_eq!(journal.pending()[0].message, "10");
    }
}
