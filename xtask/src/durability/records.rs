//! What the home's state files say, as far as the order of writes depends on it.

use std::collections::BTreeMap;

use serde_json::Value;

/// A state file's content on the disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Record(Value);

/// The releases of one sub-agent in the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Releases {
    pub(super) active: Option<String>,
    pub(super) probation: Option<String>,
    /// Each release that the ledger names, with its epoch.
    pub(super) named: BTreeMap<String, u64>,
}

impl Releases {
    /// The release that runs or would run.
    pub(super) fn current(&self) -> Option<&str> {
        self.probation.as_deref().or(self.active.as_deref())
    }
}

impl Record {
    pub(super) fn parse(text: &str) -> Record {
        Record(serde_json::from_str(text).unwrap_or_default())
    }

    /// `releases.json`: by sub-agent.
    pub(super) fn ledger(&self) -> BTreeMap<String, Releases> {
        let agents = self.0["agents"].as_object().into_iter().flatten();
        let read = |entry: &Value| {
            let version = |field: &str| entry[field]["version"].as_str().map(str::to_owned);
            let fields = ["active", "backup", "probation", "staged"];
            let named = fields
                .iter()
                .filter_map(|field| Some((version(field)?, entry[*field]["epoch"].as_u64().unwrap_or_default())));
            Releases { active: version("active"), probation: version("probation"), named: named.collect() }
        };
        agents.map(|(name, entry)| (name.clone(), read(entry))).collect()
    }

    /// `upgrade.json`: the phase of the upgrade that is under way.
    pub(super) fn phase(&self) -> Option<&str> {
        self.0["trial"]["phase"].as_str()
    }

    /// `desired.json`: the ordered versions of the sub-agents.
    pub(super) fn desired(&self) -> BTreeMap<&str, &str> {
        let agents = self.0["agents"].as_object().into_iter().flatten();
        agents.map(|(name, order)| (name.as_str(), order["version"].as_str().unwrap_or_default())).collect()
    }

    /// `desired.json`: whether a sub-agent is to be stopped, or is not there.
    pub(super) fn stops(&self, agent: &str) -> bool {
        let order = &self.0["agents"][agent];
        order.is_null() || order["run"].as_str().or(order["cmd"].as_str()).is_some_and(|run| run == "stop")
    }

    /// `epochs.json`.
    pub(super) fn epochs(&self) -> BTreeMap<String, u64> {
        let epochs = self.0["epochs"].as_object().into_iter().flatten();
        epochs.map(|(name, epoch)| (name.clone(), epoch.as_u64().unwrap_or_default())).collect()
    }
}
