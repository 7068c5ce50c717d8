//! The manager's eye on the watchdog: its connection's end is its death; then the service manager revives it, or we do.

use std::process::Child;
use std::time::Instant;

use super::input::{Input, Inputs};
use crate::core::role::Role;
use crate::core::service_manager::{ServiceManagerKind, UnitStanding};
use crate::core::status::RoleStatus;
use crate::core::watch::memory::{self, MemoryCheck};
use crate::core::watch::restarter::{Restarter, RestarterAction, RestarterPolicy, RoleObservation};
use crate::home::Home;
use crate::{host_service, platform, role};

#[derive(Debug)]
pub(super) struct WatchdogLink {
    /// Who starts the roles.
    service: ServiceManagerKind,
    /// Of the one that is connected.
    pid: Option<u32>,
    restarter: Restarter,
    children: Vec<Child>,
    memory: MemoryCheck,
    /// Somebody stopped the watchdog's own unit; it is left so.
    pub(super) stopped_by_operator: bool,
}

impl WatchdogLink {
    pub(super) fn new(home: &Home, service: ServiceManagerKind, now: Instant) -> WatchdogLink {
        let restarter =
            Restarter::new(RestarterPolicy::MANAGER, service.is_some(), role::is_taken(home, Role::Spa), now);
        WatchdogLink {
            service,
            pid: None,
            restarter,
            children: vec![],
            memory: MemoryCheck::default(),
            stopped_by_operator: false,
        }
    }

    pub(super) fn hello(&mut self, pid: u32, now: Instant) {
        tracing::info!(pid, "the watchdog connected");
        self.pid = Some(pid);
        self.restarter.connected(now);
        self.restarter.received(now);
        self.stopped_by_operator = false;
    }

    pub(super) fn ping(&mut self, now: Instant) {
        self.restarter.received(now);
    }

    /// Ends the watchdog, in order, that uses too much memory for too long; it is revived as one that died. Gives the reason.
    pub(super) fn look_at_memory(&mut self, home: &Home, limit: u64, now: Instant) -> Option<String> {
        let used = platform::memory_bytes(self.pid?)?;
        if !self.memory.record(used, limit, now) {
            return None;
        }
        let why = memory::excess("the watchdog", used, limit, "spaMaxMem")?;
        match role::who_has(home, Role::Spa).map(|holder| holder.ask_to_end()) {
            Some(Err(error)) => tracing::error!(error = format!("{error:#}"), "the watchdog cannot be asked to end"),
            _ => tracing::warn!(why, "the watchdog is restarted"),
        }
        Some(why)
    }

    pub(super) fn gone(&mut self, pid: u32, now: Instant) {
        if self.pid == Some(pid) {
            tracing::warn!(pid, "the watchdog is gone");
            self.pid = None;
            self.restarter.lost(now);
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        self.pid.is_some()
    }

    /// Whether the next manager is started when this one ends: by the watchdog, or by the service manager.
    pub(super) fn may_be_left(&self) -> bool {
        self.is_connected() || self.service.is_some()
    }

    /// When [`WatchdogLink::look`] has something to do.
    pub(super) fn deadline(&self) -> Instant {
        self.restarter.deadline()
    }

    /// Does what time asks for: revives a watchdog that is gone, kills one that hangs.
    pub(super) fn look(&mut self, home: &Home, inputs: &Inputs, now: Instant) {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        let action = self.restarter.poll(self.seen(home), now);
        if action == Some(RestarterAction::QueryUnit) {
            return ask(self.service, home, inputs);
        }
        self.carry_out(home, action);
    }

    /// Takes in what the service manager knows of the unit of a watchdog that is gone.
    pub(super) fn judged(&mut self, home: &Home, answer: anyhow::Result<UnitStanding>, now: Instant) {
        let answer = answer.inspect_err(|error| {
            tracing::warn!(error = format!("{error:#}"), "the service manager cannot be asked after a role");
        });
        let action = self.restarter.unit_answered(answer.ok(), self.seen(home), now);
        self.carry_out(home, action);
    }

    /// A stop that is recorded comes to the manager as a request.
    fn seen(&self, home: &Home) -> RoleObservation {
        RoleObservation { taken: !self.is_connected() && role::is_taken(home, Role::Spa), stop_recorded: false }
    }

    fn carry_out(&mut self, home: &Home, action: Option<RestarterAction>) {
        match action {
            Some(RestarterAction::StartUnit) => {
                tracing::warn!("the watchdog is dead and its unit is asked to start it");
                let (service, home) = (self.service, home.clone());
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = host_service::start(service, &home, &[Role::Spa]) {
                        tracing::error!(error = format!("{error:#}"), "the unit cannot be started");
                    }
                });
            }
            Some(RestarterAction::Start { failures }) => {
                tracing::warn!(failures, "the watchdog is not there and is started");
                match role::spawn(home, Role::Spa) {
                    Ok(child) => self.children.push(child),
                    Err(error) => {
                        tracing::error!(
                            error = format!("{error:#}"),
                            "the watchdog cannot be started; it is tried again"
                        )
                    }
                }
            }
            Some(RestarterAction::KillHung) => kill_hung(home),
            Some(RestarterAction::LeaveStopped) => self.stopped_by_operator = true,
            // Asked by [`WatchdogLink::look`]; of the other policy.
            Some(RestarterAction::QueryUnit | RestarterAction::FollowStop) | None => {}
        }
    }

    pub(super) fn status(&self, home: &Home) -> RoleStatus {
        let holder = role::holder(home, Role::Spa);
        let restarts = holder.as_ref().map_or(0, |holder| holder.restarts);
        match (holder.filter(role::RoleHolder::is_alive), self.pid) {
            (Some(holder), _) => holder.status(),
            // It could not write its record.
            (None, Some(pid)) => RoleStatus {
                pid: Some(pid),
                uptime_seconds: platform::start_time(pid).and_then(platform::age).map(|age| age.as_secs()),
                memory_bytes: platform::memory_bytes(pid),
                restarts,
            },
            (None, None) => RoleStatus { restarts, ..RoleStatus::default() },
        }
    }
}

/// Asks the service manager, which may take its time.
fn ask(service: ServiceManagerKind, home: &Home, inputs: &Inputs) {
    let (home, inputs) = (home.clone(), inputs.clone());
    tokio::task::spawn_blocking(move || {
        let _ = inputs.send(Input::WatchdogJudged(host_service::standing(service, &home, Role::Spa)));
    });
}

fn kill_hung(home: &Home) {
    let Some(holder) = role::who_has(home, Role::Spa) else { return };
    tracing::error!(pid = holder.pid, "the watchdog hangs and is killed");
    if let Err(error) = holder.kill() {
        tracing::error!(error = format!("{error:#}"), "the watchdog cannot be killed");
    }
}
