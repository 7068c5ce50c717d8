//! `gateway run`: the server. HTTPS only; what it answers is in `routes`, what it answers from is kept true here.
//!
//! ```text
//! watch: keys/, depot/, fleet.toml and tls/, looked at twice a second ──> World, replaced whole ──> requests
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
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;

use super::certificate::ServedCertificate;
use super::fleet_file::lineage;
use super::hosts::Hosts;
use super::shared::RequestContext;
use super::watch::{DirectoryWatcher, WatchIntervals, keep_watching};
use super::{GatewayDirectory, hosts, routes};
use crate::lock;
use crate::output::report;
use crate::platform::{self, Reload, Termination};

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
pub struct RunArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Address and port to listen on; port 0 takes a
    /// free one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:8888", verbatim_doc_comment)]
    listen: SocketAddr,
}

pub(super) fn run(args: &RunArgs) -> Result<()> {
    let place = GatewayDirectory::initialized(&args.dir)?;
    let Some(_lock) = lock::take(&place.lock(), TAKE_OVER)? else {
        bail!("cannot run a second gateway from {}: one is running already", args.dir.display());
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let (stopped, reload) = signals().context("cannot listen for signals")?;
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}; --listen chooses another address or port", args.listen))?;
        serve(place, listener, WatchIntervals::USUAL, stopped, reload, announce).await
    })
}

/// What asks the gateway to end, and what asks it to read its files again (SIGHUP, where there are signals).
fn signals() -> std::io::Result<(watch::Receiver<bool>, Arc<Notify>)> {
    let (stop, stopped) = watch::channel(false);
    let (mut termination, mut hangup) = (Termination::new()?, Reload::new()?);
    let reload = Arc::new(Notify::new());
    let asked = reload.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                // Both are cancel-safe, as they say.
                () = termination.recv() => break,
                () = hangup.recv() => asked.notify_one(),
            }
        }
        // The receiver is gone only when the gateway has ended already.
        let _ = stop.send(true);
    });
    Ok((stopped, reload))
}

fn announce(address: SocketAddr) {
    report!("listening on https://{address}");
}

/// Serves until `stopped` says so, and reads its files again at once when `reload` does. `ready` is told the address once requests are
/// answered.
pub(super) async fn serve(
    place: GatewayDirectory,
    listener: TcpListener,
    pace: WatchIntervals,
    stopped: watch::Receiver<bool>,
    reload: Arc<Notify>,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let address = listener.local_addr()?;
    let (lineage, no_lineage) = lineage(&place);
    let (records, no_records) = remembered(&place);
    let shared = Arc::new(RequestContext::new(Hosts::new(lineage, records), routes::large_bodies()));
    shared.trouble("lineage", no_lineage);
    shared.trouble("memory", no_records);
    let eyes = DirectoryWatcher::open(place.clone(), pace, &shared, format!("https://{address}"))?;
    let doors = ConnectionContext {
        acceptor: acceptor(eyes.served())?,
        renewed: eyes.served().changes(),
        stopped: stopped.clone(),
    };
    let (mut first, seen) = (eyes, shared.clone());
    let eyes = tokio::task::spawn_blocking(move || {
        first.look_first(&seen);
        first
    })
    .await?;
    let watching = tokio::spawn(keep_watching(eyes, shared.clone(), reload, stopped.clone()));
    let saving = tokio::spawn(keep_saving(place.hosts(), shared.clone(), stopped));

    ready(address);
    tracing::info!(%address, hosts = shared.hosts.count(), "the gateway serves");
    accept(listener, doors, shared.clone()).await;
    watching.await?;
    saving.await?;
    save(&place.hosts(), &shared).await;
    tracing::info!("the gateway ends");
    Ok(())
}

fn acceptor(served: Arc<ServedCertificate>) -> Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(served);
    // A fleet that comes back all at once resumes its sessions.
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// What every connection is made with, and what ends it.
#[derive(Clone)]
struct ConnectionContext {
    acceptor: TlsAcceptor,
    /// Another certificate is served: hosts are to see it.
    renewed: watch::Receiver<u64>,
    stopped: watch::Receiver<bool>,
}

/// What was known of the hosts, and why it is not known any more.
fn remembered(place: &GatewayDirectory) -> (Vec<hosts::Record>, Option<String>) {
    match hosts::load(&place.hosts()) {
        Ok(records) => (records, None),
        Err(error) => {
            // It is memory, not truth: every host says it again with its next heartbeat.
            let damaged = place.hosts().with_extension("json.damaged");
            let kept = match std::fs::rename(place.hosts(), &damaged) {
                Ok(()) => format!("it is kept as {}", damaged.display()),
                Err(error) => format!("it could not be put aside: {error}"),
            };
            (Vec::new(), Some(format!("hosts are remembered from this start on alone ({kept}): {error:#}")))
        }
    }
}

async fn keep_saving(path: PathBuf, shared: Arc<RequestContext>, mut stopped: watch::Receiver<bool>) {
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
async fn save(path: &Path, shared: &RequestContext) -> Duration {
    let Some(records) = shared.hosts.changed() else { return Duration::ZERO };
    let (file, started) = (path.to_owned(), Instant::now());
    match tokio::task::spawn_blocking(move || hosts::save(&file, &records)).await {
        Ok(Ok(work)) => {
            shared.trouble("hosts", None);
            work
        }
        Ok(Err(error)) => {
            shared.trouble("hosts", Some(format!("what is known of the hosts is not on disk: {error:#}")));
            shared.hosts.mark_changed();
            shared.touched.notify_one();
            // How much of it was work is not known.
            started.elapsed()
        }
        Err(_) => started.elapsed(),
    }
}

async fn accept(listener: TcpListener, mut doors: ConnectionContext, shared: Arc<RequestContext>) {
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
            _ = doors.stopped.wait_for(|stopped| *stopped) => break,
        };
        match accepted {
            (Ok((stream, peer)), Ok(place)) => {
                let service = router.clone().layer(axum::Extension(routes::ClientAddress(peer.ip().to_canonical())));
                let doors = doors.clone();
                tokio::spawn(async move {
                    if let Err(error) = connection(stream, doors, service).await {
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

async fn connection(stream: TcpStream, mut doors: ConnectionContext, service: axum::Router) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(STALL));
    // From before the handshake: the certificate may change meanwhile.
    doors.renewed.mark_unchanged();
    let stream = tokio::time::timeout(HANDSHAKE, doors.acceptor.accept(Box::pin(stream)))
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
        _ = doors.stopped.wait_for(|stopped| *stopped) => {}
        // Only a look at a value, too.
        _ = doors.renewed.changed() => {}
    }
    connection.as_mut().graceful_shutdown();
    Ok(connection.await?)
}
