//! An upgrade of the manager that is under way when an installation begins: it is ended first, back to the release from before, so that the
//! installation replaces what it knows. The record is held until the new release is in place: neither role acts by it meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::progress;
use crate::core::model::Version;
use crate::core::role::Role;
use crate::core::upgrade::{Decider, Evidence, ManagerEvidence, TrialLimits, UpgradeStep, WhichRelease, next};
use crate::home::Home;
use crate::installation::upgrade::{Programs, UpgradeSession, which};
use crate::role;

/// A role holds the record for one step, which may wait for a disk.
const TURN: Duration = Duration::from_secs(60);
/// More steps than an upgrade has are a mistake.
const MAX_STEPS: usize = 32;

/// Ends what is under way, and keeps both roles from acting until the answer is dropped.
pub(super) fn end(home: &Home) -> Result<UpgradeSession> {
    let session =
        UpgradeSession::open(home, TURN).context("cannot end an upgrade of the manager that may be under way")?;
    let mut session =
        session.context("the record of the manager's upgrades is in use by another process; try again")?;
    let mut programs = Programs::default();
    if let Some(trial) = session.record().trial() {
        progress::say(format_args!("ending the upgrade of the manager to {} that is under way", trial.to.version));
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
            _ => bail!("the upgrade of the manager that is under way cannot be ended ({step:?}); see `control status`"),
        }
    }
    bail!("the upgrade of the manager that is under way does not come to its end; see `control status`")
}

/// Another release is in place, by an operator's word: it may run, and the backup is none of it.
pub(super) fn replaced(session: &mut UpgradeSession, version: &Version) -> Result<()> {
    session.change(|record| record.replaced(version))
}

fn evidence(home: &Home, session: &UpgradeSession, programs: &mut Programs) -> Result<Evidence> {
    let seen = session.evidence(Decider::Installer, programs)?;
    let manager = role::current_holder(home, Role::Spm).map(|holder| {
        let program = programs.of_process(holder.pid);
        let image = session.record().trial().map_or(WhichRelease::Other, |trial| {
            // Where both have the same bytes, it is the new one until the release from before is recorded again.
            which(trial, program.as_ref(), seen.installed)
        });
        let image = if image == WhichRelease::Other { WhichRelease::To } else { image };
        ManagerEvidence { image, answered: Some(Duration::ZERO), adopted: true, heartbeat: false, over_memory: false }
    });
    Ok(Evidence { manager, ..seen })
}
