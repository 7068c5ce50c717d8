//! The rules, one by one.

use super::view::UpgradeViewPhase;
use super::*;

const S: fn(u64) -> Duration = Duration::from_secs;

fn image(version: &str, executable: char) -> Image {
    let digit = version.chars().last().unwrap();
    super::search::image(version, digit, executable)
}

fn begun() -> UpgradeRecord {
    let mut record = UpgradeRecord::default();
    record.begin(image("1", '1'), image("2", '2')).unwrap();
    record
}

fn on_trial() -> UpgradeRecord {
    let mut record = begun();
    assert!(record.begin_trial());
    record
}

/// The old manager's evidence when everything is ready for the switch.
fn ready() -> Evidence {
    let old = ManagerEvidence {
        image: WhichRelease::From,
        answered: Some(S(999)),
        adopted: true,
        heartbeat: true,
        over_memory: false,
    };
    Evidence {
        decider: Decider::Manager,
        recorded: true,
        executable: InstalledExecutable::From,
        backup_intact: true,
        links: RoleLinks::Backup,
        installed: WhichRelease::From,
        staged: true,
        manager: Some(old),
        watchdog: Some(WhichRelease::From),
        died: false,
        found_running_manager: false,
        probe: Probe::NotAsked,
        proof: Proof::NotBegun,
        stopped: false,
    }
}

/// The watchdog's evidence of a new manager that has passed everything.
fn passed() -> Evidence {
    Evidence {
        decider: Decider::Watchdog,
        executable: InstalledExecutable::To,
        staged: false,
        manager: Some(NEW),
        proof: Proof::Passed,
        ..ready()
    }
}

const NEW: ManagerEvidence = ManagerEvidence {
    image: WhichRelease::To,
    answered: Some(Duration::from_secs(30)),
    adopted: true,
    heartbeat: true,
    over_memory: false,
};

fn step(record: &UpgradeRecord, evidence: Evidence) -> UpgradeStep {
    next(record, &evidence, &TrialLimits::default())
}

fn back(reason: TrialEndReason) -> UpgradeStep {
    UpgradeStep::Record(RecordChange::RollBack { reason, skips: true })
}

#[test]
fn the_switch_comes_after_the_record_the_backup_and_the_links() {
    let home = Evidence { backup_intact: false, links: RoleLinks::Executable, ..ready() };
    for (evidence, expected) in [
        (Evidence { recorded: false, ..home }, UpgradeStep::Save),
        (home, UpgradeStep::BackUp),
        (Evidence { links: RoleLinks::Mixed, ..ready() }, UpgradeStep::LinkToBackup),
        (ready(), UpgradeStep::Swap),
        (Evidence { executable: InstalledExecutable::Both, ..ready() }, UpgradeStep::Record(RecordChange::BeginTrial)),
        (Evidence { executable: InstalledExecutable::To, ..ready() }, UpgradeStep::RestartManager),
        (Evidence { decider: Decider::Watchdog, ..ready() }, UpgradeStep::Wait(Wait::OtherRole)),
        (
            Evidence { decider: Decider::Watchdog, executable: InstalledExecutable::To, ..ready() },
            UpgradeStep::Record(RecordChange::BeginTrial),
        ),
    ] {
        assert_eq!(step(&begun(), evidence), expected, "{evidence:?}");
    }
}

#[test]
fn an_impossible_switch_is_dropped_and_the_links_are_restored() {
    let end = |change| [UpgradeStep::LinkToExecutable, UpgradeStep::Record(change)];
    let mut aborted = begun();
    assert!(aborted.force(OperatorDecision::Abort));
    for (record, evidence, change) in [
        (begun(), Evidence { staged: false, ..ready() }, RecordChange::Interrupt),
        (begun(), Evidence { stopped: true, ..ready() }, RecordChange::Drop),
        (begun(), Evidence { decider: Decider::Installer, manager: None, ..ready() }, RecordChange::Drop),
        (begun(), Evidence { executable: InstalledExecutable::Neither, ..ready() }, RecordChange::Drop),
        (aborted, ready(), RecordChange::FinishAndSkip),
        (on_trial(), Evidence { decider: Decider::Watchdog, ..ready() }, RecordChange::Interrupt),
    ] {
        let steps = [evidence.links, RoleLinks::Executable].map(|links| step(&record, Evidence { links, ..evidence }));
        assert_eq!(steps, end(change), "{evidence:?}");
    }
}

#[test]
fn a_partial_switch_on_windows_is_undone() {
    let missing = Evidence { executable: InstalledExecutable::Missing, ..ready() };
    assert_eq!(step(&begun(), missing), UpgradeStep::Restore);
    let watchdog = Evidence { decider: Decider::Watchdog, ..missing };
    assert_eq!(step(&begun(), watchdog), UpgradeStep::Restore);
    assert_eq!(step(&on_trial(), watchdog), back(TrialEndReason::ExecutableMissing));
    assert_eq!(step(&UpgradeRecord::default(), watchdog), UpgradeStep::Restore);
}

#[test]
fn a_new_manager_is_committed_after_it_has_passed_everything() {
    let with = |change: fn(&mut ManagerEvidence)| {
        let mut manager = NEW;
        change(&mut manager);
        Evidence { manager: Some(manager), ..passed() }
    };
    let mut silent = with(|manager| manager.heartbeat = false);
    let mut asked = |probe| {
        silent.probe = probe;
        silent
    };
    let unasked = asked(Probe::NotAsked);
    for (evidence, expected) in [
        (passed(), UpgradeStep::Record(RecordChange::Commit(None))),
        (Evidence { proof: Proof::NotBegun, ..passed() }, UpgradeStep::Prove),
        (Evidence { proof: Proof::Running, ..passed() }, UpgradeStep::Wait(Wait::Proof)),
        (Evidence { proof: Proof::Failed, ..passed() }, UpgradeStep::Record(RecordChange::CountFailedProof)),
        (Evidence { died: true, manager: None, ..passed() }, UpgradeStep::Record(RecordChange::CountDeath)),
        (Evidence { found_running_manager: true, ..passed() }, UpgradeStep::Record(RecordChange::CountLostWatchdog)),
        (Evidence { manager: None, ..passed() }, UpgradeStep::Wait(Wait::Answer { left: S(60) })),
        (Evidence { manager: ready().manager, ..passed() }, UpgradeStep::RestartManager),
        (Evidence { stopped: true, died: true, manager: None, ..passed() }, UpgradeStep::Wait(Wait::Start)),
        (Evidence { links: RoleLinks::Mixed, ..passed() }, UpgradeStep::LinkToBackup),
        (Evidence { watchdog: Some(WhichRelease::To), ..passed() }, UpgradeStep::StopWatchdog),
        (Evidence { decider: Decider::Manager, ..passed() }, UpgradeStep::Wait(Wait::OtherRole)),
        (with(|manager| manager.answered = None), UpgradeStep::Wait(Wait::Answer { left: S(60) })),
        (with(|manager| manager.adopted = false), UpgradeStep::Wait(Wait::Answer { left: S(60) })),
        (with(|manager| manager.answered = Some(S(29))), UpgradeStep::Wait(Wait::Life { left: S(1) })),
        (with(|manager| manager.over_memory = true), back(TrialEndReason::Memory)),
        (unasked, UpgradeStep::Probe),
        (asked(Probe::Running), UpgradeStep::Wait(Wait::Probe)),
        (asked(Probe::Fails(S(20))), UpgradeStep::Wait(Wait::Unproven { left: S(40) })),
        (asked(Probe::Fails(S(60))), UpgradeStep::Probe),
        (asked(Probe::Works(S(59))), UpgradeStep::Wait(Wait::Heartbeat { left: S(1) })),
        (asked(Probe::Works(S(60))), back(TrialEndReason::NoHeartbeat)),
    ] {
        assert_eq!(step(&on_trial(), evidence), expected, "{evidence:?}");
    }
}

#[test]
fn each_limit_rolls_back_when_it_is_reached() {
    let lose = |change, times| {
        let mut record = on_trial();
        (0..times).for_each(|_| assert!(record.apply(change)));
        step(&record, passed())
    };
    let commits = UpgradeStep::Record(RecordChange::Commit(None));
    assert_eq!(
        [lose(RecordChange::CountDeath, 2), lose(RecordChange::CountDeath, 3)],
        [commits, back(TrialEndReason::Died)]
    );
    assert_eq!(
        [lose(RecordChange::CountFailedProof, 1), lose(RecordChange::CountFailedProof, 2)],
        [commits, back(TrialEndReason::Proof)]
    );
    let watchdogs = [lose(RecordChange::CountLostWatchdog, 4), lose(RecordChange::CountLostWatchdog, 5)];
    assert_eq!(watchdogs, [commits, back(TrialEndReason::WatchdogExited)]);
}

#[test]
fn time_counts_until_the_new_manager_has_answered_and_adopted() {
    let mut record = on_trial();
    assert!(record.spend(59));
    let absent = Evidence { manager: None, ..passed() };
    let wait = Wait::Answer { left: S(1) };
    assert_eq!((step(&record, absent), wait.counts()), (UpgradeStep::Wait(wait), true));
    assert_eq!(step(&record, passed()), UpgradeStep::Record(RecordChange::ResetTime));
    assert!(record.spend(1));
    assert_eq!(step(&record, absent), back(TrialEndReason::NoAnswer));
    let idle = Evidence { manager: Some(ManagerEvidence { adopted: false, ..NEW }), ..passed() };
    assert_eq!(step(&record, idle), back(TrialEndReason::NotAdopted));
    assert!([Wait::OtherRole, Wait::Start, Wait::Unproven { left: S(1) }].iter().all(|wait| !wait.counts()));
}

#[test]
fn the_operators_decision_is_final_and_immediate() {
    let absent = Evidence { manager: None, stopped: true, ..passed() };
    for (force, expected) in [
        (OperatorDecision::Commit, UpgradeStep::Record(RecordChange::Commit(Some(TrialEndReason::Forced)))),
        (OperatorDecision::Abort, back(TrialEndReason::Aborted)),
    ] {
        let mut record = on_trial();
        assert!(record.force(force) && !record.force(OperatorDecision::Commit));
        assert_eq!(step(&record, absent), expected);
    }
    assert!(!begun().force(OperatorDecision::Commit) && !UpgradeRecord::default().force(OperatorDecision::Abort));
}

#[test]
fn a_commit_records_the_release_restores_the_links_and_stops_the_old_watchdog() {
    let mut record = on_trial();
    assert!(record.commit(None));
    let named = Evidence { installed: WhichRelease::To, ..passed() };
    let home = Evidence { links: RoleLinks::Executable, ..named };
    let alone = Evidence { decider: Decider::Manager, watchdog: None, ..home };
    for (evidence, expected) in [
        (passed(), UpgradeStep::RecordRelease(WhichRelease::To)),
        (named, UpgradeStep::LinkToExecutable),
        (home, UpgradeStep::StopWatchdog),
        (Evidence { watchdog: Some(WhichRelease::To), ..home }, UpgradeStep::Record(RecordChange::Finish)),
        (Evidence { decider: Decider::Manager, ..home }, UpgradeStep::Wait(Wait::OtherRole)),
        (alone, UpgradeStep::Record(RecordChange::Finish)),
    ] {
        assert_eq!(step(&record, evidence), expected, "{evidence:?}");
    }
    assert!(!record.force(OperatorDecision::Abort));
}

#[test]
fn a_roll_back_restores_restarts_and_skips() {
    let mut record = on_trial();
    assert!(record.roll_back(TrialEndReason::Memory, true));
    let restored = Evidence { executable: InstalledExecutable::From, ..passed() };
    let old = Evidence { manager: ready().manager, ..restored };
    for (evidence, expected) in [
        (Evidence { links: RoleLinks::Executable, ..passed() }, UpgradeStep::LinkToBackup),
        (passed(), UpgradeStep::Restore),
        (Evidence { executable: InstalledExecutable::Neither, ..passed() }, UpgradeStep::LinkToExecutable),
        (Evidence { installed: WhichRelease::To, ..restored }, UpgradeStep::RecordRelease(WhichRelease::From)),
        (restored, UpgradeStep::RestartManager),
        (Evidence { manager: Some(ManagerEvidence { answered: None, ..NEW }), ..restored }, UpgradeStep::KillManager),
        (old, UpgradeStep::LinkToExecutable),
        (Evidence { links: RoleLinks::Executable, ..old }, UpgradeStep::Record(RecordChange::FinishAndSkip)),
        (
            Evidence { backup_intact: false, ..passed() },
            UpgradeStep::Record(RecordChange::Commit(Some(TrialEndReason::NoBackup))),
        ),
    ] {
        assert_eq!(step(&record, evidence), expected, "{evidence:?}");
    }
    assert!(record.apply(RecordChange::FinishAndSkip));
    let refused = record.begin(image("1", '1'), image("2", '2'));
    assert_eq!(
        refused,
        Err(UpgradeRefusal::Skipped(
            "the new manager used too many resources: more memory than spmMaxMem, or hundreds of processes".to_owned()
        ))
    );
    assert!(record.clear_skips() && record.begin(image("1", '1'), image("2", '2')).is_ok());
}

#[test]
fn the_installer_restores_the_old_release_without_a_skip() {
    let installer = Evidence { decider: Decider::Installer, manager: None, watchdog: None, stopped: true, ..passed() };
    let mut record = on_trial();
    let UpgradeStep::Record(change @ RecordChange::RollBack { skips: false, .. }) = step(&record, installer) else {
        panic!("{:?}", step(&record, installer))
    };
    assert!(record.apply(change));
    assert_eq!(step(&record, installer), UpgradeStep::Restore);
    let home = Evidence { executable: InstalledExecutable::From, links: RoleLinks::Executable, ..installer };
    assert_eq!(step(&record, home), UpgradeStep::Record(RecordChange::Drop));
}

#[test]
fn without_a_backup_the_new_release_stays() {
    let lost = Evidence { backup_intact: false, ..passed() };
    let commits = UpgradeStep::Record(RecordChange::Commit(Some(TrialEndReason::NoBackup)));
    assert_eq!(step(&on_trial(), lost), commits);
    // No watchdog can be started from the backup then.
    let manager = Evidence { decider: Decider::Manager, watchdog: None, ..lost };
    assert_eq!(step(&on_trial(), manager), commits);
}

#[test]
fn a_lost_record_restores_the_links() {
    let record = UpgradeRecord::default();
    let lost = Evidence { executable: InstalledExecutable::Neither, ..passed() };
    assert_eq!(step(&record, lost), UpgradeStep::LinkToExecutable);
    assert_eq!(step(&record, Evidence { links: RoleLinks::Executable, ..lost }), UpgradeStep::Nothing);
}

#[test]
fn a_second_upgrade_is_rejected_and_the_running_release_is_never_skipped() {
    let mut record = begun();
    assert_eq!(record.begin(image("1", '1'), image("3", '3')), Err(UpgradeRefusal::UnderWay));
    let (one, two) = (image("1", '1'), image("2", '2'));
    let mut record = UpgradeRecord::default();
    assert_eq!(record.begin(one.clone(), one.clone()), Err(UpgradeRefusal::Running));
    record.skip(&one, "bad".to_owned(), &one);
    assert_eq!(record.skipped(&one.version, &one.sha256), None);
    for number in 0..40 {
        record.skip(&image(&format!("v{number}"), '3'), "bad".to_owned(), &one);
    }
    assert!(record.skipped(&"v23".parse().unwrap(), &image("v23", '3').sha256).is_none());
    assert!(record.skipped(&"v24".parse().unwrap(), &image("v24", '3').sha256).is_some());
    // Another package of a skipped version may be tried.
    record.skip(&two, "bad".to_owned(), &one);
    assert!(record.begin(one, Image { sha256: image("9", '9').sha256, ..two }).is_ok());
}

#[test]
fn the_third_interrupted_switch_to_a_release_skips_it() {
    let (one, two) = (image("1", '1'), image("2", '2'));
    let mut record = UpgradeRecord::default();
    let mut interrupt =
        |to: &Image| record.begin(one.clone(), to.clone()).is_ok() && record.apply(RecordChange::Interrupt);
    assert!(interrupt(&two) && interrupt(&two));
    // Another target starts its own count.
    assert!(interrupt(&image("3", '3')));
    assert_eq!([(); 4].map(|()| interrupt(&two)), [true, true, true, false]);
}

#[test]
fn a_change_that_does_not_fit_the_phase_changes_nothing() {
    let mut committing = on_trial();
    assert!(committing.commit(None));
    for (record, change) in [
        (UpgradeRecord::default(), RecordChange::Drop),
        (begun(), RecordChange::Commit(None)),
        (begun(), RecordChange::CountDeath),
        (on_trial(), RecordChange::BeginTrial),
        (on_trial(), RecordChange::Finish),
        (committing, RecordChange::CountDeath),
    ] {
        let mut changed = record.clone();
        assert!(!changed.apply(change), "{change:?}");
        assert_eq!(changed, record);
    }
}

#[test]
fn two_releases_with_the_same_bytes_are_distinguished_by_the_record() {
    let mut record = UpgradeRecord::default();
    record.begin(image("1", '7'), image("2", '7')).unwrap();
    let trial = record.trial().unwrap();
    let place = |digit: char| InstalledExecutable::of(trial, Some(&image("1", digit).executable));
    assert_eq!(
        [place('7'), place('8'), InstalledExecutable::of(trial, None)],
        [InstalledExecutable::Both, InstalledExecutable::Neither, InstalledExecutable::Missing]
    );
    let both = Evidence { executable: InstalledExecutable::Both, ..passed() };
    assert!(record.begin_trial());
    assert_eq!(step(&record, both), UpgradeStep::Record(RecordChange::Commit(None)));
    assert!(record.roll_back(TrialEndReason::Aborted, true));
    assert_eq!(step(&record, both), UpgradeStep::RestartManager);
}

#[test]
fn fields_of_a_later_version_are_written_back_at_every_level() {
    let value = |record: &UpgradeRecord| serde_json::to_value(record).unwrap();
    let mut record = begun();
    record.skip(&image("4", '4'), "bad".to_owned(), &image("1", '1'));
    let mut text = value(&record);
    for place in ["", "/trial", "/trial/from", "/trial/to", "/skipped/0"] {
        text.pointer_mut(place).unwrap()["later"] = serde_json::json!([1, -2, 0.5, null]);
    }
    text["interruptions"] = serde_json::json!({
        "version": "2", "sha256": "2".repeat(64), "count": 1, "later": {"x": "y"}
    });
    let read: UpgradeRecord = serde_json::from_value(text.clone()).unwrap();
    assert_eq!(value(&read), text);
    assert!(text["trial"]["spentSeconds"].is_u64());
    // Fields that an earlier version does not write have defaults.
    text["trial"].as_object_mut().unwrap().retain(|key, _| ["from", "to", "phase"].contains(&key.as_str()));
    assert!(serde_json::from_value::<UpgradeRecord>(text).is_ok());
}

#[test]
fn status_shows_the_wait() {
    let limits = TrialLimits::default();
    let view = |record: &UpgradeRecord, evidence| status(record, &evidence, &limits).unwrap();
    assert_eq!(status(&UpgradeRecord::default(), &passed(), &limits), None);
    let young = Evidence { manager: Some(ManagerEvidence { answered: Some(S(10)), ..NEW }), ..passed() };
    let silent = ManagerEvidence { heartbeat: false, ..NEW };
    let unproven = Evidence { manager: Some(silent), probe: Probe::Fails(S(1)), ..passed() };
    let of_manager = Evidence { decider: Decider::Manager, watchdog: None, ..young };
    for (evidence, phase, seconds_left) in [
        (young, UpgradeViewPhase::Trial, Some(20)),
        (of_manager, UpgradeViewPhase::Trial, Some(20)),
        (unproven, UpgradeViewPhase::Unproven, Some(59)),
        (Evidence { stopped: true, ..passed() }, UpgradeViewPhase::Paused, None),
    ] {
        let view = view(&on_trial(), evidence);
        assert_eq!((view.phase, view.seconds_left, view.tries_left), (phase, seconds_left, 3));
    }
    let mut record = on_trial();
    assert!(record.apply(RecordChange::CountDeath) && record.roll_back(TrialEndReason::NoAnswer, true));
    let view = view(&record, passed());
    assert_eq!((view.phase, view.tries_left), (UpgradeViewPhase::RollingBack, 2));
    assert_eq!(view.reason.as_deref(), Some("the new manager did not answer in time"));
    assert_eq!((view.from.as_str(), view.to.as_str()), ("1", "2"));
}

#[test]
fn an_operators_change_stays_until_another_release_is_ordered_or_installed() {
    let (one, two) = (image("1", '1'), image("2", '2'));
    let mut record = UpgradeRecord::default();
    record.overrule(Some((&two.version, Some(&two.sha256))));
    assert!(record.is_held() && record.overrules(&two.version, Some(&two.sha256)));
    assert!(!record.overrules(&two.version, Some(&one.sha256)) && !record.overrules(&one.version, None));
    assert!(record.release_hold() && !record.is_held());
    record.overrule(None);
    assert!(
        record.is_held() && !record.overrules(&two.version, Some(&two.sha256)),
        "the first order is a different one"
    );
    record.skip(&two, "bad".to_owned(), &one);
    assert!(record.skips(&two.version, None).is_some() && record.skips(&two.version, Some(&one.sha256)).is_none());
    record.replaced(&two.version);
    assert!(!record.is_held() && record.skips(&two.version, None).is_none());
}
