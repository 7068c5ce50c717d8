//! The sentinel: a process of the old program that restarts the watchdog if it exits unexpectedly during a trial without a service manager.
//! It holds a pipe, whose end is the watchdog's exit, and does nothing else.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use anyhow::Result;

use crate::core::role::Role;
use crate::home::Home;
use crate::installation::upgrade;
use crate::{platform, role};

/// A running sentinel, as its watchdog holds it.
#[derive(Debug)]
pub(super) struct Sentinel {
    child: Child,
    pipe: ChildStdin,
}

impl Sentinel {
    /// Starts a sentinel; `None`: it cannot be started.
    pub(super) fn start(home: &Home) -> Option<Sentinel> {
        let mut command = Command::new(home.backup_executable());
        command.args(["spa", "--home"]).arg(home.public_path()).arg("--sentinel");
        command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        platform::detach_from_caller(&mut command);
        let spawned = command.spawn().inspect_err(|error| {
            tracing::warn!(error = %error, "cannot start the sentinel; nothing restarts the watchdog if the new manager kills it");
        });
        let mut child = spawned.ok()?;
        let pipe = child.stdin.take()?;
        Some(Sentinel { child, pipe })
    }

    /// Stops the sentinel, which then does not restart the watchdog.
    pub(super) fn stop(mut self) {
        let _ = self.pipe.write_all(b".");
        drop(self.pipe);
        let _ = self.child.wait();
    }
}

/// Waits for the exit of the watchdog that started it, and restarts that watchdog unless the sentinel was stopped.
pub(super) fn main(home: &Home) -> Result<ExitCode> {
    let is_stopped = matches!(std::io::stdin().read(&mut [0]), Ok(1..));
    if !is_stopped && !role::is_stop_recorded(home) && upgrade::load(home)?.trial().is_some() {
        role::spawn(home, Role::Spa)?;
    }
    Ok(ExitCode::SUCCESS)
}
