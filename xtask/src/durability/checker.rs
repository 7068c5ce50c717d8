//! Checks a recording: events in, findings out.
//!
//! A [`Disk`] follows the calls and knows what a power cut would lose at each of them. An act that depends on something must find it saved
//! ([`order`](super::order) knows which depends on what). A sync counts as needed if something depends on an item that it has saved before that
//! item is changed, removed, or saved again by the same thread.
//!
//! A call takes effect between its two moments. So what an act depends on must be saved when the act begins, and a sync has saved what was
//! changed before the sync began, once it has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::disk::{Disk, Fate, Item, Snapshot};
use super::event::{Event, Moment, Outcome, Recording};
use super::layout::Layout;
use super::records::Record;
use super::rule::Rule;
use crate::trace::Change;

/// A thread that takes this lock does not know whether the one that held it before has synced what it had renamed: it may have been killed
/// in between. So its first sync of a directory under the lock is needed, even if in this recording nothing was left to save.
const LOCK_OF_RECOVERY: &str = "run/upgrade.lock";

/// The installer writes a few settings and records in a row, each by the one function that also syncs its directory: a few syncs too many in
/// an installation are the price for none that is forgotten.
const WRITTEN_SINGLY: [&str; 2] = ["etc", "state"];

/// A rule that a recording breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) rule: Rule,
    /// The event that breaks it.
    pub(super) event: usize,
    pub(super) path: PathBuf,
    pub(super) why: String,
}

#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) findings: Vec<Finding>,
    /// How often each rule was checked.
    pub(super) checked: BTreeMap<Rule, usize>,
    pub(super) syncs: usize,
}

pub(super) struct Checker<'a> {
    pub(super) layout: &'a Layout,
    pub(super) events: &'a [Event],
    pub(super) disk: Disk,
    pub(super) report: Report,
    /// State files by path: the last content, and the last one on the disk.
    written: BTreeMap<PathBuf, Record>,
    durable: BTreeMap<PathBuf, Record>,
    /// The names that each thread has created since its last act that announces.
    fresh: BTreeMap<i32, Vec<(PathBuf, usize)>>,
    syncs: BTreeMap<usize, SyncRecord>,
    /// What each thread knows to be on the disk.
    known: BTreeMap<i32, Known>,
}

/// One sync.
#[derive(Debug, Default)]
struct SyncRecord {
    snapshot: Snapshot,
    has_ended: bool,
    saved: usize,
    used: usize,
    lost: usize,
    again: Option<usize>,
    saved_again: usize,
    /// It covers what this thread has changed and a sync of another thread has just saved, which it cannot know.
    saved_by_another: bool,
    /// See [`LOCK_OF_RECOVERY`].
    recovers: bool,
}

#[derive(Debug, Default)]
struct Known {
    has_lock: bool,
    synced: BTreeSet<PathBuf>,
}

/// Checks one recording.
pub(super) fn check(layout: &Layout, recording: &Recording) -> Report {
    let mut checker = Checker {
        layout,
        events: &recording.events,
        disk: Disk::default(),
        report: Report::default(),
        written: BTreeMap::new(),
        durable: BTreeMap::new(),
        fresh: BTreeMap::new(),
        syncs: BTreeMap::new(),
        known: BTreeMap::new(),
    };
    for moment in &recording.moments {
        match *moment {
            Moment::Begin(index) => checker.begin(index),
            Moment::End(index) => checker.end(index),
        }
    }
    checker.evaluate_syncs();
    checker.report.findings.sort_by_key(|finding| finding.event);
    checker.report
}

impl Checker<'_> {
    fn begin(&mut self, index: usize) {
        let event = &self.events[index];
        if event.is_sync() {
            let snapshot = self.disk.covered(event.change());
            self.syncs.insert(index, SyncRecord { snapshot, ..SyncRecord::default() });
        } else if *event.change() == Change::Wait {
            self.credit_fresh(index);
        } else if event.may_have_happened() {
            self.check_order(index);
            if self.announces(event) {
                self.check_fresh(index);
            }
        }
    }

    fn end(&mut self, index: usize) {
        let event = &self.events[index];
        if event.outcome != Outcome::Succeeded {
            return;
        }
        let (process, thread) = (event.call.process, event.call.thread);
        match event.change() {
            Change::Lock(path) if self.layout.is(path, LOCK_OF_RECOVERY) => {
                self.known.insert(thread, Known { has_lock: true, synced: BTreeSet::new() });
            }
            Change::Sync(_) | Change::SyncFileSystem(_) => self.synced(index),
            change => {
                self.disk.apply(change, index, process);
                if let Change::Rename { to, .. } = change
                    && let Some(content) = &event.content
                {
                    self.written.insert(to.clone(), Record::parse(content));
                }
                let name = created(change).filter(|name| self.layout.is_lasting(name));
                if let Some(name) = name {
                    self.fresh.entry(thread).or_default().push((name.to_owned(), index));
                }
            }
        }
        self.settle_fates();
    }

    fn synced(&mut self, index: usize) {
        let event = &self.events[index];
        let (Change::Sync(path) | Change::SyncFileSystem(path)) = event.change() else { return };
        let Some(mut sync) = self.syncs.remove(&index) else { return };
        let saved = self.disk.save(&sync.snapshot, index);
        for item in &saved {
            if self.counts(item) {
                sync.saved += 1;
            } else {
                self.disk.ignore(item);
            }
        }
        if sync.saved > 0 {
            let events = self.events;
            let is_own = |earlier: usize| is_of_thread(events, earlier, index);
            self.disk.save_again(&sync.snapshot, index, is_own);
        }
        sync.saved_by_another = sync.snapshot.iter().any(|(item, _)| self.is_saved_by_another(item, index));
        sync.has_ended = true;
        let known = self.known.entry(event.call.thread).or_default();
        sync.recovers = known.synced.insert(path.clone()) && known.has_lock;
        self.syncs.insert(index, sync);
        self.report.syncs += 1;
        for item in &saved {
            if let Item::Name(name) = item
                && let Some(record) = self.written.get(name)
            {
                self.durable.insert(name.clone(), record.clone());
            }
        }
    }

    /// Whether the thread of this event has changed an item that a sync of another thread has saved.
    fn is_saved_by_another(&self, item: &Item, index: usize) -> bool {
        let changed = self.disk.changed(item).filter(|changed| is_of_thread(self.events, changed.by, index));
        let saved_by = changed.and_then(|changed| changed.saved_by);
        self.counts(item) && saved_by.is_some_and(|sync| !is_of_thread(self.events, sync, index))
    }

    /// Whether something may depend on an item at all: on no removal but that of `.complete` (what returns is removed again), and on
    /// nothing that is gone after a power cut or verified as a whole.
    fn counts(&self, item: &Item) -> bool {
        match item {
            Item::Name(name) => {
                let is_removal = self.disk.changed(item).is_some_and(|changed| changed.is_removal);
                let is_complete_mark = self.layout.release_file(name).is_some_and(|file| file.is_complete_mark);
                self.layout.may_last(name) && (!is_removal || is_complete_mark)
            }
            Item::Content(file) => self.disk.names_of(*file).any(|name| self.layout.may_last(name)),
        }
    }

    fn settle_fates(&mut self) {
        for fate in self.disk.take_fates() {
            match fate {
                // Another thread cannot know what this one has not announced yet.
                Fate::Lost { sync, by } if !is_of_thread(self.events, sync, by) => {
                    self.syncs.entry(sync).or_default().used += 1
                }
                Fate::Lost { sync, .. } => self.syncs.entry(sync).or_default().lost += 1,
                Fate::SavedAgain { sync, by } => {
                    let sync = self.syncs.entry(sync).or_default();
                    (sync.saved_again, sync.again) = (sync.saved_again + 1, Some(by));
                }
            }
        }
    }

    fn evaluate_syncs(&mut self) {
        for (index, sync) in std::mem::take(&mut self.syncs) {
            if !sync.has_ended {
                continue;
            }
            self.count(Rule::UselessSync);
            let event = &self.events[index];
            let (Change::Sync(path) | Change::SyncFileSystem(path)) = event.change() else { continue };
            let moot = sync.lost + sync.saved_again;
            let is_needed = sync.used > 0
                || (sync.saved == 0 && sync.recovers)
                || sync.saved_by_another
                || self.layout.is_reserve(path)
                || (event.is_installer()
                    && sync.lost == 0
                    && WRITTEN_SINGLY.iter().any(|place| self.layout.is(path, place)));
            let why = if is_needed {
                continue;
            } else if sync.saved == 0 {
                "nothing that lasts was written there since its last sync".to_owned()
            } else if let (Some(by), true) = (sync.again, moot >= sync.saved) {
                format!("event {by} saves the same again before anything depends on it")
            } else if moot >= sync.saved {
                "what it saved was changed or removed before anything depended on it".to_owned()
            } else if self.layout.is_volatile(path) {
                "it is of what a power cut may lose, and nothing depended on it".to_owned()
            } else {
                // The recording ends before anything depends on it.
                continue;
            };
            self.report.findings.push(Finding { rule: Rule::UselessSync, event: index, path: path.clone(), why });
        }
    }

    /// Whether another thread, another process or the next start may act on what this thread did before.
    fn announces(&self, event: &Event) -> bool {
        match event.change() {
            // An installation announces its files with its own record alone.
            Change::Rename { to, .. } if event.is_installer() => self.layout.announces_installation(to),
            Change::Rename { to, .. } => self.layout.announces(to),
            Change::Message(_) | Change::Start | Change::Execute(_) | Change::Signal { .. } | Change::Exit => true,
            _ => false,
        }
    }

    fn check_fresh(&mut self, index: usize) {
        let thread = self.events[index].call.thread;
        for (name, by) in self.fresh.remove(&thread).unwrap_or_default() {
            let item = Item::Name(name.clone());
            // A name that has changed since is another's concern.
            if self.disk.changed(&item).is_some_and(|changed| changed.by == by && !changed.is_removal) {
                self.require(Rule::NameBeforeNextAct, index, &item, &name);
            }
        }
    }

    /// The thread has finished what it did: what it has created and saved is known to others from now on.
    fn credit_fresh(&mut self, index: usize) {
        let thread = self.events[index].call.thread;
        for (name, _) in self.fresh.get(&thread).cloned().unwrap_or_default() {
            if let Some(sync) = self.disk.depend(&Item::Name(name)) {
                self.syncs.entry(sync).or_default().used += 1;
            }
        }
    }

    pub(super) fn count(&mut self, rule: Rule) {
        *self.report.checked.entry(rule).or_default() += 1;
    }

    /// The event depends on this item: it must be saved.
    pub(super) fn require(&mut self, rule: Rule, index: usize, item: &Item, path: &Path) {
        self.count(rule);
        let Some(changed) = self.disk.changed(item).cloned() else { return };
        match changed.saved_by {
            Some(_) => {
                if let Some(sync) = self.disk.depend(item) {
                    self.syncs.entry(sync).or_default().used += 1;
                }
            }
            None => {
                let what = match item {
                    Item::Content(_) => "its content",
                    Item::Name(_) if changed.is_removal => "its removal",
                    Item::Name(_) => "its name",
                };
                let why = format!("{what} was changed by event {} and not synced since", changed.by);
                self.find(rule, index, path, why);
            }
        }
    }

    /// Content and name of a path must be saved.
    pub(super) fn require_file(&mut self, rule: Rule, index: usize, path: &Path) {
        if let Some(content) = self.disk.content_of(path) {
            self.require(rule, index, &content, path);
        }
        self.require(rule, index, &Item::Name(path.to_owned()), path);
    }

    pub(super) fn find(&mut self, rule: Rule, event: usize, path: &Path, why: impl Into<String>) {
        self.report.findings.push(Finding { rule, event, path: path.to_owned(), why: why.into() });
    }

    /// The content of a state file on the disk. Something depends on it: the sync that saved it was needed.
    pub(super) fn durable(&mut self, inside: &str) -> Option<Record> {
        let path = self.layout.at(inside);
        if let Some(sync) = self.disk.depend(&Item::Name(path.clone())) {
            self.syncs.entry(sync).or_default().used += 1;
        }
        self.durable.get(&path).cloned()
    }

    /// The content that a state file had before an event, whether it is on the disk or not.
    pub(super) fn written(&self, path: &Path) -> Option<Record> {
        self.written.get(path).cloned()
    }
}

fn is_of_thread(events: &[Event], one: usize, other: usize) -> bool {
    let of = |index: usize| (events[index].call.process, events[index].call.thread);
    of(one) == of(other)
}

/// The name that a change creates.
fn created(change: &Change) -> Option<&Path> {
    match change {
        Change::Open { path, creates: true, .. }
        | Change::Directory(path)
        | Change::Rename { to: path, .. }
        | Change::Link { to: path, .. }
        | Change::SymbolicLink { to: path, .. } => Some(path),
        _ => None,
    }
}
