//! Finds and stops the processes whose executable is below a directory: those of the old system, which has no records, and those that are
//! still running after a stop.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::core::manifest::StopSignal;
use crate::platform;

/// From the stop signal to the kill.
const GRACE_PERIOD: Duration = Duration::from_secs(10);
/// From the kill to the error.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A process whose executable is below a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LeftoverProcess {
    pub(super) pid: u32,
    start_time: u64,
    pub(super) executable: PathBuf,
}

/// The processes whose executable is below `root`, without this one.
pub(super) fn running_from(root: &Path) -> Vec<LeftoverProcess> {
    let root = platform::identity(root);
    let own = std::process::id();
    platform::processes(&root)
        .into_iter()
        .filter(|process| process.pid != own)
        .filter_map(|process| {
            let executable = platform::executable_of(process.pid).filter(|path| platform::is_below(path, &root))?;
            Some(LeftoverProcess { pid: process.pid, start_time: process.start_time, executable })
        })
        .collect()
}

/// Stops the processes whose executable is below `root`: with the stop signal, and with a kill after the grace period.
pub(super) fn stop_running_from(root: &Path) -> Result<()> {
    for (signal, timeout) in [(StopSignal::Term, GRACE_PERIOD), (StopSignal::Kill, KILL_TIMEOUT)] {
        let started = Instant::now();
        let mut signalled: Vec<LeftoverProcess> = Vec::new();
        loop {
            let running = running_from(root);
            if running.is_empty() {
                return Ok(());
            }
            if started.elapsed() >= timeout {
                break;
            }
            // New processes may have been started meanwhile; each gets the signal once.
            for process in running.into_iter().filter(|process| !signalled.contains(process)).collect::<Vec<_>>() {
                platform::signal(process.pid, process.start_time, signal)?;
                signalled.push(process);
            }
            platform::pause(POLL_INTERVAL);
        }
    }
    let left: Vec<String> = running_from(root)
        .iter()
        .map(|process| format!("{} ({})", process.pid, process.executable.display()))
        .collect();
    bail!("cannot stop the processes {}", left.join(", "))
}
