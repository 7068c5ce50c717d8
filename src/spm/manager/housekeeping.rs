//! Schedules the manager's periodic checks, and handles their results.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use super::{Manager, config_problem, warn_of_unknown_keys, with_trial_endpoint};
use crate::core::model::AgentName;
use crate::core::order::Package;
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

/// Interval for logs, settings, orphans and the service manager's watchdog: twice within the watchdog's minute.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(25);
/// Minimum interval between checks of the home: each costs a hundred system calls, and heartbeats may be more frequent.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long a heartbeat waits for a check of the home.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval for removing abandoned downloads, in addition to the removal before each download.
const TRIM_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// Delay of housekeeping from which the process counts as not scheduled: it or the machine was suspended.
const SUSPENSION: Duration = Duration::from_secs(10);

/// The due times of the periodic checks.
#[derive(Debug)]
pub(super) struct MaintenanceSchedule {
    pub(super) next: Instant,
    next_check: Instant,
    next_trim: Instant,
    /// Modification time of the settings in use.
    config_modified: Option<SystemTime>,
    /// Whether the record on disk names this manager process.
    is_recorded: bool,
    /// Running in the background, possibly for as long as a disk hangs.
    is_busy: bool,
    is_checking: bool,
    /// A heartbeat waits for the check of the home.
    heartbeat_waits: bool,
    /// Zombies at the last housekeeping that nothing waits for.
    orphans: Vec<u32>,
}

impl MaintenanceSchedule {
    pub(super) fn new(home: &Home, own: &RoleHolder, now: Instant) -> MaintenanceSchedule {
        MaintenanceSchedule {
            next: now,
            next_check: now,
            next_trim: now,
            config_modified: maintenance::modified(home),
            is_recorded: role::recorded_holder(home, Role::Spm).as_ref() == Some(own),
            is_busy: false,
            is_checking: false,
            heartbeat_waits: false,
            orphans: vec![],
        }
    }

    /// Whether the process was not scheduled for a while.
    pub(super) fn was_held_up(&self, now: Instant) -> bool {
        now >= self.next + SUSPENSION
    }
}

impl Manager {
    pub(super) fn run_housekeeping(&mut self, now: Instant) {
        let schedule = &mut self.housekeeping;
        schedule.next = now + HOUSEKEEPING_INTERVAL;
        schedule.orphans = platform::reap_orphans(&schedule.orphans);
        if !std::mem::replace(&mut schedule.is_busy, true) {
            let own = (!schedule.is_recorded).then(|| self.identity.own.clone());
            let limit = self.config.log_max_size.0;
            maintenance::start_housekeeping(&self.inputs, &self.home, limit, schedule.config_modified, own);
        }
        if now >= schedule.next_trim {
            self.trim_cache(now);
        }
        self.retry_ledger();
        platform::notify(Notification::Alive);
    }

    /// Sends a heartbeat, after a check of the home, so that the heartbeat reports its problems. Without heartbeats the home is not
    /// checked.
    pub(super) fn heartbeat_due(&mut self, now: Instant) {
        let schedule = &mut self.housekeeping;
        if now < schedule.next_check || schedule.is_checking {
            schedule.heartbeat_waits = false;
            return self.send_heartbeat();
        }
        (schedule.is_checking, schedule.heartbeat_waits) = (true, true);
        schedule.next_check = now + CHECK_INTERVAL;
        maintenance::start_home_check(&self.inputs, &self.home, &self.config);
        self.gateway.next_heartbeat = Some(now + CHECK_TIMEOUT);
    }

    /// Sends the next heartbeat now; one in progress counts.
    pub(super) fn heartbeat_now(&mut self, now: Instant) {
        self.gateway.next_heartbeat = self.gateway.next_heartbeat.map(|_| now);
    }

    /// Checks the home synchronously, before the event loop starts.
    pub(super) fn check_home_now(&mut self) {
        let problems = maintenance::check_home(&self.home, &self.config);
        self.home_checked(problems, Instant::now());
    }

    /// Handles the result of a check of the home: each problem is shown until it is resolved.
    pub(super) fn home_checked(&mut self, problems: HomeProblems, now: Instant) {
        self.housekeeping.is_checking = false;
        if std::mem::take(&mut self.housekeeping.heartbeat_waits) {
            self.gateway.next_heartbeat = self.gateway.next_heartbeat.map(|_| now);
        }
        let HomeProblems { home, files, keys } = problems;
        self.report_problem("home", "refused", home);
        self.report_problem("files", "failed", files);
        if let Some(keys) = keys {
            self.report_problem("keys", "failed", keys);
        }
    }

    /// Applies changed settings. Invalid settings are reported, and the previous ones stay in use.
    pub(super) fn maintenance_done(&mut self, done: MaintenanceResult) {
        self.housekeeping.is_busy = false;
        self.housekeeping.is_recorded = done.is_recorded;
        self.housekeeping.config_modified = done.modified;
        let problem = match done.loaded {
            None => return,
            Some(Err(error)) => format!("{error:#}"),
            Some(Ok(loaded)) => {
                warn_of_unknown_keys(&loaded);
                match &loaded.problem {
                    Some(problem) => config_problem(problem),
                    None => {
                        self.problems.remove("config");
                        self.journal.note("config", "ok", EventSubject::default(), "the changed settings are in use");
                        self.config = with_trial_endpoint(&self.home, loaded.config, self.upgrading.endpoint.as_ref());
                        self.gateway.configure(&self.config);
                        return;
                    }
                }
            }
        };
        self.journal.note("config", "failed", EventSubject::default(), problem.as_str());
        self.problems.insert("config", problem);
    }

    /// Removes downloads that are not ordered any more or were abandoned.
    pub(super) fn trim_cache(&mut self, now: Instant) {
        self.housekeeping.next_trim = now + TRIM_INTERVAL;
        let home = self.home.clone();
        // The download of a release that is already unpacked is left over from a manager that was killed before it removed it.
        let is_unpacked = |name: &AgentName, package: &Package| {
            self.agents.get(name).is_some_and(|agent| {
                let ledger = agent.state.ledger();
                let releases = [ledger.active(), ledger.probation()];
                releases.into_iter().flatten().any(|release| release.matches(&package.version, package.sha256.as_ref()))
            })
        };
        let orders = self.orders.held.agents.iter().filter(|(name, order)| !is_unpacked(name, &order.package));
        let wanted: BTreeSet<String> =
            orders.filter_map(|(name, order)| stage::package_request(name, &order.package).file_name()).collect();
        tokio::task::spawn_blocking(move || {
            // An unsafe home may contain symbolic links to files of other users.
            if permissions::home(&home).is_ok()
                && let Err(error) = package::trim(&home.cache(), |file| wanted.contains(file))
            {
                tracing::warn!(error = format!("{error:#}"), "cannot remove old downloads");
            }
        });
    }
}
