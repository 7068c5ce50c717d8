//! The logs that sub-agents write into: capped, with one older piece beside each.
//!
//! A sub-agent keeps its log open across any number of managers, so the file is copied away and emptied in place; it is written by append,
//! so the next line lands at the new beginning.

use std::fs::{self, OpenOptions};
use std::path::Path;

use anyhow::{Context, Result};

use crate::core::model::AgentName;
use crate::home::Home;
use crate::store;

/// Copies away and empties every log of a sub-agent that has grown beyond `limit` bytes.
pub fn rotate_all(home: &Home, limit: u64) {
    let Ok(entries) = fs::read_dir(home.agent_logs()) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_log = path.extension().is_some_and(|extension| extension == "log");
        if is_log
            && entry.metadata().is_ok_and(|metadata| metadata.len() > limit)
            && let Err(error) = rotate(&path)
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

fn rotate(path: &Path) -> Result<()> {
    let attempt = || -> std::io::Result<()> {
        let copied = fs::copy(path, path.with_extension("log.1"));
        // Emptied even where the copy had no room: a log must not fill the disk.
        OpenOptions::new().write(true).open(path)?.set_len(0)?;
        copied.map(drop)
    };
    attempt().with_context(|| format!("cannot rotate {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

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
        assert_eq!(fs::read(path.with_extension("log.1")).unwrap().len(), 100);
    }
}
