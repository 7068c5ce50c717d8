//! The sentinel: a process that covers a moment in which a host without a service manager depends on a single role. If that role exits too,
//! the sentinel starts the watchdog, which starts the manager.
//!
//! ```text
//! a manager that exits so that the next one can start: until both roles run
//! a watchdog during the trial of a new manager, which may kill every watchdog that it finds: as long as the watchdog runs
//! ```
//!
//! It holds a pipe, whose end is the exit of the process that started it.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::core::role::Role;
use crate::home::Home;
use crate::installation::upgrade;
use crate::{platform, role};

/// Longer than two roles take to start. Then the sentinel exits: the roles watch each other.
const TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The pid of the process that started the sentinel. A variable, because an earlier release may be the sentinel's program.
const STARTER: &str = "AOPS_SENTINEL_STARTER";
/// After so many polls in a row without either role, nothing starts them.
const ABSENCES: u32 = 3;

/// A running sentinel, as the role that started it holds it.
#[derive(Debug)]
pub struct Sentinel {
    child: Child,
    pipe: ChildStdin,
}

impl Sentinel {
    /// Starts a sentinel; `None`: it cannot be started.
    pub fn start(home: &Home) -> Option<Sentinel> {
        // During an upgrade, the program of the release that may have to be restored.
        let is_on_trial = upgrade::load(home).is_ok_and(|record| record.trial().is_some());
        let program = if is_on_trial { home.backup_executable() } else { home.executable() };
        let mut command = Command::new(program);
        command.args(["spa", "--home"]).arg(home.public_path()).arg("--sentinel");
        command.env(STARTER, std::process::id().to_string());
        command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        platform::detach_from_caller(&mut command);
        let spawned = command.spawn().inspect_err(|error| {
            tracing::warn!(error = %error, "cannot start the sentinel; if the other role exits too, nothing restarts both");
        });
        let mut child = spawned.ok()?;
        let pipe = child.stdin.take()?;
        Some(Sentinel { child, pipe })
    }

    /// Stops the sentinel, which then starts nothing.
    pub fn stop(mut self) {
        let _ = self.pipe.write_all(b".");
        drop(self.pipe);
        let _ = self.child.wait();
    }
}

/// Waits for the exit of the role that started it. Then starts the watchdog if none runs, unless the sentinel or the home was stopped.
pub fn main(home: &Home) -> Result<ExitCode> {
    let starter = std::env::var(STARTER).ok().and_then(|pid| pid.parse().ok());
    let is_stopped = matches!(std::io::stdin().read(&mut [0]), Ok(1..));
    let deadline = Instant::now() + TIMEOUT;
    let mut without = 0;
    while !is_stopped && !role::is_stop_recorded(home) && Instant::now() < deadline {
        let manager = role::is_held(home, Role::Spm);
        let manager = manager && is_another(role::current_holder(home, Role::Spm).map(|holder| holder.pid), starter);
        let watchdog = role::is_held(home, Role::Spa);
        if manager && watchdog {
            break;
        }
        // A manager restarts the watchdog, unless it is a bad release. One that follows another takes a moment to get the lock.
        let is_on_trial = !watchdog && upgrade::load(home)?.trial().is_some();
        without = if manager || watchdog { 0 } else { without + 1 };
        if is_on_trial || without >= ABSENCES {
            role::spawn(home, Role::Spa)?;
            break;
        }
        platform::pause(POLL_INTERVAL);
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether the running manager is not the one that started the sentinel: that one exits, but holds its role a moment longer than the pipe.
fn is_another(manager: Option<u32>, starter: Option<u32>) -> bool {
    starter.is_none() || manager != starter
}

#[cfg(test)]
mod tests {
    use super::is_another;

    #[test]
    fn a_manager_that_exits_does_not_count_as_running() {
        assert!(!is_another(Some(1), Some(1)));
        assert!(is_another(Some(2), Some(1)));
        // It holds its lock without a record, or an earlier release started the sentinel.
        assert!(is_another(None, Some(1)) && is_another(Some(2), None));
    }
}
