//! Who may change what lies at a path.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::platform::Expected;

/// Why what is at `path` cannot be relied on: it is a link, or something else than expected. `None`: it can be, or nothing is there. Who
/// may write there is said by the access list that it inherits from the directory of the home.
pub fn weakness(path: &Path, expected: Expected, _home: &Path) -> io::Result<Option<String>> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(if found.is_symlink() {
        Some("it is a symbolic link or a junction; put the real thing in its place".to_owned())
    } else if expected != Expected::File && !found.is_dir() {
        Some("it is no directory".to_owned())
    } else if expected == Expected::File && !found.is_file() {
        Some("it is no file".to_owned())
    } else {
        None
    })
}

/// On the way to a path nothing is looked at: whoever may rename a directory there is an administrator, or was let in by one.
pub fn weakness_on_the_way(_path: &Path) -> io::Result<Option<(PathBuf, String)>> {
    Ok(None)
}
