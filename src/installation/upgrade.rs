//! The self-upgrade of the manager on disk: the record, `bin/aops` and its backup, and the links of the roles.
//!
//! [`core::upgrade`](crate::core::upgrade) decides the next step. This module reads the evidence that is on disk, and executes the steps
//! that change the disk. An [`UpgradeSession`] holds a lock, so that only one of the two roles and the installer reads or changes the
//! upgrade at a time.
//!
//! ```text
//! state/upgrade.json       the record
//! state/upgrade.reserve    reserved space, released if the disk is full during an upgrade
//! bin/aops.prev            the backup; while a new release is on trial, every role except the manager runs it
//! bin/.aops.next           a temporary file that is renamed to bin/aops or bin/aops.prev
//! ```
//!
//! Before the first step of a session, the directories are synced: the previous session may have been interrupted before it did so.

mod programs;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Epochs;
use super::executable::{self, ExecutableName};
use super::keyring::{self, KeyOffer};
use super::records::ManagerRecord;
use crate::config;
use crate::core::model::{MANAGER_PACKAGE, Version};
use crate::core::upgrade::{
    Decider, Evidence, Image, InstalledExecutable, Probe, Proof, RecordChange, RoleLinks, Trial, UpgradePhase,
    UpgradeRecord, UpgradeStep, WhichRelease,
};
use crate::home::Home;
use crate::lock::{self, LockGuard};
use crate::{platform, store};

pub use programs::{Programs, which};

/// The names that point to the backup while a new release is on trial: all except the manager's.
const ON_BACKUP: &[ExecutableName] = &[ExecutableName::Spa, ExecutableName::AgentService, ExecutableName::Control];
/// The names that point to the executable afterwards: also the manager's, where a link does not follow a replaced file.
const TO_EXECUTABLE: &[ExecutableName] = if platform::LINKS_FOLLOW { ON_BACKUP } else { ExecutableName::ALL };
/// Where names of the executable are names of one file, the backup has to be another file: else a name would lead to both.
const BACK_UP_BY: CopyMethod = if platform::LINKS_FOLLOW { CopyMethod::Link } else { CopyMethod::Copy };
/// The size of the reserve: enough for a few writes of the record and for new links.
const RESERVE_BYTES: usize = 64 << 10;

/// The evidence that is on disk. [`Evidence`] documents the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    pub executable: InstalledExecutable,
    pub backup_intact: bool,
    pub links: RoleLinks,
    pub installed: WhichRelease,
    pub stopped: bool,
}

/// The locked record of the upgrade: no other process reads or changes it.
#[derive(Debug)]
pub struct UpgradeSession {
    home: Home,
    record: UpgradeRecord,
    is_recorded: bool,
    /// The directories in which an earlier session or a failed step may have renamed what is not on the disk yet.
    unsynced: Vec<PathBuf>,
    _lock: LockGuard,
}

/// Loads the record. A record that cannot be parsed counts as an empty one, from which the roles can continue; one that cannot be read is
/// an error.
pub fn load(home: &Home) -> Result<UpgradeRecord> {
    match store::load(&home.upgrade_record()) {
        Ok(record) => Ok(record.unwrap_or_default()),
        Err(error) if error.chain().any(|cause| cause.is::<serde_json::Error>()) => {
            tracing::error!(
                error = format!("{error:#}"),
                "the record of upgrades cannot be parsed; using an empty one"
            );
            Ok(UpgradeRecord::default())
        }
        Err(error) => Err(error),
    }
}

/// The release on trial, if this process runs its program; `None`: this process runs the release in `state/manager.json`.
pub fn on_trial(record: &UpgradeRecord, programs: &mut Programs) -> Option<Image> {
    let trial = record.trial()?;
    let own = programs.of_process(std::process::id(), None);
    let is_accepted = matches!(trial.phase, UpgradePhase::Trial | UpgradePhase::Committing);
    let is_new = match which(trial, own.as_ref(), if is_accepted { WhichRelease::To } else { WhichRelease::From }) {
        WhichRelease::To => true,
        WhichRelease::From => false,
        // The executable may be a script, whose process runs a different program. The previous release is identified by its bytes.
        WhichRelease::Other => is_accepted,
    };
    is_new.then(|| trial.to.clone())
}

/// Removes what an upgrade left whose last step was interrupted, unless an upgrade is under way.
pub fn sweep(home: &Home) {
    let left = || [home.upgrade_reserve(), home.next_executable()].into_iter().filter(|path| path.exists());
    if left().next().is_none() {
        return;
    }
    // A process with the lock removes them, too, or needs them.
    if let Ok(Some(session)) = UpgradeSession::open(home, Duration::ZERO)
        && session.record().trial().is_none()
    {
        left().for_each(|path| drop(store::remove(&path)));
    }
}

impl UpgradeSession {
    /// Locks and loads the record; `None`: another process still holds the lock after `timeout`.
    pub fn open(home: &Home, timeout: Duration) -> Result<Option<UpgradeSession>> {
        let Some(lock) = lock::take(&home.upgrade_lock(), timeout)? else { return Ok(None) };
        executable::complete_replacements(home);
        Ok(Some(UpgradeSession {
            home: home.clone(),
            record: load(home)?,
            is_recorded: true,
            unsynced: directories(home),
            _lock: lock,
        }))
    }

    pub fn record(&self) -> &UpgradeRecord {
        &self.record
    }

    /// Begins an upgrade in memory. Its first step writes the record.
    pub fn begin(
        &mut self,
        from: Image,
        to: Image,
        unix_seconds: u64,
    ) -> Result<(), crate::core::upgrade::UpgradeRefusal> {
        self.record.begin(from, to)?;
        self.record.begun_at(unix_seconds);
        self.is_recorded = false;
        Ok(())
    }

    /// Changes the record and writes it; if that fails, the change is undone.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut UpgradeRecord) -> T) -> Result<T> {
        let before = self.record.clone();
        let result = change(&mut self.record);
        if self.record != before
            && let Err(error) = self.write()
        {
            self.record = before;
            return Err(error);
        }
        Ok(result)
    }

    /// Reads the evidence on disk.
    pub fn placement(&self, programs: &mut Programs) -> Result<Placement> {
        let home = &self.home;
        let trial = self.record.trial();
        let (executable, backup) = (home.executable(), home.backup_executable());
        let (placed, backup_intact, installed) = match trial {
            Some(trial) => {
                let placed = InstalledExecutable::of(trial, programs.at(&executable)?.as_ref());
                let is_whole = platform::is_executable(&backup)
                    && programs.at(&backup)?.is_some_and(|digest| digest == trial.from.executable);
                (placed, is_whole, installed(trial, ManagerRecord::load(home)?.as_ref()))
            }
            None => {
                let placed =
                    if executable.exists() { InstalledExecutable::Neither } else { InstalledExecutable::Missing };
                (placed, platform::is_executable(&backup), WhichRelease::Other)
            }
        };
        Ok(Placement {
            executable: placed,
            backup_intact,
            links: self.links()?,
            installed,
            stopped: home.stop_intent().exists(),
        })
    }

    /// The evidence on disk for a decision of [`core::upgrade`](crate::core::upgrade); the evidence about the roles is empty.
    pub fn evidence(&self, decider: Decider, programs: &mut Programs) -> Result<Evidence> {
        let Placement { executable, backup_intact, links, installed, stopped } = self.placement(programs)?;
        Ok(Evidence {
            decider,
            recorded: self.is_recorded,
            executable,
            backup_intact,
            links,
            installed,
            stopped,
            staged: false,
            manager: None,
            watchdog: None,
            died: false,
            found_running_manager: false,
            probe: Probe::NotAsked,
            proof: Proof::NotBegun,
        })
    }

    fn links(&self) -> Result<RoleLinks> {
        let home = &self.home;
        let all_lead_to = |image: &Path| -> Result<bool> {
            for name in ON_BACKUP {
                let link = name.path(home);
                if !platform::points_to(&link, image).with_context(|| format!("cannot read {}", link.display()))? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        Ok(if all_lead_to(&home.executable())? {
            RoleLinks::Executable
        } else if all_lead_to(&home.backup_executable())? {
            RoleLinks::Backup
        } else {
            RoleLinks::Mixed
        })
    }

    /// Executes a step that changes the disk; `false`: the step is for a role. `staged`: the new executable, for the switch.
    pub fn carry_out(&mut self, step: UpgradeStep, staged: Option<&Path>) -> Result<bool> {
        let changes_disk = matches!(
            step,
            UpgradeStep::Save
                | UpgradeStep::Record(_)
                | UpgradeStep::BackUp
                | UpgradeStep::LinkToBackup
                | UpgradeStep::Swap
                | UpgradeStep::Restore
                | UpgradeStep::LinkToExecutable
                | UpgradeStep::RecordRelease(_)
        );
        if !changes_disk {
            return Ok(false);
        }
        let outcome = self.attempt(step, staged);
        let outcome = match outcome {
            Err(error) if is_full(&error) && self.release_reserve() => self.attempt(step, staged),
            outcome => outcome,
        };
        outcome.with_context(|| format!("cannot execute the step {step:?} of the manager's upgrade"))?;
        tracing::info!(step = format!("{step:?}"), "executed a step of the manager's upgrade");
        Ok(true)
    }

    fn attempt(&mut self, step: UpgradeStep, staged: Option<&Path>) -> Result<()> {
        while let Some(directory) = self.unsynced.last() {
            platform::sync_directory(directory).with_context(|| format!("cannot sync {}", directory.display()))?;
            self.unsynced.pop();
        }
        let outcome = self.execute(step, staged);
        if outcome.is_err() {
            self.unsynced = directories(&self.home);
        }
        outcome
    }

    fn execute(&mut self, step: UpgradeStep, staged: Option<&Path>) -> Result<()> {
        let home = self.home.clone();
        match step {
            UpgradeStep::Save => {
                self.reserve()?;
                self.write()
            }
            UpgradeStep::Record(change) => self.apply(change),
            UpgradeStep::BackUp => {
                self.change(UpgradeRecord::forget_previous)?;
                copy(&home, &home.executable(), &home.backup_executable(), BACK_UP_BY)
            }
            UpgradeStep::LinkToBackup => executable::point(&home, ON_BACKUP, &home.backup_executable()),
            UpgradeStep::LinkToExecutable => executable::point(&home, TO_EXECUTABLE, &home.executable()),
            UpgradeStep::Swap => {
                let staged = staged.context("the staged executable is missing")?;
                let next = home.next_executable();
                platform::rename(staged, &next)
                    .with_context(|| format!("cannot move {} to {}", staged.display(), next.display()))?;
                executable::replace(&home, &next)
            }
            UpgradeStep::Restore => copy(&home, &home.backup_executable(), &home.executable(), CopyMethod::Copy),
            UpgradeStep::RecordRelease(which) => self.record_release(which),
            _ => Ok(()),
        }
    }

    fn apply(&mut self, change: RecordChange) -> Result<()> {
        self.change(|record| record.apply_and_keep(change))?;
        if self.record.trial().is_none() {
            // A file that cannot be removed is replaced by the next upgrade.
            let _ = store::remove(&self.home.upgrade_reserve());
            let _ = store::remove(&self.home.next_executable());
        }
        Ok(())
    }

    fn record_release(&mut self, which: WhichRelease) -> Result<()> {
        let Some(trial) = self.record.trial() else { return Ok(()) };
        let image = if which == WhichRelease::To { &trial.to } else { &trial.from };
        if which == WhichRelease::To {
            Epochs::commit(&self.home, MANAGER_PACKAGE, image.epoch)?;
            self.apply_keys(&image.version, &image.brings, &image.revokes);
            if let Some(endpoint) = &image.endpoint
                && let Err(error) = config::new_endpoint::commit(&self.home, endpoint)
            {
                tracing::error!(
                    error = format!("{error:#}"),
                    "cannot save the endpoint from the release's etc/endpoint.toml"
                );
            }
        }
        let unknown = ManagerRecord::load(&self.home).ok().flatten().map(|manager| manager.unknown).unwrap_or_default();
        let Image { version, sha256, epoch, file, .. } = image.clone();
        ManagerRecord { version, sha256, epoch, file, unknown }.save(&self.home)
    }

    /// Applies the keys of the release, which were checked when it was staged. A failure is logged, and does not prevent the commit.
    fn apply_keys(&self, version: &Version, brings: &[String], revokes: &[String]) {
        if brings.is_empty() && revokes.is_empty() {
            return;
        }
        match KeyOffer::of_texts(version, brings, revokes).and_then(|offer| keyring::apply_offer(&self.home, &offer)) {
            Ok(remarks) => remarks.iter().for_each(|remark| tracing::warn!(remark, "the trusted keys changed")),
            Err(error) => tracing::error!(error = format!("{error:#}"), "cannot apply the keys of the release"),
        }
    }

    fn write(&mut self) -> Result<()> {
        let path = self.home.upgrade_record();
        match store::save(&path, &self.record) {
            Err(error) if is_full(&error) && self.release_reserve() => store::save(&path, &self.record)?,
            outcome => outcome?,
        }
        self.is_recorded = true;
        self.unsynced.retain(|directory| *directory != self.home.state());
        Ok(())
    }

    /// Its sync makes the file system allocate the space now. Nothing reads the file, so it need not survive a power cut.
    fn reserve(&self) -> Result<()> {
        let path = self.home.upgrade_reserve();
        let attempt = || -> std::io::Result<()> {
            let mut file = platform::open_private(&path)?;
            file.write_all(&[0xA5; RESERVE_BYTES])?;
            file.sync_data()
        };
        attempt()
            .with_context(|| format!("cannot write {}", path.display()))
            .context("not enough disk space for an upgrade; free some space")
    }

    /// Releases the reserved space; `false`: there was none.
    fn release_reserve(&self) -> bool {
        let is_released = fs::remove_file(self.home.upgrade_reserve()).is_ok();
        if is_released {
            tracing::warn!("the disk is full; the upgrade continues in its reserved space");
        }
        is_released
    }
}

/// The directories that the steps change.
fn directories(home: &Home) -> Vec<PathBuf> {
    vec![home.state(), home.root().to_owned(), home.bin()]
}

fn installed(trial: &Trial, manager: Option<&ManagerRecord>) -> WhichRelease {
    let Some(manager) = manager else { return WhichRelease::Other };
    let is = |image: &Image| image.version == manager.version && image.sha256 == manager.sha256;
    match (is(&trial.from), is(&trial.to)) {
        (true, _) => WhichRelease::From,
        (false, true) => WhichRelease::To,
        (false, false) => WhichRelease::Other,
    }
}

/// How an executable is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyMethod {
    /// A hard link, which takes no space; a copy if the file system has no hard links.
    Link,
    /// A copy, so that damage to one file does not affect the other; a hard link if the disk is full.
    Copy,
}

/// Replaces `to` with a copy of `from`, atomically and synced to disk.
fn copy(home: &Home, from: &Path, to: &Path, method: CopyMethod) -> Result<()> {
    let next = home.next_executable();
    let attempt = || -> Result<()> {
        store::remove(&next)?;
        let linked = || fs::hard_link(from, &next).map_err(anyhow::Error::from);
        match method {
            CopyMethod::Link => linked().or_else(|_| copied(from, &next))?,
            CopyMethod::Copy => copied(from, &next).or_else(|error| {
                tracing::warn!(error = format!("{error:#}"), "cannot copy an executable; linking it instead");
                store::remove(&next)?;
                linked()
            })?,
        }
        platform::replace_executable(&next, to)?;
        platform::sync_directory(&home.bin())?;
        // Renaming a hard link to another link of the same file does nothing.
        store::remove(&next)
    };
    attempt().with_context(|| format!("cannot replace {} with {}", to.display(), from.display()))
}

fn copied(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from)?;
    let mut target = platform::create_file(to, 0o755)?;
    std::io::copy(&mut source, &mut target)?;
    target.flush()?;
    platform::set_mode(to, 0o755)?;
    Ok(target.sync_all()?)
}

fn is_full(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind));
    kinds.into_iter().any(|kind| matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
}

#[cfg(test)]
mod tests;
