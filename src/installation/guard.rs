//! Whether a home can be relied on: its directories are directories, and nobody but root and the home's own user can change what lies in
//! them.
//!
//! The manager runs what it finds in the home and writes where its paths lead. A link in the place of a directory would lead it elsewhere,
//! and whoever can write beside a key can add one. The home itself may be reached over a link: what lies above it is the host's business.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::core::model::AgentName;
use crate::home::Home;
use crate::package::Keys;
use crate::platform::{self, Expected};

/// What is wrong with a home, for an operator to mend. Nothing is fetched, unpacked or activated there meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsound(String);

impl fmt::Display for Unsound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unsound {}

/// Looks at every directory of the home; one that is missing is made again by others and is no fault.
pub fn home(home: &Home) -> Result<()> {
    let faults = home
        .directories()
        .iter()
        .map(|(directory, _)| fault(home, directory, Expected::Directory))
        .collect::<Result<Vec<_>>>()?;
    all_well(faults)
}

/// As [`home`], and the directory of one sub-agent, in which its releases lie.
pub fn agent(at: &Home, name: &AgentName) -> Result<()> {
    home(at)?;
    all_well([fault(at, &at.agent(name), Expected::DirectoryOfAny)?])
}

/// The directory of one sub-agent alone, before something in it is removed.
pub fn place(home: &Home, name: &AgentName) -> Result<()> {
    let agents = fault(home, &home.agents(), Expected::Directory)?;
    all_well([agents, fault(home, &home.agent(name), Expected::DirectoryOfAny)?])
}

/// Looks at the operator's key files and the directories that they lie in.
pub fn keys(home: &Home) -> Result<()> {
    let mut faults = Vec::new();
    for directory in [home.root().to_owned(), home.etc(), home.keys()] {
        faults.push(fault(home, &directory, Expected::Directory)?);
    }
    for file in Keys::files(&home.keys())? {
        faults.push(fault(home, &file, Expected::File)?);
    }
    all_well(faults)
}

fn all_well(faults: impl IntoIterator<Item = Option<String>>) -> Result<()> {
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    if faults.is_empty() { Ok(()) } else { Err(Unsound(faults.join("; ")).into()) }
}

/// What is wrong with one path.
fn fault(home: &Home, path: &Path, expected: Expected) -> Result<Option<String>> {
    let root = match std::fs::canonicalize(home.root()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        root => root.with_context(|| format!("cannot look at {}", home.root().display()))?,
    };
    let real = path.strip_prefix(home.root()).map_or_else(|_| path.to_owned(), |below| root.join(below));
    let weakness = platform::weakness(&real, expected, &root);
    let weakness = weakness.with_context(|| format!("cannot look at {}", path.display()))?;
    Ok(weakness.map(|weakness| format!("cannot rely on {}: {weakness}", path.display())))
}
