//! Checks that a path can be changed only by root and the user that we run as, before its content is trusted.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::platform::ExpectedPath;

/// In a directory with this bit, only the owner of an entry can rename or remove it.
const STICKY: u32 = 0o1000;
/// Write permission of group and others.
const OTHERS_WRITE: u32 = 0o022;
/// The kernel's limit of links in one path.
const MAX_LINKS: u32 = 40;

/// Why `path` cannot be trusted: it has the wrong type, or a user other than root and the user that we run as can change it. `None`: it can
/// be trusted, or does not exist. Links are not followed.
pub fn weakness(path: &Path, expected: ExpectedPath, home: &Path) -> io::Result<Option<String>> {
    let Some(found) = metadata_of(path)? else { return Ok(None) };
    if found.is_symlink() {
        let target = fs::read_link(path)?;
        return Ok(Some(format!(
            "it is a symbolic link to {}; replace the link with the file or directory itself",
            target.display()
        )));
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
    if let Some(why) = untrusted_owner(found.uid(), own_uid()) {
        return Ok(Some(why));
    }
    let mode = found.mode() & 0o7777;
    // A home may be a file system of its own, mounted like /tmp. There, users can only touch their own entries, and files that others added
    // are detected by their owner.
    let is_shared_root = path == home && mode & STICKY != 0;
    if mode & OTHERS_WRITE != 0 && !is_shared_root {
        return Ok(Some(format!(
            "others can write to it (mode {mode:04o}); check its content, then run `chmod go-w {}`",
            path.display()
        )));
    }
    Ok(None)
}

/// The first directory on the path between `from` and `path`, both absolute, in which another user could replace the next component, and
/// why. Links are followed as the system follows them. The last component is not checked. `None`: no such directory.
pub fn weakness_of_parents(from: &Path, path: &Path) -> io::Result<Option<(PathBuf, String)>> {
    let own_uid = own_uid();
    // Links are resolved, so that the parent is the directory that `..` means.
    let (mut at, mut remaining) = match path.strip_prefix(from) {
        Ok(below) => (from.to_owned(), components(below)),
        Err(_) => (PathBuf::from("/"), components(path)),
    };
    let mut links = 0;
    while let Some(name) = remaining.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        let Some(directory) = metadata_of(&at)? else { return Ok(None) };
        let (uid, mode) = (directory.uid(), directory.mode());
        if let Some(why) = untrusted_owner(uid, own_uid).or_else(|| writable_by_others(&at, mode)) {
            return Ok(Some((at, why)));
        }
        at.push(name);
        let Some(found) = metadata_of(&at)? else { return Ok(None) };
        if !found.is_symlink() {
            continue;
        }
        // In a directory that everybody can write to, the owner of the link matters.
        if let Some(why) = untrusted_owner(found.uid(), own_uid).filter(|_| mode & OTHERS_WRITE != 0) {
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
        remaining.extend(components(&target));
    }
    Ok(None)
}

/// Removes the write permission of others from a directory of ours, unless it has entries of other users. Returns whether it did. An
/// earlier version created some of its directories with the umask's permissions.
pub fn deny_write_to_others(path: &Path) -> io::Result<bool> {
    let Some(found) = metadata_of(path)? else { return Ok(false) };
    let mode = found.mode() & 0o7777;
    if !found.is_dir() || found.uid() != own_uid() || mode & OTHERS_WRITE == 0 {
        return Ok(false);
    }
    for entry in fs::read_dir(path)? {
        if entry?.metadata()?.uid() != own_uid() {
            return Ok(false);
        }
    }
    super::set_mode(path, mode & !OTHERS_WRITE).map(|()| true)
}

/// The components of a path, in reverse order.
fn components(path: &Path) -> Vec<OsString> {
    let components = path.components().rev();
    let components = components.filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    components.map(|part| part.as_os_str().to_owned()).collect()
}

fn metadata_of(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Why an owner is not trusted, for a process of the user `own_uid`.
fn untrusted_owner(uid: u32, own_uid: u32) -> Option<String> {
    if uid == 0 || uid == own_uid {
        return None;
    }
    let whose = if own_uid == 0 { "is not root".to_owned() } else { format!("is neither root nor {own_uid}") };
    Some(format!("it belongs to the user {uid}, who {whose}; if its content is yours, run `chown` on it"))
}

/// Why the mode of a directory on the path is not trusted.
fn writable_by_others(path: &Path, mode: u32) -> Option<String> {
    (mode & OTHERS_WRITE != 0 && mode & STICKY == 0).then(|| {
        format!(
            "others can write to it (mode {:04o}) and replace its content; run `chmod go-w {}`",
            mode & 0o7777,
            path.display()
        )
    })
}

#[cfg(test)]
mod tests;
