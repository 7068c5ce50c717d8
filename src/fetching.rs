//! How this host fetches packages: by its settings, the keys that it trusts and the epochs that it has committed.

use anyhow::Result;

use crate::config::Config;
use crate::core::model::AgentId;
use crate::endpoint::{Disconnector, Endpoint, Trust};
use crate::home::Home;
use crate::installation::{Epochs, keyring};
use crate::package::{self, FetchContext, FetchLimits, Keys, PackagePaths, PackageRequest, Progress, VerifiedTree};

/// What a package is fetched and verified by.
#[derive(Debug)]
pub struct Fetching<'a> {
    pub config: &'a Config,
    pub agent_id: &'a AgentId,
    /// How the gateway's certificate is checked.
    pub trust: Trust,
    /// Asked in this order.
    pub endpoints: Vec<Endpoint>,
    pub keys: Keys,
    pub epochs: Epochs,
    pub places: PackagePaths,
}

impl<'a> Fetching<'a> {
    /// As an installed home says it now.
    pub fn of(home: &Home, config: &'a Config, agent_id: &'a AgentId) -> Result<Fetching<'a>> {
        Ok(Fetching {
            config,
            agent_id,
            trust: config.trust(home),
            endpoints: config.heartbeat_srv.clone(),
            keys: keyring::trusted(home)?,
            epochs: Epochs::load(home)?,
            places: PackagePaths::of(home),
        })
    }

    /// Fetches a package, with a client of its own, since the download is ended with that. `begun` gets the means to end it from elsewhere.
    pub fn fetch(
        &self,
        wanted: PackageRequest,
        commons: &FetchLimits,
        begun: impl FnOnce(Disconnector),
        progress: &mut Progress<'_>,
    ) -> Result<VerifiedTree> {
        let least = self.epochs.least(wanted.release.name.as_str());
        let wanted = PackageRequest { least_epoch: wanted.least_epoch.max(least), ..wanted };
        commons.limit(self.config.download_rate.map(|rate| rate.0));
        let client = self.config.client(&self.trust, self.agent_id, self.config.download_timeouts())?;
        begun(client.end());
        let means = FetchContext {
            client: &client,
            endpoints: &self.endpoints,
            keys: &self.keys,
            places: &self.places,
            commons,
            within: self.config.download_timeout.0,
        };
        package::fetch(&means, &wanted, progress)
    }
}
