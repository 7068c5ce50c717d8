//! The rules, one by one.

use super::view::ViewPhase;
use super::*;

const S: fn(u64) -> Duration = Duration::from_secs;

fn image(version: &str, executable: char) -> Image {
    let digit = version.chars().last().unwrap();
    super::search::image(version, digit, executable)
}

fn begun() -> Record {
    let mut record = Record::default();
    record.begin(image("1", '1'), image("2", '2')).unwrap();
    record
}

fn on_trial() -> Record {
    let mut record = begun();
    assert!(record.begin_trial());
    record
}

/// What the old manager sees when everything is ready for the switch.
fn ready() -> Evidence {
    let old =
        Manager { image: Which::From, answered: Some(S(999)), adopted: true, heartbeat: true, over_memory: false };
    Evidence {
        asker: Asker::Manager,
        recorded: true,
        executable: Placed::From,
        backup_whole: true,
        links: Links::Backup,
        installed: Which::From,
        staged: true,
        manager: Some(old),
        watchdog: Some(Which::From),
        died: false,
        took_over: false,
        probe: Probe::NotAsked,
        proof: Proof::NotBegun,
        stopped: false,
    }
}

/// What the judge sees of a new manager that has passed everything.
fn passed() -> Evidence {
    Evidence {
        asker: Asker::Watchdog,
        executable: Placed::To,
        staged: false,
        manager: Some(NEW),
        proof: Proof::Passed,
        ..ready()
    }
}

const NEW: Manager = Manager {
    image: Which::To,
    answered: Some(Duration::from_secs(30)),
    adopted: true,
    heartbeat: true,
    over_memory: false,
};

fn step(record: &Record, evidence: Evidence) -> Step {
    next(record, &evidence, &Limits::default())
}

fn back(reason: Reason) -> Step {
    Step::Record(Change::RollBack { reason, condemns: true })
}

#[test]
fn the_switch_follows_the_record_the_backup_and_the_links() {
    let home = Evidence { backup_whole: false, links: Links::Executable, ..ready() };
    for (evidence, expected) in [
        (Evidence { recorded: false, ..home }, Step::Save),
        (home, Step::BackUp),
        (Evidence { links: Links::Mixed, ..ready() }, Step::LinkToBackup),
        (ready(), Step::Swap),
        (Evidence { executable: Placed::Both, ..ready() }, Step::Record(Change::BeginTrial)),
        (Evidence { executable: Placed::To, ..ready() }, Step::RestartManager),
        (Evidence { asker: Asker::Watchdog, ..ready() }, Step::Wait(Wait::OtherRole)),
        (Evidence { asker: Asker::Watchdog, executable: Placed::To, ..ready() }, Step::Record(Change::BeginTrial)),
    ] {
        assert_eq!(step(&begun(), evidence), expected, "{evidence:?}");
    }
}

#[test]
fn a_switch_that_cannot_happen_is_given_up_with_the_links_at_home() {
    let end = |change| [Step::LinkToExecutable, Step::Record(change)];
    let mut aborted = begun();
    assert!(aborted.force(Force::Abort));
    for (record, evidence, change) in [
        (begun(), Evidence { staged: false, ..ready() }, Change::Interrupt),
        (begun(), Evidence { stopped: true, ..ready() }, Change::Drop),
        (begun(), Evidence { asker: Asker::Installer, manager: None, ..ready() }, Change::Drop),
        (begun(), Evidence { executable: Placed::Neither, ..ready() }, Change::Drop),
        (aborted, ready(), Change::SkipAndForget),
        (on_trial(), Evidence { asker: Asker::Watchdog, ..ready() }, Change::Interrupt),
    ] {
        let steps = [evidence.links, Links::Executable].map(|links| step(&record, Evidence { links, ..evidence }));
        assert_eq!(steps, end(change), "{evidence:?}");
    }
}

#[test]
fn a_half_done_switch_of_windows_is_undone() {
    let missing = Evidence { executable: Placed::Missing, ..ready() };
    assert_eq!(step(&begun(), missing), Step::Restore);
    let judge = Evidence { asker: Asker::Watchdog, ..missing };
    assert_eq!(step(&begun(), judge), Step::Restore);
    assert_eq!(step(&on_trial(), judge), back(Reason::Vanished));
    assert_eq!(step(&Record::default(), judge), Step::Restore);
}

#[test]
fn a_new_manager_is_committed_when_it_has_passed_everything() {
    let with = |change: fn(&mut Manager)| {
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
        (passed(), Step::Record(Change::Commit(None))),
        (Evidence { proof: Proof::NotBegun, ..passed() }, Step::Prove),
        (Evidence { proof: Proof::Running, ..passed() }, Step::Wait(Wait::Proof)),
        (Evidence { proof: Proof::Failed, ..passed() }, Step::Record(Change::FailProof)),
        (Evidence { died: true, manager: None, ..passed() }, Step::Record(Change::LoseTry)),
        (Evidence { took_over: true, ..passed() }, Step::Record(Change::LoseWatchdog)),
        (Evidence { manager: None, ..passed() }, Step::Wait(Wait::Answer { left: S(60) })),
        (Evidence { manager: ready().manager, ..passed() }, Step::RestartManager),
        (Evidence { stopped: true, died: true, manager: None, ..passed() }, Step::Wait(Wait::Start)),
        (Evidence { links: Links::Mixed, ..passed() }, Step::LinkToBackup),
        (Evidence { watchdog: Some(Which::To), ..passed() }, Step::EndWatchdog),
        (Evidence { asker: Asker::Manager, ..passed() }, Step::Wait(Wait::OtherRole)),
        (with(|manager| manager.answered = None), Step::Wait(Wait::Answer { left: S(60) })),
        (with(|manager| manager.adopted = false), Step::Wait(Wait::Answer { left: S(60) })),
        (with(|manager| manager.answered = Some(S(29))), Step::Wait(Wait::Life { left: S(1) })),
        (with(|manager| manager.over_memory = true), back(Reason::Memory)),
        (unasked, Step::Probe),
        (asked(Probe::Running), Step::Wait(Wait::Probe)),
        (asked(Probe::Fails(S(20))), Step::Wait(Wait::Unproven { left: S(40) })),
        (asked(Probe::Fails(S(60))), Step::Probe),
        (asked(Probe::Works(S(59))), Step::Wait(Wait::Heartbeat { left: S(1) })),
        (asked(Probe::Works(S(60))), back(Reason::NoHeartbeat)),
    ] {
        assert_eq!(step(&on_trial(), evidence), expected, "{evidence:?}");
    }
}

#[test]
fn each_budget_condemns_when_it_is_used_up() {
    let lose = |change, times| {
        let mut record = on_trial();
        (0..times).for_each(|_| assert!(record.apply(change)));
        step(&record, passed())
    };
    let commits = Step::Record(Change::Commit(None));
    assert_eq!([lose(Change::LoseTry, 2), lose(Change::LoseTry, 3)], [commits, back(Reason::Died)]);
    assert_eq!([lose(Change::FailProof, 1), lose(Change::FailProof, 2)], [commits, back(Reason::Proof)]);
    let watchdogs = [lose(Change::LoseWatchdog, 4), lose(Change::LoseWatchdog, 5)];
    assert_eq!(watchdogs, [commits, back(Reason::WatchdogEnded)]);
}

#[test]
fn time_counts_until_the_new_manager_is_in_charge() {
    let mut record = on_trial();
    assert!(record.spend(59));
    let absent = Evidence { manager: None, ..passed() };
    let wait = Wait::Answer { left: S(1) };
    assert_eq!((step(&record, absent), wait.counts()), (Step::Wait(wait), true));
    assert_eq!(step(&record, passed()), Step::Record(Change::ResetTime));
    assert!(record.spend(1));
    assert_eq!(step(&record, absent), back(Reason::NoAnswer));
    let idle = Evidence { manager: Some(Manager { adopted: false, ..NEW }), ..passed() };
    assert_eq!(step(&record, idle), back(Reason::NotAdopted));
    assert!([Wait::OtherRole, Wait::Start, Wait::Unproven { left: S(1) }].iter().all(|wait| !wait.counts()));
}

#[test]
fn the_operator_decides_once_and_at_once() {
    let absent = Evidence { manager: None, stopped: true, ..passed() };
    for (force, expected) in
        [(Force::Commit, Step::Record(Change::Commit(Some(Reason::Forced)))), (Force::Abort, back(Reason::Aborted))]
    {
        let mut record = on_trial();
        assert!(record.force(force) && !record.force(Force::Commit));
        assert_eq!(step(&record, absent), expected);
    }
    assert!(!begun().force(Force::Commit) && !Record::default().force(Force::Abort));
}

#[test]
fn a_commit_names_the_release_leads_the_links_home_and_ends_the_old_watchdog() {
    let mut record = on_trial();
    assert!(record.commit(None));
    let named = Evidence { installed: Which::To, ..passed() };
    let home = Evidence { links: Links::Executable, ..named };
    let alone = Evidence { asker: Asker::Manager, watchdog: None, ..home };
    for (evidence, expected) in [
        (passed(), Step::RecordRelease(Which::To)),
        (named, Step::LinkToExecutable),
        (home, Step::EndWatchdog),
        (Evidence { watchdog: Some(Which::To), ..home }, Step::Record(Change::Forget)),
        (Evidence { asker: Asker::Manager, ..home }, Step::Wait(Wait::OtherRole)),
        (alone, Step::Record(Change::Forget)),
    ] {
        assert_eq!(step(&record, evidence), expected, "{evidence:?}");
    }
    assert!(!record.force(Force::Abort));
}

#[test]
fn a_roll_back_restores_restarts_and_skips() {
    let mut record = on_trial();
    assert!(record.roll_back(Reason::Memory, true));
    let restored = Evidence { executable: Placed::From, ..passed() };
    let old = Evidence { manager: ready().manager, ..restored };
    for (evidence, expected) in [
        (Evidence { links: Links::Executable, ..passed() }, Step::LinkToBackup),
        (passed(), Step::Restore),
        (Evidence { executable: Placed::Neither, ..passed() }, Step::LinkToExecutable),
        (Evidence { installed: Which::To, ..restored }, Step::RecordRelease(Which::From)),
        (restored, Step::RestartManager),
        (Evidence { manager: Some(Manager { answered: None, ..NEW }), ..restored }, Step::KillManager),
        (old, Step::LinkToExecutable),
        (Evidence { links: Links::Executable, ..old }, Step::Record(Change::SkipAndForget)),
        (Evidence { backup_whole: false, ..passed() }, Step::Record(Change::Commit(Some(Reason::NoBackup)))),
    ] {
        assert_eq!(step(&record, evidence), expected, "{evidence:?}");
    }
    assert!(record.apply(Change::SkipAndForget));
    let refused = record.begin(image("1", '1'), image("2", '2'));
    assert_eq!(
        refused,
        Err(Refusal::Skipped(
            "the new manager used too much: memory beyond spmMaxMem, or hundreds of processes".to_owned()
        ))
    );
    assert!(record.allow() && record.begin(image("1", '1'), image("2", '2')).is_ok());
}

#[test]
fn the_installer_returns_to_the_old_release_and_condemns_nothing() {
    let installer = Evidence { asker: Asker::Installer, manager: None, watchdog: None, stopped: true, ..passed() };
    let mut record = on_trial();
    let Step::Record(change @ Change::RollBack { condemns: false, .. }) = step(&record, installer) else {
        panic!("{:?}", step(&record, installer))
    };
    assert!(record.apply(change));
    assert_eq!(step(&record, installer), Step::Restore);
    let home = Evidence { executable: Placed::From, links: Links::Executable, ..installer };
    assert_eq!(step(&record, home), Step::Record(Change::Drop));
}

#[test]
fn without_a_backup_the_new_release_stays() {
    let lost = Evidence { backup_whole: false, ..passed() };
    let commits = Step::Record(Change::Commit(Some(Reason::NoBackup)));
    assert_eq!(step(&on_trial(), lost), commits);
    // No watchdog can be started from the backup then.
    let manager = Evidence { asker: Asker::Manager, watchdog: None, ..lost };
    assert_eq!(step(&on_trial(), manager), commits);
}

#[test]
fn a_lost_record_leads_the_links_home() {
    let record = Record::default();
    let lost = Evidence { executable: Placed::Neither, ..passed() };
    assert_eq!(step(&record, lost), Step::LinkToExecutable);
    assert_eq!(step(&record, Evidence { links: Links::Executable, ..lost }), Step::Nothing);
}

#[test]
fn another_upgrade_waits_and_the_running_release_is_never_skipped() {
    let mut record = begun();
    assert_eq!(record.begin(image("1", '1'), image("3", '3')), Err(Refusal::UnderWay));
    let (one, two) = (image("1", '1'), image("2", '2'));
    let mut record = Record::default();
    assert_eq!(record.begin(one.clone(), one.clone()), Err(Refusal::Running));
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
    let mut record = Record::default();
    let mut interrupt = |to: &Image| record.begin(one.clone(), to.clone()).is_ok() && record.apply(Change::Interrupt);
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
        (Record::default(), Change::Drop),
        (begun(), Change::Commit(None)),
        (begun(), Change::LoseTry),
        (on_trial(), Change::BeginTrial),
        (on_trial(), Change::Forget),
        (committing, Change::LoseTry),
    ] {
        let mut changed = record.clone();
        assert!(!changed.apply(change), "{change:?}");
        assert_eq!(changed, record);
    }
}

#[test]
fn two_releases_of_the_same_bytes_are_told_apart_by_the_record() {
    let mut record = Record::default();
    record.begin(image("1", '7'), image("2", '7')).unwrap();
    let trial = record.trial().unwrap();
    let place = |digit: char| Placed::of(trial, Some(&image("1", digit).executable));
    assert_eq!([place('7'), place('8'), Placed::of(trial, None)], [Placed::Both, Placed::Neither, Placed::Missing]);
    let both = Evidence { executable: Placed::Both, ..passed() };
    assert!(record.begin_trial());
    assert_eq!(step(&record, both), Step::Record(Change::Commit(None)));
    assert!(record.roll_back(Reason::Aborted, true));
    assert_eq!(step(&record, both), Step::RestartManager);
}

#[test]
fn fields_of_a_later_version_are_written_back_at_every_level() {
    let value = |record: &Record| serde_json::to_value(record).unwrap();
    let mut record = begun();
    record.skip(&image("4", '4'), "bad".to_owned(), &image("1", '1'));
    let mut text = value(&record);
    for place in ["", "/trial", "/trial/from", "/trial/to", "/skipped/0"] {
        text.pointer_mut(place).unwrap()["later"] = serde_json::json!([1, -2, 0.5, null]);
    }
    text["interruptions"] = serde_json::json!({
        "version": "2", "sha256": "2".repeat(64), "count": 1, "later": {"x": "y"}
    });
    let read: Record = serde_json::from_value(text.clone()).unwrap();
    assert_eq!(value(&read), text);
    assert!(text["trial"]["spentSeconds"].is_u64());
    // What an earlier version does not write has a default.
    text["trial"].as_object_mut().unwrap().retain(|key, _| ["from", "to", "phase"].contains(&key.as_str()));
    assert!(serde_json::from_value::<Record>(text).is_ok());
}

#[test]
fn status_shows_what_is_waited_for() {
    let limits = Limits::default();
    let view = |record: &Record, evidence| status(record, &evidence, &limits).unwrap();
    assert_eq!(status(&Record::default(), &passed(), &limits), None);
    let young = Evidence { manager: Some(Manager { answered: Some(S(10)), ..NEW }), ..passed() };
    let silent = Manager { heartbeat: false, ..NEW };
    let unproven = Evidence { manager: Some(silent), probe: Probe::Fails(S(1)), ..passed() };
    let of_manager = Evidence { asker: Asker::Manager, watchdog: None, ..young };
    for (evidence, phase, seconds_left) in [
        (young, ViewPhase::Trial, Some(20)),
        (of_manager, ViewPhase::Trial, Some(20)),
        (unproven, ViewPhase::Unproven, Some(59)),
        (Evidence { stopped: true, ..passed() }, ViewPhase::Paused, None),
    ] {
        let view = view(&on_trial(), evidence);
        assert_eq!((view.phase, view.seconds_left, view.tries_left), (phase, seconds_left, 3));
    }
    let mut record = on_trial();
    assert!(record.apply(Change::LoseTry) && record.roll_back(Reason::NoAnswer, true));
    let view = view(&record, passed());
    assert_eq!((view.phase, view.tries_left), (ViewPhase::RollingBack, 2));
    assert_eq!(view.reason.as_deref(), Some("the new manager did not answer in time"));
    assert_eq!((view.from.as_str(), view.to.as_str()), ("1", "2"));
}

#[test]
fn an_operators_change_holds_until_another_release_is_ordered_or_installed() {
    let (one, two) = (image("1", '1'), image("2", '2'));
    let mut record = Record::default();
    record.overrule(Some((&two.version, Some(&two.sha256))));
    assert!(record.is_held() && record.overrules(&two.version, Some(&two.sha256)));
    assert!(!record.overrules(&two.version, Some(&one.sha256)) && !record.overrules(&one.version, None));
    assert!(record.release_hold() && !record.is_held());
    record.overrule(None);
    assert!(record.is_held() && !record.overrules(&two.version, Some(&two.sha256)), "what is ordered first is another");
    record.skip(&two, "bad".to_owned(), &one);
    assert!(record.skips(&two.version, None).is_some() && record.skips(&two.version, Some(&one.sha256)).is_none());
    record.replaced(&two.version);
    assert!(!record.is_held() && record.skips(&two.version, None).is_none());
}
