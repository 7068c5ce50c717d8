//! Staging a release beside what runs: fetched, verified, unpacked, looked at; then it may be activated.

use std::sync::Arc;

use anyhow::{Result, bail};
use tokio::sync::Semaphore;

use super::Input;
use super::run::Inputs;
use crate::config::Config;
use crate::core::desired::Order;
use crate::core::model::{AgentId, AgentName, Release};
use crate::endpoint::{Astray, Client, Distrust, Timeouts};
use crate::home::Home;
use crate::installation::guard::{self, Unsound};
use crate::installation::{Epochs, keyring};
use crate::package::{self, Places, Refused, Wanted};
use crate::platform;
use crate::process::launch;

/// So many are fetched at the same time.
pub(super) const AT_ONCE: usize = 3;

/// All that staging one release needs to know.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub home: Home,
    pub config: Config,
    pub agent_id: AgentId,
    pub name: AgentName,
    pub order: Order,
}

/// Why a release could not be staged or activated.
#[derive(Debug)]
pub(super) struct NotStaged {
    pub why: String,
    /// It was looked at and refused, as opposed to not to be had.
    pub refused: bool,
}

impl NotStaged {
    pub(super) fn of(error: &anyhow::Error) -> NotStaged {
        let refused = error.is::<Refused>() || error.is::<Unsound>() || error.is::<Distrust>() || error.is::<Astray>();
        NotStaged { why: format!("{error:#}"), refused }
    }

    /// As an event has it.
    pub(super) fn outcome(&self) -> &'static str {
        if self.refused { "refused" } else { "failed" }
    }
}

/// Stages a release and reports with [`Input::Staged`].
pub(super) fn start(inputs: &Inputs, turns: &Arc<Semaphore>, job: Job) {
    let (inputs, turns) = (inputs.clone(), turns.clone());
    tokio::spawn(async move {
        let _turn = turns.acquire_owned().await;
        let (name, version) = (job.name.clone(), job.order.version.clone());
        let result = match tokio::task::spawn_blocking(move || stage(&job)).await {
            Ok(result) => result.map_err(|error| NotStaged::of(&error)),
            Err(error) => Err(NotStaged { why: format!("cannot stage it: {error}"), refused: false }),
        };
        let _ = inputs.send(Input::Staged { name, version, result });
    });
}

fn stage(job: &Job) -> Result<()> {
    let Job { home, config, agent_id, name, order } = job;
    guard::agent(home, name)?;
    let wanted = Wanted {
        release: Release { name: name.clone(), version: order.version.clone(), os: platform::OS, arch: platform::ARCH },
        tarball: order.tarball.clone(),
        file: order.file.clone(),
        sha256: order.sha256.clone(),
        size: order.size,
        least_epoch: Epochs::load(home)?.least(name.as_str()),
    };
    let keys = keyring::trusted(home)?;
    let client = Client::new(&config.trust(home), Some(agent_id), Timeouts::download(config.download_timeout.0))?;
    let places = Places { cache: home.cache(), staging: home.staging() };
    let tree = package::fetch(&client, &config.heartbeat_srv, &wanted, &keys, &places, &mut |_, _| {})?;
    let release = home.release(name, &order.version);
    tree.move_to(&release)?;
    // A release that cannot be run is not kept as one that could.
    launch::inspect(home, name, &order.version).inspect_err(|_| {
        let _ = package::discard(&release);
    })?;
    Ok(())
}

/// Commits the epoch of a release that is being activated: no older one is accepted from then on.
pub(super) fn commit_epoch(home: &Home, name: &AgentName, release: &std::path::Path) -> Result<()> {
    guard::agent(home, name)?;
    let Some(completed) = package::completed(release)? else { bail!("{} is not whole", release.display()) };
    let mut epochs = Epochs::load(home)?;
    if epochs.commit(name.as_str(), completed.epoch) {
        epochs.save(home)?;
    }
    Ok(())
}
