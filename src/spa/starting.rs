//! Managers started by this watchdog that have not answered yet: one may exit or hang before the watchdog can connect to it.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::session::kill_session;
use crate::core::role::Role;
use crate::home::Home;
use crate::platform;
use crate::role;

/// A manager that has neither exited nor answered after this time hangs.
const HANG_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct StartedManager {
    child: Child,
    /// The kernel's start time; `None`: it had exited already.
    start_time: Option<u64>,
    started_at: Instant,
    /// The watchdog has received an answer from it.
    has_answered: bool,
}

impl StartedManager {
    /// Kills it with all processes that it started, except sub-agents.
    fn kill(&mut self, home: &Home, why: &'static str) {
        tracing::warn!(pid = self.child.id(), why, "killing a manager that this watchdog started");
        if let Some(start_time) = self.start_time {
            kill_session(home, self.child.id(), start_time);
        }
        // It is reaped at the next check; an error means that it exited in the meantime.
        let _ = self.child.kill();
    }
}

#[derive(Debug)]
pub(super) struct StartedManagers {
    started: Vec<StartedManager>,
    /// Children of the program that this process ran before a self-upgrade, such as the manager that it started.
    inherited: Vec<u32>,
}

impl StartedManagers {
    /// To be called before this process starts any child.
    pub(super) fn new() -> StartedManagers {
        StartedManagers { started: vec![], inherited: platform::children() }
    }

    /// Starts a manager.
    pub(super) fn start(&mut self, home: &Home) -> Result<()> {
        let child = role::spawn(home, Role::Spm)?;
        let start_time = platform::process_info(child.id(), home.root()).map(|process| process.start_time);
        self.started.push(StartedManager { child, start_time, started_at: Instant::now(), has_answered: false });
        Ok(())
    }

    /// The manager has answered: marks the started manager that it is, or whose session it belongs to.
    pub(super) fn answered(&mut self, home: &Home) {
        if self.started.iter().all(|started| started.has_answered) {
            return;
        }
        let Some(holder) = role::current_holder(home, Role::Spm) else { return };
        let session = platform::process_info(holder.pid, home.root()).map(|process| process.session);
        for started in &mut self.started {
            started.has_answered |= [Some(holder.pid), session].contains(&Some(started.child.id()));
        }
    }

    /// Reaps exited managers and kills hung ones; returns whether one exited without having answered.
    pub(super) fn reap(&mut self, home: &Home, now: Instant) -> bool {
        self.inherited.retain(|pid| !platform::reap_orphan(*pid));
        let mut exited_unanswered = false;
        self.started.retain_mut(|started| {
            let lives = matches!(started.child.try_wait(), Ok(None));
            exited_unanswered |= !lives && !started.has_answered;
            lives
        });
        for started in &mut self.started {
            if !started.has_answered && now.saturating_duration_since(started.started_at) >= HANG_TIMEOUT {
                started.kill(home, "it did not answer in time");
                // Only once: a process that survives this cannot be killed.
                started.has_answered = true;
            }
        }
        exited_unanswered
    }

    /// The manager's program was replaced.
    pub(super) fn kill_replaced(&mut self, home: &Home) {
        for started in self.started.iter_mut().filter(|started| !started.has_answered) {
            started.kill(home, "its release was rolled back");
            started.has_answered = true;
        }
    }
}
