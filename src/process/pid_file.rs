//! Pid files of a release with a `control` script. Such scripts identify their program by a pid in a file and `kill -0`.
//!
//! Pids are reused. A pid file belongs to the process if it was written after the process started. A process that started later has a
//! reused pid.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::platform::{self, ProcessInfo};
use crate::store;

/// Depth to which a release is searched, and the maximum size of a pid file.
const DEPTH: u32 = 3;
const MAX_BYTES: u64 = 32;
/// Tolerance between start times and file times, which come from clocks of different resolution.
const TOLERANCE: Duration = Duration::from_secs(1);

/// A file that contains a pid.
#[derive(Debug)]
pub struct PidFile {
    pub path: PathBuf,
    pub pid: u32,
    written: SystemTime,
}

impl PidFile {
    /// Whether the file may have been written for this process. A file time in the future does not count: the clock is not reliable.
    pub fn is_of(&self, process: &ProcessInfo, now: SystemTime) -> bool {
        let started = platform::age(process.start_time).and_then(|age| now.checked_sub(age));
        self.pid == process.pid
            && started.is_some_and(|started| self.written + TOLERANCE >= started && self.written <= now + TOLERANCE)
    }
}

/// The files named like `pid`, `app.pid` or `app_pid` that contain only a number.
pub fn all(release: &Path) -> Vec<PidFile> {
    below(release, DEPTH)
}

fn below(directory: &Path, depth: u32) -> Vec<PidFile> {
    let mut found = vec![];
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() && depth > 1 {
            found.extend(below(&path, depth - 1));
        } else if metadata.is_file()
            && metadata.len() <= MAX_BYTES
            && entry.file_name().to_str().is_some_and(|name| name.ends_with("pid"))
            && let Some(pid) = number_in(&path)
            && let Ok(written) = metadata.modified()
        {
            found.push(PidFile { path, pid, written });
        }
    }
    found
}

fn number_in(path: &Path) -> Option<u32> {
    let text = store::read(path, MAX_BYTES).ok()??;
    std::str::from_utf8(&text).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_belongs_to_a_process_that_started_before_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("var")).unwrap();
        std::fs::write(directory.path().join("var/app.pid"), format!("{}\n", std::process::id())).unwrap();
        std::fs::write(directory.path().join("var/app.txt"), "1").unwrap();
        let [file] = all(directory.path()).try_into().unwrap();
        let start_time = platform::start_time(file.pid).unwrap();
        let own = ProcessInfo { pid: file.pid, start_time, session: file.pid, parent: 1, marker: None };
        let now = SystemTime::now();
        assert!(file.is_of(&own, now));
        assert!(!file.is_of(&ProcessInfo { pid: 1, ..own.clone() }, now));
        let hour = Duration::from_secs(3600);
        let since = PidFile { written: now - 24 * 365 * hour, path: file.path.clone(), ..file };
        assert!(!since.is_of(&own, now), "the process started later");
        let in_future = PidFile { written: now + hour, ..since };
        assert!(!in_future.is_of(&own, now), "the clock was set back");
    }
}
