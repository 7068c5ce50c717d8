//! Watches `fleet.toml`: reads it when it has changed and settled, or when `gateway fleet apply` wrote it; then applies it, or rejects
//! it with a reason.
//!
//! The last good text is saved in `state/`, so a gateway that restarts with a broken `fleet.toml` keeps the same desired state. It is saved in
//! the background: a slow disk does not delay a new fleet. If the gateway crashes before the save and `fleet.toml` is broken, the previous
//! fleet is in effect again. Hosts then receive it under a generation greater than the one that they have (`core/generation.rs`): generations
//! depend on what each host reports, not on this file.
//!
//! A file that was rejected for a missing package is validated again when the depot changes.

use std::fs;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::depot::{FileStamp, Index};
use super::settle::SettledFile;
use super::write_behind::WriteBehind;
use super::{GatewayDirectory, now_millis};
use crate::config;
use crate::core::fleet::{Fleet, HostFacts, MAX_FILE_BYTES, evaluate};
use crate::core::text::hex;
use crate::platform;
use crate::store::{self, Access};

/// More than a SHA-256 in hexadecimal and a newline.
const MAX_APPLIED_BYTES: u64 = 128;

/// The status of the fleet file, for the operator.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct FleetFileStatus {
    /// When the fleet in effect was accepted, Unix milliseconds; also its generation.
    pub(super) generation: Option<u64>,
    /// The heartbeat interval, seconds.
    pub(super) interval: u64,
    /// The number of sub-agents.
    pub(super) agents: usize,
    /// The number of rules.
    pub(super) rules: usize,
    /// SHA-256 of its text.
    pub(super) content: Option<String>,
    /// Why the present file is not in effect.
    pub(super) error: Option<String>,
}

/// The fleet file and the fleet in effect.
pub(super) struct FleetFile {
    directory: GatewayDirectory,
    /// The stamp at the last poll; the inner `None` is a missing file.
    last: Option<Option<FileStamp>>,
    settling: SettledFile<Option<FileStamp>>,
    /// The stamp of the file that was validated last.
    validated: Option<Option<FileStamp>>,
    in_force: Option<ActiveFleet>,
    status: FleetFileStatus,
    /// Saves the text of the fleet in effect.
    last_good: WriteBehind<Arc<str>>,
    /// Why the saved fleet could not be read, until another one is saved.
    load_problem: Option<String>,
    /// Whether the file contains secrets and others than its owner can read it.
    exposed: bool,
}

struct ActiveFleet {
    text: Arc<str>,
    fleet: Arc<Fleet>,
}

impl FleetFile {
    /// Starts with the last good fleet, if there is one.
    pub(super) fn open(directory: GatewayDirectory, settle: Duration) -> Result<FleetFile> {
        let path = directory.last_good_fleet();
        let saved = path.clone();
        let last_good = WriteBehind::start("the last good fleet file", move |text: &Arc<str>| {
            store::replace(&saved, text.as_bytes(), Access::Private)
        })?;
        let status = FleetFileStatus::default();
        let settling = SettledFile::new(settle);
        let mut file = FleetFile {
            directory,
            last: None,
            settling,
            validated: None,
            in_force: None,
            status,
            last_good,
            load_problem: None,
            exposed: false,
        };
        match read_text(&path).and_then(|text| text.map(|text| Ok((parse(&text)?, text))).transpose()) {
            Ok(Some((fleet, text))) => {
                let accepted = fs::metadata(&path).ok().and_then(|metadata| metadata.modified().ok());
                let accepted = accepted.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
                let generation =
                    accepted.and_then(|since| u64::try_from(since.as_millis()).ok()).unwrap_or_else(now_millis);
                file.put_in_force(fleet, text.into(), generation);
            }
            Ok(None) => {}
            Err(error) => {
                file.load_problem = Some(format!("cannot load the last good fleet file {}: {error:#}", path.display()));
            }
        }
        Ok(file)
    }

    pub(super) fn in_force(&self) -> Option<Arc<Fleet>> {
        self.in_force.as_ref().map(|in_force| in_force.fleet.clone())
    }

    pub(super) fn status(&self) -> &FleetFileStatus {
        &self.status
    }

    /// Whether the present file has been validated.
    pub(super) fn is_settled(&self) -> bool {
        self.validated.is_some() && self.validated == self.last
    }

    /// Why the last good fleet is not on disk, so that a restarted gateway would not have it.
    pub(super) fn save_problem(&self) -> Option<String> {
        let failed =
            self.last_good.failure().map(|why| format!("cannot save the last good fleet file: {why}; retrying"));
        failed.or_else(|| self.load_problem.clone())
    }

    /// The problem that others can read secrets in the file.
    pub(super) fn exposure(&self) -> Option<String> {
        let path = self.directory.fleet();
        self.exposed
            .then(|| format!("{0} contains secrets and can be read by others; run `chmod 600 {0}`", path.display()))
    }

    /// Polls once; returns whether the status has changed. `at_once` reads the file even if it has not settled.
    pub(super) fn poll(
        &mut self,
        depot: &Index,
        depot_changed: bool,
        at_once: bool,
        hosts: impl FnOnce() -> Vec<HostFacts>,
    ) -> bool {
        let path = self.directory.fleet();
        let metadata = fs::metadata(&path).ok();
        let stamp = metadata.as_ref().map(FileStamp::of);
        self.exposed = self.in_force.as_ref().is_some_and(|in_force| in_force.fleet.has_secrets())
            && metadata.as_ref().is_some_and(platform::is_readable_by_others);
        let modified = metadata.and_then(|metadata| metadata.modified().ok());
        let has_settled = self.settling.poll(stamp, modified, Instant::now());
        self.last = Some(stamp);
        let retry = depot_changed && self.status.error.is_some();
        if self.validated == Some(stamp) && !retry && !at_once {
            return false;
        }
        if !has_settled && !at_once && !self.is_applied() {
            return false;
        }
        let text = read_text(&path);
        // The file changed while it was read: the text may be incomplete.
        if fs::metadata(&path).ok().map(|metadata| FileStamp::of(&metadata)) != stamp {
            return false;
        }
        self.validated = Some(stamp);
        let before = self.status.clone();
        match text.and_then(|text| self.accept(text, depot, hosts)) {
            Ok(()) => {}
            Err(error) => {
                let reason = format!("{error:#}");
                if self.status.error.as_ref() != Some(&reason) {
                    tracing::error!(path = %path.display(), %reason, "the fleet file is rejected; the last good one stays in effect");
                }
                self.status.error = Some(reason);
            }
        }
        self.status != before
    }

    /// Whether the file is the one that `gateway fleet apply` wrote.
    fn is_applied(&self) -> bool {
        let Ok(Some(applied)) = store::read(&self.directory.applied_fleet(), MAX_APPLIED_BYTES) else { return false };
        let text = store::read(&self.directory.fleet(), MAX_FILE_BYTES);
        text.ok().flatten().is_some_and(|text| content_hash(&text).as_bytes() == applied.trim_ascii())
    }

    fn accept(&mut self, text: Option<String>, depot: &Index, hosts: impl FnOnce() -> Vec<HostFacts>) -> Result<()> {
        let Some(text) = text else { bail!("the file {} does not exist", self.directory.fleet().display()) };
        if self.in_force.as_ref().is_some_and(|in_force| *in_force.text == *text) {
            self.status.error = None;
            return Ok(());
        }
        let fleet = parse(&text)?;
        let last_good = self.in_force.as_ref().map(|in_force| &*in_force.fleet);
        let hosts = if last_good.is_some() { hosts() } else { Vec::new() };
        evaluate(&fleet, last_good, &hosts, |name, version| depot.has(name, version))?;
        let text: Arc<str> = text.into();
        self.last_good.put(text.clone());
        self.load_problem = None;
        let generation = now_millis().max(self.status.generation.map_or(0, |last| last + 1));
        tracing::info!(
            generation,
            agents = fleet.names().len(),
            rules = fleet.rules.len(),
            "the fleet file is in effect"
        );
        self.put_in_force(fleet, text, generation);
        Ok(())
    }

    fn put_in_force(&mut self, fleet: Fleet, text: Arc<str>, generation: u64) {
        let (agents, rules) = (fleet.names().len(), fleet.rules.len());
        let interval = fleet.interval.as_secs();
        let content = Some(content_hash(text.as_bytes()));
        self.status = FleetFileStatus { generation: Some(generation), interval, agents, rules, content, error: None };
        self.in_force = Some(ActiveFleet { text, fleet: Arc::new(fleet) });
    }
}

pub(super) fn read_text(path: &std::path::Path) -> Result<Option<String>> {
    let Some(bytes) = store::read(path, MAX_FILE_BYTES)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))
}

/// SHA-256 of a fleet file's text.
pub(super) fn content_hash(text: &[u8]) -> String {
    hex(&Sha256::digest(text))
}

/// Parses the file; an error is one line and names the line number.
pub(super) fn parse(text: &str) -> Result<Fleet> {
    toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", config::wrong_line(text, &error)))
}

/// The lineage of this gateway's generations, created once and kept permanently. If it cannot be kept, it is valid for this run only, and the
/// problem is returned.
pub(super) fn lineage(directory: &GatewayDirectory) -> (String, Option<String>) {
    let loaded = load_or_create_lineage(directory);
    loaded.unwrap_or_else(|error| {
        let why = format!(
            "cannot keep this gateway's lineage (its identity), so hosts will treat it as another gateway after its next start: {error:#}"
        );
        (uuid::Uuid::new_v4().to_string(), Some(why))
    })
}

fn load_or_create_lineage(directory: &GatewayDirectory) -> Result<(String, Option<String>)> {
    let path = directory.lineage();
    match fs::read_to_string(&path) {
        Ok(text) => match uuid::Uuid::parse_str(text.trim()) {
            Ok(lineage) => return Ok((lineage.to_string(), None)),
            Err(_) => {
                tracing::warn!(path = %path.display(), "cannot read this gateway's lineage (its identity); creating a new one, so hosts will treat it as another gateway")
            }
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let lineage = uuid::Uuid::new_v4().to_string();
    store::replace(&path, format!("{lineage}\n").as_bytes(), Access::Private)?;
    Ok((lineage, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        _dir: tempfile::TempDir,
        directory: GatewayDirectory,
        file: FleetFile,
    }

    impl Bench {
        fn new() -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let directory = GatewayDirectory::new(dir.path());
            fs::create_dir(directory.state()).unwrap();
            Bench { file: FleetFile::open(directory.clone(), Duration::ZERO).unwrap(), directory, _dir: dir }
        }

        fn write(&self, text: &str) {
            store::replace(&self.directory.fleet(), text.as_bytes(), Access::Public).unwrap();
        }

        fn settle(&mut self) {
            for _ in 0..3 {
                self.file.poll(&Index::default(), false, false, Vec::new);
            }
            self.file.last_good.flush();
        }

        fn interval(&self) -> Option<u64> {
            self.file.in_force().map(|fleet| fleet.interval.as_secs())
        }
    }

    #[test]
    fn a_file_is_loaded_once_it_has_settled_or_was_applied() {
        let mut bench = Bench::new();
        bench.file = FleetFile::open(bench.directory.clone(), Duration::from_secs(3_600)).unwrap();
        let poll = |bench: &mut Bench| bench.file.poll(&Index::default(), false, false, Vec::new);
        bench.write("heartbeatInterval = 1");
        assert!(!poll(&mut bench) && !poll(&mut bench));
        let applied = content_hash(b"heartbeatInterval = 2");
        fs::write(bench.directory.applied_fleet(), format!("{applied}\n")).unwrap();
        assert!(!poll(&mut bench), "the hash is of another content");
        bench.write("heartbeatInterval = 2");
        assert!(poll(&mut bench) && !poll(&mut bench));
        assert_eq!((bench.interval(), bench.file.status().content.as_ref()), (Some(2), Some(&applied)));
        // Or upon a reload.
        bench.write("heartbeatInterval = 3");
        assert!(!poll(&mut bench));
        assert!(bench.file.poll(&Index::default(), false, true, Vec::new));
        assert_eq!(bench.interval(), Some(3));
    }

    #[test]
    fn the_last_good_fleet_stays_in_force_while_the_file_is_invalid_or_missing() {
        let mut bench = Bench::new();
        bench.write("heartbeatInterval = 7");
        bench.settle();
        for (bad, reason) in [
            ("\nheartbeatIntervall = 7", "line 2"),
            ("[agents.a]\nversion = \"1\"", "no package of a 1"),
            ("[[[", "line 1"),
        ] {
            bench.write(bad);
            bench.settle();
            assert_eq!(bench.interval(), Some(7));
            assert!(bench.file.status().error.as_ref().unwrap().contains(reason), "{:?}", bench.file.status());
        }
        fs::remove_file(bench.directory.fleet()).unwrap();
        bench.settle();
        assert!(bench.file.status().error.as_ref().unwrap().contains("does not exist"));

        // It also stays after a restart; restoring the file resolves the error.
        let generation = bench.file.status().generation;
        bench.file = FleetFile::open(bench.directory.clone(), Duration::ZERO).unwrap();
        assert_eq!(bench.interval(), Some(7));
        bench.write("heartbeatInterval = 7");
        bench.settle();
        assert_eq!(bench.file.status().error, None);
        assert!(bench.file.status().generation >= generation.map(|millis| millis - 1_000));
    }

    #[test]
    fn a_lineage_is_created_once() {
        let bench = Bench::new();
        let first = lineage(&bench.directory).0;
        assert_eq!(lineage(&bench.directory).0, first);
        fs::write(bench.directory.lineage(), "what").unwrap();
        assert_ne!(lineage(&bench.directory).0, first);
    }
}
