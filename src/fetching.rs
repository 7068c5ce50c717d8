//! Fetches packages with this host's settings, trusted keys and committed epochs.

use anyhow::Result;

use crate::config::Config;
use crate::core::model::AgentId;
use crate::endpoint::{Disconnector, Endpoint, Trust};
use crate::home::Home;
use crate::installation::{Epochs, keyring};
use crate::package::{self, FetchContext, FetchLimits, Keys, PackagePaths, PackageRequest, Progress, VerifiedTree};

/// The settings, keys and epochs that packages are fetched and verified with.
#[derive(Debug)]
pub struct Fetching<'a> {
    pub config: &'a Config,
    pub agent_id: &'a AgentId,
    /// How the gateway's certificate is verified.
    pub trust: Trust,
    /// Tried in this order.
    pub endpoints: Vec<Endpoint>,
    pub keys: Keys,
    pub epochs: Epochs,
    pub paths: PackagePaths,
}

impl<'a> Fetching<'a> {
    /// The current state of an installed home.
    pub fn of(home: &Home, config: &'a Config, agent_id: &'a AgentId) -> Result<Fetching<'a>> {
        Ok(Fetching {
            config,
            agent_id,
            trust: config.trust(home),
            endpoints: config.heartbeat_srv.clone(),
            keys: keyring::trusted(home)?,
            epochs: Epochs::load(home)?,
            paths: PackagePaths::of(home),
        })
    }

    /// Fetches a package with a client of its own, so that the download can be aborted alone. `on_start` receives the handle that aborts it.
    pub fn fetch(
        &self,
        request: PackageRequest,
        limits: &FetchLimits,
        on_start: impl FnOnce(Disconnector),
        progress: &mut Progress<'_>,
    ) -> Result<VerifiedTree> {
        let min_epoch = self.epochs.least(request.release.name.as_str());
        let request = PackageRequest { min_epoch: request.min_epoch.max(min_epoch), ..request };
        limits.limit(self.config.download_rate.map(|rate| rate.0));
        let client = self.config.client(&self.trust, self.agent_id, self.config.download_timeouts())?;
        on_start(client.disconnector());
        let context = FetchContext {
            client: &client,
            endpoints: &self.endpoints,
            keys: &self.keys,
            paths: &self.paths,
            limits,
            timeout: self.config.download_timeout.0,
        };
        package::fetch(&context, &request, progress)
    }
}
