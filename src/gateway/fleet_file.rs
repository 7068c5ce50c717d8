//! `fleet.toml` as it is watched: read when it has changed and stood still, judged, and put in force or refused with a reason.
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

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::behind::Behind;
use super::depot::{Index, Stamp};
use super::{Place, now_millis};
use crate::config;
use crate::core::fleet::{Fleet, HostFacts, MAX_FILE_BYTES, judge};
use crate::platform;
use crate::store::{self, Access};

/// How the fleet file stands, for an operator to read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Standing {
    /// When the one in force was accepted, unix milliseconds; it numbers it too.
    pub(super) generation: Option<u64>,
    /// Seconds from one heartbeat to the next.
    pub(super) interval: u64,
    /// How many sub-agents it names.
    pub(super) agents: usize,
    /// How many rules it has.
    pub(super) rules: usize,
    /// Why the file that is there now is not in force.
    pub(super) error: Option<String>,
}

/// The file, and what is in force.
pub(super) struct FleetFile {
    place: Place,
    /// The file at the last look; `None`: it was not there.
    last: Option<Option<Stamp>>,
    /// The file that was judged last.
    judged: Option<Option<Stamp>>,
    in_force: Option<InForce>,
    standing: Standing,
    /// Keeps the text of what is in force.
    last_good: Behind<Arc<str>>,
}

struct InForce {
    text: Arc<str>,
    fleet: Arc<Fleet>,
}

impl FleetFile {
    /// Begins with the last good one, if there is any.
    pub(super) fn open(place: Place) -> Result<FleetFile> {
        let path = place.last_good_fleet();
        let kept = path.clone();
        let last_good = Behind::start("the last good fleet file", move |text: &Arc<str>| {
            store::replace(&kept, text.as_bytes(), Access::Private)
        })?;
        let standing = Standing::default();
        let mut file = FleetFile { place, last: None, judged: None, in_force: None, standing, last_good };
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
                let reason = format!("{error:#}");
                tracing::error!(path = %path.display(), %reason, "the last good fleet file cannot be read");
            }
        }
        Ok(file)
    }

    pub(super) fn in_force(&self) -> Option<Arc<Fleet>> {
        self.in_force.as_ref().map(|in_force| in_force.fleet.clone())
    }

    pub(super) fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Whether the file that is there now has been judged.
    pub(super) fn is_settled(&self) -> bool {
        self.judged.is_some() && self.judged == self.last
    }

    /// Looks once; `true` where something has changed: what is in force, or why the file is not.
    /// Why the last good fleet is not on disk, so that a gateway that starts again would not know it.
    pub(super) fn unwritten(&self) -> Option<String> {
        self.last_good.failure()
    }

    pub(super) fn look(&mut self, depot: &Index, depot_changed: bool, hosts: impl FnOnce() -> Vec<HostFacts>) -> bool {
        let path = self.place.fleet();
        let stamp = fs::metadata(&path).ok().map(|metadata| Stamp::of(&metadata));
        let stands_still = self.last == Some(stamp);
        self.last = Some(stamp);
        let again = depot_changed && self.standing.error.is_some();
        if !stands_still || (self.judged == Some(stamp) && !again) {
            return false;
        }
        let text = read_text(&path);
        // Somebody wrote between the look and the reading: what was read may be half of it.
        if fs::metadata(&path).ok().map(|metadata| Stamp::of(&metadata)) != stamp {
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

    fn accept(&mut self, text: Option<String>, depot: &Index, hosts: impl FnOnce() -> Vec<HostFacts>) -> Result<()> {
        let Some(text) = text else { bail!("there is no file {}", self.place.fleet().display()) };
        if self.in_force.as_ref().is_some_and(|in_force| *in_force.text == *text) {
            self.standing.error = None;
            return Ok(());
        }
        let fleet = parse(&text)?;
        let last_good = self.in_force.as_ref().map(|in_force| &*in_force.fleet);
        let hosts = if last_good.is_some() { hosts() } else { Vec::new() };
        judge(&fleet, last_good, &hosts, |name, version| depot.has(name, version))?;
        let readable = fs::metadata(self.place.fleet()).is_ok_and(|metadata| platform::others_may_read(&metadata));
        if readable && fleet.has_secrets() {
            let path = self.place.fleet();
            tracing::warn!(path = %path.display(), "the fleet file holds secrets, and others can read it; run `chmod 600` on it");
        }
        let text: Arc<str> = text.into();
        self.last_good.put(text.clone());
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
        self.standing = Standing { generation: Some(generation), interval, agents, rules, error: None };
        self.in_force = Some(InForce { text, fleet: Arc::new(fleet) });
    }
}

fn read_text(path: &std::path::Path) -> Result<Option<String>> {
    let Some(bytes) = store::read(path, MAX_FILE_BYTES)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))
}

/// Parses the file; an error names the line in one line of its own, for logs and tables.
fn parse(text: &str) -> Result<Fleet> {
    toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", config::wrong_line(text, &error)))
}

/// The lineage of this gateway's generations: made once, kept for good.
pub(super) fn lineage(place: &Place) -> Result<String> {
    let path = place.lineage();
    match fs::read_to_string(&path) {
        Ok(text) => match uuid::Uuid::parse_str(text.trim()) {
            Ok(lineage) => return Ok(lineage.to_string()),
            Err(_) => tracing::warn!(path = %path.display(), "the lineage cannot be read; a new one begins"),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let lineage = uuid::Uuid::new_v4().to_string();
    store::replace(&path, format!("{lineage}\n").as_bytes(), Access::Private)?;
    Ok(lineage)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        _dir: tempfile::TempDir,
        place: Place,
        file: FleetFile,
    }

    impl Bench {
        fn new() -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let place = Place::new(dir.path());
            fs::create_dir(place.state()).unwrap();
            Bench { file: FleetFile::open(place.clone()).unwrap(), place, _dir: dir }
        }

        fn write(&self, text: &str) {
            store::replace(&self.place.fleet(), text.as_bytes(), Access::Public).unwrap();
        }

        fn settle(&mut self) {
            for _ in 0..3 {
                self.file.look(&Index::default(), false, Vec::new);
            }
            self.file.last_good.flush();
        }

        fn interval(&self) -> Option<u64> {
            self.file.in_force().map(|fleet| fleet.interval.as_secs())
        }
    }

    #[test]
    fn a_file_counts_only_when_two_looks_found_it_the_same() {
        let mut bench = Bench::new();
        bench.write("heartbeatInterval = 1");
        assert!(!bench.file.look(&Index::default(), false, Vec::new));
        bench.write("heartbeatInterval = 2");
        assert!(!bench.file.look(&Index::default(), false, Vec::new));
        assert_eq!(bench.interval(), None);
        assert!(bench.file.look(&Index::default(), false, Vec::new));
        assert_eq!(bench.interval(), Some(2));
        assert!(!bench.file.look(&Index::default(), false, Vec::new));
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
        bench.file = FleetFile::open(bench.place.clone()).unwrap();
        assert_eq!(bench.interval(), Some(7));
        bench.write("heartbeatInterval = 7");
        bench.settle();
        assert_eq!(bench.file.standing().error, None);
        assert!(bench.file.standing().generation >= generation.map(|millis| millis - 1_000));
    }

    #[test]
    fn a_lineage_is_made_once() {
        let bench = Bench::new();
        let first = lineage(&bench.place).unwrap();
        assert_eq!(lineage(&bench.place).unwrap(), first);
        fs::write(bench.place.lineage(), "what").unwrap();
        assert_ne!(lineage(&bench.place).unwrap(), first);
    }
}
