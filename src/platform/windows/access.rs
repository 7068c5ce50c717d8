//! Checks that a path can be changed only by administrators, the system and the user that we run as, before its content is trusted.
//!
//! The owner and the access list of the path itself are checked, and for the directories above it whether another user may remove or rename
//! them. Other users are the groups that any user may be in ([`OTHERS`]): a right that an administrator gave to a single user or group is
//! accepted. Deny entries are not offset against allow entries. Junctions above the path are followed, and not checked themselves.

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

/// Rights to remove an object, or to give oneself any other right.
const REPLACE: u32 = DELETE | FILE_DELETE_CHILD | WRITE_DAC | WRITE_OWNER | GENERIC_ALL;
/// Rights to change the content of a file or directory. Attributes can turn a directory into a junction.
const CHANGE: u32 = REPLACE | FILE_WRITE_DATA | FILE_APPEND_DATA | FILE_WRITE_ATTRIBUTES | GENERIC_WRITE;

/// Why `path` cannot be trusted: it is a link, has the wrong type, or another user can change it. `None`: it can be trusted, or does not
/// exist. Links are not followed.
pub fn weakness(path: &Path, expected: ExpectedPath, _home: &Path) -> io::Result<Option<String>> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if found.is_symlink() {
        return Ok(Some(
            "it is a symbolic link or a junction; replace the link with the file or directory itself".to_owned(),
        ));
    }
    if expected != ExpectedPath::File && !found.is_dir() {
        return Ok(Some("it is not a directory".to_owned()));
    }
    if expected == ExpectedPath::File && !found.is_file() {
        return Ok(Some("it is not a file".to_owned()));
    }
    if expected == ExpectedPath::DirectoryOfAnyOwner {
        return Ok(None);
    }
    let list = access_list(path)?;
    if !list.is_trusted()? {
        return Ok(Some(format!(
            "it belongs to a user other than administrators, the system and the user that this runs as; if its content is yours, run \
             `icacls \"{}\" /setowner *S-1-5-32-544`",
            path.display()
        )));
    }
    writable_by_others(path, &list, CHANGE, "write to it")
}

/// The nearest directory on the path between `from` and `path`, both absolute, that another user can remove or rename, or whose entries it
/// can, and why. The last component is not checked. `None`: no such directory.
pub fn weakness_of_parents(from: &Path, path: &Path) -> io::Result<Option<(PathBuf, String)>> {
    let whole = !path.starts_with(from);
    let on_the_way = |directory: &&Path| directory.is_absolute() && (whole || directory.starts_with(from));
    for directory in path.ancestors().skip(1).filter(on_the_way) {
        let list = match access_list(directory) {
            // A path that does not exist has no owner yet. A directory that we may not read is not checked.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => continue,
            list => list?,
        };
        if let Some(weakness) = writable_by_others(directory, &list, REPLACE, "replace it")? {
            return Ok(Some((directory.to_owned(), weakness)));
        }
    }
    Ok(None)
}

/// Nothing to do: everything in the home inherits its access list.
pub fn deny_write_to_others(_path: &Path) -> io::Result<bool> {
    Ok(false)
}

fn writable_by_others(path: &Path, list: &AccessList, rights: u32, what: &str) -> io::Result<Option<String>> {
    let others = OTHERS.iter().find_map(|group| match list.allows(group.kind, rights) {
        Ok(false) => None,
        Ok(true) => Some(Ok(group)),
        Err(error) => Some(Err(error)),
    });
    Ok(others.transpose()?.map(|group| {
        format!(
            "{} can {what}; check its content, then run `icacls \"{}\" /inheritance:d /remove:g *{}`",
            group.name,
            path.display(),
            group.sid
        )
    }))
}

fn access_list(path: &Path) -> io::Result<AccessList> {
    let mut options = fs::OpenOptions::new();
    // These flags open a directory, and a link itself.
    options.access_mode(READ_CONTROL).custom_flags(FILE_FLAG_BACKUP_SEMANTICS | FILE_FLAG_OPEN_REPARSE_POINT);
    AccessList::of_file(&options.open(path)?)
}

#[cfg(test)]
mod tests {
    use super::super::security::set_access_list;
    use super::*;

    #[test]
    fn a_path_that_everybody_can_write_to_is_rejected() {
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
                assert!(weakness.is_none_or(|why| why.contains("Everyone can write to it") && why.contains("S-1-1-0")));
            }
        }
        assert_eq!(weakness(&inner.join("nothing"), ExpectedPath::File, home).unwrap(), None);
        assert_eq!(weakness(&file, ExpectedPath::Directory, home).unwrap().unwrap(), "it is not a directory");
    }

    #[test]
    fn a_parent_that_everybody_can_rename_is_rejected() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        fs::create_dir(&inner).unwrap();
        set_access_list(&inner, "D:P(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;@US@)(A;;FA;;;WD)").unwrap();
        let way = |from: &Path| weakness_of_parents(from, &inner.join("a/b")).unwrap();
        let (place, why) = way(Path::new("/")).unwrap();
        assert_eq!(place, inner);
        assert!(why.contains("replace it"), "{why}");
        set_access_list(&inner, "D:P(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;@US@)(A;;FR;;;WD)").unwrap();
        assert_ne!(way(Path::new("/")).map(|(place, _)| place), Some(inner));
    }
}
