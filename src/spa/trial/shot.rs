//! Runs one of our programs in the background with a timeout; its exit code is the result.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A one-shot process.
#[derive(Debug)]
pub(super) enum OneShot {
    NotStarted,
    Running { child: Child, deadline: Instant },
    Done { success: bool, at: Instant },
}

impl OneShot {
    pub(super) fn start(command: &mut Command, limit: Duration) -> OneShot {
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match command.spawn() {
            Ok(child) => OneShot::Running { child, deadline: Instant::now() + limit },
            Err(error) => {
                tracing::error!(error = %error, program = %command.get_program().display(), "cannot start a one-shot program");
                OneShot::Done { success: false, at: Instant::now() }
            }
        }
    }

    pub(super) fn poll(&mut self, now: Instant) {
        let OneShot::Running { child, deadline } = self else { return };
        let success = match child.try_wait() {
            Ok(Some(status)) => status.success(),
            Ok(None) if now < *deadline => return,
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                false
            }
        };
        *self = OneShot::Done { success, at: now };
    }
}

impl Drop for OneShot {
    fn drop(&mut self) {
        if let OneShot::Running { child, .. } = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
