//! What an earlier manager left: found on disk and among the processes, and adopted.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::Manager;
use crate::core::desired::Run;
use crate::core::model::{AgentName, Version};
use crate::core::supervise::Event;
use crate::platform::{self, Seen};
use crate::process::launch;
use crate::process::launch::Program;
use crate::process::record::{self, Ended, Record};
use crate::process::tree::{self, Target};
use crate::spm::agent::{Agent, Busy};
use crate::spm::journal::About;
use crate::spm::run::{self, Running};

/// Start times have a resolution of 10 ms. Who is started after an end was noted is started later than this.
const APART: Duration = Duration::from_millis(100);

impl Manager {
    /// Finds what is installed and what of it runs, and adopts that.
    pub(super) fn take_charge(&mut self) {
        let census = tree::Census::take(&self.home, self.groups.as_ref());
        let targets = census.targets;
        let marked = census.marked;
        let recorded = |name: &AgentName| targets.iter().find(|target| target.name == *name);
        let mut names: BTreeSet<AgentName> = self.desired.agents.keys().cloned().collect();
        names.extend(
            std::fs::read_dir(self.home.agents())
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok()),
        );
        for name in names {
            let target = recorded(&name);
            match platform::close_to_others(&self.home.agent(&name)) {
                Ok(false) => {}
                Ok(true) => tracing::warn!(agent = %name, "others could write in its directory, and cannot any more"),
                Err(error) => tracing::warn!(agent = %name, error = %error, "its directory cannot be looked at"),
            }
            let restarts = target.and_then(|target| target.record.as_ref()).map_or(0, |record| record.head.restarts);
            let mut agent = Agent::found(&self.home, name.clone(), restarts);
            agent.scattered = target.is_some_and(Target::is_scattered);
            self.agents.insert(name.clone(), agent);
            match target.and_then(|target| target.record.clone()) {
                Some(record) if record.is_alive() => self.adopt(&name, record),
                record => match (self.by_mark(&name, &marked, record.as_ref()), record) {
                    (Some(marked), _) => {
                        if let Err(error) = marked.save(&self.home) {
                            tracing::warn!(agent = %name, error = format!("{error:#}"), "a process record cannot be written; the mark stands in");
                        }
                        self.adopt(&name, marked);
                    }
                    (None, Some(record)) if record.is_of_this_boot() => self.bury(&name, record),
                    // Of another release, or not to be told from what it started: it makes way for what is to run.
                    (None, _) => drop(target.is_some_and(|target| self.clear_away(&name, target))),
                },
            }
        }
        // What runs under our mark and belongs to nothing that is installed has no business here any more. Where it cannot be told what
        // is installed, nothing is ended.
        if self.home.agents().read_dir().is_ok() {
            let installed: BTreeSet<AgentName> = self.agents.keys().cloned().collect();
            for target in targets.iter().filter(|target| !installed.contains(&target.name)) {
                let name = &target.name;
                let mut agent = Agent::new(name.clone(), 0);
                (agent.record, agent.scattered) = (target.record.clone(), target.is_scattered());
                agent.busy = Some(Busy::Uninstalling);
                self.agents.insert(name.clone(), agent);
                if !self.clear_away(name, target) {
                    self.finish_if_down(name, Instant::now());
                }
            }
        }
    }

    /// Ends what runs of a sub-agent and cannot be adopted, as the sub-agent's own stop: nothing new of it starts meanwhile. `false`: there
    /// is nothing of it.
    fn clear_away(&mut self, name: &AgentName, target: &Target) -> bool {
        let members = tree::members(&self.home, target);
        if members.is_empty() && target.groups_are_empty() {
            target.remove_groups();
            return false;
        }
        let Some(agent) = self.agents.get_mut(name) else { return false };
        let pid = members.first().map_or(0, |process| process.pid);
        tracing::warn!(agent = %name, pid, "what runs of a sub-agent is none of its active release and is stopped");
        let now = Instant::now();
        agent.serial += 1;
        agent.supervisor.adopt(pid, now, now, 0.0);
        self.feed(name, Event::Rest, now);
        true
    }

    /// A record for a process that has none: by its mark. Of a native sub-agent it leads its session, as we start it; what a dead one
    /// left behind does not.
    fn by_mark(&self, name: &AgentName, marked: &[Seen], record: Option<&Record>) -> Option<Record> {
        let agent = self.agents.get(name)?;
        let native = matches!(agent.program, Some(Program::Native(_)));
        let is_its = |process: &&Seen| {
            !process.is_check() && process.mark.as_ref().is_some_and(|mark| mark.name == name.as_str())
        };
        // What was there when a manager noted the end of the main process is what that left behind.
        let noted = record.filter(|record| record.ended.is_some()).and_then(|_| record::age(&self.home, name));
        let came_after = |process: &&Seen| match (noted, platform::age(process.start_time)) {
            (Some(noted), Some(age)) => age + APART < noted,
            _ => true,
        };
        let is_main = |process: &&Seen| !native || (process.session == process.pid && came_after(process));
        let process = marked.iter().filter(is_its).find(is_main)?;
        let version: Version = process.mark.as_ref()?.version.parse().ok()?;
        if agent.active.as_ref() != Some(&version) {
            return None;
        }
        let start = self.start_of(agent)?;
        let group = start.group();
        let group = group.filter(|group| group.members().is_ok_and(|members| members.contains(&process.pid)));
        let group = group.map(|group| group.name());
        Some(Record { head: start.head(), pid: process.pid, start_time: process.start_time, group, ended: None })
    }

    /// Takes in that a process of this boot has ended, whether or not a manager saw it: its restart policy says what follows.
    fn bury(&mut self, name: &AgentName, record: Record) {
        let now = Instant::now();
        let about = About { agent: Some(name), version: Some(&record.head.version) };
        let ended = record.ended.clone().unwrap_or_else(|| {
            let how = "ended while no manager was watching".to_owned();
            self.journal.note("exit", "failed", about, how.as_str());
            Ended { success: None, how }
        });
        let order = self.desired.agents.get(name);
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.serial += 1;
        agent.supervisor.adopt(record.pid, now, now, 0.0);
        match order {
            Some(order)
                if order.run == Run::Start
                    && agent.active.as_ref() == Some(&order.version)
                    && record.head.version == order.version =>
            {
                agent.run = Run::Start;
                agent.env = Some(order.env.clone());
                agent.record = Some(record);
                agent.supervisor.step(Event::Run, now, 0.0);
                self.feed(name, Event::Exited { success: ended.success, how: ended.how }, now);
            }
            // What it left behind is ended; the first plan says the rest.
            _ => {
                agent.record = Some(record);
                self.feed(name, Event::Rest, now);
            }
        }
    }

    fn adopt(&mut self, name: &AgentName, record: Record) {
        let env = self.desired.agents.get(name).map(|order| order.env.clone());
        let Some(agent) = self.agents.get_mut(name) else { return };
        let since =
            platform::age(record.start_time).and_then(|age| Instant::now().checked_sub(age)).unwrap_or(self.started);
        agent.supervisor.adopt(record.pid, since, Instant::now(), fastrand::f64());
        agent.run = Run::Start;
        agent.supervisor.step(Event::Run, Instant::now(), 0.0);
        // With another environment than it is to have, it is restarted by the first plan.
        agent.env = env.filter(|env| launch::env_hash(env) == record.head.env_hash);
        agent.serial += 1;
        agent.record = Some(record.clone());
        let serial = agent.serial;
        tracing::info!(agent = %name, pid = record.pid, "a sub-agent is adopted");
        let script = record.head.kind == record::Kind::Script;
        let start = script.then(|| self.agents.get(name).and_then(|agent| self.start_of(agent))).flatten();
        let running = match start {
            Some(start) => Running::Script(Box::new(start), record),
            None => Running::Adopted(record),
        };
        let watch = run::watch(&self.inputs, serial, running);
        if let Some(agent) = self.agents.get_mut(name) {
            agent.watch = Some(watch);
        }
    }
}
