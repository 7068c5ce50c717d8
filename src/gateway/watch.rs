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
use super::settle::SETTLE_TIME;
use super::shared::RequestContext;
use super::state::GatewayState;
use super::write_behind::WriteBehind;
use super::{GatewayDirectory, now_millis};
use crate::{platform, store};

/// The poll interval, and how long an edited file must not have changed before it is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct WatchIntervals {
    pub(super) poll: Duration,
    pub(super) settle: Duration,
}

impl WatchIntervals {
    /// The intervals in production.
    pub(super) const PRODUCTION: WatchIntervals =
        WatchIntervals { poll: Duration::from_millis(500), settle: SETTLE_TIME };
}

/// The timeout of the start for fleet.toml to settle.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// Watches the directory.
pub(super) struct DirectoryWatcher {
    directory: GatewayDirectory,
    intervals: WatchIntervals,
    scanner: Scanner,
    fleet: FleetFile,
    certificates: Certificates,
    state: GatewayState,
    /// Publishes the state for `gateway status` and the routes.
    writer: WriteBehind<GatewayState>,
}

impl DirectoryWatcher {
    pub(super) fn open(
        directory: GatewayDirectory,
        intervals: WatchIntervals,
        shared: &Arc<RequestContext>,
        listening: String,
    ) -> Result<DirectoryWatcher> {
        let state = GatewayState {
            pid: std::process::id(),
            started: now_millis(),
            listening: Some(listening),
            ..GatewayState::default()
        };
        let (path, context) = (directory.state_file(), shared.clone());
        let writer = WriteBehind::start("the gateway's state", move |state: &GatewayState| {
            // The file first, so that the routes never return a newer state than `gateway status` shows.
            let written = store::save_unsynced(&path, state);
            context.set_state(state.clone());
            written
        })?;
        Ok(DirectoryWatcher {
            scanner: Scanner::new(directory.clone()),
            fleet: FleetFile::open(directory.clone(), intervals.settle)?,
            certificates: Certificates::open(directory.clone(), intervals.settle),
            directory,
            intervals,
            state,
            writer,
        })
    }

    /// The certificate for TLS handshakes.
    pub(super) fn served(&self) -> Arc<ServedCertificate> {
        self.certificates.served()
    }

    /// The poll at the start: loads the depot at once, and waits for fleet.toml to settle.
    pub(super) fn first_poll(&mut self, shared: &RequestContext) {
        self.poll(shared, true, false);
        let started = Instant::now();
        while !self.fleet.is_settled() && started.elapsed() < START_TIMEOUT {
            platform::pause(self.intervals.poll / 2);
            self.poll(shared, false, false);
        }
        self.writer.put(self.state.clone());
        self.writer.flush();
    }

    /// Polls all files once. `at_once` does not wait for the depot to settle, `reload` for no file.
    fn poll(&mut self, shared: &RequestContext, at_once: bool, reload: bool) {
        self.certificates.poll(reload);
        let index = self.scanner.scan(at_once || reload);
        let depot_changed = index.is_some();
        let index = index.unwrap_or_else(|| shared.snapshot().index.clone());
        let fleet_changed = self.fleet.poll(&index, depot_changed, reload, || shared.hosts.sample());
        if depot_changed {
            tracing::info!(packages = index.packages(), problems = index.problems().len(), "the depot has changed");
        }
        let (pins, snapshot) = (self.certificates.status().pins(), shared.snapshot());
        // The first poll puts the last good fleet into effect, whatever the present files are.
        if snapshot.revision == 0 || depot_changed || fleet_changed || pins != snapshot.pins {
            shared.replace_snapshot(self.fleet.in_force(), index, pins);
        }
        self.publish_state(shared, depot_changed || fleet_changed);
    }

    /// Publishes the state if it has changed.
    fn publish_state(&mut self, shared: &RequestContext, changed: bool) {
        let parts = self.parts(shared);
        let certificate = self.certificates.status();
        if !changed && parts == self.state.parts && *certificate == self.state.certificate {
            return;
        }
        log_changes(&self.state.parts, &parts);
        let snapshot = shared.snapshot();
        self.state.certificate = certificate.clone();
        self.state.fleet = self.fleet.status().clone();
        self.state.packages = snapshot.index.packages();
        self.state.problems = snapshot.index.problems().clone();
        self.state.parts = parts;
        self.writer.put(self.state.clone());
    }

    fn parts(&self, shared: &RequestContext) -> GatewayParts {
        let snapshot = shared.snapshot();
        let rejected = self.fleet.status().error.iter().map(|error| format!("fleet.toml is rejected: {error}"));
        let files = snapshot.index.problems().iter().map(|(file, why)| format!("{file} is not offered: {why}"));
        let state = self.fleet.save_problem().into_iter().chain(shared.problems());
        let state = state.chain(
            self.writer.failure().map(|why| format!("cannot save the state for `gateway status`: {why}; retrying")),
        );
        GatewayParts {
            keys: PartStatus::with(self.scanner.key_problems().cloned().chain(exposed_keys(&self.directory))),
            depot: PartStatus::with(self.scanner.unreadable().map(str::to_owned).into_iter().chain(files)),
            fleet: PartStatus::with(rejected.chain(self.fleet.exposure())),
            certificate: PartStatus::with(
                self.certificates
                    .problems()
                    .cloned()
                    .chain(self.certificates.status().warning(now_millis() / 1_000))
                    .chain(exposed_tls(&self.directory)),
            ),
            state: PartStatus::with(state),
        }
    }
}

/// Problems with the permissions of the signing key.
pub(super) fn exposed_keys(directory: &GatewayDirectory) -> Vec<String> {
    exposed(&directory.keys(), &[&directory.signing_key()])
}

/// Problems with the permissions of the certificate's key and of the next key.
pub(super) fn exposed_tls(directory: &GatewayDirectory) -> Vec<String> {
    exposed(&directory.tls(), &[&directory.certificate_key(), &directory.next_certificate()])
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
    mut watcher: DirectoryWatcher,
    shared: Arc<RequestContext>,
    reload: Arc<Notify>,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        let reload = tokio::select! {
            // All are cancel-safe: a timer, a notification that is stored until it is received, and a check of a value.
            () = tokio::time::sleep(watcher.intervals.poll) => false,
            () = reload.notified() => true,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        if reload {
            tracing::info!("reloading all files");
        }
        let context = shared.clone();
        let polled = tokio::task::spawn_blocking(move || {
            watcher.poll(&context, false, reload);
            watcher
        });
        let Ok(returned) = polled.await else {
            tracing::error!(
                "cannot watch the gateway's directory any more, so changes of files are not loaded; restart the gateway"
            );
            shared.set_problem(
                "watch",
                Some(
                    "cannot watch the gateway's directory any more, so changes of files are not loaded; restart the gateway"
                        .to_owned(),
                ),
            );
            return;
        };
        watcher = returned;
    }
    // Dropping waits for pending writes, so not on the runtime's thread.
    let _ = tokio::task::spawn_blocking(move || drop(watcher)).await;
}
