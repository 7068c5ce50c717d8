//! Who may change what lies at a path: nobody but root and whoever we run as, where it is to be relied on.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::platform::ExpectedPath;

/// In a directory with this bit, only the owner of an entry can rename or remove it.
const STICKY: u32 = 0o1000;
/// Group and others.
const OTHERS_WRITE: u32 = 0o022;
/// As many links as the kernel follows on one way.
const MAX_LINKS: u32 = 40;

/// Why what is at `path` cannot be relied on: it is something else than expected, or somebody besides root and whoever we run as can
/// change it; as root, that is root alone. `None`: it can be, or nothing is there. No link is followed.
pub fn weakness(path: &Path, expected: ExpectedPath, home: &Path) -> io::Result<Option<String>> {
    let Some(found) = look(path)? else { return Ok(None) };
    if found.is_symlink() {
        let target = fs::read_link(path)?;
        return Ok(Some(format!("it is a symbolic link to {}; put the real thing in its place", target.display())));
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
    if let Some(stranger) = stranger(found.uid(), own()) {
        return Ok(Some(stranger));
    }
    let mode = found.mode() & 0o7777;
    // A home may be a file system of its own, mounted like /tmp: there nobody can touch what is not his, and what was added by others is
    // told by its owner.
    let is_shared_root = path == home && mode & STICKY != 0;
    if mode & OTHERS_WRITE != 0 && !is_shared_root {
        return Ok(Some(format!(
            "others can write it (mode {mode:04o}); look at what is in it, then run `chmod go-w {}`",
            path.display()
        )));
    }
    Ok(None)
}

/// The first directory on the way from `from` to `path`, both of them absolute, in which somebody besides root and whoever we run as could put something else in the place of
/// what leads there, and why. Links are followed as the system does; what lies at the end is not looked at. `None`: there is none.
pub fn weakness_on_the_way(from: &Path, path: &Path) -> io::Result<Option<(PathBuf, String)>> {
    let own = own();
    // Without links, so that its parent is where `..` leads.
    let (mut at, mut ahead) = match path.strip_prefix(from) {
        Ok(below) => (from.to_owned(), names(below)),
        Err(_) => (PathBuf::from("/"), names(path)),
    };
    let mut links = 0;
    while let Some(name) = ahead.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        let Some(directory) = look(&at)? else { return Ok(None) };
        let (uid, mode) = (directory.uid(), directory.mode());
        if let Some(why) = stranger(uid, own).or_else(|| open_to_others(&at, mode)) {
            return Ok(Some((at, why)));
        }
        at.push(name);
        let Some(found) = look(&at)? else { return Ok(None) };
        if !found.is_symlink() {
            continue;
        }
        // Where everybody can put a link, who put this one counts.
        if let Some(why) = stranger(found.uid(), own).filter(|_| mode & OTHERS_WRITE != 0) {
            return Ok(Some((at, why)));
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(io::Error::other("too many symbolic links"));
        }
        let target = fs::read_link(&at)?;
        at.pop();
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        ahead.extend(names(&target));
    }
    Ok(None)
}

/// Takes from others the right to write in a directory of ours, where nothing in it is theirs; whether they had it. An earlier version made
/// some of its directories as the umask said.
pub fn close_to_others(path: &Path) -> io::Result<bool> {
    let Some(found) = look(path)? else { return Ok(false) };
    let mode = found.mode() & 0o7777;
    if !found.is_dir() || found.uid() != own() || mode & OTHERS_WRITE == 0 {
        return Ok(false);
    }
    for entry in fs::read_dir(path)? {
        if entry?.metadata()?.uid() != own() {
            return Ok(false);
        }
    }
    super::set_mode(path, mode & !OTHERS_WRITE).map(|()| true)
}

/// The names on a path, the first one last.
fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().rev();
    let names = names.filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    names.map(|part| part.as_os_str().to_owned()).collect()
}

fn look(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

fn own() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// What is wrong with an owner, for a process of the user `own`.
fn stranger(uid: u32, own: u32) -> Option<String> {
    if uid == 0 || uid == own {
        return None;
    }
    let whose = if own == 0 { "is not root".to_owned() } else { format!("is neither root nor {own}") };
    Some(format!("it belongs to the user {uid}, who {whose}; run `chown` on it, if what is in it is yours"))
}

/// What is wrong with the mode of a directory on the way.
fn open_to_others(path: &Path, mode: u32) -> Option<String> {
    (mode & OTHERS_WRITE != 0 && mode & STICKY == 0).then(|| {
        format!(
            "others can write it (mode {:04o}), and so put something else there; run `chmod go-w {}`",
            mode & 0o7777,
            path.display()
        )
    })
}

#[cfg(test)]
mod tests;
