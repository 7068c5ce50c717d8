//! Decides when a role that exited is restarted, and by which side: first by the service manager, then by the role that watches it.
//!
//! The manager and the watchdog both use this, each for the other. They differ in their [`RestarterPolicy`]. Observations go in,
//! a [`RestarterAction`] comes out, and the caller carries it out.
//!
//! ```text
//!           connected                      lost
//! absent ───────────────▶ present ───────────────▶ absent
//!                         silent for a minute: kill it
//!
//! absent, at each check:
//!   a stop is recorded and no process holds the role  follow the stop; a policy that does not follow stops ignores it
//!   the holder is unreachable for a minute            kill the holder
//!   a service manager runs the roles                  query the state of the unit:
//!     stopped                                           follow the stop, or leave the unit stopped
//!     coming, forbidden                                 nothing
//!     dead                                              after the timeout: request a start of the unit, once
//!     dead again, missing, no answer six times          after the timeout: start the role, with back-off
//!   no service manager                                start the role, with back-off
//! ```
//!
//! Nothing is started while a process holds the role, nor while the unit is masked or disabled.

use std::time::{Duration, Instant};

use super::restart_delay::RestartDelay;
use super::silence::ContinuousCondition;
use crate::core::service_manager::UnitCondition;

/// A role that is connected but silent for this long hangs, as does one that is held but unreachable for this long.
const HANG_TIMEOUT: Duration = Duration::from_secs(60);
/// The time that the service manager has to restart a role before a start of its unit is requested, and again before the role is started
/// without it.
const SERVICE_MANAGER_TIMEOUT: Duration = Duration::from_secs(10);
/// After this many unanswered queries in a row the service manager counts as absent. It may be busy, or be restarting itself.
const MAX_UNANSWERED: u32 = 6;

/// How the two roles differ in watching each other.
#[derive(Debug, Clone, Copy)]
pub struct RestarterPolicy {
    /// A stop of the other role, recorded or done to its unit, also stops this role. Its unit is then queried from the start and also while
    /// the role is held; otherwise only before a start.
    pub follows_stop: bool,
    /// A process that holds the role when this one starts has this time to connect.
    pub connect_timeout: Duration,
    /// The earliest start after the connection was lost.
    pub min_delay: Duration,
    /// Between two checks while the other role is absent.
    pub check_interval: GrowingInterval,
    /// Between two queries of the unit's state.
    pub query_interval: GrowingInterval,
}

impl RestarterPolicy {
    /// The watchdog's, for the manager. It checks often because each check tries to connect.
    pub const WATCHDOG: RestarterPolicy = RestarterPolicy {
        follows_stop: true,
        connect_timeout: Duration::ZERO,
        min_delay: Duration::ZERO,
        check_interval: GrowingInterval { min: Duration::from_millis(1), max: Duration::from_millis(500), divisor: 16 },
        query_interval: GrowingInterval { min: Duration::from_secs(1), max: Duration::from_secs(10), divisor: 7 },
    };

    /// The manager's, for the watchdog, which connects to it. `min_delay`: when both roles are restarted together, the watchdog and then the
    /// manager exit within it, and one of each is started.
    pub const MANAGER: RestarterPolicy = RestarterPolicy {
        follows_stop: false,
        connect_timeout: Duration::from_secs(2),
        min_delay: Duration::from_millis(500),
        check_interval: GrowingInterval { min: Duration::from_secs(3), max: Duration::from_secs(3), divisor: 1 },
        query_interval: GrowingInterval { min: SERVICE_MANAGER_TIMEOUT, max: SERVICE_MANAGER_TIMEOUT, divisor: 1 },
    };
}

/// An interval that grows with the elapsed time, as a fraction of it, between two bounds.
#[derive(Debug, Clone, Copy)]
pub struct GrowingInterval {
    pub min: Duration,
    pub max: Duration,
    pub divisor: u32,
}

impl GrowingInterval {
    fn after(self, elapsed: Duration) -> Duration {
        (elapsed / self.divisor).clamp(self.min, self.max)
    }
}

/// What is observed of a role that is not connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoleObservation {
    /// A process holds the role.
    pub taken: bool,
    /// A stop of the home is recorded. Used only by a policy that follows stops.
    pub stop_recorded: bool,
}

/// The next action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestarterAction {
    /// Query the unit's state from the service manager and pass the answer to [`Restarter::unit_answered`].
    QueryUnit,
    /// Request a start of the unit from the service manager.
    StartUnit,
    /// Start the role without the service manager. `failures`: failures in a row.
    Start { failures: u32 },
    /// Kill the process that holds the role.
    KillHung,
    /// Stop this role too, with everything that the other role left running.
    FollowStop,
    /// Leave the unit stopped: an operator stopped it.
    LeaveStopped,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The other role died, or hung and was killed.
    Died,
    /// It announced that it yields to a successor.
    Yielded,
    /// It never sent anything. The socket of an exiting process still accepts connections after its last connection has closed.
    NeverAnswered,
}

/// How one role watches the other.
#[derive(Debug)]
pub struct Restarter {
    policy: RestarterPolicy,
    /// A service manager runs the roles.
    supervised: bool,
    state: RestarterState,
    delay: RestartDelay,
    /// Queries in a row that the service manager did not answer.
    unanswered: u32,
}

#[derive(Debug)]
enum RestarterState {
    /// Connected.
    Present {
        since: Instant,
        last_received: Option<Instant>,
        will_yield: bool,
    },
    Absent(Absence),
}

/// A period without a connection to the other role.
#[derive(Debug)]
struct Absence {
    began: Instant,
    /// Nothing is started earlier.
    not_before: Instant,
    checked_at: Option<Instant>,
    /// When the unit was last queried; initially the start of the absence.
    queried_at: Instant,
    /// Since when the service manager has had the time to restart the role.
    service_manager_since: Instant,
    /// A start of the unit was requested.
    start_requested: bool,
    /// How long a process has held the role without a connection.
    unreachable: ContinuousCondition,
}

impl Absence {
    fn new(began: Instant, not_before: Instant) -> Absence {
        Absence {
            began,
            not_before,
            checked_at: None,
            queried_at: began,
            service_manager_since: began,
            start_requested: false,
            unreachable: ContinuousCondition::default(),
        }
    }

    /// When the service manager's time to restart the role is over.
    fn service_manager_deadline(&self) -> Instant {
        self.service_manager_since + SERVICE_MANAGER_TIMEOUT
    }
}

impl Restarter {
    /// The other role is not connected yet. `taken`: a process holds it.
    pub fn new(policy: RestarterPolicy, supervised: bool, taken: bool, now: Instant) -> Restarter {
        let not_before = if taken { now + policy.connect_timeout } else { now };
        let state = RestarterState::Absent(Absence::new(now, not_before));
        Restarter { policy, supervised, state, delay: RestartDelay::new(now), unanswered: 0 }
    }

    /// A connection to the other role is open; nothing was received over it yet.
    pub fn connected(&mut self, now: Instant) {
        self.state = RestarterState::Present { since: now, last_received: None, will_yield: false };
    }

    /// Something was received from the connected role. Returns whether it is the first message of this connection.
    pub fn received(&mut self, now: Instant) -> bool {
        let RestarterState::Present { last_received, .. } = &mut self.state else { return false };
        let is_first = last_received.replace(now).is_none();
        self.delay.responded();
        is_first
    }

    /// The connected role announced that it exits and yields to a successor.
    pub fn will_yield(&mut self) {
        if let RestarterState::Present { will_yield, .. } = &mut self.state {
            *will_yield = true;
        }
    }

    /// The connection was lost. `None`: there was none.
    pub fn lost(&mut self, now: Instant) -> Option<Loss> {
        let RestarterState::Present { since, last_received, will_yield } = self.state else { return None };
        let loss = match last_received {
            _ if will_yield => Loss::Yielded,
            Some(_) => Loss::Died,
            None => Loss::NeverAnswered,
        };
        match loss {
            Loss::Yielded => self.delay.exited_cleanly(now),
            Loss::Died => self.delay.died(now.saturating_duration_since(since), now),
            Loss::NeverAnswered => {}
        }
        self.state = RestarterState::Absent(Absence::new(now, now + self.policy.min_delay));
        Some(loss)
    }

    /// The failing program was replaced by another release, which is started at once.
    pub fn program_replaced(&mut self, now: Instant) {
        self.delay = RestartDelay::new(now);
    }

    /// When the next [`Restarter::poll`] is due.
    pub fn deadline(&self) -> Instant {
        let absence = match &self.state {
            RestarterState::Present { since, last_received, .. } => {
                return last_received.unwrap_or(*since) + HANG_TIMEOUT;
            }
            RestarterState::Absent(absence) => absence,
        };
        let due = self.due(absence);
        let Some(checked_at) = absence.checked_at else { return due };
        let quiet = checked_at.saturating_duration_since(self.delay.since().max(absence.began));
        let next = checked_at + self.policy.check_interval.after(quiet);
        if due > checked_at { due.min(next) } else { next }
    }

    /// When the unit is to be queried or, without a service manager, the role is to be started.
    fn due(&self, absence: &Absence) -> Instant {
        if !self.supervised {
            return self.may_start_at(absence);
        }
        let elapsed = absence.queried_at.saturating_duration_since(absence.began);
        let next_query = absence.queried_at + self.policy.query_interval.after(elapsed);
        if self.policy.follows_stop {
            next_query
        } else {
            next_query.max(absence.service_manager_deadline()).max(self.may_start_at(absence))
        }
    }

    /// When this side may start the role.
    fn may_start_at(&self, absence: &Absence) -> Instant {
        self.delay.due().max(absence.not_before)
    }

    /// The action that is due now. While the other role is connected, this detects a hang on the side that receives pings; the sending side
    /// uses [`super::silence::Pings`].
    pub fn poll(&mut self, observation: RoleObservation, now: Instant) -> Option<RestarterAction> {
        let due = match &self.state {
            RestarterState::Present { .. } => self.deadline(),
            RestarterState::Absent(absence) => self.due(absence),
        };
        let is_stopped = self.is_stopped(observation);
        let absence = match &mut self.state {
            RestarterState::Present { .. } if now < due => return None,
            RestarterState::Present { last_received, .. } => {
                // Killing it closes its connection; [`Restarter::lost`] handles the rest.
                *last_received = Some(now);
                return Some(RestarterAction::KillHung);
            }
            RestarterState::Absent(absence) => absence,
        };
        absence.checked_at = Some(now);
        if is_stopped && !observation.taken {
            return Some(RestarterAction::FollowStop);
        }
        if absence.unreachable.observe(observation.taken && !is_stopped, now) >= HANG_TIMEOUT {
            absence.unreachable = ContinuousCondition::default();
            return Some(RestarterAction::KillHung);
        }
        if now < due || (observation.taken && !(self.supervised && self.policy.follows_stop)) {
            return None;
        }
        if !self.supervised {
            return Some(self.start(now));
        }
        absence.queried_at = now;
        Some(RestarterAction::QueryUnit)
    }

    /// The action that follows from the unit's state. `None`: the service manager did not answer.
    pub fn unit_answered(
        &mut self,
        answer: Option<UnitCondition>,
        observation: RoleObservation,
        now: Instant,
    ) -> Option<RestarterAction> {
        let standing = self.effective_standing(answer);
        let is_stopped = self.is_stopped(observation);
        let follows_stop = self.policy.follows_stop;
        let RestarterState::Absent(absence) = &mut self.state else { return None };
        let may_start = !observation.taken && !is_stopped && now >= absence.service_manager_deadline();
        match standing {
            UnitCondition::Stopped if follows_stop => Some(RestarterAction::FollowStop),
            UnitCondition::Stopped => Some(RestarterAction::LeaveStopped),
            UnitCondition::Active | UnitCondition::Forbidden => None,
            UnitCondition::Dead | UnitCondition::Missing if !may_start => None,
            UnitCondition::Dead if !absence.start_requested => {
                (absence.start_requested, absence.service_manager_since) = (true, now);
                Some(RestarterAction::StartUnit)
            }
            UnitCondition::Dead | UnitCondition::Missing => {
                let may_start_at = self.delay.due().max(absence.not_before);
                (now >= may_start_at).then(|| self.start(now))
            }
        }
    }

    /// The call that [`RestarterAction::StartUnit`] made has returned, if it was waited for. The service manager's time starts now.
    pub fn unit_start_ended(&mut self, now: Instant) {
        if let RestarterState::Absent(absence) = &mut self.state {
            absence.service_manager_since = now;
        }
    }

    /// Without an answer nothing is done at first: the unit may be masked or stopped.
    fn effective_standing(&mut self, answer: Option<UnitCondition>) -> UnitCondition {
        self.unanswered = if answer.is_some() { 0 } else { self.unanswered.saturating_add(1) };
        match answer {
            Some(standing) => standing,
            None if self.unanswered < MAX_UNANSWERED => UnitCondition::Active,
            None => UnitCondition::Missing,
        }
    }

    fn is_stopped(&self, observation: RoleObservation) -> bool {
        self.policy.follows_stop && observation.stop_recorded
    }

    fn start(&mut self, now: Instant) -> RestarterAction {
        let failures = self.delay.failures();
        self.delay.started(now);
        RestarterAction::Start { failures }
    }
}

#[cfg(test)]
mod tests;
