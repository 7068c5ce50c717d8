//! Watches the gateway's directory and publishes its state. Parts are independent: a part that cannot be read does not affect the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::{Notify, watch};

use super::certificate::{Certificates, ServedCertificate};
use super::depot::Scanner;
use super::fleet_file::FleetFile;
use super::keyring::exposed;
use super::parts::{GatewayParts, PartStatus};
use super::settle::STILL;
use super::shared::RequestContext;
use super::state::GatewayState;
use super::write_behind::WriteBehind;
use super::{GatewayDirectory, now_millis};
use crate::{platform, store};

/// The poll interval, and how long an edited file must not have changed before it is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct WatchIntervals {
    pub(super) look: Duration,
    pub(super) still: Duration,
}

impl WatchIntervals {
    /// The intervals in production.
    pub(super) const USUAL: WatchIntervals = WatchIntervals { look: Duration::from_millis(500), still: STILL };
}

/// The timeout of the start for fleet.toml to settle.
const SETTLE: Duration = Duration::from_secs(5);

/// Watches the directory.
pub(super) struct DirectoryWatcher {
    place: GatewayDirectory,
    pace: WatchIntervals,
    scanner: Scanner,
    fleet: FleetFile,
    certificates: Certificates,
    state: GatewayState,
    /// Publishes the state for `gateway status` and the routes.
    told: WriteBehind<GatewayState>,
}

impl DirectoryWatcher {
    pub(super) fn open(
        place: GatewayDirectory,
        pace: WatchIntervals,
        shared: &Arc<RequestContext>,
        listening: String,
    ) -> Result<DirectoryWatcher> {
        let state = GatewayState {
            pid: std::process::id(),
            started: now_millis(),
            listening: Some(listening),
            ..GatewayState::default()
        };
        let (path, routes) = (place.standing(), shared.clone());
        let told = WriteBehind::start("the gateway's state", move |state: &GatewayState| {
            // The file first, so that the routes never return a newer state than `gateway status` shows.
            let written = store::save_unsynced(&path, state);
            routes.set_standing(state.clone());
            written
        })?;
        Ok(DirectoryWatcher {
            scanner: Scanner::new(place.clone()),
            fleet: FleetFile::open(place.clone(), pace.still)?,
            certificates: Certificates::open(place.clone(), pace.still),
            place,
            pace,
            state,
            told,
        })
    }

    /// The certificate for TLS handshakes.
    pub(super) fn served(&self) -> Arc<ServedCertificate> {
        self.certificates.served()
    }

    /// The poll at the start: loads the depot at once, and waits for fleet.toml to settle.
    pub(super) fn look_first(&mut self, shared: &RequestContext) {
        self.look(shared, true, false);
        let started = Instant::now();
        while !self.fleet.is_settled() && started.elapsed() < SETTLE {
            platform::pause(self.pace.look / 2);
            self.look(shared, false, false);
        }
        self.told.put(self.state.clone());
        self.told.flush();
    }

    /// Polls all files once. `at_once` does not wait for the depot to settle, `reload` for no file.
    fn look(&mut self, shared: &RequestContext, at_once: bool, reload: bool) {
        self.certificates.look(reload);
        let index = self.scanner.look(at_once || reload);
        let depot_changed = index.is_some();
        let index = index.unwrap_or_else(|| shared.world().index.clone());
        let fleet_changed = self.fleet.look(&index, depot_changed, reload, || shared.hosts.sample());
        if depot_changed {
            tracing::info!(packages = index.packages(), problems = index.problems().len(), "the depot has changed");
        }
        let (pins, world) = (self.certificates.standing().pins(), shared.world());
        // The first poll puts the last good fleet in force, whatever the present files are.
        if world.revision == 0 || depot_changed || fleet_changed || pins != world.pins {
            shared.replace_world(self.fleet.in_force(), index, pins);
        }
        self.tell(shared, depot_changed || fleet_changed);
    }

    /// Publishes the state if it has changed.
    fn tell(&mut self, shared: &RequestContext, changed: bool) {
        let parts = self.parts(shared);
        let certificate = self.certificates.standing();
        if !changed && parts == self.state.parts && *certificate == self.state.certificate {
            return;
        }
        log_changes(&self.state.parts, &parts);
        let world = shared.world();
        self.state.certificate = certificate.clone();
        self.state.fleet = self.fleet.standing().clone();
        self.state.packages = world.index.packages();
        self.state.problems = world.index.problems().clone();
        self.state.parts = parts;
        self.told.put(self.state.clone());
    }

    fn parts(&self, shared: &RequestContext) -> GatewayParts {
        let world = shared.world();
        let refused = self.fleet.standing().error.iter().map(|error| format!("fleet.toml is rejected: {error}"));
        let files = world.index.problems().iter().map(|(file, why)| format!("{file} is not offered: {why}"));
        let state = self.fleet.unwritten().into_iter().chain(shared.troubles());
        let state = state.chain(
            self.told.failure().map(|why| format!("cannot save the state for `gateway status`: {why}; retrying")),
        );
        GatewayParts {
            keys: PartStatus::with(self.scanner.problems_of_keys().cloned().chain(exposed_keys(&self.place))),
            depot: PartStatus::with(self.scanner.unreadable().map(str::to_owned).into_iter().chain(files)),
            fleet: PartStatus::with(refused.chain(self.fleet.exposed())),
            certificate: PartStatus::with(
                self.certificates
                    .problems()
                    .cloned()
                    .chain(self.certificates.standing().warning(now_millis() / 1_000))
                    .chain(exposed_tls(&self.place)),
            ),
            state: PartStatus::with(state),
        }
    }
}

/// Problems with the permissions of the signing key.
pub(super) fn exposed_keys(place: &GatewayDirectory) -> Vec<String> {
    exposed(&place.keys(), &[&place.signing_key()])
}

/// Problems with the permissions of the certificate's key and of the next key.
pub(super) fn exposed_tls(place: &GatewayDirectory) -> Vec<String> {
    exposed(&place.tls(), &[&place.certificate_key(), &place.next_certificate()])
}

/// Logs problems that are new or resolved. New ones of the depot and the fleet file are logged elsewhere.
fn log_changes(before: &GatewayParts, after: &GatewayParts) {
    for ((name, before), (_, after)) in before.each().into_iter().zip(after.each()) {
        if matches!(name, "keys" | "certificate" | "state") {
            for problem in after.problems.iter().filter(|problem| !before.problems.contains(problem)) {
                tracing::warn!(part = name, %problem, "a part of the gateway has a problem");
            }
        }
        if after.ok && !before.ok {
            tracing::info!(part = name, "the problems of a part of the gateway are resolved");
        }
    }
}

/// Polls at the interval, and reloads all files when `reload` is notified, until `stopped`.
pub(super) async fn keep_watching(
    mut eyes: DirectoryWatcher,
    shared: Arc<RequestContext>,
    reload: Arc<Notify>,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        let reload = tokio::select! {
            // All are cancel-safe: a timer, a notification that is stored until it is received, and a check of a value.
            () = tokio::time::sleep(eyes.pace.look) => false,
            () = reload.notified() => true,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        if reload {
            tracing::info!("reloading all files");
        }
        let seen = shared.clone();
        let looked = tokio::task::spawn_blocking(move || {
            eyes.look(&seen, false, reload);
            eyes
        });
        let Ok(back) = looked.await else {
            tracing::error!("the watch of the gateway's directory has failed; its files are not reloaded any more");
            shared.trouble(
                "watch",
                Some(
                    "the watch of the gateway's directory has failed, so changes of files are not loaded; restart the gateway"
                        .to_owned(),
                ),
            );
            return;
        };
        eyes = back;
    }
    // Dropping waits for pending writes, so not on the runtime's thread.
    let _ = tokio::task::spawn_blocking(move || drop(eyes)).await;
}
