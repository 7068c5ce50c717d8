//! Finds what an earlier manager left, on disk and among the processes, and adopts it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::Manager;
use crate::core::agent::{Agent, AgentEvent, PriorExit};
use crate::core::ledger::LedgerEntry;
use crate::core::model::{AgentName, Version};
use crate::core::order::{Run, Spec};
use crate::core::program::{PackageKind, Program};
use crate::installation::permissions;
use crate::platform::{self, ProcessInfo};
use crate::process::launch::{self, env_hash};
use crate::process::record::{self, ProcessExit, ProcessRecord};
use crate::process::tree::{self, StopTarget};
use crate::spm::agent::{self, RunningRelease, SubAgent};
use crate::spm::input::RunningProcess;
use crate::spm::journal::EventSubject;
use crate::spm::run;

/// Margin for comparing start times, which have a resolution of 10 ms.
const START_TIME_MARGIN: Duration = Duration::from_millis(100);

impl Manager {
    /// Finds the installed sub-agents and their running processes, and adopts these.
    pub(super) fn adopt_all(&mut self) {
        let census = tree::Census::take(&self.home, self.groups.as_ref());
        let targets = census.targets;
        let marked = census.marked;
        let recorded = |name: &AgentName| targets.iter().find(|target| target.name == *name);
        let mut names: BTreeSet<AgentName> = self.orders.held.agents.keys().cloned().collect();
        names.extend(self.releases.names().cloned());
        names.extend(
            std::fs::read_dir(self.home.agents())
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok()),
        );
        for name in names {
            let target = recorded(&name);
            match platform::deny_write_to_others(&self.home.agent(&name)) {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(agent = %name, "other users could write to the directory of a sub-agent; its permissions were restricted")
                }
                Err(error) => {
                    tracing::warn!(agent = %name, error = %error, "cannot check the permissions of a sub-agent's directory")
                }
            }
            let entry = self.releases.take_entry(&name);
            let record = target.and_then(|target| target.record.clone());
            let is_alive = record.as_ref().is_some_and(ProcessRecord::is_alive);
            let main = if is_alive { None } else { self.main_process_by_marker(&name, &marked, record.as_ref()) };
            let runs = match (&record, &main) {
                (Some(record), _) if is_alive => RunningRelease::Recorded(&record.head.version),
                (_, Some((_, version))) => RunningRelease::Marked(version),
                _ => RunningRelease::Nothing,
            };
            self.load_agent(&name, entry, target, runs);
            match record {
                Some(record) if is_alive => self.adopt(&name, record),
                record => match (main.and_then(|main| self.record_of(&name, main)), record) {
                    (Some(marked), _) => {
                        marked.save(&self.home);
                        self.adopt(&name, marked);
                    }
                    (None, Some(record)) if record.is_of_this_boot() => self.handle_prior_exit(&name, record),
                    // Of another release, or not distinguishable from its children: it is stopped before the active release is started.
                    (None, _) => drop(target.is_some_and(|target| self.stop_unadoptable(&name, target))),
                },
            }
        }
        // Marked processes of sub-agents that are not installed are stopped, unless the installed ones cannot be listed.
        if self.home.agents().read_dir().is_ok() {
            let installed: BTreeSet<AgentName> = self.agents.keys().cloned().collect();
            for target in targets.iter().filter(|target| !installed.contains(&target.name)) {
                let (name, now) = (&target.name, Instant::now());
                let mut found = SubAgent::new(Agent::new(name.clone()));
                (found.record, found.scattered) = (target.record.clone(), target.is_scattered());
                self.agents.insert(name.clone(), found);
                self.stop_unadoptable(name, target);
                self.step(name, AgentEvent::Uninstall, now);
            }
        }
        self.raise_committed();
    }

    /// Loads the state of a sub-agent from the disk. `entry`: its ledger entry; `target`: its processes that may be alive.
    pub(super) fn load_agent(
        &mut self,
        name: &AgentName,
        entry: Option<LedgerEntry>,
        target: Option<&StopTarget>,
        runs: RunningRelease<'_>,
    ) {
        let had_entry = entry.clone();
        let record = target.and_then(|target| target.record.as_ref());
        let mut found = agent::discover(&self.home, name, entry, record, runs);
        if had_entry.as_ref() != Some(&found.ledger) {
            self.releases.mark_changed();
        }
        let current = found.ledger.current().map(|release| release.version.clone());
        if let Some(current) = &current {
            let program = launch::inspect(&self.home, name, current);
            found.program = Some(program.map_err(|error| format!("{error:#}")));
            self.restore_current_link(name, current);
        }
        let now = Instant::now();
        found.order = self.orders.held.agents.get(name).cloned();
        let (state, actions) = Agent::restore(name.clone(), found);
        let scattered = target.is_some_and(StopTarget::is_scattered);
        self.agents.insert(name.clone(), SubAgent { scattered, ..SubAgent::new(state) });
        self.perform(name, actions, now);
    }

    /// The ledger takes precedence over the link `current`: a differing link is rewritten before the event loop starts.
    fn restore_current_link(&self, name: &AgentName, current: &Version) {
        let link = self.home.current(name);
        if platform::read_current(&link).ok().flatten().as_deref() == Some(current.as_str()) {
            return;
        }
        tracing::warn!(agent = %name, version = %current, "the link `current` differs from the ledger and is rewritten");
        let written = permissions::agent_directory(&self.home, name)
            .and_then(|()| agent::make_current(&self.home, name, current));
        if let Err(error) = written {
            tracing::warn!(agent = %name, error = format!("{error:#}"), "cannot rewrite the link `current`");
        }
    }

    /// Stops processes of a sub-agent that cannot be adopted. This is a stop of the sub-agent, so nothing of it starts meanwhile. `false`:
    /// there are no processes.
    fn stop_unadoptable(&mut self, name: &AgentName, target: &StopTarget) -> bool {
        let members = tree::members(&self.home, target);
        if members.is_empty() && target.groups_are_empty() {
            target.remove_groups();
            return false;
        }
        let serial = self.next_serial();
        let Some(agent) = self.agents.get_mut(name) else { return false };
        let pid = members.first().map_or(0, |process| process.pid);
        tracing::warn!(agent = %name, pid, "processes of a sub-agent cannot be adopted and are stopped");
        let now = Instant::now();
        agent.serial = serial;
        let actions = agent.state.stop_leftover(pid, agent::moment(now));
        self.perform(name, actions, now);
        true
    }

    /// The main process of a sub-agent and its release, by the environment marker. A native sub-agent's main process leads its session;
    /// leftovers of a dead one do not. `record`: of a dead main process.
    fn main_process_by_marker(
        &self,
        name: &AgentName,
        marked: &[ProcessInfo],
        record: Option<&ProcessRecord>,
    ) -> Option<(ProcessInfo, Version)> {
        // A process that existed when a manager recorded the main process's exit is a leftover.
        let recorded_exit = record.filter(|record| record.ended.is_some()).and_then(|_| record::age(&self.home, name));
        let came_after = |process: &ProcessInfo| match (recorded_exit, platform::age(process.start_time)) {
            (Some(recorded_exit), Some(age)) => age + START_TIME_MARGIN < recorded_exit,
            _ => true,
        };
        marked.iter().find_map(|process| {
            let mark = process.marker.as_ref().filter(|mark| mark.name == name.as_str() && !mark.is_check)?;
            let version: Version = mark.version.parse().ok()?;
            let is_main = match launch::inspect(&self.home, name, &version).ok()? {
                Program::Native(_) => process.session == process.pid && came_after(process),
                Program::Script => true,
            };
            is_main.then(|| (process.clone(), version))
        })
    }

    /// A record for a main process without one; `None`: it is not of the current release.
    fn record_of(&self, name: &AgentName, (process, version): (ProcessInfo, Version)) -> Option<ProcessRecord> {
        let agent = self.agents.get(name)?;
        if agent.state.current() != Some(&version) {
            return None;
        }
        let start = self.start_of(agent)?;
        Some(start.record_of(&process))
    }

    /// Handles the exit of a process of this boot, whether or not a manager observed it: the restart policy decides what follows.
    fn handle_prior_exit(&mut self, name: &AgentName, record: ProcessRecord) {
        let now = Instant::now();
        let about = EventSubject { agent: Some(name), version: Some(&record.head.version) };
        let was_seen = record.ended.is_some();
        let ended = record.ended.clone().unwrap_or_else(|| {
            let how = "exited while no manager was running".to_owned();
            self.journal.note("exit", "failed", about, how.as_str());
            ProcessExit { success: None, how }
        });
        let serial = self.next_serial();
        let order = self.orders.held.agents.get(name);
        let Some(agent) = self.agents.get_mut(name) else { return };
        // Its leftovers are stopped. Its restart policy applies if its release is still the ordered one; otherwise the first plan decides.
        let ordered = order.filter(|order| {
            let version = Some(&order.package.version);
            order.run == Run::Start && agent.state.current() == version && Some(&record.head.version) == version
        });
        agent.serial = serial;
        let (pid, version) = (record.pid, record.head.version.clone());
        agent.record = Some(record);
        let ordered = ordered.map(|order| order.spec.clone());
        let end = PriorExit { success: ended.success, how: ended.how.clone(), was_seen };
        let actions = agent.state.adopt_exited(pid, version, end, ordered, agent::moment(now));
        self.perform(name, actions, now);
        self.record_exit(name, ended);
    }

    fn adopt(&mut self, name: &AgentName, record: ProcessRecord) {
        let ordered = self.orders.held.agents.get(name).map(|order| order.spec.clone());
        let now = Instant::now();
        let since = platform::age(record.start_time).and_then(|age| now.checked_sub(age));
        let since = since.unwrap_or(self.identity.started);
        let serial = self.next_serial();
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.serial = serial;
        agent.record = Some(record.clone());
        tracing::info!(agent = %name, pid = record.pid, "a sub-agent was adopted");
        // If its environment differs from the ordered one, the first plan restarts it.
        let spec = ordered.filter(|spec: &Spec| env_hash(&spec.env) == record.head.env_hash);
        let version = record.head.version.clone();
        let actions = agent.state.adopt(record.pid, version, since, spec, agent::moment(now));
        self.perform(name, actions, now);
        let script = record.head.kind == PackageKind::Script;
        let start = script.then(|| self.agents.get(name).and_then(|agent| self.start_of(agent))).flatten();
        let running = match start {
            Some(start) => RunningProcess::Script(Box::new(start), record),
            None => RunningProcess::Adopted(record),
        };
        if let Some(agent) = self.agents.get_mut(name) {
            agent.watch = Some(run::watch(&self.inputs, agent.serial, running));
        }
    }
}
