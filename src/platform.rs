//! What differs between Unix and Windows, behind functions of the same names; the only place with `cfg(unix)`, `cfg(windows)` and `unsafe`.
#![allow(unsafe_code, reason = "the system's interfaces are called here and nowhere else")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// How a sub-agent's process begins.
#[derive(Debug)]
pub struct Launch {
    /// Where the record of the process goes.
    pub record: PathBuf,
    /// The record's text up to its pid: `pid`, `startTime` and `group` are put behind it, by the child itself where it can.
    pub head: Vec<u8>,
    pub user: Option<User>,
    /// Its standard output and standard error.
    pub output: File,
    /// What holds its process tree.
    pub group: Option<Group>,
}

/// Who has come to the local door.
#[derive(Debug)]
pub enum SocketPeer {
    /// One who may command the home.
    Welcome(LocalStream),
    /// One who may not.
    #[cfg_attr(windows, allow(dead_code, reason = "the access list of a pipe keeps them out"))]
    Stranger {
        stream: LocalStream,
        who: String,
        /// Who may.
        whose: String,
    },
}

/// What is to lie at a path that is relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedPath {
    /// That nobody else can write.
    Directory,
    /// Whoever it belongs to.
    DirectoryOfAny,
    /// That nobody else can write.
    File,
}

/// The content of a file that nobody writes in place: as long as it is the same, so is the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentStamp {
    /// The file's volume and its number there.
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

/// One process as it was seen. Zombies are not seen: they run nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    pub pid: u32,
    /// As the platform counts it: clock ticks since boot on Unix, 100 ns since 1601 on Windows. With the pid it names a process for good.
    pub start_time: u64,
    /// The root of its tree: on Unix its session; on Windows the oldest living ancestor that is none of ours.
    pub session: u32,
    /// Who started it, or took it over from a starter that is gone.
    pub parent: u32,
    pub mark: Option<ProcessMarker>,
}

/// Which sub-agent a process belongs to: on Unix by the environment that it was started with, on Windows by the file that it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessMarker {
    pub name: String,
    pub version: String,
    /// Of its processes only the main one is ours.
    pub main_only: bool,
    /// It asks after the sub-agent's health.
    pub is_check: bool,
}

impl ProcessInfo {
    /// Whether it asks after the health of its sub-agent, and is no part of it.
    pub fn is_check(&self) -> bool {
        self.mark.as_ref().is_some_and(|mark| mark.is_check)
    }
}

/// The variable that marks the processes of a sub-agent whose main process alone is ours: what it started is somebody else's.
pub const MAIN_ONLY: &str = "AOPS_AGENT_KILL_MODE";

/// The variable that marks, beside the sub-agent's own mark, what asks after its health: that is not the sub-agent.
pub const CHECK: &str = "AOPS_AGENT_CHECK";

/// How the name of a file begins that is about to be renamed into its place.
pub const ON_ITS_WAY: &str = ".new-";

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

/// The file that this process runs from, links resolved, also when another was put in its place since.
pub fn own_executable() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?;
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(named) => Some(PathBuf::from(named)),
        None => Some(canonical(&path).unwrap_or(path)),
    }
}

/// The one path of what `path` names, whatever spelling it is: absolute, links resolved, no slash at its end. What is not there yet lies
/// below the deepest directory that is.
pub fn identity(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for there in absolute.ancestors() {
        if let Ok(real) = canonical(there) {
            let below = absolute.strip_prefix(there).unwrap_or(Path::new(""));
            return real.components().chain(below.components()).collect();
        }
    }
    absolute.components().collect()
}

/// Lets `duration` pass, in the few places where nothing can be waited for: between two tries at what the system does not announce.
#[allow(clippy::disallowed_methods, reason = "the one place")]
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
        for (there, named) in [("home", real.join("home")), ("not/yet", real.join("not/yet"))] {
            for spelling in ["real", "link", "real/", "real/.", "link//", "link/../real"] {
                let path = format!("{}/{spelling}/{there}", directory.path().display());
                for path in [format!("{path}/"), format!("{path}/."), path] {
                    let found = identity(Path::new(&path));
                    assert_eq!(found.as_os_str(), named.as_os_str(), "{path}");
                }
            }
        }
        assert_eq!(identity(Path::new("/")).as_os_str(), "/");
    }
}
