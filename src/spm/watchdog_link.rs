//! Supervises the watchdog. A closed connection means that the watchdog has exited. The service manager then restarts it, or the manager
//! does if there is none or it does not.

use std::process::Child;
use std::time::Instant;

use super::input::{Input, Inputs};
use crate::core::role::Role;
use crate::core::service_manager::{ServiceManagerKind, UnitCondition};
use crate::core::status::RoleStatus;
use crate::core::watch::memory::{self, MemoryCheck};
use crate::core::watch::restarter::{Restarter, RestarterAction, RestarterPolicy, RoleObservation};
use crate::home::Home;
use crate::{host_service, platform, role};

#[derive(Debug)]
pub(super) struct WatchdogLink {
    /// The service manager that starts the roles.
    service: ServiceManagerKind,
    /// Pid of the connected watchdog.
    pid: Option<u32>,
    restarter: Restarter,
    children: Vec<Child>,
    memory: MemoryCheck,
    /// An operator stopped the watchdog's own unit; it is not restarted.
    pub(super) stopped_by_operator: bool,
}

impl WatchdogLink {
    pub(super) fn new(home: &Home, service: ServiceManagerKind, now: Instant) -> WatchdogLink {
        let restarter =
            Restarter::new(RestarterPolicy::MANAGER, service.is_some(), role::is_held(home, Role::Spa), now);
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

    /// Ends a watchdog that uses too much memory for too long; it is restarted like one that died. Returns the reason.
    pub(super) fn check_memory(&mut self, home: &Home, limit: u64, now: Instant) -> Option<String> {
        let used = platform::memory_bytes(self.pid?)?;
        if !self.memory.record(used, limit, now) {
            return None;
        }
        let why = memory::excess("the watchdog", used, limit, "spaMaxMem")?;
        match role::current_holder(home, Role::Spa).map(|holder| holder.request_exit()) {
            Some(Err(error)) => tracing::error!(error = format!("{error:#}"), "cannot request the watchdog's exit"),
            _ => tracing::warn!(why, "the watchdog uses too much memory and is restarted"),
        }
        Some(why)
    }

    pub(super) fn disconnected(&mut self, pid: u32, now: Instant) {
        if self.pid == Some(pid) {
            tracing::warn!(pid, "the watchdog disconnected");
            self.pid = None;
            self.restarter.lost(now);
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        self.pid.is_some()
    }

    /// Whether the next manager is started when this one exits: by the watchdog, or by the service manager.
    pub(super) fn next_manager_will_start(&self) -> bool {
        self.is_connected() || self.service.is_some()
    }

    /// When [`WatchdogLink::tick`] must be called next.
    pub(super) fn deadline(&self) -> Instant {
        self.restarter.deadline()
    }

    /// Restarts a dead watchdog and kills a hung one, when due.
    pub(super) fn tick(&mut self, home: &Home, inputs: &Inputs, now: Instant) {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        let action = self.restarter.poll(self.seen(home), now);
        if action == Some(RestarterAction::QueryUnit) {
            return query_unit(self.service, home, inputs);
        }
        self.carry_out(home, action);
    }

    /// Handles the service manager's answer about the unit of a dead watchdog.
    pub(super) fn unit_state_received(&mut self, home: &Home, answer: anyhow::Result<UnitCondition>, now: Instant) {
        let answer = answer.inspect_err(|error| {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot query the service manager for the state of the watchdog's unit"
            );
        });
        let action = self.restarter.unit_answered(answer.ok(), self.seen(home), now);
        self.carry_out(home, action);
    }

    /// A recorded stop reaches the manager as a request, so it is not observed here.
    fn seen(&self, home: &Home) -> RoleObservation {
        RoleObservation { taken: !self.is_connected() && role::is_held(home, Role::Spa), stop_recorded: false }
    }

    fn carry_out(&mut self, home: &Home, action: Option<RestarterAction>) {
        match action {
            Some(RestarterAction::StartUnit) => {
                tracing::warn!("the watchdog is not running; starting its unit");
                let (service, home) = (self.service, home.clone());
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = host_service::start(service, &home, &[Role::Spa]) {
                        tracing::error!(error = format!("{error:#}"), "cannot start the watchdog's unit");
                    }
                });
            }
            Some(RestarterAction::Start { failures }) => {
                tracing::warn!(failures, "the watchdog is not running and is started");
                match role::spawn(home, Role::Spa) {
                    Ok(child) => self.children.push(child),
                    Err(error) => {
                        tracing::error!(error = format!("{error:#}"), "cannot start the watchdog; the start is retried")
                    }
                }
            }
            Some(RestarterAction::KillHung) => kill_hung(home),
            Some(RestarterAction::LeaveStopped) => self.stopped_by_operator = true,
            // `AskUnit` is handled by [`WatchdogLink::tick`]; `HonourStop` belongs to the watchdog's policy.
            Some(RestarterAction::QueryUnit | RestarterAction::FollowStop) | None => {}
        }
    }

    pub(super) fn status(&self, home: &Home) -> RoleStatus {
        let holder = role::recorded_holder(home, Role::Spa);
        let restarts = holder.as_ref().map_or(0, |holder| holder.restarts);
        match (holder.filter(role::RoleHolder::is_alive), self.pid) {
            (Some(holder), _) => holder.status(),
            // The watchdog could not write its record.
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

/// Queries the service manager on a blocking thread: it may be slow.
fn query_unit(service: ServiceManagerKind, home: &Home, inputs: &Inputs) {
    let (home, inputs) = (home.clone(), inputs.clone());
    tokio::task::spawn_blocking(move || {
        let _ = inputs.send(Input::WatchdogUnitState(host_service::standing(service, &home, Role::Spa)));
    });
}

fn kill_hung(home: &Home) {
    let Some(holder) = role::current_holder(home, Role::Spa) else { return };
    tracing::error!(pid = holder.pid, "the watchdog does not respond and is killed");
    if let Err(error) = holder.kill() {
        tracing::error!(error = format!("{error:#}"), "cannot kill the watchdog");
    }
}
