//! The processes that belong to a home: found by what they run and by the mark in their environment, ended by their pids.
//!
//! A home of a test is a temporary directory of its own, so whatever names it belongs to that test.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest as _, Sha256};

use super::wait::try_for;

/// For a killed process to be gone.
const END: Duration = Duration::from_secs(10);

/// A process that belongs to a home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub command: String,
}

/// The living processes whose program, working directory, arguments or environment (`AOPS_HOME`) name `home`, and those that its records
/// name; without ourselves.
pub fn of_home(home: &Path) -> Vec<Process> {
    let recorded = recorded(home);
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && is_alive(*pid))
        .filter(|pid| recorded.contains(pid) || belongs(*pid, home))
        .map(|pid| Process { pid, command: command(pid) })
        .collect()
}

/// Whether a process runs: one that has ended and was not waited for yet does not.
pub fn is_alive(pid: u32) -> bool {
    // The state stands after the name, which may hold anything, a closing bracket included.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !matches!(rest.trim_start().chars().next(), None | Some('Z' | 'X')))
}

/// Ends every process of `home` at once; `Err`: those that are left.
pub fn end_all(home: &Path) -> Result<(), Vec<Process>> {
    // They are stopped first, so that none sees another one end and starts it again.
    let mut stopped = BTreeSet::<u32>::new();
    let all_stopped = try_for(END, || {
        let new: Vec<u32> =
            of_home(home).iter().map(|process| process.pid).filter(|pid| !stopped.contains(pid)).collect();
        new.iter().for_each(|pid| signal(*pid, Signal::STOP));
        stopped.extend(&new);
        new.is_empty().then_some(())
    });
    debug_assert!(all_stopped.is_some(), "processes come faster than they can be stopped");
    let gone = try_for(END, || {
        let left = of_home(home);
        left.iter().for_each(|process| signal(process.pid, Signal::KILL));
        left.is_empty().then_some(())
    });
    gone.ok_or_else(|| of_home(home))
}

/// The cgroups in which a home's sub-agents have theirs, without a service manager.
pub fn groups(home: &Path) -> Vec<PathBuf> {
    let digest = Sha256::digest(home.as_os_str().as_encoded_bytes());
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let places = hierarchies.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(format!("aops-agents-{digits}")));
    places.filter(|place| place.is_dir()).collect()
}

/// Takes away the cgroups that a home's sub-agents had, whose processes have ended.
pub fn remove_groups(home: &Path) {
    for place in groups(home) {
        for group in fs::read_dir(&place).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(group.path());
        }
        let _ = fs::remove_dir(place);
    }
}

/// The living children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace()).into_iter().flatten();
        fields.next().is_some_and(|state| state != "Z") && fields.next() == Some(&parent.to_string())
    })
    .collect()
}

/// Sends a signal; that the process is gone is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// The pids that the records in `run/agents` name. A record may outlive its process, and its pid be somebody else's by now: only a
/// sub-agent counts, which its environment tells.
fn recorded(home: &Path) -> Vec<u32> {
    let records = fs::read_dir(home.join("run/agents")).into_iter().flatten().flatten();
    let pids = records.filter_map(|record| {
        let record: serde_json::Value = serde_json::from_slice(&fs::read(record.path()).ok()?).ok()?;
        u32::try_from(record.get("pid")?.as_u64()?).ok()
    });
    pids.filter(|pid| environment(*pid).iter().any(|variable| variable.starts_with("AOPS_AGENT_NAME="))).collect()
}

fn belongs(pid: u32, home: &Path) -> bool {
    let own = |path: &Path| path.starts_with(home);
    let link = |name: &str| fs::read_link(process(pid).join(name)).unwrap_or_default();
    let text = home.to_string_lossy();
    own(&link("exe"))
        || own(&link("cwd"))
        || command(pid).contains(&*text)
        || environment(pid).contains(&format!("AOPS_HOME={text}"))
}

fn command(pid: u32) -> String {
    words(pid, "cmdline").join(" ")
}

/// The environment that a process was started with, `NAME=value` each.
pub fn environment(pid: u32) -> Vec<String> {
    words(pid, "environ")
}

/// The living processes that bear a sub-agent's mark.
pub fn marked(home: &Path, name: &str) -> Vec<u32> {
    let marks = [format!("AOPS_HOME={}", home.display()), format!("AOPS_AGENT_NAME={name}")];
    let bears = |pid: u32| {
        let environment = environment(pid);
        marks.iter().all(|mark| environment.contains(mark))
    };
    of_home(home).into_iter().map(|process| process.pid).filter(|pid| bears(*pid)).collect()
}

/// The words of a file of `/proc/PID` that separates them by zero bytes.
pub fn words(pid: u32, file: &str) -> Vec<String> {
    let bytes = fs::read(process(pid).join(file)).unwrap_or_default();
    bytes
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

fn process(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}
