//! `gateway run`: the server. HTTPS only; what it answers is in `routes`, what it answers from is kept true here.
//!
//! ```text
//! watch: depot/ and fleet.toml, looked at twice a second ──> World, replaced whole ──> requests
//! save:  hosts.json, some time after something has changed, and at the end
//! ```
//!
//! Neither requests nor the watch wait for a disk to sync: `save` is a task of its own, and what the watch keeps is written by threads of
//! their own (`behind`).
//!
//! Every connection is bounded: in number, in the time for its handshake, for a request's head and body, and for taking what it asked for.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;

use super::behind::Behind;
use super::depot::Scanner;
use super::fleet_file::{FleetFile, Standing, lineage};
use super::hosts::Hosts;
use super::shared::Shared;
use super::{Place, hosts, now_millis, routes};
use crate::output::report;
use crate::{lock, platform, store};

/// Between two looks at the depot and at fleet.toml.
const LOOK: Duration = Duration::from_millis(500);
/// How long the start waits for fleet.toml to stand still.
const SETTLE: Duration = Duration::from_secs(5);
/// hosts.json is written at most so often, and the work of it never takes more than a twentieth of the time; nor does the disk sync it for
/// more than half of the time.
const SAVE: Duration = Duration::from_secs(2);
const SAVE_SHARE: u32 = 20;
/// More connections than this at once wait to be accepted.
const MAX_CONNECTIONS: usize = 60_000;
/// Open files that are left to everything else.
const RESERVED_FILES: u64 = 64;
/// For the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(15);
/// For a request's head, which also ends idle connections: hosts keep theirs from one heartbeat to the next.
const IDLE: Duration = Duration::from_secs(120);
/// For somebody who downloads and takes nothing any more.
const STALL: Duration = Duration::from_secs(120);
/// For requests under way when the gateway is stopped.
const DRAIN: Duration = Duration::from_secs(10);
/// For another gateway of the same directory that is ending.
const TAKE_OVER: Duration = Duration::from_secs(5);

/// What is served, and where.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Address and port to listen on; port 0 takes a
    /// free one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:8888", verbatim_doc_comment)]
    listen: SocketAddr,
}

/// How the running gateway stands; `status` reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct GatewayState {
    pub(super) pid: u32,
    pub(super) listening: Option<String>,
    /// Unix milliseconds.
    pub(super) started: u64,
    pub(super) fleet: Standing,
    /// How many packages are on offer.
    pub(super) packages: usize,
    /// Why files of the depot are not on offer.
    pub(super) problems: std::collections::BTreeMap<String, String>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let place = Place::initialized(&args.dir)?;
    let Some(_lock) = lock::take(&place.lock(), TAKE_OVER)? else {
        bail!("cannot run a second gateway from {}: one is running already", args.dir.display());
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let (stop, stopped) = watch::channel(false);
    ctrlc::set_handler(move || {
        let _ = stop.send(true);
    })
    .context("cannot listen for signals")?;
    runtime.block_on(async {
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}; --listen chooses another address or port", args.listen))?;
        serve(place, listener, LOOK, stopped, announce).await
    })
}

fn announce(address: SocketAddr) {
    report!("listening on https://{address}");
}

/// Serves until `stopped` says so. `ready` is told the address once requests are answered.
pub(super) async fn serve(
    place: Place,
    listener: TcpListener,
    look: Duration,
    stopped: watch::Receiver<bool>,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let acceptor = acceptor(&place)?;
    let address = listener.local_addr()?;
    let hosts = Hosts::new(lineage(&place)?, remembered(&place)?);
    let shared = Arc::new(Shared::new(hosts, routes::large_bodies()));
    let seen = shared.clone();
    let mut eyes = Eyes::open(place.clone(), &shared)?;
    eyes.state.listening = Some(format!("https://{address}"));
    let eyes = tokio::task::spawn_blocking(move || -> Result<Eyes> {
        eyes.look_first(&seen)?;
        Ok(eyes)
    })
    .await??;
    let watching = tokio::spawn(keep_watching(eyes, shared.clone(), look, stopped.clone()));
    let saving = tokio::spawn(keep_saving(place.hosts(), shared.clone(), stopped.clone()));

    ready(address);
    tracing::info!(%address, hosts = shared.hosts.count(), "the gateway serves");
    accept(listener, acceptor, shared.clone(), stopped).await;
    watching.await?;
    saving.await?;
    save(&place.hosts(), &shared).await;
    tracing::info!("the gateway ends");
    Ok(())
}

fn acceptor(place: &Place) -> Result<TlsAcceptor> {
    let (certificate, key) = (place.certificate(), place.certificate_key());
    let chain = CertificateDer::pem_file_iter(&certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot read the certificate {}", certificate.display()))?;
    let private =
        PrivateKeyDer::from_pem_file(&key).with_context(|| format!("cannot read the key {}", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .with_context(|| format!("cannot serve with the certificate {}", certificate.display()))?;
    // A fleet that comes back all at once resumes its sessions.
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn remembered(place: &Place) -> Result<Vec<hosts::Record>> {
    hosts::load(&place.hosts()).or_else(|error| {
        // It is memory, not truth: every host says it again with its next heartbeat.
        let reason = format!("{error:#}");
        tracing::error!(%reason, "what is remembered of the hosts cannot be read and is put aside");
        let damaged = place.hosts().with_extension("json.damaged");
        std::fs::rename(place.hosts(), &damaged)
            .with_context(|| format!("cannot put aside {}", place.hosts().display()))?;
        Ok(Vec::new())
    })
}

/// Among the problems, that the last good fleet is in force and not on disk.
const LAST_GOOD: &str = "the last good fleet file";

/// What watches the directory.
struct Eyes {
    scanner: Scanner,
    fleet: FleetFile,
    state: GatewayState,
    /// Tells `status` and the routes how things stand.
    told: Behind<GatewayState>,
}

impl Eyes {
    fn open(place: Place, shared: &Arc<Shared>) -> Result<Eyes> {
        let state = GatewayState { pid: std::process::id(), started: now_millis(), ..GatewayState::default() };
        let (path, routes) = (place.standing(), shared.clone());
        let told = Behind::start("how the gateway stands", move |state: &GatewayState| {
            // First for `status`, so that what the routes say is never newer than what an operator is shown.
            let written = store::save_unsynced(&path, state);
            routes.set_standing(state.fleet.clone());
            written
        })?;
        Ok(Eyes { scanner: Scanner::new(place.clone()), fleet: FleetFile::open(place)?, state, told })
    }

    /// The depot at once, then fleet.toml as soon as it stands still.
    fn look_first(&mut self, shared: &Shared) -> Result<()> {
        self.look(shared, true)?;
        let started = Instant::now();
        while !self.fleet.is_settled() && started.elapsed() < SETTLE {
            platform::pause(LOOK / 2);
            self.look(shared, false)?;
        }
        self.publish(shared);
        self.told.flush();
        Ok(())
    }

    fn look(&mut self, shared: &Shared, at_once: bool) -> Result<()> {
        let index = self.scanner.look(at_once)?;
        let depot_changed = index.is_some();
        let index = index.unwrap_or_else(|| shared.world().index.clone());
        let fleet_changed = self.fleet.look(&index, depot_changed, || shared.hosts.sample());
        if depot_changed {
            tracing::info!(packages = index.packages(), problems = index.problems().len(), "the depot has changed");
        }
        if depot_changed || fleet_changed {
            shared.replace_world(self.fleet.in_force(), index);
        }
        if depot_changed || fleet_changed || self.state.problems.get(LAST_GOOD) != self.fleet.unwritten().as_ref() {
            self.publish(shared);
        }
        Ok(())
    }

    /// Tells the routes and `status` how things stand.
    fn publish(&mut self, shared: &Shared) {
        let world = shared.world();
        self.state.fleet = self.fleet.standing().clone();
        self.state.packages = world.index.packages();
        self.state.problems = world.index.problems().clone();
        if let Some(why) = self.fleet.unwritten() {
            self.state.problems.insert(LAST_GOOD.to_owned(), why);
        }
        self.told.put(self.state.clone());
    }
}

async fn keep_watching(mut eyes: Eyes, shared: Arc<Shared>, look: Duration, mut stopped: watch::Receiver<bool>) {
    let mut failing = false;
    loop {
        tokio::select! {
            // Both may be dropped at any time: one is a timer, the other a look at a value.
            () = tokio::time::sleep(look) => {}
            _ = stopped.wait_for(|stopped| *stopped) => break,
        }
        let seen = shared.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let outcome = eyes.look(&seen, false);
            (eyes, outcome)
        });
        let Ok((back, outcome)) = looked.await else {
            tracing::error!("the watch over the depot and the fleet file has ended; what is in force stays so");
            return;
        };
        eyes = back;
        if let (Err(error), false) = (&outcome, failing) {
            let reason = format!("{error:#}");
            tracing::error!(%reason, "the depot cannot be looked at; what was on offer stays so");
        }
        failing = outcome.is_err();
    }
    // What is not on disk yet is waited for, and by nobody else.
    let _ = tokio::task::spawn_blocking(move || drop(eyes)).await;
}

async fn keep_saving(path: PathBuf, shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let mut pause = SAVE;
    loop {
        tokio::select! {
            // Both may be dropped at any time: what a lost notification spoke of is found by the save at the end.
            () = async { shared.touched.notified().await; tokio::time::sleep(pause).await } => {}
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
        let started = Instant::now();
        let work = save(&path, &shared).await;
        pause = SAVE.max(work * SAVE_SHARE).max(started.elapsed());
    }
}

/// Writes what is known of the hosts, where something is not written yet; what could not be is tried again. Gives the time that the work
/// took, without the disk's.
async fn save(path: &Path, shared: &Shared) -> Duration {
    let Some(records) = shared.hosts.changed() else { return Duration::ZERO };
    let (file, started) = (path.to_owned(), Instant::now());
    match tokio::task::spawn_blocking(move || hosts::save(&file, &records)).await {
        Ok(Ok(work)) => work,
        Ok(Err(error)) => {
            let reason = format!("{error:#}");
            tracing::error!(%reason, "what is known of the hosts cannot be written");
            shared.hosts.mark_changed();
            shared.touched.notify_one();
            // How much of it was work is not known.
            started.elapsed()
        }
        Err(_) => started.elapsed(),
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let files = platform::raise_open_files().unwrap_or(1024);
    let most =
        usize::try_from(files.saturating_sub(RESERVED_FILES).max(16) / 2).unwrap_or(usize::MAX).min(MAX_CONNECTIONS);
    let places = Arc::new(Semaphore::new(most));
    let router = routes::router(shared);
    loop {
        let accepted = tokio::select! {
            // A place that is taken and dropped is free again; `accept` loses no connection when dropped.
            accepted = async {
                let place = places.clone().acquire_owned().await;
                (listener.accept().await, place)
            } => accepted,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        match accepted {
            (Ok((stream, peer)), Ok(place)) => {
                let service = router.clone().layer(axum::Extension(routes::Peer(peer.ip().to_canonical())));
                let (acceptor, stopped) = (acceptor.clone(), stopped.clone());
                tokio::spawn(async move {
                    if let Err(error) = connection(stream, acceptor, service, stopped).await {
                        tracing::debug!(%peer, error = %format!("{error:#}"), "a connection has failed");
                    }
                    drop(place);
                });
            }
            (Err(error), _) => {
                // Out of open files, mostly: those that end make room.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            (_, Err(_)) => break,
        }
    }
    drop(listener);
    let everyone = u32::try_from(most).unwrap_or(u32::MAX);
    if tokio::time::timeout(DRAIN, places.acquire_many(everyone)).await.is_err() {
        tracing::warn!("some requests were cut off");
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    service: axum::Router,
    mut stopped: watch::Receiver<bool>,
) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(STALL));
    let stream = tokio::time::timeout(HANDSHAKE, acceptor.accept(Box::pin(stream)))
        .await
        .context("the handshake took too long")??;
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // The connection is pinned outside and goes on after the other arm.
        ended = connection.as_mut() => return Ok(ended?),
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
    connection.as_mut().graceful_shutdown();
    Ok(connection.await?)
}
