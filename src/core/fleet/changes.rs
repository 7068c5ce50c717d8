//! The changes on hosts when one fleet file replaces another, for an operator to review before they take effect.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Fleet, HostFacts};
use crate::core::order::{Order, Run};

/// The differences between two fleets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetChanges {
    /// Each difference, with the number of hosts that it affects.
    pub lines: Vec<String>,
    /// Number of hosts with any difference.
    pub hosts: usize,
}

/// One difference, identical on all hosts that have it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum FleetChange {
    Manager {
        from: Option<String>,
        to: Option<String>,
    },
    Removed {
        name: String,
        version: String,
    },
    Added {
        name: String,
        version: String,
    },
    Version {
        name: String,
        from: String,
        to: String,
    },
    Run {
        name: String,
        stops: bool,
    },
    /// Its environment, or `retry`.
    Settings {
        name: String,
    },
}

impl fmt::Display for FleetChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FleetChange::Manager { from: Some(from), to: Some(to) } => write!(f, "the manager: {from} -> {to}"),
            FleetChange::Manager { from: None, to: Some(to) } => write!(f, "the manager: {to} ordered"),
            FleetChange::Manager { from: _, to: None } => write!(f, "the manager: no version is ordered"),
            FleetChange::Removed { name, version } => write!(f, "{name}: {version} removed"),
            FleetChange::Added { name, version } => write!(f, "{name}: {version} added"),
            FleetChange::Version { name, from, to } => write!(f, "{name}: {from} -> {to}"),
            FleetChange::Run { name, stops: true } => write!(f, "{name}: stopped"),
            FleetChange::Run { name, stops: false } => write!(f, "{name}: started"),
            FleetChange::Settings { name } => write!(f, "{name}: settings changed"),
        }
    }
}

/// The changes for these hosts when `after` replaces `before`.
pub fn changes(before: Option<&Fleet>, after: &Fleet, hosts: &[HostFacts]) -> FleetChanges {
    let mut counts: BTreeMap<FleetChange, usize> = BTreeMap::new();
    let mut touched = 0;
    for host in hosts {
        let of_host = of_host(before, after, host);
        touched += usize::from(!of_host.is_empty());
        for change in of_host {
            *counts.entry(change).or_default() += 1;
        }
    }
    let line = |(change, count): (FleetChange, usize)| {
        format!("{change}, on {count} {}", if count == 1 { "host" } else { "hosts" })
    };
    FleetChanges { lines: counts.into_iter().map(line).collect(), hosts: touched }
}

fn of_host(before: Option<&Fleet>, after: &Fleet, host: &HostFacts) -> BTreeSet<FleetChange> {
    let before = before.map(|before| before.desired(host));
    let after = after.desired(host);
    let mut changes = BTreeSet::new();
    let text = |version: &crate::core::model::Version| version.to_string();
    let managers = [before.as_ref().and_then(|before| before.manager.as_ref()), after.manager.as_ref()];
    if managers[0] != managers[1] {
        changes.insert(FleetChange::Manager { from: managers[0].map(text), to: managers[1].map(text) });
    }
    let agents = before.map(|before| before.agents).unwrap_or_default();
    let version = |order: &Order| order.package.version.to_string();
    for (name, order) in &agents {
        match after.agents.get(name) {
            Some(new) => changes.extend(of_order(name.as_str(), order, new)),
            None => {
                changes.insert(FleetChange::Removed { name: name.to_string(), version: version(order) });
            }
        }
    }
    for (name, order) in after.agents.iter().filter(|(name, _)| !agents.contains_key(*name)) {
        changes.insert(FleetChange::Added { name: name.to_string(), version: version(order) });
    }
    changes
}

fn of_order(name: &str, before: &Order, after: &Order) -> Vec<FleetChange> {
    let name = name.to_owned();
    let mut changes = Vec::new();
    if before.package.version != after.package.version {
        let (from, to) = (before.package.version.to_string(), after.package.version.to_string());
        changes.push(FleetChange::Version { name: name.clone(), from, to });
    }
    if before.run != after.run {
        changes.push(FleetChange::Run { name: name.clone(), stops: after.run == Run::Stop });
    }
    if before.spec != after.spec || before.retry != after.retry {
        changes.push(FleetChange::Settings { name });
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::{Arch, Os};

    fn host(hostname: &str) -> HostFacts {
        HostFacts {
            agent_id: hostname.parse().unwrap(),
            hostname: hostname.to_owned(),
            os: Os::Linux,
            arch: Arch::Amd64,
        }
    }

    #[test]
    fn each_difference_is_counted_by_hosts() {
        let fleet = |text: &str| toml::from_str::<Fleet>(text).unwrap();
        let before = fleet(
            "[manager]\nversion = \"1\"\n[agents.a]\nversion = \"1\"\n[agents.b]\nversion = \"1\"\n[agents.c]\nversion = \"1\"\n",
        );
        let after = fleet(
            "[manager]\nversion = \"2\"\n[agents.a]\nversion = \"1\"\n[agents.c]\nversion = \"1\"\ncmd = \"stop\"\n\
             [[rules]]\nmatch = { hostname = [\"web-*\"] }\nagents.a = { version = \"2\", env = { A = \"b\" } }\nagents.d.version = \"1\"\n",
        );
        let hosts = ["web-1", "web-2", "db-1"].map(host);
        let found = changes(Some(&before), &after, &hosts);
        assert_eq!(
            found.lines,
            [
                "the manager: 1 -> 2, on 3 hosts",
                "b: 1 removed, on 3 hosts",
                "d: 1 added, on 2 hosts",
                "a: 1 -> 2, on 2 hosts",
                "c: stopped, on 3 hosts",
                "a: settings changed, on 2 hosts",
            ]
        );
        assert_eq!(found.hosts, 3);
        assert_eq!(changes(Some(&after), &after, &hosts), FleetChanges { lines: Vec::new(), hosts: 0 });
        assert_eq!(changes(None, &before, &hosts[..1]).lines.len(), 4);
    }
}
