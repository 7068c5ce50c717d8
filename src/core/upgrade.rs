//! The manager's self-upgrade: decides the next step from the record and the evidence.
//!
//! ```text
//!   begin          record, backup, links, swap              evaluated by the old watchdog
//!  ───────▶ Switching ─────────────────────────▶ Trial ─────────────────────────────▶ Committing
//!               │ interrupted                      │ failed, or aborted                  │ manager.json, links restored,
//!               ▼                                  ▼                                     │ the old watchdog exits
//!           dropped; skipped at            RollingBack ── backup damaged ──▶ Committing  ▼
//!           the third time                         │ links, restore, restart          finished
//!                                                  ▼ manager.json, links restored
//!                                            finished, and the release is skipped
//!
//!  any phase, if bin/aops is neither release: links restored, dropped, no release is skipped
//!
//!  In Trial, in this order:
//!    the operator decided              commit or roll back
//!    the home is stopped               the trial is paused
//!    three deaths                      roll back; also after two failed proofs, five lost watchdogs, or too much memory
//!    no answer, or not adopted         for 60 seconds, not counting pauses: roll back
//!    alive for less than upgradeTrial  wait
//!    no heartbeat                      the old program sends one. It fails: unproven, retry later; it works: roll back after a grace period
//!    all of this passed                spa --prove, then commit
//! ```
//!
//! A role loads the record, calls [`next`], executes the one step, and calls it again. It holds a lock that both roles and the installer use,
//! so that only one of them observes or acts at a time. Every step may be repeated. Before a step, the directories `bin` and `state` and the
//! home are synced: the results of an interrupted step are durable before the next step depends on them. A step syncs what it writes.
//!
//! Guarantees: `bin/aops` is complete at every instant; the record is on disk before the switch; the trial is evaluated by the old program; a
//! release is committed only after its proof, unless the operator decides otherwise or there is no backup; the two releases are never both
//! skipped. `search.rs` searches for a counterexample.
//!
//! Without a record nothing is decided: the links are pointed at `bin/aops`, whatever it is.

mod evidence;
mod record;
#[cfg(test)]
mod search;
#[cfg(test)]
mod tests;
mod view;

use std::time::Duration;

pub use evidence::{
    Decider, Evidence, InstalledExecutable, ManagerEvidence, Probe, Proof, RoleLinks, TrialLimits, WhichRelease,
};
pub use record::{
    FinishedUpgrade, Image, NewEndpoint, OperatorDecision, RecordChange, Trial, TrialEndReason, UpgradeEnd,
    UpgradePhase, UpgradeRecord, UpgradeRefusal,
};
pub use view::status;

/// The next step. [`next`] is called again when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpgradeStep {
    /// No upgrade is under way.
    Nothing,
    Wait(Wait),
    /// Write the record unchanged.
    Save,
    /// Apply the change and write the record.
    Record(RecordChange),
    /// Copy `bin/aops` to `bin/aops.prev`.
    BackUp,
    /// Point every role link except the manager's at `bin/aops.prev`.
    LinkToBackup,
    /// Move the staged executable to `bin/aops`.
    Swap,
    /// Copy `bin/aops.prev` to `bin/aops`.
    Restore,
    /// Point every role link at `bin/aops`.
    LinkToExecutable,
    /// Write this release to `state/manager.json`. For the new release, its epoch and keys take effect.
    RecordRelease(WhichRelease),
    /// Stop the manager without its sub-agents; it is restarted as after a crash. A manager exits on its own.
    RestartManager,
    /// The same for a manager that does not respond.
    KillManager,
    /// The deciding watchdog exits; it is restarted as after a crash.
    StopWatchdog,
    /// Start a heartbeat with the old program.
    Probe,
    /// Start the proof of the new watchdog.
    Prove,
}

/// What the upgrade waits for. `left`: the time until the next decision without an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The next step is the other role's.
    OtherRole,
    /// The home is stopped; waits for its start.
    Start,
    /// The new manager is starting, or has not answered or adopted the sub-agents yet.
    Answer {
        left: Duration,
    },
    /// The new manager has answered and must run longer.
    Life {
        left: Duration,
    },
    /// Neither program can send a heartbeat. This does not count against the new release.
    Unproven {
        left: Duration,
    },
    /// The old program could send a heartbeat, so the new manager must send one.
    Heartbeat {
        left: Duration,
    },
    Probe,
    Proof,
}

impl Wait {
    /// Whether the time of this wait is added to [`UpgradeRecord::spend`].
    pub fn counts(self) -> bool {
        matches!(self, Wait::Answer { .. })
    }

    pub fn left(self) -> Option<Duration> {
        match self {
            Wait::Answer { left } | Wait::Life { left } | Wait::Unproven { left } | Wait::Heartbeat { left } => {
                Some(left)
            }
            Wait::OtherRole | Wait::Start | Wait::Probe | Wait::Proof => None,
        }
    }
}

/// Defines the rules that a test can disable one at a time.
macro_rules! guards {
    ($($name:ident,)*) => {
        /// The safety rules. The search disables one at a time to prove that each is needed.
        #[derive(Debug, Clone, Copy)]
        struct Guards {
            $($name: bool,)*
        }

        impl Guards {
            const ALL: Guards = Guards { $($name: true,)* };

            /// For each rule, all rules except that one.
            #[cfg(test)]
            fn all_but_one() -> Vec<(&'static str, Guards)> {
                vec![$((stringify!($name), Guards { $name: false, ..Guards::ALL }),)*]
            }
        }
    };
}

guards! {
    record_before_swap,
    backup_before_swap,
    links_before_swap,
    staged_before_swap,
    links_before_restore,
    backup_intact_before_restore,
    restart_after_restore,
    release_recorded_on_rollback,
    release_recorded_on_commit,
    skip_on_rollback,
    links_restored_after_end,
    stop_old_watchdog,
    foreign_executable_drops,
    commit_record_before_links,
    stop_pauses,
    death_limit,
    lost_watchdog_limit,
    failed_proof_limit,
    time_limit,
    memory_limit,
    adoption,
    minimum_life,
    heartbeat_before_commit,
    probe_before_rollback,
    prove_before_commit,
}

/// The next step. The same record and evidence always give the same step.
pub fn next(record: &UpgradeRecord, evidence: &Evidence, limits: &TrialLimits) -> UpgradeStep {
    decide(record, evidence, limits, &Guards::ALL)
}

fn decide(record: &UpgradeRecord, evidence: &Evidence, limits: &TrialLimits, guards: &Guards) -> UpgradeStep {
    let Some(trial) = record.trial() else { return without_record(evidence, guards) };
    if !may_act(trial.phase, evidence) {
        let old_manager = evidence.decider == Decider::Manager && runs(evidence, WhichRelease::From);
        return if old_manager && is_switched(trial.phase, evidence.executable) {
            UpgradeStep::RestartManager
        } else {
            UpgradeStep::Wait(Wait::OtherRole)
        };
    }
    if !evidence.recorded && (guards.record_before_swap || trial.phase != UpgradePhase::Switching) {
        return UpgradeStep::Save;
    }
    if evidence.executable == InstalledExecutable::Neither && guards.foreign_executable_drops {
        return drop_trial(RecordChange::Drop, evidence, guards);
    }
    match (trial.phase, evidence.executable) {
        (UpgradePhase::Switching, InstalledExecutable::From | InstalledExecutable::Both) => {
            switch(trial, evidence, guards)
        }
        (UpgradePhase::Switching, InstalledExecutable::To | InstalledExecutable::Neither) => {
            UpgradeStep::Record(RecordChange::BeginTrial)
        }
        // On Windows the switch first moves the running executable away.
        (UpgradePhase::Switching, InstalledExecutable::Missing) if evidence.backup_intact => UpgradeStep::Restore,
        (UpgradePhase::Switching, InstalledExecutable::Missing) => {
            drop_trial(RecordChange::Interrupt, evidence, guards)
        }
        (UpgradePhase::Trial, InstalledExecutable::From) => drop_trial(RecordChange::Interrupt, evidence, guards),
        (UpgradePhase::Trial, _) => evaluate_trial(trial, evidence, limits, guards),
        (UpgradePhase::Committing, InstalledExecutable::From) => drop_trial(RecordChange::Drop, evidence, guards),
        (UpgradePhase::Committing, InstalledExecutable::Missing) if evidence.backup_intact => {
            roll_back_and_skip(TrialEndReason::ExecutableMissing)
        }
        (UpgradePhase::Committing, _) => commit(evidence, guards),
        (UpgradePhase::RollingBack, _) => roll_back(trial, evidence, guards),
    }
}

/// The record is written by the manager until the switch, by the watchdog after it, and by the installer while both are stopped. The manager
/// completes a commit whose watchdog does not start, and a trial whose watchdog cannot start because the backup is gone.
fn may_act(phase: UpgradePhase, evidence: &Evidence) -> bool {
    let no_watchdog = evidence.watchdog.is_none();
    let is_before_switch = phase == UpgradePhase::Switching && evidence.executable != InstalledExecutable::To;
    match evidence.decider {
        Decider::Installer => true,
        Decider::Manager => {
            is_before_switch || (no_watchdog && (phase == UpgradePhase::Committing || !evidence.backup_intact))
        }
        Decider::Watchdog => {
            phase != UpgradePhase::Switching
                || !matches!(evidence.executable, InstalledExecutable::From | InstalledExecutable::Both)
        }
    }
}

/// Whether the new release is installed and its manager should run.
fn is_switched(phase: UpgradePhase, executable: InstalledExecutable) -> bool {
    match phase {
        UpgradePhase::Switching => executable == InstalledExecutable::To,
        UpgradePhase::Trial | UpgradePhase::Committing => {
            matches!(executable, InstalledExecutable::To | InstalledExecutable::Both)
        }
        UpgradePhase::RollingBack => false,
    }
}

fn without_record(evidence: &Evidence, guards: &Guards) -> UpgradeStep {
    if evidence.links == RoleLinks::Executable || !guards.links_restored_after_end {
        return UpgradeStep::Nothing;
    }
    // The links must point at a file that exists.
    match evidence.executable {
        InstalledExecutable::Missing if evidence.backup_intact => UpgradeStep::Restore,
        _ => UpgradeStep::LinkToExecutable,
    }
}

/// Before the switch.
fn switch(trial: &Trial, evidence: &Evidence, guards: &Guards) -> UpgradeStep {
    if trial.forced == Some(OperatorDecision::Abort) {
        return drop_trial(RecordChange::FinishAndSkip, evidence, guards);
    }
    if evidence.decider == Decider::Installer || evidence.stopped {
        return drop_trial(RecordChange::Drop, evidence, guards);
    }
    // A start empties `staging`, so this manager did not begin the switch.
    if !evidence.staged && guards.staged_before_swap {
        return drop_trial(RecordChange::Interrupt, evidence, guards);
    }
    if !evidence.backup_intact && guards.backup_before_swap {
        return UpgradeStep::BackUp;
    }
    if evidence.links != RoleLinks::Backup && guards.links_before_swap {
        return UpgradeStep::LinkToBackup;
    }
    match evidence.executable {
        // Only the record needs to change.
        InstalledExecutable::Both => UpgradeStep::Record(RecordChange::BeginTrial),
        _ => UpgradeStep::Swap,
    }
}

fn evaluate_trial(trial: &Trial, evidence: &Evidence, limits: &TrialLimits, guards: &Guards) -> UpgradeStep {
    if evidence.executable == InstalledExecutable::Missing && evidence.backup_intact {
        return roll_back_and_skip(TrialEndReason::ExecutableMissing);
    }
    if !evidence.backup_intact && guards.backup_intact_before_restore {
        // Without a backup, neither the old watchdog nor `control` can be started from it.
        return UpgradeStep::Record(RecordChange::Commit(Some(TrialEndReason::NoBackup)));
    }
    if let Some(step) = keep_old_watchdog(evidence, guards) {
        return step;
    }
    match trial.forced {
        Some(OperatorDecision::Commit) => {
            return UpgradeStep::Record(RecordChange::Commit(Some(TrialEndReason::Forced)));
        }
        Some(OperatorDecision::Abort) => return roll_back_and_skip(TrialEndReason::Aborted),
        None if evidence.decider == Decider::Installer => {
            return UpgradeStep::Record(RecordChange::RollBack { reason: TrialEndReason::Installer, skips: false });
        }
        None => {}
    }
    if evidence.stopped && guards.stop_pauses {
        return UpgradeStep::Wait(Wait::Start);
    }
    if trial.deaths >= limits.deaths && guards.death_limit {
        return roll_back_and_skip(TrialEndReason::Died);
    }
    if trial.lost_watchdogs >= limits.lost_watchdogs && guards.lost_watchdog_limit {
        return roll_back_and_skip(TrialEndReason::WatchdogExited);
    }
    if trial.failed_proofs >= limits.failed_proofs && guards.failed_proof_limit {
        return roll_back_and_skip(TrialEndReason::Proof);
    }
    if evidence.died {
        return UpgradeStep::Record(RecordChange::CountDeath);
    }
    if evidence.found_running_manager {
        return UpgradeStep::Record(RecordChange::CountLostWatchdog);
    }
    if evidence.proof == Proof::Failed {
        return UpgradeStep::Record(RecordChange::CountFailedProof);
    }
    evaluate_manager(trial, evidence, limits, guards)
}

/// Evaluates the new manager after the checks that fail it at once.
fn evaluate_manager(trial: &Trial, evidence: &Evidence, limits: &TrialLimits, guards: &Guards) -> UpgradeStep {
    if runs(evidence, WhichRelease::From) {
        return stop_manager(evidence);
    }
    let manager = evidence.manager.filter(|manager| manager.image == WhichRelease::To);
    if manager.is_some_and(|manager| manager.over_memory) && guards.memory_limit {
        return roll_back_and_skip(TrialEndReason::Memory);
    }
    let answered = manager.and_then(|manager| manager.answered);
    let adopted = manager.is_some_and(|manager| manager.adopted) || !guards.adoption;
    let (Some(life), true) = (answered, adopted) else {
        let spent = Duration::from_secs(trial.spent_seconds);
        let reason = if answered.is_some() { TrialEndReason::NotAdopted } else { TrialEndReason::NoAnswer };
        return match limits.first_answer.checked_sub(spent).filter(|left| !left.is_zero()) {
            None if guards.time_limit => roll_back_and_skip(reason),
            left => UpgradeStep::Wait(Wait::Answer { left: left.unwrap_or_default() }),
        };
    };
    if trial.spent_seconds > 0 {
        return UpgradeStep::Record(RecordChange::ResetTime);
    }
    if life < limits.minimum_life && guards.minimum_life {
        return UpgradeStep::Wait(Wait::Life { left: limits.minimum_life - life });
    }
    let heartbeat = manager.is_some_and(|manager| manager.heartbeat) || !guards.heartbeat_before_commit;
    if !heartbeat {
        return await_heartbeat(evidence.probe, limits, guards);
    }
    match evidence.proof {
        _ if !guards.prove_before_commit => commit_trial(evidence, guards),
        Proof::NotBegun | Proof::Failed => UpgradeStep::Prove,
        Proof::Running => UpgradeStep::Wait(Wait::Proof),
        Proof::Passed => commit_trial(evidence, guards),
    }
}

/// The new manager has not sent a heartbeat. A heartbeat of the old program shows whether the new manager is at fault.
fn await_heartbeat(probe: Probe, limits: &TrialLimits, guards: &Guards) -> UpgradeStep {
    match probe {
        _ if !guards.probe_before_rollback => roll_back_and_skip(TrialEndReason::NoHeartbeat),
        Probe::NotAsked => UpgradeStep::Probe,
        Probe::Running => UpgradeStep::Wait(Wait::Probe),
        Probe::Works(ago) if ago >= limits.heartbeat_grace => roll_back_and_skip(TrialEndReason::NoHeartbeat),
        Probe::Works(ago) => UpgradeStep::Wait(Wait::Heartbeat { left: limits.heartbeat_grace - ago }),
        Probe::Fails(ago) if ago >= limits.probe_pause => UpgradeStep::Probe,
        Probe::Fails(ago) => UpgradeStep::Wait(Wait::Unproven { left: limits.probe_pause - ago }),
    }
}

fn commit_trial(evidence: &Evidence, guards: &Guards) -> UpgradeStep {
    if !guards.commit_record_before_links && evidence.links != RoleLinks::Executable {
        return UpgradeStep::LinkToExecutable;
    }
    UpgradeStep::Record(RecordChange::Commit(None))
}

/// Until the restore, the watchdog must run the old program, after a restart too.
fn keep_old_watchdog(evidence: &Evidence, guards: &Guards) -> Option<UpgradeStep> {
    if evidence.links != RoleLinks::Backup && guards.links_before_restore && guards.commit_record_before_links {
        return Some(UpgradeStep::LinkToBackup);
    }
    let own_program_is_new = evidence.decider == Decider::Watchdog && evidence.watchdog != Some(WhichRelease::From);
    (own_program_is_new && evidence.links == RoleLinks::Backup).then_some(UpgradeStep::StopWatchdog)
}

fn commit(evidence: &Evidence, guards: &Guards) -> UpgradeStep {
    if evidence.installed != WhichRelease::To && guards.release_recorded_on_commit {
        return UpgradeStep::RecordRelease(WhichRelease::To);
    }
    if evidence.links != RoleLinks::Executable && guards.links_restored_after_end {
        return UpgradeStep::LinkToExecutable;
    }
    if runs(evidence, WhichRelease::From) {
        return stop_manager(evidence);
    }
    if evidence.decider == Decider::Watchdog
        && evidence.watchdog == Some(WhichRelease::From)
        && guards.stop_old_watchdog
    {
        return UpgradeStep::StopWatchdog;
    }
    UpgradeStep::Record(RecordChange::Finish)
}

fn roll_back(trial: &Trial, evidence: &Evidence, guards: &Guards) -> UpgradeStep {
    if !matches!(evidence.executable, InstalledExecutable::From | InstalledExecutable::Both) {
        if !evidence.backup_intact && guards.backup_intact_before_restore {
            return match evidence.executable {
                InstalledExecutable::Missing => drop_trial(RecordChange::Drop, evidence, guards),
                _ => UpgradeStep::Record(RecordChange::Commit(Some(TrialEndReason::NoBackup))),
            };
        }
        return keep_old_watchdog(evidence, guards).unwrap_or(UpgradeStep::Restore);
    }
    let end = if trial.condemned && guards.skip_on_rollback { RecordChange::FinishAndSkip } else { RecordChange::Drop };
    drop_trial(end, evidence, guards)
}

/// Adapts everything to the current `bin/aops`, then ends the upgrade with this change.
fn drop_trial(end: RecordChange, evidence: &Evidence, guards: &Guards) -> UpgradeStep {
    let is_old = matches!(evidence.executable, InstalledExecutable::From | InstalledExecutable::Both);
    if is_old && evidence.installed == WhichRelease::To && guards.release_recorded_on_rollback {
        return UpgradeStep::RecordRelease(WhichRelease::From);
    }
    if is_old && runs(evidence, WhichRelease::To) && guards.restart_after_restore {
        return stop_manager(evidence);
    }
    if evidence.links != RoleLinks::Executable && guards.links_restored_after_end {
        return UpgradeStep::LinkToExecutable;
    }
    UpgradeStep::Record(end)
}

fn roll_back_and_skip(reason: TrialEndReason) -> UpgradeStep {
    UpgradeStep::Record(RecordChange::RollBack { reason, skips: true })
}

fn runs(evidence: &Evidence, image: WhichRelease) -> bool {
    evidence.manager.is_some_and(|manager| manager.image == image)
}

fn stop_manager(evidence: &Evidence) -> UpgradeStep {
    match evidence.manager {
        Some(ManagerEvidence { answered: None, .. }) => UpgradeStep::KillManager,
        _ => UpgradeStep::RestartManager,
    }
}
