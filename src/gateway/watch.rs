//! What watches a gateway's directory, and what it tells about it: each part by itself, so that one that cannot be read stops no other.

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

/// How often is looked, and for how long a file that people write must stand still.
#[derive(Debug, Clone, Copy)]
pub(super) struct WatchIntervals {
    pub(super) look: Duration,
    pub(super) still: Duration,
}

impl WatchIntervals {
    /// Of a gateway in production.
    pub(super) const USUAL: WatchIntervals = WatchIntervals { look: Duration::from_millis(500), still: STILL };
}

/// How long the start waits for fleet.toml to stand still.
const SETTLE: Duration = Duration::from_secs(5);

/// What watches the directory.
pub(super) struct DirectoryWatcher {
    place: GatewayDirectory,
    pace: WatchIntervals,
    scanner: Scanner,
    fleet: FleetFile,
    certificates: Certificates,
    state: GatewayState,
    /// Tells `status` and the routes how things stand.
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
        let told = WriteBehind::start("how the gateway stands", move |state: &GatewayState| {
            // First for `status`, so that what the routes say is never newer than what an operator is shown.
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

    /// What handshakes are answered with.
    pub(super) fn served(&self) -> Arc<ServedCertificate> {
        self.certificates.served()
    }

    /// The depot at once, then fleet.toml as soon as it stands still.
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

    /// Looks once. `at_once`: the depot counts as it is; `reload`: everything does.
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
        // What was in force before the start is so from the first look on, whatever that has found.
        if world.revision == 0 || depot_changed || fleet_changed || pins != world.pins {
            shared.replace_world(self.fleet.in_force(), index, pins);
        }
        self.tell(shared, depot_changed || fleet_changed);
    }

    /// Tells the routes and `status` how things stand, where that is news.
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
        let refused = self.fleet.standing().error.iter().map(|error| format!("fleet.toml is refused: {error}"));
        let files = world.index.problems().iter().map(|(file, why)| format!("{file} is not offered: {why}"));
        let state = self.fleet.unwritten().into_iter().chain(shared.troubles());
        let state = state.chain(self.told.failure().map(|why| format!("how the gateway stands is not on disk: {why}")));
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

/// Who else could read the signing key.
pub(super) fn exposed_keys(place: &GatewayDirectory) -> Vec<String> {
    exposed(&place.keys(), &[&place.signing_key()])
}

/// Who else could read the certificate's key, and the one that comes next.
pub(super) fn exposed_tls(place: &GatewayDirectory) -> Vec<String> {
    exposed(&place.tls(), &[&place.certificate_key(), &place.next_certificate()])
}

/// Files of the depot and the fleet file have log lines of their own.
fn log_changes(before: &GatewayParts, after: &GatewayParts) {
    for ((name, before), (_, after)) in before.each().into_iter().zip(after.each()) {
        if matches!(name, "keys" | "certificate" | "state") {
            for problem in after.problems.iter().filter(|problem| !before.problems.contains(problem)) {
                tracing::warn!(part = name, %problem, "a part of the gateway has a problem");
            }
        }
        if after.ok && !before.ok {
            tracing::info!(part = name, "a part of the gateway has no problem any more");
        }
    }
}

/// Looks again and again, and when `reload` says so.
pub(super) async fn keep_watching(
    mut eyes: DirectoryWatcher,
    shared: Arc<RequestContext>,
    reload: Arc<Notify>,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        let reload = tokio::select! {
            // Each may be dropped at any time: a timer, a notification that is kept until it is taken, a look at a value.
            () = tokio::time::sleep(eyes.pace.look) => false,
            () = reload.notified() => true,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        if reload {
            tracing::info!("the gateway reads its files again");
        }
        let seen = shared.clone();
        let looked = tokio::task::spawn_blocking(move || {
            eyes.look(&seen, false, reload);
            eyes
        });
        let Ok(back) = looked.await else {
            tracing::error!("the watch over the gateway's directory has ended; what is in force stays so");
            shared.trouble(
                "watch",
                Some(
                    "changes are not noticed any more: the watch over the directory has ended; restart the gateway"
                        .to_owned(),
                ),
            );
            return;
        };
        eyes = back;
    }
    // What is not on disk yet is waited for, and by nobody else.
    let _ = tokio::task::spawn_blocking(move || drop(eyes)).await;
}
