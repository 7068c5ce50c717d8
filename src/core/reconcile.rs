//! Reconcile: compare what is wanted of the sub-agents with what is there, and say what to do next.
//!
//! A plan is the same for the same input; carried out and made again it is empty. What takes time (staging, stopping) shows in the actual
//! state as under way, so planning again meanwhile asks for nothing twice.

use std::collections::{BTreeMap, BTreeSet};

use super::desired::{Desired, Order, Run};
use super::env::Env;
use super::model::{AgentName, Version};

/// What is observed of one sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actual {
    /// The release that runs, or would.
    pub active: Option<Version>,
    /// The release before it, kept to go back to.
    pub backup: Option<Version>,
    /// The whole releases on disk.
    pub releases: BTreeSet<Version>,
    /// Being fetched, verified and unpacked now.
    pub staging: Option<Version>,
    /// Could not be staged or activated and is not to be tried again yet.
    pub held_back: Option<Version>,
    /// Whether its supervisor is told to run it.
    pub run: Run,
    /// The environment that its supervisor is told to give it; `None`: not known.
    pub env: Option<Env>,
    /// An activation or removal is under way; nothing else is to be begun.
    pub busy: bool,
}

impl Default for Actual {
    fn default() -> Actual {
        Actual {
            active: None,
            backup: None,
            releases: BTreeSet::new(),
            staging: None,
            held_back: None,
            run: Run::Stop,
            env: None,
            busy: false,
        }
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Fetch, verify and unpack a release, beside what runs.
    Stage { name: AgentName, version: Version },
    /// Stop what runs, make a staged release the active one, with this environment, and run it if wanted.
    Activate { name: AgentName, version: Version, run: Run, env: Env },
    /// Give the active release another environment.
    Configure { name: AgentName, env: Env },
    /// Run it, or let it rest.
    Set { name: AgentName, run: Run },
    /// Stop it and remove all that belongs to it.
    Uninstall { name: AgentName },
    /// Remove a release that is neither active nor the one to go back to.
    Discard { name: AgentName, version: Version },
}

/// What to do next for every sub-agent.
pub fn plan(desired: &Desired, actual: &BTreeMap<AgentName, Actual>) -> Vec<Step> {
    let absent = Actual::default();
    let mut steps = vec![];
    for (name, order) in &desired.agents {
        plan_ordered(name, order, actual.get(name).unwrap_or(&absent), &mut steps);
    }
    for (name, found) in actual {
        if desired.removed.contains(name) && !desired.agents.contains_key(name) && !found.busy {
            steps.push(Step::Uninstall { name: name.clone() });
        }
    }
    steps
}

fn plan_ordered(name: &AgentName, order: &Order, actual: &Actual, steps: &mut Vec<Step>) {
    if actual.busy {
        return;
    }
    if actual.active.as_ref() == Some(&order.version) {
        if actual.env.as_ref() != Some(&order.env) {
            steps.push(Step::Configure { name: name.clone(), env: order.env.clone() });
        }
        if actual.run != order.run {
            steps.push(Step::Set { name: name.clone(), run: order.run });
        }
        for version in &actual.releases {
            let kept = [&actual.active, &actual.backup, &actual.staging].contains(&&Some(version.clone()));
            if !kept {
                steps.push(Step::Discard { name: name.clone(), version: version.clone() });
            }
        }
        return;
    }
    let held_back = actual.held_back.as_ref() == Some(&order.version);
    if actual.releases.contains(&order.version) && !held_back {
        steps.push(Step::Activate {
            name: name.clone(),
            version: order.version.clone(),
            run: order.run,
            env: order.env.clone(),
        });
        return;
    }
    if actual.staging.as_ref() != Some(&order.version) && !held_back {
        steps.push(Step::Stage { name: name.clone(), version: order.version.clone() });
    }
    // What is active goes on as ordered until the new release is there.
    if actual.active.is_some() && actual.run != order.run {
        steps.push(Step::Set { name: name.clone(), run: order.run });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::core::env::Value;

    /// Carries a step out, as if all went well and at once.
    fn apply(step: Step, actual: &mut BTreeMap<AgentName, Actual>) {
        match step {
            Step::Stage { name, version } => {
                actual.entry(name).or_default().releases.insert(version);
            }
            Step::Activate { name, version, run, env } => {
                let agent = actual.entry(name).or_default();
                agent.backup = agent.active.replace(version);
                agent.run = run;
                agent.env = Some(env);
            }
            Step::Configure { name, env } => actual.entry(name).or_default().env = Some(env),
            Step::Set { name, run } => actual.entry(name).or_default().run = run,
            Step::Uninstall { name } => {
                actual.remove(&name);
            }
            Step::Discard { name, version } => {
                actual.entry(name).or_default().releases.remove(&version);
            }
        }
    }

    fn name() -> impl Strategy<Value = AgentName> {
        "[a-d]".prop_map(|s| s.parse().unwrap())
    }

    fn version() -> impl Strategy<Value = Version> {
        "[1-4]".prop_map(|s| s.parse().unwrap())
    }

    fn run() -> impl Strategy<Value = Run> {
        prop_oneof![Just(Run::Start), Just(Run::Stop)]
    }

    fn env() -> impl Strategy<Value = Env> {
        proptest::collection::btree_map("[A-B]", "[0-1]".prop_map(Value::Plain), 0..2)
    }

    fn desired() -> impl Strategy<Value = Desired> {
        let order = (version(), run(), env()).prop_map(|(version, run, env)| Order {
            version,
            tarball: None,
            file: None,
            sha256: None,
            size: None,
            run,
            env,
        });
        (proptest::collection::btree_map(name(), order, 0..4), proptest::collection::btree_set(name(), 0..4)).prop_map(
            |(agents, removed)| Desired {
                removed: removed.into_iter().filter(|name| !agents.contains_key(name)).collect(),
                agents,
                ..Desired::default()
            },
        )
    }

    fn actual() -> impl Strategy<Value = BTreeMap<AgentName, Actual>> {
        let agent = (
            proptest::option::of(version()),
            proptest::option::of(version()),
            proptest::collection::btree_set(version(), 0..4),
            run(),
            proptest::option::of(env()),
        )
            .prop_map(|(active, backup, mut releases, run, env)| {
                releases.extend(active.clone());
                Actual { active, backup, releases, run, env, ..Actual::default() }
            });
        proptest::collection::btree_map(name(), agent, 0..4)
    }

    proptest! {
        #[test]
        fn a_plan_carried_out_again_and_again_comes_to_rest_where_it_was_wanted(desired in desired(), mut actual in actual()) {
            for _ in 0..4 {
                for step in plan(&desired, &actual) {
                    apply(step, &mut actual);
                }
            }
            prop_assert_eq!(plan(&desired, &actual), vec![]);
            for (name, order) in &desired.agents {
                let agent = &actual[name];
                prop_assert_eq!(agent.active.as_ref(), Some(&order.version));
                prop_assert_eq!(agent.run, order.run);
                prop_assert_eq!(agent.env.as_ref(), Some(&order.env));
                prop_assert!(agent.releases.len() <= 2);
            }
            prop_assert!(desired.removed.iter().all(|name| !actual.contains_key(name)));
        }

        #[test]
        fn the_same_input_gives_the_same_plan(desired in desired(), actual in actual()) {
            prop_assert_eq!(plan(&desired, &actual), plan(&desired, &actual));
        }
    }

    #[test]
    fn nothing_is_begun_on_what_is_busy_or_held_back() {
        let name: AgentName = "a".parse().unwrap();
        let order = Order {
            version: "2".parse().unwrap(),
            tarball: None,
            file: None,
            sha256: None,
            size: None,
            run: Run::Start,
            env: BTreeMap::new(),
        };
        let desired = Desired { agents: BTreeMap::from([(name.clone(), order)]), ..Desired::default() };
        let plan_with = |agent: Actual| plan(&desired, &BTreeMap::from([(name.clone(), agent)]));
        assert_eq!(plan_with(Actual { busy: true, ..Actual::default() }), vec![]);
        assert_eq!(plan_with(Actual { held_back: Some("2".parse().unwrap()), ..Actual::default() }), vec![]);
        assert_eq!(plan_with(Actual { staging: Some("2".parse().unwrap()), ..Actual::default() }), vec![]);
        assert_eq!(plan_with(Actual { staging: Some("1".parse().unwrap()), ..Actual::default() }).len(), 1);
    }

    #[test]
    fn without_a_desired_state_nothing_is_touched() {
        let actual = BTreeMap::from([(
            "a".parse().unwrap(),
            Actual { active: Some("1".parse().unwrap()), ..Actual::default() },
        )]);
        assert_eq!(plan(&Desired::default(), &actual), vec![]);
    }
}
