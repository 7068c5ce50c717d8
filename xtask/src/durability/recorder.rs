//! Records the calls of a home's processes for the checker.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::event::{Event, Moment, Outcome, Recording, RunningAgent};
use super::layout::Layout;
use crate::trace::{Call, Change, Observer, Trace};

/// State files are much smaller.
const MAX_CONTENT_BYTES: u64 = 1 << 20;

pub(super) struct Recorder {
    layout: Layout,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    recording: Recording,
    /// The call that each thread is in.
    pending: BTreeMap<i32, usize>,
    /// The threads that have done something since they last waited.
    busy: BTreeSet<i32>,
}

impl Recorder {
    pub(super) fn new(home: &Path) -> Recorder {
        Recorder { layout: Layout::new(home), state: Mutex::default() }
    }

    /// From here on the home goes through this change.
    pub(super) fn begin(&self, change: &'static str) {
        let mut state = self.state();
        let index = state.recording.events.len();
        state.recording.changes.push((index, change));
    }

    /// What was recorded; nothing is left.
    pub(super) fn take(&self) -> Recording {
        let mut state = self.state();
        state.pending.clear();
        std::mem::take(&mut state.recording)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the checker has a use for it: logs are written too often to be recorded, and no rule is about them.
    fn concerns(&self, change: &Change) -> bool {
        match change {
            Change::Open { path, .. } | Change::Metadata(path) | Change::Write(path) => {
                self.layout.inside(path).is_some_and(|inside| !inside.starts_with("log"))
            }
            Change::Directory(path)
            | Change::Remove(path)
            | Change::Rename { to: path, .. }
            | Change::Link { to: path, .. }
            | Change::SymbolicLink { to: path, .. }
            | Change::Lock(path) => self.layout.inside(path).is_some(),
            Change::Sync(path) | Change::SyncFileSystem(path) => self.layout.is_synced_for_home(path),
            Change::Message(_)
            | Change::Wait
            | Change::Start
            | Change::Execute(_)
            | Change::Signal { .. }
            | Change::Exit => true,
        }
    }

    fn content(&self, change: &Change) -> Option<String> {
        let Change::Rename { from, to } = change else { return None };
        let is_state = self.layout.inside(to).is_some_and(|inside| inside.starts_with("state"));
        let is_short = || from.metadata().is_ok_and(|found| found.is_file() && found.len() <= MAX_CONTENT_BYTES);
        (is_state && is_short()).then(|| std::fs::read_to_string(from).ok()).flatten()
    }
}

impl Observer for Recorder {
    fn before(&self, call: &Call, _trace: &Trace) {
        if !self.concerns(&call.change) {
            return;
        }
        let agent = match call.change {
            Change::Signal { process, .. } => agent_of(process.abs()),
            _ => None,
        };
        let content = self.content(&call.change);
        let mut state = self.state();
        let is_first =
            if call.change == Change::Wait { state.busy.remove(&call.thread) } else { state.busy.insert(call.thread) };
        if call.change == Change::Wait && !is_first {
            return;
        }
        let index = state.recording.events.len();
        state.recording.events.push(Event { call: call.clone(), content, agent, outcome: Outcome::NoReturn });
        state.recording.moments.push(Moment::Begin(index));
        state.pending.insert(call.thread, index);
    }

    fn after(&self, call: &Call, succeeded: bool, _trace: &Trace) {
        let mut state = self.state();
        let Some(index) = state.pending.remove(&call.thread) else { return };
        let Some(event) = state.recording.events.get_mut(index) else { return };
        event.outcome = if succeeded { Outcome::Succeeded } else { Outcome::Failed };
        state.recording.moments.push(Moment::End(index));
    }
}

/// The sub-agent that a process belongs to, from its environment.
fn agent_of(process: i32) -> Option<RunningAgent> {
    let environment = std::fs::read(PathBuf::from(format!("/proc/{process}/environ"))).ok()?;
    let variables: Vec<_> = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let value = |name: &str| variables.iter().find_map(|variable| variable.strip_prefix(name).map(str::to_owned));
    Some(RunningAgent { name: value("AOPS_AGENT_NAME=")?, version: value("AOPS_AGENT_VERSION=")? })
}
