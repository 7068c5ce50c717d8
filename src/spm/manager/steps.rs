//! Carrying plans out: each step begun, and what waited for it gone on with when word of its end comes.

use std::time::Instant;

use anyhow::{Context, Result};
use tokio::task::AbortHandle;

use super::Manager;
use crate::core::desired::Run;
use crate::core::env::Env;
use crate::core::model::{AgentName, Version};
use crate::core::reconcile::{self, Step};
use crate::core::supervise::{Action, Event};
use crate::core::text::cut;
use crate::home::Home;
use crate::installation::guard;
use crate::package::{self, Withdrawn};
use crate::process::launch::{Start, env_hash};
use crate::process::record::Ended;
use crate::process::{log, record};
use crate::spm::Input;
use crate::spm::agent::{Agent, Busy};
use crate::spm::journal::{About, MAX_MESSAGE_BYTES};
use crate::spm::run::{self, Running};
use crate::spm::stage::{self, Refusal};
use crate::{platform, store};

/// Of the name of a variable that may not be set, so much is shown, bytes.
const MAX_NAME_SHOWN: usize = 64;

impl Manager {
    pub(super) fn start_of(&self, agent: &Agent) -> Option<Start> {
        Some(Start {
            home: self.home.clone(),
            name: agent.name.clone(),
            version: agent.active.clone()?,
            program: agent.program.clone()?,
            env: agent
                .env
                .clone()
                .or_else(|| Some(self.desired.agents.get(&agent.name)?.env.clone()))
                .unwrap_or_default(),
            agent_id: self.agent_id.clone(),
            endpoint: self.gateway.endpoint.clone().unwrap_or_default(),
            restarts: agent.supervisor.restarts(),
            groups: self.groups.clone(),
        })
    }

    /// Compares what is wanted with what is, and begins what is to be done.
    pub(super) fn reconcile(&mut self) {
        if self.stopping.is_some() || self.ending.is_some() {
            return;
        }
        let now = Instant::now();
        for name in self.desired.agents.keys() {
            if !self.agents.contains_key(name) {
                self.agents.insert(name.clone(), Agent::new(name.clone(), 0));
            }
        }
        let actual = self.agents.iter().map(|(name, agent)| (name.clone(), agent.actual(now))).collect();
        for step in reconcile::plan(&self.desired, &actual) {
            self.carry_out(step, now);
        }
    }

    pub(super) fn carry_out(&mut self, step: Step, now: Instant) {
        match step {
            Step::Stage { name, version } => {
                let (Some(order), Some(agent)) = (self.desired.agents.get(&name), self.agents.get_mut(&name)) else {
                    return;
                };
                tracing::info!(agent = %name, version = %version, "a release is staged");
                let job = stage::Job {
                    home: self.home.clone(),
                    config: self.config.clone(),
                    agent_id: self.agent_id.clone(),
                    name,
                    order: order.clone(),
                };
                agent.staging = Some(stage::start(&self.inputs, &self.desk, job));
            }
            // Before anything is stopped: what runs goes on running.
            Step::Activate { name, version, .. } if let Err(error) = stage::admit(&self.home, &name, &version) => {
                self.refuse_activation(&name, version, &error, now);
            }
            Step::Activate { name, version, run, env } => {
                self.begin(&name, Busy::Activating { version, run, env }, now)
            }
            Step::Uninstall { name } => self.begin(&name, Busy::Uninstalling, now),
            Step::Configure { name, .. } if self.agents.get(&name).is_some_and(|agent| agent.is_held_back(now)) => {}
            Step::Configure { name, .. } if let Err((version, error)) = self.may_restart(&name) => {
                // With the environment that it has, it goes on running.
                self.hold_back(&name, version, "env", &error, now);
            }
            Step::Configure { name, env } => {
                let Some(agent) = self.agents.get_mut(&name) else { return };
                // One that was adopted with another, and has ended since, may have been started with this one.
                let runs_so = agent.record.as_ref().is_some_and(|record| record.head.env_hash == env_hash(&env));
                agent.env = Some(env);
                if agent.take_hold() {
                    agent.error = None;
                    agent.inspect(&self.home);
                }
                if agent.supervisor.pid().is_some() && !runs_so {
                    tracing::info!(agent = %name, "the environment changed; the sub-agent is restarted");
                    self.feed(&name, Event::Again, now);
                }
            }
            Step::Set { name, run } => {
                let Some(agent) = self.agents.get_mut(&name) else { return };
                agent.run = run;
                self.feed(&name, if run == Run::Start { Event::Run } else { Event::Rest }, now);
            }
            Step::Discard { name, version } => {
                let Some(agent) = self.agents.get_mut(&name) else { return };
                agent.releases.remove(&version);
                discard(&self.home, &name, &version);
            }
        }
    }

    /// Whether what runs of a sub-agent could be started again; if not, its release and why. Of one that does not run nothing is asked.
    pub(super) fn may_restart(&self, name: &AgentName) -> Result<(), (Version, anyhow::Error)> {
        let agent = self.agents.get(name).filter(|agent| agent.supervisor.pid().is_some());
        let Some(start) = agent.and_then(|agent| self.start_of(agent)) else { return Ok(()) };
        start.sound().map_err(|error| (start.version, error))
    }

    /// Leaves something undone until it is tried again, and tells why, once.
    fn hold_back(&mut self, name: &AgentName, version: Version, kind: &str, error: &anyhow::Error, now: Instant) {
        let refusal = Refusal::of(error);
        let Some(agent) = self.agents.get_mut(name) else { return };
        if agent.error.as_ref() != Some(&refusal.why) {
            let about = About { agent: Some(name), version: Some(&version) };
            self.journal.note(kind, refusal.outcome(), about, refusal.why.as_str());
        }
        agent.hold_back(version, refusal, now);
    }

    /// Takes the sub-agent down for something that needs it down.
    pub(super) fn begin(&mut self, name: &AgentName, busy: Busy, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.busy = Some(busy);
        self.feed(name, Event::Rest, now);
        self.finish_if_down(name, now);
    }

    /// Goes on with what waited for the sub-agent to be down.
    pub(super) fn finish_if_down(&mut self, name: &AgentName, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        if !agent.supervisor.is_down() {
            return;
        }
        match agent.busy.take() {
            None => {}
            Some(Busy::Activating { version, run, env }) => self.activate(name, version, run, env, now),
            Some(Busy::Uninstalling) => self.remove(name),
        }
    }

    pub(super) fn activate(&mut self, name: &AgentName, version: Version, run: Run, env: Env, now: Instant) {
        self.replan = true;
        let switched = stage::commit_epoch(&self.home, name, &version).and_then(|()| {
            platform::write_current(&self.home.current(name), version.as_str()).with_context(|| {
                format!("cannot activate {name} {version}: cannot switch {}", self.home.current(name).display())
            })
        });
        let Some(agent) = self.agents.get_mut(name) else { return };
        match switched {
            Ok(()) => {
                agent.backup = agent.active.replace(version.clone());
                agent.error = None;
                agent.release_hold();
                agent.inspect(&self.home);
                let about = About { agent: Some(name), version: Some(&version) };
                self.journal.note("activate", "ok", about, format!("{name} {version} is active"));
            }
            Err(error) => self.refuse_activation(name, version, &error, now),
        }
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.run = run;
        agent.env = Some(env);
        // A stop may have come while the old release was being ended.
        if run == Run::Start && self.stopping.is_none() {
            self.feed(name, Event::Run, now);
        }
    }

    /// What is active stays so. A release that was withdrawn goes, so that it is fetched as it is published now.
    fn refuse_activation(&mut self, name: &AgentName, version: Version, error: &anyhow::Error, now: Instant) {
        self.hold_back(name, version.clone(), "activate", error, now);
        let Some(agent) = self.agents.get_mut(name) else { return };
        // One whose program runs all the same (what is active could not be told) keeps its files.
        let runs = agent.record.as_ref().is_some_and(|record| record.ended.is_none() && record.head.version == version);
        if error.is::<Withdrawn>() && !runs && discard(&self.home, name, &version) {
            agent.releases.remove(&version);
            agent.backup.take_if(|backup| *backup == version);
        }
    }

    pub(super) fn remove(&mut self, name: &AgentName) {
        self.replan = true;
        let removed = guard::place(&self.home, name)
            .and_then(|()| store::remove(&self.home.current(name)))
            .and_then(|()| {
                for version in self.agents.get(name).map(|agent| agent.releases.clone()).unwrap_or_default() {
                    package::discard(&self.home.release(name, &version))?;
                }
                store::remove_tree(&self.home.agent(name))
            })
            .and_then(|()| record::remove(&self.home, name))
            .and_then(|()| log::remove(&self.home, name));
        let about = About { agent: Some(name), version: None };
        match removed {
            Ok(()) => {
                self.agents.remove(name);
                self.desired.removed.remove(name);
                self.problems.remove("uninstall");
                self.journal.note("uninstall", "ok", about, format!("{name} is removed"));
            }
            Err(error) => {
                let text = format!("{error:#}");
                self.journal.note("uninstall", "failed", about, text.as_str());
                // Tried again with the next desired state or start; until then it shows.
                self.problems.insert("uninstall", text);
                self.desired.removed.remove(name);
                // Wanted again, it is begun with as what is left of it.
                self.agents.insert(name.clone(), Agent::found(&self.home, name.clone(), 0));
            }
        }
    }

    /// Tells a sub-agent's supervisor what happened and does what it says.
    pub(super) fn feed(&mut self, name: &AgentName, event: Event, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        let before = agent.supervisor.state();
        let of_health = matches!(event, Event::Checked(_));
        let action = agent.supervisor.step(event, now, fastrand::f64());
        self.note_transition(name, before, action.filter(|_| of_health), now);
        let Some(agent) = self.agents.get_mut(name) else { return };
        if !agent.supervisor.is_up() {
            agent.question.take().inspect(AbortHandle::abort);
        }
        match action {
            Some(Action::Start) => self.start(name, now),
            Some(Action::Stop) => {
                agent.watch.take().inspect(AbortHandle::abort);
                let target = agent.target(self.groups.as_ref());
                run::stop(&self.inputs, agent.serial, &self.home, target);
            }
            Some(Action::Check) => self.ask_health(name),
            None => {}
        }
    }

    pub(super) fn start(&mut self, name: &AgentName, now: Instant) {
        if let Some(agent) = self.agents.get_mut(name).filter(|agent| agent.program.is_none()) {
            // What was wrong with the release may have been mended.
            agent.inspect(&self.home);
        }
        let Some(agent) = self.agents.get(name) else { return };
        let start = self.start_of(agent);
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.serial += 1;
        match start {
            Some(start) => {
                let refused = start.refused_env();
                let refused = (!refused.is_empty()).then(|| {
                    let names = refused.iter().map(|name| cut(name, MAX_NAME_SHOWN)).collect::<Vec<_>>().join(", ");
                    cut(
                        &format!("the gateway may not set {names}; its package would have to allow it"),
                        MAX_MESSAGE_BYTES,
                    )
                });
                if let Some(text) = refused.as_ref().filter(|_| agent.refused_env != refused) {
                    self.journal.note("env", "refused", About { agent: Some(name), version: None }, text.as_str());
                }
                agent.refused_env = refused;
                let last = agent.target(self.groups.as_ref());
                run::start(&self.inputs, agent.serial, start, last);
            }
            None => {
                let why = agent.error.clone().unwrap_or_else(|| "no release of it is active".to_owned());
                self.feed(name, Event::StartFailed { why }, now);
            }
        }
    }

    pub(super) fn take_in(&mut self, input: Input) {
        let now = Instant::now();
        // Deaths and restarts change nothing that a plan goes by, and come in crowds.
        self.replan |= !matches!(input, Input::Launched { .. } | Input::Exited { .. } | Input::Moved { .. });
        match input {
            Input::Launched { name, serial, result } => self.launched(&name, serial, result, now),
            Input::Exited { name, serial, success, how } => {
                let Some(agent) = self.agents.get(&name).filter(|agent| agent.serial == serial) else { return };
                if agent.supervisor.is_stopping() {
                    return;
                }
                let outcome = if success == Some(true) { "ok" } else { "failed" };
                self.tell(&name, "exit", outcome, &how, now);
                let ended = Ended { success, how: how.clone() };
                self.feed(&name, Event::Exited { success, how }, now);
                self.remember_end(&name, ended);
            }
            Input::Moved { name, serial, record } => {
                let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.serial == serial) else { return };
                if !agent.supervisor.is_up() {
                    // It is being stopped, with all that bears its mark.
                    return;
                }
                agent.supervisor.replace(record.pid, now);
                if let Err(error) = record.save(&self.home) {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "a process record cannot be written; the mark stands in"
                    );
                }
                agent.record = Some(*record);
            }
            Input::Ended { name, serial, result } => {
                let Some(agent) = self.agents.get_mut(&name).filter(|agent| agent.serial == serial) else { return };
                if result.is_ok() {
                    (agent.record, agent.scattered) = (None, false);
                }
                if let Err(error) = result {
                    self.journal.note("stop", "failed", About { agent: Some(&name), version: None }, error.as_str());
                    self.stop_errors.push(error.clone());
                    agent.error = Some(error);
                }
                self.feed(&name, Event::Stopped, now);
                self.finish_if_down(&name, now);
                self.finish_stop_if_down();
            }
            Input::Checked { name, serial, answer } => {
                // Of one that was started again meanwhile it says nothing.
                if self.agents.get(&name).is_some_and(|agent| agent.serial == serial) {
                    self.feed(&name, Event::Checked(answer), now);
                }
            }
            Input::Staged { name, version, result } => {
                let Some(agent) = self.agents.get_mut(&name) else {
                    // It was removed meanwhile.
                    if let Err(error) = guard::place(&self.home, &name)
                        .and_then(|()| package::discard(&self.home.release(&name, &version)))
                        .and_then(|()| store::remove_tree(&self.home.agent(&name)))
                    {
                        tracing::warn!(agent = %name, error = format!("{error:#}"), "a release that nobody wants any more cannot be removed");
                    }
                    return;
                };
                if agent.staged_now() != Some(&version) {
                    // Another is wanted meanwhile; the next plan discards this one.
                    if result.is_ok() {
                        agent.releases.insert(version);
                    }
                    return self.trim_cache(now);
                }
                agent.staging = None;
                let about = About { agent: Some(&name), version: Some(&version) };
                match result {
                    Ok(()) => {
                        agent.error = None;
                        agent.release_hold();
                        agent.releases.insert(version.clone());
                        self.journal.note("stage", "ok", about, format!("{name} {version} is staged"));
                    }
                    Err(refusal) => {
                        if agent.error.as_ref() != Some(&refusal.why) {
                            self.journal.note("stage", refusal.outcome(), about, refusal.why.as_str());
                        }
                        agent.hold_back(version, refusal, now);
                    }
                }
            }
            Input::WatchdogJudged(answer) if self.stopping.is_none() => self.peer.judged(&self.home, answer, now),
            Input::WatchdogJudged(_) => {}
            Input::Heartbeat(outcome) => self.heartbeat_done(outcome, now),
        }
    }

    /// Puts an end that is not followed by a start at once into the record: the next manager must not take it for one that nobody saw.
    fn remember_end(&mut self, name: &AgentName, ended: Ended) {
        let Some(agent) = self.agents.get_mut(name).filter(|agent| agent.supervisor.is_down()) else { return };
        let Some(record) = &mut agent.record else { return };
        record.ended = Some(ended);
        record.head.restarts = agent.supervisor.restarts();
        if let Err(error) = record.save(&self.home) {
            tracing::warn!(agent = %name, error = format!("{error:#}"), "a process record cannot be written");
        }
    }

    pub(super) fn launched(
        &mut self,
        name: &AgentName,
        serial: u64,
        result: Result<Box<Running>, Refusal>,
        now: Instant,
    ) {
        let Some(agent) = self.agents.get_mut(name).filter(|agent| agent.serial == serial) else { return };
        match result {
            Ok(running) => {
                let record = running.record().clone();
                tracing::info!(agent = %name, version = %record.head.version, pid = record.pid, "a sub-agent is started");
                (agent.record, agent.scattered) = (Some(record.clone()), false);
                agent.watch = Some(run::watch(&self.inputs, serial, *running));
                self.feed(name, Event::Started { pid: record.pid }, now);
                if self
                    .agents
                    .get(name)
                    .and_then(|agent| agent.env.as_ref())
                    .is_some_and(|env| env_hash(env) != record.head.env_hash)
                {
                    tracing::info!(agent = %name, "the environment changed during the start; the sub-agent is restarted");
                    self.feed(name, Event::Again, now);
                }
            }
            Err(refusal) => {
                let outcome = refusal.outcome();
                let why = refusal.why;
                if agent.supervisor.last_error() != Some(&why) {
                    self.tell(name, "start", outcome, &why, now);
                }
                self.feed(name, Event::StartFailed { why }, now);
                self.finish_if_down(name, now);
                self.finish_stop_if_down();
            }
        }
    }
}

/// Removes a release from the disk, where it is still there; whether it is gone.
fn discard(home: &Home, name: &AgentName, version: &Version) -> bool {
    let gone = guard::place(home, name).and_then(|()| package::discard(&home.release(name, version)));
    if let Err(error) = &gone {
        tracing::warn!(agent = %name, error = format!("{error:#}"), "a release cannot be removed");
    }
    gone.is_ok()
}
