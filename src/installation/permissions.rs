//! Checks the owners and permissions of a home: its directories are real directories, and only root and the user of the manager can change
//! them. If the manager runs as root, only root.
//!
//! The manager runs programs of the home and writes to its paths. A link instead of a directory would redirect it, and a user with write
//! access to the directory of the keys could add a key. The home itself may be reached through a link. A directory above the home that
//! others can change is only reported: it belongs to the host, and a fleet must not stop because of the mode of `/opt`.
//!
//! ```text
//! changeable by others                                        refused actions
//! the home, its directories, bin/aops                         download, unpack or activate a release; install, uninstall
//! etc/keys, state/keys.json, state/epochs.json                download a release: packages are verified with these
//! the home, bin, bin/aops                                     start a role
//! the home, agents, a sub-agent's directory                   start the sub-agent, run its health check
//! a directory above the home, the active release              none: reported
//! etc/conf.toml, etc/agent-id, caCert, other state files      none: reported; they cannot authorize a release
//! ```
//!
//! A running sub-agent keeps running in any case.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::core::model::{AgentName, Version};
use crate::home::Home;
use crate::package::Keys;
use crate::platform::{self, ExpectedPath};

/// The number of state files that are checked. There are about a dozen.
const MAX_STATE_FILES: usize = 256;

/// Files of a home that other users can change, with the remedies, separated by `; `.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsafeHome(String);

impl fmt::Display for UnsafeHome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UnsafeHome {}

/// Checks every directory of the home and its executable. A missing one is not a fault: it is created elsewhere.
pub fn home(home: &Home) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    check.check_home()?;
    check.finish()
}

/// Checks the paths that an installation or uninstallation uses first: the home, the directories of its locks and records, and those in
/// `also`.
pub fn install_paths(home: &Home, also: &[(PathBuf, ExpectedPath)]) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.run(), home.process_records()] {
        check.check_path(&directory, ExpectedPath::Directory)?;
    }
    for (path, expected) in also {
        check.check_path(path, *expected)?;
    }
    check.finish()
}

/// Checks the same as [`home`] and the directory of a sub-agent, which holds its releases.
pub fn agent(home: &Home, name: &AgentName) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    check.check_home()?;
    check.check_path(&home.agent(name), ExpectedPath::Directory)?;
    check.finish()
}

/// Checks the directory of a sub-agent, before a file in it is removed.
pub fn agent_directory(home: &Home, name: &AgentName) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    check.check_path(&home.agents(), ExpectedPath::Directory)?;
    check.check_path(&home.agent(name), ExpectedPath::DirectoryOfAnyOwner)?;
    check.finish()
}

/// Checks the directories down to a release of a sub-agent, before it is activated.
pub fn release(home: &Home, name: &AgentName, version: &Version) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    check.check_release(name, version)?;
    check.finish()
}

/// Checks the directories above a release of a sub-agent, before one of its programs is run. The files in the release are not checked: its
/// script may change their owner or mode, and the sub-agent must be able to restart after that.
pub fn programs(home: &Home, name: &AgentName) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.agents(), home.agent(name)] {
        check.check_path(&directory, ExpectedPath::Directory)?;
    }
    check.finish()
}

/// Checks a release that runs and a program in it. The caller only reports a fault.
pub fn program(home: &Home, name: &AgentName, version: &Version, program: &str) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    check.check_path(&home.release(name, version), ExpectedPath::Directory)?;
    check.check_target(&home.release(name, version).join(program))?;
    check.finish()
}

/// Checks one of the names of the home's executable, before a role is started with it.
pub fn executable(home: &Home, name: &Path) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.bin()] {
        check.check_path(&directory, ExpectedPath::Directory)?;
    }
    check.check_target(name)?;
    check.finish()
}

/// Checks the files that decide which packages are accepted, and their directories: the key files, the keyring and the epochs.
pub fn keys(home: &Home) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.etc(), home.keys(), home.state()] {
        check.check_path(&directory, ExpectedPath::Directory)?;
    }
    if !check.faults.is_empty() {
        // A directory that others can change is not listed.
        return check.finish();
    }
    for file in Keys::files(&home.keys())?.into_iter().chain([home.keyring(), home.epochs()]) {
        check.check_path(&file, ExpectedPath::File)?;
    }
    check.finish()
}

/// Checks the directories above the home.
pub fn parents(home: &Home) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    check.check_parents(Path::new("/"), home.root())?;
    check.finish()
}

/// Checks the same as [`parents`] and the settings, the agent id and the state files. `certificates`: the file that the settings name as
/// `caCert`.
pub fn files(home: &Home, certificates: Option<&Path>) -> Result<()> {
    let mut check = PermissionCheck::at(home)?;
    check.check_parents(Path::new("/"), home.root())?;
    let certificates = certificates.filter(|path| path.starts_with(home.root())).map(Path::to_owned);
    for file in [home.config(), home.agent_id()].into_iter().chain(certificates) {
        check.check_target(&file)?;
    }
    for file in state_files(home)? {
        check.check_path(&file, ExpectedPath::File)?;
    }
    check.finish()
}

/// The state files except for those of [`keys`], sorted by name.
fn state_files(home: &Home) -> Result<Vec<PathBuf>> {
    let state = home.state();
    let attempt = || -> std::io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(&state)?.take(MAX_STATE_FILES) {
            paths.push(entry?.path());
        }
        Ok(paths)
    };
    let mut paths = match attempt() {
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        found => found.with_context(|| format!("cannot list {}", state.display()))?,
    };
    let others = [home.keyring(), home.epochs()];
    paths.retain(|path| {
        let is_ours = path.extension().is_some_and(|extension| extension == "json" || extension == "toml");
        is_ours && !others.contains(path)
    });
    paths.sort();
    Ok(paths)
}

/// A check of several paths of a home, and its faults.
struct PermissionCheck<'a> {
    home: &'a Home,
    /// The canonical path of the home; `None`: the home does not exist.
    root: Option<PathBuf>,
    /// The canonical paths with a fault, and its description.
    faults: Vec<(PathBuf, String)>,
}

impl<'a> PermissionCheck<'a> {
    fn at(home: &'a Home) -> Result<PermissionCheck<'a>> {
        let root = match fs::canonicalize(home.root()) {
            Ok(root) => Some(root),
            Err(error) if is_missing(&error) => None,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot check {}", home.root().display()));
            }
        };
        Ok(PermissionCheck { home, root, faults: Vec::new() })
    }

    fn check_home(&mut self) -> Result<()> {
        for (directory, _) in self.home.directories() {
            self.check_path(&directory, ExpectedPath::Directory)?;
        }
        self.check_target(&self.home.executable())
    }

    fn check_release(&mut self, name: &AgentName, version: &Version) -> Result<()> {
        let home = self.home;
        for directory in [home.root().to_owned(), home.agents(), home.agent(name), home.release(name, version)] {
            self.check_path(&directory, ExpectedPath::Directory)?;
        }
        Ok(())
    }

    /// Checks a path of the home; a link is a fault.
    fn check_path(&mut self, path: &Path, expected: ExpectedPath) -> Result<()> {
        let Some(root) = &self.root else { return Ok(()) };
        let real = self.resolve(root, path);
        let weakness = platform::weakness(&real, expected, root);
        let weakness = weakness.with_context(|| format!("cannot check {}", path.display()))?;
        self.add_fault(&real, weakness.map(|weakness| format!("cannot trust {}: {weakness}", path.display())));
        Ok(())
    }

    /// A path of the home, with the links in the home's own path resolved.
    fn resolve(&self, root: &Path, path: &Path) -> PathBuf {
        match path.strip_prefix(self.home.root()) {
            // Joining an empty path would append a slash.
            Ok(below) if below.as_os_str().is_empty() => root.to_owned(),
            Ok(below) => root.join(below),
            Err(_) => path.to_owned(),
        }
    }

    /// Checks a file that may be a link: its target, and the directories and links that lead to it from the home.
    fn check_target(&mut self, path: &Path) -> Result<()> {
        let Some(root) = self.root.clone() else { return Ok(()) };
        self.check_parents(&root, &self.resolve(&root, path))?;
        let real = match fs::canonicalize(path) {
            Ok(real) => real,
            Err(error) if is_missing(&error) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("cannot check {}", path.display())),
        };
        let weakness = platform::weakness(&real, ExpectedPath::File, self.home.root());
        let weakness = weakness.with_context(|| format!("cannot check {}", real.display()))?;
        let target = if real == path { String::new() } else { format!(", a link to {}", real.display()) };
        let fault = weakness.map(|weakness| format!("cannot trust {}{target}: {weakness}", path.display()));
        self.add_fault(&real, fault);
        Ok(())
    }

    /// Checks the directories and links from `from` to `path`.
    fn check_parents(&mut self, from: &Path, path: &Path) -> Result<()> {
        let weak = platform::weakness_of_parents(from, path);
        let weak = weak.with_context(|| format!("cannot check the directories above {}", path.display()))?;
        if let Some((directory, weakness)) = weak {
            let fault = format!("cannot trust {}, which leads to {}: {weakness}", directory.display(), path.display());
            self.add_fault(&directory, Some(fault));
        }
        Ok(())
    }

    /// Adds a fault; only the first one of each path, because a directory is above many paths.
    fn add_fault(&mut self, path: &Path, fault: Option<String>) {
        if let Some(fault) = fault
            && !self.faults.iter().any(|(other, _)| other == path)
        {
            self.faults.push((path.to_owned(), fault));
        }
    }

    fn finish(self) -> Result<()> {
        let faults: Vec<String> = self.faults.into_iter().map(|(_, fault)| fault).collect();
        if faults.is_empty() { Ok(()) } else { Err(UnsafeHome(faults.join("; ")).into()) }
    }
}

fn is_missing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}
