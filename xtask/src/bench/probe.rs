//! Process figures from /proc (proc(5)): CPU time, memory, wake-ups.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};

/// Every process of the tree below `root`, `root` first.
pub(crate) fn family(root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for pid in numbers("/proc") {
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        let more = children.remove(pid).unwrap_or_default();
        found.extend(more);
        at += 1;
    }
    found
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before the closing bracket may contain any character, even a bracket.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn numbers(directory: &str) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

pub(crate) fn threads(pid: u32) -> Vec<u32> {
    numbers(&format!("/proc/{pid}/task"))
}

pub(crate) fn open_files(pid: u32) -> usize {
    numbers(&format!("/proc/{pid}/fd")).len()
}

/// CPU time of each current thread of these processes, in milliseconds.
#[derive(Debug)]
pub(crate) struct Cpu(HashMap<u32, f64>);

impl Cpu {
    pub(crate) fn of(pids: &[u32]) -> Cpu {
        let of_thread = |pid: u32, thread: u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")).ok()?;
            Some((thread, text.split(' ').next()?.parse::<f64>().ok()? / 1e6))
        };
        Cpu(pids
            .iter()
            .flat_map(|pid| threads(*pid).into_iter().filter_map(|thread| of_thread(*pid, thread)))
            .collect())
    }

    /// Milliseconds spent since `earlier`; `None` if a thread has ended, since its figure is lost.
    pub(crate) fn since(&self, earlier: &Cpu) -> Option<f64> {
        if earlier.0.keys().any(|thread| !self.0.contains_key(thread)) {
            return None;
        }
        Some(self.0.iter().map(|(thread, spent)| spent - earlier.0.get(thread).unwrap_or(&0.0)).sum())
    }
}

/// Total memory of several processes, in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// Pages that are not backed by a file: the memory that these processes add.
    pub(crate) dirty: u64,
    /// Including their proportional share of shared pages.
    pub(crate) proportional: u64,
}

impl Memory {
    pub(crate) fn of(pids: &[u32]) -> Result<Memory> {
        let mut memory = Memory::default();
        for pid in pids {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
                .with_context(|| format!("cannot read the memory of process {pid}"))?;
            let field = |name: &str| -> u64 {
                let line = text.lines().find_map(|line| line.strip_prefix(name));
                line.and_then(|value| value.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
            };
            memory.dirty += field("Private_Dirty:") + field("Shared_Dirty:");
            memory.proportional += field("Pss:");
        }
        Ok(memory)
    }
}

/// How often these processes were woken from a wait.
pub(crate) fn wake_ups(pids: &[u32]) -> u64 {
    let of_thread = |pid: u32, thread: u32| -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()
    };
    pids.iter().flat_map(|pid| threads(*pid).into_iter().filter_map(|thread| of_thread(*pid, thread))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processes;

    #[test]
    fn a_child_is_found_below_its_parent_with_its_cost() {
        let own = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let family = family(own);
        let memory = Memory::of(&[own]).unwrap();
        let before = Cpu::of(&[own]);
        child.kill().unwrap();
        let ended = crate::wait::try_for(std::time::Duration::from_secs(10), || {
            (!processes::zombies(own).is_empty()).then_some(())
        });
        child.wait().unwrap();
        assert_eq!(family.first(), Some(&own));
        assert!(family.contains(&child.id()));
        assert!(ended.is_some());
        assert!(memory.dirty > 0 && memory.proportional > 0 && wake_ups(&[own]) > 0 && open_files(own) > 2);
        assert!(Cpu::of(&[]).since(&before).is_none(), "threads that ended are noticed");
    }
}
