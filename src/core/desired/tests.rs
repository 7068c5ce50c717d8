//! How answers change a desired state.

use proptest::prelude::*;

use super::super::env::Env;
use super::super::order::{Package, Spec};
use super::super::unknown::AnyValue;
use super::*;

fn order(name: &str, cmd: &str) -> AgentOrder {
    AgentOrder {
        name: name.parse().unwrap(),
        package: Package::new("1".parse().unwrap()),
        cmd: cmd.to_owned().into(),
        spec: Spec::default(),
        retry: 0,
        unknown: UnknownFields::new(),
    }
}

fn answer(lineage: &str, generation: u64, complete: bool, agents: &[(&str, &str)]) -> Answer {
    Answer {
        agent_id: "1".parse().unwrap(),
        error_message: None,
        interval: None,
        lineage: Some(lineage.into()),
        generation,
        cmd: None,
        manager: None,
        complete,
        removal_delay: Some(0),
        agents: Some(agents.iter().map(|(name, cmd)| MessageItem::Read(order(name, cmd))).collect()),
        pins: Vec::new(),
        ack: None,
    }
}

/// In 2026.
const NOW: u64 = 1_790_000_000_000;

fn host(present: &BTreeSet<AgentName>) -> AnswerContext<'_> {
    let clocks = Clocks { host: NOW, gateway: Some(NOW) };
    AnswerContext { os: Os::Linux, arch: Arch::Amd64, clocks, present, from_fallback: false }
}

fn evaluate(held: &DesiredState, present: &BTreeSet<AgentName>, answer: &Answer) -> AnswerOutcome {
    super::evaluate(held, answer, host(present))
}

fn evaluate_fallback(held: &DesiredState, present: &BTreeSet<AgentName>, answer: &Answer) -> AnswerOutcome {
    super::evaluate(held, answer, AnswerContext { from_fallback: true, ..host(present) })
}

fn rejection(held: &DesiredState, answer: &Answer) -> String {
    match evaluate(held, &BTreeSet::new(), answer) {
        AnswerOutcome::Reject(why) => why,
        other => panic!("{other:?}"),
    }
}

fn accept(held: &DesiredState, answer: &Answer) -> DesiredState {
    let present = held.agents.keys().cloned().collect();
    match evaluate(held, &present, answer) {
        AnswerOutcome::Accept(accepted) => {
            let kept = serde_json::to_string(&accepted.desired).unwrap();
            assert_eq!(
                serde_json::from_str::<DesiredState>(&kept).unwrap(),
                accepted.desired,
                "the stored state differs from the accepted one"
            );
            accepted.desired
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn fields_of_a_later_version_are_kept_and_change_nothing() {
    let later = |bytes: usize| UnknownFields::from([("later".to_owned(), AnyValue::Text("x".repeat(bytes)))]);
    let with = |generation: u64, bytes: usize| {
        let mut answer = answer("l", generation, true, &[("a", "start")]);
        first(&mut answer).unknown = later(bytes);
        answer
    };
    let unknown = UnknownFields::from([
        ("later".to_owned(), AnyValue::Natural(1)),
        ("told".to_owned(), AnyValue::List(vec![])),
        ("complete".to_owned(), AnyValue::Bool(true)),
    ]);
    let held = DesiredState { unknown, ..DesiredState::default() };
    let held = accept(&held, &with(1, 1));
    assert_eq!(held.unknown, UnknownFields::from([("later".to_owned(), AnyValue::Natural(1))]));
    assert_eq!(held.agents[&"a".parse().unwrap()].unknown, later(1));
    for bytes in [0, 1, 2] {
        assert_eq!(evaluate(&held, &BTreeSet::new(), &with(1, bytes)), AnswerOutcome::Unchanged);
    }
    // Those of the accepted list are stored if they fit.
    assert_eq!(accept(&held, &with(2, 4_000)).agents[&"a".parse().unwrap()].unknown, later(4_000));
    assert_eq!(accept(&held, &with(2, 4_100)).agents[&"a".parse().unwrap()].unknown, UnknownFields::new());
}

fn names(desired: &DesiredState) -> Vec<&str> {
    desired.agents.keys().map(AgentName::as_str).collect()
}

#[test]
fn only_a_complete_list_that_is_not_empty_removes_omitted_sub_agents() {
    let held = accept(&DesiredState::default(), &answer("l", 1, true, &[("a", "start"), ("b", "start")]));
    assert_eq!(names(&accept(&held, &answer("l", 2, true, &[]))), ["a", "b"]);
    assert_eq!(names(&accept(&held, &answer("l", 2, false, &[]))), ["a", "b"]);
    assert_eq!(names(&accept(&held, &answer("l", 2, false, &[("a", "start")]))), ["a", "b"]);
    let after = accept(&held, &answer("l", 2, true, &[("a", "start")]));
    assert_eq!(names(&after), ["a"]);
    assert!(after.removed.contains(&"b".parse().unwrap()));
    for (complete, kept) in [(true, 2), (false, 0)] {
        let AnswerOutcome::Accept(accepted) = evaluate(&held, &BTreeSet::new(), &answer("l", 2, complete, &[])) else {
            panic!()
        };
        assert_eq!(accepted.kept, kept);
    }
    let without_agents = Answer { agents: None, ..answer("l", 3, true, &[]) };
    assert_eq!(evaluate(&held, &BTreeSet::new(), &without_agents), AnswerOutcome::Unchanged);
}

#[test]
fn a_complete_list_also_removes_installed_sub_agents_that_were_never_ordered() {
    let present = BTreeSet::from(["stray".parse().unwrap()]);
    let AnswerOutcome::Accept(accepted) =
        evaluate(&DesiredState::default(), &present, &answer("l", 1, true, &[("a", "start")]))
    else {
        panic!()
    };
    assert!(accepted.desired.removed.contains(&"stray".parse().unwrap()));
}

#[test]
fn an_uninstalled_sub_agent_can_be_ordered_again() {
    let held = accept(&DesiredState::default(), &answer("l", 1, false, &[("a", "start"), ("b", "start")]));
    let gone = accept(&held, &answer("l", 2, false, &[("a", "uninstall")]));
    assert_eq!(names(&gone), ["b"]);
    let back = accept(&gone, &answer("l", 3, false, &[("a", "start")]));
    assert_eq!(names(&back), ["a", "b"]);
    assert!(back.removed.is_empty());
}

#[test]
fn a_generation_only_grows_within_its_lineage() {
    let held = accept(&DesiredState::default(), &answer("l", 5, true, &[("a", "start")]));
    let evaluated = |answer| evaluate(&held, &BTreeSet::new(), &answer);
    assert!(matches!(evaluated(answer("l", 4, true, &[("a", "start")])), AnswerOutcome::Reject(_)));
    assert!(matches!(evaluated(answer("l", 5, true, &[("a", "stop")])), AnswerOutcome::Reject(_)));
    assert_eq!(evaluated(answer("l", 5, true, &[("a", "start")])), AnswerOutcome::Unchanged);
    // A list without lineage and generation is accepted too, once.
    let uncounted = Answer { lineage: None, ..answer("", 0, true, &[("a", "start")]) };
    let accepted = accept(&DesiredState::default(), &uncounted);
    assert_eq!(evaluate(&accepted, &BTreeSet::new(), &uncounted), AnswerOutcome::Unchanged);
    assert!(
        matches!(evaluated(answer("m", 1, true, &[("a", "stop")])), AnswerOutcome::Accept(accepted) if accepted.new_lineage)
    );
}

#[test]
fn a_repeated_list_of_a_fallback_endpoint_changes_nothing() {
    let held = accept(&DesiredState::default(), &answer("l", 5, true, &[("a", "start"), ("b", "start")]));
    let present = held.agents.keys().cloned().collect();
    let list = answer("m", 1, true, &[("a", "start")]);
    let AnswerOutcome::Accept(accepted) = evaluate_fallback(&held, &present, &list) else { panic!() };
    assert_eq!(names(&accepted.desired), ["a", "b"]);
    assert_eq!(evaluate_fallback(&accepted.desired, &present, &list), AnswerOutcome::Unchanged);
    assert_eq!(evaluate(&accepted.desired, &present, &list), AnswerOutcome::Unchanged);
    let next = answer("m", 2, true, &[("a", "start")]);
    let AnswerOutcome::Accept(accepted) = evaluate_fallback(&accepted.desired, &present, &next) else { panic!() };
    assert_eq!(names(&accepted.desired), ["a"], "the next list of that endpoint removes what it omits");
}

#[test]
fn a_list_without_generation_can_remove_a_stray_sub_agent() {
    let uncounted = |cmds: &[(&str, &str)]| Answer { lineage: None, ..answer("", 0, false, cmds) };
    let held = accept(&DesiredState::default(), &uncounted(&[("a", "start")]));
    let present = BTreeSet::from(["a".parse().unwrap(), "stray".parse().unwrap()]);
    let list = uncounted(&[("a", "start"), ("stray", "uninstall")]);
    let AnswerOutcome::Accept(accepted) = evaluate(&held, &present, &list) else { panic!() };
    assert!(accepted.desired.removed.contains(&"stray".parse().unwrap()));
    assert_eq!(evaluate(&accepted.desired, &present, &list), AnswerOutcome::Unchanged);
}

#[test]
fn a_generation_far_ahead_is_rejected_and_a_held_one_is_given_up_for_a_lower_one() {
    let ordered = [("a", "start")];
    let held = accept(&DesiredState::default(), &answer("l", 5, true, &ordered));
    for far in [u64::MAX, 1 << 53, NOW * 2] {
        for lineage in ["l", "m"] {
            let why = rejection(&held, &answer(lineage, far, true, &[("a", "stop")]));
            assert!(why.contains("ahead of the clocks"), "{why}");
        }
        // An older version may have accepted it.
        let absurd = DesiredState { generation: far, ..held.clone() };
        for (lineage, generation) in [("m", 1), ("l", NOW), ("l", 6)] {
            let back = answer(lineage, generation, true, &[("a", "stop")]);
            let AnswerOutcome::Accept(accepted) = evaluate(&absurd, &BTreeSet::new(), &back) else {
                panic!("{lineage} {generation}")
            };
            let AcceptedState { desired, new_lineage, moved_back, .. } = *accepted;
            assert_eq!((new_lineage, moved_back, desired.generation), (lineage == "m", lineage == "l", generation));
            assert_eq!(desired.agents[&"a".parse().unwrap()].run, Run::Stop);
        }
        assert_eq!(evaluate(&absurd, &BTreeSet::new(), &answer("l", far, true, &ordered)), AnswerOutcome::Unchanged);
    }
}

#[test]
fn an_answer_beyond_the_limits_of_a_host_is_rejected_as_a_whole() {
    let names: Vec<String> = (0..1_001).map(|number| format!("a{number}")).collect();
    let orders = |from: usize, to: usize| -> Vec<(&str, &str)> {
        names[from..to].iter().map(|name| (name.as_str(), "start")).collect()
    };
    let why = rejection(&DesiredState::default(), &answer("l", 1, true, &orders(0, 1_001)));
    assert!(why.contains("1001 orders: at most 1000"), "{why}");
    // Several partial lists cannot exceed the limit either.
    let held = accept(&DesiredState::default(), &answer("l", 1, true, &orders(0, 1_000)));
    let why = rejection(&held, &answer("l", 2, false, &orders(1_000, 1_001)));
    assert!(why.contains("1001 sub-agents: at most 1000"), "{why}");
    assert_eq!(accept(&held, &answer("l", 2, true, &orders(1, 1_001))).agents.len(), 1_000);
    // A larger state that an older version accepted may shrink.
    let mut large = held.clone();
    large.agents.extend(held.agents.iter().map(|(name, order)| (format!("{name}-b").parse().unwrap(), order.clone())));
    assert_eq!(accept(&large, &answer("l", 2, false, &[("a1", "uninstall")])).agents.len(), 1_999);

    type Change = fn(&mut Answer);
    let changes: [(Change, &str); 2] = [
        (|answer| answer.lineage = Some("l".repeat(129)), "a lineage of 129 bytes: at most 128"),
        (|answer| each(answer).for_each(|order| order.spec.env = env(1, 127 << 10)), "environments of 1170459 bytes"),
    ];
    for (change, words) in changes {
        let mut changed = answer("l", 2, true, &[("a", "start"), ("b", "stop")]);
        let others = (0..7).map(|number| MessageItem::Read(order(&format!("c{number}"), "start")));
        changed.agents.iter_mut().for_each(|orders| orders.extend(others.clone()));
        assert!(matches!(evaluate(&held, &BTreeSet::new(), &changed), AnswerOutcome::Accept(_)));
        change(&mut changed);
        let why = rejection(&held, &changed);
        assert!(why.contains(words), "{why}");
    }
}

#[test]
fn the_protocol_document_states_the_limits_of_orders() {
    assert_eq!((MAX_TARBALL_BYTES, MAX_FILE_BYTES, MAX_LINEAGE_BYTES, MAX_ENV_BYTES), (2_048, 255, 128, 1 << 20));
    for words in [
        "a `tarball` of more than 2,048 bytes",
        "a `file` of more than 255 bytes",
        "`lineage` (at most 128 bytes)",
        "1 MiB of `env` in all",
        &format!("`removalDelay` seconds ({REMOVAL_DELAY} where"),
    ] {
        assert!(super::super::protocol::document().contains(words), "{words}");
    }
}

fn each(answer: &mut Answer) -> impl Iterator<Item = &mut AgentOrder> {
    answer.agents.iter_mut().flatten().filter_map(|item| match item {
        MessageItem::Read(order) => Some(order),
        MessageItem::Unreadable(_) => None,
    })
}

fn first(answer: &mut Answer) -> &mut AgentOrder {
    each(answer).next().unwrap()
}

#[test]
fn an_invalid_order_is_rejected_alone_and_does_not_count_as_omitted() {
    let ordered = [("a", "start"), ("b", "start")];
    let held = accept(&DesiredState::default(), &answer("l", 1, true, &ordered));
    type Change = fn(&mut AgentOrder);
    let changes: [(Change, &str); 7] = [
        (|order| order.package.tarball = Some("t".repeat(2_049)), "a tarball of 2049 bytes: at most 2048"),
        (|order| order.package.file = Some("f".repeat(256)), "a file name of 256 bytes: at most 255"),
        (|order| order.cmd = "c".repeat(65).into(), "a command of 65 bytes: at most 64"),
        (|order| order.spec.env = env(1_001, 1), "its environment: it has 1001 variables"),
        (|order| order.spec.env = env(1, 128 << 10), "its environment: it has 131075 bytes"),
        (|order| order.package.version = "current".parse().unwrap(), "the version current is reserved"),
        (|order| order.package.version = "Current".parse().unwrap(), "the version Current is reserved"),
    ];
    let evaluated = |change: &dyn Fn(&mut Vec<MessageItem<AgentOrder>>)| {
        let mut answer = answer("l", 2, true, &[("a", "start"), ("b", "stop")]);
        change(answer.agents.as_mut().unwrap());
        let after = accept(&held, &answer);
        let present = held.agents.keys().cloned().collect();
        assert_eq!(evaluate(&after, &present, &answer), AnswerOutcome::Unchanged, "the same answer is accepted twice");
        assert!(after.removed.is_empty() && after.omitted().is_empty());
        after
    };
    let b = |desired: &DesiredState| desired.agents[&"b".parse().unwrap()].run;
    let reasons =
        |desired: &DesiredState| desired.rejected().map(|rejection| rejection.why.clone()).collect::<Vec<_>>();
    for (change, words) in changes {
        let after = evaluated(&|items| {
            let MessageItem::Read(order) = &mut items[0] else { panic!() };
            change(order);
        });
        let rejection = after.rejected().next().unwrap();
        assert_eq!(rejection.name.as_ref().map(AgentName::as_str), Some("a"));
        assert!(rejection.why.contains(words), "{rejection:?}");
        // The sub-agent stays unchanged, and the other order is carried out.
        assert_eq!(after.agents[&"a".parse().unwrap()], held.agents[&"a".parse().unwrap()]);
        assert_eq!(b(&after), Run::Stop);
    }
    let unreadable = |name: Option<&str>| {
        MessageItem::Unreadable(Unreadable {
            name: name.map(|name| name.parse().unwrap()),
            why: "no".to_owned(),
            hash: 1,
        })
    };
    let named = evaluated(&|items| items[0] = unreadable(Some("a")));
    assert_eq!((names(&named), b(&named), reasons(&named)), (vec!["a", "b"], Run::Stop, vec!["no".to_owned()]));
    // The order names no sub-agent that can be read: nothing counts as omitted, although the list is marked as complete.
    let unnamed = evaluated(&|items| items[0] = unreadable(None));
    assert_eq!((names(&unnamed), b(&unnamed), reasons(&unnamed)), (vec!["a", "b"], Run::Stop, vec!["no".to_owned()]));
    let twice = evaluated(&|items| items.push(MessageItem::Read(order("a", "stop"))));
    assert_eq!(twice.agents[&"a".parse().unwrap()].run, Run::Start);
    assert!(reasons(&twice)[0].contains("twice"));
    // A different order that is rejected for the same reason is reported too.
    let unlike = |version: &str| {
        evaluated(&|items| {
            let MessageItem::Read(order) = &mut items[0] else { panic!() };
            (order.package.version, order.package.file) = (version.parse().unwrap(), Some("f".repeat(256)));
        })
    };
    assert_eq!(reasons(&unlike("2")), reasons(&unlike("3")));
    assert!(unlike("2").rejected().ne(unlike("3").rejected()) && unlike("2").rejected().eq(unlike("2").rejected()));
    // The next list with a valid order clears the rejection.
    assert_eq!(accept(&twice, &answer("l", 3, true, &ordered)).rejected().count(), 0);
    let of_others = accept(&twice, &answer("l", 3, false, &[("b", "start")]));
    assert_eq!(of_others.rejected().count(), 1, "a list that does not name it changes nothing");
    assert_eq!(accept(&of_others, &answer("l", 4, false, &[("a", "start")])).rejected().count(), 0);
}

#[test]
fn an_order_that_only_a_later_version_can_read_is_accepted_under_the_same_generation() {
    let mut list = answer("l", 5, true, &[("a", "start"), ("b", "start")]);
    let items = list.agents.as_mut().unwrap();
    let good = std::mem::replace(
        &mut items[1],
        MessageItem::Unreadable(Unreadable {
            name: Some("b".parse().unwrap()),
            why: "a later notation".to_owned(),
            hash: 1,
        }),
    );
    let held = accept(&DesiredState::default(), &list);
    assert_eq!(names(&held), ["a"]);
    list.agents.as_mut().unwrap()[1] = good;
    let after = accept(&held, &list);
    assert_eq!((names(&after), after.generation, after.rejected().count()), (vec!["a", "b"], 5, 0));
}

#[test]
fn a_sub_agent_omitted_by_a_complete_list_stays_as_ordered_until_the_removal_delay_has_passed() {
    let late = |generation, complete, agents: &[(&str, &str)]| Answer {
        removal_delay: Some(60),
        ..answer("l", generation, complete, agents)
    };
    let held = accept(&DesiredState::default(), &late(1, true, &[("a", "start"), ("b", "start")]));
    let mut omits = accept(&held, &late(2, true, &[("a", "start")]));
    let seconds = |desired: &DesiredState| desired.omitted().values().copied().collect::<Vec<_>>();
    assert_eq!((omits.agents.clone(), seconds(&omits)), (held.agents.clone(), vec![0]));
    omits.count_omission(59);
    assert_eq!(omits.without_omitted(60), None);
    // The next list omits it too: the time already waited counts.
    let mut omits = accept(&omits, &late(3, true, &[("a", "stop")]));
    assert_eq!((names(&omits), seconds(&omits)), (vec!["a", "b"], vec![59]));
    let present: BTreeSet<AgentName> = held.agents.keys().cloned().collect();
    assert_eq!(evaluate(&omits, &present, &late(3, true, &[("a", "stop")])), AnswerOutcome::Unchanged);
    // A list that names it again under the same generation has different content.
    assert!(matches!(
        evaluate(&omits, &present, &late(3, true, &[("a", "stop"), ("b", "start")])),
        AnswerOutcome::Reject(_)
    ));
    for (list, stays, waited) in [
        (late(4, true, &[("a", "stop"), ("b", "start")]), true, vec![]),
        (late(4, false, &[("b", "start")]), true, vec![]),
        (late(4, false, &[("a", "stop")]), true, vec![59]),
        // An empty list omits nothing. An uninstall order takes effect at once.
        (late(4, true, &[]), true, vec![]),
        (late(4, true, &[("a", "stop"), ("b", "uninstall")]), false, vec![]),
    ] {
        let after = accept(&omits, &list);
        let is_there = after.agents.contains_key(&"b".parse().unwrap());
        assert_eq!((is_there, seconds(&after)), (stays, waited), "{list:?}");
        assert_eq!(after.removed.is_empty(), stays, "{list:?}");
    }
    omits.count_omission(1);
    let after = omits.without_omitted(60).unwrap();
    assert_eq!((names(&after), seconds(&after)), (vec!["a"], vec![]));
    assert!(after.removed.contains(&"b".parse().unwrap()));
    // The default is five minutes.
    let after = accept(&held, &Answer { removal_delay: None, ..late(2, true, &[("a", "start")]) });
    assert_eq!((names(&after), removal_delay(&late(1, true, &[]))), (vec!["a", "b"], 60));
}

#[test]
fn the_removal_delay_survives_a_restart_and_an_older_manager_in_between_resets_it() {
    let late =
        |generation, agents: &[(&str, &str)]| Answer { removal_delay: None, ..answer("l", generation, true, agents) };
    let held = accept(&DesiredState::default(), &late(1, &[("a", "start"), ("b", "start")]));
    let mut omits = accept(&held, &late(2, &[("a", "start")]));
    omits.count_omission(7);
    let written = serde_json::to_value(&omits).unwrap();
    let mut read: DesiredState = serde_json::from_value(written.clone()).unwrap();
    read.forget_stale();
    assert_eq!(read, omits);
    // An older manager writes the unknown field back next to a newer list, which names the sub-agent again.
    let mut older = written;
    older["generation"] = 3.into();
    let mut read: DesiredState = serde_json::from_value(older).unwrap();
    read.forget_stale();
    assert!(read.omitted().is_empty());
}

fn env(count: usize, length: usize) -> Env {
    (0..count).map(|number| (format!("V{number:02}"), "x".repeat(length).as_str().into())).collect()
}

#[test]
fn a_sub_agent_that_was_never_installed_is_not_recorded_as_removed() {
    let held = accept(&DesiredState::default(), &answer("l", 1, false, &[("a", "start")]));
    let after = accept(&held, &answer("l", 2, false, &[("a", "uninstall"), ("b", "uninstall")]));
    assert_eq!(after.removed, BTreeSet::from(["a".parse().unwrap()]));
    assert!(accept(&after, &answer("l", 3, false, &[("c", "start")])).removed.is_empty());
}

#[test]
fn an_order_with_an_unknown_command_changes_nothing_and_is_reported() {
    let held = accept(&DesiredState::default(), &answer("l", 1, true, &[("a", "start")]));
    let AnswerOutcome::Accept(accepted) = evaluate(&held, &BTreeSet::new(), &answer("l", 2, true, &[("a", "dance")]))
    else {
        panic!()
    };
    assert_eq!(accepted.desired.agents, held.agents);
    let rejected: Vec<&RejectedOrder> = accepted.desired.rejected().collect();
    assert!(rejected[0].is_unsupported && rejected[0].why.contains("cannot dance a"), "{rejected:?}");
}

/// An answer with any orders for few sub-agents.
fn any_answer() -> impl Strategy<Value = Answer> {
    let name = prop::sample::select(vec!["a", "b", "c"]);
    let cmd = prop::sample::select(vec!["start", "stop", "uninstall", "dance"]);
    let orders = prop::collection::vec((name, cmd), 0..4);
    (prop::sample::select(vec!["l", "m"]), 0..4_u64, any::<bool>(), prop::option::of(orders)).prop_map(
        |(lineage, generation, complete, orders)| {
            let ordered = answer(lineage, generation, complete, orders.as_deref().unwrap_or_default());
            if orders.is_none() { Answer { agents: None, ..ordered } } else { ordered }
        },
    )
}

proptest! {
    /// In any sequence of answers, a sub-agent is removed by an order only, and no answer is accepted twice.
    #[test]
    fn a_sub_agent_is_removed_by_an_order_only(answers in prop::collection::vec(any_answer(), 1..12)) {
        let (mut held, present) = (DesiredState::default(), BTreeSet::new());
        for answer in answers {
            let AnswerOutcome::Accept(accepted) = evaluate(&held, &present, &answer) else { continue };
            let AcceptedState { desired, new_lineage, .. } = *accepted;
            let orders = answer.agents.as_deref().unwrap_or_default();
            for gone in held.agents.keys().filter(|name| !desired.agents.contains_key(*name)) {
                let uninstalls = |item: &MessageItem<AgentOrder>| {
                    matches!(item, MessageItem::Read(order) if order.name == *gone && order.cmd == Cmd::Uninstall)
                };
                let uninstalled = orders.iter().any(uninstalls);
                prop_assert!(uninstalled || (answer.complete && !orders.is_empty()), "{gone} is gone");
            }
            let retries_rejected = held.rejected().next().is_some() && desired.generation == held.generation;
            let is_next = desired.generation > held.generation || retries_rejected;
            prop_assert!(new_lineage || held == DesiredState::default() || is_next);
            prop_assert!(desired.agents.keys().all(|name| !desired.removed.contains(name)));
            prop_assert_eq!(evaluate(&desired, &present, &answer), AnswerOutcome::Unchanged);
            held = desired;
        }
    }
}
