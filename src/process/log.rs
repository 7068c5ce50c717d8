//! The logs of sub-agents: limited in size, with one older piece each.
//!
//! A sub-agent keeps its log open while managers change, so the file is copied and then truncated. Sub-agents open it for appending, so the
//! next line is written to the new start.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::core::model::AgentName;
use crate::home::Home;
use crate::store;

/// Bytes that are searched for the end of a line.
const MAX_LINE: u64 = 64 << 10;

/// Rotates every log that is larger than `limit` bytes.
pub fn rotate_all(home: &Home, limit: u64) {
    let Ok(entries) = fs::read_dir(home.agent_logs()) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_log = path.extension().is_some_and(|extension| extension == "log");
        if is_log
            && entry.metadata().is_ok_and(|metadata| metadata.len() > limit)
            && let Err(error) = rotate(&path, limit)
        {
            tracing::warn!(error = format!("{error:#}"), "cannot rotate a sub-agent's log");
        }
    }
}

/// Removes the log of a removed sub-agent, with its older piece.
pub fn remove(home: &Home, name: &AgentName) -> Result<()> {
    let path = home.agent_log(name);
    store::remove(&path.with_extension("log.1"))?;
    store::remove(&path)
}

/// Copies the last `limit` bytes of the log and truncates it. So a log that grows faster than it is checked does not fill the disk, and its
/// copy is quick.
fn rotate(path: &Path, limit: u64) -> Result<()> {
    let attempt = || -> std::io::Result<()> {
        let copied = copy_end(path, &path.with_extension("log.1"), limit);
        // Truncated even if the copy failed: a log must not fill the disk.
        OpenOptions::new().write(true).open(path)?.set_len(0)?;
        copied.map(drop)
    };
    attempt().with_context(|| format!("cannot rotate {}", path.display()))
}

fn copy_end(path: &Path, to: &Path, limit: u64) -> std::io::Result<()> {
    let mut log = File::open(path)?;
    let begin = log.metadata()?.len().saturating_sub(limit);
    log.seek(SeekFrom::Start(begin))?;
    let mut options = OpenOptions::new();
    let mut piece = options.write(true).create(true).truncate(true).open(to)?;
    piece.set_permissions(log.metadata()?.permissions())?;
    let mut rest = log.take(limit);
    if begin > 0 {
        // Starts at the beginning of a line, if one is near.
        let mut first = Vec::new();
        rest.by_ref().take(MAX_LINE).read_to_end(&mut first)?;
        let line = first.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        piece.write_all(first.get(line..).unwrap_or_default())?;
    }
    std::io::copy(&mut rest, &mut piece).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_piece_has_the_last_whole_lines() {
        let directory = tempfile::tempdir().unwrap();
        let (log, piece) = (directory.path().join("a.log"), directory.path().join("a.log.1"));
        for (text, limit, expected) in [
            ("one\ntwo\nthree\n", 11, "two\nthree\n"),
            ("one\ntwo\nthree\n", 99, "one\ntwo\nthree\n"),
            ("abcdef", 3, "def"),
        ] {
            fs::write(&log, text).unwrap();
            rotate(&log, limit).unwrap();
            assert_eq!(fs::read_to_string(&piece).unwrap(), expected, "{limit}");
            assert_eq!(fs::metadata(&log).unwrap().len(), 0);
        }
    }

    #[test]
    fn a_log_above_its_limit_is_emptied_for_its_open_writer() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        fs::create_dir_all(home.agent_logs()).unwrap();
        let path = home.agent_log(&"a".parse().unwrap());
        let mut writer = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        writer.write_all(&[b'x'; 100]).unwrap();
        rotate_all(&home, 100);
        assert_eq!(fs::metadata(&path).unwrap().len(), 100);
        rotate_all(&home, 99);
        writer.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read(path.with_extension("log.1")).unwrap(), [b'x'; 99], "the last 99 bytes");
    }
}
