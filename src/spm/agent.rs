//! One sub-agent as the manager knows it: its releases, its supervisor, what is under way.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

use super::journal::MAX_MESSAGE_BYTES;
use super::stage::{Refusal, Staging};
use crate::core::desired::Run;
use crate::core::env::Env;
use crate::core::model::{AgentName, Version};
use crate::core::protocol::{AgentReport, AgentState};
use crate::core::reconcile::Actual;
use crate::core::schedule::{Allowance, Backoff};
use crate::core::status::AgentStatus;
use crate::core::supervise::{Policy, Supervisor};
use crate::core::text::cut;
use crate::home::{self, Home};
use crate::installation::guard;
use crate::package;
use crate::platform::{self, Groups};
use crate::process::health;
use crate::process::launch::{self, Program};
use crate::process::record::{self, Record};
use crate::process::tree::Target;

/// Between two tries at a release that cannot be had.
const STAGE_BACKOFF: Backoff = Backoff { base: Duration::from_secs(5), cap: Duration::from_secs(300) };
/// Between two downloads of one that is refused each time: a whole fleet may be told to have it, over links that others need.
const COSTLY_BACKOFF: Backoff = Backoff { cap: Duration::from_secs(6 * 3600), ..STAGE_BACKOFF };

/// Of its exits, failed starts and states of health, so many are told to the gateway at once, and one more each so often: one that goes
/// down again and again must not fill the journal, which is everybody's. Its state and its restarts are in every heartbeat.
const TOLD_AT_ONCE: u32 = 12;
const TOLD_EVERY: Duration = Duration::from_secs(600);

/// Something that takes the sub-agent down first.
#[derive(Debug, Clone)]
pub(super) enum Busy {
    Activating { version: Version, run: Run, env: Env },
    Uninstalling,
}

/// A release that could not be staged or activated.
#[derive(Debug, Clone)]
struct HeldBack {
    version: Version,
    failures: u32,
    until: Instant,
}

#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: AgentName,
    pub(super) supervisor: Supervisor,
    pub(super) program: Option<Program>,
    pub(super) active: Option<Version>,
    pub(super) backup: Option<Version>,
    pub(super) releases: BTreeSet<Version>,
    pub(super) staging: Option<Staging>,
    held_back: Option<HeldBack>,
    pub(super) run: Run,
    pub(super) env: Option<Env>,
    pub(super) busy: Option<Busy>,
    /// Counts starts and adoptions, so that word of an earlier process is not taken for word of this one.
    pub(super) serial: u64,
    pub(super) record: Option<Record>,
    /// What an earlier manager left of it was seen to live outside of its group, too.
    pub(super) scattered: bool,
    /// The watch on that process.
    pub(super) watch: Option<AbortHandle>,
    /// The question after its health.
    pub(super) question: Option<AbortHandle>,
    /// What keeps it from being what it should, besides its exits.
    pub(super) error: Option<String>,
    /// Which of the gateway's variables it was started without, as a sentence.
    pub(super) refused_env: Option<String>,
    pub(super) told: Allowance,
}

impl Agent {
    pub(super) fn new(name: AgentName, restarts: u64) -> Agent {
        Agent {
            name,
            supervisor: Supervisor::new(Policy::default(), restarts),
            program: None,
            active: None,
            backup: None,
            releases: BTreeSet::new(),
            staging: None,
            held_back: None,
            run: Run::Stop,
            env: None,
            busy: None,
            serial: 0,
            record: None,
            scattered: false,
            watch: None,
            question: None,
            error: None,
            refused_env: None,
            told: Allowance::new(TOLD_AT_ONCE, TOLD_EVERY),
        }
    }

    /// What is on disk of a sub-agent.
    pub(super) fn found(home: &Home, name: AgentName, restarts: u64) -> Agent {
        let mut agent = Agent::new(name, restarts);
        remove_unfinished(home, &agent.name);
        let mut found: Vec<(std::time::SystemTime, Version)> = vec![];
        for entry in std::fs::read_dir(home.agent(&agent.name)).into_iter().flatten().flatten() {
            // The link `current` is none, though one could read it as a version and find a whole release behind it.
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let complete = entry.path().join(home::COMPLETE);
            let version = entry.file_name().to_str().and_then(|name| name.parse::<Version>().ok());
            if let (Some(version), Ok(metadata)) = (version, complete.metadata()) {
                found.push((metadata.modified().unwrap_or(std::time::UNIX_EPOCH), version));
            }
        }
        found.sort();
        agent.releases = found.iter().map(|(_, version)| version.clone()).collect();
        agent.active = platform::read_current(&home.current(&agent.name))
            .ok()
            .flatten()
            .and_then(|version| version.parse().ok())
            .filter(|version| agent.releases.contains(version));
        agent.backup =
            found.into_iter().rev().map(|(_, version)| version).find(|version| Some(version) != agent.active.as_ref());
        agent.inspect(home);
        agent
    }

    /// Reads how the active release is run.
    pub(super) fn inspect(&mut self, home: &Home) {
        let Some(active) = &self.active else { return };
        match launch::inspect(home, &self.name, active) {
            Ok(program) => {
                let checks = health::checks(&program);
                self.supervisor.set_policy(Policy { restart: program.restart(), checks, ..Policy::default() });
                if self.program.replace(program).is_none() {
                    self.error = None;
                }
            }
            Err(error) => {
                self.program = None;
                self.error = Some(format!("{error:#}"));
            }
        }
    }

    pub(super) fn actual(&self, now: Instant) -> Actual {
        Actual {
            active: self.active.clone(),
            backup: self.backup.clone(),
            releases: self.releases.clone(),
            staging: self.staged_now().cloned(),
            held_back: self.held_back.as_ref().filter(|held| now < held.until).map(|held| held.version.clone()),
            run: self.run,
            env: self.env.clone(),
            busy: self.busy.is_some(),
        }
    }

    /// The release that is being staged.
    pub(super) fn staged_now(&self) -> Option<&Version> {
        self.staging.as_ref().map(|staging| &staging.version)
    }

    /// Ends the download of any release but this one.
    pub(super) fn keep_staging_only(&mut self, version: Option<&Version>) {
        if self.staged_now() != version {
            self.staging = None;
        }
    }

    /// Notes that a release could not be had, to be tried again later and later, and not before who has it wants to be asked.
    pub(super) fn hold_back(&mut self, version: Version, refusal: Refusal, now: Instant) {
        let failures = match &self.held_back {
            Some(held) if held.version == version => held.failures + 1,
            _ => 1,
        };
        self.error = Some(refusal.why);
        let backoff = if refusal.costly { COSTLY_BACKOFF } else { STAGE_BACKOFF };
        let delay = backoff.delay(failures, fastrand::f64()).max(refusal.retry_after.unwrap_or_default());
        self.held_back = Some(HeldBack { version, failures, until: now + delay });
    }

    /// Lets a new desired state try at once what an older one could not have.
    pub(super) fn release_hold(&mut self) {
        self.held_back = None;
    }

    /// Whether something of it is held back now.
    pub(super) fn is_held_back(&self, now: Instant) -> bool {
        self.held_back.as_ref().is_some_and(|held| now < held.until)
    }

    /// Ends the holding back, and says whether there was any.
    pub(super) fn take_hold(&mut self) -> bool {
        self.held_back.take().is_some()
    }

    /// Whether a release that was held back is to be tried again.
    pub(super) fn hold_is_over(&self, now: Instant) -> bool {
        self.held_back.as_ref().is_some_and(|held| held.until <= now)
    }

    /// When there is something to do for it without anything happening.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let retry = self.held_back.as_ref().map(|held| held.until).filter(|until| *until > now);
        [self.supervisor.deadline(), retry].into_iter().flatten().min()
    }

    /// What of it may live and is to be ended before anything new of it is started.
    pub(super) fn target(&self, groups: Option<&Groups>) -> Target {
        let target = Target::of(&self.name, self.record.clone(), groups);
        if self.scattered { target.scattered() } else { target }
    }

    fn state(&self) -> AgentState {
        let updating = self.staging.is_some() || matches!(self.busy, Some(Busy::Activating { .. }));
        match self.supervisor.state() {
            _ if updating => AgentState::Updating,
            AgentState::Stopped if self.active.is_none() => AgentState::Failed,
            AgentState::Stopped | AgentState::Backoff if self.program.is_none() && self.run == Run::Start => {
                AgentState::Failed
            }
            state => state,
        }
    }

    fn last_error(&self) -> Option<String> {
        let error = self.error.as_deref().or(self.refused_env.as_deref()).or(self.supervisor.last_error());
        error.map(|error| cut(error, MAX_MESSAGE_BYTES))
    }

    pub(super) fn report(&self) -> AgentReport {
        AgentReport {
            name: self.name.clone(),
            version: self.active.clone(),
            state: self.state(),
            pid: self.supervisor.pid(),
            restarts: self.supervisor.restarts(),
            env_hash: self.env.as_ref().map(launch::env_hash),
            message: self.last_error(),
        }
    }

    pub(super) fn status(&self, now: Instant) -> AgentStatus {
        let pid = self.supervisor.pid();
        AgentStatus {
            name: self.name.clone(),
            version: self.active.clone(),
            state: self.state(),
            pid,
            uptime_seconds: self.supervisor.up_since().map(|since| now.saturating_duration_since(since).as_secs()),
            restarts: self.supervisor.restarts(),
            memory_bytes: pid.and_then(platform::memory_bytes),
            last_error: self.last_error(),
            download: self.staging.as_ref().and_then(Staging::status),
        }
    }
}

/// Removes what stands in the place of releases and is none: its unpacking, or its removal, was cut short. What `current` or a process
/// record names is left alone.
fn remove_unfinished(home: &Home, name: &AgentName) {
    let current = platform::read_current(&home.current(name)).ok().flatten();
    let recorded = record::load(home, name).map(|record| record.head.version);
    for entry in std::fs::read_dir(home.agent(name)).into_iter().flatten().flatten() {
        let Some(version) = entry.file_name().to_str().and_then(|name| name.parse::<Version>().ok()) else { continue };
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let complete = entry.path().join(home::COMPLETE).symlink_metadata();
        let is_unfinished = is_directory && complete.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        if !is_unfinished || current.as_deref() == Some(version.as_str()) || recorded.as_ref() == Some(&version) {
            continue;
        }
        match guard::place(home, name).and_then(|()| package::discard(&entry.path())) {
            Ok(()) => tracing::info!(agent = %name, %version, "what was left of a release is removed"),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(agent = %name, %version, error, "what is left of a release cannot be removed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_alone_are_found_and_the_one_to_go_back_to() {
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
        let found = Agent::found(&home, name, 0);
        let version = |text: &str| -> Version { text.parse().unwrap() };
        assert_eq!(found.releases, BTreeSet::from([version("1"), version("2")]));
        assert_eq!((found.active, found.backup), (Some(version("2")), Some(version("1"))));
    }
}
