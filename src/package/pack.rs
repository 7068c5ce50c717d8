//! Packs a directory into a reproducible `tar.zst`.
//!
//! Entries are sorted by path, with owner 0, modes 0755 or 0644 and one fixed time: the same directory gives the same bytes on every
//! machine, so publishing it again changes nothing. Links that stay inside the tree are kept. Content that hosts would refuse to unpack
//! is refused here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::unpack;
use crate::core::model::Os;
use crate::platform;

/// zstd's level; higher levels take far longer for little gain.
const LEVEL: i32 = 12;
/// Base 2 logarithm of the window: 4 MiB, which a host needs as memory to unpack. Hosts accept up to 8 MiB.
const WINDOW_LOG: u32 = 22;
/// 1980-01-01, the earliest time that every archive format can hold.
const TIME: u64 = 315_532_800;
/// A package with more files is a mistake.
const MAX_ENTRIES: usize = 100_000;

/// The content of a package: the source of each of its paths.
#[derive(Debug, Default)]
pub struct PackTree {
    entries: BTreeMap<String, PackEntry>,
}

#[derive(Debug)]
enum PackEntry {
    Directory,
    File { from: PathBuf, executable: bool },
    Link { target: PathBuf },
}

impl PackTree {
    /// All content of `directory`.
    pub fn of_directory(directory: &Path) -> Result<PackTree> {
        let mut tree = PackTree::default();
        tree.add_directory(directory, "").with_context(|| format!("cannot pack {}", directory.display()))?;
        if tree.entries.is_empty() {
            bail!("cannot pack {}: the directory is empty", directory.display());
        }
        Ok(tree)
    }

    /// Adds one executable at a path in the package, with its parent directories.
    pub fn add_executable(&mut self, path: &str, from: PathBuf) {
        for (end, _) in path.match_indices('/') {
            self.entries.insert(path[..end].to_owned(), PackEntry::Directory);
        }
        self.entries.insert(path.to_owned(), PackEntry::File { from, executable: true });
    }

    fn add_directory(&mut self, directory: &Path, prefix: &str) -> Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                bail!("the name {} is not UTF-8", entry.path().display());
            };
            if self.entries.len() >= MAX_ENTRIES {
                bail!("the directory has more than {MAX_ENTRIES} files");
            }
            let path = format!("{prefix}{name}");
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                self.entries.insert(path.clone(), PackEntry::Directory);
                self.add_directory(&entry.path(), &format!("{path}/"))?;
            } else if metadata.is_file() {
                let executable = platform::has_execute_bit(&metadata);
                self.entries.insert(path, PackEntry::File { from: entry.path(), executable });
            } else if metadata.is_symlink() {
                let target = fs::read_link(entry.path())?;
                // Use the rule of the hosts that unpack it, whatever this machine runs.
                if !target.to_str().is_some_and(|target| unpack::link_stays_inside(&path, target, Os::Linux)) {
                    bail!(
                        "the link {path} leaves the package, or could: its target {} leads out of the directory, or has .. after a name",
                        target.display()
                    );
                }
                self.entries.insert(path, PackEntry::Link { target });
            } else {
                bail!("{path} is not a file, directory or symbolic link");
            }
        }
        Ok(())
    }

    /// Writes the package.
    pub fn write(&self, to: impl Write) -> Result<()> {
        let mut encoder = zstd::Encoder::new(to, LEVEL)?;
        encoder.window_log(WINDOW_LOG)?;
        encoder.include_checksum(true)?;
        let mut archive = tar::Builder::new(encoder);
        for (path, entry) in &self.entries {
            append(&mut archive, path, entry).with_context(|| format!("cannot pack {path}"))?;
        }
        archive.into_inner().and_then(zstd::Encoder::finish).context("cannot write the package")?;
        Ok(())
    }
}

fn append(archive: &mut tar::Builder<impl Write>, path: &str, entry: &PackEntry) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(TIME);
    header.set_size(0);
    match entry {
        PackEntry::Directory => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
            archive.append_data(&mut header, format!("{path}/"), std::io::empty())?;
        }
        PackEntry::Link { target } => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            archive.append_link(&mut header, path, target)?;
        }
        PackEntry::File { from, executable } => {
            let file = File::open(from)?;
            let size = file.metadata()?.len();
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(if *executable { 0o755 } else { 0o644 });
            header.set_size(size);
            // Read exactly the size in the header, even if the file grows meanwhile.
            let mut content = ExactReader { file, left: size };
            archive.append_data(&mut header, path, &mut content)?;
            if content.left > 0 {
                bail!("the file became shorter while it was read");
            }
        }
    }
    Ok(())
}

struct ExactReader {
    file: File,
    left: u64,
}

impl std::io::Read for ExactReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let limit = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read(&mut buffer[..limit])?;
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(directory: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        PackTree::of_directory(directory).unwrap().write(&mut bytes).unwrap();
        bytes
    }

    fn listed(package: &[u8]) -> Vec<(String, u32, u64)> {
        let mut archive = tar::Archive::new(zstd::Decoder::new(package).unwrap());
        let entries = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (0, 0, TIME));
            (entry.path().unwrap().display().to_string(), header.mode().unwrap(), header.size().unwrap())
        });
        entries.collect()
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for (dir, names) in dirs.iter().zip([["b", "a"], ["a", "b"]]) {
            for name in names {
                fs::write(dir.path().join(name), name).unwrap();
            }
            fs::create_dir(dir.path().join("sub")).unwrap();
            let long = dir.path().join("sub").join("x".repeat(150));
            fs::write(&long, "long").unwrap();
            platform::set_mode(&dir.path().join("a"), 0o4700).unwrap();
            platform::set_mode(&long, 0o600).unwrap();
            platform::replace_link(Path::new("../a"), &dir.path().join("sub/link")).unwrap();
        }
        platform::set_mode(&dirs[1].path().join("b"), 0o664).unwrap();
        assert_eq!(packed(dirs[0].path()), packed(dirs[1].path()));
        let long = format!("sub/{}", "x".repeat(150));
        let expected =
            [("a", 0o755, 1), ("b", 0o644, 1), ("sub/", 0o755, 0), ("sub/link", 0o777, 0), (&long, 0o644, 4)];
        let expected = expected.map(|(path, mode, size)| (path.to_owned(), mode, size));
        assert_eq!(listed(&packed(dirs[0].path())), expected);
    }

    #[test]
    fn links_that_leave_the_tree_are_rejected() {
        for (path, target, leaves) in [
            ("link", "a", false),
            ("link", "../a", true),
            ("d/link", "../a", false),
            ("d/link", "../../a", true),
            ("d/link", "x/../../../a", true),
            ("link", "/etc/passwd", true),
        ] {
            assert_eq!(!unpack::link_stays_inside(path, target, Os::Linux), leaves, "{path} {target}");
        }
        let dir = tempfile::tempdir().unwrap();
        platform::replace_link(Path::new("/etc/passwd"), &dir.path().join("link")).unwrap();
        assert!(
            format!("{:#}", PackTree::of_directory(dir.path()).unwrap_err()).contains("leads out of the directory")
        );
    }

    #[test]
    fn an_empty_directory_cannot_be_packed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(PackTree::of_directory(dir.path()).is_err());
    }
}
