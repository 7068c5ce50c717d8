//! What an earlier manager left: found on disk and among the processes, and adopted.

use std::collections::BTreeSet;
use std::time::Instant;

use super::Manager;
use crate::core::desired::Run;
use crate::core::model::{AgentName, Version};
use crate::core::supervise::Event;
use crate::platform;
use crate::process::record::{self, Record};
use crate::process::{launch, tree};
use crate::spm::agent::Agent;
use crate::spm::journal::About;
use crate::spm::run::{self, Running};

impl Manager {
    /// Finds what is installed and what of it runs, and adopts that.
    pub(super) fn take_charge(&mut self) {
        let targets = tree::all(&self.home);
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
            let restarts = target.and_then(|target| target.record.as_ref()).map_or(0, |record| record.head.restarts);
            let agent = Agent::found(&self.home, name.clone(), restarts);
            self.agents.insert(name.clone(), agent);
            match target.and_then(|target| target.record.clone()) {
                Some(record) if record.is_alive() => self.adopt(&name, record),
                Some(record) => match self.by_mark(&name) {
                    Some(marked) => self.adopt(&name, marked),
                    None if record.head.boot_id == platform::boot_id() => {
                        let about = About { agent: Some(&name), version: Some(&record.head.version) };
                        self.journal.note("exit", "failed", about, "ended while no manager was watching");
                    }
                    None => {}
                },
                None => {
                    if let Some(marked) = self.by_mark(&name) {
                        self.adopt(&name, marked);
                    }
                }
            }
        }
        // What runs under our mark and belongs to nothing that is installed has no business here any more. Where it cannot be told what
        // is installed, nothing is ended.
        if self.home.agents().read_dir().is_ok() {
            for target in targets.into_iter().filter(|target| !self.agents.contains_key(&target.name)) {
                tracing::warn!(agent = %target.name, "a sub-agent that is not installed any more is stopped");
                run::stop(&self.inputs, 0, &self.home, target);
            }
        }
    }

    /// A record for a process that has none: by its mark. Of a native sub-agent the oldest, which every other of its tree descends from.
    pub(super) fn by_mark(&self, name: &AgentName) -> Option<Record> {
        let agent = self.agents.get(name)?;
        let members = tree::members(&self.home, &tree::Target::of(name, None));
        let process = members.first()?;
        let version: Version = process.mark.as_ref()?.version.parse().ok()?;
        if agent.active.as_ref() != Some(&version) {
            return None;
        }
        let start = self.start_of(agent)?;
        Some(Record { head: start.head(), pid: process.pid, start_time: process.start_time })
    }

    pub(super) fn adopt(&mut self, name: &AgentName, record: Record) {
        let env = self.desired.agents.get(name).map(|order| order.env.clone());
        let Some(agent) = self.agents.get_mut(name) else { return };
        let since =
            platform::age(record.start_time).and_then(|age| Instant::now().checked_sub(age)).unwrap_or(self.started);
        agent.supervisor.adopt(record.pid, since);
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
        run::watch(&self.inputs, serial, running);
    }
}
