//! The manager's eye on the watchdog: its connection's end is its death; then the service manager revives it, or we do.

use std::process::Child;
use std::time::{Duration, Instant};

use super::Input;
use super::run::Inputs;
use crate::core::role::Role;
use crate::core::service_manager::{Kind, UnitStanding};
use crate::core::status::RoleStatus;
use crate::core::watch::{Lasting, Revival, Unanswered};
use crate::home::Home;
use crate::{host_service, platform, role};

/// A watchdog that was there before us connects within this.
const CONNECTS: Duration = Duration::from_secs(2);
/// A watchdog that died is started after this: who renews both roles ends the manager within it, and starts one of each.
const MOMENT: Duration = Duration::from_millis(500);
/// The service manager gets so long before we ask it, and once more before we start the watchdog ourselves.
const SERVICE_MANAGERS_TURN: Duration = Duration::from_secs(10);
/// A watchdog pings every 15 s; one that has been silent for so long is hung. So is one that has its role and does not connect.
const SILENCE: Duration = Duration::from_secs(60);
/// While there is none, it is looked for so often.
const LOOK: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Peer {
    /// Who starts the roles.
    service: Kind,
    state: State,
    revival: Revival,
    unanswered: Unanswered,
    children: Vec<Child>,
    /// Somebody stopped the watchdog's own unit; it is left so.
    pub(super) stopped_by_operator: bool,
}

#[derive(Debug)]
enum State {
    Connected { pid: u32, since: Instant, heard: Instant },
    Gone(Absence),
}

/// A time without a watchdog.
#[derive(Debug)]
struct Absence {
    /// Not to be started before.
    not_before: Instant,
    looked: Option<Instant>,
    /// The service manager has its turn since then.
    turn: Instant,
    /// It was asked to start it.
    told: bool,
    /// Somebody has the role, and does not connect.
    mute: Lasting,
}

impl State {
    fn gone(now: Instant, not_before: Instant) -> State {
        State::Gone(Absence { not_before, looked: None, turn: now, told: false, mute: Lasting::default() })
    }
}

impl Peer {
    pub(super) fn new(home: &Home, service: Kind, now: Instant) -> Peer {
        let not_before = if role::is_taken(home, Role::Spa) { now + CONNECTS } else { now };
        let state = State::gone(now, not_before);
        Peer {
            service,
            state,
            revival: Revival::new(now),
            unanswered: Unanswered::default(),
            children: vec![],
            stopped_by_operator: false,
        }
    }

    pub(super) fn hello(&mut self, pid: u32, now: Instant) {
        tracing::info!(pid, "the watchdog connected");
        self.state = State::Connected { pid, since: now, heard: now };
        self.revival.came();
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
            self.revival.died(now.saturating_duration_since(since), now);
            self.state = State::gone(now, now + MOMENT);
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        matches!(self.state, State::Connected { .. })
    }

    /// When [`Peer::look`] has something to do.
    pub(super) fn deadline(&self) -> Instant {
        match &self.state {
            State::Connected { heard, .. } => *heard + SILENCE,
            State::Gone(absence) => match (self.due(absence), absence.looked) {
                (due, None) => due,
                (due, Some(looked)) if due > looked => due.min(looked + LOOK),
                (_, Some(looked)) => looked + LOOK,
            },
        }
    }

    /// When it is to be started, or asked after.
    fn due(&self, absence: &Absence) -> Instant {
        let ours = self.revival.due().max(absence.not_before);
        if self.service.is_some() { ours.max(absence.turn + SERVICE_MANAGERS_TURN) } else { ours }
    }

    /// Does what time asks for: revives a watchdog that is gone, kills one that hangs.
    pub(super) fn look(&mut self, home: &Home, inputs: &Inputs, now: Instant) {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        let taken = !self.is_connected() && role::is_taken(home, Role::Spa);
        let due = match &self.state {
            State::Connected { .. } => now,
            State::Gone(absence) => self.due(absence),
        };
        match &mut self.state {
            State::Connected { heard, .. } if now >= *heard + SILENCE => {
                kill_hung(home);
                // Its connection's end tells the rest.
                self.ping(now);
            }
            State::Connected { .. } => {}
            State::Gone(absence) => {
                absence.looked = Some(now);
                if absence.mute.look(taken, now) >= SILENCE {
                    absence.mute = Lasting::default();
                    kill_hung(home);
                } else if now >= due && !taken {
                    if self.service.is_some() {
                        absence.turn = now;
                        ask(self.service, home, inputs);
                    } else {
                        self.revive(home, now);
                    }
                }
            }
        }
    }

    /// Takes in what the service manager says of the unit of a watchdog that is gone.
    pub(super) fn judged(&mut self, home: &Home, answer: anyhow::Result<UnitStanding>, now: Instant) {
        let answer = answer.inspect_err(|error| {
            tracing::warn!(error = format!("{error:#}"), "the service manager cannot be asked after a role");
        });
        let verdict = self.unanswered.judge(answer.ok());
        let State::Gone(absence) = &mut self.state else { return };
        match verdict {
            UnitStanding::Stopped => self.stopped_by_operator = true,
            UnitStanding::Coming | UnitStanding::Forbidden => {}
            UnitStanding::Dead if !absence.told => {
                tracing::warn!("the watchdog is dead and its unit is asked to start it");
                (absence.told, absence.turn) = (true, now);
                let (service, home) = (self.service, home.clone());
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = host_service::start(service, &home, &[Role::Spa]) {
                        tracing::error!(error = format!("{error:#}"), "the unit cannot be started");
                    }
                });
            }
            UnitStanding::Dead | UnitStanding::Missing if !role::is_taken(home, Role::Spa) => self.revive(home, now),
            UnitStanding::Dead | UnitStanding::Missing => {}
        }
    }

    fn revive(&mut self, home: &Home, now: Instant) {
        tracing::warn!(failures = self.revival.failures(), "the watchdog is not there and is started");
        self.revival.tried(now);
        match role::spawn(home, Role::Spa) {
            Ok(child) => self.children.push(child),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "the watchdog cannot be started; it is tried again")
            }
        }
    }

    pub(super) fn status(&self, home: &Home) -> RoleStatus {
        let holder = role::holder(home, Role::Spa);
        let restarts = holder.as_ref().map_or(0, |holder| holder.restarts);
        match (holder.filter(role::Holder::is_alive), &self.state) {
            (Some(holder), _) => holder.status(),
            // It could not write its record.
            (None, State::Connected { pid, .. }) => RoleStatus {
                pid: Some(*pid),
                uptime_seconds: platform::start_time(*pid).and_then(platform::age).map(|age| age.as_secs()),
                memory_bytes: platform::memory_bytes(*pid),
                restarts,
            },
            (None, State::Gone(_)) => RoleStatus { restarts, ..RoleStatus::default() },
        }
    }
}

/// Asks the service manager, which may take its time.
fn ask(service: Kind, home: &Home, inputs: &Inputs) {
    let (home, inputs) = (home.clone(), inputs.clone());
    tokio::task::spawn_blocking(move || {
        let _ = inputs.send(Input::WatchdogJudged(host_service::standing(service, &home, Role::Spa)));
    });
}

fn kill_hung(home: &Home) {
    let Some(holder) = role::living(home, Role::Spa) else { return };
    tracing::error!(pid = holder.pid, "the watchdog hangs and is killed");
    if let Err(error) = holder.kill() {
        tracing::error!(error = format!("{error:#}"), "the watchdog cannot be killed");
    }
}
