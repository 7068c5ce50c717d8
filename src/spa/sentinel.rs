//! While a new release is on trial and no service manager would start the watchdog again: a process of the old program that does, when the
//! watchdog has ended without a word. It holds a pipe, whose end is the watchdog's death, and does nothing else.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use anyhow::Result;

use crate::core::role::Role;
use crate::home::Home;
use crate::installation::upgrade;
use crate::{platform, role};

/// One that is at its post.
#[derive(Debug)]
pub(super) struct Sentinel {
    child: Child,
    pipe: ChildStdin,
}

impl Sentinel {
    /// Starts one; `None`: that is not possible now.
    pub(super) fn post(home: &Home) -> Option<Sentinel> {
        let mut command = Command::new(home.backup_executable());
        command.args(["spa", "--home"]).arg(home.known_as()).arg("--sentinel");
        command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        platform::detach_from_caller(&mut command);
        let spawned = command.spawn().inspect_err(|error| {
            tracing::warn!(error = %error, "nothing starts the watchdog again if the new manager ends it");
        });
        let mut child = spawned.ok()?;
        let pipe = child.stdin.take()?;
        Some(Sentinel { child, pipe })
    }

    /// It is not needed any more.
    pub(super) fn relieve(mut self) {
        let _ = self.pipe.write_all(b".");
        drop(self.pipe);
        let _ = self.child.wait();
    }
}

/// Waits for the end of the watchdog that started it.
pub(super) fn main(home: &Home) -> Result<ExitCode> {
    let is_relieved = matches!(std::io::stdin().read(&mut [0]), Ok(1..));
    if !is_relieved && !role::is_stop_recorded(home) && upgrade::load(home)?.trial().is_some() {
        role::spawn(home, Role::Spa)?;
    }
    Ok(ExitCode::SUCCESS)
}
