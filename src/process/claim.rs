//! Decides whether a process outside of the sub-agent's group and without its marker is the sub-agent's own: its pid comes from the
//! `control` script or from a pid file.
//!
//! A program may leave its group (a login session), start a session, or clear or overwrite its environment. The script still knows its pid,
//! but the pid may have been reused by another program, which must be neither adopted nor killed. So a pid is accepted only with evidence:
//!
//! - the process has the sub-agent's marker, is in its group, works in its directory or runs one of its programs,
//! - it started after `control start` was run, which is said to have started it,
//! - it descends from the manager, which adopts the orphans of its sub-agents,
//! - a pid file in the release was written for it.
//!
//! A process of another sub-agent, a role of the home, and the first process are never accepted.

use std::time::SystemTime;

use super::launch::StartSpec;
use super::{pid_file, record, tree};
use crate::platform::{self, ProcessInfo};

/// Maximum number of ancestors that are checked.
const GENERATIONS: u32 = 64;

/// The process with this pid, if it is the sub-agent's own. `since`: the start time of `control start`, if known.
pub fn own(start: &StartSpec, pid: u32, since: Option<u64>) -> Option<ProcessInfo> {
    let process = platform::process_info(pid, start.home.root())?;
    let is_own = !belongs_to_another(start, &process)
        && (since.is_some_and(|since| process.start_time >= since)
            || is_marked(start, &process)
            || runs_from(start, pid)
            || start.group().is_some_and(|group| group.members().is_ok_and(|members| members.contains(&pid)))
            || descends_from_us(start, &process)
            || has_pid_file(start, &process));
    is_own.then_some(process)
}

fn is_marked(start: &StartSpec, process: &ProcessInfo) -> bool {
    process.marker.as_ref().is_some_and(|marker| marker.name == start.name.as_str() && !marker.is_check)
}

fn belongs_to_another(start: &StartSpec, process: &ProcessInfo) -> bool {
    let of_another =
        process.marker.as_ref().is_some_and(|marker| marker.name != start.name.as_str() || marker.is_check);
    process.pid == 1
        || process.pid == std::process::id()
        || of_another
        || tree::is_role(&start.home, process.pid)
        || is_recorded_for_another(start, process)
}

fn is_recorded_for_another(start: &StartSpec, process: &ProcessInfo) -> bool {
    record::all(&start.home).iter().any(|record| {
        record.head.name != start.name && (record.pid, record.start_time) == (process.pid, process.start_time)
    })
}

/// Whether a process works in the sub-agent's directory or runs a program from it.
pub fn runs_from(start: &StartSpec, pid: u32) -> bool {
    let directory = start.home.agent(&start.name);
    platform::working_directory(pid)
        .into_iter()
        .chain(platform::executable_of(pid))
        .chain(platform::first_words(pid, 2))
        .any(|path| platform::is_below(&path, &directory))
}

/// Whether this process, the manager, is an ancestor of the process, with no process of another sub-agent in between.
fn descends_from_us(start: &StartSpec, process: &ProcessInfo) -> bool {
    let mut parent = process.parent;
    for _ in 0..GENERATIONS {
        if parent == std::process::id() {
            return true;
        }
        match platform::process_info(parent, start.home.root()).filter(|process| !belongs_to_another(start, process)) {
            Some(process) => parent = process.parent,
            None => return false,
        }
    }
    false
}

fn has_pid_file(start: &StartSpec, process: &ProcessInfo) -> bool {
    pid_file::all(&start.directory()).iter().any(|file| file.is_of(process, SystemTime::now()))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::core::manifest::StopSignal;
    use crate::core::program::Program;
    use crate::home::Home;
    use crate::process::record::{ProcessRecord, RecordHead};

    struct KilledOnDrop(ProcessInfo);

    impl Drop for KilledOnDrop {
        fn drop(&mut self) {
            let _ = platform::signal(self.0.pid, self.0.start_time, StopSignal::Kill);
        }
    }

    fn start(home: &Home) -> StartSpec {
        let start = StartSpec {
            home: home.clone(),
            name: "a".parse().unwrap(),
            version: "1".parse().unwrap(),
            program: Program::Script,
            spec: Default::default(),
            agent_id: "1".parse().unwrap(),
            endpoint: String::new(),
            restarts: 0,
            groups: None,
        };
        std::fs::create_dir_all(start.directory()).unwrap();
        std::fs::create_dir_all(home.process_records()).unwrap();
        start
    }

    /// A process without a marker, whose parent has exited: init adopted it.
    fn unmarked_process(home: &Home) -> KilledOnDrop {
        let output = Command::new("sh").args(["-c", "cd /; sleep 1000 >/dev/null 2>&1 & echo $!"]).output().unwrap();
        let pid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
        KilledOnDrop(platform::process_info(pid, home.root()).unwrap())
    }

    #[test]
    fn a_pid_is_accepted_only_with_evidence() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let start = start(&home);
        assert!(own(&start, 1, Some(0)).is_none(), "the first process is never accepted");
        let unmarked_process = unmarked_process(&home);
        let ProcessInfo { pid, start_time, .. } = unmarked_process.0;
        assert!(own(&start, pid, None).is_none());
        assert!(own(&start, pid, Some(start_time + 1)).is_none(), "it started before");
        assert_eq!(own(&start, pid, Some(start_time)).as_ref(), Some(&unmarked_process.0), "it started afterwards");
        std::fs::write(start.directory().join("app.pid"), pid.to_string()).unwrap();
        assert_eq!(own(&start, pid, None).as_ref(), Some(&unmarked_process.0), "the file was written for it");

        // A process that is recorded for another sub-agent belongs to that one.
        let head = RecordHead { name: "b".parse().unwrap(), ..start.head() };
        ProcessRecord { head, pid, start_time, group: None, session: None, ended: None }.save(&home);
        assert!(own(&start, pid, Some(start_time)).is_none());
    }

    #[test]
    fn a_descendant_of_the_manager_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let start = start(&home);
        let mut child = Command::new("sleep").arg("1000").current_dir("/").stdin(Stdio::null()).spawn().unwrap();
        let found = own(&start, child.id(), None).map(|process| process.pid);
        let _ = child.kill();
        child.wait().unwrap();
        assert_eq!(found, Some(child.id()));
    }
}
