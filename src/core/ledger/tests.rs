//! The verbs, by example and in any order.

use proptest::prelude::*;

use super::*;

fn release(version: &str) -> LedgerRelease {
    let digit = version.bytes().last().unwrap_or(b'0') as char;
    LedgerRelease {
        version: version.parse().unwrap(),
        sha256: Some(digit.to_string().repeat(64).parse().unwrap()),
        epoch: 1,
        unknown: UnknownFields::new(),
    }
}

fn skipped(version: &str) -> SkippedRelease {
    SkippedRelease {
        version: version.parse().unwrap(),
        sha256: None,
        reason: "bad".into(),
        failures: 1,
        until: None,
        retry: 0,
        unknown: UnknownFields::new(),
    }
}

fn versions(entry: &LedgerEntry) -> [Option<&str>; 4] {
    [&entry.active, &entry.backup, &entry.probation, &entry.staged]
        .map(|place| place.as_ref().map(|release| release.version.as_str()))
}

#[test]
fn an_upgrade_keeps_the_previous_release_before_and_after_the_commit() {
    let mut entry = LedgerEntry::default();
    entry.stage(release("1"));
    entry.activate(release("1"));
    assert_eq!(versions(&entry), [Some("1"), None, None, None]);
    entry.stage(release("2"));
    entry.begin_probation(release("2"));
    assert_eq!(versions(&entry), [Some("1"), None, Some("2"), None]);
    assert_eq!(entry.current().unwrap().version.as_str(), "2");
    assert!(entry.commit() && !entry.commit());
    assert_eq!(versions(&entry), [Some("2"), Some("1"), None, None]);
    entry.begin_probation(release("3"));
    assert!(entry.roll_back() && !entry.roll_back());
    assert_eq!(versions(&entry), [Some("2"), Some("1"), None, None]);
}

#[test]
fn an_activation_of_the_active_release_ends_the_probation_of_another() {
    let mut entry = LedgerEntry::from_disk(Some(release("1")), None);
    entry.begin_probation(release("2"));
    entry.begin_probation(release("1"));
    assert_eq!(versions(&entry), [Some("1"), None, None, None]);
    // A third one replaces the second; the first stays to roll back to.
    entry.begin_probation(release("2"));
    entry.begin_probation(release("3"));
    assert_eq!(versions(&entry), [Some("1"), None, Some("3"), None]);
}

#[test]
fn the_active_release_is_never_skipped_and_another_package_of_a_version_is_tried() {
    let mut entry = LedgerEntry::from_disk(Some(release("1")), None);
    entry.skip(skipped("1"));
    assert_eq!(entry.skipped(&"1".parse().unwrap(), None), None);
    let of = |digit: char| -> Digest { digit.to_string().repeat(64).parse().unwrap() };
    entry.skip(SkippedRelease { sha256: Some(of('a')), ..skipped("2") });
    let two: Version = "2".parse().unwrap();
    assert!(entry.skipped(&two, None).is_some() && entry.skipped(&two, Some(&of('a'))).is_some());
    assert_eq!(entry.skipped(&two, Some(&of('b'))), None);
    entry.stage(release("2"));
    assert_eq!(entry.skipped(&two, None), None);
    for number in 0..40 {
        entry.skip(skipped(&format!("v{number}")));
    }
    assert_eq!(entry.skipped.len(), MAX_SKIPPED);
    assert!(entry.clear_skips() && !entry.clear_skips());
}

#[test]
fn an_incomplete_release_is_replaced_by_a_complete_one() {
    let full = || {
        let mut entry = LedgerEntry::from_disk(Some(release("2")), Some(release("1")));
        entry.begin_probation(release("3"));
        entry
    };
    for (whole, expected) in [
        (&["1", "2", "3"][..], [Some("2"), Some("1"), Some("3")]),
        (&["1", "2"][..], [Some("2"), Some("1"), None]),
        (&["1"][..], [Some("1"), None, None]),
        // The backup stays the backup, even after the other is committed.
        (&["1", "3"][..], [None, Some("1"), Some("3")]),
        (&[][..], [None, None, None]),
    ] {
        let mut entry = full();
        entry.drop_incomplete(|version| whole.contains(&version.as_str()));
        assert_eq!(versions(&entry)[..3], expected, "{whole:?}");
    }
}

#[test]
fn a_probation_that_did_not_start_is_dropped_and_one_that_did_is_resumed() {
    for (running, expected) in
        [("1", [Some("1"), None, None]), ("2", [Some("1"), None, Some("2")]), ("3", [Some("3"), Some("1"), None])]
    {
        let mut entry = LedgerEntry::from_disk(Some(release("1")), None);
        entry.begin_probation(release("2"));
        entry.resume(&release(running));
        assert_eq!(versions(&entry)[..3], expected, "{running}");
    }
}

#[test]
fn a_skipped_backup_that_replaces_a_lost_active_release_is_not_skipped_any_more() {
    let mut entry = LedgerEntry::from_disk(Some(release("2")), Some(release("1")));
    entry.skip(skipped("1"));
    entry.begin_probation(release("3"));
    entry.drop_incomplete(|version| version.as_str() != "2");
    entry.roll_back();
    assert_eq!((versions(&entry)[0], entry.skipped(&release("1").version, None)), (Some("1"), None));
}

/// The second activation of a release can be recorded while the release that it replaced is still stopping.
#[test]
fn a_release_replaced_on_probation_stays_given_up_after_a_second_activation() {
    let mut entry = LedgerEntry::from_disk(Some(release("1")), None);
    for version in ["2", "3", "3"] {
        entry.begin_probation(release(version));
    }
    entry.resume(&release("2"));
    assert_eq!(versions(&entry), [Some("1"), None, None, None]);
}

#[test]
fn fields_of_a_later_version_are_written_back() {
    let text = r#"{"agents":{"a":{"active":{"version":"1","sha256":"0000000000000000000000000000000000000000000000000000000000000000","epoch":3,"later":[1,-2,0.5,null]},"more":{"x":"y"}}},"form":7}"#;
    let ledger: Ledger = serde_json::from_str(text).unwrap();
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(value(&serde_json::to_string(&ledger).unwrap()), value(text));
}

#[derive(Debug, Clone)]
enum Verb {
    Stage(String),
    Activate(String),
    Begin(String),
    Commit,
    RollBack,
    Skip(String),
    Lose(String),
    Return,
}

fn verb() -> impl Strategy<Value = Verb> {
    let version = "[1-4]";
    prop_oneof![
        version.prop_map(Verb::Stage),
        version.prop_map(Verb::Activate),
        version.prop_map(Verb::Begin),
        Just(Verb::Commit),
        Just(Verb::RollBack),
        version.prop_map(Verb::Skip),
        version.prop_map(Verb::Lose),
        Just(Verb::Return),
    ]
}

#[test]
fn a_backup_that_replaces_a_lost_release_is_not_skipped() {
    let mut entry = LedgerEntry::default();
    entry.activate(release("2"));
    entry.activate(release("3"));
    entry.begin_probation(release("1"));
    entry.drop_incomplete(|version| version.as_str() != "3");
    entry.skip(skipped("2"));
    entry.roll_back();
    assert_eq!(entry.active().map(|active| active.version.as_str()), Some("2"));
    assert_eq!(entry.skipped(&"2".parse().unwrap(), None), None);
}

proptest! {
    /// For any sequence of verbs: the backup differs from the active release, the current release stays on disk, and an active release is lost
    /// only with its files.
    #[test]
    fn there_is_always_a_release_to_roll_back_to(verbs in proptest::collection::vec(verb(), 0..30)) {
        let mut entry = LedgerEntry::default();
        for verb in verbs {
            let before = entry.clone();
            match &verb {
                Verb::Stage(version) => entry.stage(release(version)),
                Verb::Activate(version) => entry.activate(release(version)),
                Verb::Begin(version) => entry.begin_probation(release(version)),
                Verb::Commit => drop(entry.commit()),
                Verb::RollBack => drop(entry.roll_back()),
                Verb::Skip(version) => entry.skip(skipped(version)),
                Verb::Return => drop(entry.return_to_backup()),
                Verb::Lose(version) => entry.drop_incomplete(|other| other.as_str() != version),
            }
            prop_assert!(entry.probation.is_none() || entry.probation != entry.active);
            prop_assert!(entry.current().is_none_or(|current| entry.kept().any(|kept| *kept == current.version)));
            let lost = matches!(verb, Verb::Lose(_));
            let kept = |release: &LedgerRelease| entry.kept().any(|kept| *kept == release.version);
            prop_assert!(lost || before.backup.as_ref().is_none_or(kept) || entry.backup.is_some(), "{verb:?} lost the backup");
            prop_assert!(entry.backup.is_none() || entry.backup != entry.active);
            if before.active.is_some() && !lost {
                let stays = [&entry.active, &entry.backup].contains(&&before.active);
                prop_assert!(stays, "{verb:?} lost {:?}", before.active);
            }
            if let Some(active) = &entry.active {
                prop_assert_eq!(entry.skipped(&active.version, active.sha256.as_ref()), None);
            }
            let again: LedgerEntry = serde_json::from_str(&serde_json::to_string(&entry).unwrap()).unwrap();
            prop_assert_eq!(again, entry.clone());
        }
    }
}
