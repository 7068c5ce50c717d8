//! Processes whose executable lies below a directory: the old system's, which nobody else knows, and what should have ended.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::core::manifest::StopSignal;
use crate::platform;

/// From the stop signal to the kill.
const GRACE: Duration = Duration::from_secs(10);
/// From the kill to giving up.
const LAST: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);

/// One that runs from below a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LeftoverProcess {
    pub(super) pid: u32,
    start_time: u64,
    pub(super) executable: PathBuf,
}

/// Who runs from below `root`, ourselves excepted.
pub(super) fn running_from(root: &Path) -> Vec<LeftoverProcess> {
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    let own = std::process::id();
    platform::processes(&root)
        .into_iter()
        .filter(|seen| seen.pid != own)
        .filter_map(|seen| {
            let executable = platform::executable_of(seen.pid).filter(|path| path.starts_with(&root))?;
            Some(LeftoverProcess { pid: seen.pid, start_time: seen.start_time, executable })
        })
        .collect()
}

/// Ends all who run from below `root`: by the stop signal, then by the kill.
pub(super) fn end_running_from(root: &Path) -> Result<()> {
    for (signal, patience) in [(StopSignal::Term, GRACE), (StopSignal::Kill, LAST)] {
        let started = Instant::now();
        let mut told: Vec<LeftoverProcess> = Vec::new();
        loop {
            let running = running_from(root);
            if running.is_empty() {
                return Ok(());
            }
            if started.elapsed() >= patience {
                break;
            }
            // Others may have been started meanwhile; each is told once.
            for process in running.into_iter().filter(|process| !told.contains(process)).collect::<Vec<_>>() {
                platform::signal(process.pid, process.start_time, signal)?;
                told.push(process);
            }
            platform::pause(LOOK);
        }
    }
    let left: Vec<String> = running_from(root)
        .iter()
        .map(|process| format!("{} ({})", process.pid, process.executable.display()))
        .collect();
    bail!("cannot end the processes {}", left.join(", "))
}
