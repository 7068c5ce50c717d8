//! Whether a process that nothing holds or marks is a sub-agent's own: one whose number its `control` script told, or keeps in a file.
//!
//! A program may leave its group (a login session), begin a session of its own, clear its environment or overwrite it. The script still
//! knows its number; but that may be somebody else's by now, who must be neither taken for the sub-agent nor ended as such. So a number is
//! believed only with a sign:
//!
//! - the process bears the sub-agent's mark, lives in its group, or works in its directory or runs a program of it,
//! - it began since `control start` was run, which is said to have started it,
//! - it descends from the manager, which has whatever its sub-agents orphan for children,
//! - a pid file in the release was written for it.
//!
//! Never is one believed that is another sub-agent's, a role of the home, or the first process.

use std::time::SystemTime;

use super::launch::StartSpec;
use super::{pid_file, record, tree};
use crate::platform::{self, ProcessInfo};

/// Generations between the manager and a process that is looked at.
const GENERATIONS: u32 = 64;

/// The process of that number, if it is the sub-agent's own. `since`: when its script was run that started it, where that is known.
pub fn own(start: &StartSpec, pid: u32, since: Option<u64>) -> Option<ProcessInfo> {
    let process = platform::seen(pid, start.home.root())?;
    let is_own = !is_others(start, &process)
        && (since.is_some_and(|since| process.start_time >= since)
            || is_marked(start, &process)
            || runs_from(start, pid)
            || start.group().is_some_and(|group| group.members().is_ok_and(|members| members.contains(&pid)))
            || descends_from_us(start, &process)
            || has_pid_file(start, &process));
    is_own.then_some(process)
}

fn is_marked(start: &StartSpec, process: &ProcessInfo) -> bool {
    process.mark.as_ref().is_some_and(|mark| mark.name == start.name.as_str() && !mark.is_check)
}

fn is_others(start: &StartSpec, process: &ProcessInfo) -> bool {
    let of_another = process.mark.as_ref().is_some_and(|mark| mark.name != start.name.as_str() || mark.is_check);
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

/// Whether a process has to do with a sub-agent by where it works or what it runs.
pub fn runs_from(start: &StartSpec, pid: u32) -> bool {
    let directory = start.home.agent(&start.name);
    platform::working_directory(pid)
        .into_iter()
        .chain(platform::executable_of(pid))
        .chain(platform::first_words(pid, 2))
        .any(|path| path.starts_with(&directory))
}

/// Whether a process has this one, the manager, for an ancestor, and no other sub-agent's between.
fn descends_from_us(start: &StartSpec, process: &ProcessInfo) -> bool {
    let mut parent = process.parent;
    for _ in 0..GENERATIONS {
        if parent == std::process::id() {
            return true;
        }
        match platform::seen(parent, start.home.root()).filter(|process| !is_others(start, process)) {
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

    struct Ended(ProcessInfo);

    impl Drop for Ended {
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

    /// A process that bears no mark, and whose parent is gone: init has it.
    fn stranger(home: &Home) -> Ended {
        let output = Command::new("sh").args(["-c", "cd /; sleep 1000 >/dev/null 2>&1 & echo $!"]).output().unwrap();
        let pid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
        Ended(platform::seen(pid, home.root()).unwrap())
    }

    #[test]
    fn a_number_is_believed_with_a_sign_only() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let start = start(&home);
        assert!(own(&start, 1, Some(0)).is_none(), "the first process is nobody's");
        let stranger = stranger(&home);
        let ProcessInfo { pid, start_time, .. } = stranger.0;
        assert!(own(&start, pid, None).is_none());
        assert!(own(&start, pid, Some(start_time + 1)).is_none(), "it was there before");
        assert_eq!(own(&start, pid, Some(start_time)).as_ref(), Some(&stranger.0), "it began since");
        std::fs::write(start.directory().join("app.pid"), pid.to_string()).unwrap();
        assert_eq!(own(&start, pid, None).as_ref(), Some(&stranger.0), "the file was written for it");

        // What is recorded for another is that one's.
        let head = RecordHead { name: "b".parse().unwrap(), ..start.head() };
        ProcessRecord { head, pid, start_time, group: None, session: None, ended: None }.save(&home);
        assert!(own(&start, pid, Some(start_time)).is_none());
    }

    #[test]
    fn what_descends_from_the_manager_is_believed() {
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
