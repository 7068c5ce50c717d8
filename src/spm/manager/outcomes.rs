//! What the loop hears from what runs beside it, and whom it concerns.

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
    pub(super) fn take_in(&mut self, input: Input) {
        let now = Instant::now();
        // Deaths, restarts and writes change nothing that a plan goes by, and come in crowds.
        self.replan |= !matches!(
            input,
            Input::Launched { .. }
                | Input::Exited { .. }
                | Input::Moved { .. }
                | Input::Checked { .. }
                | Input::Saved { .. }
                | Input::UpgradeSeen(_)
        );
        // A sub-agent that was down for a change of release makes room for the next.
        let were_down = self.down_for_upgrade();
        self.heard(input, now);
        self.replan |= self.down_for_upgrade() < were_down;
    }

    /// How many sub-agents are down because their release is being changed.
    fn down_for_upgrade(&self) -> usize {
        self.agents.values().filter(|agent| agent.state.is_down_for_upgrade()).count()
    }

    fn heard(&mut self, input: Input, now: Instant) {
        match input {
            Input::Launched { name, serial, result } => self.launched(&name, serial, result, now),
            Input::Exited { name, serial, success, how } => {
                self.exited(&name, serial, ProcessExit { success, how }, now)
            }
            Input::Moved { name, serial, record } => self.moved(&name, serial, *record, now),
            Input::Ended { name, serial, result } => self.ended(&name, serial, result, now),
            Input::Checked { name, serial, answer } => {
                // Of one that was started again meanwhile it says nothing.
                if self.is_of(&name, serial) {
                    self.step(&name, AgentEvent::Checked(answer), now);
                }
            }
            Input::Staged { id, name, version, result } => {
                if let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.state.is_staging(id)) {
                    agent.staging = None;
                } else {
                    // Another is wanted meanwhile.
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
            Input::MayRollBack { name, to, result, reply } => {
                // Who asked may have gone.
                let _ = reply.send(self.roll_back(&name, &to, result, now));
            }
            Input::Upgraded(outcome) => self.upgraded(outcome, now),
            Input::UpgradeSeen(seen) => self.upgrade_seen(seen, now),
            Input::Migrated(result) => self.tell_of("migration", "failed", result.err()),
            Input::StopRecorded => self.stop_recorded(now),
            Input::Looked(looked) => self.looked(looked, now),
            Input::Reloaded(reloaded) => self.reloaded(reloaded),
            Input::WatchdogJudged(answer) if self.stop.is_none() => self.peer.judged(&self.home, answer, now),
            Input::WatchdogJudged(_) => {}
            Input::Heartbeat(outcome) => self.heartbeat_done(outcome, now),
        }
    }

    /// Whether word of a process is word of the one that a sub-agent has now.
    fn is_of(&self, name: &AgentName, serial: u64) -> bool {
        self.agents.get(name).is_some_and(|agent| agent.serial == serial)
    }

    fn of(&mut self, name: &AgentName, serial: u64) -> Option<&mut SubAgent> {
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
        let Some(agent) = self.of(name, serial) else { return };
        let StartedProcess { running, output_lost } = match result {
            Ok(started) => *started,
            Err(refusal) => {
                self.step(name, AgentEvent::LaunchFailed(refusal), now);
                return self.finish_stop_if_down();
            }
        };
        let record = running.record().clone();
        tracing::info!(agent = %name, version = %record.head.version, pid = record.pid, "a sub-agent is started");
        agent.watch = Some(run::watch(&inputs, serial, running));
        let (pid, version) = (record.pid, record.head.version.clone());
        let runs_so = agent.state.spec().is_none_or(|spec| env_hash(&spec.env) == record.head.env_hash);
        (agent.record, agent.scattered) = (Some(record), false);
        let lost = std::mem::replace(&mut agent.output_lost, output_lost.clone());
        if let Some(note) = note_of_output(lost, output_lost) {
            self.note(name, note, now);
        }
        if !runs_so {
            tracing::info!(agent = %name, "the environment changed during the start; the sub-agent is restarted");
        }
        self.step(name, AgentEvent::Launched { pid, version, runs_so }, now);
    }

    fn exited(&mut self, name: &AgentName, serial: u64, ended: ProcessExit, now: Instant) {
        let Some(agent) = self.of(name, serial) else { return };
        if agent.state.supervisor().is_stopping() {
            return;
        }
        let (success, how) = (ended.success, ended.how.clone());
        self.step(name, AgentEvent::Exited { success, how }, now);
        self.remember_end(name, ended);
    }

    /// Puts an end into the record: the next manager must not take it for one that nobody saw. A start that follows at once has not begun
    /// yet, and replaces the record.
    pub(super) fn remember_end(&mut self, name: &AgentName, ended: ProcessExit) {
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
        let Some(agent) = self.of(name, serial) else { return };
        if !agent.state.supervisor().is_up() {
            // It is being stopped, with all that bears its mark.
            return;
        }
        let pid = record.pid;
        record.save(&home);
        agent.record = Some(record);
        self.step(name, AgentEvent::ProcessReplaced { pid }, now);
    }

    fn ended(&mut self, name: &AgentName, serial: u64, result: Result<(), String>, now: Instant) {
        let Some(agent) = self.of(name, serial) else { return };
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
        // Where it failed, it is tried again with the next desired state or start; until then it shows.
        self.orders.held.removed.remove(name);
        self.agents.remove(name);
        self.releases.change();
        match result {
            Ok(()) => {
                self.problems.remove("uninstall");
                self.journal.note("uninstall", "ok", about, format!("{name} is removed"));
            }
            Err(text) => {
                self.journal.note("uninstall", "failed", about, text.as_str());
                self.problems.insert("uninstall", text);
                // Ordered again, it begins as what is left of it.
                self.find(name, None, None, RunningRelease::Nothing);
            }
        }
    }
}

/// Says that the output of a sub-agent is lost from this start on, or goes into its log again.
fn note_of_output(before: Option<String>, now: Option<String>) -> Option<JournalNote> {
    let (outcome, message) = match (before, now) {
        (before, now) if before == now => return None,
        (_, Some(why)) => ("failed", format!("its output is lost: {why}")),
        (_, None) => ("ok", "its output goes into its log again".to_owned()),
    };
    Some(JournalNote { kind: "log", outcome, version: None, message, repeats: true, change: None })
}
