//! Snapshots of the files below a directory, to compare them later.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// An entry of a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    pub mode: u32,
    pub owner: (u32, u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Directory,
    /// Its size and the SHA-256 of its content.
    File(u64, Vec<u8>),
    /// A file that is identical to that of the lower layer.
    Unchanged,
    Link(PathBuf),
    Socket,
    Other,
}

pub type Files = BTreeMap<PathBuf, Entry>;

/// Every entry of the tree at `root`, as absolute paths of that tree, except those below the paths in `except`.
pub fn snapshot(root: &Path, except: &[&str]) -> Files {
    walk(root, except, &|_| None)
}

/// As [`snapshot`] for an overlay's merged `root`: a file that is not in its `upper` directory, or has the same content as in `lower`, is
/// [`Kind::Unchanged`] and not read.
pub fn snapshot_of_overlay(root: &Path, upper: &Path, lower: &Path, except: &[&str]) -> Files {
    walk(root, except, &|path| {
        let above = upper.join(path);
        let unchanged = fs::symlink_metadata(&above).is_err()
            || matches!((fs::read(&above), fs::read(lower.join(path))), (Ok(new), Ok(old)) if new == old);
        unchanged.then_some(Kind::Unchanged)
    })
}

/// The paths that differ, with a sign: `+` new, `-` removed, `~` changed.
pub fn difference(before: &Files, after: &Files) -> Vec<String> {
    let gone = before.keys().filter(|path| !after.contains_key(*path)).map(|path| format!("- {}", path.display()));
    let other = after.iter().filter_map(|(path, entry)| match before.get(path) {
        None => Some(format!("+ {}", path.display())),
        Some(old) if old != entry => Some(format!("~ {} {old:?} -> {entry:?}", path.display())),
        Some(_) => None,
    });
    gone.chain(other).collect()
}

/// `known` returns the kind of a regular file without reading it, by its path relative to the root, if it can.
fn walk(root: &Path, except: &[&str], known: &dyn Fn(&Path) -> Option<Kind>) -> Files {
    let mut files = Files::new();
    let mut rest = vec![PathBuf::new()];
    while let Some(directory) = rest.pop() {
        // A file that is removed during the walk is omitted.
        let Ok(entries) = fs::read_dir(root.join(&directory)) else { continue };
        for entry in entries.flatten() {
            let path = directory.join(entry.file_name());
            let shown = Path::new("/").join(&path);
            if except.iter().any(|hidden| shown.starts_with(hidden)) {
                continue;
            }
            let Ok(metadata) = fs::symlink_metadata(root.join(&path)) else { continue };
            let kind = if metadata.is_dir() {
                rest.push(path);
                Kind::Directory
            } else if metadata.is_symlink() {
                Kind::Link(fs::read_link(root.join(&path)).unwrap_or_default())
            } else if metadata.is_file() {
                known(&path).unwrap_or_else(|| {
                    let content = fs::read(root.join(&path)).unwrap_or_default();
                    Kind::File(metadata.len(), Sha256::digest(content).to_vec())
                })
            } else if metadata.file_type().is_socket() {
                Kind::Socket
            } else {
                Kind::Other
            };
            files
                .insert(shown, Entry { kind, mode: metadata.mode() & 0o7777, owner: (metadata.uid(), metadata.gid()) });
        }
    }
    files
}
