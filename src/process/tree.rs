//! The process trees of sub-agents, and stopping them: the stop signal to every process, the grace period, then the kill.
//!
//! A process belongs to a sub-agent if it is in its group. A process that started outside of any group (the host has none, or it could not
//! be entered), or was moved out of it (a login session, `systemd-run`), belongs to it if
//!
//! 1. it is the recorded process, by pid and start time, or its script named it ([`claim`](super::claim)),
//! 2. it is in a session of that process,
//! 3. it has the sub-agent's marker in its environment, which a program may clear or overwrite (some show their state in their title),
//! 4. it descends from one of these, now or at an earlier poll.
//!
//! If only the main process is ours, no other process belongs to it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::record::{self, ProcessRecord};
use crate::core::manifest::{KillMode, StopSignal};
use crate::core::model::{AgentName, Version};
use crate::core::program::PackageKind;
use crate::home::Home;
use crate::platform::{self, Group, Groups, ProcessInfo};

/// Interval between two polls: at first, and the maximum up to which it doubles.
const FIRST_POLL: Duration = Duration::from_millis(10);
const MAX_POLL: Duration = Duration::from_millis(250);
/// Timeout for processes to exit after the kill.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// For a sub-agent without a record.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// A sub-agent to stop, and how.
#[derive(Debug, Clone)]
pub struct StopTarget {
    pub name: AgentName,
    pub record: Option<ProcessRecord>,
    pub signal: StopSignal,
    pub grace: Duration,
    pub kill_mode: KillMode,
    /// The groups that hold its processes: more than one if the location of groups changed between two managers.
    groups: Vec<Group>,
    /// Its processes may be outside of any group: every process of the host is checked.
    scattered: bool,
    /// The release whose `control` script is run first.
    script: Option<Version>,
    /// Processes that are its own according to its script or their past descent, by pid and start time.
    known: BTreeSet<(u32, u64)>,
}

impl StopTarget {
    /// As recorded; without a record, with the defaults. `groups`: the current location of groups.
    pub fn of(name: &AgentName, record: Option<ProcessRecord>, groups: Option<&Groups>) -> StopTarget {
        let (signal, grace, kill_mode) = match &record {
            Some(record) => (record.head.stop_signal, record.head.grace(), record.head.kill_mode),
            None => (StopSignal::Term, DEFAULT_GRACE, KillMode::Tree),
        };
        let mut held: Vec<Group> = groups.map(|groups| groups.group(name.as_str())).into_iter().collect();
        held.extend(record.as_ref().and_then(ProcessRecord::group).filter(|group| !held.contains(group)));
        let holds = |pid: u32| held.iter().any(|group| group.members().is_ok_and(|members| members.contains(&pid)));
        let scattered = match &record {
            Some(record) => record.group.is_none() || record.is_alive() && !holds(record.pid),
            None => held.is_empty(),
        };
        let is_script = |record: &&ProcessRecord| record.head.kind == PackageKind::Script;
        let script = record.as_ref().filter(is_script).map(|record| record.head.version.clone());
        let known = BTreeSet::new();
        StopTarget { name: name.clone(), record, signal, grace, kill_mode, groups: held, scattered, script, known }
    }

    /// The same target; without a record, the `control` script of this release finds what runs.
    pub fn with_script(self, version: Version) -> StopTarget {
        let script = if self.record.is_none() { Some(version) } else { self.script };
        StopTarget { script, ..self }
    }

    /// Marks a process as its own.
    pub fn claim(&mut self, process: &ProcessInfo) {
        self.known.insert((process.pid, process.start_time));
        self.scattered |= !self.groups_hold(process.pid);
    }

    fn groups_hold(&self, pid: u32) -> bool {
        self.groups.iter().any(|group| group.members().is_ok_and(|members| members.contains(&pid)))
    }

    /// The same target, whose processes may also be outside of any group.
    pub fn scattered(self) -> StopTarget {
        StopTarget { scattered: true, ..self }
    }

    /// The same target, to be killed immediately: the leftovers of a main process that has exited.
    pub fn at_once(self) -> StopTarget {
        StopTarget { signal: StopSignal::Kill, grace: Duration::ZERO, ..self }
    }

    /// Whether finding its processes requires checking every process of the host.
    pub fn is_scattered(&self) -> bool {
        self.scattered && self.kill_mode == KillMode::Tree
    }

    /// Whether its groups are empty, as far as they can be read.
    pub fn groups_are_empty(&self) -> bool {
        self.groups.iter().all(|group| group.is_empty().unwrap_or(false))
    }

    /// Whether a process of it may be alive, by its groups and its record, without checking every process.
    pub fn may_run(&self) -> bool {
        self.is_scattered() || !self.groups_are_empty() || self.record.as_ref().is_some_and(ProcessRecord::is_alive)
    }

    /// Resolves when its groups are empty. Cancel-safe.
    pub async fn groups_emptied(&self) {
        for group in &self.groups {
            group.emptied().await;
        }
    }

    /// Removes its groups if they are empty: some kernels let no new process start in a group that was killed as a whole.
    pub fn remove_groups(&self) {
        for group in &self.groups {
            if let Err(error) = group.remove()
                && self.kill_mode == KillMode::Tree
            {
                tracing::warn!(agent = %self.name, group = group.name(), error = %error, "cannot remove a sub-agent's group");
            }
        }
    }

    /// The release whose `control` script is run first.
    pub fn script_to_ask(&self) -> Option<&Version> {
        self.script.as_ref().filter(|_| self.signal != StopSignal::Kill)
    }

    /// Whether a process is its own, without considering descent.
    fn holds(&self, process: &ProcessInfo, processes: &[ProcessInfo]) -> bool {
        let marked = || process.marker.as_ref().is_some_and(|marker| marker.name == self.name.as_str());
        let leader = || processes.iter().find(|leader| leader.pid == process.session);
        let recorded = self.record.as_ref().filter(|record| record.is_of_this_boot());
        let in_session = || recorded.is_some_and(|record| record.owns_session_of(process, leader()));
        self.known.contains(&(process.pid, process.start_time)) || in_session() || marked()
    }

    /// Its main process, if it is alive.
    fn main(&self, home: &Home) -> Option<ProcessInfo> {
        let record = self.record.as_ref().filter(|record| record.is_alive())?;
        platform::process_info(record.pid, home.root()).filter(|process| process.start_time == record.start_time)
    }

    /// The processes in its groups.
    fn grouped(&self, home: &Home) -> impl Iterator<Item = ProcessInfo> {
        let pids = self.groups.iter().filter_map(|group| group.members().ok()).flatten();
        pids.filter_map(|pid| platform::process_info(pid, home.root()))
    }

    fn kill_groups(&self) {
        for group in &self.groups {
            if let Err(error) = group.kill() {
                tracing::warn!(agent = %self.name, group = group.name(), error = %error, "cannot kill a sub-agent's group");
            }
        }
    }
}

/// The live processes of a sub-agent, oldest first, without its health checks.
pub fn members(home: &Home, target: &StopTarget) -> Vec<ProcessInfo> {
    let scattered = if target.is_scattered() { processes(home) } else { vec![] };
    let mut members = members_among(home, &scattered, target, &BTreeSet::new());
    members.retain(|process| !process.is_check());
    members
}

/// Every process of the host. Processes that a sub-agent started and that are not ours lose their marker.
fn processes(home: &Home) -> Vec<ProcessInfo> {
    let mut processes = platform::processes(home.root());
    for process in &mut processes {
        if !is_ours(home, process) {
            process.marker = None;
        }
    }
    processes
}

/// Whether a process is ours, unlike those that a sub-agent with `main_only` started.
fn is_ours(home: &Home, process: &ProcessInfo) -> bool {
    !process.marker.as_ref().is_some_and(|marker| marker.main_only && !is_main(home, process, &marker.name))
}

/// Whether a marked process is the main process: it leads a session, and its program is in a release of the sub-agent.
pub fn is_main(home: &Home, process: &ProcessInfo, name: &str) -> bool {
    let releases = home.agents().join(name);
    process.session == process.pid
        && platform::first_words(process.pid, 2).iter().any(|word| word.starts_with(&releases))
}

/// The members of a target: those in its groups, and those among `processes`. `previous`: previous members.
fn members_among(
    home: &Home,
    processes: &[ProcessInfo],
    target: &StopTarget,
    previous: &BTreeSet<(u32, u64)>,
) -> Vec<ProcessInfo> {
    let mut members: Vec<ProcessInfo> = target.main(home).into_iter().collect();
    if target.kill_mode == KillMode::Process {
        return members;
    }
    members.extend(target.grouped(home));
    if target.is_scattered() {
        let was_member = |process: &ProcessInfo| previous.contains(&(process.pid, process.start_time));
        members.extend(
            processes.iter().filter(|process| was_member(process) || target.holds(process, processes)).cloned(),
        );
        add_descendants(home, processes, &mut members);
    }
    members.sort_by_key(|process| (process.start_time, process.pid));
    members.dedup_by_key(|process| process.pid);
    members
}

/// Adds the descendants of the members, except those that are not ours and a role of the home that a member started.
fn add_descendants(home: &Home, processes: &[ProcessInfo], members: &mut Vec<ProcessInfo>) {
    let is_alone = |member: &&ProcessInfo| member.marker.as_ref().is_some_and(|marker| marker.main_only);
    let mut pids: BTreeSet<u32> = members.iter().filter(|member| !is_alone(member)).map(|member| member.pid).collect();
    loop {
        let is_new = |process: &&ProcessInfo| !pids.contains(&process.pid) && pids.contains(&process.parent);
        let new: Vec<ProcessInfo> = processes
            .iter()
            .filter(is_new)
            .filter(|process| !members.contains(process) && !is_role(home, process.pid))
            .cloned()
            .collect();
        if new.is_empty() {
            return;
        }
        pids.extend(new.iter().map(|process| process.pid));
        members.extend(new);
    }
}

/// Whether a process runs a program of the home itself, not of a sub-agent.
pub fn is_role(home: &Home, pid: u32) -> bool {
    platform::executable_of(pid).is_some_and(|executable| platform::is_below(&executable, &home.bin()))
}

/// Stops some targets, poll by poll.
#[derive(Debug)]
pub struct StopProgress<'a> {
    home: &'a Home,
    targets: &'a [StopTarget],
    started: Instant,
    signalled: Vec<(u32, u64)>,
    /// Previous members of targets that may be outside of any group, by index: when their parent has exited, nothing else may identify
    /// them.
    previous: BTreeMap<usize, BTreeSet<(u32, u64)>>,
    /// Targets that were polled before, by index.
    polled: BTreeSet<usize>,
    /// Targets that cannot be killed, by index, and why.
    failed: BTreeMap<usize, String>,
    pause: Duration,
}

impl<'a> StopProgress<'a> {
    pub fn of(home: &'a Home, targets: &'a [StopTarget]) -> StopProgress<'a> {
        StopProgress {
            home,
            targets,
            started: Instant::now(),
            signalled: vec![],
            previous: BTreeMap::new(),
            polled: BTreeSet::new(),
            failed: BTreeMap::new(),
            pause: FIRST_POLL,
        }
    }

    /// Signals or kills the remaining processes, and returns when to poll again; `None`: nothing is left. An error for processes that
    /// cannot be killed is returned when all others are gone.
    pub fn poll(&mut self) -> Result<Option<Duration>> {
        let scattered = self.targets.iter().any(StopTarget::is_scattered);
        let processes = if scattered { processes(self.home) } else { vec![] };
        let spent = self.started.elapsed();
        let mut until_kill = None;
        for (place, target) in self.targets.iter().enumerate() {
            if self.failed.contains_key(&place) {
                continue;
            }
            let previous = self.previous.entry(place).or_default();
            let members = members_among(self.home, &processes, target, previous);
            previous.extend(members.iter().map(|process| (process.pid, process.start_time)));
            // Processes of another pid namespace are not visible, but can be killed with the group.
            let unseen = || target.kill_mode == KillMode::Tree && !target.groups_are_empty();
            if members.is_empty() && !unseen() {
                continue;
            }
            if spent.saturating_sub(target.grace) > KILL_TIMEOUT {
                let pids: Vec<String> = members.iter().map(|process| process.pid.to_string()).collect();
                let pids = if pids.is_empty() { "of another pid namespace".to_owned() } else { pids.join(", ") };
                let error = format!(
                    "cannot kill sub-agent {}: process {pids} still exists {KILL_TIMEOUT:?} after the kill; it may hang in the kernel",
                    target.name
                );
                tracing::error!(agent = %target.name, error, "cannot kill a sub-agent");
                self.failed.insert(place, error);
                continue;
            }
            let is_kill_due = spent >= target.grace;
            if is_kill_due && target.kill_mode == KillMode::Tree {
                target.kill_groups();
            }
            let is_first = self.polled.insert(place);
            if is_first && !is_kill_due {
                target.groups.iter().for_each(Group::request_stop);
            }
            for process in &members {
                // A health check has nothing to clean up.
                let kill = is_kill_due || process.is_check();
                let key = (process.pid, process.start_time);
                // A process that a member started since helps to stop (a script's clean-up). It exits with that member, or is killed after
                // the grace period.
                let has_parent = || members.iter().any(|member| member.pid == process.parent);
                let helps = (!is_first || platform::SIGNALS_REACH_CHILDREN) && has_parent();
                if !kill && (helps || self.signalled.contains(&key)) {
                    continue;
                }
                let signal = if kill { StopSignal::Kill } else { target.signal };
                if let Err(error) = platform::signal(process.pid, process.start_time, signal) {
                    tracing::warn!(pid = process.pid, error = %error, "cannot signal a process of a sub-agent");
                }
                self.signalled.push(key);
            }
            let left = target.grace.saturating_sub(spent);
            until_kill = Some(until_kill.map_or(left, |least: Duration| least.min(left)));
        }
        let Some(until_kill) = until_kill else {
            let errors: Vec<&str> = self.failed.values().map(String::as_str).collect();
            if errors.is_empty() {
                return Ok(None);
            }
            bail!("{}", errors.join("; "));
        };
        let pause = self.pause.min(until_kill).max(FIRST_POLL);
        self.pause = (self.pause * 2).min(MAX_POLL);
        Ok(Some(pause))
    }
}

/// The sub-agents of a home that exist on the host.
#[derive(Debug)]
pub struct Census {
    /// Every sub-agent that has a process or a record.
    pub targets: Vec<StopTarget>,
    /// The processes with a sub-agent's marker, oldest first.
    pub marked: Vec<ProcessInfo>,
}

impl Census {
    pub fn take(home: &Home, groups: Option<&Groups>) -> Census {
        let mut targets: Vec<StopTarget> = record::all(home)
            .into_iter()
            .map(|record| StopTarget::of(&record.head.name.clone(), Some(record), groups))
            .collect();
        let listed = groups.map_or(Ok(vec![]), Groups::all).inspect_err(|error| {
            tracing::warn!(error = %error, "cannot list the sub-agents' groups; using process records and environment markers");
        });
        let held = listed.unwrap_or_default();
        for name in held.iter().filter_map(|name| name.parse::<AgentName>().ok()) {
            if !targets.iter().any(|target| target.name == name) {
                targets.push(StopTarget::of(&name, None, groups));
            }
        }
        let mut marked = processes(home);
        marked.retain(|process| process.marker.is_some());
        marked.sort_by_key(|process| (process.start_time, process.pid));
        for process in &marked {
            let Some(name) = process.marker.as_ref().and_then(|marker| marker.name.parse::<AgentName>().ok()) else {
                continue;
            };
            match targets.iter_mut().find(|target| target.name == name) {
                Some(target) => {
                    let mut members = target.groups.iter().filter_map(|group| group.members().ok());
                    target.scattered |= !members.any(|members| members.contains(&process.pid));
                }
                None => targets.push(StopTarget { scattered: true, ..StopTarget::of(&name, None, groups) }),
            }
        }
        Census { targets, marked }
    }
}

/// Whether any sub-agent of a home runs.
pub fn any_running(home: &Home) -> bool {
    let targets = Census::take(home, super::groups(home).as_ref()).targets;
    targets.iter().any(|target| !members(home, target).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::Version;
    use crate::process::record::RecordHead;

    /// Later than the start of the first process of this machine or container.
    const SINCE: u64 = 1 << 40;

    fn process(pid: u32, start_time: u64, session: u32) -> ProcessInfo {
        ProcessInfo { pid, start_time: SINCE + start_time, session, parent: 1, marker: None }
    }

    fn target(pid: u32, start_time: u64) -> StopTarget {
        let version: Version = "1".parse().unwrap();
        let head = RecordHead {
            format: 1,
            name: "a".parse().unwrap(),
            version,
            kind: PackageKind::Native,
            env_hash: String::new(),
            restarts: 0,
            stop_signal: StopSignal::Term,
            grace_seconds: 1,
            kill_mode: KillMode::Tree,
            boot_id: platform::boot_id().to_owned(),
            unseen: false,
        };
        StopTarget::of(
            &"a".parse().unwrap(),
            Some(ProcessRecord { head, pid, start_time: SINCE + start_time, group: None, session: None, ended: None }),
            None,
        )
    }

    /// The pids of the members among these, given the previous members.
    fn pids(all: &[ProcessInfo], target: &StopTarget, previous: &[(u32, u64)]) -> Vec<u32> {
        let previous = previous.iter().map(|(pid, start_time)| (*pid, SINCE + start_time)).collect();
        members_among(&Home::new("/nowhere"), all, target, &previous).iter().map(|process| process.pid).collect()
    }

    fn child(pid: u32, start_time: u64, parent: u32) -> ProcessInfo {
        ProcessInfo { parent, ..process(pid, start_time, pid) }
    }

    #[test]
    fn a_tree_has_its_session_its_marked_processes_and_their_descendants() {
        let mut stray = process(90, 30, 90);
        stray.marker =
            Some(platform::ProcessMarker { name: "a".into(), version: "1".into(), main_only: false, is_check: false });
        let all = [
            process(50, 10, 50),
            process(51, 11, 50),
            process(60, 12, 60),
            stray,
            child(70, 13, 51),
            child(71, 14, 70),
        ];
        assert_eq!(pids(&all, &target(50, 10), &[]), [50, 51, 70, 71, 90]);
    }

    #[test]
    fn a_past_descendant_stays_a_member_after_its_parent_exited() {
        // The parent has exited, and another pid was reused.
        let all = [child(70, 13, 1), child(71, 99, 1)];
        assert_eq!(pids(&all, &target(50, 10), &[(70, 13), (71, 14)]), [70]);
        assert_eq!(pids(&all, &target(50, 10), &[]), [0; 0]);
    }

    #[test]
    fn a_claimed_process_and_its_descendants_are_members() {
        let mut target = StopTarget::of(&"a".parse().unwrap(), None, None);
        let all = [process(60, 12, 60), child(61, 13, 60), process(62, 14, 62)];
        target.claim(&all[0]);
        assert_eq!(pids(&all, &target, &[]), [60, 61]);
    }

    #[test]
    fn a_session_with_a_reused_number_has_no_members() {
        let all = [process(50, 99, 50), process(51, 100, 50)];
        assert_eq!(pids(&all, &target(50, 10), &[]), [0; 0]);
        let orphans = [process(51, 11, 50)];
        assert_eq!(pids(&orphans, &target(50, 10), &[]), [51]);
    }

    #[test]
    fn the_session_of_a_program_that_forks_twice_has_its_members() {
        let mut target = target(50, 10);
        target.record.as_mut().unwrap().session = Some(49);
        assert_eq!(pids(&[process(50, 10, 49), process(51, 11, 49)], &target, &[]), [50, 51]);
        assert_eq!(pids(&[process(51, 11, 49)], &target, &[]), [51]);
        // The leader of the session is still alive.
        assert_eq!(pids(&[process(49, 9, 49), process(51, 11, 49)], &target, &[]), [49, 51]);
        // Another process has started a session with this number.
        assert_eq!(pids(&[process(49, 90, 49), process(51, 91, 49)], &target, &[]), [0; 0]);
    }
}
