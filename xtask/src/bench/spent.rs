//! What processes have spent since they started, CPU time and bytes written, including the processes that have exited.
//!
//! When a process is waited for, the kernel adds its figures to those of its parent: the CPU time to `cutime` and `cstime` of
//! `/proc/PID/stat`, the bytes to `/proc/PID/io`, in which own bytes and those of children are one sum (proc(5)). So the sum over a process
//! and its descendants, zombies included, counts every process below it once, however briefly it ran. An orphan is counted by the process
//! that adopts it. The bytes are those of pages that were made dirty, on a file system with a disk: a file in tmpfs costs none.

use std::fs;

use super::probe::family;

/// The sums of some processes.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(crate) struct Spent {
    /// User and system time, milliseconds. The kernel shows each process's in steps of 10.
    pub(crate) cpu: f64,
    pub(crate) written_bytes: u64,
}

impl Spent {
    /// A process and all below it.
    pub(crate) fn of_family(root: u32) -> Spent {
        Spent::of(&family(root))
    }

    /// These processes, and the children that each has waited for.
    pub(crate) fn of(pids: &[u32]) -> Spent {
        let mut sum = Spent::default();
        for pid in pids {
            sum.cpu += times(*pid).iter().sum::<f64>();
            sum.written_bytes += written(*pid);
        }
        sum
    }

    /// What was spent since `earlier`; `None` if it is less, because a process that was counted was not waited for by another of them.
    pub(crate) fn since(self, earlier: Spent) -> Option<Spent> {
        let written_bytes = self.written_bytes.checked_sub(earlier.written_bytes)?;
        (self.cpu >= earlier.cpu).then_some(Spent { cpu: self.cpu - earlier.cpu, written_bytes })
    }
}

/// `utime`, `stime`, `cutime` and `cstime`, in milliseconds; zeros for a process that is gone.
fn times(pid: u32) -> [f64; 4] {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before the closing bracket may contain any character. `utime` is the 12th field after it.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    let tick = 1e3 / rustix::param::clock_ticks_per_second() as f64;
    [11, 12, 13, 14].map(|at| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0) * tick)
}

fn written(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_has_exited_is_counted() {
        let own = std::process::id();
        let before = Spent::of_family(own);
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let spin = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; head -c 1000000 /dev/zero >\"$0\"";
        let status = std::process::Command::new("sh").args(["-c", spin]).arg(file.path()).status().unwrap();
        assert!(status.success());
        let spent = Spent::of_family(own).since(before).unwrap();
        assert!(spent.cpu >= 20.0, "{spent:?}");
        assert!(spent.written_bytes >= 1_000_000, "{spent:?}");
        assert_eq!(Spent::default().since(spent), None);
    }
}
