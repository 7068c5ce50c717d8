//! `fleet.toml` as it is watched: read when it has changed and stood still for a while, or was put there whole by `gateway fleet apply`; judged, and put in force or refused with a reason.
//!
//! The last good text is kept in `state/`, so that a gateway that starts again beside a broken file still says what it said before. It is
//! written beside the work: a file is in force at once, however slow the disk is. After a crash in between, and beside a broken file, the one
//! before is in force again. Hosts are then told its content under a number greater than any that they hold (`core/generation.rs`), because
//! the generations of what hosts are told go by what each host says that it holds, and by no file.
//!
//! What was refused for want of a package is judged again when the depot has changed.

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

/// A SHA-256 in hexadecimal, and the end of its line.
const MAX_APPLIED_BYTES: u64 = 128;

/// How the fleet file stands, for an operator to read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct FleetFileStatus {
    /// When the one in force was accepted, unix milliseconds; it numbers it too.
    pub(super) generation: Option<u64>,
    /// Seconds from one heartbeat to the next.
    pub(super) interval: u64,
    /// How many sub-agents it names.
    pub(super) agents: usize,
    /// How many rules it has.
    pub(super) rules: usize,
    /// SHA-256 of its text.
    pub(super) content: Option<String>,
    /// Why the file that is there now is not in force.
    pub(super) error: Option<String>,
}

/// The file, and what is in force.
pub(super) struct FleetFile {
    place: GatewayDirectory,
    /// The file at the last look; `None`: it was not there.
    last: Option<Option<FileStamp>>,
    still: SettledFile<Option<FileStamp>>,
    /// The file that was judged last.
    judged: Option<Option<FileStamp>>,
    in_force: Option<ActiveFleet>,
    standing: FleetFileStatus,
    /// Keeps the text of what is in force.
    last_good: WriteBehind<Arc<str>>,
    /// Why what was kept could not be read, until something else is kept.
    lost: Option<String>,
    /// The file holds secrets that others can read.
    exposed: bool,
}

struct ActiveFleet {
    text: Arc<str>,
    fleet: Arc<Fleet>,
}

impl FleetFile {
    /// Begins with the last good one, if there is any.
    pub(super) fn open(place: GatewayDirectory, still: Duration) -> Result<FleetFile> {
        let path = place.last_good_fleet();
        let kept = path.clone();
        let last_good = WriteBehind::start("the last good fleet file", move |text: &Arc<str>| {
            store::replace(&kept, text.as_bytes(), Access::Private)
        })?;
        let standing = FleetFileStatus::default();
        let still = SettledFile::new(still);
        let mut file = FleetFile {
            place,
            last: None,
            still,
            judged: None,
            in_force: None,
            standing,
            last_good,
            lost: None,
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
                file.lost = Some(format!("the last good fleet file {} cannot be used: {error:#}", path.display()));
            }
        }
        Ok(file)
    }

    pub(super) fn in_force(&self) -> Option<Arc<Fleet>> {
        self.in_force.as_ref().map(|in_force| in_force.fleet.clone())
    }

    pub(super) fn standing(&self) -> &FleetFileStatus {
        &self.standing
    }

    /// Whether the file that is there now has been judged.
    pub(super) fn is_settled(&self) -> bool {
        self.judged.is_some() && self.judged == self.last
    }

    /// Why the last good fleet is not on disk, so that a gateway that starts again would not know it.
    pub(super) fn unwritten(&self) -> Option<String> {
        let failed = self.last_good.failure().map(|why| format!("the last good fleet file is not on disk: {why}"));
        failed.or_else(|| self.lost.clone())
    }

    /// That secrets in the file can be read by others.
    pub(super) fn exposed(&self) -> Option<String> {
        let path = self.place.fleet();
        self.exposed
            .then(|| format!("{0} holds secrets and can be read by others; run `chmod 600 {0}`", path.display()))
    }

    /// Looks once; `true` where something has changed: what is in force, or why the file is not. `at_once`: it counts as it is now.
    pub(super) fn look(
        &mut self,
        depot: &Index,
        depot_changed: bool,
        at_once: bool,
        hosts: impl FnOnce() -> Vec<HostFacts>,
    ) -> bool {
        let path = self.place.fleet();
        let metadata = fs::metadata(&path).ok();
        let stamp = metadata.as_ref().map(FileStamp::of);
        self.exposed = self.in_force.as_ref().is_some_and(|in_force| in_force.fleet.has_secrets())
            && metadata.as_ref().is_some_and(platform::others_may_read);
        let modified = metadata.and_then(|metadata| metadata.modified().ok());
        let stands_still = self.still.look(stamp, modified, Instant::now());
        self.last = Some(stamp);
        let again = depot_changed && self.standing.error.is_some();
        if self.judged == Some(stamp) && !again && !at_once {
            return false;
        }
        if !stands_still && !at_once && !self.is_applied() {
            return false;
        }
        let text = read_text(&path);
        // Somebody wrote between the look and the reading: what was read may be half of it.
        if fs::metadata(&path).ok().map(|metadata| FileStamp::of(&metadata)) != stamp {
            return false;
        }
        self.judged = Some(stamp);
        let before = self.standing.clone();
        match text.and_then(|text| self.accept(text, depot, hosts)) {
            Ok(()) => {}
            Err(error) => {
                let reason = format!("{error:#}");
                if self.standing.error.as_ref() != Some(&reason) {
                    tracing::error!(path = %path.display(), %reason, "the fleet file is refused; the last good one stays in force");
                }
                self.standing.error = Some(reason);
            }
        }
        self.standing != before
    }

    /// Whether the file is the one that `gateway fleet apply` put there whole.
    fn is_applied(&self) -> bool {
        let Ok(Some(applied)) = store::read(&self.place.applied_fleet(), MAX_APPLIED_BYTES) else { return false };
        let text = store::read(&self.place.fleet(), MAX_FILE_BYTES);
        text.ok().flatten().is_some_and(|text| content_of(&text).as_bytes() == applied.trim_ascii())
    }

    fn accept(&mut self, text: Option<String>, depot: &Index, hosts: impl FnOnce() -> Vec<HostFacts>) -> Result<()> {
        let Some(text) = text else { bail!("there is no file {}", self.place.fleet().display()) };
        if self.in_force.as_ref().is_some_and(|in_force| *in_force.text == *text) {
            self.standing.error = None;
            return Ok(());
        }
        let fleet = parse(&text)?;
        let last_good = self.in_force.as_ref().map(|in_force| &*in_force.fleet);
        let hosts = if last_good.is_some() { hosts() } else { Vec::new() };
        evaluate(&fleet, last_good, &hosts, |name, version| depot.has(name, version))?;
        let text: Arc<str> = text.into();
        self.last_good.put(text.clone());
        self.lost = None;
        let generation = now_millis().max(self.standing.generation.map_or(0, |last| last + 1));
        tracing::info!(
            generation,
            agents = fleet.names().len(),
            rules = fleet.rules.len(),
            "the fleet file is in force"
        );
        self.put_in_force(fleet, text, generation);
        Ok(())
    }

    fn put_in_force(&mut self, fleet: Fleet, text: Arc<str>, generation: u64) {
        let (agents, rules) = (fleet.names().len(), fleet.rules.len());
        let interval = fleet.interval.as_secs();
        let content = Some(content_of(text.as_bytes()));
        self.standing = FleetFileStatus { generation: Some(generation), interval, agents, rules, content, error: None };
        self.in_force = Some(ActiveFleet { text, fleet: Arc::new(fleet) });
    }
}

pub(super) fn read_text(path: &std::path::Path) -> Result<Option<String>> {
    let Some(bytes) = store::read(path, MAX_FILE_BYTES)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))
}

/// SHA-256 of a fleet file's text.
pub(super) fn content_of(text: &[u8]) -> String {
    hex(&Sha256::digest(text))
}

/// Parses the file; an error names the line in one line of its own, for logs and tables.
pub(super) fn parse(text: &str) -> Result<Fleet> {
    toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", config::wrong_line(text, &error)))
}

/// The lineage of this gateway's generations, made once and kept for good; and why it could not be, so that it lasts for this run alone.
pub(super) fn lineage(place: &GatewayDirectory) -> (String, Option<String>) {
    let kept = kept_lineage(place);
    kept.unwrap_or_else(|error| {
        let why = format!(
            "the lineage of the generations is not kept, and hosts take this gateway for another one after its next start: {error:#}"
        );
        (uuid::Uuid::new_v4().to_string(), Some(why))
    })
}

fn kept_lineage(place: &GatewayDirectory) -> Result<(String, Option<String>)> {
    let path = place.lineage();
    match fs::read_to_string(&path) {
        Ok(text) => match uuid::Uuid::parse_str(text.trim()) {
            Ok(lineage) => return Ok((lineage.to_string(), None)),
            Err(_) => tracing::warn!(path = %path.display(), "the lineage cannot be read; a new one begins"),
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
        place: GatewayDirectory,
        file: FleetFile,
    }

    impl Bench {
        fn new() -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let place = GatewayDirectory::new(dir.path());
            fs::create_dir(place.state()).unwrap();
            Bench { file: FleetFile::open(place.clone(), Duration::ZERO).unwrap(), place, _dir: dir }
        }

        fn write(&self, text: &str) {
            store::replace(&self.place.fleet(), text.as_bytes(), Access::Public).unwrap();
        }

        fn settle(&mut self) {
            for _ in 0..3 {
                self.file.look(&Index::default(), false, false, Vec::new);
            }
            self.file.last_good.flush();
        }

        fn interval(&self) -> Option<u64> {
            self.file.in_force().map(|fleet| fleet.interval.as_secs())
        }
    }

    #[test]
    fn a_file_counts_only_when_it_has_stood_still_or_was_applied_whole() {
        let mut bench = Bench::new();
        bench.file = FleetFile::open(bench.place.clone(), Duration::from_secs(3_600)).unwrap();
        let look = |bench: &mut Bench| bench.file.look(&Index::default(), false, false, Vec::new);
        bench.write("heartbeatInterval = 1");
        assert!(!look(&mut bench) && !look(&mut bench));
        let applied = content_of(b"heartbeatInterval = 2");
        fs::write(bench.place.applied_fleet(), format!("{applied}\n")).unwrap();
        assert!(!look(&mut bench), "another one is");
        bench.write("heartbeatInterval = 2");
        assert!(look(&mut bench) && !look(&mut bench));
        assert_eq!((bench.interval(), bench.file.standing().content.as_ref()), (Some(2), Some(&applied)));
        // Or when an operator says so.
        bench.write("heartbeatInterval = 3");
        assert!(!look(&mut bench));
        assert!(bench.file.look(&Index::default(), false, true, Vec::new));
        assert_eq!(bench.interval(), Some(3));
    }

    #[test]
    fn the_last_good_one_stays_whatever_becomes_of_the_file() {
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
            assert!(bench.file.standing().error.as_ref().unwrap().contains(reason), "{:?}", bench.file.standing());
        }
        fs::remove_file(bench.place.fleet()).unwrap();
        bench.settle();
        assert!(bench.file.standing().error.as_ref().unwrap().contains("there is no file"));

        // Also after a restart; and the file in force, put back, is good again.
        let generation = bench.file.standing().generation;
        bench.file = FleetFile::open(bench.place.clone(), Duration::ZERO).unwrap();
        assert_eq!(bench.interval(), Some(7));
        bench.write("heartbeatInterval = 7");
        bench.settle();
        assert_eq!(bench.file.standing().error, None);
        assert!(bench.file.standing().generation >= generation.map(|millis| millis - 1_000));
    }

    #[test]
    fn a_lineage_is_made_once() {
        let bench = Bench::new();
        let first = lineage(&bench.place).0;
        assert_eq!(lineage(&bench.place).0, first);
        fs::write(bench.place.lineage(), "what").unwrap();
        assert_ne!(lineage(&bench.place).0, first);
    }
}
