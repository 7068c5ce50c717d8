//! The manager's upgrade of itself, on disk: the record, `bin/aops` and its backup, and the links of the roles.
//!
//! What the next step is decides [`core::upgrade`](crate::core::upgrade). Here is what it is decided by, as far as the disk tells, and the
//! steps that change the disk. A [`UpgradeSession`] holds a lock while it lasts, so that of the two roles and the installer one looks or acts at
//! a time.
//!
//! ```text
//! state/upgrade.json       the record
//! state/upgrade.reserve    space that is given up when the disk is full in the middle of an upgrade
//! bin/aops.prev            the backup; while a new release is on trial, every role but the manager runs it
//! bin/.aops.next           an executable on its way to bin/aops or bin/aops.prev
//! ```
//!
//! Before each step what an earlier one may have left is synced, since an interrupted one may not have come to that.

mod programs;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;
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
use crate::store::Access;
use crate::{platform, store};

pub use programs::{Programs, which};

/// The names that are led to the backup while a new release is on trial: all but the manager's.
const MOVED: &[ExecutableName] = &[ExecutableName::Spa, ExecutableName::AgentService, ExecutableName::Control];
/// Given up when the disk is full: enough for a few writes of the record and for new links.
const RESERVE_BYTES: usize = 64 << 10;

/// What the disk tells. What it means is said at [`Evidence`](crate::core::upgrade::Evidence).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    pub executable: InstalledExecutable,
    pub backup_whole: bool,
    pub links: RoleLinks,
    pub installed: WhichRelease,
    pub stopped: bool,
}

/// The record, while nobody else looks at it or acts by it.
#[derive(Debug)]
pub struct UpgradeSession {
    home: Home,
    record: UpgradeRecord,
    is_recorded: bool,
    _lock: LockGuard,
}

/// The record as it is on disk. One that cannot be understood is as good as none, which is a state that can be gone on from; what cannot
/// be read at all is an error.
pub fn load(home: &Home) -> Result<UpgradeRecord> {
    match store::load(&home.upgrade_record()) {
        Ok(record) => Ok(record.unwrap_or_default()),
        Err(error) if error.chain().any(|cause| cause.is::<serde_json::Error>()) => {
            tracing::error!(error = format!("{error:#}"), "the record of upgrades is lost");
            Ok(UpgradeRecord::default())
        }
        Err(error) => Err(error),
    }
}

/// The release that a manager is which runs this program, where another than `state/manager.json` says: one on trial. `None`: that one.
pub fn on_trial(record: &UpgradeRecord, programs: &mut Programs) -> Option<Image> {
    let trial = record.trial()?;
    let own = programs.of_process(std::process::id());
    let is_accepted = matches!(trial.phase, UpgradePhase::Trial | UpgradePhase::Committing);
    let is_it = match which(trial, own.as_ref(), if is_accepted { WhichRelease::To } else { WhichRelease::From }) {
        WhichRelease::To => true,
        WhichRelease::From => false,
        // A script in its place runs something else; the release before is known by its bytes.
        WhichRelease::Other => is_accepted,
    };
    is_it.then(|| trial.to.clone())
}

impl UpgradeSession {
    /// Begins one; `None`: somebody else still has it after `patience`.
    pub fn open(home: &Home, patience: Duration) -> Result<Option<UpgradeSession>> {
        let Some(lock) = lock::take(&home.upgrade_lock(), patience)? else { return Ok(None) };
        Ok(Some(UpgradeSession { home: home.clone(), record: load(home)?, is_recorded: true, _lock: lock }))
    }

    pub fn record(&self) -> &UpgradeRecord {
        &self.record
    }

    /// Begins an upgrade in memory. The first step writes it.
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

    /// Changes the record otherwise than by a step, and writes it.
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

    /// What the disk tells now.
    pub fn look(&self, programs: &mut Programs) -> Result<Placement> {
        let home = &self.home;
        let trial = self.record.trial();
        let (executable, backup) = (home.executable(), home.backup_executable());
        let (placed, backup_whole, installed) = match trial {
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
            backup_whole,
            links: self.links()?,
            installed,
            stopped: home.stop_intent().exists(),
        })
    }

    /// As [`UpgradeSession::look`], for a decision: what is not of the disk is as if nothing had been observed.
    pub fn evidence(&self, asker: Decider, programs: &mut Programs) -> Result<Evidence> {
        let Placement { executable, backup_whole, links, installed, stopped } = self.look(programs)?;
        Ok(Evidence {
            asker,
            recorded: self.is_recorded,
            executable,
            backup_whole,
            links,
            installed,
            stopped,
            staged: false,
            manager: None,
            watchdog: None,
            died: false,
            took_over: false,
            probe: Probe::NotAsked,
            proof: Proof::NotBegun,
        })
    }

    fn links(&self) -> Result<RoleLinks> {
        let home = &self.home;
        let all_lead_to = |image: &Path| -> Result<bool> {
            for name in MOVED {
                let link = name.path(home);
                if !platform::leads_to(&link, image).with_context(|| format!("cannot read {}", link.display()))? {
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

    /// Carries out a step that changes the disk; `false`: it is one of the role's. `staged`: the new executable, for the switch.
    pub fn carry_out(&mut self, step: UpgradeStep, staged: Option<&Path>) -> Result<bool> {
        let is_of_the_disk = matches!(
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
        if !is_of_the_disk {
            return Ok(false);
        }
        let outcome = self.attempt(step, staged);
        let outcome = match outcome {
            Err(error) if is_full(&error) && self.give_up_reserve() => self.attempt(step, staged),
            outcome => outcome,
        };
        outcome.with_context(|| format!("cannot carry out the step {step:?} of an upgrade"))?;
        tracing::info!(step = format!("{step:?}"), "a step of the manager's upgrade");
        Ok(true)
    }

    fn attempt(&mut self, step: UpgradeStep, staged: Option<&Path>) -> Result<()> {
        let home = self.home.clone();
        for directory in [home.bin(), home.root().to_owned(), home.state()] {
            platform::sync_directory(&directory).with_context(|| format!("cannot sync {}", directory.display()))?;
        }
        match step {
            UpgradeStep::Save => {
                self.reserve()?;
                self.write()
            }
            UpgradeStep::Record(change) => self.make(change),
            UpgradeStep::BackUp => {
                self.change(UpgradeRecord::forget_previous)?;
                copy(&home, &home.executable(), &home.backup_executable(), CopyMethod::Link)
            }
            UpgradeStep::LinkToBackup => self.point(&home.backup_executable()),
            UpgradeStep::LinkToExecutable => self.point(&home.executable()),
            UpgradeStep::Swap => {
                let staged = staged.context("the new executable is not there any more")?;
                let next = home.next_executable();
                fs::rename(staged, &next).with_context(|| format!("cannot move it to {}", next.display()))?;
                executable::replace(&home, &next)
            }
            UpgradeStep::Restore => copy(&home, &home.backup_executable(), &home.executable(), CopyMethod::Copy),
            UpgradeStep::RecordRelease(which) => self.record_release(which),
            _ => Ok(()),
        }
    }

    fn point(&self, image: &Path) -> Result<()> {
        executable::point(&self.home, MOVED, image)?;
        for directory in [self.home.bin(), self.home.root().to_owned()] {
            platform::sync_directory(&directory).with_context(|| format!("cannot sync {}", directory.display()))?;
        }
        Ok(())
    }

    fn make(&mut self, change: RecordChange) -> Result<()> {
        self.change(|record| record.apply_and_keep(change))?;
        if self.record.trial().is_none() {
            // What a later upgrade sweeps, where it cannot be removed.
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
            self.take_over_keys(&image.version, &image.brings, &image.revokes);
            if let Some(endpoint) = &image.endpoint
                && let Err(error) = config::new_endpoint::commit(&self.home, endpoint)
            {
                tracing::error!(error = format!("{error:#}"), "the endpoint that the release brings is not kept");
            }
        }
        let unknown = ManagerRecord::load(&self.home).ok().flatten().map(|manager| manager.unknown).unwrap_or_default();
        let Image { version, sha256, epoch, file, .. } = image.clone();
        ManagerRecord { version, sha256, epoch, file, unknown }.save(&self.home)
    }

    /// The keys were examined when the release was staged. A failure to take them over is logged, and does not prevent the commit.
    fn take_over_keys(&self, version: &Version, brings: &[String], revokes: &[String]) {
        if brings.is_empty() && revokes.is_empty() {
            return;
        }
        match KeyOffer::of_texts(version, brings, revokes).and_then(|offer| keyring::take_over(&self.home, &offer)) {
            Ok(remarks) => remarks.iter().for_each(|remark| tracing::warn!(remark, "the trusted keys change")),
            Err(error) => tracing::error!(error = format!("{error:#}"), "the release's keys are not taken over"),
        }
    }

    fn write(&mut self) -> Result<()> {
        let path = self.home.upgrade_record();
        match store::save(&path, &self.record) {
            Err(error) if is_full(&error) && self.give_up_reserve() => store::save(&path, &self.record)?,
            outcome => outcome?,
        }
        self.is_recorded = true;
        Ok(())
    }

    fn reserve(&self) -> Result<()> {
        let path = self.home.upgrade_reserve();
        store::replace(&path, &[0xA5; RESERVE_BYTES], Access::Private)
            .context("there is no room for what an upgrade writes; free some space")
    }

    /// Whether there was one.
    fn give_up_reserve(&self) -> bool {
        let is_gone = fs::remove_file(self.home.upgrade_reserve()).is_ok();
        if is_gone {
            tracing::warn!("the disk is full: the upgrade goes on in the space that was kept for it");
        }
        is_gone
    }
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

/// How a file comes to a second name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyMethod {
    /// A link where there are any: it takes no space.
    Link,
    /// A copy, so that both can be damaged on their own; a link where there is no room for one.
    Copy,
}

/// Puts what `from` is at `to`, in one step that survives a power cut.
fn copy(home: &Home, from: &Path, to: &Path, copying: CopyMethod) -> Result<()> {
    let next = home.next_executable();
    let attempt = || -> Result<()> {
        store::remove(&next)?;
        let linked = || fs::hard_link(from, &next).map_err(anyhow::Error::from);
        match copying {
            CopyMethod::Link => linked().or_else(|_| copied(from, &next))?,
            CopyMethod::Copy => copied(from, &next).or_else(|error| {
                tracing::warn!(error = format!("{error:#}"), "an executable cannot be copied, and is linked");
                store::remove(&next)?;
                linked()
            })?,
        }
        platform::replace_executable(&next, to)?;
        platform::sync_directory(&home.bin())?;
        // Two names of one file stay two when one is renamed to the other.
        store::remove(&next)
    };
    attempt().with_context(|| format!("cannot put {} at {}", from.display(), to.display()))
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
