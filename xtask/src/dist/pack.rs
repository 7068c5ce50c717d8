//! Archives of a directory: the same directory gives the same bytes on every machine.
//!
//! Entries are sorted, with owner 0, modes 0755 or 0644 and one fixed time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The highest level: packages are made once, and hosts download them many times.
const ZSTD_LEVEL: i32 = 22;
/// Base 2 logarithm of the window: 4 MiB, which a host needs as memory to unpack.
const ZSTD_WINDOW_LOG: u32 = 22;
/// 1980-01-01, the earliest time that every format can hold.
const TIME: u64 = 315_532_800;

enum Entry {
    Directory,
    File { from: PathBuf, mode: u32 },
    Link(PathBuf),
}

/// Packs `directory` into `archive`, whose name says the format.
pub(super) fn pack(directory: &Path, archive: &Path) -> Result<()> {
    let attempt = || -> Result<()> {
        let entries = entries(directory)?;
        let file = File::create(archive)?;
        let name = archive.to_string_lossy();
        if name.ends_with(".tar.zst") {
            let mut encoder = zstd::Encoder::new(file, ZSTD_LEVEL)?;
            encoder.window_log(ZSTD_WINDOW_LOG)?;
            encoder.include_checksum(true)?;
            tar(&entries, encoder)?.finish()?;
        } else if name.ends_with(".tar.gz") {
            tar(&entries, flate2::write::GzEncoder::new(file, flate2::Compression::best()))?.finish()?;
        } else if name.ends_with(".zip") {
            zip(&entries, file)?;
        } else {
            bail!("the format of this name is unknown");
        }
        Ok(())
    };
    attempt().with_context(|| format!("cannot pack {} into {}", directory.display(), archive.display()))
}

/// The entries by their path in the archive.
fn entries(directory: &Path) -> Result<BTreeMap<String, Entry>> {
    let mut found = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            let metadata = path.symlink_metadata()?;
            let entry = if metadata.is_symlink() {
                Entry::Link(fs::read_link(&path)?)
            } else if metadata.is_dir() {
                left.push(path.clone());
                Entry::Directory
            } else {
                let is_executable = metadata.permissions().mode() & 0o100 != 0;
                Entry::File { from: path.clone(), mode: if is_executable { 0o755 } else { 0o644 } }
            };
            let name = path.strip_prefix(directory)?.to_str().context("a file name is not UTF-8")?;
            found.insert(name.to_owned(), entry);
        }
    }
    Ok(found)
}

fn tar<W: Write>(entries: &BTreeMap<String, Entry>, to: W) -> Result<W> {
    let mut builder = tar::Builder::new(to);
    for (name, entry) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_mtime(TIME);
        match entry {
            Entry::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                builder.append_data(&mut header, format!("{name}/"), io::empty())?;
            }
            Entry::File { from, mode } => {
                header.set_mode(*mode);
                header.set_size(from.metadata()?.len());
                builder.append_data(&mut header, name, File::open(from)?)?;
            }
            Entry::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                builder.append_link(&mut header, name, target)?;
            }
        }
    }
    Ok(builder.into_inner()?)
}

fn zip(entries: &BTreeMap<String, Entry>, to: File) -> Result<()> {
    let mut writer = zip::ZipWriter::new(to);
    let options = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Deflated)
        .compression_level(Some(9))
        .last_modified_time(zip::DateTime::default());
    for (name, entry) in entries {
        match entry {
            Entry::Directory => writer.add_directory(name, options.unix_permissions(0o755))?,
            Entry::File { from, mode } => {
                writer.start_file(name, options.unix_permissions(*mode))?;
                io::copy(&mut File::open(from)?, &mut writer)?;
            }
            Entry::Link(target) => bail!("a zip of links is not needed: {name} -> {}", target.display()),
        }
    }
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_directory_gives_the_same_archive() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("bin")).unwrap();
        fs::write(tree.join("bin/a"), "a").unwrap();
        for name in ["x.tar.zst", "x.tar.gz", "x.zip"] {
            let archive = directory.path().join(name);
            let packed = || {
                pack(&tree, &archive).unwrap();
                fs::read(&archive).unwrap()
            };
            let before = packed();
            fs::write(tree.join("bin/a"), "a").unwrap();
            assert_eq!(packed(), before, "{name}");
        }
        std::os::unix::fs::symlink("bin/a", tree.join("link")).unwrap();
        pack(&tree, &directory.path().join("x.tar.gz")).unwrap();
        assert!(pack(&tree, &directory.path().join("x.zip")).is_err());
        assert!(pack(&tree, &directory.path().join("x.rar")).is_err());
    }
}
