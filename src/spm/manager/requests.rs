//! Handles the requests at the control socket: status, restart, upgrade and rollback, and the manager's exit with or without the
//! sub-agents.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::exchange::{describe_clock_offset, is_clock_off};
use super::{Manager, PendingStop};
use crate::control_socket::{ControlReply, ControlRequest, Goodbye, Request};
use crate::core::agent::AgentEvent;
use crate::core::model::{AgentName, MANAGER_PACKAGE, Version};
use crate::core::role::Role;
use crate::core::status::{self, AgentStatus, HomeState, SkippedStatus, Status};
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::core::watch::memory;
use crate::role;
use crate::spm::agent::SubAgent;
use crate::spm::disk;
use crate::spm::input::Input;
use crate::spm::journal::EventSubject;
use crate::spm::stage;
use crate::spm::upgrade::UpgradeSource;

/// How long after the manager's start a running watchdog may take to connect.
const WATCHDOG_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for recording a stop; then the sub-agents are stopped without the record.
const STOP_RECORD_TIMEOUT: Duration = Duration::from_secs(10);

impl Manager {
    pub(super) fn handle_request(&mut self, event: ControlRequest) {
        let now = Instant::now();
        let (request, reply) = match event {
            ControlRequest::PeerGone { role: Role::Spa, pid } => return self.watchdog.disconnected(pid, now),
            ControlRequest::PeerGone { .. } => return,
            ControlRequest::Rejected { why } => return self.report_rejected_client(&why, now),
            ControlRequest::Request(request, reply) => (request, reply),
        };
        let answer = match request {
            Request::Hello { role: Role::Spa, pid } => {
                self.watchdog.hello(pid, now);
                ControlReply::done()
            }
            Request::Hello { .. } => ControlReply::failed("cannot register a second manager: this one is running"),
            Request::Ping => {
                self.watchdog.ping(now);
                if let Some(why) = self.watchdog.check_memory(&self.home, self.config.spa_max_mem.0, now) {
                    self.journal.note("memory", "failed", EventSubject::default(), why);
                }
                ControlReply::done()
            }
            Request::Status => ControlReply { error: None, status: Some(Box::new(self.status(now))) },
            Request::Stop => return self.begin_stop(reply, now),
            Request::Yield | Request::Renew { .. } if self.stop.is_some() => {
                ControlReply::failed("cannot exit for another manager: the home is being stopped")
            }
            Request::Renew { why } => {
                let why = cut(&why, MAX_MESSAGE_BYTES);
                self.journal.note("memory", "failed", EventSubject::default(), why);
                self.exit = Some(Goodbye::Yield);
                ControlReply::done()
            }
            Request::Yield => {
                tracing::info!("another manager is to take over; this one exits, and the sub-agents keep running");
                self.exit = Some(Goodbye::Yield);
                ControlReply::done()
            }
            Request::Restart { agent: name } => match self.agents.get(&name) {
                None => ControlReply::failed(format!(
                    "cannot restart {name}: there is no such sub-agent; `control status` lists them"
                )),
                Some(agent) if !agent.state.supervisor().wanted() => {
                    ControlReply::failed(format!("cannot restart {name}: the gateway orders it to be stopped"))
                }
                Some(_) => match self.may_restart(&name) {
                    Ok(()) => {
                        self.step(&name, AgentEvent::Restart, now);
                        ControlReply::done()
                    }
                    Err(error) => ControlReply::failed(format!("cannot restart {name}: {error:#}; it keeps running")),
                },
            },
            Request::RollBack { agent: name } => return self.begin_roll_back(name, reply),
            Request::Retry { agent: name } if name.as_str() == MANAGER_PACKAGE => self.retry_upgrade(now),
            Request::Retry { agent: name } => self.retry(&name, now),
            Request::Heartbeat => {
                self.heartbeat_now(now);
                ControlReply::done()
            }
            Request::Upgrade { package: None } => self.follow_orders_now(now),
            Request::Upgrade { package: Some(path) } => self.upgrade_by_operator(UpgradeSource::File(path)),
            Request::RollBackManager => self.upgrade_by_operator(UpgradeSource::Previous),
        };
        let _ = reply.send(answer);
    }

    /// Checks off the event loop whether the previous release can be run, and rolls back to it then.
    fn begin_roll_back(&mut self, name: AgentName, reply: oneshot::Sender<ControlReply>) {
        let to = match self.may_roll_back(&name) {
            Ok(to) => to,
            Err(why) => return drop(reply.send(ControlReply::failed(format!("cannot roll {name} back: {why}")))),
        };
        let home = self.home.clone();
        disk::run(&self.inputs, move || {
            let result = stage::check_usable(&home, &name, &to).map_err(|error| format!("{error:#}"));
            Input::RollBackChecked { name, to, result, reply }
        });
    }

    /// The release that a sub-agent can be rolled back to.
    fn may_roll_back(&self, name: &AgentName) -> Result<Version, &'static str> {
        if self.stop.is_some() {
            return Err("the home is being stopped");
        }
        let agent = self.agents.get(name).ok_or("there is no such sub-agent; `control status` lists them")?;
        if agent.state.is_busy() {
            return Err(
                "its release is being changed; try again when `control status` shows that the change is complete",
            );
        }
        agent.state.rollback_target().cloned().ok_or("no previous release is on this host")
    }

    /// Rolls back after the check whether the previous release can be run.
    pub(super) fn roll_back(
        &mut self,
        name: &AgentName,
        to: &Version,
        result: Result<(), String>,
        now: Instant,
    ) -> ControlReply {
        // The state may have changed during the check.
        let may = self.may_roll_back(name).map_err(str::to_owned);
        match result.and(may) {
            Ok(still) if still == *to => {
                let overruled = self.orders.held.agents.get(name).cloned();
                self.step(name, AgentEvent::RollBack { overruled }, now);
                ControlReply::done()
            }
            Ok(_) => ControlReply::failed(format!(
                "cannot roll {name} back: its releases changed in the meantime; try again"
            )),
            Err(why) => ControlReply::failed(format!("cannot roll {name} back: {why}")),
        }
    }

    fn retry(&mut self, name: &AgentName, now: Instant) -> ControlReply {
        if !self.agents.contains_key(name) {
            return ControlReply::failed(format!(
                "cannot retry {name}: there is no such sub-agent; `control status` lists them"
            ));
        }
        self.step(name, AgentEvent::Retry, now);
        self.replan = true;
        ControlReply::done()
    }

    /// Reports a client that may not use the control socket, rate-limited: it may try again and again.
    fn report_rejected_client(&mut self, why: &str, now: Instant) {
        if self.rejections.take(now).is_some() {
            self.journal.note("door", "refused", EventSubject::default(), why);
        }
    }

    /// Stops every sub-agent. When the last one is down, the request is answered and the manager exits.
    pub(super) fn begin_stop(&mut self, reply: oneshot::Sender<ControlReply>, now: Instant) {
        if let Some(stop) = &mut self.stop {
            stop.waiting.push(reply);
            return;
        }
        tracing::info!("stopping all sub-agents and the manager");
        self.cancel_upgrade();
        let recorded_by = now + STOP_RECORD_TIMEOUT;
        self.stop = Some(PendingStop { waiting: vec![reply], errors: vec![], is_recorded: false, recorded_by });
        let home = self.home.clone();
        disk::run(&self.inputs, move || {
            if let Err(error) = role::record_stop(&home) {
                // A stop is carried out even without its record; the goodbye informs the watchdog.
                tracing::warn!(error = format!("{error:#}"), "cannot record the stop");
            }
            Input::StopRecorded
        });
    }

    /// The stop is recorded, or that timed out: stops the sub-agents.
    pub(super) fn stop_recorded(&mut self, now: Instant) {
        match &mut self.stop {
            Some(stop) if !stop.is_recorded => stop.is_recorded = true,
            _ => return,
        }
        for name in self.agents.keys().cloned().collect::<Vec<_>>() {
            self.step(&name, AgentEvent::HomeStopping, now);
        }
        self.finish_stop_if_down();
    }

    pub(super) fn finish_stop_if_down(&mut self) {
        let Some(stop) = &mut self.stop else { return };
        if !stop.is_recorded || !self.agents.values().all(|agent| agent.state.supervisor().is_down()) {
            return;
        }
        let errors = std::mem::take(&mut stop.errors);
        let answer = if errors.is_empty() { ControlReply::done() } else { ControlReply::failed(errors.join("; ")) };
        for waiting in stop.waiting.drain(..) {
            let _ = waiting.send(answer.clone());
        }
        self.exit = Some(Goodbye::Stop);
    }

    /// Information for an operator that needs no action on this host.
    fn notes(&self) -> Vec<String> {
        let offset = self.gateway.status.clock_offset_seconds.filter(|offset| is_clock_off(Some(*offset)));
        offset.map(describe_clock_offset).into_iter().collect()
    }

    pub(super) fn status(&self, now: Instant) -> Status {
        let agents = self.agents.iter().map(|(name, agent)| AgentStatus {
            removed_in_seconds: self.orders.removed_in(name, now),
            ..agent.status(self.groups.as_ref(), now)
        });
        let agents: Vec<_> = agents.collect();
        let mut problems: Vec<String> = self.problems.values().cloned().collect();
        if self.watchdog.stopped_by_operator {
            problems.push("an operator stopped the watchdog's unit; start it with `control start`".to_owned());
        }
        problems.extend(self.agents.values().filter_map(SubAgent::problem));
        let (spm, spa) = (self.identity.own.status(), self.watchdog.status(&self.home));
        for (name, role, limit, setting) in [
            ("the manager", &spm, self.config.spm_max_mem, "spmMaxMem"),
            ("the watchdog", &spa, self.config.spa_max_mem, "spaMaxMem"),
        ] {
            problems.extend(memory::excess(name, role.memory_bytes.unwrap_or(0), limit.0, setting));
        }
        for agent in &agents {
            problems.extend(agent.skipped.iter().map(|skipped| {
                let (name, SkippedStatus { version, reason }) = (&agent.name, skipped);
                format!("{name} {version} failed and is skipped ({reason}); order another release, or run `control retry {name}`")
            }));
        }
        problems.extend(self.upgrade_problem());
        let state = if self.stop.is_some() {
            HomeState::Degraded
        } else {
            {
                // Shortly after the start, a running watchdog has not reconnected yet.
                let comes = self.identity.started.elapsed() < WATCHDOG_CONNECT_TIMEOUT
                    && role::living(&self.home, Role::Spa).is_some();
                status::home_state(self.watchdog.is_connected() || comes, &agents, &problems)
            }
        };
        Status {
            version: Some(self.identity.version.clone()),
            home: self.home.public_path().display().to_string(),
            state,
            spm,
            spa,
            gateway: self.gateway.status.clone(),
            generation: self.orders.held.generation,
            agents,
            upgrade: self.upgrade_status(),
            held_by_operator: self.is_manager_held(),
            problems,
            notes: self.notes(),
        }
    }
}
