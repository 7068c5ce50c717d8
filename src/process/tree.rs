//! Ends sub-agents with all that they started: the stop signal to every process of the tree, the grace period, then the kill.
//!
//! A process belongs to a sub-agent when it carries its mark or lives in the session that its recorded process leads. Where the main
//! process alone is ours, whatever else carries the mark is somebody else's.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::record::{self, Kind, Record};
use super::script;
use crate::core::manifest::{KillMode, StopSignal};
use crate::core::model::AgentName;
use crate::home::Home;
use crate::platform::{self, Seen};

/// Between two looks at what is left: at first, and doubled up to the last. Each look reads all of /proc.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_millis(250);
/// After the kill nothing may be left for longer.
const AFTER_KILL: Duration = Duration::from_secs(5);
/// For what runs under a mark alone, without a record that says more.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// What is to be ended, and how.
#[derive(Debug, Clone)]
pub struct Target {
    pub name: AgentName,
    pub record: Option<Record>,
    pub signal: StopSignal,
    pub grace: Duration,
    pub kill_mode: KillMode,
}

impl Target {
    /// As the record says; without one, by mark and with the defaults.
    pub fn of(name: &AgentName, record: Option<Record>) -> Target {
        let (signal, grace, kill_mode) = match &record {
            Some(record) => (record.head.stop_signal, record.head.grace(), record.head.kill_mode),
            None => (StopSignal::Term, DEFAULT_GRACE, KillMode::Tree),
        };
        Target { name: name.clone(), record, signal, grace, kill_mode }
    }

    /// The same target, to be killed without a word first: what a dead main process left behind.
    pub fn at_once(self) -> Target {
        Target { signal: StopSignal::Kill, grace: Duration::ZERO, ..self }
    }

    fn holds(&self, process: &Seen, leader_alive: bool) -> bool {
        let leads = |record: &Record| record.pid == process.pid && record.start_time == process.start_time;
        if self.kill_mode == KillMode::Process {
            let asks = process.mark.as_ref().is_some_and(|mark| mark.is_check && mark.name == self.name.as_str());
            return asks || self.record.as_ref().is_some_and(leads);
        }
        let marked = process.mark.as_ref().is_some_and(|mark| mark.name == self.name.as_str());
        // While a session has members its number is given to nobody else; a process of that number that is not the recorded one means
        // that the session was another's.
        let in_session = self
            .record
            .as_ref()
            .is_some_and(|record| process.session == record.pid && (leader_alive || process.pid != record.pid));
        marked || in_session
    }
}

/// The live processes of a sub-agent, oldest first, without those that ask after its health.
pub fn members(home: &Home, target: &Target) -> Vec<Seen> {
    let mut members = members_among(&processes(home), target);
    members.retain(|process| process.mark.as_ref().is_none_or(|mark| !mark.is_check));
    members
}

/// Every process of the host; no mark is left on those that a sub-agent started for somebody else.
fn processes(home: &Home) -> Vec<Seen> {
    let mut processes = platform::processes(home.root());
    for process in &mut processes {
        if process.mark.as_ref().is_some_and(|mark| mark.main_only && !is_main(home, process, &mark.name)) {
            process.mark = None;
        }
    }
    processes
}

/// Whether a marked process is the one that we started: it leads a session, and what it runs lies in a release of the sub-agent.
pub fn is_main(home: &Home, process: &Seen, name: &str) -> bool {
    let releases = home.agents().join(name);
    process.session == process.pid
        && platform::first_words(process.pid, 2).iter().any(|word| word.starts_with(&releases))
}

fn members_among(processes: &[Seen], target: &Target) -> Vec<Seen> {
    let recorded = target.record.as_ref().filter(|record| record.head.boot_id == platform::boot_id());
    let target = Target { record: recorded.cloned(), ..target.clone() };
    let taken_over =
        |record: &Record| processes.iter().any(|p| p.pid == record.pid && p.start_time != record.start_time);
    let target = match &target.record {
        Some(record) if taken_over(record) => Target { record: None, ..target },
        _ => target,
    };
    let leader_alive = target
        .record
        .as_ref()
        .is_some_and(|record| processes.iter().any(|p| p.pid == record.pid && p.start_time == record.start_time));
    let mut members: Vec<Seen> =
        processes.iter().filter(|process| target.holds(process, leader_alive)).cloned().collect();
    members.sort_by_key(|process| (process.start_time, process.pid));
    members
}

/// Ends the targets, all at the same time, and returns when nothing of any of them is left. Blocks.
pub fn end(home: &Home, targets: &[Target]) -> Result<()> {
    std::thread::scope(|scope| {
        for target in targets {
            if let Some(record) = &target.record
                && record.head.kind == Kind::Script
                && target.signal != StopSignal::Kill
            {
                scope.spawn(|| script::stop(home, record));
            }
        }
    });
    let began = Instant::now();
    let mut told: Vec<(u32, u64)> = vec![];
    let mut pause = FIRST_LOOK;
    loop {
        let processes = processes(home);
        let mut left = vec![];
        for target in targets {
            let spent = began.elapsed();
            for process in members_among(&processes, target) {
                // What asks after its health has nothing to bring in order.
                let kill = spent >= target.grace || process.mark.as_ref().is_some_and(|mark| mark.is_check);
                let key = (process.pid, process.start_time);
                if kill || !told.contains(&key) {
                    let signal = if kill { StopSignal::Kill } else { target.signal };
                    if let Err(error) = platform::signal(process.pid, process.start_time, signal) {
                        tracing::warn!(pid = process.pid, error = %error, "a process of a sub-agent cannot be signalled");
                    }
                    told.push(key);
                }
                left.push((target, process.pid, spent.saturating_sub(target.grace)));
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        if let Some((target, pid, _)) = left.iter().find(|(_, _, overdue)| *overdue > AFTER_KILL) {
            bail!(
                "cannot end sub-agent {}: process {pid} is still there {AFTER_KILL:?} after it was killed",
                target.name
            );
        }
        let until_kill = left.iter().map(|(target, _, _)| target.grace.saturating_sub(began.elapsed())).min();
        platform::pause(pause.min(until_kill.unwrap_or_default()).max(FIRST_LOOK));
        pause = (pause * 2).min(LAST_LOOK);
    }
}

/// Every sub-agent of a home of which something runs or is recorded.
pub fn all(home: &Home) -> Vec<Target> {
    let mut targets: Vec<Target> =
        record::all(home).into_iter().map(|record| Target::of(&record.head.name.clone(), Some(record))).collect();
    for process in processes(home) {
        let Some(name) = process.mark.and_then(|mark| mark.name.parse::<AgentName>().ok()) else { continue };
        if !targets.iter().any(|target| target.name == name) {
            targets.push(Target::of(&name, None));
        }
    }
    targets
}

/// Ends every sub-agent of a home and removes the records. Blocks.
pub fn end_all(home: &Home) -> Result<()> {
    let targets = all(home);
    end(home, &targets)?;
    for target in &targets {
        record::remove(home, &target.name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::Version;
    use crate::process::record::Head;

    fn seen(pid: u32, start_time: u64, session: u32) -> Seen {
        Seen { pid, start_time, session, mark: None }
    }

    fn target(pid: u32, start_time: u64, kill_mode: KillMode) -> Target {
        let version: Version = "1".parse().unwrap();
        let head = Head {
            format: 1,
            name: "a".parse().unwrap(),
            version,
            kind: Kind::Native,
            env_hash: String::new(),
            restarts: 0,
            stop_signal: StopSignal::Term,
            grace_seconds: 1,
            kill_mode,
            boot_id: platform::boot_id(),
        };
        Target::of(&"a".parse().unwrap(), Some(Record { head, pid, start_time, ended: None }))
    }

    #[test]
    fn a_tree_is_its_session_and_whoever_bears_the_mark() {
        let mut stray = seen(90, 30, 90);
        stray.mark = Some(platform::Mark { name: "a".into(), version: "1".into(), main_only: false, is_check: false });
        let all = [seen(50, 10, 50), seen(51, 11, 50), seen(60, 12, 60), stray];
        let pids = |target| members_among(&all, &target).iter().map(|p| p.pid).collect::<Vec<_>>();
        assert_eq!(pids(target(50, 10, KillMode::Tree)), [50, 51, 90]);
        assert_eq!(pids(target(50, 10, KillMode::Process)), [50]);
    }

    #[test]
    fn a_session_whose_number_is_somebody_elses_now_is_left_alone() {
        let all = [seen(50, 99, 50), seen(51, 100, 50)];
        assert_eq!(members_among(&all, &target(50, 10, KillMode::Tree)), []);
        let orphans = [seen(51, 11, 50)];
        assert_eq!(members_among(&orphans, &target(50, 10, KillMode::Tree)).len(), 1);
    }

    #[test]
    fn a_tree_that_ignores_the_stop_signal_is_killed_after_its_grace() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "trap '' TERM; (trap '' TERM; while :; do sleep 1; done) & while :; do sleep 1; done"]);
        command.env("AOPS_HOME", home.root()).env("AOPS_AGENT_NAME", "stubborn");
        platform::detach(&mut command);
        let mut child = command.spawn().unwrap();
        let name: AgentName = "stubborn".parse().unwrap();
        let stubborn = Target { grace: Duration::from_millis(300), ..Target::of(&name, None) };
        while members(&home, &stubborn).len() < 2 {
            platform::pause(Duration::from_millis(5));
        }
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        end(&home, std::slice::from_ref(&stubborn)).unwrap();
        reaper.join().unwrap();
        assert_eq!(members(&home, &stubborn), []);
    }
}
