//! `fleet.toml`: the desired state of the whole fleet, and what follows from it for one host.
//!
//! The file is parsed strictly: an unknown key is an error, so a misspelt one is never silently ignored. Whether a well-formed file may
//! replace the last good one is a separate decision ([`evaluate`]), because it can still be an accident: empty, truncated, or naming
//! packages that are not in the depot.
//!
//! ```text
//! text -> Fleet -> evaluate(last good, depot) -> Fleet::desired(host) -> orders_for(depot) -> HostOrders -> generation -> Answer
//! ```

mod changes;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::changes::{FleetChanges, changes};
use super::env::{self, Env, EnvValue};
use super::glob::Glob;
use super::model::{AgentId, AgentName, Arch, MANAGER_PACKAGE, Os, Version};
use super::names;
use super::order::{Cmd, Order, Package, Run, Spec};
use super::protocol::{AgentOrder, MAX_AGENTS, Offer};
use super::text::cut;
use super::units::Span;
use super::unknown::UnknownFields;

/// Limit for `fleet.toml`, bytes: the answer to one host must fit into the 4 MiB that a host accepts.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Limit for the list of packages missing in the depot that is sent to, and stored for, each host, bytes.
const MAX_MISSING_BYTES: usize = 1 << 10;
/// Default of `heartbeatInterval`.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(30);
/// The allowed values of `heartbeatInterval`, seconds.
const INTERVALS: std::ops::RangeInclusive<u64> = 1..=86_400;
/// Default of `removalDelay`, from the first complete list that omits a sub-agent to its removal: time to notice a mistake.
const DEFAULT_REMOVAL_DELAY: Duration = Duration::from_secs(300);
/// The longest removal delay, seconds: 30 days.
const MAX_REMOVAL_DELAY: u64 = 30 * 86_400;

/// The desired state of the whole fleet.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "RawFleet")]
pub struct Fleet {
    pub interval: Duration,
    /// Time for which hosts keep a sub-agent that the list omits; whole seconds.
    pub removal_delay: Duration,
    /// The file may remove more than half of the sub-agents.
    pub allow_removal: bool,
    /// The manager's version; `None`: not ordered.
    pub manager: Option<Version>,
    /// For every host.
    pub agents: BTreeMap<AgentName, Order>,
    /// For some hosts; later ones win.
    pub rules: Vec<Rule>,
}

/// Changes for the hosts that match.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    matches: Match,
    manager: Option<Version>,
    agents: BTreeMap<AgentName, RawAgent>,
}

/// Selects hosts: every condition given must match, each by any of its globs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Match {
    agent_id: Option<Vec<Glob>>,
    hostname: Option<Vec<Glob>>,
    os: Option<Vec<Glob>>,
    arch: Option<Vec<Glob>>,
}

/// The file as written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawFleet {
    heartbeat_interval: Option<Span>,
    removal_delay: Option<Span>,
    #[serde(default)]
    allow_removal: bool,
    #[serde(default)]
    manager: RawManager,
    #[serde(default)]
    agents: BTreeMap<AgentName, RawAgent>,
    #[serde(default)]
    rules: Vec<RawRule>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawManager {
    version: Option<Version>,
}

/// In `[agents]` a version is required; in a rule only the fields given are changed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawAgent {
    version: Option<Version>,
    cmd: Option<Run>,
    #[serde(default)]
    env: BTreeMap<EnvName, EnvValue>,
    /// See [`Order::retry`].
    retry: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    r#match: Match,
    #[serde(default)]
    manager: RawManager,
    #[serde(default)]
    agents: BTreeMap<AgentName, RawAgent>,
}

/// The name of an environment variable: `[A-Za-z_][A-Za-z0-9_]*`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
struct EnvName(String);

impl TryFrom<String> for EnvName {
    type Error = String;

    fn try_from(name: String) -> Result<EnvName, String> {
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        if first && name.len() <= env::MAX_NAME_BYTES && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            Ok(EnvName(name))
        } else {
            Err(format!("cannot use {name:?} as the name of an environment variable: expected letters, digits and _"))
        }
    }
}

impl TryFrom<RawFleet> for Fleet {
    type Error = String;

    fn try_from(written: RawFleet) -> Result<Fleet, String> {
        let interval = written.heartbeat_interval.map_or(DEFAULT_INTERVAL, |span| span.0);
        if interval.subsec_nanos() != 0 || !INTERVALS.contains(&interval.as_secs()) {
            return Err("cannot use heartbeatInterval: expected whole seconds, from 1s to 1d".to_owned());
        }
        let removal_delay = written.removal_delay.map_or(DEFAULT_REMOVAL_DELAY, |span| span.0);
        if removal_delay.subsec_nanos() != 0 || removal_delay.as_secs() > MAX_REMOVAL_DELAY {
            return Err("cannot use removalDelay: expected whole seconds, from 0s to 30d".to_owned());
        }
        let mut agents = BTreeMap::new();
        for (name, agent) in written.agents {
            let order = agent.to_order().ok_or_else(|| format!("cannot use agents.{name}: it has no version"))?;
            check_env(&order.spec.env).map_err(|why| format!("cannot use the env of agents.{name}: {why}"))?;
            agents.insert(name, order);
        }
        let mut rules = Vec::new();
        let mut with_version: BTreeSet<AgentName> = agents.keys().cloned().collect();
        for (index, rule) in written.rules.into_iter().enumerate() {
            let number = index + 1;
            rule.r#match.check().map_err(|why| format!("cannot use the match of rule {number}: {why}"))?;
            for (name, agent) in &rule.agents {
                check_env(&plain(agent.env.clone()))
                    .map_err(|why| format!("cannot use the env of agents.{name} in rule {number}: {why}"))?;
                if agent.version.is_some() {
                    with_version.insert(name.clone());
                } else if !with_version.contains(name) {
                    return Err(format!(
                        "cannot use agents.{name} in rule {number}: it has no version in the rule, in an earlier rule or in [agents]"
                    ));
                }
            }
            rules.push(Rule { matches: rule.r#match, manager: rule.manager.version, agents: rule.agents });
        }
        if with_version.iter().any(|name| name.as_str() == MANAGER_PACKAGE) {
            return Err(format!("cannot use {MANAGER_PACKAGE} as a sub-agent: set its version in [manager]"));
        }
        if with_version.len() > MAX_AGENTS {
            return Err(format!("cannot use {} sub-agents: at most {MAX_AGENTS}", with_version.len()));
        }
        let (allow_removal, manager) = (written.allow_removal, written.manager.version);
        Ok(Fleet { interval, removal_delay, allow_removal, manager, agents, rules })
    }
}

impl RawAgent {
    /// A new order with these fields; `None`: it has no version.
    fn to_order(&self) -> Option<Order> {
        let package = Package::new(self.version.clone()?);
        let mut order =
            Order { package, run: Run::Start, spec: Spec::default(), retry: 0, unknown: UnknownFields::new() };
        self.apply_to(&mut order);
        Some(order)
    }

    /// Sets the fields given, and each environment variable given.
    fn apply_to(&self, order: &mut Order) {
        let RawAgent { version, cmd, env, retry } = self.clone();
        if let Some(version) = version {
            order.package = Package::new(version);
        }
        order.run = cmd.unwrap_or(order.run);
        order.spec.env.extend(plain(env));
        order.retry = retry.unwrap_or(order.retry);
    }
}

fn plain(env: BTreeMap<EnvName, EnvValue>) -> Env {
    env.into_iter().map(|(name, value)| (name.0, value)).collect()
}

/// Whether a host can pass these variables to a sub-agent.
fn check_env(env: &Env) -> Result<(), String> {
    env::check(env)?;
    match env.iter().find(|(_, value)| value.reveal().contains('\0')) {
        Some((name, _)) => Err(format!("the value of {name} contains a zero byte")),
        None => Ok(()),
    }
}

impl Match {
    /// Rejects empty conditions: they are most likely a mistake, and would match all hosts or none.
    fn check(&self) -> Result<(), &'static str> {
        let given: Vec<&Vec<Glob>> =
            [&self.agent_id, &self.hostname, &self.os, &self.arch].into_iter().flatten().collect();
        if given.is_empty() {
            return Err("it names nothing; put what is for every host into [agents]");
        }
        if given.iter().any(|globs| globs.is_empty()) {
            return Err("an empty list matches no host");
        }
        Ok(())
    }

    fn matches_host(&self, host: &HostFacts) -> bool {
        let any = |globs: &Option<Vec<Glob>>, text: &str| {
            globs.as_ref().is_none_or(|globs| globs.iter().any(|glob| glob.matches(text)))
        };
        any(&self.os, host.os.as_str())
            && any(&self.arch, host.arch.as_str())
            && any(&self.agent_id, host.agent_id.as_str())
            && any(&self.hostname, &host.hostname)
    }
}

/// The facts about a host that rules can match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    pub agent_id: AgentId,
    pub hostname: String,
    pub os: Os,
    pub arch: Arch,
}

/// The desired state of one host, whether or not the depot has the packages.
#[derive(Debug, Clone, PartialEq)]
pub struct HostDesired {
    pub manager: Option<Version>,
    pub agents: BTreeMap<AgentName, Order>,
}

impl Fleet {
    /// The desired state of `host`: the list for all hosts, changed by each rule that matches, in the order of the rules.
    ///
    /// A rule changes single fields and single environment variables. Without a version it only changes a sub-agent that the host already
    /// has.
    pub fn desired(&self, host: &HostFacts) -> HostDesired {
        let mut desired = HostDesired { manager: self.manager.clone(), agents: self.agents.clone() };
        for rule in self.rules.iter().filter(|rule| rule.matches.matches_host(host)) {
            if let Some(version) = &rule.manager {
                desired.manager = Some(version.clone());
            }
            for (name, change) in &rule.agents {
                if let Some(order) = desired.agents.get_mut(name) {
                    change.apply_to(order);
                } else if let Some(order) = change.to_order() {
                    desired.agents.insert(name.clone(), order);
                }
            }
        }
        desired
    }

    /// The names of all sub-agents, for any host.
    pub fn names(&self) -> BTreeSet<&AgentName> {
        self.agents.keys().chain(self.rules.iter().flat_map(|rule| rule.agents.keys())).collect()
    }

    /// Whether any environment variable is a secret.
    pub fn has_secrets(&self) -> bool {
        let everywhere = self.agents.values().flat_map(|order| order.spec.env.values());
        let somewhere = self.rules.iter().flat_map(|rule| rule.agents.values()).flat_map(|agent| agent.env.values());
        everywhere.chain(somewhere).any(EnvValue::is_secret)
    }

    /// All releases that the file names, the manager's under its package name.
    pub fn releases(&self) -> BTreeSet<(&str, &Version)> {
        let managers = self.manager.iter().chain(self.rules.iter().filter_map(|rule| rule.manager.as_ref()));
        let everywhere = self.agents.iter().map(|(name, order)| (name.as_str(), &order.package.version));
        let somewhere = self.rules.iter().flat_map(|rule| {
            rule.agents.iter().filter_map(|(name, agent)| Some((name.as_str(), agent.version.as_ref()?)))
        });
        managers.map(|version| (MANAGER_PACKAGE, version)).chain(everywhere).chain(somewhere).collect()
    }
}

/// Why a well-formed file may not replace the last good one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FleetRejection {
    /// It no longer names any sub-agent.
    Empty,
    /// It removes more than half of the sub-agents: `dropped` of `of`, and their names.
    Drops { dropped: usize, of: usize, names: Vec<AgentName> },
    /// The same counted by hosts: a rule can remove a sub-agent from most hosts and still name it.
    DropsFromHosts { dropped: usize, of: usize },
    /// It names a reserved version.
    Reserved(String),
    /// The depot has no package of these releases for any os and arch.
    NoPackage(Vec<String>),
}

impl fmt::Display for FleetRejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FleetRejection::Empty => f.write_str(
                "it no longer names any sub-agent, and an empty list removes none: to stop a sub-agent, set cmd = \"stop\"; to \
                 remove some, keep the others",
            ),
            FleetRejection::Drops { dropped, of, names } => {
                let names: Vec<&str> = names.iter().take(5).map(AgentName::as_str).collect();
                let more = if *dropped > names.len() { ", …" } else { "" };
                write!(
                    f,
                    "it removes {dropped} of {of} sub-agents ({}{more}); to allow that, set allowRemoval = true at the top of the file",
                    names.join(", ")
                )
            }
            FleetRejection::DropsFromHosts { dropped, of } => write!(
                f,
                "it removes {dropped} of {of} sub-agents from the known hosts; to allow that, set allowRemoval = true at the top \
                 of the file"
            ),
            FleetRejection::Reserved(why) => f.write_str(why),
            FleetRejection::NoPackage(releases) => write!(
                f,
                "the depot has no package of {}; publish it, or choose another version",
                releases.iter().take(5).cloned().collect::<Vec<_>>().join(", ")
            ),
        }
    }
}

impl std::error::Error for FleetRejection {}

/// Whether `new` may replace `last_good`. `hosts` are the known hosts or a sample of them; `published` returns whether the depot has a
/// package of a release for any os and arch.
pub fn evaluate(
    new: &Fleet,
    last_good: Option<&Fleet>,
    hosts: &[HostFacts],
    published: impl Fn(&str, &Version) -> bool,
) -> Result<(), FleetRejection> {
    if let Some(last_good) = last_good {
        let (before, after) = (last_good.names(), new.names());
        if after.is_empty() && !before.is_empty() {
            return Err(FleetRejection::Empty);
        }
        if !new.allow_removal {
            let gone: Vec<AgentName> = before.difference(&after).map(|name| (*name).clone()).collect();
            if gone.len() * 2 > before.len() {
                return Err(FleetRejection::Drops { dropped: gone.len(), of: before.len(), names: gone });
            }
            let (dropped, of) = removals_from(hosts, last_good, new);
            if dropped * 2 > of {
                return Err(FleetRejection::DropsFromHosts { dropped, of });
            }
        }
    }
    for (name, version) in new.releases().into_iter().filter(|(name, _)| *name != MANAGER_PACKAGE) {
        names::check_version(version)
            .map_err(|why| FleetRejection::Reserved(format!("cannot use agents.{name}: {why}")))?;
    }
    let missing: Vec<String> = new
        .releases()
        .into_iter()
        .filter(|(name, version)| !published(name, version))
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(FleetRejection::NoPackage(missing)) }
}

/// The number of sub-agents that would be removed, and their total, each counted on every host.
fn removals_from(hosts: &[HostFacts], last_good: &Fleet, new: &Fleet) -> (usize, usize) {
    let counts = hosts.iter().map(|host| {
        let (before, after) = (last_good.desired(host).agents, new.desired(host).agents);
        (before.keys().filter(|name| !after.contains_key(name)).count(), before.len())
    });
    counts.fold((0, 0), |(dropped, of), (d, o)| (dropped + d, of + o))
}

/// The desired state of one host as orders, limited to packages that the depot has for it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostOrders {
    pub manager: Option<Package>,
    pub agents: Vec<AgentOrder>,
    /// No sub-agent was left out, and there is at least one.
    pub complete: bool,
    /// The packages missing in the depot, as a message to the operator.
    pub missing: Option<String>,
}

/// The orders for a host. `offer` returns the package of a release for the host's os and arch.
pub fn orders_for(
    desired: &HostDesired,
    host: &HostFacts,
    offer: impl Fn(&str, &Version) -> Option<Offer>,
) -> HostOrders {
    let mut missing = Vec::new();
    let mut find = |name: &str, version: &Version| {
        let found = offer(name, version);
        if found.is_none() {
            missing.push(format!("{name} {version}"));
        }
        found
    };
    let manager = desired.manager.as_ref().and_then(|version| find(MANAGER_PACKAGE, version)).map(Package::from);
    let mut agents = Vec::new();
    for (name, order) in &desired.agents {
        let Some(offer) = find(name.as_str(), &order.package.version) else { continue };
        let (name, package, spec) = (name.clone(), Package::from(offer), order.spec.clone());
        agents.push(AgentOrder {
            name,
            package,
            cmd: Cmd::Run(order.run),
            spec,
            retry: order.retry,
            unknown: UnknownFields::new(),
        });
    }
    let complete = agents.len() == desired.agents.len() && !agents.is_empty();
    let missing = (!missing.is_empty())
        .then(|| format!("the depot has no package for {}/{} of {}", host.os, host.arch, missing.join(", ")))
        .map(|text| cut(&text, MAX_MISSING_BYTES));
    HostOrders { manager, agents, complete, missing }
}

/// The newest of the versions, which are given in the order of publication: by semver if both are semver, else by publication.
pub fn newest<'a>(published: impl IntoIterator<Item = &'a Version>) -> Option<&'a Version> {
    published.into_iter().reduce(|best, next| match next.order(best) {
        Some(std::cmp::Ordering::Less) => best,
        _ => next,
    })
}

#[cfg(test)]
mod tests;
