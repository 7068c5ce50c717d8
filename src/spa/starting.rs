//! Managers that this watchdog started, until they are known: one may end, or hang, before anybody can connect to it.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::session::kill_session;
use crate::core::role::Role;
use crate::home::Home;
use crate::platform;
use crate::role;

/// One that neither ends nor has the role within this hangs.
const HUNG: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct StartedManager {
    child: Child,
    /// The kernel's; `None`: it had ended already.
    start_time: Option<u64>,
    at: Instant,
    /// The watchdog has connected to it.
    is_known: bool,
}

impl StartedManager {
    /// Kills it with all that it has started and that is no sub-agent.
    fn kill(&mut self, home: &Home, why: &'static str) {
        tracing::warn!(pid = self.child.id(), why, "a manager that was started is killed");
        if let Some(start_time) = self.start_time {
            kill_session(home, self.child.id(), start_time);
        }
        // It is reaped at the next look; one that has ended meanwhile cannot be killed.
        let _ = self.child.kill();
    }
}

#[derive(Debug, Default)]
pub(super) struct StartedManagers(Vec<StartedManager>);

impl StartedManagers {
    /// Starts a manager.
    pub(super) fn start(&mut self, home: &Home) -> Result<()> {
        let child = role::spawn(home, Role::Spm)?;
        let start_time = platform::process_info(child.id(), home.root()).map(|seen| seen.start_time);
        self.0.push(StartedManager { child, start_time, at: Instant::now(), is_known: false });
        Ok(())
    }

    /// The manager has answered: it is one of these, or leads the session of one, or nobody here knows it.
    pub(super) fn answered(&mut self, home: &Home) {
        if self.0.iter().all(|started| started.is_known) {
            return;
        }
        let Some(holder) = role::who_has(home, Role::Spm) else { return };
        let session = platform::process_info(holder.pid, home.root()).map(|seen| seen.session);
        for started in &mut self.0 {
            started.is_known |= [Some(holder.pid), session].contains(&Some(started.child.id()));
        }
    }

    /// Reaps those that have ended and kills those that hang; whether one has ended that nobody had connected to.
    pub(super) fn look(&mut self, home: &Home, now: Instant) -> bool {
        let mut ended_unknown = false;
        self.0.retain_mut(|started| {
            let lives = matches!(started.child.try_wait(), Ok(None));
            ended_unknown |= !lives && !started.is_known;
            lives
        });
        for started in &mut self.0 {
            if !started.is_known && now.saturating_duration_since(started.at) >= HUNG {
                started.kill(home, "it did not begin its work");
                // Once: what does not die of it cannot be killed.
                started.is_known = true;
            }
        }
        ended_unknown
    }

    /// Another program was put in the place of theirs.
    pub(super) fn replaced(&mut self, home: &Home) {
        for started in self.0.iter_mut().filter(|started| !started.is_known) {
            started.kill(home, "its release was rolled back");
            started.is_known = true;
        }
    }
}
