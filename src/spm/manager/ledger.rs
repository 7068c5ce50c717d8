//! The ledger in the event loop: changed in memory by the sub-agents' states, and written off the loop.
//!
//! Order of the writes at a commit: the ledger, then the epochs. A start raises the epochs of all committed releases before it stages
//! anything, so that a crash between the two writes loses nothing.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Manager;
use crate::core::agent::AgentEvent;
use crate::core::ledger::{Ledger, LedgerEntry, LedgerRelease};
use crate::core::model::AgentName;
use crate::core::unknown::UnknownFields;
use crate::home::Home;
use crate::installation::Epochs;
use crate::spm::disk::{self, StateFile};
use crate::spm::input::{Input, StateFileName};
use crate::store;

/// The ledger's file, and the operations that wait for its writes.
#[derive(Debug)]
pub(super) struct LedgerWriter {
    file: StateFile<Ledger>,
    /// The entries as loaded, until the sub-agents take them over.
    loaded: BTreeMap<AgentName, LedgerEntry>,
    unknown: UnknownFields,
    is_changed: bool,
    /// The last write failed.
    is_unsaved: bool,
    /// The removal of a release waits for the current write.
    removal_waits: bool,
    /// The newest revision queued, and the newest that is durable.
    queued: u64,
    durable: u64,
    is_on_disk: bool,
    /// Epochs to raise, each once its revision of the ledger is durable.
    to_raise: Vec<(u64, AgentName, u64)>,
    /// Epochs that are being raised.
    raising: Vec<(u64, AgentName, u64)>,
    /// The last attempt failed; the next comes with the housekeeping.
    raise_failed: bool,
    /// The epochs of earlier commits are raised: releases may be staged.
    may_stage: bool,
}

impl LedgerWriter {
    /// Loads the ledger. One that cannot be read is rebuilt from the releases on disk.
    pub(super) fn load(home: &Home, problems: &mut BTreeMap<&'static str, String>) -> LedgerWriter {
        let path = home.releases();
        let loaded = store::load::<Ledger>(&path);
        let lost = match &loaded {
            Ok(Some(_)) => None,
            Ok(None) => Epochs::load(home)
                .is_ok_and(|epochs| epochs.expects_ledger())
                .then(|| format!("{} is missing", path.display())),
            Err(error) => Some(format!("{error:#}")),
        };
        if let Some(why) = lost {
            let text = format!("the ledger of releases is lost and rebuilt from the releases on disk: {why}");
            tracing::error!(error = text, "cannot read the ledger of releases");
            problems.insert("ledger", text);
        }
        let ledger = loaded.ok().flatten();
        let is_changed = ledger.is_none();
        let Ledger { agents, unknown } = ledger.unwrap_or_default();
        LedgerWriter {
            file: StateFile::new(StateFileName::Ledger, path),
            loaded: agents,
            unknown,
            is_changed,
            is_unsaved: false,
            removal_waits: false,
            queued: 0,
            durable: 0,
            is_on_disk: !is_changed,
            to_raise: vec![],
            raising: vec![],
            raise_failed: false,
            may_stage: false,
        }
    }

    /// Takes the loaded entry of a sub-agent.
    pub(super) fn take_entry(&mut self, name: &AgentName) -> Option<LedgerEntry> {
        self.loaded.remove(name)
    }

    /// The sub-agents in the ledger.
    pub(super) fn names(&self) -> impl Iterator<Item = &AgentName> {
        self.loaded.keys()
    }

    pub(super) fn may_stage(&self) -> bool {
        self.may_stage
    }

    /// Whether a release may be removed from the disk. The ledger on disk may still refer to it until the pending write ends. A failed
    /// write does not prevent removals: the disk may be full.
    pub(super) fn may_remove(&mut self) -> bool {
        let may = !self.is_changed && self.file.is_settled();
        self.removal_waits |= !may;
        may
    }

    /// Writes pending changes before the process exits.
    pub(super) async fn finish(self) {
        self.file.finish(None).await;
    }

    /// Marks the ledger as changed; it is written in the next iteration of the loop.
    pub(super) fn mark_changed(&mut self) {
        self.is_changed = true;
    }

    /// The revision that contains all changes so far.
    pub(super) fn current_revision(&self) -> u64 {
        self.queued + u64::from(self.is_changed)
    }

    /// Queues an epoch, to be raised when the ledger with its commit is durable.
    pub(super) fn raise(&mut self, name: &AgentName, release: &LedgerRelease) {
        self.to_raise.push((self.current_revision(), name.clone(), release.epoch));
    }
}

impl Manager {
    /// Raises the epochs of all committed releases; nothing is staged before.
    pub(super) fn raise_committed(&mut self) {
        self.queue_committed();
        self.releases.may_stage = self.releases.to_raise.is_empty();
        self.raise_durable();
    }

    fn queue_committed(&mut self) {
        for (name, agent) in &self.agents {
            if let Some(release) = agent.state.ledger().active() {
                self.releases.to_raise.push((self.releases.current_revision(), name.clone(), release.epoch));
            }
        }
    }

    /// Starts writing the ledger if it changed.
    pub(super) fn write_ledger(&mut self) {
        if std::mem::take(&mut self.releases.is_changed) {
            let agents = self.agents.iter().map(|(name, agent)| (name.clone(), agent.state.to_record()));
            let ledger = Ledger {
                agents: agents.filter(|(_, entry)| *entry != LedgerEntry::default()).collect(),
                unknown: self.releases.unknown.clone(),
            };
            self.releases.queued = self.releases.file.save(&self.inputs, ledger);
        }
        self.raise_durable();
    }

    /// Retries failed writes.
    pub(super) fn retry_ledger(&mut self) {
        self.releases.raise_failed = false;
        if self.releases.is_unsaved {
            self.releases.mark_changed();
        }
    }

    pub(super) fn ledger_saved(&mut self, revision: u64, result: Result<(), String>, now: Instant) {
        self.releases.file.saved(&self.inputs);
        self.releases.is_unsaved = result.is_err();
        self.replan |= std::mem::take(&mut self.releases.removal_waits);
        self.report_problem("ledger", "failed", result.as_ref().err().cloned());
        if result.is_ok() {
            self.releases.durable = revision;
            if !std::mem::replace(&mut self.releases.is_on_disk, true) {
                // Raising an epoch also records that a ledger exists.
                self.queue_committed();
            }
        }
        let waiting = self.agents.values_mut().filter_map(|agent| {
            agent.awaited_revision.take_if(|waits| *waits <= revision).map(|_| agent.state.name().clone())
        });
        for name in waiting.collect::<Vec<_>>() {
            self.step(&name, AgentEvent::Recorded(result.clone()), now);
        }
        self.raise_durable();
    }

    /// Starts raising the epochs whose commits are durable.
    fn raise_durable(&mut self) {
        let releases = &mut self.releases;
        if !releases.raising.is_empty() || releases.raise_failed {
            return;
        }
        let durable = releases.durable;
        releases.raising = releases.to_raise.extract_if(.., |(revision, ..)| *revision <= durable).collect();
        if releases.raising.is_empty() {
            return;
        }
        let (home, has_ledger, due) = (self.home.clone(), releases.is_on_disk, releases.raising.clone());
        disk::run(&self.inputs, move || {
            let due = due.iter().map(|(_, name, epoch)| (name.as_str(), *epoch));
            Input::Raised(Epochs::commit_all(&home, due, has_ledger).map_err(|error| format!("{error:#}")))
        });
    }

    pub(super) fn raised(&mut self, result: Result<(), String>) {
        let raising = std::mem::take(&mut self.releases.raising);
        if result.is_err() {
            self.releases.to_raise.extend(raising);
            self.releases.raise_failed = true;
        }
        self.report_problem("epochs", "failed", result.err());
        // Each release is also compared with the epoch in the ledger, so an epochs' file that cannot be written blocks nothing.
        if !std::mem::replace(&mut self.releases.may_stage, true) {
            self.replan = true;
        }
        self.raise_durable();
    }
}
