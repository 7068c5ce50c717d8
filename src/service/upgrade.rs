//! Finishes an upgrade of the manager that is under way when an installation starts, so that the installation replaces a known release:
//! usually by rolling it back. The upgrade's record stays locked until the new release is installed: neither role acts on it meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::progress;
use crate::core::model::Version;
use crate::core::role::Role;
use crate::core::upgrade::{Decider, Evidence, ManagerEvidence, TrialLimits, UpgradeStep, WhichRelease, next};
use crate::home::Home;
use crate::installation::upgrade::{Programs, UpgradeSession, which};
use crate::role;

/// Timeout for the lock on the record. A role holds it for one step, which may wait for a slow disk.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);
/// A guard against a loop: an upgrade has fewer steps.
const MAX_STEPS: usize = 32;

/// Finishes the upgrade that is under way, if any. Neither role acts on the record until the result is dropped.
pub(super) fn finish(home: &Home) -> Result<UpgradeSession> {
    let session =
        UpgradeSession::open(home, LOCK_TIMEOUT).context("cannot lock the record of the manager's upgrades")?;
    let mut session =
        session.context("the record of the manager's upgrades is in use by another process; try again")?;
    let mut programs = Programs::default();
    if let Some(trial) = session.record().trial() {
        progress::say(format_args!("finishing the manager's upgrade to {} that is under way", trial.to.version));
    }
    for _ in 0..MAX_STEPS {
        if session.record().trial().is_none() {
            return Ok(session);
        }
        let evidence = evidence(home, &session, &mut programs)?;
        let step = next(session.record(), &evidence, &TrialLimits::default());
        if session.carry_out(step, None)? {
            continue;
        }
        match (step, role::current_holder(home, Role::Spm)) {
            (UpgradeStep::RestartManager | UpgradeStep::KillManager, Some(manager)) => {
                manager.request_exit()?;
                manager.wait_for_exit()?;
            }
            (UpgradeStep::RestartManager | UpgradeStep::KillManager, None) => {}
            _ => bail!("cannot finish the manager's upgrade that is under way (step {step:?}); see `control status`"),
        }
    }
    bail!("cannot finish the manager's upgrade that is under way: more than {MAX_STEPS} steps; see `control status`")
}

/// Records that the installer has replaced the release: it is not skipped, and has no backup.
pub(super) fn replaced(session: &mut UpgradeSession, version: &Version) -> Result<()> {
    session.change(|record| record.replaced(version))
}

fn evidence(home: &Home, session: &UpgradeSession, programs: &mut Programs) -> Result<Evidence> {
    let on_disk = session.evidence(Decider::Installer, programs)?;
    let manager = role::current_holder(home, Role::Spm).map(|holder| {
        let program = programs.of_process(holder.pid, holder.program.as_ref());
        let image = session.record().trial().map_or(WhichRelease::Other, |trial| {
            // If both releases have the same bytes, the record of the installed release decides.
            which(trial, program.as_ref(), on_disk.installed)
        });
        let image = if image == WhichRelease::Other { WhichRelease::To } else { image };
        ManagerEvidence { image, answered: Some(Duration::ZERO), adopted: true, heartbeat: false, over_memory: false }
    });
    Ok(Evidence { manager, ..on_disk })
}
