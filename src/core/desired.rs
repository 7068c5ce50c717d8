//! The desired state of a host, and how a gateway's answer may change it.
//!
//! A generation only grows within its lineage. An empty or absent list removes nothing; a list that is not complete changes what it names
//! and leaves the rest; a complete one, and only one that is not empty, also removes what it does not name.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::env::Env;
use super::model::{AgentName, Digest, Version};
use super::protocol::{AgentOrder, Answer};

/// Whether a sub-agent is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Run {
    Start,
    Stop,
}

/// What is wanted of one sub-agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    pub version: Version,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tarball: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    pub run: Run,
    #[serde(default)]
    pub env: Env,
}

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
    /// The list as it came, to tell a repetition from another content under the same number.
    #[serde(default)]
    pub told: Vec<AgentOrder>,
    #[serde(default)]
    pub complete: bool,
}

/// What becomes of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It brings nothing new.
    Unchanged,
    /// It is the desired state from now on; `unsupported` are orders that this version does not know.
    /// `kept`: how many an empty list, though it says that it is complete, did not remove.
    Take { desired: Box<Desired>, unsupported: Vec<(AgentName, String)>, new_lineage: bool, kept: usize },
    /// It must not be acted on.
    Refuse(String),
}

/// Judges an answer by what is held. `present` are the sub-agents that are installed, whoever ordered them.
pub fn judge(held: &Desired, present: &BTreeSet<AgentName>, answer: &Answer) -> Verdict {
    let Some(orders) = &answer.agents else { return Verdict::Unchanged };
    let lineage = answer.lineage.clone().unwrap_or_default();
    let same_number = lineage == held.lineage && answer.generation == held.generation;
    if same_number && *orders == held.told && answer.complete == held.complete {
        return Verdict::Unchanged;
    }
    let first = held.generation == 0 && held.lineage.is_empty();
    let new_lineage = !first && lineage != held.lineage;
    if !first && !new_lineage {
        if answer.generation == held.generation {
            return Verdict::Refuse(format!(
                "cannot take generation {}: it came before with other content",
                answer.generation
            ));
        }
        if answer.generation < held.generation {
            return Verdict::Refuse(format!(
                "cannot take generation {}: generation {} is already held",
                answer.generation, held.generation
            ));
        }
    }
    let named: BTreeSet<&AgentName> = orders.iter().map(|order| &order.name).collect();
    if named.len() != orders.len() {
        return Verdict::Refuse("cannot take a desired state that names a sub-agent twice".to_owned());
    }

    let mut agents = held.agents.clone();
    let mut removed = held.removed.clone();
    let mut unsupported = vec![];
    for order in orders {
        let run = match order.cmd.as_str() {
            "start" => Run::Start,
            "stop" => Run::Stop,
            "uninstall" => {
                agents.remove(&order.name);
                removed.insert(order.name.clone());
                continue;
            }
            other => {
                unsupported.push((order.name.clone(), other.to_owned()));
                continue;
            }
        };
        removed.remove(&order.name);
        agents.insert(order.name.clone(), taken(order, run));
    }
    if answer.complete && !orders.is_empty() {
        agents.retain(|name, _| named.contains(name));
        removed.extend(present.iter().chain(held.agents.keys()).filter(|name| !named.contains(name)).cloned());
    }
    let kept = if answer.complete && orders.is_empty() { agents.len() } else { 0 };
    let desired = Desired {
        lineage,
        generation: answer.generation,
        agents,
        removed,
        told: orders.clone(),
        complete: answer.complete,
    };
    Verdict::Take { desired: Box::new(desired), unsupported, new_lineage, kept }
}

fn taken(order: &AgentOrder, run: Run) -> Order {
    Order {
        version: order.version.clone(),
        tarball: order.tarball.clone(),
        file: order.file.clone(),
        sha256: order.sha256.clone(),
        size: order.size,
        run,
        env: order.env.clone(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(name: &str, cmd: &str) -> AgentOrder {
        AgentOrder {
            name: name.parse().unwrap(),
            version: "1".parse().unwrap(),
            tarball: None,
            file: None,
            sha256: None,
            size: None,
            cmd: cmd.into(),
            env: BTreeMap::new(),
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
            agents: Some(agents.iter().map(|(name, cmd)| order(name, cmd)).collect()),
            ack: None,
        }
    }

    fn take(held: &Desired, answer: &Answer) -> Desired {
        let present = held.agents.keys().cloned().collect();
        match judge(held, &present, answer) {
            Verdict::Take { desired, .. } => *desired,
            other => panic!("{other:?}"),
        }
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
            let Verdict::Take { kept, .. } = judge(&held, &BTreeSet::new(), &answer("l", 2, complete, &[])) else {
                panic!()
            };
            assert_eq!(kept, told);
        }
        let without_agents = Answer { agents: None, ..answer("l", 3, true, &[]) };
        assert_eq!(judge(&held, &BTreeSet::new(), &without_agents), Verdict::Unchanged);
    }

    #[test]
    fn a_complete_list_also_removes_what_is_installed_but_was_never_ordered() {
        let present = BTreeSet::from(["stray".parse().unwrap()]);
        let Verdict::Take { desired, .. } =
            judge(&Desired::default(), &present, &answer("l", 1, true, &[("a", "start")]))
        else {
            panic!()
        };
        assert!(desired.removed.contains(&"stray".parse().unwrap()));
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
        assert!(matches!(judged(answer("m", 1, true, &[("a", "stop")])), Verdict::Take { new_lineage: true, .. }));
        assert!(matches!(judged(answer("l", 6, true, &[("a", "start"), ("a", "stop")])), Verdict::Refuse(_)));
    }

    #[test]
    fn an_unknown_command_changes_nothing_and_is_told() {
        let held = take(&Desired::default(), &answer("l", 1, true, &[("a", "start")]));
        let Verdict::Take { desired, unsupported, .. } =
            judge(&held, &BTreeSet::new(), &answer("l", 2, true, &[("a", "dance")]))
        else {
            panic!()
        };
        assert_eq!(desired.agents, held.agents);
        assert_eq!(unsupported, [("a".parse().unwrap(), "dance".to_owned())]);
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
                let Verdict::Take { desired, new_lineage, .. } = judge(&held, &present, &answer) else { continue };
                let orders = answer.agents.as_deref().unwrap_or_default();
                for gone in held.agents.keys().filter(|name| !desired.agents.contains_key(*name)) {
                    let uninstalled = orders.iter().any(|order| order.name == *gone && order.cmd == "uninstall");
                    prop_assert!(uninstalled || (answer.complete && !orders.is_empty()), "{gone} is gone");
                }
                prop_assert!(new_lineage || held == Desired::default() || desired.generation > held.generation);
                prop_assert!(desired.agents.keys().all(|name| !desired.removed.contains(name)));
                prop_assert_eq!(judge(&desired, &present, &answer), Verdict::Unchanged);
                held = *desired;
            }
        }
    }
}
