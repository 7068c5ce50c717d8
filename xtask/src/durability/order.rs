//! What each act depends on: the orders of DESIGN's upgrades, installation, stop and removal.

use std::path::{Path, PathBuf};

use super::checker::Checker;
use super::disk::{Item, has_name};
use super::layout::{INSTALL_JOURNAL, INSTALL_RECORD};
use super::records::Record;
use super::rule::Rule;
use crate::trace::Change;

const LEDGER: &str = "state/releases.json";
const UPGRADE: &str = "state/upgrade.json";
const DESIRED: &str = "state/desired.json";
const STOPPED: &str = "state/stopped.json";
const MANAGER_PACKAGE: &str = "aops-spm";

/// The names of every role but the manager's: while a new release is on trial they lead to the backup, so that the old program evaluates it.
const ON_BACKUP: [&str; 3] = ["bin/aops-spa", "bin/aops-agent-service", "control"];

/// SIGTERM, which asks a sub-agent to stop. SIGKILL follows it, or removes what an exit has left.
const STOP_SIGNAL: i32 = 15;

impl Checker<'_> {
    /// Checks what an event that is about to happen depends on.
    pub(super) fn check_order(&mut self, index: usize) {
        let event = &self.events[index];
        match event.change() {
            Change::Rename { from, to } => self.check_rename(index, from, to),
            Change::Open { path, creates: true, .. } if self.layout.downloaded(path).is_some() => {
                self.check_download(index, path);
            }
            Change::Open { path, creates: true, .. } | Change::Open { path, truncates: true, .. } => {
                self.check_in_place(index, path);
            }
            Change::Write(path) => self.check_in_place(index, path),
            Change::Remove(path) => self.check_removal(index, path),
            Change::Signal { signal: STOP_SIGNAL, .. } => self.check_stop(index),
            _ => {}
        }
    }

    fn check_in_place(&mut self, index: usize, path: &Path) {
        if self.layout.is_lasting(path) && has_name(path) {
            self.count(Rule::ReplacedByRename);
            self.find(Rule::ReplacedByRename, index, path, "a reader, or a power cut, may meet it half-written");
        }
    }

    fn check_rename(&mut self, index: usize, from: &Path, to: &Path) {
        if !self.layout.is_lasting(to) {
            return;
        }
        self.count(Rule::ReplacedByRename);
        // A release's tree is checked when `.complete` follows.
        let is_release = self.layout.release_file(&to.join("x")).is_some_and(|file| file.directory == to);
        if !is_release {
            if let Some(content) = self.disk.content_of(from) {
                self.require(Rule::ContentBeforeRename, index, &content, to);
            }
            for item in self.disk.items_in(from, Path::new("")) {
                self.require(Rule::ContentBeforeRename, index, &item, to);
            }
        }
        if let Some(target) = self.disk.target(from, to) {
            self.check_target(index, to, &target);
        }
        if let Some(release) = self.layout.release_file(to).filter(|file| file.is_complete_mark) {
            for item in self.disk.items_in(&release.directory, from) {
                self.require(Rule::TreeBeforeComplete, index, &item, &release.directory);
            }
        }
        if let Some(agent) = self.layout.current_of(to).map(str::to_owned) {
            self.check_current(index, &agent, from, to);
        }
        let inside = self.layout.inside(to).and_then(Path::to_str).unwrap_or_default().to_owned();
        match inside.as_str() {
            LEDGER => self.check_ledger(index, to),
            "bin/aops" => self.check_switch(index, to),
            "state/epochs.json" => self.check_epochs(index, to),
            "state/keys.json" | "state/manager.json" => self.check_commit(index, to),
            INSTALL_RECORD => self.check_install_record(index, to),
            INSTALL_JOURNAL => {
                let directory = to.parent().unwrap_or(to).to_owned();
                self.require(Rule::NameBeforeNextAct, index, &Item::Name(directory.clone()), &directory);
            }
            _ => {}
        }
    }

    fn check_target(&mut self, index: usize, link: &Path, target: &Path) {
        if self.layout.inside(target).is_none() {
            return;
        }
        let agent = self.layout.current_of(link).map(str::to_owned);
        match (agent, target.file_name().and_then(|name| name.to_str())) {
            (Some(agent), Some(version)) => {
                for name in self.layout.names_of_release(&agent, version) {
                    self.require_file(Rule::TargetBeforeLink, index, &name);
                }
            }
            _ => self.require_file(Rule::TargetBeforeLink, index, target),
        }
    }

    /// `current` is about to name a release.
    fn check_current(&mut self, index: usize, agent: &str, from: &Path, to: &Path) {
        let target = self.disk.target(from, to);
        let version = target.as_deref().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
        self.count(Rule::LedgerBeforeCurrent);
        let ledger = self.durable(LEDGER).map(|ledger| ledger.ledger()).unwrap_or_default();
        let releases = ledger.get(agent).cloned().unwrap_or_default();
        if releases.current() != Some(version) {
            let why = format!("the ledger on the disk has {:?} instead of {version}", releases.current());
            self.find(Rule::LedgerBeforeCurrent, index, to, why);
        }
    }

    fn check_ledger(&mut self, index: usize, to: &Path) {
        let Some(new) = self.events[index].content.as_deref().map(Record::parse) else { return };
        let before = self.written(to).unwrap_or_default().ledger();
        for (agent, releases) in new.ledger() {
            let known = before.get(&agent).map(|releases| &releases.named);
            let added = releases.named.keys().filter(|version| known.is_none_or(|known| !known.contains_key(*version)));
            for version in added {
                for name in self.layout.names_of_release(&agent, version) {
                    self.require_file(Rule::CompleteBeforeLedger, index, &name);
                }
            }
        }
    }

    /// `bin/aops` is about to be another image.
    fn check_switch(&mut self, index: usize, to: &Path) {
        if self.events[index].is_installer() {
            return;
        }
        self.count(Rule::RecordBeforeSwitch);
        let record = self.durable(UPGRADE).unwrap_or_default();
        let phase = record.phase();
        if !matches!(phase, Some("switching" | "rollingBack")) {
            let why = format!("the record on the disk has the phase {phase:?} instead of `switching` or `rollingBack`");
            self.find(Rule::RecordBeforeSwitch, index, to, why);
        }
        let backup = self.layout.at("bin/aops.prev");
        self.require_file(Rule::BackupBeforeSwitch, index, &backup);
        if phase != Some("switching") {
            return;
        }
        for link in ON_BACKUP.map(|link| self.layout.at(link)) {
            self.require(Rule::BackupBeforeSwitch, index, &Item::Name(link.clone()), &link);
            if self.disk.target(&link, &link).is_some_and(|target| target != backup) {
                self.find(Rule::BackupBeforeSwitch, index, &link, "it does not lead to the backup");
            }
        }
    }

    fn check_epochs(&mut self, index: usize, to: &Path) {
        if self.events[index].is_installer() {
            return;
        }
        let Some(new) = self.events[index].content.as_deref().map(Record::parse) else { return };
        let before = self.written(to).unwrap_or_default().epochs();
        for (name, epoch) in new.epochs() {
            if before.get(&name).is_some_and(|before| *before >= epoch) {
                continue;
            }
            if name == MANAGER_PACKAGE {
                self.check_commit(index, to);
                continue;
            }
            self.count(Rule::CommitBeforeEpochs);
            let ledger = self.durable(LEDGER).unwrap_or_default().ledger();
            let releases = ledger.get(&name).cloned().unwrap_or_default();
            let committed = releases.active.as_ref().and_then(|active| releases.named.get(active)).copied();
            if committed.is_none_or(|committed| committed < epoch) {
                let why =
                    format!("it has epoch {epoch} of {name}, but the ledger on the disk has committed {committed:?}");
                self.find(Rule::CommitBeforeEpochs, index, to, why);
            }
        }
    }

    /// Epoch, keys or release of the manager are about to count.
    fn check_commit(&mut self, index: usize, to: &Path) {
        if self.events[index].is_installer() {
            return;
        }
        self.count(Rule::CommitBeforeEpochs);
        let record = self.durable(UPGRADE).unwrap_or_default();
        // A roll back returns to the release from before.
        let fits = match record.phase() {
            Some("committing") => true,
            Some("rollingBack") => self.layout.is(to, "state/manager.json"),
            _ => false,
        };
        if !fits {
            let why = format!("the record on the disk has the phase {:?} instead of `committing`", record.phase());
            self.find(Rule::CommitBeforeEpochs, index, to, why);
        }
    }

    fn check_install_record(&mut self, index: usize, to: &Path) {
        let process = self.events[index].call.process;
        let is_own = |name: &Path| name != to && self.layout.is_lasting(name);
        let unsaved: Vec<(Item, PathBuf)> = self
            .disk
            .unsaved()
            .filter(|(_, changed)| changed.process == process && !changed.is_removal)
            .filter_map(|(item, _)| {
                let name = match item {
                    Item::Name(name) => Some(name.as_path()),
                    // A directory whose mode is lost has that of its creation, with which the home works, too.
                    Item::Content(file) if self.disk.is_directory(*file) => None,
                    Item::Content(file) => self.disk.names_of(*file).next(),
                };
                name.filter(|name| is_own(name)).map(|name| (item.clone(), name.to_owned()))
            })
            .collect();
        self.count(Rule::InstallRecordLast);
        for (item, name) in unsaved {
            self.require(Rule::InstallRecordLast, index, &item, &name);
        }
    }

    fn check_download(&mut self, index: usize, path: &Path) {
        let Some(file) = self.layout.downloaded(path).map(str::to_owned) else { return };
        if file.starts_with(&format!("{MANAGER_PACKAGE}-")) {
            return;
        }
        self.count(Rule::DesiredBeforeAct);
        let desired = self.durable(DESIRED).unwrap_or_default();
        let is_ordered = |(name, version): (&str, &str)| file.starts_with(&format!("{name}-{version}_"));
        if !desired.desired().into_iter().any(is_ordered) {
            self.find(Rule::DesiredBeforeAct, index, path, "the desired state on the disk does not order this release");
        }
    }

    fn check_removal(&mut self, index: usize, path: &Path) {
        if let Some(agent) = self.layout.current_of(path).map(str::to_owned) {
            self.count(Rule::DesiredBeforeAct);
            if !self.durable(DESIRED).is_some_and(|desired| desired.stops(&agent)) {
                self.find(Rule::DesiredBeforeAct, index, path, "the desired state on the disk still has the sub-agent");
            }
        }
        let Some(release) = self.layout.release_file(path).filter(|file| !file.is_complete_mark) else { return };
        let complete = release.directory.join(".complete");
        if self.disk.exists(&complete) {
            self.count(Rule::CompleteRemovedFirst);
            self.find(Rule::CompleteRemovedFirst, index, path, "the release still has its .complete");
        } else {
            self.require(Rule::CompleteRemovedFirst, index, &Item::Name(complete.clone()), &complete);
        }
    }

    /// A sub-agent is about to be stopped: a reason is on the disk.
    fn check_stop(&mut self, index: usize) {
        let event = &self.events[index];
        let Some(agent) = event.agent.clone() else { return };
        let place = self.layout.at("agents").join(&agent.name);
        let stopped = self.layout.at(STOPPED);
        if self.disk.exists(&stopped) {
            return self.require_file(Rule::IntentBeforeStop, index, &stopped);
        }
        self.count(Rule::LedgerBeforeStop);
        if self.durable(DESIRED).is_some_and(|desired| desired.stops(&agent.name)) {
            return;
        }
        let ledger = self.durable(LEDGER).unwrap_or_default().ledger();
        let releases = ledger.get(&agent.name).cloned().unwrap_or_default();
        if releases.current().is_none_or(|current| current == agent.version) {
            let why = format!(
                "it runs {}, which is still the current release in the ledger on the disk ({:?})",
                agent.version,
                releases.current()
            );
            self.find(Rule::LedgerBeforeStop, index, &place, why);
        } else if releases.probation.is_some() && releases.active.is_none() {
            self.find(Rule::LedgerBeforeStop, index, &place, "the ledger on the disk names no release to roll back to");
        }
    }
}
