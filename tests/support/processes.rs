//! The processes of a home: found by their program and by the marker in their environment, killed by their pids.
//!
//! A test's home is a temporary directory of its own, so a process that names it belongs to that test.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest as _, Sha256};

use super::wait::try_for;

/// The deadline for a killed process to be gone.
const END: Duration = Duration::from_secs(10);

/// A process of a home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub command: String,
}

/// The live processes whose program, working directory, arguments or environment (`AOPS_HOME`) name `home`, and those in its records;
/// without the current process.
pub fn of_home(home: &Path) -> Vec<Process> {
    let recorded = recorded(home);
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && is_alive(*pid))
        .filter(|pid| recorded.contains(pid) || belongs(*pid, home))
        .map(|pid| Process { pid, command: command(pid) })
        .collect()
}

/// Whether a process runs: a process that has exited and was not waited for does not.
pub fn is_alive(pid: u32) -> bool {
    // The state follows the name, which may contain any character, even a closing bracket.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !matches!(rest.trim_start().chars().next(), None | Some('Z' | 'X')))
}

/// Kills every process of `home` at once; `Err` has those that are left.
pub fn end_all(home: &Path) -> Result<(), Vec<Process>> {
    // They are stopped first, so that none notices the end of another and restarts it.
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

/// The parent cgroups of a home's sub-agents, without a service manager.
pub fn groups(home: &Path) -> Vec<PathBuf> {
    let digest = Sha256::digest(home.as_os_str().as_encoded_bytes());
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let places = hierarchies.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(format!("aops-agents-{digits}")));
    places.filter(|place| place.is_dir()).collect()
}

/// Removes the cgroups of a home's sub-agents, whose processes have ended.
pub fn remove_groups(home: &Path) {
    for place in groups(home) {
        for group in fs::read_dir(&place).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(group.path());
        }
        let _ = fs::remove_dir(place);
    }
}

/// The live children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    children_that(parent, |state| state != "Z")
}

/// The children of a process that have exited and were not waited for.
pub fn zombies(parent: u32) -> Vec<u32> {
    children_that(parent, |state| state == "Z")
}

fn children_that(parent: u32, wanted: impl Fn(&str) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace()).into_iter().flatten();
        fields.next().is_some_and(&wanted) && fields.next() == Some(&parent.to_string())
    })
    .collect()
}

/// Sends a signal; a process that has ended is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// The pids in the records of `run/agents`. A record may outlive its process, and its pid may be reused: only a process with a sub-agent's
/// environment counts.
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

/// The initial environment of a process, as `NAME=value`.
pub fn environment(pid: u32) -> Vec<String> {
    words(pid, "environ")
}

/// The live processes with a sub-agent's environment marker.
pub fn marked(home: &Path, name: &str) -> Vec<u32> {
    let marks = [format!("AOPS_HOME={}", home.display()), format!("AOPS_AGENT_NAME={name}")];
    let bears = |pid: u32| {
        let environment = environment(pid);
        marks.iter().all(|mark| environment.contains(mark))
    };
    of_home(home).into_iter().map(|process| process.pid).filter(|pid| bears(*pid)).collect()
}

/// The NUL-separated words of a file of `/proc/PID`.
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
