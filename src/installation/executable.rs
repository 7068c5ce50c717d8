//! The executable of the home, and the names that select its role.
//!
//! ```text
//! bin/aops                                       replaced by a rename: it is complete at any moment
//! bin/aops-spm, aops-spa, aops-agent-service     -> aops
//! control                                        -> bin/aops
//! ```
//!
//! Each name points to an image, an executable in `bin`: usually `aops`; during a trial, some roles stay on the backup.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::core::role::Role;
use crate::home::Home;
use crate::platform;

/// A name of the executable in the home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecutableName {
    /// The manager.
    Spm,
    /// The watchdog.
    Spa,
    /// The installer, under the name of the old system.
    AgentService,
    /// The operator's command.
    Control,
}

impl ExecutableName {
    pub const ALL: &'static [ExecutableName] =
        &[ExecutableName::Spm, ExecutableName::Spa, ExecutableName::AgentService, ExecutableName::Control];

    /// The link, or on Windows the copy, that has this name.
    pub fn path(self, home: &Home) -> PathBuf {
        match self {
            ExecutableName::Spm => home.role_link(Role::Spm.program()),
            ExecutableName::Spa => home.role_link(Role::Spa.program()),
            ExecutableName::AgentService => home.role_link("aops-agent-service"),
            ExecutableName::Control => home.control_link(),
        }
    }
}

/// Replaces `bin/aops` with `new`, a file on the home's file system, which is moved. Synced to disk on return.
pub fn replace(home: &Home, new: &Path) -> Result<()> {
    let path = home.executable();
    let attempt = || -> std::io::Result<()> {
        platform::sync_file(new)?;
        platform::replace_executable(new, &path)?;
        platform::sync_directory(&home.bin())
    };
    attempt().with_context(|| format!("cannot replace {} with the new executable", path.display()))
}

/// Completes the replacements of executables that were interrupted.
pub fn complete_replacements(home: &Home) {
    let attempt = |directory: &Path| {
        if let Err(error) = platform::complete_replacements(directory) {
            tracing::warn!(directory = %directory.display(), error = %error, "cannot complete the replacement of an executable");
        }
    };
    [&home.bin(), home.root()].into_iter().for_each(attempt);
}

/// Removes replaced executables that no process runs any more.
pub fn remove_replaced(home: &Home) {
    [&home.bin(), home.root()].into_iter().for_each(platform::remove_replaced);
}

/// Points these names to `image`, an executable in `bin`. It may be repeated. Synced to disk on return.
pub fn point(home: &Home, names: &[ExecutableName], image: &Path) -> Result<()> {
    let mut directories = BTreeSet::new();
    for name in names {
        let link = name.path(home);
        // Relative, so that the home can be moved.
        let target = link.parent().and_then(|directory| image.strip_prefix(directory).ok()).unwrap_or(image);
        platform::replace_link(target, &link).with_context(|| format!("cannot create the link {}", link.display()))?;
        directories.extend(link.parent().map(Path::to_owned));
    }
    directories.iter().try_for_each(|directory| {
        platform::sync_directory(directory).with_context(|| format!("cannot sync {}", directory.display()))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::create_dir(home.bin()).unwrap();
        (directory, home)
    }

    fn image(home: &Home, name: ExecutableName) -> String {
        fs::read_to_string(name.path(home)).unwrap()
    }

    #[test]
    fn every_name_points_to_the_replaced_executable() {
        let (_directory, home) = home();
        let new = home.bin().join("new");
        for content in ["1", "2"] {
            fs::write(&new, content).unwrap();
            replace(&home, &new).unwrap();
            point(&home, ExecutableName::ALL, &home.executable()).unwrap();
            assert!(!new.exists());
            assert!(ExecutableName::ALL.iter().all(|name| image(&home, *name) == content), "{content}");
        }
    }

    #[test]
    fn a_name_can_point_to_a_different_image_and_back() {
        let (_directory, home) = home();
        let old = home.bin().join("aops.prev");
        fs::write(&old, "old").unwrap();
        fs::write(home.executable(), "new").unwrap();
        point(&home, ExecutableName::ALL, &home.executable()).unwrap();
        point(&home, &[ExecutableName::Spa, ExecutableName::AgentService, ExecutableName::Control], &old).unwrap();
        assert_eq!(
            ExecutableName::ALL.iter().map(|name| image(&home, *name)).collect::<Vec<_>>(),
            ["new", "old", "old", "old"]
        );
        point(&home, ExecutableName::ALL, &home.executable()).unwrap();
        assert!(ExecutableName::ALL.iter().all(|name| image(&home, *name) == "new"));
    }
}
