//! Carries out the steps of a plan, and the actions of a sub-agent's state. No decisions are made here.

use std::time::Instant;

use anyhow::Result;
use tokio::task::AbortHandle;

use super::Manager;
use crate::core::agent::{Agent, AgentAction, AgentEvent, JournalNote, ReleaseChange};
use crate::core::model::{AgentName, Version};
use crate::core::order::{Package, Spec};
use crate::core::reconcile::{self, ReconcileStep};
use crate::core::status::HistoryEntry;
use crate::core::supervise::CheckResult;
use crate::home::Home;
use crate::installation::permissions;
use crate::process::health::{self, HealthQuery};
use crate::process::launch::{self, StartSpec, env_hash};
use crate::process::{log, record, stop};
use crate::spm::agent::{self, SubAgent};
use crate::spm::disk;
use crate::spm::input::Input;
use crate::spm::journal::EventSubject;
use crate::spm::{run, stage, timestamp, timestamp_of, unix_now};
use crate::{package, store};

impl Manager {
    /// Compares the desired with the actual state, and starts the steps of the plan.
    pub(super) fn reconcile(&mut self) {
        if self.stop.is_some() || self.exit.is_some() {
            return;
        }
        let now = Instant::now();
        for name in self.orders.held.agents.keys() {
            if !self.agents.contains_key(name) {
                let state = Agent::new(name.clone());
                self.agents.insert(name.clone(), SubAgent::new(state));
            }
        }
        let actual = self.agents.iter().map(|(name, agent)| {
            let order = self.orders.held.agents.get(name);
            (name.clone(), agent.state.actual(order, now))
        });
        let actual = actual.collect();
        for step in reconcile::plan(&self.orders.held, &actual) {
            self.carry_out(step, now);
        }
    }

    fn carry_out(&mut self, step: ReconcileStep, now: Instant) {
        let (name, event) = match step {
            // The epochs of earlier commits are raised first.
            ReconcileStep::Stage { .. } | ReconcileStep::Activate { .. } if !self.releases.may_stage() => return,
            ReconcileStep::Discard { .. } if !self.releases.may_remove() => return,
            ReconcileStep::Stage { name, package } => (name, AgentEvent::Stage(package)),
            ReconcileStep::Activate { name, order } => (name, AgentEvent::Activate(order)),
            ReconcileStep::Configure { name, spec } => {
                let sound = self.may_restart(&name).map_err(|error| stage::release_error(&error));
                let spec_matches = self.spec_matches(&name, &spec);
                (name, AgentEvent::Configure { spec, spec_matches, sound })
            }
            ReconcileStep::Set { name, run } => (name, AgentEvent::Set(run)),
            ReconcileStep::Uninstall { name } => (name, AgentEvent::Uninstall),
            ReconcileStep::Discard { name, version } => (name, AgentEvent::Discard(version)),
        };
        self.step(&name, event, now);
    }

    /// Whether the process of a sub-agent runs with these settings. The record of a dead one counts, too.
    fn spec_matches(&self, name: &AgentName, spec: &Spec) -> bool {
        let record = self.agents.get(name).and_then(|agent| agent.record.as_ref());
        record.is_some_and(|record| record.head.env_hash == env_hash(&spec.env))
    }

    /// Whether a running sub-agent could be restarted; always `Ok` for one that is not running.
    pub(super) fn may_restart(&self, name: &AgentName) -> Result<()> {
        let agent = self.agents.get(name).filter(|agent| agent.state.supervisor().pid().is_some());
        agent.and_then(|agent| self.start_of(agent)).map_or(Ok(()), |start| start.check_permissions())
    }

    pub(super) fn start_of(&self, agent: &SubAgent) -> Option<StartSpec> {
        let state = &agent.state;
        let ordered = || self.orders.held.agents.get(state.name()).map(|order| &order.spec);
        Some(StartSpec {
            home: self.home.clone(),
            name: state.name().clone(),
            version: state.current()?.clone(),
            program: state.program()?.clone(),
            spec: state.spec().or_else(ordered).cloned().unwrap_or_default(),
            agent_id: self.identity.agent_id.clone(),
            endpoint: self.gateway.status.endpoint.clone().unwrap_or_default(),
            restarts: state.supervisor().restarts(),
            groups: self.groups.clone(),
        })
    }

    /// Applies an event to a sub-agent's state, and performs the resulting actions.
    pub(super) fn step(&mut self, name: &AgentName, event: AgentEvent, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        let before = agent.state.supervisor().state();
        let actions = agent.state.step(event, agent::moment(now));
        let supervisor = agent.state.supervisor();
        let after = supervisor.state();
        if before != after {
            tracing::info!(
                agent = %name,
                from = before.as_str(),
                to = after.as_str(),
                why = supervisor.last_error().unwrap_or_default(),
                failures = supervisor.failures(),
                delay = supervisor.starts_at().map(|at| format!("{:.1?}", at.saturating_duration_since(now))),
                "a sub-agent's state changed"
            );
        }
        self.perform(name, actions, now);
    }

    pub(super) fn perform(&mut self, name: &AgentName, actions: Vec<AgentAction>, now: Instant) {
        for action in actions {
            self.act(name, action, now);
        }
    }

    fn act(&mut self, name: &AgentName, action: AgentAction, now: Instant) {
        let Some(agent) = self.agents.get_mut(name) else { return };
        match action {
            AgentAction::Stage { id, package } => self.stage(name, id, package),
            AgentAction::CancelStaging => agent.staging = None,
            AgentAction::Admit { version, inspect } => {
                let epoch = agent.committed_epoch();
                self.off_loop(name, move |home, name| {
                    let admitted = stage::admit(&home, &name, &version, epoch, inspect);
                    Input::Admitted { name, result: admitted.map_err(|error| stage::release_error(&error)) }
                })
            }
            AgentAction::Record { wait } => {
                self.releases.mark_changed();
                if wait {
                    agent.awaited_revision = Some(self.releases.current_revision());
                }
            }
            AgentAction::RaiseEpoch(release) => self.releases.raise(name, &release),
            AgentAction::Switch(version) => self.off_loop(name, move |home, name| {
                let result = agent::make_current(&home, &name, &version);
                let because = |error| format!("cannot activate {name} {version}: {error:#}");
                Input::Switched { result: result.map_err(because), name }
            }),
            AgentAction::Remove => self.off_loop(name, |home, name| {
                let result = remove(&home, &name).map_err(|error| format!("{error:#}"));
                Input::Removed { name, result }
            }),
            AgentAction::Discard(version) => self.off_loop(name, |home, name| {
                discard(&home, &name, &version);
                Input::Discarded { name, version }
            }),
            AgentAction::Inspect(version) => self.off_loop(name, move |home, name| {
                let result = launch::inspect(&home, &name, &version).map_err(|error| format!("{error:#}"));
                Input::Inspected { name, version, result }
            }),
            AgentAction::Start => self.start(name),
            AgentAction::Stop => {
                agent.watch.take().inspect(AbortHandle::abort);
                let target = agent.target(self.groups.as_ref());
                run::stop(&self.inputs, agent.serial, &self.home, target);
            }
            AgentAction::Check => self.check(name),
            AgentAction::CancelCheck => drop(agent.check.take().inspect(AbortHandle::abort)),
            AgentAction::Note(note) => self.note(name, note, now),
        }
    }

    /// Runs disk work for a sub-agent off the event loop.
    fn off_loop(&self, name: &AgentName, work: impl FnOnce(Home, AgentName) -> Input + Send + 'static) {
        let (home, name) = (self.home.clone(), name.clone());
        disk::run(&self.inputs, move || work(home, name));
    }

    fn stage(&mut self, name: &AgentName, id: u64, package: Package) {
        tracing::info!(agent = %name, version = %package.version, "staging a release");
        let job = stage::StagingJob {
            home: self.home.clone(),
            config: self.config.clone(),
            agent_id: self.identity.agent_id.clone(),
            name: name.clone(),
            package,
            id,
            committed_epoch: self.agents.get(name).map_or(0, SubAgent::committed_epoch),
        };
        let staging = stage::start(&self.inputs, &self.staging, job);
        if let Some(agent) = self.agents.get_mut(name) {
            agent.staging = Some(staging);
        }
    }

    fn start(&mut self, name: &AgentName) {
        let Some(start) = self.agents.get(name).and_then(|agent| self.start_of(agent)) else { return };
        let serial = self.next_serial();
        let Some(agent) = self.agents.get_mut(name) else { return };
        agent.serial = serial;
        let last = agent.target(self.groups.as_ref());
        run::start(&self.inputs, agent.serial, start, last);
    }

    /// Numbers the starts and adoptions of all sub-agents, so that a result is attributed to the right process.
    pub(super) fn next_serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    /// Starts a health check, at most one for each process at a time; its result counts only for that process.
    fn check(&mut self, name: &AgentName) {
        let Some(agent) = self.agents.get(name) else { return };
        let question = self.start_of(agent).and_then(HealthQuery::of);
        let (inputs, of, serial) = (self.inputs.clone(), name.clone(), agent.serial);
        let task = tokio::spawn(async move {
            let answer = match question {
                Some(question) => health::run_check(question).await,
                None => CheckResult::Unknown("cannot read the package's health check any more".to_owned()),
            };
            let _ = inputs.send(Input::Checked { name: of, serial, answer });
        });
        if let Some(agent) = self.agents.get_mut(name) {
            agent.check = Some(task.abort_handle());
        }
    }

    /// Adds a note to the journal; a repeating one is rate-limited.
    pub(super) fn note(&mut self, name: &AgentName, note: JournalNote, now: Instant) {
        let JournalNote { kind, outcome, version, mut message, repeats, change } = note;
        if let Some(agent) = self.agents.get_mut(name).filter(|_| repeats) {
            match agent.event_limiter.take(now) {
                None => {
                    tracing::warn!(agent = %name, kind, outcome, message, "an event is not reported to the gateway, because it exceeds the rate limit");
                    return;
                }
                Some(0) => {}
                Some(dropped) => message.push_str(&format!(" ({dropped} earlier events of it were dropped)")),
            }
        }
        if let Some(ReleaseChange { from, to, seconds }) = change {
            let changed = HistoryEntry {
                time: timestamp(),
                began: timestamp_of(unix_now().saturating_sub(seconds)),
                kind: kind.to_owned(),
                agent: name.clone(),
                from,
                to,
                outcome: outcome.to_owned(),
                seconds,
                message: message.clone(),
                unknown: Default::default(),
            };
            self.history.add(changed, &self.inputs);
        }
        self.journal.note(kind, outcome, EventSubject { agent: Some(name), version: version.as_ref() }, message);
    }
}

/// Removes all files of a sub-agent.
fn remove(home: &Home, name: &AgentName) -> Result<()> {
    permissions::agent_directory(home, name)?;
    stop::stop_unseen(home, name)?;
    agent::clear_current(home, name)?;
    store::remove(&home.current(name))?;
    for entry in std::fs::read_dir(home.agent(name)).into_iter().flatten().flatten() {
        let is_release = entry.file_name().to_str().is_some_and(|version| version.parse::<Version>().is_ok());
        if is_release && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            package::discard(&entry.path())?;
        }
    }
    store::remove_tree(&home.agent(name))?;
    record::remove(home, name)?;
    log::remove(home, name)
}

/// Removes a release from the disk, if it exists.
fn discard(home: &Home, name: &AgentName, version: &Version) {
    let removed =
        permissions::agent_directory(home, name).and_then(|()| package::discard(&home.release(name, version)));
    if let Err(error) = &removed {
        tracing::warn!(agent = %name, error = format!("{error:#}"), "cannot remove a release");
    }
}
