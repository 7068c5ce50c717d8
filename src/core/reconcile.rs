//! Reconcile: compare the desired with the actual state of the sub-agents, and decide the next steps.
//!
//! The same input gives the same plan, and after a plan was carried out the next plan is empty. Steps that take time (staging, stopping)
//! are part of the actual state while they run, so that no step is planned twice.

use std::collections::{BTreeMap, BTreeSet};

use super::desired::DesiredState;
use super::model::{AgentName, Version};
use super::order::{Order, Package, Run, Spec};

/// Limit for the sub-agents that are down at the same time for a change of release.
const MAX_CHANGING: usize = 5;

/// The actual state of one sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actual {
    /// The active release.
    pub current: Option<Version>,
    /// The release of its running process.
    pub running: Option<Version>,
    /// The releases that the ledger keeps: the active one, and those to roll back to.
    pub kept: BTreeSet<Version>,
    /// The complete releases on disk.
    pub releases: BTreeSet<Version>,
    /// Releases being removed from the disk; they can be staged again only after that.
    pub leaving: BTreeSet<Version>,
    /// The release that is being downloaded, verified and unpacked.
    pub staging: Option<Version>,
    /// A release that could not be staged or activated, or failed on probation, and is not retried yet.
    pub held_back: Option<Version>,
    /// An operator holds the active release, whatever is ordered.
    pub stays: bool,
    /// It is down, or about to be, because its release is being changed.
    pub upgrading: bool,
    /// Whether its supervisor is set to run it.
    pub run: Run,
    /// How its supervisor is set to run it; `None`: not known, or not as ordered.
    pub spec: Option<Spec>,
    /// An activation or removal is in progress; no other step may be started.
    pub busy: bool,
}

impl Default for Actual {
    fn default() -> Actual {
        Actual {
            current: None,
            running: None,
            kept: BTreeSet::new(),
            releases: BTreeSet::new(),
            leaving: BTreeSet::new(),
            staging: None,
            held_back: None,
            stays: false,
            upgrading: false,
            run: Run::Stop,
            spec: None,
            busy: false,
        }
    }
}

/// One step to carry out, with the data that it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReconcileStep {
    /// Download, verify and unpack a release while the active one keeps running.
    Stage { name: AgentName, package: Package },
    /// Stop the running release, make a staged one the active one, and run it as ordered.
    Activate { name: AgentName, order: Order },
    /// Run the active release with other settings.
    Configure { name: AgentName, spec: Spec },
    /// Start or stop it.
    Set { name: AgentName, run: Run },
    /// Stop it and remove its files.
    Uninstall { name: AgentName },
    /// Remove a release that is neither active nor a backup.
    Discard { name: AgentName, version: Version },
}

/// The next steps for all sub-agents.
pub fn plan(desired: &DesiredState, actual: &BTreeMap<AgentName, Actual>) -> Vec<ReconcileStep> {
    let absent = Actual::default();
    let mut steps = vec![];
    let mut slots = MAX_CHANGING.saturating_sub(actual.values().filter(|agent| agent.upgrading).count());
    for (name, order) in &desired.agents {
        let found = actual.get(name).unwrap_or(&absent);
        let before = steps.len();
        plan_ordered(name, order, found, &mut steps);
        // A sub-agent without an active release may be activated at any time.
        if found.current.is_some() && matches!(steps.get(before), Some(ReconcileStep::Activate { .. })) {
            match slots.checked_sub(1) {
                Some(left) => slots = left,
                None => steps.truncate(before),
            }
        }
    }
    for (name, found) in actual {
        if desired.removed.contains(name) && !desired.agents.contains_key(name) && !found.busy {
            steps.push(ReconcileStep::Uninstall { name: name.clone() });
        }
    }
    steps
}

fn plan_ordered(name: &AgentName, order: &Order, actual: &Actual, steps: &mut Vec<ReconcileStep>) {
    if actual.busy {
        return;
    }
    let ordered = &order.package.version;
    let wanted = if actual.stays { actual.current.as_ref().unwrap_or(ordered) } else { ordered };
    let runs_another = actual.running.as_ref().is_some_and(|running| running != wanted);
    // The release that an operator holds was not ordered, so no order can activate it.
    if actual.current.as_ref() == Some(wanted) && (actual.stays || !runs_another) {
        if actual.spec.as_ref() != Some(&order.spec) {
            steps.push(ReconcileStep::Configure { name: name.clone(), spec: order.spec.clone() });
        }
        if actual.run != order.run {
            steps.push(ReconcileStep::Set { name: name.clone(), run: order.run });
        }
        for version in &actual.releases {
            if !actual.kept.contains(version)
                && actual.running.as_ref() != Some(version)
                && actual.staging.as_ref() != Some(version)
            {
                steps.push(ReconcileStep::Discard { name: name.clone(), version: version.clone() });
            }
        }
        return;
    }
    let is_held = actual.held_back.as_ref() == Some(wanted) || actual.leaving.contains(wanted);
    if actual.releases.contains(wanted) && !is_held {
        steps.push(ReconcileStep::Activate { name: name.clone(), order: order.clone() });
        return;
    }
    if actual.staging.as_ref() != Some(wanted) && !is_held {
        steps.push(ReconcileStep::Stage { name: name.clone(), package: order.package.clone() });
    }
    // The active release is started or stopped as ordered until the new one is staged.
    if actual.current.is_some() && actual.run != order.run {
        steps.push(ReconcileStep::Set { name: name.clone(), run: order.run });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::core::env::EnvValue;
    use crate::core::unknown::UnknownFields;

    /// Carries out a step that succeeds at once.
    fn apply(step: ReconcileStep, actual: &mut BTreeMap<AgentName, Actual>) {
        match step {
            ReconcileStep::Stage { name, package } => {
                actual.entry(name).or_default().releases.insert(package.version);
            }
            ReconcileStep::Activate { name, order } => {
                let agent = actual.entry(name).or_default();
                let version = order.package.version;
                agent.kept = agent.current.replace(version.clone()).into_iter().chain([version]).collect();
                agent.run = order.run;
                agent.running = None;
                agent.spec = Some(order.spec);
            }
            ReconcileStep::Configure { name, spec } => actual.entry(name).or_default().spec = Some(spec),
            ReconcileStep::Set { name, run } => actual.entry(name).or_default().run = run,
            ReconcileStep::Uninstall { name } => {
                actual.remove(&name);
            }
            ReconcileStep::Discard { name, version } => {
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

    fn spec() -> impl Strategy<Value = Spec> {
        proptest::collection::btree_map("[A-B]", "[0-1]".prop_map(EnvValue::Plain), 0..2).prop_map(|env| Spec { env })
    }

    fn desired() -> impl Strategy<Value = DesiredState> {
        let order = (version(), run(), spec()).prop_map(|(version, run, spec)| Order {
            package: Package::new(version),
            run,
            spec,
            retry: 0,
            unknown: UnknownFields::new(),
        });
        (proptest::collection::btree_map(name(), order, 0..4), proptest::collection::btree_set(name(), 0..4)).prop_map(
            |(agents, removed)| DesiredState {
                removed: removed.into_iter().filter(|name| !agents.contains_key(name)).collect(),
                agents,
                ..DesiredState::default()
            },
        )
    }

    fn actual() -> impl Strategy<Value = BTreeMap<AgentName, Actual>> {
        let agent = (
            proptest::option::of(version()),
            proptest::option::of(version()),
            proptest::collection::btree_set(version(), 0..4),
            run(),
            proptest::option::of(spec()),
            proptest::option::of(version()),
        )
            .prop_map(|(current, backup, mut releases, run, spec, running)| {
                releases.extend(current.clone());
                let kept = current.iter().chain(&backup).cloned().collect();
                Actual { current, running, kept, releases, run, spec, ..Actual::default() }
            });
        proptest::collection::btree_map(name(), agent, 0..4)
    }

    proptest! {
        #[test]
        fn repeated_plans_reach_the_desired_state_and_then_are_empty(desired in desired(), mut actual in actual()) {
            for _ in 0..4 {
                for step in plan(&desired, &actual) {
                    apply(step, &mut actual);
                }
            }
            prop_assert_eq!(plan(&desired, &actual), vec![]);
            for (name, order) in &desired.agents {
                let agent = &actual[name];
                prop_assert_eq!(agent.current.as_ref(), Some(&order.package.version));
                prop_assert_eq!(agent.run, order.run);
                prop_assert_eq!(agent.spec.as_ref(), Some(&order.spec));
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
    fn an_ordered_release_that_an_operator_overrides_is_not_activated_while_its_process_stops() {
        let name: AgentName = "a".parse().unwrap();
        let order = Order {
            package: Package::new("2".parse().unwrap()),
            run: Run::Start,
            spec: Spec::default(),
            retry: 0,
            unknown: UnknownFields::new(),
        };
        let (one, two): (Version, Version) = ("1".parse().unwrap(), "2".parse().unwrap());
        let agent = Actual {
            current: Some(one.clone()),
            running: Some(two.clone()),
            kept: [one.clone()].into(),
            releases: [one, two].into(),
            stays: true,
            run: Run::Start,
            spec: Some(order.spec.clone()),
            ..Actual::default()
        };
        let desired = DesiredState { agents: BTreeMap::from([(name.clone(), order)]), ..DesiredState::default() };
        assert_eq!(plan(&desired, &BTreeMap::from([(name, agent)])), vec![]);
    }

    #[test]
    fn no_step_is_planned_for_a_busy_sub_agent_or_a_held_back_release() {
        let name: AgentName = "a".parse().unwrap();
        let package = Package::new("2".parse().unwrap());
        let order = Order { package, run: Run::Start, spec: Spec::default(), retry: 0, unknown: UnknownFields::new() };
        let desired = DesiredState { agents: BTreeMap::from([(name.clone(), order)]), ..DesiredState::default() };
        let plan_with = |agent: Actual| plan(&desired, &BTreeMap::from([(name.clone(), agent)]));
        assert_eq!(plan_with(Actual { busy: true, ..Actual::default() }), vec![]);
        assert_eq!(plan_with(Actual { held_back: Some("2".parse().unwrap()), ..Actual::default() }), vec![]);
        assert_eq!(plan_with(Actual { staging: Some("2".parse().unwrap()), ..Actual::default() }), vec![]);
        assert_eq!(plan_with(Actual { staging: Some("1".parse().unwrap()), ..Actual::default() }).len(), 1);
        // A release that is being removed is staged again only after that.
        let two = BTreeSet::from(["2".parse().unwrap()]);
        assert_eq!(plan_with(Actual { leaving: two.clone(), ..Actual::default() }), vec![]);
        assert_eq!(plan_with(Actual { leaving: two.clone(), releases: two, ..Actual::default() }), vec![]);
    }

    #[test]
    fn the_number_of_simultaneous_activations_is_limited_for_running_sub_agents_only() {
        let order = |version: &str| {
            let package = Package::new(version.parse().unwrap());
            Order { package, run: Run::Start, spec: Spec::default(), retry: 0, unknown: UnknownFields::new() }
        };
        let names: Vec<AgentName> = (0..12).map(|number| format!("a{number:02}").parse().unwrap()).collect();
        let desired = DesiredState {
            agents: names.iter().map(|name| (name.clone(), order("2"))).collect(),
            ..DesiredState::default()
        };
        let two = BTreeSet::from(["2".parse().unwrap()]);
        let activated = |agent: &dyn Fn(usize) -> Actual| {
            let actual = names.iter().enumerate().map(|(at, name)| (name.clone(), agent(at))).collect();
            plan(&desired, &actual).iter().filter(|step| matches!(step, ReconcileStep::Activate { .. })).count()
        };
        let runs = || Actual { current: Some("1".parse().unwrap()), releases: two.clone(), ..Actual::default() };
        assert_eq!(activated(&|_| runs()), MAX_CHANGING);
        assert_eq!(activated(&|at| Actual { busy: at < 3, upgrading: at < 3, ..runs() }), MAX_CHANGING - 3);
        assert_eq!(activated(&|at| Actual { busy: at < 7, upgrading: at < 7, ..runs() }), 0);
        assert_eq!(activated(&|_| Actual { current: None, ..runs() }), names.len());
    }

    #[test]
    fn without_a_desired_state_nothing_is_changed() {
        let actual = BTreeMap::from([(
            "a".parse().unwrap(),
            Actual { current: Some("1".parse().unwrap()), ..Actual::default() },
        )]);
        assert_eq!(plan(&DesiredState::default(), &actual), vec![]);
    }
}
