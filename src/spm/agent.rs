//! One sub-agent with what the manager holds for it: its state, whose decisions are [`core::agent`](crate::core::agent)'s, and the handles of
//! what runs beside the loop for it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::task::AbortHandle;

use super::stage::Staging;
use crate::core::agent::{Agent, At, Found};
use crate::core::ledger::{Entry, Release};
use crate::core::model::{AgentName, Version};
use crate::core::protocol::AgentReport;
use crate::core::schedule::Allowance;
use crate::core::status::AgentStatus;
use crate::home::{self, Home};
use crate::package;
use crate::platform::{self, Groups};
use crate::process::launch;
use crate::process::record::Record;
use crate::process::tree::Target;

/// Of its exits, failed starts and states of health, so many are reported to the gateway at once, and one more each so often: one that
/// fails again and again must not fill the journal, which all share. Its state and its restarts are in every heartbeat.
const NOTED_AT_ONCE: u32 = 12;
const NOTED_EVERY: Duration = Duration::from_secs(600);

/// One sub-agent.
#[derive(Debug)]
pub(super) struct SubAgent {
    pub(super) state: Agent,
    /// Counts starts and adoptions, so that word of an earlier process is not taken for word of this one.
    pub(super) serial: u64,
    pub(super) record: Option<Record>,
    /// What an earlier manager left of it was seen to live outside of its group, too.
    pub(super) scattered: bool,
    /// The watch on its process.
    pub(super) watch: Option<AbortHandle>,
    /// The health check that is under way.
    pub(super) check: Option<AbortHandle>,
    pub(super) staging: Option<Staging>,
    /// The revision of the ledger that it waits for.
    pub(super) recorded_with: Option<u64>,
    pub(super) allowance: Allowance,
}

impl SubAgent {
    pub(super) fn new(state: Agent) -> SubAgent {
        SubAgent {
            state,
            serial: 0,
            record: None,
            scattered: false,
            watch: None,
            check: None,
            staging: None,
            recorded_with: None,
            allowance: Allowance::new(NOTED_AT_ONCE, NOTED_EVERY),
        }
    }

    /// What of it may live and is to be ended before anything new of it is started.
    pub(super) fn target(&self, groups: Option<&Groups>) -> Target {
        let target = Target::of(self.state.name(), self.record.clone(), groups);
        if self.scattered { target.scattered() } else { target }
    }

    pub(super) fn report(&self) -> AgentReport {
        let supervisor = self.state.supervisor();
        AgentReport {
            name: self.state.name().clone(),
            version: self.state.shown().cloned(),
            state: self.state.state(),
            pid: supervisor.pid(),
            restarts: supervisor.restarts(),
            env_hash: self.state.spec().map(|spec| launch::env_hash(&spec.env)),
            message: self.state.last_error(),
        }
    }

    pub(super) fn status(&self, now: Instant) -> AgentStatus {
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
            last_error: self.state.last_error(),
            download: self.staging.as_ref().and_then(Staging::status),
        }
    }
}

/// The present moment, for a decision.
pub(super) fn at(now: Instant) -> At {
    let unix_seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    At { now, unix_seconds, jitter: fastrand::f64() }
}

/// What lies on disk of a sub-agent. `entry`: its ledger; `None`: there is none for it, and what is on disk says it all. `record`: of the
/// process that runs.
pub(super) fn on_disk(home: &Home, name: &AgentName, entry: Option<Entry>, record: Option<&Record>) -> Found {
    let mut whole: Vec<(SystemTime, Release)> = vec![];
    let mut unfinished = BTreeSet::new();
    let current = platform::read_current(&home.current(name)).ok().flatten();
    let running = record.map(|record| record.head.version.clone());
    for entry in std::fs::read_dir(home.agent(name)).into_iter().flatten().flatten() {
        // The link `current` is no release, though its name could be read as a version.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let version = entry.file_name().to_str().and_then(|name| name.parse::<Version>().ok());
        let Some(version) = version.filter(|_| is_directory) else { continue };
        match entry.path().join(home::COMPLETE).symlink_metadata() {
            Ok(metadata) => {
                let since = metadata.modified().unwrap_or(UNIX_EPOCH);
                whole.push((since, release(version, package::whole(&entry.path()).ok().as_ref())));
            }
            // What `current` or a process record names stays.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if current.as_deref() != Some(version.as_str()) && running.as_ref() != Some(&version) {
                    unfinished.insert(version);
                }
            }
            Err(_) => {}
        }
    }
    whole.sort_by(|(one, a), (other, b)| one.cmp(other).then_with(|| a.version.cmp(&b.version)));
    let releases: BTreeSet<Version> = whole.iter().map(|(_, release)| release.version.clone()).collect();
    let mut ledger = entry.unwrap_or_else(|| from_disk(whole, current.as_deref()));
    ledger.keep_whole(|version| releases.contains(version));
    ledger.resume(record.filter(|record| record.is_alive()).map(|record| &record.head.version));
    let restarts = record.map_or(0, |record| record.head.restarts);
    Found { ledger, releases, unfinished, program: None, restarts }
}

/// The ledger of a home that has none: the active release is what `current` names, and the backup the newest of the others.
fn from_disk(mut whole: Vec<(SystemTime, Release)>, current: Option<&str>) -> Entry {
    let place = whole.iter().position(|(_, release)| Some(release.version.as_str()) == current);
    let active = place.map(|place| whole.remove(place).1);
    Entry::found(active, whole.pop().map(|(_, release)| release))
}

/// The release that a directory holds. `completed`: what that says of its package, where it can be read.
pub(super) fn release(version: Version, completed: Option<&package::Completed>) -> Release {
    let sha256 = completed.map(|completed| completed.sha256.clone());
    Release { version, sha256, epoch: completed.map_or(0, |completed| completed.epoch), unknown: Default::default() }
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
        let found = on_disk(&home, &name, None, None);
        assert_eq!(found.releases, BTreeSet::from([version("1"), version("2")]));
        assert_eq!(found.unfinished, BTreeSet::from([version("half")]));
        assert_eq!(found.ledger.current().unwrap().version.as_str(), "2");
        assert_eq!(found.ledger.kept().map(Version::as_str).collect::<Vec<_>>(), ["2", "1"]);
    }

    #[test]
    fn the_ledger_beats_the_link() {
        let (_directory, home, name) = home();
        let mut entry = Entry::found(Some(release(version("1"), None)), None);
        entry.begin_probation(release(version("gone"), None));
        let found = on_disk(&home, &name, Some(entry), None);
        assert_eq!(found.ledger.kept().map(Version::as_str).collect::<Vec<_>>(), ["1"]);
    }
}
