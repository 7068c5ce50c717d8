//! One sub-agent as the manager holds it: its state, which [`core::agent`](crate::core::agent) decides on, and the handles of its
//! background tasks.

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

/// Limit on the exits, failed starts and health changes of one sub-agent that are reported: this burst, then one per interval. A crash loop
/// must not fill the journal, which all sub-agents share; state and restarts are in every heartbeat anyway.
const EVENT_BURST: u32 = 12;
const EVENT_INTERVAL: Duration = Duration::from_secs(600);

/// One sub-agent.
#[derive(Debug)]
pub(super) struct SubAgent {
    pub(super) state: Agent,
    /// Number of its last start or adoption; results for an earlier process have another number and are ignored.
    pub(super) serial: u64,
    pub(super) record: Option<ProcessRecord>,
    /// An earlier manager left processes of it outside its cgroup, too.
    pub(super) scattered: bool,
    /// Why the output of its process is not written to its log.
    pub(super) output_lost: Option<String>,
    /// The task that watches its process.
    pub(super) watch: Option<AbortHandle>,
    /// The running health check.
    pub(super) check: Option<AbortHandle>,
    pub(super) staging: Option<Staging>,
    /// The revision of the ledger whose write it waits for.
    pub(super) awaited_revision: Option<u64>,
    pub(super) event_limiter: RateLimiter,
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
            awaited_revision: None,
            event_limiter: RateLimiter::new(EVENT_BURST, EVENT_INTERVAL),
        }
    }

    /// The processes of it that may be alive and must be stopped before a new one is started.
    pub(super) fn target(&self, groups: Option<&Groups>) -> StopTarget {
        let mut target = StopTarget::of(self.state.name(), self.record.clone(), groups);
        if let (Some(Program::Script), Some(version)) = (self.state.program(), self.state.current()) {
            target = target.with_script(version.clone());
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

    /// `groups`: where this host creates cgroups.
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
    /// A problem of the running process that needs an operator.
    pub(super) fn problem(&self) -> Option<String> {
        let why = self.output_lost.as_ref().filter(|_| self.state.supervisor().pid().is_some())?;
        let name = self.state.name();
        Some(format!("the output of {name} is lost until it is restarted and its log can be opened ({why})"))
    }

    /// Whether its process is outside its cgroup. `false` where the cgroup cannot be read.
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
        let skipped = self.state.ledger().permanently_skipped();
        skipped
            .map(|skipped| SkippedStatus { version: skipped.version.clone(), reason: skipped.reason.clone() })
            .collect()
    }
}

/// The current time and jitter, as input to a decision.
pub(super) fn moment(now: Instant) -> Moment {
    Moment { now, unix_seconds: unix_now(), jitter: fastrand::f64() }
}

/// The release of a sub-agent's running process, and where that is known from.
#[derive(Debug, Clone, Copy)]
pub(super) enum RunningRelease<'a> {
    Nothing,
    Recorded(&'a Version),
    /// From the environment marker of a process without a record. Such a process may be older than the active release.
    Marked(&'a Version),
}

impl<'a> RunningRelease<'a> {
    /// The release to continue with. A marker alone counts only for the release before the one on probation: a rollback that could be
    /// written to neither ledger nor record.
    fn to_resume(self, ledger: &LedgerEntry) -> Option<&'a Version> {
        match self {
            RunningRelease::Nothing => None,
            RunningRelease::Recorded(version) => Some(version),
            RunningRelease::Marked(version) => {
                ledger.before_probation().is_some_and(|before| before.version == *version).then_some(version)
            }
        }
    }
}

/// The state of a sub-agent on disk. `entry`: its ledger entry; `None`: there is no ledger, and the entry is derived from the disk.
/// `record`: of its last process.
pub(super) fn discover(
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
            tracing::error!(agent = %name, error = %error, "cannot list the releases of a sub-agent on disk; those of the saved ledger are used without a check");
            let ledger = entry.unwrap_or_default();
            return Discovery { releases: ledger.kept().cloned().collect(), ledger, restarts, ..Discovery::default() };
        }
    };
    let current = platform::read_current(&home.current(name)).ok().flatten();
    // A directory with the name of the link `current` is not a release; it is removed when the link is written.
    let is_path_of_current = |version: &str| version.eq_ignore_ascii_case(CURRENT) && is_directory(&home.current(name));
    let recorded = record.map(|record| &record.head.version);
    let (mut complete, mut unfinished): (Vec<(SystemTime, LedgerRelease)>, _) = (vec![], BTreeSet::new());
    for entry in directory {
        // The link `current` is not a release, although its name parses as a version.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let version = entry.file_name().to_str().and_then(|name| name.parse::<Version>().ok());
        let version = version.filter(|version| is_directory && !is_path_of_current(version.as_str()));
        let Some(version) = version else { continue };
        match entry.path().join(home::COMPLETE).symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // A release that `current` or a process record names is kept.
                if current.as_deref() != Some(version.as_str()) && recorded != Some(&version) {
                    unfinished.insert(version);
                }
            }
            metadata => {
                let since = metadata.and_then(|metadata| metadata.modified()).unwrap_or(UNIX_EPOCH);
                complete.push((since, stage::release(version, package::load_completed(&entry.path()).ok().as_ref())));
            }
        }
    }
    complete.sort_by(|(one, a), (other, b)| one.cmp(other).then_with(|| a.version.cmp(&b.version)));
    let mut ledger = entry.unwrap_or_else(|| from_disk(&complete, current.as_deref()));
    let find =
        |version: &Version| complete.iter().map(|(_, release)| release).find(|release| release.version == *version);
    ledger.drop_incomplete(|version| find(version).is_some());
    if let Some(running) = runs.to_resume(&ledger).and_then(find) {
        ledger.resume(running);
    }
    let releases = complete.iter().map(|(_, release)| release.version.clone()).collect();
    Discovery { ledger, releases, unfinished, restarts, ..Discovery::default() }
}

/// Points `current` at the active release.
pub(super) fn make_current(home: &Home, name: &AgentName, version: &Version) -> Result<()> {
    clear_current(home, name)?;
    let path = home.current(name);
    platform::write_current(&path, version.as_str()).with_context(|| format!("cannot switch {}", path.display()))
}

/// Removes a release unpacked at the path of the link `current`. Earlier versions did that for a version named `current`, and then no
/// release could be activated.
pub(super) fn clear_current(home: &Home, name: &AgentName) -> Result<()> {
    let path = home.current(name);
    if is_directory(&path) {
        tracing::warn!(agent = %name, path = %path.display(), "`current` is a directory instead of a link and is removed");
        package::discard(&path)?;
    }
    Ok(())
}

fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.is_dir())
}

/// The ledger entry for a home without a ledger: the active release is the one that `current` names, the backup the newest other one.
/// Without `current`, none was ever activated.
fn from_disk(complete: &[(SystemTime, LedgerRelease)], current: Option<&str>) -> LedgerEntry {
    let is_current = |release: &&LedgerRelease| Some(release.version.as_str()) == current;
    let Some(active) = complete.iter().map(|(_, release)| release).find(is_current) else {
        return LedgerEntry::default();
    };
    let backup = complete.iter().rev().map(|(_, release)| release).find(|release| !is_current(release));
    LedgerEntry::from_disk(Some(active.clone()), backup.cloned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    /// A home with two complete releases of one sub-agent and an incomplete one.
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
    fn complete_releases_are_found_with_the_backup() {
        let (_directory, home, name) = home();
        let found = discover(&home, &name, None, None, RunningRelease::Nothing);
        assert_eq!(found.releases, BTreeSet::from([version("1"), version("2")]));
        assert_eq!(found.unfinished, BTreeSet::from([version("half")]));
        assert_eq!(found.ledger.current().unwrap().version.as_str(), "2");
        assert_eq!(found.ledger.kept().map(Version::as_str).collect::<Vec<_>>(), ["2", "1"]);
    }

    #[test]
    fn a_release_at_the_path_of_the_link_is_ignored_and_removed() {
        let (_directory, home, name) = home();
        let current = home.current(&name);
        std::fs::remove_file(&current).unwrap();
        std::fs::create_dir(&current).unwrap();
        std::fs::write(current.join(home::COMPLETE), "{}").unwrap();
        let mut entry = LedgerEntry::default();
        entry.stage(stage::release(version("current"), None));
        let found = discover(&home, &name, Some(entry), None, RunningRelease::Nothing);
        assert_eq!(found.releases, BTreeSet::from([version("1"), version("2")]));
        assert!(found.ledger.staged().is_none());
        make_current(&home, &name, &version("1")).unwrap();
        assert_eq!(platform::read_current(&current).unwrap().as_deref(), Some("1"));
        assert_eq!(
            discover(&home, &name, None, None, RunningRelease::Nothing).ledger.current().unwrap().version,
            version("1")
        );
    }

    #[test]
    fn the_ledger_takes_precedence_over_the_link() {
        let (_directory, home, name) = home();
        let mut entry = LedgerEntry::from_disk(Some(stage::release(version("1"), None)), None);
        entry.begin_probation(stage::release(version("gone"), None));
        let found = discover(&home, &name, Some(entry), None, RunningRelease::Nothing);
        assert_eq!(found.ledger.kept().map(Version::as_str).collect::<Vec<_>>(), ["1"]);
    }

    #[test]
    fn a_rollback_that_could_not_be_written_is_recovered_from_the_running_process() {
        let (_directory, home, name) = home();
        let mut on_probation = LedgerEntry::from_disk(Some(stage::release(version("1"), None)), None);
        on_probation.begin_probation(stage::release(version("2"), None));
        let committed =
            LedgerEntry::from_disk(Some(stage::release(version("2"), None)), Some(stage::release(version("1"), None)));
        let one = version("1");
        for (ledger, runs, current) in [
            (&on_probation, RunningRelease::Nothing, "2"),
            (&on_probation, RunningRelease::Marked(&one), "1"),
            (&on_probation, RunningRelease::Recorded(&one), "1"),
            // A process older than the active release.
            (&committed, RunningRelease::Marked(&one), "2"),
        ] {
            let found = discover(&home, &name, Some(ledger.clone()), None, runs);
            assert_eq!(found.ledger.current().unwrap().version.as_str(), current, "{runs:?}");
        }
    }

    #[test]
    fn a_staged_release_is_not_active() {
        let (_directory, home, name) = home();
        std::fs::remove_file(home.current(&name)).unwrap();
        let found = discover(&home, &name, None, None, RunningRelease::Nothing);
        assert_eq!((found.ledger.current(), found.ledger.kept().count()), (None, 0));
        assert_eq!(found.releases.len(), 2);
    }

    #[test]
    fn a_directory_that_cannot_be_listed_leaves_the_ledger_unchanged() {
        let (_directory, home, name) = home();
        let entry =
            LedgerEntry::from_disk(Some(stage::release(version("1"), None)), Some(stage::release(version("2"), None)));
        std::fs::remove_dir_all(home.agent(&name)).unwrap();
        std::fs::write(home.agent(&name), "a file in its place").unwrap();
        let found = discover(&home, &name, Some(entry.clone()), None, RunningRelease::Nothing);
        assert_eq!((found.ledger, found.releases.len()), (entry, 2));
    }
}
