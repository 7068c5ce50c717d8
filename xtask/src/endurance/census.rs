//! What a home and its processes hold, as counts by name, so that two moments can be compared: what is more at the later one is a leak.
//!
//! Names are taken as they are, so a leftover with a random name is one more whatever the others are called. Logs are left out: they grow
//! by design up to a limit, which [`largest_log`] is compared with.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::bench::probe::threads;
use crate::processes;

/// What the contents of the state files may add: the history of changes is the longest and has a limit of its own.
const STATE_BYTES: u64 = 128 << 10;
/// Threads that a process may have started since for work that came at the same time; they exit when idle for long enough.
const WORKERS: u64 = 4;
/// The name of the sum of all sizes.
const BYTES: &str = "bytes in files other than logs";

/// The processes whose resources are counted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pids {
    pub(super) manager: u32,
    pub(super) watchdog: u32,
    pub(super) gateway: u32,
}

impl Pids {
    pub(super) fn named(&self) -> [(&'static str, u32); 3] {
        [("manager", self.manager), ("watchdog", self.watchdog), ("gateway", self.gateway)]
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Census(BTreeMap<String, u64>);

impl Census {
    pub(super) fn of(home: &Path, pids: &Pids) -> Result<Census> {
        let mut census = Census::default();
        for (path, size) in files(home)? {
            if !path.starts_with("log") {
                census.add(format!("file {}", path.display()), 1);
                census.add(BYTES.to_owned(), size);
            }
        }
        for group in processes::groups(home) {
            census.add_groups(&group);
        }
        for process in processes::of_home(home) {
            census.add(format!("process {}", process.command), 1);
        }
        for (role, pid) in pids.named() {
            for descriptor in descriptors(pid) {
                census.add(format!("descriptor of the {role}: {descriptor}"), 1);
            }
            census.add(format!("threads of the {role}"), threads(pid).len() as u64);
            census.add(format!("zombies of the {role}"), processes::zombies(pid).len() as u64);
        }
        Ok(census)
    }

    fn add(&mut self, name: String, count: u64) {
        *self.0.entry(name).or_default() += count;
    }

    fn add_groups(&mut self, group: &Path) {
        self.add(format!("cgroup {}", group.display()), 1);
        for entry in fs::read_dir(group).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.add_groups(&entry.path());
            }
        }
    }

    /// The smaller count of each: a heartbeat in progress has a thread, a connection, perhaps a new file.
    pub(super) fn least(self, other: &Census) -> Census {
        let least = |(name, count): (String, u64)| other.0.get(&name).map(|other| (name, count.min(*other)));
        Census(self.0.into_iter().filter_map(least).collect())
    }

    /// What is more than at an earlier moment.
    pub(super) fn growth(&self, earlier: &Census) -> Vec<String> {
        let grown = self.0.iter().filter_map(|(name, count)| {
            let before = earlier.0.get(name).copied().unwrap_or(0);
            let allowed = match name.as_str() {
                BYTES => before + STATE_BYTES,
                name if name.starts_with("threads of ") => before + WORKERS,
                _ => before,
            };
            (*count > allowed).then(|| format!("{name}: {count} instead of {before}"))
        });
        grown.collect()
    }

    /// The sum of the counts whose name starts so.
    pub(super) fn count(&self, start: &str) -> u64 {
        self.0.iter().filter(|(name, _)| name.starts_with(start)).map(|(_, count)| count).sum()
    }
}

/// Every file and directory of the home and its size. One that disappears meanwhile is left out.
fn files(home: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    let mut directories = vec![home.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && directory != home => continue,
            entries => entries.with_context(|| format!("cannot list {}", directory.display()))?,
        };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            let path = entry.path();
            let size = if metadata.is_file() { metadata.len() } else { 0 };
            found.push((path.strip_prefix(home).unwrap_or(&path).to_owned(), size));
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    Ok(found)
}

/// The largest log of a home, bytes.
pub(super) fn largest_log(home: &Path) -> Result<u64> {
    let logs = files(home)?.into_iter().filter(|(path, _)| path.starts_with("log"));
    Ok(logs.map(|(_, size)| size).max().unwrap_or(0))
}

/// What each open descriptor of a process is, without what differs from process to process.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    targets
        .map(|target| {
            let target = target.display().to_string();
            target
                .split_once(":[")
                .filter(|(kind, _)| *kind != "anon_inode")
                .map_or(target.clone(), |(kind, _)| kind.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leftover_file_and_a_descriptor_that_stays_open_are_growth() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("state"), "1").unwrap();
        let own = std::process::id();
        let pids = Pids { manager: own, watchdog: own, gateway: own };
        let early = Census::of(home.path(), &pids).unwrap();
        fs::create_dir(home.path().join("log")).unwrap();
        fs::write(home.path().join("log/spm.log"), "a line").unwrap();
        let open = fs::File::create(home.path().join(".new-x")).unwrap();
        let late = Census::of(home.path(), &pids).unwrap();
        let growth = late.growth(&early).join("\n");
        assert!(growth.contains("file .new-x: 1 instead of 0"), "{growth}");
        assert!(growth.contains("descriptor of the watchdog: ") && !growth.contains("bytes"), "{growth}");
        assert!(!growth.contains("spm.log"), "logs grow by design: {growth}");
        assert_eq!(largest_log(home.path()).unwrap(), 6);
        drop(open);
        assert!(late.clone().least(&early).growth(&early).is_empty());
        fs::write(home.path().join("state"), vec![0; STATE_BYTES as usize + 2]).unwrap();
        let growth = Census::of(home.path(), &pids).unwrap().growth(&early).join("\n");
        assert!(growth.contains(BYTES), "{growth}");
    }
}
