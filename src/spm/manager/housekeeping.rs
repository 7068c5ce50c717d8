//! What the manager looks after once in a while, as the loop has it: when it is begun, and what follows from what was found.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use super::{Manager, config_problem, moved, warn_of_unknown};
use crate::core::role::Role;
use crate::core::service_manager::Notification;
use crate::home::Home;
use crate::installation::permissions;
use crate::role::{self, RoleHolder};
use crate::spm::input::{HomeProblems, MaintenanceResult};
use crate::spm::journal::EventSubject;
use crate::spm::maintenance;
use crate::spm::stage;
use crate::{package, platform};

/// Logs, the configuration, orphans and the service manager's watchdog are looked after so often: twice within its minute.
const HOUSEKEEPING: Duration = Duration::from_secs(25);
/// To look at the home takes a hundred system calls: however often heartbeats go out, it is not looked at more often.
const LOOK_APART: Duration = Duration::from_secs(10);
/// A heartbeat does not wait longer for a look than this.
const LOOK_TAKES: Duration = Duration::from_secs(2);
/// Downloads that nobody came back for are looked for so often, besides before each download.
const TRIM_EVERY: Duration = Duration::from_secs(24 * 3600);
/// Housekeeping that comes so late was held up by a stop of this process or of the machine.
const NOT_SCHEDULED: Duration = Duration::from_secs(10);

/// When what is due.
#[derive(Debug)]
pub(super) struct MaintenanceSchedule {
    pub(super) next: Instant,
    next_look: Instant,
    next_trim: Instant,
    /// The settings in force were changed then.
    config_seen: Option<SystemTime>,
    /// Whether others can see by the record which process the manager is.
    is_recorded: bool,
    /// Under way beside the loop, perhaps for as long as a disk hangs.
    is_busy: bool,
    is_looking: bool,
    /// A heartbeat waits for what is found.
    heartbeat_waits: bool,
    /// Dead at the last housekeeping, and not awaited by anything.
    orphans: Vec<u32>,
}

impl MaintenanceSchedule {
    pub(super) fn new(home: &Home, own: &RoleHolder, now: Instant) -> MaintenanceSchedule {
        MaintenanceSchedule {
            next: now,
            next_look: now,
            next_trim: now + TRIM_EVERY,
            config_seen: maintenance::modified(home),
            is_recorded: role::holder(home, Role::Spm).as_ref() == Some(own),
            is_busy: false,
            is_looking: false,
            heartbeat_waits: false,
            orphans: vec![],
        }
    }

    /// Whether the process was not scheduled for a while.
    pub(super) fn was_held_up(&self, now: Instant) -> bool {
        now >= self.next + NOT_SCHEDULED
    }
}

impl Manager {
    pub(super) fn keep_house(&mut self, now: Instant) {
        let house = &mut self.housekeeping;
        house.next = now + HOUSEKEEPING;
        house.orphans = platform::reap_orphans(&house.orphans);
        if !std::mem::replace(&mut house.is_busy, true) {
            let own = (!house.is_recorded).then(|| self.identity.own.clone());
            let limit = self.config.log_max_size.0;
            maintenance::begin_housekeeping(&self.inputs, &self.home, limit, house.config_seen, own);
        }
        if now >= house.next_trim {
            self.trim_cache(now);
        }
        self.retry_ledger();
        platform::notify(Notification::Alive);
    }

    /// Sends a heartbeat, after a look at the home, so that it reports what is wrong there; a manager that sends none need not look.
    pub(super) fn heartbeat_due(&mut self, now: Instant) {
        let house = &mut self.housekeeping;
        if now < house.next_look || house.is_looking {
            house.heartbeat_waits = false;
            return self.send_heartbeat();
        }
        (house.is_looking, house.heartbeat_waits) = (true, true);
        house.next_look = now + LOOK_APART;
        maintenance::begin_look(&self.inputs, &self.home, &self.config);
        self.line.next_heartbeat = Some(now + LOOK_TAKES);
    }

    /// Brings the next heartbeat forward; one that is under way is as good.
    pub(super) fn heartbeat_now(&mut self, now: Instant) {
        self.line.next_heartbeat = self.line.next_heartbeat.map(|_| now);
    }

    /// As [`Manager::look_at_home`], before the loop begins.
    pub(super) fn look_at_home_now(&mut self) {
        let looked = maintenance::look(&self.home, &self.config);
        self.looked(looked, Instant::now());
    }

    /// What is wrong shows and is reported until it is resolved.
    pub(super) fn looked(&mut self, looked: HomeProblems, now: Instant) {
        self.housekeeping.is_looking = false;
        if std::mem::take(&mut self.housekeeping.heartbeat_waits) {
            self.line.next_heartbeat = self.line.next_heartbeat.map(|_| now);
        }
        let HomeProblems { home, files, keys } = looked;
        self.tell_of("home", "refused", home);
        self.tell_of("files", "failed", files);
        if let Some(keys) = keys {
            self.tell_of("keys", "failed", keys);
        }
    }

    /// Takes a changed configuration; a bad one leaves the old in force, which shows.
    pub(super) fn reloaded(&mut self, reloaded: MaintenanceResult) {
        self.housekeeping.is_busy = false;
        self.housekeeping.is_recorded = reloaded.is_recorded;
        self.housekeeping.config_seen = reloaded.seen;
        let problem = match reloaded.loaded {
            None => return,
            Some(Err(error)) => format!("{error:#}"),
            Some(Ok(loaded)) => {
                warn_of_unknown(&loaded);
                match &loaded.problem {
                    Some(problem) => config_problem(problem),
                    None => {
                        self.problems.remove("config");
                        self.journal.note(
                            "config",
                            "ok",
                            EventSubject::default(),
                            "the changed configuration is in force",
                        );
                        self.config = moved(&self.home, loaded.config, self.upgrading.endpoint.as_ref());
                        self.line.configure(&self.config);
                        return;
                    }
                }
            }
        };
        self.journal.note("config", "failed", EventSubject::default(), problem.as_str());
        self.problems.insert("config", problem);
    }

    /// Removes what came of downloads that nobody wants any more, or comes back for.
    pub(super) fn trim_cache(&mut self, now: Instant) {
        self.housekeeping.next_trim = now + TRIM_EVERY;
        let home = self.home.clone();
        let orders = self.orders.held.agents.iter();
        let wanted: BTreeSet<String> =
            orders.filter_map(|(name, order)| stage::wanted(name, &order.package).file_name()).collect();
        tokio::task::spawn_blocking(move || {
            // What lies behind a link is somebody else's.
            if permissions::home(&home).is_ok()
                && let Err(error) = package::trim(&home.cache(), |file| wanted.contains(file))
            {
                tracing::warn!(error = format!("{error:#}"), "old downloads cannot be removed");
            }
        });
    }
}
