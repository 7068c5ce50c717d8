//! The manager's upgrade of itself: what the next step is, from a record and from what is observed.
//!
//! ```text
//!   begin          record, backup, links, swap              judged by the old watchdog
//!  ───────▶ Switching ─────────────────────────▶ Trial ─────────────────────────────▶ Committing
//!               │ interrupted                      │ condemned, or aborted               │ manager.json, links home,
//!               ▼                                  ▼                                     │ the old watchdog ends
//!           given up; skipped at           RollingBack ── no whole backup ──▶ Committing ▼
//!           the third time                         │ links, restore, restart         the end
//!                                                  ▼ manager.json, links home
//!                                          the end, and the release is skipped
//!
//!  any phase, and bin/aops is neither release: links home, given up, nothing is condemned
//!
//!  In Trial, in this order:
//!    the operator decided              commit or roll back
//!    the home is stopped               nothing counts
//!    three deaths                      roll back; so do two failed proofs, five lost watchdogs, too much memory
//!    no answer, or not adopted         for 60 seconds of judged time: roll back
//!    alive for less than upgradeTrial  wait
//!    no heartbeat                      the old program sends one: it fails: unproven, ask again later; it works: roll back after a grace
//!    all of this passed                spa --prove, then commit
//! ```
//!
//! A role loads the record, asks [`next`], carries out the one step, and asks again, under a lock that both roles and the installer take: at
//! any time one of them looks or acts. Every step may be repeated. Before a step the directories `bin` and `state` and the home are synced, so
//! that what an interrupted step left is durable before another relies on it; what the step writes is synced when it is done.
//!
//! It promises: `bin/aops` is whole at every instant; the record is on disk before the switch; a judge runs the old program; a release
//! is committed only after its proof, unless the operator decides otherwise or there is nothing to go back to; never are both releases
//! condemned. `search.rs` looks for a counterexample.
//!
//! It refuses to decide without a record: then the links are led back to `bin/aops`, whatever that is.

mod evidence;
mod record;
#[cfg(test)]
mod search;
#[cfg(test)]
mod tests;
mod view;

use std::time::Duration;

pub use evidence::{Asker, Evidence, Limits, Links, Manager, Placed, Probe, Proof, Which};
pub use record::{Change, End, Ended, Force, Image, NewEndpoint, Phase, Reason, Record, Refusal, Trial};
pub use view::status;

/// One step. [`next`] is asked again when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing is under way.
    Nothing,
    Wait(Wait),
    /// Write the record as it is.
    Save,
    /// Make the change and write the record.
    Record(Change),
    /// Make `bin/aops.prev` from `bin/aops`.
    BackUp,
    /// Lead every role link but the manager's to `bin/aops.prev`.
    LinkToBackup,
    /// Put the staged executable at `bin/aops`.
    Swap,
    /// Put a copy of `bin/aops.prev` at `bin/aops`.
    Restore,
    /// Lead every role link to `bin/aops`.
    LinkToExecutable,
    /// Make `state/manager.json` name this release, and the epoch and the keys count if it is the new one.
    RecordRelease(Which),
    /// End the manager, which leaves the sub-agents running; the next one is started as after any death. A manager ends itself.
    RestartManager,
    /// The same, of a manager that does not answer.
    KillManager,
    /// The watchdog that asks ends; the next one is started as after any death.
    EndWatchdog,
    /// Begin a heartbeat of the old program.
    Probe,
    /// Begin the proof of the new watchdog.
    Prove,
}

/// What is waited for. `left`: time alone brings the next decision then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The other role has the next step.
    OtherRole,
    /// The home is stopped.
    Start,
    /// The new manager starts, answers or adopts.
    Answer {
        left: Duration,
    },
    /// The new manager has answered, and must live longer.
    Life {
        left: Duration,
    },
    /// Neither program can send a heartbeat. Nothing counts against the new one.
    Unproven {
        left: Duration,
    },
    /// The old program could send a heartbeat, and the new manager must.
    Heartbeat {
        left: Duration,
    },
    Probe,
    Proof,
}

impl Wait {
    /// The time that is waited is given to [`Record::spend`].
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

/// Rules that can be turned off one at a time.
macro_rules! guards {
    ($($name:ident,)*) => {
        /// The rules that the search turns off one at a time, to see that each is needed.
        #[derive(Debug, Clone, Copy)]
        struct Guards {
            $($name: bool,)*
        }

        impl Guards {
            const ALL: Guards = Guards { $($name: true,)* };

            /// All but one, for each.
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
    backup_whole_before_restore,
    restart_after_restore,
    release_recorded_back,
    release_recorded_on_commit,
    skip_on_rollback,
    links_home_after_end,
    end_old_watchdog,
    neither_image_drops,
    commit_record_before_links,
    stop_pauses,
    tries_budget,
    watchdogs_budget,
    proofs_budget,
    time_budget,
    memory,
    adoption,
    minimum_life,
    heartbeat_before_commit,
    probe_before_condemning,
    prove_before_commit,
}

/// The next step. The same record and evidence give the same step.
pub fn next(record: &Record, evidence: &Evidence, limits: &Limits) -> Step {
    decide(record, evidence, limits, &Guards::ALL)
}

fn decide(record: &Record, evidence: &Evidence, limits: &Limits, guards: &Guards) -> Step {
    let Some(trial) = record.trial() else { return without_record(evidence, guards) };
    if !may_act(trial.phase, evidence) {
        let old_manager = evidence.asker == Asker::Manager && runs(evidence, Which::From);
        return if old_manager && is_switched(trial.phase, evidence.executable) {
            Step::RestartManager
        } else {
            Step::Wait(Wait::OtherRole)
        };
    }
    if !evidence.recorded && (guards.record_before_swap || trial.phase != Phase::Switching) {
        return Step::Save;
    }
    if evidence.executable == Placed::Neither && guards.neither_image_drops {
        return drop_trial(Change::Drop, evidence, guards);
    }
    match (trial.phase, evidence.executable) {
        (Phase::Switching, Placed::From | Placed::Both) => switch(trial, evidence, guards),
        (Phase::Switching, Placed::To | Placed::Neither) => Step::Record(Change::BeginTrial),
        // On Windows the switch first moves the running executable away.
        (Phase::Switching, Placed::Missing) if evidence.backup_whole => Step::Restore,
        (Phase::Switching, Placed::Missing) => drop_trial(Change::Interrupt, evidence, guards),
        (Phase::Trial, Placed::From) => drop_trial(Change::Interrupt, evidence, guards),
        (Phase::Trial, _) => judge(trial, evidence, limits, guards),
        (Phase::Committing, Placed::From) => drop_trial(Change::Drop, evidence, guards),
        (Phase::Committing, Placed::Missing) if evidence.backup_whole => condemn(Reason::Vanished),
        (Phase::Committing, _) => commit(evidence, guards),
        (Phase::RollingBack, _) => roll_back(trial, evidence, guards),
    }
}

/// The record is written by the manager until the switch, by the watchdog after it, by the installer when both are stopped. The manager
/// ends a commit whose watchdog does not come, and a trial whose watchdog cannot come because the backup is gone.
fn may_act(phase: Phase, evidence: &Evidence) -> bool {
    let no_watchdog = evidence.watchdog.is_none();
    let is_before_switch = phase == Phase::Switching && evidence.executable != Placed::To;
    match evidence.asker {
        Asker::Installer => true,
        Asker::Manager => is_before_switch || (no_watchdog && (phase == Phase::Committing || !evidence.backup_whole)),
        Asker::Watchdog => phase != Phase::Switching || !matches!(evidence.executable, Placed::From | Placed::Both),
    }
}

/// The new release is in place, and its manager is to run.
fn is_switched(phase: Phase, executable: Placed) -> bool {
    match phase {
        Phase::Switching => executable == Placed::To,
        Phase::Trial | Phase::Committing => matches!(executable, Placed::To | Placed::Both),
        Phase::RollingBack => false,
    }
}

fn without_record(evidence: &Evidence, guards: &Guards) -> Step {
    if evidence.links == Links::Executable || !guards.links_home_after_end {
        return Step::Nothing;
    }
    // The links are led to a file that is there.
    match evidence.executable {
        Placed::Missing if evidence.backup_whole => Step::Restore,
        _ => Step::LinkToExecutable,
    }
}

/// Nothing was switched yet.
fn switch(trial: &Trial, evidence: &Evidence, guards: &Guards) -> Step {
    if trial.forced == Some(Force::Abort) {
        return drop_trial(Change::SkipAndForget, evidence, guards);
    }
    if evidence.asker == Asker::Installer || evidence.stopped {
        return drop_trial(Change::Drop, evidence, guards);
    }
    // A start sweeps `staging`, so this manager did not begin the switch.
    if !evidence.staged && guards.staged_before_swap {
        return drop_trial(Change::Interrupt, evidence, guards);
    }
    if !evidence.backup_whole && guards.backup_before_swap {
        return Step::BackUp;
    }
    if evidence.links != Links::Backup && guards.links_before_swap {
        return Step::LinkToBackup;
    }
    match evidence.executable {
        // There is nothing to switch but the record.
        Placed::Both => Step::Record(Change::BeginTrial),
        _ => Step::Swap,
    }
}

fn judge(trial: &Trial, evidence: &Evidence, limits: &Limits, guards: &Guards) -> Step {
    if evidence.executable == Placed::Missing && evidence.backup_whole {
        return condemn(Reason::Vanished);
    }
    if !evidence.backup_whole && guards.backup_whole_before_restore {
        // Nor can a judge or `control` be started from it.
        return Step::Record(Change::Commit(Some(Reason::NoBackup)));
    }
    if let Some(step) = keep_judge_old(evidence, guards) {
        return step;
    }
    match trial.forced {
        Some(Force::Commit) => return Step::Record(Change::Commit(Some(Reason::Forced))),
        Some(Force::Abort) => return condemn(Reason::Aborted),
        None if evidence.asker == Asker::Installer => {
            return Step::Record(Change::RollBack { reason: Reason::Installer, condemns: false });
        }
        None => {}
    }
    if evidence.stopped && guards.stop_pauses {
        return Step::Wait(Wait::Start);
    }
    if trial.deaths >= limits.deaths && guards.tries_budget {
        return condemn(Reason::Died);
    }
    if trial.lost_watchdogs >= limits.lost_watchdogs && guards.watchdogs_budget {
        return condemn(Reason::WatchdogEnded);
    }
    if trial.failed_proofs >= limits.failed_proofs && guards.proofs_budget {
        return condemn(Reason::Proof);
    }
    if evidence.died {
        return Step::Record(Change::LoseTry);
    }
    if evidence.took_over {
        return Step::Record(Change::LoseWatchdog);
    }
    if evidence.proof == Proof::Failed {
        return Step::Record(Change::FailProof);
    }
    judge_manager(trial, evidence, limits, guards)
}

/// The new manager, of which nothing is known that condemns it at once.
fn judge_manager(trial: &Trial, evidence: &Evidence, limits: &Limits, guards: &Guards) -> Step {
    if runs(evidence, Which::From) {
        return end_manager(evidence);
    }
    let manager = evidence.manager.filter(|manager| manager.image == Which::To);
    if manager.is_some_and(|manager| manager.over_memory) && guards.memory {
        return condemn(Reason::Memory);
    }
    let answered = manager.and_then(|manager| manager.answered);
    let adopted = manager.is_some_and(|manager| manager.adopted) || !guards.adoption;
    let (Some(life), true) = (answered, adopted) else {
        let spent = Duration::from_secs(trial.spent_seconds);
        let reason = if answered.is_some() { Reason::NotAdopted } else { Reason::NoAnswer };
        return match limits.first_answer.checked_sub(spent).filter(|left| !left.is_zero()) {
            None if guards.time_budget => condemn(reason),
            left => Step::Wait(Wait::Answer { left: left.unwrap_or_default() }),
        };
    };
    if trial.spent_seconds > 0 {
        return Step::Record(Change::ResetTime);
    }
    if life < limits.minimum_life && guards.minimum_life {
        return Step::Wait(Wait::Life { left: limits.minimum_life - life });
    }
    let heartbeat = manager.is_some_and(|manager| manager.heartbeat) || !guards.heartbeat_before_commit;
    if !heartbeat {
        return await_heartbeat(evidence.probe, limits, guards);
    }
    match evidence.proof {
        _ if !guards.prove_before_commit => commit_trial(evidence, guards),
        Proof::NotBegun | Proof::Failed => Step::Prove,
        Proof::Running => Step::Wait(Wait::Proof),
        Proof::Passed => commit_trial(evidence, guards),
    }
}

/// It has not sent a heartbeat; whether that is its own fault, a heartbeat of the old program tells.
fn await_heartbeat(probe: Probe, limits: &Limits, guards: &Guards) -> Step {
    match probe {
        _ if !guards.probe_before_condemning => condemn(Reason::NoHeartbeat),
        Probe::NotAsked => Step::Probe,
        Probe::Running => Step::Wait(Wait::Probe),
        Probe::Works(ago) if ago >= limits.heartbeat_grace => condemn(Reason::NoHeartbeat),
        Probe::Works(ago) => Step::Wait(Wait::Heartbeat { left: limits.heartbeat_grace - ago }),
        Probe::Fails(ago) if ago >= limits.probe_pause => Step::Probe,
        Probe::Fails(ago) => Step::Wait(Wait::Unproven { left: limits.probe_pause - ago }),
    }
}

fn commit_trial(evidence: &Evidence, guards: &Guards) -> Step {
    if !guards.commit_record_before_links && evidence.links != Links::Executable {
        return Step::LinkToExecutable;
    }
    Step::Record(Change::Commit(None))
}

/// Before the restore the next judge, and this one, run the old program.
fn keep_judge_old(evidence: &Evidence, guards: &Guards) -> Option<Step> {
    if evidence.links != Links::Backup && guards.links_before_restore && guards.commit_record_before_links {
        return Some(Step::LinkToBackup);
    }
    let own_program_is_new = evidence.asker == Asker::Watchdog && evidence.watchdog != Some(Which::From);
    (own_program_is_new && evidence.links == Links::Backup).then_some(Step::EndWatchdog)
}

fn commit(evidence: &Evidence, guards: &Guards) -> Step {
    if evidence.installed != Which::To && guards.release_recorded_on_commit {
        return Step::RecordRelease(Which::To);
    }
    if evidence.links != Links::Executable && guards.links_home_after_end {
        return Step::LinkToExecutable;
    }
    if runs(evidence, Which::From) {
        return end_manager(evidence);
    }
    if evidence.asker == Asker::Watchdog && evidence.watchdog == Some(Which::From) && guards.end_old_watchdog {
        return Step::EndWatchdog;
    }
    Step::Record(Change::Forget)
}

fn roll_back(trial: &Trial, evidence: &Evidence, guards: &Guards) -> Step {
    if !matches!(evidence.executable, Placed::From | Placed::Both) {
        if !evidence.backup_whole && guards.backup_whole_before_restore {
            return match evidence.executable {
                Placed::Missing => drop_trial(Change::Drop, evidence, guards),
                _ => Step::Record(Change::Commit(Some(Reason::NoBackup))),
            };
        }
        return keep_judge_old(evidence, guards).unwrap_or(Step::Restore);
    }
    let end = if trial.condemned && guards.skip_on_rollback { Change::SkipAndForget } else { Change::Drop };
    drop_trial(end, evidence, guards)
}

/// Leads everything to what `bin/aops` is, and ends with this change.
fn drop_trial(end: Change, evidence: &Evidence, guards: &Guards) -> Step {
    let is_old = matches!(evidence.executable, Placed::From | Placed::Both);
    if is_old && evidence.installed == Which::To && guards.release_recorded_back {
        return Step::RecordRelease(Which::From);
    }
    if is_old && runs(evidence, Which::To) && guards.restart_after_restore {
        return end_manager(evidence);
    }
    if evidence.links != Links::Executable && guards.links_home_after_end {
        return Step::LinkToExecutable;
    }
    Step::Record(end)
}

fn condemn(reason: Reason) -> Step {
    Step::Record(Change::RollBack { reason, condemns: true })
}

fn runs(evidence: &Evidence, image: Which) -> bool {
    evidence.manager.is_some_and(|manager| manager.image == image)
}

fn end_manager(evidence: &Evidence) -> Step {
    match evidence.manager {
        Some(Manager { answered: None, .. }) => Step::KillManager,
        _ => Step::RestartManager,
    }
}
