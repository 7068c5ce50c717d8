//! The logs that sub-agents write into: capped, with one older piece beside each.
//!
//! A sub-agent keeps its log open across any number of managers, so the file is copied away and emptied in place; it is written by append,
//! so the next line lands at the new beginning.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::core::model::AgentName;
use crate::home::Home;
use crate::store;

/// What is looked through for the end of a line.
const LINE: u64 = 64 << 10;

/// Copies away and empties every log of a sub-agent that has grown beyond `limit` bytes.
pub fn rotate_all(home: &Home, limit: u64) {
    let Ok(entries) = fs::read_dir(home.agent_logs()) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_log = path.extension().is_some_and(|extension| extension == "log");
        if is_log
            && entry.metadata().is_ok_and(|metadata| metadata.len() > limit)
            && let Err(error) = rotate(&path, limit)
        {
            tracing::warn!(error = format!("{error:#}"), "a log cannot be rotated");
        }
    }
}

/// Removes the log of a sub-agent that is gone, with its older piece.
pub fn remove(home: &Home, name: &AgentName) -> Result<()> {
    let path = home.agent_log(name);
    store::remove(&path.with_extension("log.1"))?;
    store::remove(&path)
}

/// What is kept is the end of it, as much as may be: one that writes faster than it is looked at fills no disk, and holds nobody up.
fn rotate(path: &Path, limit: u64) -> Result<()> {
    let attempt = || -> std::io::Result<()> {
        let copied = copy_end(path, &path.with_extension("log.1"), limit);
        // Emptied even where the copy had no room: a log must not fill the disk.
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
        // From the beginning of a line on, where there is one soon.
        let mut first = Vec::new();
        rest.by_ref().take(LINE).read_to_end(&mut first)?;
        let line = first.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        piece.write_all(first.get(line..).unwrap_or_default())?;
    }
    std::io::copy(&mut rest, &mut piece).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_piece_has_whole_lines_of_the_end() {
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
    fn a_log_beyond_its_cap_starts_anew_for_who_has_it_open() {
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
        assert_eq!(fs::read(path.with_extension("log.1")).unwrap(), [b'x'; 99], "as much as may be");
    }
}
