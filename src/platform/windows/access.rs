//! Who may change what lies at a path: administrators, the system, and whoever we run as, where it is to be relied on.
//!
//! What is looked at is the owner and the access list of the thing itself, and on the way there whether somebody else may remove or
//! rename. "Somebody else" are the groups that anybody may be in ([`OTHERS`]): a right that an administrator gave to a single user, or to
//! a group of his own, is his business. What a list denies is not set off against what it allows. Junctions on the way are followed
//! and not looked at themselves.

use std::fs;
use std::io;
use std::os::windows::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use windows_sys::Win32::Foundation::{GENERIC_ALL, GENERIC_WRITE};
use windows_sys::Win32::Storage::FileSystem::{
    DELETE, FILE_APPEND_DATA, FILE_DELETE_CHILD, FILE_FLAG_BACKUP_SEMANTICS, FILE_FLAG_OPEN_REPARSE_POINT,
    FILE_WRITE_ATTRIBUTES, FILE_WRITE_DATA, READ_CONTROL, WRITE_DAC, WRITE_OWNER,
};

use super::security::{AccessList, OTHERS};
use crate::platform::ExpectedPath;

/// Rights to take something away, or to give oneself any other right.
const REPLACE: u32 = DELETE | FILE_DELETE_CHILD | WRITE_DAC | WRITE_OWNER | GENERIC_ALL;
/// Rights to change what is in a file or a directory. Attributes make a directory a junction.
const CHANGE: u32 = REPLACE | FILE_WRITE_DATA | FILE_APPEND_DATA | FILE_WRITE_ATTRIBUTES | GENERIC_WRITE;

/// Why what is at `path` cannot be relied on: it is a link, or something else than expected, or somebody else can change it. `None`: it
/// can be, or nothing is there. No link is followed.
pub fn weakness(path: &Path, expected: ExpectedPath, _home: &Path) -> io::Result<Option<String>> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if found.is_symlink() {
        return Ok(Some("it is a symbolic link or a junction; put the real thing in its place".to_owned()));
    }
    if expected != ExpectedPath::File && !found.is_dir() {
        return Ok(Some("it is no directory".to_owned()));
    }
    if expected == ExpectedPath::File && !found.is_file() {
        return Ok(Some("it is no file".to_owned()));
    }
    if expected == ExpectedPath::DirectoryOfAny {
        return Ok(None);
    }
    let list = access_list(path)?;
    if !list.is_trusted()? {
        return Ok(Some(format!(
            "it belongs to somebody who is neither an administrator, the system, nor whom this runs as; run \
             `icacls \"{}\" /setowner *S-1-5-32-544`, if what is in it is yours",
            path.display()
        )));
    }
    open_to_others(path, &list, CHANGE, "write it")
}

/// The nearest directory on the way from `from` to `path`, both of them absolute, that somebody else can remove or rename, or what lies in it, and why. What lies at the end is
/// not looked at. `None`: there is none.
pub fn weakness_on_the_way(from: &Path, path: &Path) -> io::Result<Option<(PathBuf, String)>> {
    let whole = !path.starts_with(from);
    let on_the_way = |directory: &&Path| directory.is_absolute() && (whole || directory.starts_with(from));
    for directory in path.ancestors().skip(1).filter(on_the_way) {
        let list = match access_list(directory) {
            // What is not there is not yet anybody's. What we may not look at is not ours to judge.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => continue,
            list => list?,
        };
        if let Some(weakness) = open_to_others(directory, &list, REPLACE, "put something else in its place")? {
            return Ok(Some((directory.to_owned(), weakness)));
        }
    }
    Ok(None)
}

/// What is made inherits the access list of the home, whatever made it.
pub fn close_to_others(_path: &Path) -> io::Result<bool> {
    Ok(false)
}

fn open_to_others(path: &Path, list: &AccessList, rights: u32, what: &str) -> io::Result<Option<String>> {
    let others = OTHERS.iter().find_map(|group| match list.allows(group.kind, rights) {
        Ok(false) => None,
        Ok(true) => Some(Ok(group)),
        Err(error) => Some(Err(error)),
    });
    Ok(others.transpose()?.map(|group| {
        format!(
            "{} can {what}; look at what is in it, then run `icacls \"{}\" /inheritance:d /remove:g *{}`",
            group.name,
            path.display(),
            group.sid
        )
    }))
}

fn access_list(path: &Path) -> io::Result<AccessList> {
    let mut options = fs::OpenOptions::new();
    // A directory is opened so, and a link itself.
    options.access_mode(READ_CONTROL).custom_flags(FILE_FLAG_BACKUP_SEMANTICS | FILE_FLAG_OPEN_REPARSE_POINT);
    AccessList::of_file(&options.open(path)?)
}

#[cfg(test)]
mod tests {
    use super::super::security::set_access_list;
    use super::*;

    #[test]
    fn what_everybody_can_write_is_refused_and_what_everybody_can_read_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (file, inner) = (directory.path().join("file"), directory.path().join("inner"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&inner).unwrap();
        let home = directory.path();
        for (path, expected) in [(&file, ExpectedPath::File), (&inner, ExpectedPath::Directory)] {
            for (rights, is_weak) in [("FR", false), ("FA", true), ("FRFW", true), ("FR", false)] {
                set_access_list(path, &format!("D:P(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;@US@)(A;;{rights};;;WD)")).unwrap();
                let weakness = weakness(path, expected, home).unwrap();
                assert_eq!(weakness.is_some(), is_weak, "{rights}: {weakness:?}");
                assert!(weakness.is_none_or(|why| why.contains("Everyone can write it") && why.contains("S-1-1-0")));
            }
        }
        assert_eq!(weakness(&inner.join("nothing"), ExpectedPath::File, home).unwrap(), None);
        assert_eq!(weakness(&file, ExpectedPath::Directory, home).unwrap().unwrap(), "it is no directory");
    }

    #[test]
    fn a_directory_that_everybody_can_rename_leads_nowhere_safe() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        fs::create_dir(&inner).unwrap();
        set_access_list(&inner, "D:P(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;@US@)(A;;FA;;;WD)").unwrap();
        let way = |from: &Path| weakness_on_the_way(from, &inner.join("a/b")).unwrap();
        let (place, why) = way(Path::new("/")).unwrap();
        assert_eq!(place, inner);
        assert!(why.contains("put something else in its place"), "{why}");
        set_access_list(&inner, "D:P(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;@US@)(A;;FR;;;WD)").unwrap();
        assert_ne!(way(Path::new("/")).map(|(place, _)| place), Some(inner));
    }
}
