//! Platform-specific code: Unix and Windows implement the same functions under the same names. The only place with `cfg(unix)`,
//! `cfg(windows)` and `unsafe`.
#![allow(unsafe_code, reason = "system interfaces are called only here")]

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::core::model::{Arch, Os};

#[cfg(unix)]
mod unix;
#[cfg(unix)]
pub use unix::*;
#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub use windows::*;

#[cfg(test)]
#[allow(dead_code, reason = "the tests of one platform use more of it than those of the other")]
pub mod testing;

/// How to start a sub-agent's process.
#[derive(Debug)]
pub struct Launch {
    /// Path of the process record.
    pub record: PathBuf,
    /// The record's text up to its pid. `pid`, `startTime` and `group` are appended, by the child itself where the platform allows it.
    pub head: Vec<u8>,
    pub user: Option<User>,
    /// Standard output and standard error.
    pub output: File,
    /// The cgroup or Job Object that holds its process tree.
    pub group: Option<Group>,
}

/// A service of Windows, as it is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceDefinition {
    pub name: String,
    pub display_name: String,
    pub description: String,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// How long a stop before the shutdown of the host may take.
    pub stop_timeout: Duration,
}

/// What a service of Windows does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(unix, allow(dead_code, reason = "there are none"))]
pub enum ServiceRun {
    Running,
    /// It is starting or stopping.
    Changing,
    /// It was stopped on purpose, or not started yet.
    Stopped,
    /// It exited without a stop.
    Failed,
}

impl ServiceRun {
    /// Whether the service control manager counts on a process of the service.
    pub fn has_process(self) -> bool {
        matches!(self, ServiceRun::Running | ServiceRun::Changing)
    }
}

/// The state of a service of Windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceState {
    pub run: ServiceRun,
    pub pid: Option<u32>,
    /// An operator disabled it.
    pub is_disabled: bool,
    /// The program with its arguments.
    pub command: String,
}

/// A service of Windows, of aops or of others, with the settings that it is put back with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegisteredService {
    pub name: String,
    pub display_name: String,
    pub description: Option<String>,
    /// The program with its arguments.
    pub command: String,
    /// These three as Windows counts them.
    pub service_type: u32,
    pub start_type: u32,
    pub error_control: u32,
    /// Whether it starts after others at boot; `None`: this system does not know the setting.
    pub is_delayed: Option<bool>,
    /// Other services and groups of services, which have a `+`.
    pub dependencies: Vec<String>,
    /// The user as whom it runs.
    pub account: Option<String>,
    pub failure: Option<FailureActions>,
    pub is_running: bool,
}

/// What Windows does when a service fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureActions {
    /// The time without a failure after which the first action applies again; `None`: never.
    pub reset_seconds: Option<u64>,
    pub reboot_message: Option<String>,
    pub command: Option<String>,
    /// The kind, as Windows counts it, and the milliseconds before it.
    pub actions: Vec<(i32, u64)>,
    /// Whether an exit with an error counts as a failure; `None`: this system does not know the setting.
    pub also_after_errors: Option<bool>,
}

impl RegisteredService {
    /// Whether its account has a password, which cannot be read. Those of the system have none, nor have managed ones (`name$`).
    pub fn has_password(&self) -> bool {
        let account = self.account.as_deref().unwrap_or_default().to_lowercase();
        let account = account.trim_start_matches(r".\");
        let is_of_system = ["", "localsystem"].contains(&account)
            || [r"nt authority\", r"nt service\"].iter().any(|domain| account.starts_with(domain));
        !(is_of_system || account.ends_with('$'))
    }
}

/// A client that connected to the control socket.
#[derive(Debug)]
pub enum SocketPeer {
    /// A client that may command the home.
    Allowed(LocalStream),
    /// A client that may not.
    #[cfg_attr(windows, allow(dead_code, reason = "the access list of the pipe rejects them"))]
    Rejected {
        stream: LocalStream,
        peer: String,
        /// The users that may.
        allowed: String,
    },
}

/// The expected type and owner of a path that must not be writable by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedPath {
    /// A directory that only trusted users can write to.
    Directory,
    /// A directory with any owner.
    DirectoryOfAnyOwner,
    /// A file that only trusted users can write to.
    File,
}

/// Identifies the content of a file that is only ever replaced, never written in place: equal stamps mean equal content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentStamp {
    /// Volume and file number.
    identity: (u64, u64),
    size: u64,
    modified: Option<std::time::SystemTime>,
}

impl ContentStamp {
    pub fn of(file: &File) -> std::io::Result<ContentStamp> {
        let metadata = file.metadata()?;
        Ok(ContentStamp { identity: file_identity(file)?, size: metadata.len(), modified: metadata.modified().ok() })
    }
}

/// A live process. Zombies are not reported: they run nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    pub pid: u32,
    /// In units of the platform: clock ticks since boot on Unix, 100 ns since 1601 on Windows. Together with the pid it identifies a
    /// process permanently.
    pub start_time: u64,
    /// The root of its tree: on Unix its session; on Windows the oldest living ancestor that is not a process of ours.
    pub session: u32,
    /// The process that started it, or that adopted it.
    pub parent: u32,
    pub marker: Option<ProcessMarker>,
}

/// The sub-agent that a process belongs to: on Unix read from the environment that it was started with, on Windows from the path of its
/// executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessMarker {
    pub name: String,
    pub version: String,
    /// Only the main process of the sub-agent is ours.
    pub main_only: bool,
    /// It runs a health check of the sub-agent.
    pub is_check: bool,
}

impl ProcessInfo {
    /// Whether it runs a health check of its sub-agent, and so is not part of the sub-agent.
    pub fn is_check(&self) -> bool {
        self.marker.as_ref().is_some_and(|marker| marker.is_check)
    }
}

/// Environment variable that marks the processes of a sub-agent whose main process alone is ours: the processes that it started are not.
pub const MAIN_ONLY: &str = "AOPS_AGENT_KILL_MODE";

/// Environment variable that marks, in addition to the sub-agent's own marker, a health check. A health check is not part of the sub-agent.
pub const CHECK: &str = "AOPS_AGENT_CHECK";

/// Prefix of a temporary file that is about to be renamed to its final name.
pub const TEMPORARY_PREFIX: &str = ".new-";

/// Prefix of the temporary files of this process. It identifies the process, so that what a killed process left can be recognized. After a
/// restart of the host another process soon has the same pid, but not the same start time.
pub fn temporary_prefix() -> String {
    let pid = std::process::id();
    match start_time(pid) {
        Some(start_time) => format!("{TEMPORARY_PREFIX}{pid}-{start_time}-"),
        None => format!("{TEMPORARY_PREFIX}{pid}-"),
    }
}

/// The process that created a temporary file, by the file's name: its pid and start time.
pub fn temporary_owner(name: &str) -> Option<(u32, u64)> {
    let mut parts = name.strip_prefix(TEMPORARY_PREFIX)?.splitn(3, '-');
    let (pid, start_time) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().map(|_| (pid, start_time))
}

/// The operating system that this executable is for.
pub const OS: Os = if cfg!(windows) { Os::Windows } else { Os::Linux };
/// The architecture that this executable is for.
pub const ARCH: Arch = if cfg!(target_arch = "x86_64") {
    Arch::Amd64
} else if cfg!(target_arch = "aarch64") {
    Arch::Arm64
} else {
    Arch::I386
};

/// The executable file of this process, with links resolved, even if it was replaced since the start.
pub fn own_executable() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?;
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(named) => Some(PathBuf::from(named)),
        None => Some(canonical(&path).unwrap_or(path)),
    }
}

/// The canonical form of a path: absolute, links resolved, no trailing slash. The part that does not exist yet is appended to the deepest
/// directory that exists.
pub fn identity(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for existing in absolute.ancestors() {
        if let Ok(real) = canonical(existing) {
            let below = absolute.strip_prefix(existing).unwrap_or(Path::new(""));
            return real.components().chain(below.components()).collect();
        }
    }
    absolute.components().collect()
}

/// Sleeps for `duration`. Only for polling a condition that the system does not announce.
#[allow(clippy::disallowed_methods, reason = "the only place that sleeps")]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_path_has_one_identity() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap().join("real");
        std::fs::create_dir_all(real.join("home")).unwrap();
        std::os::unix::fs::symlink(&real, directory.path().join("link")).unwrap();
        for (name, expected) in [("home", real.join("home")), ("not/yet", real.join("not/yet"))] {
            for spelling in ["real", "link", "real/", "real/.", "link//", "link/../real"] {
                let path = format!("{}/{spelling}/{name}", directory.path().display());
                for path in [format!("{path}/"), format!("{path}/."), path] {
                    let found = identity(Path::new(&path));
                    assert_eq!(found.as_os_str(), expected.as_os_str(), "{path}");
                }
            }
        }
        assert_eq!(identity(Path::new("/")).as_os_str(), "/");
    }
}
