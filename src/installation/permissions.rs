//! Whether a home can be relied on: its directories are directories, and nobody but root and whoever runs it can change what lies in them.
//! As root, that is root alone.
//!
//! The manager runs what it finds in the home and writes where its paths lead. A link in the place of a directory would lead it elsewhere,
//! and whoever can write beside a key can add one. The home itself may be reached over a link. Who can put another home in its place is
//! told: what lies above is the host's, and a fleet is not to stand still for the mode of `/opt`.
//!
//! ```text
//! what others can change                                      what is refused
//! the home, its directories, bin/aops                         to fetch, unpack or activate a release; to install, to uninstall
//! etc/keys, state/keys.json, state/epochs.json                to fetch a release: by these packages are trusted
//! the home, bin, bin/aops                                     to start a role
//! the home, agents, a sub-agent's directory                   to start it, and to ask after its health
//! the directories above the home; a release that is active    nothing: it is told
//! etc/conf.toml, etc/agent-id, caCert, other state files      nothing: no release gets in by them; it is told
//! ```
//!
//! Whatever is refused, a sub-agent that runs goes on running.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::core::model::{AgentName, Version};
use crate::home::Home;
use crate::package::Keys;
use crate::platform::{self, ExpectedPath};

/// Of the state's files, so many are looked at: there are a dozen.
const MAX_STATE_FILES: usize = 256;

/// What is wrong with a home, for an operator to mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsafeHome(String);

impl fmt::Display for UnsafeHome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UnsafeHome {}

/// Looks at every directory of the home and at its executable; one that is missing is made again by others and is no fault.
pub fn home(home: &Home) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    look.whole()?;
    look.end()
}

/// Looks at what somebody relies on who installs or removes: the home itself, where its locks and records lie, and what he names.
pub fn grounds(home: &Home, also: &[(PathBuf, ExpectedPath)]) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.run(), home.process_records()] {
        look.here(&directory, ExpectedPath::Directory)?;
    }
    for (path, expected) in also {
        look.here(path, *expected)?;
    }
    look.end()
}

/// As [`home`], and the directory of one sub-agent, in which its releases lie.
pub fn agent(home: &Home, name: &AgentName) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    look.whole()?;
    look.here(&home.agent(name), ExpectedPath::Directory)?;
    look.end()
}

/// The directory of one sub-agent alone, before something in it is removed.
pub fn place(home: &Home, name: &AgentName) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    look.here(&home.agents(), ExpectedPath::Directory)?;
    look.here(&home.agent(name), ExpectedPath::DirectoryOfAnyOwner)?;
    look.end()
}

/// What leads to a release of a sub-agent, and its directory, before something of it is run.
pub fn release(home: &Home, name: &AgentName, version: &Version) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    look.release(name, version)?;
    look.end()
}

/// Where the releases of a sub-agent lie, before something of one is run. What lies in a release is its own: a script may give it to whom
/// it runs as, or open it to others, and is to be started again after that.
pub fn programs(home: &Home, name: &AgentName) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.agents(), home.agent(name)] {
        look.here(&directory, ExpectedPath::Directory)?;
    }
    look.end()
}

/// A release that is run and a program in it: what is wrong there is told.
pub fn program(home: &Home, name: &AgentName, version: &Version, program: &str) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    look.here(&home.release(name, version), ExpectedPath::Directory)?;
    look.behind_links(&home.release(name, version).join(program))?;
    look.end()
}

/// The executable of the home by one of its names, before a role is started by it.
pub fn executable(home: &Home, name: &Path) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.bin()] {
        look.here(&directory, ExpectedPath::Directory)?;
    }
    look.behind_links(name)?;
    look.end()
}

/// Looks at what says which packages are trusted: the operator's key files, what was brought and revoked, the epochs, and the directories
/// that they lie in.
pub fn keys(home: &Home) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    for directory in [home.root().to_owned(), home.etc(), home.keys(), home.state()] {
        look.here(&directory, ExpectedPath::Directory)?;
    }
    if !look.faults.is_empty() {
        // Nothing is looked for where somebody else can write.
        return look.end();
    }
    for file in Keys::files(&home.keys())?.into_iter().chain([home.keyring(), home.epochs()]) {
        look.here(&file, ExpectedPath::File)?;
    }
    look.end()
}

/// Looks at the directories above the home.
pub fn way(home: &Home) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    look.way(Path::new("/"), home.root())?;
    look.end()
}

/// As [`way`], and what says who this host is and whom it listens to, and what it remembers. `certificates`: the file that the settings
/// name.
pub fn files(home: &Home, certificates: Option<&Path>) -> Result<()> {
    let mut look = PermissionCheck::at(home)?;
    look.way(Path::new("/"), home.root())?;
    let certificates = certificates.filter(|path| path.starts_with(home.root())).map(Path::to_owned);
    for file in [home.config(), home.agent_id()].into_iter().chain(certificates) {
        look.behind_links(&file)?;
    }
    for file in state_files(home)? {
        look.here(&file, ExpectedPath::File)?;
    }
    look.end()
}

/// The files of the state, in the order of their names, but for those of [`keys`].
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

/// A look at a home, and what was found to be wrong.
struct PermissionCheck<'a> {
    home: &'a Home,
    /// The home behind all links; `None`: there is none.
    root: Option<PathBuf>,
    /// What is wrong, and with which path behind all links.
    faults: Vec<(PathBuf, String)>,
}

impl<'a> PermissionCheck<'a> {
    fn at(home: &'a Home) -> Result<PermissionCheck<'a>> {
        let root = match fs::canonicalize(home.root()) {
            Ok(root) => Some(root),
            Err(error) if is_missing(&error) => None,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot look at {}", home.root().display()));
            }
        };
        Ok(PermissionCheck { home, root, faults: Vec::new() })
    }

    fn whole(&mut self) -> Result<()> {
        for (directory, _) in self.home.directories() {
            self.here(&directory, ExpectedPath::Directory)?;
        }
        self.behind_links(&self.home.executable())
    }

    fn release(&mut self, name: &AgentName, version: &Version) -> Result<()> {
        let home = self.home;
        for directory in [home.root().to_owned(), home.agents(), home.agent(name), home.release(name, version)] {
            self.here(&directory, ExpectedPath::Directory)?;
        }
        Ok(())
    }

    /// What lies at a path of the home.
    fn here(&mut self, path: &Path, expected: ExpectedPath) -> Result<()> {
        let Some(root) = &self.root else { return Ok(()) };
        let real = self.behind(root, path);
        let weakness = platform::weakness(&real, expected, root);
        let weakness = weakness.with_context(|| format!("cannot look at {}", path.display()))?;
        self.note(&real, weakness.map(|weakness| format!("cannot rely on {}: {weakness}", path.display())));
        Ok(())
    }

    /// A path of the home as it is behind the links that lead to the home.
    fn behind(&self, root: &Path, path: &Path) -> PathBuf {
        match path.strip_prefix(self.home.root()) {
            // Joined with nothing, a path ends in a slash, and is no file's any more.
            Ok(below) if below.as_os_str().is_empty() => root.to_owned(),
            Ok(below) => root.join(below),
            Err(_) => path.to_owned(),
        }
    }

    /// A file that a link may lead to, and what leads there from the home.
    fn behind_links(&mut self, path: &Path) -> Result<()> {
        let Some(root) = self.root.clone() else { return Ok(()) };
        self.way(&root, &self.behind(&root, path))?;
        let real = match fs::canonicalize(path) {
            Ok(real) => real,
            Err(error) if is_missing(&error) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
        };
        let weakness = platform::weakness(&real, ExpectedPath::File, self.home.root());
        let weakness = weakness.with_context(|| format!("cannot look at {}", real.display()))?;
        let behind = if real == path { String::new() } else { format!(", which is {}", real.display()) };
        let fault = weakness.map(|weakness| format!("cannot rely on {}{behind}: {weakness}", path.display()));
        self.note(&real, fault);
        Ok(())
    }

    fn way(&mut self, from: &Path, path: &Path) -> Result<()> {
        let weak = platform::weakness_of_parents(from, path);
        let weak = weak.with_context(|| format!("cannot look at what leads to {}", path.display()))?;
        if let Some((place, weakness)) = weak {
            let fault = format!("cannot rely on {}, which leads to {}: {weakness}", place.display(), path.display());
            self.note(&place, Some(fault));
        }
        Ok(())
    }

    /// One for each path: a directory leads to many.
    fn note(&mut self, place: &Path, fault: Option<String>) {
        if let Some(fault) = fault
            && !self.faults.iter().any(|(other, _)| other == place)
        {
            self.faults.push((place.to_owned(), fault));
        }
    }

    fn end(self) -> Result<()> {
        let faults: Vec<String> = self.faults.into_iter().map(|(_, fault)| fault).collect();
        if faults.is_empty() { Ok(()) } else { Err(UnsafeHome(faults.join("; ")).into()) }
    }
}

fn is_missing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}
