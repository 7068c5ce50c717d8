//! Handles the inputs of the event loop.

use std::time::Instant;

use super::Manager;
use crate::core::agent::{AgentEvent, JournalNote, ReleaseError};
use crate::core::model::AgentName;
use crate::process::launch::env_hash;
use crate::process::record::{ProcessExit, ProcessRecord};
use crate::spm::agent::{RunningRelease, SubAgent};
use crate::spm::input::{Input, StartedProcess, StateFileName};
use crate::spm::journal::EventSubject;
use crate::spm::run;

impl Manager {
    pub(super) fn handle_input(&mut self, input: Input) {
        let now = Instant::now();
        // Exits, restarts and writes change nothing that a plan depends on, and are frequent.
        self.replan |= !matches!(
            input,
            Input::Launched { .. }
                | Input::Exited { .. }
                | Input::Moved { .. }
                | Input::Checked { .. }
                | Input::Saved { .. }
                | Input::UpgradeRecordRead(_)
        );
        // A sub-agent that was down for a release change lets the next one proceed.
        let were_down = self.down_for_upgrade();
        self.dispatch(input, now);
        self.replan |= self.down_for_upgrade() < were_down;
    }

    /// The number of sub-agents that are down for a release change.
    fn down_for_upgrade(&self) -> usize {
        self.agents.values().filter(|agent| agent.state.is_down_for_upgrade()).count()
    }

    fn dispatch(&mut self, input: Input, now: Instant) {
        match input {
            Input::Launched { name, serial, result } => self.launched(&name, serial, result, now),
            Input::Exited { name, serial, success, how } => {
                self.exited(&name, serial, ProcessExit { success, how }, now)
            }
            Input::Moved { name, serial, record } => self.moved(&name, serial, *record, now),
            Input::Stopped { name, serial, result } => self.stopped(&name, serial, result, now),
            Input::Checked { name, serial, answer } => {
                // A result for an earlier process is ignored.
                if self.is_current(&name, serial) {
                    self.step(&name, AgentEvent::Checked(answer), now);
                }
            }
            Input::Staged { id, name, version, result } => {
                if let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.state.is_staging(id)) {
                    agent.staging = None;
                } else {
                    // Another release was ordered in the meantime.
                    self.trim_cache(now);
                }
                self.step(&name, AgentEvent::Staged { id, version, result }, now);
            }
            Input::Admitted { name, result } => self.step(&name, AgentEvent::Admitted(result), now),
            Input::Switched { name, result } => self.step(&name, AgentEvent::Switched(result), now),
            Input::Discarded { name, version } => self.step(&name, AgentEvent::Discarded(version), now),
            Input::Inspected { name, version, result } => {
                self.step(&name, AgentEvent::Inspected { version, result }, now)
            }
            Input::Removed { name, result } => self.removed(&name, result),
            Input::Saved { file: StateFileName::Ledger, revision, result } => self.ledger_saved(revision, result, now),
            Input::Saved { file: StateFileName::Desired, revision, result } => self.orders_saved(revision, result, now),
            Input::Saved { file: StateFileName::History, result, .. } => self.history.saved(result, &self.inputs),
            Input::Saved { file: StateFileName::Events, result, .. } => self.journal.saved(result, &self.inputs),
            Input::Raised(result) => self.raised(result),
            Input::RollBackChecked { name, to, result, reply } => {
                // The client may have disconnected.
                let _ = reply.send(self.roll_back(&name, &to, result, now));
            }
            Input::Upgraded(outcome) => self.upgraded(outcome, now),
            Input::UpgradeRecordRead(result) => self.upgrade_record_read(result, now),
            Input::Migrated(result) => self.report_problem("migration", "failed", result.err()),
            Input::StopRecorded => self.stop_recorded(now),
            Input::HomeChecked(problems) => self.home_checked(problems, now),
            Input::MaintenanceDone(done) => self.maintenance_done(done),
            Input::WatchdogUnitState(answer) if self.stop.is_none() => {
                self.watchdog.unit_state_received(&self.home, answer, now)
            }
            Input::WatchdogUnitState(_) => {}
            Input::Heartbeat(outcome) => self.heartbeat_done(outcome, now),
        }
    }

    /// Whether a result is for the current process of a sub-agent.
    fn is_current(&self, name: &AgentName, serial: u64) -> bool {
        self.agents.get(name).is_some_and(|agent| agent.serial == serial)
    }

    fn current(&mut self, name: &AgentName, serial: u64) -> Option<&mut SubAgent> {
        self.agents.get_mut(name).filter(|agent| agent.serial == serial)
    }

    fn launched(
        &mut self,
        name: &AgentName,
        serial: u64,
        result: Result<Box<StartedProcess>, ReleaseError>,
        now: Instant,
    ) {
        let inputs = self.inputs.clone();
        let Some(agent) = self.current(name, serial) else { return };
        let StartedProcess { running, output_lost } = match result {
            Ok(started) => *started,
            Err(refusal) => {
                self.step(name, AgentEvent::LaunchFailed(refusal), now);
                return self.finish_stop_if_down();
            }
        };
        let record = running.record().clone();
        tracing::info!(agent = %name, version = %record.head.version, pid = record.pid, "a sub-agent was started");
        agent.watch = Some(run::watch(&inputs, serial, running));
        let (pid, version) = (record.pid, record.head.version.clone());
        let spec_matches = agent.state.spec().is_none_or(|spec| env_hash(&spec.env) == record.head.env_hash);
        (agent.record, agent.scattered) = (Some(record), false);
        let lost = std::mem::replace(&mut agent.output_lost, output_lost.clone());
        if let Some(note) = note_of_output(lost, output_lost) {
            self.note(name, note, now);
        }
        if !spec_matches {
            tracing::info!(agent = %name, "the environment was changed during the start; the sub-agent is restarted");
        }
        self.step(name, AgentEvent::Launched { pid, version, spec_matches }, now);
    }

    fn exited(&mut self, name: &AgentName, serial: u64, ended: ProcessExit, now: Instant) {
        let Some(agent) = self.current(name, serial) else { return };
        if agent.state.supervisor().is_stopping() {
            return;
        }
        let (success, how) = (ended.success, ended.how.clone());
        self.step(name, AgentEvent::Exited { success, how }, now);
        self.record_exit(name, ended);
    }

    /// Writes an exit to the record, so that the next manager does not count it as unobserved. A start that follows at once has not begun
    /// yet, and replaces the record.
    pub(super) fn record_exit(&mut self, name: &AgentName, ended: ProcessExit) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        let supervisor = agent.state.supervisor();
        let Some(record) = agent.record.as_mut().filter(|_| supervisor.is_down() || supervisor.is_starting()) else {
            return;
        };
        record.ended = Some(ended);
        record.head.restarts = supervisor.restarts();
        record.save(&self.home);
    }

    fn moved(&mut self, name: &AgentName, serial: u64, record: ProcessRecord, now: Instant) {
        let home = self.home.clone();
        let Some(agent) = self.current(name, serial) else { return };
        if !agent.state.supervisor().is_up() {
            // It is being stopped, with all processes that have its marker.
            return;
        }
        let pid = record.pid;
        record.save(&home);
        agent.record = Some(record);
        self.step(name, AgentEvent::ProcessReplaced { pid }, now);
    }

    fn stopped(&mut self, name: &AgentName, serial: u64, result: Result<(), String>, now: Instant) {
        let Some(agent) = self.current(name, serial) else { return };
        if result.is_ok() {
            (agent.record, agent.scattered) = (None, false);
        }
        if let (Err(error), Some(stop)) = (&result, &mut self.stop) {
            stop.errors.push(error.clone());
        }
        self.step(name, AgentEvent::Stopped(result), now);
        self.finish_stop_if_down();
    }

    fn removed(&mut self, name: &AgentName, result: Result<(), String>) {
        let about = EventSubject { agent: Some(name), version: None };
        // After a failure the removal is retried with the next desired state or start; until then the problem is shown.
        self.orders.held.removed.remove(name);
        self.agents.remove(name);
        self.releases.mark_changed();
        match result {
            Ok(()) => {
                self.problems.remove("uninstall");
                self.journal.note("uninstall", "ok", about, format!("{name} was removed"));
            }
            Err(text) => {
                self.journal.note("uninstall", "failed", about, text.as_str());
                self.problems.insert("uninstall", text);
                // A new order for it finds its remaining files.
                self.load_agent(name, None, None, RunningRelease::Nothing);
            }
        }
    }
}

/// Reports that the output of a sub-agent is lost from this start on, or logged again.
fn note_of_output(before: Option<String>, now: Option<String>) -> Option<JournalNote> {
    let (outcome, message) = match (before, now) {
        (before, now) if before == now => return None,
        (_, Some(why)) => ("failed", format!("its output is lost until its next start: {why}")),
        (_, None) => ("ok", "its output is logged again".to_owned()),
    };
    Some(JournalNote { kind: "log", outcome, version: None, message, repeats: true, change: None })
}
