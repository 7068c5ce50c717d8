//! The desired state of a host, and how a gateway's answer may change it.
//!
//! A generation only grows within its lineage. An empty or absent list removes nothing; a list that is not complete changes what it names
//! and leaves the rest; a complete one, and only one that is not empty, also removes what it does not name. Beyond what a host can keep and
//! read again an answer is refused as a whole, and nothing is lost.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::env;
use super::generation::{self, Clocks, Next};
use super::model::AgentName;
use super::order::{Cmd, Order, Run};
use super::protocol::{AgentOrder, Answer, MAX_AGENTS};
use super::unknown::{self, Unknown};

/// The longest words of an order, bytes: an address is no longer, and neither is the name of a file.
const MAX_TARBALL_BYTES: usize = 2_048;
const MAX_FILE_BYTES: usize = 255;
const MAX_CMD_BYTES: usize = 64;
const MAX_LINEAGE_BYTES: usize = 128;
/// The environments of all sub-agents together, bytes.
const MAX_ENV_BYTES: usize = 1 << 20;
/// Fields that versions before 7ac5350 kept and that no version reads any more.
const FORMER: [&str; 2] = ["told", "complete"];
/// What this version does not know of one order, bytes. More is not kept.
const MAX_UNKNOWN_BYTES: usize = 4 << 10;

/// The desired state as it is kept on the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Desired {
    #[serde(default)]
    pub lineage: String,
    #[serde(default)]
    pub generation: u64,
    #[serde(default)]
    pub agents: BTreeMap<AgentName, Order>,
    /// To be removed, or removed already.
    #[serde(default)]
    pub removed: BTreeSet<AgentName>,
    /// Its list came from a stand-in, and what that did not name stayed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spares_unnamed: bool,
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A desired state that takes the place of the one held.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    pub desired: Desired,
    /// Orders that this version does not know.
    pub unsupported: Vec<(AgentName, String)>,
    pub new_lineage: bool,
    /// Its generation is lower than the one held, which no clock explains.
    pub led_back: bool,
    /// How many an empty list, though it says that it is complete, did not remove.
    pub kept: usize,
}

/// What becomes of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It brings nothing new.
    Unchanged,
    /// It is the desired state from now on.
    Take(Box<Taken>),
    /// It must not be acted on.
    Refuse(String),
}

/// Judges an answer by what is held. `present` are the sub-agents that are installed, whoever ordered them.
pub fn judge(held: &Desired, present: &BTreeSet<AgentName>, answer: &Answer, clocks: Clocks) -> Verdict {
    judge_as(held, present, answer, clocks, false)
}

/// As [`judge`], of one who stands in for another and may know less: what a list of another lineage does not name stays, until that list
/// changes.
pub fn judge_stand_in(held: &Desired, present: &BTreeSet<AgentName>, answer: &Answer, clocks: Clocks) -> Verdict {
    let is_strange = !held.lineage.is_empty() && answer.lineage.as_ref() != Some(&held.lineage);
    judge_as(held, present, answer, clocks, is_strange)
}

fn judge_as(
    held: &Desired,
    present: &BTreeSet<AgentName>,
    answer: &Answer,
    clocks: Clocks,
    spares_unnamed: bool,
) -> Verdict {
    let Some(orders) = &answer.agents else { return Verdict::Unchanged };
    let lineage = answer.lineage.clone().unwrap_or_default();
    let same_number = lineage == held.lineage && answer.generation == held.generation;
    if same_number && is_repetition(held, present, answer, orders) {
        return Verdict::Unchanged;
    }
    let first = held.generation == 0 && held.lineage.is_empty();
    let new_lineage = !first && lineage != held.lineage;
    let counted = (!first && !new_lineage).then_some(held.generation);
    let led_back = match generation::judge(counted, answer.generation, clocks) {
        Ok(next) => next == Next::Back,
        Err(why) => return Verdict::Refuse(why),
    };
    if let Err(why) = check(&lineage, orders) {
        return Verdict::Refuse(why);
    }
    let named: BTreeSet<&AgentName> = orders.iter().map(|order| &order.name).collect();
    if named.len() != orders.len() {
        return Verdict::Refuse("cannot take a desired state that names a sub-agent twice".to_owned());
    }

    let Applied { agents, removed, unsupported } = apply(held, present, answer, orders, spares_unnamed);
    if let Err(why) = check_kept(&agents, held) {
        return Verdict::Refuse(why);
    }
    let kept = if answer.complete && orders.is_empty() { agents.len() } else { 0 };
    let mut unknown = held.unknown.clone();
    unknown.retain(|name, _| !FORMER.contains(&name.as_str()));
    let desired = Desired { lineage, generation: answer.generation, agents, removed, spares_unnamed, unknown };
    Verdict::Take(Box::new(Taken { desired, unsupported, new_lineage, led_back, kept }))
}

/// What orders make of what is held.
struct Applied {
    agents: BTreeMap<AgentName, Order>,
    removed: BTreeSet<AgentName>,
    /// With commands that this version does not know.
    unsupported: Vec<(AgentName, String)>,
}

fn apply(
    held: &Desired,
    present: &BTreeSet<AgentName>,
    answer: &Answer,
    orders: &[AgentOrder],
    spares_unnamed: bool,
) -> Applied {
    let mut agents = held.agents.clone();
    let mut removed = held.removed.clone();
    let mut unsupported = vec![];
    for order in orders {
        match &order.cmd {
            Cmd::Run(run) => {
                removed.remove(&order.name);
                agents.insert(order.name.clone(), kept_order(order, *run));
            }
            Cmd::Uninstall => {
                agents.remove(&order.name);
                removed.insert(order.name.clone());
            }
            Cmd::Unknown(word) => unsupported.push((order.name.clone(), word.clone())),
        }
    }
    if answer.complete && !orders.is_empty() && !spares_unnamed {
        let named: BTreeSet<&AgentName> = orders.iter().map(|order| &order.name).collect();
        agents.retain(|name, _| named.contains(name));
        removed.extend(present.iter().chain(held.agents.keys()).filter(|name| !named.contains(name)).cloned());
    }
    // Of what was never there, nothing is to be removed, or to be remembered.
    removed.retain(|name| present.contains(name) || held.agents.contains_key(name));
    Applied { agents, removed, unsupported }
}

/// An order as it is kept.
fn kept_order(order: &AgentOrder, run: Run) -> Order {
    let AgentOrder { package, spec, retry, .. } = order;
    let unknown = match unknown::bytes(&order.unknown) {
        ..=MAX_UNKNOWN_BYTES => order.unknown.clone(),
        _ => Unknown::new(),
    };
    Order { package: package.clone(), run, spec: spec.clone(), retry: *retry, unknown }
}

/// Whether a list is a repetition: followed once more, it would leave what is wanted as it is.
///
/// Of a gateway that counts its lists, the same number says that nothing more is to be removed either; whoever counts nothing may mean that.
fn is_repetition(held: &Desired, present: &BTreeSet<AgentName>, answer: &Answer, orders: &[AgentOrder]) -> bool {
    let applied = apply(held, present, answer, orders, held.spares_unnamed);
    let is_counted = held.generation > 0 || !held.lineage.is_empty();
    applied.agents == held.agents
        && (is_counted || applied.removed.iter().all(|name| held.removed.contains(name) || !present.contains(name)))
}

/// Whether an answer is one that a gateway can mean.
fn check(lineage: &str, orders: &[AgentOrder]) -> Result<(), String> {
    let within = |what: &str, of: &str, bytes: usize, most: usize| match bytes > most {
        true => Err(format!("cannot take a desired state with {what} of {bytes} bytes{of}: at most {most}")),
        false => Ok(()),
    };
    within("a lineage", "", lineage.len(), MAX_LINEAGE_BYTES)?;
    if orders.len() > MAX_AGENTS {
        return Err(format!("cannot take a desired state of {} orders: at most {MAX_AGENTS}", orders.len()));
    }
    for order in orders {
        let of = format!(" for {}", order.name);
        within("a tarball", &of, order.package.tarball.as_ref().map_or(0, String::len), MAX_TARBALL_BYTES)?;
        within("a file name", &of, order.package.file.as_ref().map_or(0, String::len), MAX_FILE_BYTES)?;
        within("a command", &of, order.cmd.as_str().len(), MAX_CMD_BYTES)?;
        env::check(&order.spec.env).map_err(|why| format!("cannot take the environment of {}: {why}", order.name))?;
    }
    Ok(())
}

/// Whether all that is wanted then can be kept: lists that are not complete add up. What was kept before can be kept again.
fn check_kept(agents: &BTreeMap<AgentName, Order>, held: &Desired) -> Result<(), String> {
    if agents.len() > MAX_AGENTS.max(held.agents.len()) {
        return Err(format!("cannot take a desired state with {} sub-agents: at most {MAX_AGENTS}", agents.len()));
    }
    let bytes = |agents: &BTreeMap<AgentName, Order>| agents.values().map(|order| env::bytes(&order.spec.env)).sum();
    let all: usize = bytes(agents);
    if all > MAX_ENV_BYTES.max(bytes(&held.agents)) {
        return Err(format!("cannot take a desired state with environments of {all} bytes: at most {MAX_ENV_BYTES}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::env::Env;
    use super::super::order::{Package, Spec};
    use super::super::unknown::Any;
    use super::*;

    fn order(name: &str, cmd: &str) -> AgentOrder {
        AgentOrder {
            name: name.parse().unwrap(),
            package: Package::new("1".parse().unwrap()),
            cmd: cmd.to_owned().into(),
            spec: Spec::default(),
            retry: 0,
            unknown: Unknown::new(),
        }
    }

    fn answer(lineage: &str, generation: u64, complete: bool, agents: &[(&str, &str)]) -> Answer {
        Answer {
            agent_id: "1".parse().unwrap(),
            error_message: None,
            interval: None,
            removal_delay: None,
            lineage: Some(lineage.into()),
            generation,
            cmd: None,
            manager: None,
            complete,
            agents: Some(agents.iter().map(|(name, cmd)| order(name, cmd)).collect()),
            pins: Vec::new(),
            ack: None,
        }
    }

    /// In 2026.
    const NOW: u64 = 1_790_000_000_000;

    fn judge(held: &Desired, present: &BTreeSet<AgentName>, answer: &Answer) -> Verdict {
        super::judge(held, present, answer, Clocks { host: NOW, gateway: Some(NOW) })
    }

    fn refusal(held: &Desired, answer: &Answer) -> String {
        match judge(held, &BTreeSet::new(), answer) {
            Verdict::Refuse(why) => why,
            other => panic!("{other:?}"),
        }
    }

    fn take(held: &Desired, answer: &Answer) -> Desired {
        let present = held.agents.keys().cloned().collect();
        match judge(held, &present, answer) {
            Verdict::Take(taken) => taken.desired,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn fields_of_a_later_version_are_kept_and_change_nothing() {
        let later = |bytes: usize| Unknown::from([("later".to_owned(), Any::Text("x".repeat(bytes)))]);
        let with = |generation: u64, bytes: usize| {
            let mut answer = answer("l", generation, true, &[("a", "start")]);
            first(&mut answer).unknown = later(bytes);
            answer
        };
        let unknown = Unknown::from([
            ("later".to_owned(), Any::Natural(1)),
            ("told".to_owned(), Any::List(vec![])),
            ("complete".to_owned(), Any::Bool(true)),
        ]);
        let held = Desired { unknown, ..Desired::default() };
        let held = take(&held, &with(1, 1));
        assert_eq!(held.unknown, Unknown::from([("later".to_owned(), Any::Natural(1))]));
        assert_eq!(held.agents[&"a".parse().unwrap()].unknown, later(1));
        for bytes in [0, 1, 2] {
            assert_eq!(judge(&held, &BTreeSet::new(), &with(1, bytes)), Verdict::Unchanged);
        }
        // Of the list that is taken they are kept, as far as there is room for them.
        assert_eq!(take(&held, &with(2, 4_000)).agents[&"a".parse().unwrap()].unknown, later(4_000));
        assert_eq!(take(&held, &with(2, 4_100)).agents[&"a".parse().unwrap()].unknown, Unknown::new());
    }

    fn names(desired: &Desired) -> Vec<&str> {
        desired.agents.keys().map(AgentName::as_str).collect()
    }

    #[test]
    fn only_a_complete_list_that_is_not_empty_removes_what_it_does_not_name() {
        let held = take(&Desired::default(), &answer("l", 1, true, &[("a", "start"), ("b", "start")]));
        assert_eq!(names(&take(&held, &answer("l", 2, true, &[]))), ["a", "b"]);
        assert_eq!(names(&take(&held, &answer("l", 2, false, &[]))), ["a", "b"]);
        assert_eq!(names(&take(&held, &answer("l", 2, false, &[("a", "start")]))), ["a", "b"]);
        let after = take(&held, &answer("l", 2, true, &[("a", "start")]));
        assert_eq!(names(&after), ["a"]);
        assert!(after.removed.contains(&"b".parse().unwrap()));
        for (complete, told) in [(true, 2), (false, 0)] {
            let Verdict::Take(taken) = judge(&held, &BTreeSet::new(), &answer("l", 2, complete, &[])) else { panic!() };
            assert_eq!(taken.kept, told);
        }
        let without_agents = Answer { agents: None, ..answer("l", 3, true, &[]) };
        assert_eq!(judge(&held, &BTreeSet::new(), &without_agents), Verdict::Unchanged);
    }

    #[test]
    fn a_complete_list_also_removes_what_is_installed_but_was_never_ordered() {
        let present = BTreeSet::from(["stray".parse().unwrap()]);
        let Verdict::Take(taken) = judge(&Desired::default(), &present, &answer("l", 1, true, &[("a", "start")]))
        else {
            panic!()
        };
        assert!(taken.desired.removed.contains(&"stray".parse().unwrap()));
    }

    #[test]
    fn an_uninstalled_one_may_come_back() {
        let held = take(&Desired::default(), &answer("l", 1, false, &[("a", "start"), ("b", "start")]));
        let gone = take(&held, &answer("l", 2, false, &[("a", "uninstall")]));
        assert_eq!(names(&gone), ["b"]);
        let back = take(&gone, &answer("l", 3, false, &[("a", "start")]));
        assert_eq!(names(&back), ["a", "b"]);
        assert!(back.removed.is_empty());
    }

    #[test]
    fn a_generation_only_grows_within_its_lineage() {
        let held = take(&Desired::default(), &answer("l", 5, true, &[("a", "start")]));
        let judged = |answer| judge(&held, &BTreeSet::new(), &answer);
        assert!(matches!(judged(answer("l", 4, true, &[("a", "start")])), Verdict::Refuse(_)));
        assert!(matches!(judged(answer("l", 5, true, &[("a", "stop")])), Verdict::Refuse(_)));
        assert_eq!(judged(answer("l", 5, true, &[("a", "start")])), Verdict::Unchanged);
        // Who counts nothing at all is heard too, and not anew each time.
        let uncounted = Answer { lineage: None, ..answer("", 0, true, &[("a", "start")]) };
        let taken = take(&Desired::default(), &uncounted);
        assert_eq!(judge(&taken, &BTreeSet::new(), &uncounted), Verdict::Unchanged);
        assert!(matches!(judged(answer("m", 1, true, &[("a", "stop")])), Verdict::Take(taken) if taken.new_lineage));
        assert!(matches!(judged(answer("l", 6, true, &[("a", "start"), ("a", "stop")])), Verdict::Refuse(_)));
    }

    #[test]
    fn a_stand_ins_list_that_is_repeated_is_no_other_content() {
        let held = take(&Desired::default(), &answer("l", 5, true, &[("a", "start"), ("b", "start")]));
        let present = held.agents.keys().cloned().collect();
        let clocks = Clocks { host: NOW, gateway: Some(NOW) };
        let list = answer("m", 1, true, &[("a", "start")]);
        let Verdict::Take(taken) = judge_stand_in(&held, &present, &list, clocks) else { panic!() };
        assert_eq!(names(&taken.desired), ["a", "b"]);
        assert_eq!(judge_stand_in(&taken.desired, &present, &list, clocks), Verdict::Unchanged);
        assert_eq!(judge(&taken.desired, &present, &list), Verdict::Unchanged);
        let next = answer("m", 2, true, &[("a", "start")]);
        let Verdict::Take(taken) = judge_stand_in(&taken.desired, &present, &next, clocks) else { panic!() };
        assert_eq!(names(&taken.desired), ["a"], "its own next list is its own");
    }

    #[test]
    fn whoever_counts_nothing_can_still_have_a_stray_removed() {
        let uncounted = |cmds: &[(&str, &str)]| Answer { lineage: None, ..answer("", 0, false, cmds) };
        let held = take(&Desired::default(), &uncounted(&[("a", "start")]));
        let present = BTreeSet::from(["a".parse().unwrap(), "stray".parse().unwrap()]);
        let list = uncounted(&[("a", "start"), ("stray", "uninstall")]);
        let Verdict::Take(taken) = judge(&held, &present, &list) else { panic!() };
        assert!(taken.desired.removed.contains(&"stray".parse().unwrap()));
        assert_eq!(judge(&taken.desired, &present, &list), Verdict::Unchanged);
    }

    #[test]
    fn a_generation_that_would_be_the_last_is_refused_and_one_that_is_held_is_left_again() {
        let wanted = [("a", "start")];
        let held = take(&Desired::default(), &answer("l", 5, true, &wanted));
        for far in [u64::MAX, 1 << 53, NOW * 2] {
            for lineage in ["l", "m"] {
                let why = refusal(&held, &answer(lineage, far, true, &[("a", "stop")]));
                assert!(why.contains("ahead of the clocks"), "{why}");
            }
            // As an older version may have taken it.
            let absurd = Desired { generation: far, ..held.clone() };
            for (lineage, generation) in [("m", 1), ("l", NOW), ("l", 6)] {
                let back = answer(lineage, generation, true, &[("a", "stop")]);
                let Verdict::Take(taken) = judge(&absurd, &BTreeSet::new(), &back) else {
                    panic!("{lineage} {generation}")
                };
                let Taken { desired, new_lineage, led_back, .. } = *taken;
                assert_eq!((new_lineage, led_back, desired.generation), (lineage == "m", lineage == "l", generation));
                assert_eq!(desired.agents[&"a".parse().unwrap()].run, Run::Stop);
            }
            assert_eq!(judge(&absurd, &BTreeSet::new(), &answer("l", far, true, &wanted)), Verdict::Unchanged);
        }
    }

    #[test]
    fn beyond_what_a_host_can_keep_an_answer_is_refused_as_a_whole() {
        let names: Vec<String> = (0..1_001).map(|number| format!("a{number}")).collect();
        let orders = |from: usize, to: usize| -> Vec<(&str, &str)> {
            names[from..to].iter().map(|name| (name.as_str(), "start")).collect()
        };
        let why = refusal(&Desired::default(), &answer("l", 1, true, &orders(0, 1_001)));
        assert!(why.contains("1001 orders: at most 1000"), "{why}");
        // Nor bit by bit.
        let held = take(&Desired::default(), &answer("l", 1, true, &orders(0, 1_000)));
        let why = refusal(&held, &answer("l", 2, false, &orders(1_000, 1_001)));
        assert!(why.contains("1001 sub-agents: at most 1000"), "{why}");
        assert_eq!(take(&held, &answer("l", 2, true, &orders(1, 1_001))).agents.len(), 1_000);
        // One that an older version has taken may shrink.
        let mut large = held.clone();
        large
            .agents
            .extend(held.agents.iter().map(|(name, order)| (format!("{name}-b").parse().unwrap(), order.clone())));
        assert_eq!(take(&large, &answer("l", 2, false, &[("a1", "uninstall")])).agents.len(), 1_999);

        type Change = fn(&mut Answer);
        let changes: [(Change, &str); 7] = [
            (|answer| answer.lineage = Some("l".repeat(129)), "a lineage of 129 bytes: at most 128"),
            (|answer| first(answer).package.tarball = Some("t".repeat(2_049)), "a tarball of 2049 bytes for a"),
            (|answer| first(answer).package.file = Some("f".repeat(256)), "a file name of 256 bytes for a"),
            (|answer| first(answer).cmd = "c".repeat(65).into(), "a command of 65 bytes for a"),
            (|answer| first(answer).spec.env = env(1_001, 1), "the environment of a: it has 1001 variables"),
            (|answer| first(answer).spec.env = env(1, 128 << 10), "the environment of a: it has 131075 bytes"),
            (
                |answer| answer.agents.iter_mut().flatten().for_each(|order| order.spec.env = env(1, 127 << 10)),
                "environments of 1170459 bytes",
            ),
        ];
        for (change, words) in changes {
            let mut changed = answer("l", 2, true, &[("a", "start"), ("b", "stop")]);
            let others = (0..7).map(|number| order(&format!("c{number}"), "start"));
            changed.agents.iter_mut().for_each(|orders| orders.extend(others.clone()));
            assert!(matches!(judge(&held, &BTreeSet::new(), &changed), Verdict::Take(_)));
            change(&mut changed);
            let why = refusal(&held, &changed);
            assert!(why.contains(words), "{why}");
        }
    }

    fn first(answer: &mut Answer) -> &mut AgentOrder {
        &mut answer.agents.as_mut().unwrap()[0]
    }

    fn env(count: usize, length: usize) -> Env {
        (0..count).map(|number| (format!("V{number:02}"), "x".repeat(length).as_str().into())).collect()
    }

    #[test]
    fn what_was_never_there_is_not_remembered_as_removed() {
        let held = take(&Desired::default(), &answer("l", 1, false, &[("a", "start")]));
        let after = take(&held, &answer("l", 2, false, &[("a", "uninstall"), ("b", "uninstall")]));
        assert_eq!(after.removed, BTreeSet::from(["a".parse().unwrap()]));
        assert!(take(&after, &answer("l", 3, false, &[("c", "start")])).removed.is_empty());
    }

    #[test]
    fn an_unknown_command_changes_nothing_and_is_told() {
        let held = take(&Desired::default(), &answer("l", 1, true, &[("a", "start")]));
        let Verdict::Take(taken) = judge(&held, &BTreeSet::new(), &answer("l", 2, true, &[("a", "dance")])) else {
            panic!()
        };
        assert_eq!(taken.desired.agents, held.agents);
        assert_eq!(taken.unsupported, [("a".parse().unwrap(), "dance".to_owned())]);
    }

    /// One of few agents, ordered in any way.
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
        /// Whatever a gateway answers, one after the other: nothing goes but by an order, and nothing is taken twice.
        #[test]
        fn nothing_is_removed_but_by_an_order(answers in prop::collection::vec(any_answer(), 1..12)) {
            let (mut held, present) = (Desired::default(), BTreeSet::new());
            for answer in answers {
                let Verdict::Take(taken) = judge(&held, &present, &answer) else { continue };
                let Taken { desired, new_lineage, .. } = *taken;
                let orders = answer.agents.as_deref().unwrap_or_default();
                for gone in held.agents.keys().filter(|name| !desired.agents.contains_key(*name)) {
                    let uninstalled = orders.iter().any(|order| order.name == *gone && order.cmd == Cmd::Uninstall);
                    prop_assert!(uninstalled || (answer.complete && !orders.is_empty()), "{gone} is gone");
                }
                prop_assert!(new_lineage || held == Desired::default() || desired.generation > held.generation);
                prop_assert!(desired.agents.keys().all(|name| !desired.removed.contains(name)));
                prop_assert_eq!(judge(&desired, &present, &answer), Verdict::Unchanged);
                held = desired;
            }
        }
    }
}
