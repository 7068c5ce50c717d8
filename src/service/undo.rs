//! Copies of the files that an installation replaces. [`Undo::roll_back`] restores them in the opposite order. Files that cannot be
//! restored are retained in a directory whose name begins with `kept-`, until an installation succeeds.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{platform, store};

/// The directories of retained files: this and a number.
const RETAINED: &str = "kept-";
/// The number of failed installations whose files are retained. The first ones hold the original files.
const MAX_RETAINED: usize = 8;

#[derive(Debug)]
pub(super) struct Undo {
    /// On the file system of the saved paths.
    directory: PathBuf,
    saved: Vec<SavedPath>,
}

/// The previous state of a path.
#[derive(Debug)]
enum SavedPath {
    Nothing(PathBuf),
    /// `copy`: a hard link to the file, or a copy.
    File {
        path: PathBuf,
        copy: PathBuf,
    },
    Link {
        path: PathBuf,
        target: PathBuf,
    },
    Directory {
        path: PathBuf,
        copy: PathBuf,
    },
}

impl SavedPath {
    fn path(&self) -> &Path {
        match self {
            SavedPath::Nothing(path)
            | SavedPath::File { path, .. }
            | SavedPath::Link { path, .. }
            | SavedPath::Directory { path, .. } => path,
        }
    }
}

impl Undo {
    pub(super) fn begin(directory: PathBuf) -> Result<Undo> {
        store::remove_tree(&directory)?;
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create the directory {}", directory.display()))?;
        Ok(Undo { directory, saved: Vec::new() })
    }

    /// Saves the state of `path` before it is created, removed or replaced (by a rename, not in place).
    pub(super) fn save(&mut self, path: &Path) -> Result<()> {
        let copy = self.directory.join(self.saved.len().to_string());
        let attempt = || -> Result<SavedPath> {
            let path = path.to_owned();
            let metadata = match path.symlink_metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(SavedPath::Nothing(path)),
                Err(error) => return Err(error.into()),
            };
            if metadata.is_symlink() {
                let target = fs::read_link(&path)?;
                Ok(SavedPath::Link { path, target })
            } else if metadata.is_dir() {
                fs::create_dir(&copy)?;
                for entry in fs::read_dir(&path)? {
                    let entry = entry?;
                    link_or_copy(&entry.path(), &copy.join(entry.file_name()))?;
                }
                Ok(SavedPath::Directory { path, copy })
            } else {
                link_or_copy(&path, &copy)?;
                Ok(SavedPath::File { path, copy })
            }
        };
        let saved = attempt().with_context(|| format!("cannot save {} for a rollback", path.display()))?;
        self.saved.push(saved);
        Ok(())
    }

    /// Restores every saved path. The error lists those that cannot be restored, and the directory in which they are retained.
    pub(super) fn roll_back(self) -> Result<()> {
        let mut failures = Vec::new();
        let mut changed = BTreeSet::new();
        for saved in self.saved.iter().rev().filter(|saved| !is_unchanged(saved)) {
            match restore(saved) {
                Ok(()) => changed.extend(saved.path().parent().map(Path::to_owned)),
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        for directory in changed {
            if let Err(error) = platform::sync_directory(&directory) {
                failures.push(format!("cannot sync {}: {error}", directory.display()));
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        let failures = failures.join("; ");
        match self.retain() {
            Ok(directory) => bail!("{failures}; the previous files are kept in {}", directory.display()),
            Err(error) => bail!("{failures}; {error:#}"),
        }
    }

    /// Renames the directory so that the next installation does not remove it.
    fn retain(self) -> Result<PathBuf> {
        let mut names = (1..=MAX_RETAINED).map(|number| self.directory.with_file_name(format!("{RETAINED}{number}")));
        let retained = names.find(|path| path.symlink_metadata().is_err()).with_context(|| {
            format!(
                "cannot keep {}: the files of {MAX_RETAINED} failed installations are kept already",
                self.directory.display()
            )
        })?;
        platform::rename(&self.directory, &retained)
            .with_context(|| format!("cannot keep {}", self.directory.display()))?;
        Ok(retained)
    }
}

/// Whether a path is a directory of retained files.
pub(super) fn is_retained(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(RETAINED))
}

/// Whether the work directory of an installation holds retained files.
pub(super) fn has_retained(work: &Path) -> bool {
    fs::read_dir(work).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(|entry| is_retained(&entry.path()))))
}

/// Creates a hard link to a file or, on a file system without hard links, a synced copy.
fn link_or_copy(from: &Path, to: &Path) -> std::io::Result<()> {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to)?;
        platform::sync_file(to)?;
    }
    Ok(())
}

fn restore(saved: &SavedPath) -> Result<()> {
    let attempt = || -> Result<()> {
        match saved {
            SavedPath::Nothing(path) if path.is_dir() && !path.is_symlink() => store::remove_tree(path)?,
            SavedPath::Nothing(path) => store::remove(path)?,
            SavedPath::File { path, copy } => platform::replace_executable(copy, path)?,
            SavedPath::Link { path, target } => platform::replace_link(target, path)?,
            SavedPath::Directory { path, copy } => {
                platform::sync_directory(copy)?;
                store::remove_tree(path)?;
                platform::rename(copy, path)?;
            }
        }
        Ok(())
    };
    attempt().with_context(|| {
        let copy = match saved {
            SavedPath::File { copy, .. } | SavedPath::Directory { copy, .. } => copy.file_name(),
            SavedPath::Nothing(_) | SavedPath::Link { .. } => None,
        };
        let number = copy.map(|name| format!(" (kept as {})", name.display())).unwrap_or_default();
        format!("cannot restore {}{number}", saved.path().display())
    })
}

/// Whether a path is in its saved state, and is not touched: perhaps it cannot be changed at all. A directory counts as changed.
fn is_unchanged(saved: &SavedPath) -> bool {
    match saved {
        SavedPath::Nothing(path) => path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound),
        SavedPath::Link { path, target } => fs::read_link(path).is_ok_and(|current| current == *target),
        SavedPath::File { path, copy } => {
            path.symlink_metadata().is_ok_and(|found| found.is_file())
                && fs::File::open(path).and_then(|file| platform::is_same_file(&file, copy)).unwrap_or(false)
        }
        SavedPath::Directory { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_restored_are_retained_and_all_others_are_restored() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("there")).unwrap();
        for name in ["there/file", "other"] {
            fs::write(at(name), "old").unwrap();
        }
        let mut undo = Undo::begin(at("undo")).unwrap();
        for name in ["other", "there/file"] {
            undo.save(&at(name)).unwrap();
            store::remove(&at(name)).unwrap();
        }
        // A file replaces the directory.
        fs::remove_dir(at("there")).unwrap();
        fs::write(at("there"), "").unwrap();

        let error = format!("{:#}", undo.roll_back().unwrap_err());
        assert!(error.contains("there/file (kept as 1)") && error.contains("kept-1"), "{error}");
        assert_eq!(fs::read_to_string(at("other")).unwrap(), "old");
        assert_eq!(fs::read_to_string(at("kept-1/1")).unwrap(), "old");
        assert!(has_retained(directory.path()) && is_retained(&at("kept-1")) && !is_retained(&at("undo")));
    }

    #[test]
    fn a_roll_back_restores_every_path() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "old").unwrap();
        fs::create_dir(at("directory")).unwrap();
        fs::write(at("directory/one"), "one").unwrap();
        platform::replace_link(Path::new("file"), &at("link")).unwrap();

        let mut undo = Undo::begin(at("undo")).unwrap();
        for name in ["file", "directory", "link", "new", "made"] {
            undo.save(&at(name)).unwrap();
        }
        store::replace(&at("file"), b"new", store::Access::Public).unwrap();
        store::replace(&at("new"), b"new", store::Access::Public).unwrap();
        store::replace(&at("directory/two"), b"two", store::Access::Public).unwrap();
        store::remove(&at("directory/one")).unwrap();
        fs::create_dir(at("made")).unwrap();
        platform::replace_link(Path::new("new"), &at("link")).unwrap();

        undo.roll_back().unwrap();
        assert_eq!(fs::read_to_string(at("file")).unwrap(), "old");
        assert_eq!(fs::read_to_string(at("link")).unwrap(), "old");
        assert_eq!(fs::read_to_string(at("directory/one")).unwrap(), "one");
        assert!(!at("directory/two").exists() && !at("new").exists() && !at("made").exists());
    }
}
