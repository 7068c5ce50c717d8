//! The manager's eye on the watchdog: its connection's end is its death; then the service manager revives it, or we do.

use std::process::Child;
use std::time::{Duration, Instant};

use crate::core::status::RoleStatus;
use crate::home::Home;
use crate::host_service;
use crate::role::{self, Role};

/// A watchdog that was just started, or was there before us, connects within this.
const CONNECTS: Duration = Duration::from_secs(2);
/// A watchdog that died is started after this: who renews both roles ends the manager within it, and starts one of each.
const MOMENT: Duration = Duration::from_millis(500);
/// The service manager gets so long before we ask it, and once more before we start the watchdog ourselves.
const SERVICE_MANAGERS_TURN: Duration = Duration::from_secs(10);
/// A watchdog pings every 15 s; one that has been silent for so long is hung.
const SILENCE: Duration = Duration::from_secs(60);
/// A watchdog that lived so long was healthy; its next death is a first one.
const HEALTHY: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Peer {
    supervised: bool,
    state: State,
    failures: u32,
    /// A watchdog ran already when the manager started; it will connect.
    was_there: bool,
    children: Vec<Child>,
    /// Somebody stopped the watchdog's own unit; it is left so.
    pub(super) stopped_by_operator: bool,
}

#[derive(Debug)]
enum State {
    Connected { pid: u32, since: Instant, heard: Instant },
    Gone { since: Instant, tried: u32 },
}

impl Peer {
    pub(super) fn new(home: &Home, supervised: bool, now: Instant) -> Peer {
        let (state, was_there) = (State::Gone { since: now, tried: 0 }, role::is_taken(home, Role::Spa));
        Peer { supervised, state, failures: 0, was_there, children: vec![], stopped_by_operator: false }
    }

    pub(super) fn hello(&mut self, pid: u32, now: Instant) {
        tracing::info!(pid, "the watchdog connected");
        self.state = State::Connected { pid, since: now, heard: now };
        self.stopped_by_operator = false;
    }

    pub(super) fn ping(&mut self, now: Instant) {
        if let State::Connected { heard, .. } = &mut self.state {
            *heard = now;
        }
    }

    pub(super) fn gone(&mut self, pid: u32, now: Instant) {
        if let State::Connected { pid: connected, since, .. } = self.state
            && connected == pid
        {
            tracing::warn!(pid, "the watchdog is gone");
            self.failures = if now.saturating_duration_since(since) > HEALTHY { 1 } else { self.failures + 1 };
            self.state = State::Gone { since: now, tried: 0 };
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        matches!(self.state, State::Connected { .. })
    }

    /// When [`Peer::look`] has something to do.
    pub(super) fn deadline(&self) -> Instant {
        match self.state {
            State::Connected { heard, .. } => heard + SILENCE,
            State::Gone { since, tried } => since + self.patience(tried),
        }
    }

    fn patience(&self, tried: u32) -> Duration {
        let turn = if self.supervised { SERVICE_MANAGERS_TURN } else { CONNECTS };
        match tried {
            // Nobody else starts it.
            0 if !self.supervised && self.failures > 0 => super::revival_pause(self.failures).max(MOMENT),
            0 if !self.supervised && !self.was_there => Duration::ZERO,
            0 => turn,
            _ => turn + super::revival_pause(self.failures + tried),
        }
    }

    /// Does what time asks for: revives a watchdog that is gone, kills one that hangs.
    pub(super) fn look(&mut self, home: &Home, now: Instant) {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        match self.state {
            State::Connected { heard, pid, .. } if now >= heard + SILENCE => {
                tracing::warn!(pid, "the watchdog hangs and is killed");
                if let Some(holder) = role::living(home, Role::Spa)
                    && let Err(error) = holder.kill()
                {
                    tracing::error!(error = format!("{error:#}"), "the watchdog cannot be killed");
                }
                // Its connection's end tells the rest.
                self.ping(now);
            }
            State::Gone { since, tried } if now >= since + self.patience(tried) => {
                self.state = State::Gone { since: now, tried: tried.saturating_add(1) };
                if let Err(error) = self.revive(home, tried) {
                    tracing::error!(error = format!("{error:#}"), "the watchdog cannot be started; it is tried again");
                }
            }
            _ => {}
        }
    }

    fn revive(&mut self, home: &Home, tried: u32) -> anyhow::Result<()> {
        if self.supervised {
            match host_service::verdict(home, Role::Spa)? {
                host_service::Verdict::Stopped => {
                    self.stopped_by_operator = true;
                    return Ok(());
                }
                host_service::Verdict::Coming | host_service::Verdict::Forbidden => return Ok(()),
                host_service::Verdict::Dead if tried == 0 => return host_service::start(home, &[Role::Spa]),
                host_service::Verdict::Dead | host_service::Verdict::Missing => {}
            }
        }
        if !role::is_taken(home, Role::Spa) {
            self.children.push(role::spawn(home, Role::Spa)?);
        }
        Ok(())
    }

    pub(super) fn status(&self, home: &Home) -> RoleStatus {
        let holder = role::holder(home, Role::Spa);
        let restarts = holder.as_ref().map_or(0, |holder| holder.restarts);
        match holder.filter(role::Holder::is_alive) {
            Some(holder) => holder.status(),
            None => RoleStatus { restarts, ..RoleStatus::default() },
        }
    }
}
