//! Who revives a role that is gone, and when: the service manager in its turn, then the role that watches it.
//!
//! The manager and the watchdog decide by this, each for the other. Where they differ is a [`RestarterPolicy`]; what they observe goes in, an
//! [`RestarterAction`] comes out, and they carry it out.
//!
//! ```text
//!           connected                      lost
//! absent ───────────────▶ present ───────────────▶ absent
//!                         silent for a minute: kill it
//!
//! absent, at a look:
//!   a stop is recorded and nobody has the role        honour the stop; a policy that does not follow stops goes on
//!   somebody has the role and stays mute for a minute kill the holder
//!   a service manager runs the roles                  ask it after the unit; then, by its answer:
//!     stopped                                           honour the stop, or leave the unit stopped
//!     coming, forbidden                                 nothing
//!     dead                                              its turn is over: have it start the unit, once
//!     dead once more, missing, no answer six times      its turn is over: start the role, with a growing delay
//!   no service manager                                start the role, with a growing delay
//! ```
//!
//! Nothing is started while somebody has the role, nor while the unit is masked or disabled.

use std::time::{Duration, Instant};

use super::restart_delay::RestartDelay;
use super::silence::Lasting;
use crate::core::service_manager::UnitStanding;

/// One that has been silent for so long hangs. So does one that has its role for so long and cannot be reached.
const HUNG: Duration = Duration::from_secs(60);
/// The service manager gets so long to revive a role before it is asked to, and once more before the role is started without it.
const SERVICE_MANAGERS_TURN: Duration = Duration::from_secs(10);
/// So often in a row the service manager may give no answer before it counts as none: it may be busy, or be renewed itself.
const UNANSWERED: u32 = 6;

/// Where the two roles differ in what they do about the other.
#[derive(Debug, Clone, Copy)]
pub struct RestarterPolicy {
    /// A stop of the other role, recorded or done to its unit, is a stop of this one too. So its unit is asked after from the first moment,
    /// and also while somebody has the role; otherwise only before something is started.
    pub follows_stop: bool,
    /// One that has its role when this one starts connects within this.
    pub connects: Duration,
    /// One that was lost is started after this at the earliest.
    pub moment: Duration,
    /// Between two looks while there is none.
    pub looks: PauseRule,
    /// Between two questions after the unit.
    pub questions: PauseRule,
}

impl RestarterPolicy {
    /// Of the watchdog, over the manager. It looks often, because a look is an attempt to connect.
    pub const WATCHDOG: RestarterPolicy = RestarterPolicy {
        follows_stop: true,
        connects: Duration::ZERO,
        moment: Duration::ZERO,
        looks: PauseRule { first: Duration::from_millis(1), last: Duration::from_millis(500), divisor: 16 },
        questions: PauseRule { first: Duration::from_secs(1), last: Duration::from_secs(10), divisor: 7 },
    };

    /// Of the manager, over the watchdog, which connects to it. Who renews both roles ends the manager within `moment` of the watchdog, and
    /// starts one of each.
    pub const MANAGER: RestarterPolicy = RestarterPolicy {
        follows_stop: false,
        connects: Duration::from_secs(2),
        moment: Duration::from_millis(500),
        looks: PauseRule { first: Duration::from_secs(3), last: Duration::from_secs(3), divisor: 1 },
        questions: PauseRule { first: SERVICE_MANAGERS_TURN, last: SERVICE_MANAGERS_TURN, divisor: 1 },
    };
}

/// A pause that grows with the time that has passed, as a fraction of it, between two bounds.
#[derive(Debug, Clone, Copy)]
pub struct PauseRule {
    pub first: Duration,
    pub last: Duration,
    pub divisor: u32,
}

impl PauseRule {
    fn after(self, passed: Duration) -> Duration {
        (passed / self.divisor).clamp(self.first, self.last)
    }
}

/// What is observed of a role that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoleObservation {
    /// Some process has the role.
    pub taken: bool,
    /// The home was told to stop. It counts where the policy follows stops.
    pub stop_recorded: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestarterAction {
    /// Ask the service manager after the unit, and give [`Restarter::answered`] the answer.
    AskUnit,
    /// Have the service manager start the unit.
    StartUnit,
    /// Start the role without the service manager, after so many failures in a row.
    Start { failures: u32 },
    /// Kill the process that has the role.
    KillHung,
    /// Stop as well, with what the other role has left.
    HonourStop,
    /// Leave the unit stopped: somebody wants it so.
    LeaveStopped,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The other role died, or hung and was killed.
    Died,
    /// It gave way on purpose.
    Yielded,
    /// It never answered. The socket of a process that is dying can be connected to after its last connection has ended.
    Unheard,
}

/// One role's view of the other.
#[derive(Debug)]
pub struct Restarter {
    policy: RestarterPolicy,
    /// A service manager runs the roles.
    supervised: bool,
    state: RestarterState,
    delay: RestartDelay,
    /// Questions in a row that the service manager did not answer.
    unanswered: u32,
}

#[derive(Debug)]
enum RestarterState {
    /// Connected.
    Present {
        since: Instant,
        heard: Option<Instant>,
        yields: bool,
    },
    Absent(Absence),
}

/// A time without the other role.
#[derive(Debug)]
struct Absence {
    began: Instant,
    /// Nothing is started before.
    not_before: Instant,
    looked: Option<Instant>,
    /// The unit was last asked after then; at first, when the absence began.
    asked: Instant,
    /// The service manager has its turn since then.
    turn: Instant,
    /// It was asked to start the unit.
    told: bool,
    /// Somebody has the role, and is not connected.
    mute: Lasting,
}

impl Absence {
    fn new(began: Instant, not_before: Instant) -> Absence {
        Absence { began, not_before, looked: None, asked: began, turn: began, told: false, mute: Lasting::default() }
    }

    /// When the service manager's turn is over.
    fn turn_ends(&self) -> Instant {
        self.turn + SERVICE_MANAGERS_TURN
    }
}

impl Restarter {
    /// The other role is not connected yet; `taken`: some process has it.
    pub fn new(policy: RestarterPolicy, supervised: bool, taken: bool, now: Instant) -> Restarter {
        let not_before = if taken { now + policy.connects } else { now };
        let state = RestarterState::Absent(Absence::new(now, not_before));
        Restarter { policy, supervised, state, delay: RestartDelay::new(now), unanswered: 0 }
    }

    /// There is a connection to the other role, over which nothing has been heard yet.
    pub fn connected(&mut self, now: Instant) {
        self.state = RestarterState::Present { since: now, heard: None, yields: false };
    }

    /// A sign of life of the one that is connected; whether it is the first.
    pub fn heard(&mut self, now: Instant) -> bool {
        let RestarterState::Present { heard, .. } = &mut self.state else { return false };
        let is_first = heard.replace(now).is_none();
        self.delay.came();
        is_first
    }

    /// The one that is connected says that it will end and give way to another.
    pub fn yields(&mut self) {
        if let RestarterState::Present { yields, .. } = &mut self.state {
            *yields = true;
        }
    }

    /// The connection has ended. `None`: there was none.
    pub fn lost(&mut self, now: Instant) -> Option<Loss> {
        let RestarterState::Present { since, heard, yields } = self.state else { return None };
        let loss = match heard {
            _ if yields => Loss::Yielded,
            Some(_) => Loss::Died,
            None => Loss::Unheard,
        };
        match loss {
            Loss::Yielded => self.delay.left(now),
            Loss::Died => self.delay.died(now.saturating_duration_since(since), now),
            Loss::Unheard => {}
        }
        self.state = RestarterState::Absent(Absence::new(now, now + self.policy.moment));
        Some(loss)
    }

    /// Another program is in the place of the one that failed: it is started at once.
    pub fn replaced(&mut self, now: Instant) {
        self.delay = RestartDelay::new(now);
    }

    /// When [`Restarter::look`] is due.
    pub fn deadline(&self) -> Instant {
        let absence = match &self.state {
            RestarterState::Present { since, heard, .. } => return heard.unwrap_or(*since) + HUNG,
            RestarterState::Absent(absence) => absence,
        };
        let due = self.due(absence);
        let Some(looked) = absence.looked else { return due };
        let quiet = looked.saturating_duration_since(self.delay.since().max(absence.began));
        let next = looked + self.policy.looks.after(quiet);
        if due > looked { due.min(next) } else { next }
    }

    /// When the unit is to be asked after or, without a service manager, the role is to be started.
    fn due(&self, absence: &Absence) -> Instant {
        if !self.supervised {
            return self.starts(absence);
        }
        let passed = absence.asked.saturating_duration_since(absence.began);
        let question = absence.asked + self.policy.questions.after(passed);
        if self.policy.follows_stop { question } else { question.max(absence.turn_ends()).max(self.starts(absence)) }
    }

    /// When the role may be started by us.
    fn starts(&self, absence: &Absence) -> Instant {
        self.delay.due().max(absence.not_before)
    }

    /// What time asks for. While the other role is connected that is a matter of the side that hears pings; the side that sends them goes
    /// by [`super::silence::Pings`].
    pub fn look(&mut self, seen: RoleObservation, now: Instant) -> Option<RestarterAction> {
        let due = match &self.state {
            RestarterState::Present { .. } => self.deadline(),
            RestarterState::Absent(absence) => self.due(absence),
        };
        let is_stopped = self.is_stopped(seen);
        let absence = match &mut self.state {
            RestarterState::Present { .. } if now < due => return None,
            RestarterState::Present { heard, .. } => {
                // The end of its connection tells the rest.
                *heard = Some(now);
                return Some(RestarterAction::KillHung);
            }
            RestarterState::Absent(absence) => absence,
        };
        absence.looked = Some(now);
        if is_stopped && !seen.taken {
            return Some(RestarterAction::HonourStop);
        }
        if absence.mute.look(seen.taken && !is_stopped, now) >= HUNG {
            absence.mute = Lasting::default();
            return Some(RestarterAction::KillHung);
        }
        if now < due || (seen.taken && !(self.supervised && self.policy.follows_stop)) {
            return None;
        }
        if !self.supervised {
            return Some(self.start(now));
        }
        absence.asked = now;
        Some(RestarterAction::AskUnit)
    }

    /// What follows from what the service manager knows of the unit. `None`: it gave no answer.
    pub fn answered(
        &mut self,
        answer: Option<UnitStanding>,
        seen: RoleObservation,
        now: Instant,
    ) -> Option<RestarterAction> {
        let standing = self.judge(answer);
        let is_stopped = self.is_stopped(seen);
        let follows_stop = self.policy.follows_stop;
        let RestarterState::Absent(absence) = &mut self.state else { return None };
        let may_start = !seen.taken && !is_stopped && now >= absence.turn_ends();
        match standing {
            UnitStanding::Stopped if follows_stop => Some(RestarterAction::HonourStop),
            UnitStanding::Stopped => Some(RestarterAction::LeaveStopped),
            UnitStanding::Coming | UnitStanding::Forbidden => None,
            UnitStanding::Dead | UnitStanding::Missing if !may_start => None,
            UnitStanding::Dead if !absence.told => {
                (absence.told, absence.turn) = (true, now);
                Some(RestarterAction::StartUnit)
            }
            UnitStanding::Dead | UnitStanding::Missing => {
                let starts = self.delay.due().max(absence.not_before);
                (now >= starts).then(|| self.start(now))
            }
        }
    }

    /// The service manager has come to an end with [`RestarterAction::StartUnit`], where that was waited for: its turn begins then.
    pub fn unit_start_ended(&mut self, now: Instant) {
        if let RestarterState::Absent(absence) = &mut self.state {
            absence.turn = now;
        }
    }

    /// Without an answer nothing follows at first, since the unit may be masked or stopped.
    fn judge(&mut self, answer: Option<UnitStanding>) -> UnitStanding {
        self.unanswered = if answer.is_some() { 0 } else { self.unanswered.saturating_add(1) };
        match answer {
            Some(standing) => standing,
            None if self.unanswered < UNANSWERED => UnitStanding::Coming,
            None => UnitStanding::Missing,
        }
    }

    fn is_stopped(&self, seen: RoleObservation) -> bool {
        self.policy.follows_stop && seen.stop_recorded
    }

    fn start(&mut self, now: Instant) -> RestarterAction {
        let failures = self.delay.failures();
        self.delay.tried(now);
        RestarterAction::Start { failures }
    }
}

#[cfg(test)]
mod tests;
