//! `fleet.toml`: what the operator wants of the fleet, and what follows from it for one host.
//!
//! The file is parsed strictly: a key that is not known is an error, so that a misspelt one is never silently without effect. Whether a
//! well-formed file may take the place of the last good one is a decision of its own ([`evaluate`]), because a file can be well formed and
//! still be an accident: empty, cut off, or naming packages that are not there.
//!
//! ```text
//! text -> Fleet -> evaluate(last good, depot) -> Fleet::desired(host) -> orders_for(depot) -> Told -> generation -> Answer
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

/// A `fleet.toml` beyond this is refused: what one host is told must fit into the 4 MiB that a host takes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Of what is missing in the depot, so much is told and remembered for each host, bytes.
const MAX_MISSING_BYTES: usize = 1 << 10;
/// Between two heartbeats, unless the file says otherwise.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(30);
/// The shortest and the longest interval that a file may ask for, seconds.
const INTERVALS: std::ops::RangeInclusive<u64> = 1..=86_400;
/// From the first complete list that omits a sub-agent to its removal, unless the file says otherwise: time to notice a slip.
const DEFAULT_REMOVAL_DELAY: Duration = Duration::from_secs(300);
/// The longest removal delay, seconds: 30 days.
const MAX_REMOVAL_DELAY: u64 = 30 * 86_400;

/// The desired state of the whole fleet.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "RawFleet")]
pub struct Fleet {
    pub interval: Duration,
    /// For so long hosts keep what the list omits; whole seconds.
    pub removal_delay: Duration,
    /// The file may drop more than half of the sub-agents.
    pub allow_removal: bool,
    /// The manager's version, where it is ordered.
    pub manager: Option<Version>,
    /// For every host.
    pub agents: BTreeMap<AgentName, Order>,
    /// For some hosts; later ones win.
    pub rules: Vec<Rule>,
}

/// What differs for the hosts that match.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    matches: Match,
    manager: Option<Version>,
    agents: BTreeMap<AgentName, RawAgent>,
}

/// Which hosts: all that is given must hold, each by any of its globs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Match {
    agent_id: Option<Vec<Glob>>,
    hostname: Option<Vec<Glob>>,
    os: Option<Vec<Glob>>,
    arch: Option<Vec<Glob>>,
}

/// The file as it is written.
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

/// In `[agents]` it must have a version; in a rule it changes only what it says.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawAgent {
    version: Option<Version>,
    cmd: Option<Run>,
    #[serde(default)]
    env: BTreeMap<EnvName, EnvValue>,
    /// Of [`Order::retry`].
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
            Err(format!("cannot take {name:?} as the name of an environment variable: expected letters, digits and _"))
        }
    }
}

impl TryFrom<RawFleet> for Fleet {
    type Error = String;

    fn try_from(written: RawFleet) -> Result<Fleet, String> {
        let interval = written.heartbeat_interval.map_or(DEFAULT_INTERVAL, |span| span.0);
        if interval.subsec_nanos() != 0 || !INTERVALS.contains(&interval.as_secs()) {
            return Err("cannot take heartbeatInterval: expected whole seconds, from 1s to 1d".to_owned());
        }
        let removal_delay = written.removal_delay.map_or(DEFAULT_REMOVAL_DELAY, |span| span.0);
        if removal_delay.subsec_nanos() != 0 || removal_delay.as_secs() > MAX_REMOVAL_DELAY {
            return Err("cannot take removalDelay: expected whole seconds, from 0s to 30d".to_owned());
        }
        let mut agents = BTreeMap::new();
        for (name, agent) in written.agents {
            let order = agent.to_order().ok_or_else(|| format!("cannot take agents.{name}: it has no version"))?;
            check_env(&order.spec.env).map_err(|why| format!("cannot take the env of agents.{name}: {why}"))?;
            agents.insert(name, order);
        }
        let mut rules = Vec::new();
        let mut known: BTreeSet<AgentName> = agents.keys().cloned().collect();
        for (index, rule) in written.rules.into_iter().enumerate() {
            let number = index + 1;
            rule.r#match.check().map_err(|why| format!("cannot take the match of rule {number}: {why}"))?;
            for (name, agent) in &rule.agents {
                check_env(&plain(agent.env.clone()))
                    .map_err(|why| format!("cannot take the env of agents.{name} in rule {number}: {why}"))?;
                if agent.version.is_some() {
                    known.insert(name.clone());
                } else if !known.contains(name) {
                    return Err(format!(
                        "cannot take agents.{name} in rule {number}: it has no version, neither there nor before"
                    ));
                }
            }
            rules.push(Rule { matches: rule.r#match, manager: rule.manager.version, agents: rule.agents });
        }
        if known.iter().any(|name| name.as_str() == MANAGER_PACKAGE) {
            return Err(format!("cannot take {MANAGER_PACKAGE} as a sub-agent: its version stands in [manager]"));
        }
        if known.len() > MAX_AGENTS {
            return Err(format!("cannot take {} sub-agents: at most {MAX_AGENTS}", known.len()));
        }
        let (allow_removal, manager) = (written.allow_removal, written.manager.version);
        Ok(Fleet { interval, removal_delay, allow_removal, manager, agents, rules })
    }
}

impl RawAgent {
    /// The order that it begins; `None`: it names no version.
    fn to_order(&self) -> Option<Order> {
        let package = Package::new(self.version.clone()?);
        let mut order =
            Order { package, run: Run::Start, spec: Spec::default(), retry: 0, unknown: UnknownFields::new() };
        self.apply_to(&mut order);
        Some(order)
    }

    /// Changes what it says: fields, and variables of the environment one by one.
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

/// What no host could give to a sub-agent is not asked of it.
fn check_env(env: &Env) -> Result<(), String> {
    env::check(env)?;
    match env.iter().find(|(_, value)| value.reveal().contains('\0')) {
        Some((name, _)) => Err(format!("the value of {name} has a zero byte in it")),
        None => Ok(()),
    }
}

impl Match {
    /// An empty condition is far more often a slip than a wish, and the slip would hit the whole fleet, or nothing.
    fn check(&self) -> Result<(), &'static str> {
        let given: Vec<&Vec<Glob>> =
            [&self.agent_id, &self.hostname, &self.os, &self.arch].into_iter().flatten().collect();
        if given.is_empty() {
            return Err("it names nothing, and what is for every host stands in [agents]");
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

/// What a rule can ask about a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    pub agent_id: AgentId,
    pub hostname: String,
    pub os: Os,
    pub arch: Arch,
}

/// What is wanted of one host, whatever the depot has.
#[derive(Debug, Clone, PartialEq)]
pub struct HostDesired {
    pub manager: Option<Version>,
    pub agents: BTreeMap<AgentName, Order>,
}

impl Fleet {
    /// What is wanted of `host`: the list for all, changed by each rule that matches, in their order.
    ///
    /// A rule changes fields, and variables of the environment one by one; without a version it changes only what the host already has.
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

    /// Every sub-agent that some host may have.
    pub fn names(&self) -> BTreeSet<&AgentName> {
        self.agents.keys().chain(self.rules.iter().flat_map(|rule| rule.agents.keys())).collect()
    }

    /// Whether a value of some environment is marked as secret.
    pub fn has_secrets(&self) -> bool {
        let everywhere = self.agents.values().flat_map(|order| order.spec.env.values());
        let somewhere = self.rules.iter().flat_map(|rule| rule.agents.values()).flat_map(|agent| agent.env.values());
        everywhere.chain(somewhere).any(EnvValue::is_secret)
    }

    /// Every release that the file names, the manager's under the name of its package.
    pub fn releases(&self) -> BTreeSet<(&str, &Version)> {
        let managers = self.manager.iter().chain(self.rules.iter().filter_map(|rule| rule.manager.as_ref()));
        let everywhere = self.agents.iter().map(|(name, order)| (name.as_str(), &order.package.version));
        let somewhere = self.rules.iter().flat_map(|rule| {
            rule.agents.iter().filter_map(|(name, agent)| Some((name.as_str(), agent.version.as_ref()?)))
        });
        managers.map(|version| (MANAGER_PACKAGE, version)).chain(everywhere).chain(somewhere).collect()
    }
}

/// Why a well-formed file does not take the place of the last good one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FleetRejection {
    /// It names no sub-agent any more.
    Empty,
    /// It drops too many sub-agents: how many of how many, and some of their names.
    Drops { dropped: usize, of: usize, names: Vec<AgentName> },
    /// The same, seen from the hosts: rules can take a sub-agent from most hosts and still name it.
    DropsFromHosts { dropped: usize, of: usize },
    /// Names a sub-agent or a version that no host can have: which, and why.
    Reserved(String),
    /// The depot has no package of these releases, for no os and arch.
    NoPackage(Vec<String>),
}

impl fmt::Display for FleetRejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FleetRejection::Empty => f.write_str(
                "it names no sub-agent any more, which would not remove any: to stop one, write cmd = \"stop\"; to remove \
                 some, keep the others",
            ),
            FleetRejection::Drops { dropped, of, names } => {
                let names: Vec<&str> = names.iter().take(5).map(AgentName::as_str).collect();
                let more = if *dropped > names.len() { ", …" } else { "" };
                write!(
                    f,
                    "it drops {dropped} of {of} sub-agents ({}{more}); if that is meant, write allowRemoval = true at the top",
                    names.join(", ")
                )
            }
            FleetRejection::DropsFromHosts { dropped, of } => write!(
                f,
                "it takes {dropped} of {of} sub-agents from the hosts known now; if that is meant, write allowRemoval = true \
                 at the top"
            ),
            FleetRejection::Reserved(why) => f.write_str(why),
            FleetRejection::NoPackage(releases) => write!(
                f,
                "the depot has no package of {}; publish it, or name another version",
                releases.iter().take(5).cloned().collect::<Vec<_>>().join(", ")
            ),
        }
    }
}

impl std::error::Error for FleetRejection {}

/// Whether `new` may take the place of `last_good`. `hosts` are those known now, or a sample of them; `published` says whether the
/// depot has a package of a release for any os and arch.
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
            .map_err(|why| FleetRejection::Reserved(format!("cannot take agents.{name}: {why}")))?;
    }
    let missing: Vec<String> = new
        .releases()
        .into_iter()
        .filter(|(name, version)| !published(name, version))
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(FleetRejection::NoPackage(missing)) }
}

/// How many pairs of host and sub-agent would go, of how many.
fn removals_from(hosts: &[HostFacts], last_good: &Fleet, new: &Fleet) -> (usize, usize) {
    let counts = hosts.iter().map(|host| {
        let (before, after) = (last_good.desired(host).agents, new.desired(host).agents);
        (before.keys().filter(|name| !after.contains_key(name)).count(), before.len())
    });
    counts.fold((0, 0), |(dropped, of), (d, o)| (dropped + d, of + o))
}

/// What one host is told: its desired state, in packages that the depot has for it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostOrders {
    pub manager: Option<Package>,
    pub agents: Vec<AgentOrder>,
    /// No sub-agent was left out.
    pub complete: bool,
    /// What was left out, for an operator to read.
    pub missing: Option<String>,
}

/// Puts the desired state of a host into orders. `offer` gives the package of a release for the host's os and arch.
pub fn orders_for(
    desired: &HostDesired,
    host: &HostFacts,
    offer: impl Fn(&str, &Version) -> Option<Offer>,
) -> HostOrders {
    let mut missing = Vec::new();
    let mut take = |name: &str, version: &Version| {
        let found = offer(name, version);
        if found.is_none() {
            missing.push(format!("{name} {version}"));
        }
        found
    };
    let manager = desired.manager.as_ref().and_then(|version| take(MANAGER_PACKAGE, version)).map(Package::from);
    let mut agents = Vec::new();
    for (name, order) in &desired.agents {
        let Some(offer) = take(name.as_str(), &order.package.version) else { continue };
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

/// The newest of the versions published, given in the order of their publication: by semver where both are semver, else by that order.
pub fn newest<'a>(published: impl IntoIterator<Item = &'a Version>) -> Option<&'a Version> {
    published.into_iter().reduce(|best, next| match next.order(best) {
        Some(std::cmp::Ordering::Less) => best,
        _ => next,
    })
}

#[cfg(test)]
mod tests;
