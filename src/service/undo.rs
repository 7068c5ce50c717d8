//! What stood where an installation puts its own, kept until it is known that it stays: [`Undo::roll_back`] puts everything back, in the
//! opposite order. What cannot be put back stays beside the directory of this, under a name that begins with `kept`, until an installation
//! succeeds.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{platform, store};

/// What could not be put back is called so, and numbered.
const KEPT: &str = "kept-";
/// So many failures in a row are kept; the first ones hold what there was.
const MAX_KEPT: usize = 8;

#[derive(Debug)]
pub(super) struct Undo {
    /// On the file system of what is kept.
    directory: PathBuf,
    kept: Vec<SavedPath>,
}

/// What stood at a path.
#[derive(Debug)]
enum SavedPath {
    Nothing(PathBuf),
    /// Another name, or a copy, of the file.
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

impl Undo {
    pub(super) fn begin(directory: PathBuf) -> Result<Undo> {
        store::remove_tree(&directory)?;
        fs::create_dir_all(&directory).with_context(|| format!("cannot make the directory {}", directory.display()))?;
        Ok(Undo { directory, kept: Vec::new() })
    }

    /// Remembers what stands at `path` before it is replaced (by rename, never in place), made or removed.
    pub(super) fn keep(&mut self, path: &Path) -> Result<()> {
        let copy = self.directory.join(self.kept.len().to_string());
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
                    same(&entry.path(), &copy.join(entry.file_name()))?;
                }
                Ok(SavedPath::Directory { path, copy })
            } else {
                same(&path, &copy)?;
                Ok(SavedPath::File { path, copy })
            }
        };
        let kept = attempt().with_context(|| format!("cannot keep {} for the case of a failure", path.display()))?;
        self.kept.push(kept);
        Ok(())
    }

    /// Puts everything back that can be put back; fails with all that could not, and where it is.
    pub(super) fn roll_back(self) -> Result<()> {
        let mut failures = Vec::new();
        for kept in self.kept.iter().rev() {
            if let Err(error) = put_back(kept) {
                failures.push(format!("{error:#}"));
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        let failures = failures.join("; ");
        match self.retain() {
            Ok(place) => bail!("{failures}; what stood there is kept in {}", place.display()),
            Err(error) => bail!("{failures}; {error:#}"),
        }
    }

    /// Gives the directory a name under which nobody removes it.
    fn retain(self) -> Result<PathBuf> {
        let place = (1..).map(|number| self.directory.with_file_name(format!("{KEPT}{number}")));
        let place = place.take(MAX_KEPT).find(|place| place.symlink_metadata().is_err());
        let place = place.with_context(|| format!("{} can be kept no longer", self.directory.display()))?;
        fs::rename(&self.directory, &place).with_context(|| format!("cannot keep {}", self.directory.display()))?;
        Ok(place)
    }
}

/// Whether that is what could not be put back.
pub(super) fn is_kept(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(KEPT))
}

/// Whether there is any of it in the directory of an installation.
pub(super) fn is_any_kept(work: &Path) -> bool {
    fs::read_dir(work).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(|entry| is_kept(&entry.path()))))
}

/// Gives a file a second name; where there are no hard links, a copy.
fn same(from: &Path, to: &Path) -> std::io::Result<()> {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to)?;
    }
    Ok(())
}

fn put_back(kept: &SavedPath) -> Result<()> {
    let path = match kept {
        SavedPath::Nothing(path)
        | SavedPath::File { path, .. }
        | SavedPath::Link { path, .. }
        | SavedPath::Directory { path, .. } => path,
    };
    // What stands as it stood is not touched: perhaps it could not be changed to begin with, and cannot be put back for the same reason.
    if stands(kept) {
        return Ok(());
    }
    let attempt = || -> Result<()> {
        match kept {
            SavedPath::Nothing(path) if path.is_dir() && !path.is_symlink() => store::remove_tree(path)?,
            SavedPath::Nothing(path) => store::remove(path)?,
            SavedPath::File { path, copy } => platform::replace_executable(copy, path)?,
            SavedPath::Link { path, target } => platform::replace_link(target, path)?,
            SavedPath::Directory { path, copy } => {
                store::remove_tree(path)?;
                fs::rename(copy, path)?;
            }
        }
        Ok(())
    };
    attempt().with_context(|| {
        let copy = match kept {
            SavedPath::File { copy, .. } | SavedPath::Directory { copy, .. } => copy.file_name(),
            SavedPath::Nothing(_) | SavedPath::Link { .. } => None,
        };
        let number = copy.map(|name| format!(" (kept as {})", name.display())).unwrap_or_default();
        format!("cannot put {} back{number}", path.display())
    })
}

/// Whether what was kept is still there, or nothing is, as it was.
fn stands(kept: &SavedPath) -> bool {
    match kept {
        SavedPath::Nothing(path) => path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound),
        SavedPath::Link { path, target } => fs::read_link(path).is_ok_and(|standing| standing == *target),
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
    fn what_cannot_be_put_back_is_kept_and_all_else_is_put_back() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("there")).unwrap();
        for name in ["there/file", "other"] {
            fs::write(at(name), "old").unwrap();
        }
        let mut undo = Undo::begin(at("undo")).unwrap();
        for name in ["other", "there/file"] {
            undo.keep(&at(name)).unwrap();
            store::remove(&at(name)).unwrap();
        }
        // A file where its directory was.
        fs::remove_dir(at("there")).unwrap();
        fs::write(at("there"), "").unwrap();

        let error = format!("{:#}", undo.roll_back().unwrap_err());
        assert!(error.contains("there/file back (kept as 1)") && error.contains("kept-1"), "{error}");
        assert_eq!(fs::read_to_string(at("other")).unwrap(), "old");
        assert_eq!(fs::read_to_string(at("kept-1/1")).unwrap(), "old");
        assert!(is_any_kept(directory.path()) && is_kept(&at("kept-1")) && !is_kept(&at("undo")));
    }

    #[test]
    fn everything_stands_again_as_it_stood() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "old").unwrap();
        fs::create_dir(at("directory")).unwrap();
        fs::write(at("directory/one"), "one").unwrap();
        platform::replace_link(Path::new("file"), &at("link")).unwrap();

        let mut undo = Undo::begin(at("undo")).unwrap();
        for name in ["file", "directory", "link", "new", "made"] {
            undo.keep(&at(name)).unwrap();
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
