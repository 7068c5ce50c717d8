//! One sub-agent with what the manager holds for it: its state, whose decisions are [`core::agent`](crate::core::agent)'s, and the handles of
//! what runs beside the loop for it.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use tokio::task::AbortHandle;

use super::stage::{self, Staging};
use super::unix_now;
use crate::core::agent::{Agent, Discovery, Moment};
use crate::core::ledger::{LedgerEntry, LedgerRelease};
use crate::core::manifest::KillMode;
use crate::core::model::{AgentId, AgentName, Version};
use crate::core::names::CURRENT;
use crate::core::program::Program;
use crate::core::protocol::AgentReport;
use crate::core::schedule::RateLimiter;
use crate::core::status::{AgentStatus, SkippedStatus, UpgradeStatus};
use crate::core::text::{MAX_MESSAGE_BYTES, cut};
use crate::home::{self, Home};
use crate::package;
use crate::platform::{self, Groups};
use crate::process::launch;
use crate::process::record::ProcessRecord;
use crate::process::tree::StopTarget;

/// Of its exits, failed starts and states of health, so many are reported to the gateway at once, and one more each so often: one that
/// fails again and again must not fill the journal, which all share. Its state and its restarts are in every heartbeat.
const NOTED_AT_ONCE: u32 = 12;
const NOTED_EVERY: Duration = Duration::from_secs(600);

/// One sub-agent.
#[derive(Debug)]
pub(super) struct SubAgent {
    pub(super) state: Agent,
    /// Of its last start or adoption, so that word of an earlier process is not taken for word of this one.
    pub(super) serial: u64,
    pub(super) record: Option<ProcessRecord>,
    /// What an earlier manager left of it was seen to live outside of its group, too.
    pub(super) scattered: bool,
    /// Why the output of its process does not go into its log.
    pub(super) output_lost: Option<String>,
    /// The watch on its process.
    pub(super) watch: Option<AbortHandle>,
    /// The health check that is under way.
    pub(super) check: Option<AbortHandle>,
    pub(super) staging: Option<Staging>,
    /// The revision of the ledger that it waits for.
    pub(super) recorded_with: Option<u64>,
    pub(super) allowance: RateLimiter,
}

impl SubAgent {
    pub(super) fn new(state: Agent) -> SubAgent {
        SubAgent {
            state,
            serial: 0,
            record: None,
            scattered: false,
            output_lost: None,
            watch: None,
            check: None,
            staging: None,
            recorded_with: None,
            allowance: RateLimiter::new(NOTED_AT_ONCE, NOTED_EVERY),
        }
    }

    /// What of it may live and is to be ended before anything new of it is started.
    pub(super) fn target(&self, groups: Option<&Groups>) -> StopTarget {
        let mut target = StopTarget::of(self.state.name(), self.record.clone(), groups);
        if let (Some(Program::Script), Some(version)) = (self.state.program(), self.state.current()) {
            target = target.asking(version.clone());
        }
        if self.scattered { target.scattered() } else { target }
    }

    /// The epoch of the release that was committed last.
    pub(super) fn committed_epoch(&self) -> u64 {
        self.state.ledger().active().map_or(0, |release| release.epoch)
    }

    /// `agent_id`, `instance_id`: of this host.
    pub(super) fn report(&self, agent_id: &AgentId, instance_id: &str) -> AgentReport {
        let supervisor = self.state.supervisor();
        AgentReport {
            name: self.state.name().clone(),
            version: self.state.shown().cloned(),
            state: self.state.state(),
            pid: supervisor.pid(),
            restarts: supervisor.restarts(),
            env_hash: self.state.spec().map(|spec| launch::reported_env_hash(agent_id, instance_id, &spec.env)),
            message: self.last_error(),
        }
    }

    /// `groups`: where groups are made on this host.
    pub(super) fn status(&self, groups: Option<&Groups>, now: Instant) -> AgentStatus {
        let supervisor = self.state.supervisor();
        let pid = supervisor.pid();
        AgentStatus {
            name: self.state.name().clone(),
            version: self.state.shown().cloned(),
            active_version: self.state.differing_current().cloned(),
            state: self.state.state(),
            pid,
            uptime_seconds: supervisor.up_since().map(|since| now.saturating_duration_since(since).as_secs()),
            restarts: supervisor.restarts(),
            memory_bytes: pid.and_then(platform::memory_bytes),
            last_error: self.last_error(),
            outside_group: groups.is_some_and(|groups| self.is_outside(groups)),
            download: self.staging.as_ref().and_then(Staging::status),
            upgrade: self.upgrade(now),
            held_by_operator: self.state.ledger().is_held(),
            removed_in_seconds: None,
            skipped: self.skipped(),
        }
    }
}

impl SubAgent {
    /// What an operator should do something about while its process runs.
    pub(super) fn problem(&self) -> Option<String> {
        let why = self.output_lost.as_ref().filter(|_| self.state.supervisor().pid().is_some())?;
        let name = self.state.name();
        Some(format!("the output of {name} is lost until its log can be opened at a later start ({why})"))
    }

    /// Whether its process left its group, or never was in it. A group that cannot be read says nothing.
    fn is_outside(&self, groups: &Groups) -> bool {
        let Some(pid) = self.state.supervisor().pid() else { return false };
        let is_tree = self.record.as_ref().is_some_and(|record| record.head.kill_mode == KillMode::Tree);
        let members = groups.group(self.state.name().as_str()).members();
        is_tree && members.is_ok_and(|members| !members.contains(&pid))
    }

    fn last_error(&self) -> Option<String> {
        let both = [self.state.last_error(), self.problem()].into_iter().flatten().collect::<Vec<_>>().join("; ");
        (!both.is_empty()).then(|| cut(&both, MAX_MESSAGE_BYTES))
    }

    fn upgrade(&self, now: Instant) -> Option<UpgradeStatus> {
        let upgrade = self.state.upgrade(now)?;
        let deadline = upgrade.left.and_then(|left| jiff::Timestamp::now().checked_add(left).ok());
        let deadline = deadline.map(|at| at.round(jiff::Unit::Second).unwrap_or(at).to_string());
        Some(UpgradeStatus {
            from: upgrade.from,
            to: upgrade.to,
            phase: upgrade.phase.to_owned(),
            deadline,
            tries_left: upgrade.tries_left,
            reason: upgrade.reason.map(|reason| cut(&reason, MAX_MESSAGE_BYTES)),
            download: None,
        })
    }

    fn skipped(&self) -> Vec<SkippedStatus> {
        let skipped = self.state.ledger().skipped_for_good();
        skipped
            .map(|skipped| SkippedStatus { version: skipped.version.clone(), reason: skipped.reason.clone() })
            .collect()
    }
}

/// The present moment, for a decision.
pub(super) fn at(now: Instant) -> Moment {
    Moment { now, unix_seconds: unix_now(), jitter: fastrand::f64() }
}

/// The release of the process that runs of a sub-agent, and by what it is known.
#[derive(Debug, Clone, Copy)]
pub(super) enum RunningRelease<'a> {
    Nothing,
    Recorded(&'a Version),
    /// By the mark of a process that has no record. It may be one that outlived its release.
    Marked(&'a Version),
}

impl<'a> RunningRelease<'a> {
    /// The release that a ledger goes on with. A mark alone counts for the release before the one on probation: that was returned to, on a disk
    /// that took neither ledger nor record.
    fn counts(self, ledger: &LedgerEntry) -> Option<&'a Version> {
        match self {
            RunningRelease::Nothing => None,
            RunningRelease::Recorded(version) => Some(version),
            RunningRelease::Marked(version) => {
                ledger.before_probation().is_some_and(|before| before.version == *version).then_some(version)
            }
        }
    }
}

/// What lies on disk of a sub-agent. `entry`: its ledger; `None`: there is none for it, and what is on disk says it all. `record`: of its
/// last process.
pub(super) fn on_disk(
    home: &Home,
    name: &AgentName,
    entry: Option<LedgerEntry>,
    record: Option<&ProcessRecord>,
    runs: RunningRelease<'_>,
) -> Discovery {
    let restarts = record.map_or(0, |record| record.head.restarts);
    let directory = match std::fs::read_dir(home.agent(name)).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => vec![],
        Err(error) => {
            tracing::error!(agent = %name, error = %error, "its releases cannot be listed; what the ledger says of them stands");
            let ledger = entry.unwrap_or_default();
            return Discovery { releases: ledger.kept().cloned().collect(), ledger, restarts, ..Discovery::default() };
        }
    };
    let current = platform::read_current(&home.current(name)).ok().flatten();
    // What stands in the link's own place is no release, and makes way for the link.
    let stands_for_current = |version: &str| version.eq_ignore_ascii_case(CURRENT) && is_directory(&home.current(name));
    let recorded = record.map(|record| &record.head.version);
    let (mut whole, mut unfinished): (Vec<(SystemTime, LedgerRelease)>, _) = (vec![], BTreeSet::new());
    for entry in directory {
        // The link `current` is no release, though its name could be read as a version.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let version = entry.file_name().to_str().and_then(|name| name.parse::<Version>().ok());
        let version = version.filter(|version| is_directory && !stands_for_current(version.as_str()));
        let Some(version) = version else { continue };
        match entry.path().join(home::COMPLETE).symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // What `current` or a process record names stays.
                if current.as_deref() != Some(version.as_str()) && recorded != Some(&version) {
                    unfinished.insert(version);
                }
            }
            metadata => {
                let since = metadata.and_then(|metadata| metadata.modified()).unwrap_or(UNIX_EPOCH);
                whole.push((since, stage::release(version, package::load_completed(&entry.path()).ok().as_ref())));
            }
        }
    }
    whole.sort_by(|(one, a), (other, b)| one.cmp(other).then_with(|| a.version.cmp(&b.version)));
    let mut ledger = entry.unwrap_or_else(|| from_disk(&whole, current.as_deref()));
    let find = |version: &Version| whole.iter().map(|(_, release)| release).find(|release| release.version == *version);
    ledger.keep_whole(|version| find(version).is_some());
    if let Some(running) = runs.counts(&ledger).and_then(find) {
        ledger.resume(running);
    }
    let releases = whole.iter().map(|(_, release)| release.version.clone()).collect();
    Discovery { ledger, releases, unfinished, restarts, ..Discovery::default() }
}

/// Makes `current` name the active release.
pub(super) fn make_current(home: &Home, name: &AgentName, version: &Version) -> Result<()> {
    clear_current(home, name)?;
    let path = home.current(name);
    platform::write_current(&path, version.as_str()).with_context(|| format!("cannot switch {}", path.display()))
}

/// Removes a release that stands in the place of the link `current`: earlier versions unpacked one of that version there, which could never
/// be activated, nor could any other beside it.
pub(super) fn clear_current(home: &Home, name: &AgentName) -> Result<()> {
    let path = home.current(name);
    if is_directory(&path) {
        tracing::warn!(agent = %name, path = %path.display(), "a release in the place of the link `current` is removed");
        package::discard(&path)?;
    }
    Ok(())
}

fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.is_dir())
}

/// The ledger of a home that has none: the active release is what `current` names, and the backup the newest of the others. Where it names
/// none, none was ever activated.
fn from_disk(whole: &[(SystemTime, LedgerRelease)], current: Option<&str>) -> LedgerEntry {
    let is_current = |release: &&LedgerRelease| Some(release.version.as_str()) == current;
    let Some(active) = whole.iter().map(|(_, release)| release).find(is_current) else { return LedgerEntry::default() };
    let backup = whole.iter().rev().map(|(_, release)| release).find(|release| !is_current(release));
    LedgerEntry::found(Some(active.clone()), backup.cloned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    /// A home with two whole releases of one sub-agent and half of a third.
    fn home() -> (tempfile::TempDir, Home, AgentName) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let name: AgentName = "a".parse().unwrap();
        for version in ["1", "2", "half"] {
            let release = home.release(&name, &version.parse().unwrap());
            std::fs::create_dir_all(&release).unwrap();
            if version != "half" {
                std::fs::write(release.join(home::COMPLETE), "{}").unwrap();
            }
        }
        platform::write_current(&home.current(&name), "2").unwrap();
        (directory, home, name)
    }

    #[test]
    fn releases_alone_are_found_and_the_one_to_go_back_to() {
        let (_directory, home, name) = home();
        let found = on_disk(&home, &name, None, None, RunningRelease::Nothing);
        assert_eq!(found.releases, BTreeSet::from([version("1"), version("2")]));
        assert_eq!(found.unfinished, BTreeSet::from([version("half")]));
        assert_eq!(found.ledger.current().unwrap().version.as_str(), "2");
        assert_eq!(found.ledger.kept().map(Version::as_str).collect::<Vec<_>>(), ["2", "1"]);
    }

    #[test]
    fn a_release_in_the_links_own_place_is_none_and_makes_way() {
        let (_directory, home, name) = home();
        let current = home.current(&name);
        std::fs::remove_file(&current).unwrap();
        std::fs::create_dir(&current).unwrap();
        std::fs::write(current.join(home::COMPLETE), "{}").unwrap();
        let mut entry = LedgerEntry::default();
        entry.stage(stage::release(version("current"), None));
        let found = on_disk(&home, &name, Some(entry), None, RunningRelease::Nothing);
        assert_eq!(found.releases, BTreeSet::from([version("1"), version("2")]));
        assert!(found.ledger.staged().is_none());
        make_current(&home, &name, &version("1")).unwrap();
        assert_eq!(platform::read_current(&current).unwrap().as_deref(), Some("1"));
        assert_eq!(
            on_disk(&home, &name, None, None, RunningRelease::Nothing).ledger.current().unwrap().version,
            version("1")
        );
    }

    #[test]
    fn the_ledger_beats_the_link() {
        let (_directory, home, name) = home();
        let mut entry = LedgerEntry::found(Some(stage::release(version("1"), None)), None);
        entry.begin_probation(stage::release(version("gone"), None));
        let found = on_disk(&home, &name, Some(entry), None, RunningRelease::Nothing);
        assert_eq!(found.ledger.kept().map(Version::as_str).collect::<Vec<_>>(), ["1"]);
    }

    #[test]
    fn a_roll_back_that_could_not_be_written_is_told_by_the_process_that_runs() {
        let (_directory, home, name) = home();
        let mut on_probation = LedgerEntry::found(Some(stage::release(version("1"), None)), None);
        on_probation.begin_probation(stage::release(version("2"), None));
        let committed =
            LedgerEntry::found(Some(stage::release(version("2"), None)), Some(stage::release(version("1"), None)));
        let one = version("1");
        for (ledger, runs, current) in [
            (&on_probation, RunningRelease::Nothing, "2"),
            (&on_probation, RunningRelease::Marked(&one), "1"),
            (&on_probation, RunningRelease::Recorded(&one), "1"),
            // A process that outlived its release.
            (&committed, RunningRelease::Marked(&one), "2"),
        ] {
            let found = on_disk(&home, &name, Some(ledger.clone()), None, runs);
            assert_eq!(found.ledger.current().unwrap().version.as_str(), current, "{runs:?}");
        }
    }

    #[test]
    fn what_was_only_staged_is_not_taken_for_active() {
        let (_directory, home, name) = home();
        std::fs::remove_file(home.current(&name)).unwrap();
        let found = on_disk(&home, &name, None, None, RunningRelease::Nothing);
        assert_eq!((found.ledger.current(), found.ledger.kept().count()), (None, 0));
        assert_eq!(found.releases.len(), 2);
    }

    #[test]
    fn a_directory_that_cannot_be_listed_loses_nothing_of_the_ledger() {
        let (_directory, home, name) = home();
        let entry =
            LedgerEntry::found(Some(stage::release(version("1"), None)), Some(stage::release(version("2"), None)));
        std::fs::remove_dir_all(home.agent(&name)).unwrap();
        std::fs::write(home.agent(&name), "a file in its place").unwrap();
        let found = on_disk(&home, &name, Some(entry.clone()), None, RunningRelease::Nothing);
        assert_eq!((found.ledger, found.releases.len()), (entry, 2));
    }
}
