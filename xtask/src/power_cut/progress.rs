//! How far the upgrades in a guest are: the phases that `progress.sh` writes to the console, and how long each of them usually takes.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is upgraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Change {
    Manager,
    SubAgent,
}

pub(super) const CHANGES: [Change; 2] = [Change::Manager, Change::SubAgent];

/// A phase of an upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Phase {
    pub(super) change: Change,
    /// Its position in [`Change::phases`].
    number: usize,
}

impl Change {
    /// In their order; before the first nothing is seen of an order, in the last nothing is left to do.
    const fn phases(self) -> &'static [&'static str] {
        match self {
            Change::Manager => &[
                "ordered",
                "fetching",
                "unpacking",
                "switching",
                "trial",
                "proof",
                "committing",
                "rollingBack",
                "done",
            ],
            Change::SubAgent => &["ordered", "fetching", "unpacking", "stopping", "starting", "probation", "done"],
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Change::Manager => "self-upgrade",
            Change::SubAgent => "sub-agent",
        }
    }

    fn ordered(self) -> Phase {
        Phase { change: self, number: 0 }
    }

    fn done(self) -> Phase {
        Phase { change: self, number: self.phases().len() - 1 }
    }
}

impl Phase {
    /// Each phase in which the power is cut. A roll back has no place in an upgrade that only a cut disturbs.
    pub(super) fn targets() -> Vec<Phase> {
        let all = CHANGES
            .into_iter()
            .flat_map(|change| (1..change.phases().len()).map(move |number| Phase { change, number }));
        all.filter(|phase| phase.word() != "rollingBack").collect()
    }

    fn word(self) -> &'static str {
        self.change.phases()[self.number]
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.change.name(), self.word())
    }
}

/// Follows the console of one machine.
pub(super) struct Progress {
    console: PathBuf,
    /// What was read of it.
    offset: u64,
    partial: String,
    now: BTreeMap<Change, (Phase, Instant)>,
    /// What the last line says of each change.
    last: BTreeMap<Change, String>,
    usual: BTreeMap<Phase, Duration>,
}

/// The first phases in which another release becomes the one that runs.
const SWITCHES: [&str; 2] = ["switching", "stopping"];
/// What `progress.sh` writes without an upgrade.
const IDLE: &str = "idle";
/// Phases of several seconds, and all others; until they were seen once.
const LONG: [&str; 2] = ["trial", "proof"];
const LONG_USUALLY: Duration = Duration::from_secs(8);
const SHORT_USUALLY: Duration = Duration::from_secs(2);

impl Progress {
    pub(super) fn of(console: &Path) -> Progress {
        Progress {
            console: console.to_owned(),
            offset: 0,
            partial: String::new(),
            now: BTreeMap::new(),
            last: BTreeMap::new(),
            usual: BTreeMap::new(),
        }
    }

    /// The console is that of a new boot.
    pub(super) fn restart(&mut self) {
        self.offset = 0;
        self.partial.clear();
        self.now.clear();
        self.last.clear();
    }

    /// Whether the guest has shown that nothing is upgraded. It may show it later than the manager reports it.
    pub(super) fn is_idle(&mut self) -> bool {
        self.read();
        CHANGES.iter().all(|change| self.last.get(change).is_some_and(|word| word == IDLE))
    }

    /// An upgrade is about to be ordered.
    pub(super) fn begin(&mut self, change: Change) {
        self.now.insert(change, (change.ordered(), Instant::now()));
    }

    /// The phase in which an ordered upgrade is.
    pub(super) fn phase(&mut self, change: Change) -> Phase {
        self.read();
        self.now.get(&change).map_or(change.ordered(), |(phase, _)| *phase)
    }

    /// How long a phase took in the last upgrade that had it.
    pub(super) fn usual(&self, phase: Phase) -> Duration {
        let first = if LONG.contains(&phase.word()) { LONG_USUALLY } else { SHORT_USUALLY };
        self.usual.get(&phase).copied().unwrap_or(first)
    }

    fn read(&mut self) {
        let mut new = Vec::new();
        let read = std::fs::File::open(&self.console).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.offset))?;
            file.read_to_end(&mut new)
        });
        // Without a console nothing has happened.
        self.offset += read.unwrap_or(0) as u64;
        self.partial.push_str(&String::from_utf8_lossy(&new));
        while let Some((line, rest)) = self.partial.split_once('\n') {
            let (line, rest) = (line.trim().to_owned(), rest.to_owned());
            self.partial = rest;
            // systemd may have left control characters in front of it.
            if let Some((_, words)) = line.split_once("upgrades: ") {
                for (change, word) in CHANGES.into_iter().zip(words.split(' ')) {
                    self.last.insert(change, word.to_owned());
                    self.enter(change, word, Instant::now());
                }
            }
        }
    }

    fn enter(&mut self, change: Change, word: &str, at: Instant) {
        let (before, since) = self.now.get(&change).copied().unwrap_or((change.ordered(), at));
        let phase = match word {
            // Between two phases nothing may be seen; only after the last ones the upgrade is done.
            IDLE if before.number < change.phases().iter().position(|name| SWITCHES.contains(name)).unwrap_or(0) => {
                before
            }
            IDLE => change.done(),
            word => match change.phases().iter().position(|name| *name == word) {
                Some(number) => Phase { change, number },
                None => return,
            },
        };
        if phase != before {
            self.usual.insert(before, at - since);
            self.now.insert(change, (phase, at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_the_console() {
        let directory = tempfile::tempdir().unwrap();
        let console = directory.path().join("console.log");
        let mut progress = Progress::of(&console);
        assert_eq!(progress.phase(Change::Manager).to_string(), "self-upgrade: ordered");
        let mut text = "noise\n\u{1b}[!pupgrades: idle idle\r\nupgrades: fetching idle\r\n".to_owned();
        std::fs::write(&console, &text).unwrap();
        assert_eq!(progress.phase(Change::Manager).to_string(), "self-upgrade: fetching");
        assert_eq!(progress.phase(Change::SubAgent), Change::SubAgent.ordered());
        text += "upgrades: trial stopping\r\nupgrades: idle prob";
        std::fs::write(&console, &text).unwrap();
        assert_eq!(progress.phase(Change::Manager).to_string(), "self-upgrade: trial");
        assert_eq!(progress.phase(Change::SubAgent).to_string(), "sub-agent: stopping");
        std::fs::write(&console, text + "ation\r\n").unwrap();
        assert_eq!(progress.phase(Change::Manager), Change::Manager.done());
        assert!(!progress.is_idle());
        assert_eq!(progress.phase(Change::SubAgent).to_string(), "sub-agent: probation");
        progress.begin(Change::Manager);
        assert_eq!(progress.phase(Change::Manager), Change::Manager.ordered());
        assert!(progress.phase(Change::SubAgent) < Change::SubAgent.done());
    }

    #[test]
    fn the_power_is_cut_in_each_phase_of_an_undisturbed_upgrade() {
        let targets: Vec<_> = Phase::targets().iter().map(ToString::to_string).collect();
        assert_eq!(targets.len(), 13);
        assert!(targets.contains(&"self-upgrade: proof".to_owned()) && targets.contains(&"sub-agent: done".to_owned()));
        assert!(!targets.iter().any(|target| target.contains("ordered") || target.contains("rollingBack")));
    }
}
