//! `gateway run`: the HTTPS server. `routes` answers requests; this module accepts connections and starts the background tasks.
//!
//! ```text
//! watch: polls keys/, depot/, fleet.toml and tls/ twice a second ──> Snapshot, replaced as a whole ──> requests
//! save:  writes hosts.json some time after a change, and at the end
//! ```
//!
//! Requests and the watch never wait for a disk sync: `save` is a separate task, and the watch writes its files in background threads
//! (`write_behind`).
//!
//! The number of connections is limited, and there are timeouts for the handshake, for the head and body of a request, and for a client
//! that stops reading the response.

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

/// The minimum interval between two writes of hosts.json.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);
/// The interval grows so that serializing takes at most one part in this many, and the disk at most half of the time.
const MAX_SAVE_SHARE: u32 = 20;
/// Connections served at once; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 60_000;
/// Open files reserved for everything besides connections.
const RESERVED_FILES: u64 = 64;
/// The timeout of a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// The timeout for the head of a request, and so of idle connections. Hosts keep connections alive from one heartbeat to the next.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// The timeout for a client that stops reading a response.
const WRITE_TIMEOUT: Duration = Duration::from_secs(120);
/// The timeout for requests under way when the gateway stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// The timeout for a stopping gateway of the same directory to release the lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The arguments of `gateway run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Address and port to listen on; port 0 selects a
    /// free one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:8888", verbatim_doc_comment)]
    listen: SocketAddr,
}

pub(super) fn run(args: &RunArgs) -> Result<()> {
    let directory = GatewayDirectory::initialized(&args.dir)?;
    let Some(_lock) = lock::take(&directory.lock(), LOCK_TIMEOUT)? else {
        bail!("cannot run a second gateway in {}: another gateway is already running", args.dir.display());
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let (stopped, reload) = signals().context("cannot listen for signals")?;
        let listener = TcpListener::bind(args.listen).await.with_context(|| {
            format!("cannot listen on {}; choose another address or port with --listen", args.listen)
        })?;
        serve(directory, listener, WatchIntervals::PRODUCTION, stopped, reload, announce).await
    })
}

/// Receivers of the request to stop, and of the request to reload all files (SIGHUP, on Unix).
fn signals() -> std::io::Result<(watch::Receiver<bool>, Arc<Notify>)> {
    let (stop, stopped) = watch::channel(false);
    let (mut termination, mut hangup) = (Termination::new()?, Reload::new()?);
    let reload = Arc::new(Notify::new());
    let reload_requested = reload.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                // Both are cancel-safe, as documented.
                () = termination.recv() => break,
                () = hangup.recv() => reload_requested.notify_one(),
            }
        }
        // The receiver is dropped only after the gateway has stopped.
        let _ = stop.send(true);
    });
    Ok((stopped, reload))
}

fn announce(address: SocketAddr) {
    report!("listening on https://{address}");
}

/// Serves until `stopped` is true, and reloads its files when `reload` is notified. Calls `ready` with the address once requests are
/// answered.
pub(super) async fn serve(
    directory: GatewayDirectory,
    listener: TcpListener,
    intervals: WatchIntervals,
    stopped: watch::Receiver<bool>,
    reload: Arc<Notify>,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let address = listener.local_addr()?;
    let (lineage, lineage_problem) = lineage(&directory);
    let (records, records_problem) = load_records(&directory);
    let shared = Arc::new(RequestContext::new(Hosts::new(lineage, records), routes::large_bodies()));
    shared.set_problem("lineage", lineage_problem);
    shared.set_problem("memory", records_problem);
    let watcher = DirectoryWatcher::open(directory.clone(), intervals, &shared, format!("https://{address}"))?;
    let connections = ConnectionContext {
        acceptor: acceptor(watcher.served())?,
        renewed: watcher.served().changes(),
        stopped: stopped.clone(),
    };
    let (mut starting, context) = (watcher, shared.clone());
    let watcher = tokio::task::spawn_blocking(move || {
        starting.first_poll(&context);
        starting
    })
    .await?;
    let watching = tokio::spawn(keep_watching(watcher, shared.clone(), reload, stopped.clone()));
    let saving = tokio::spawn(keep_saving(directory.hosts(), shared.clone(), stopped));

    ready(address);
    tracing::info!(%address, hosts = shared.hosts.count(), "the gateway has started");
    accept(listener, connections, shared.clone()).await;
    watching.await?;
    saving.await?;
    save(&directory.hosts(), &shared).await;
    tracing::info!("the gateway has stopped");
    Ok(())
}

fn acceptor(served: Arc<ServedCertificate>) -> Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(served);
    // Session resumption makes it cheaper when all hosts reconnect at once.
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Shared by all connections.
#[derive(Clone)]
struct ConnectionContext {
    acceptor: TlsAcceptor,
    /// Changes when another certificate is served: connections are closed, so that hosts see the new certificate.
    renewed: watch::Receiver<u64>,
    stopped: watch::Receiver<bool>,
}

/// The saved records of the hosts; without them, the problem to report.
fn load_records(directory: &GatewayDirectory) -> (Vec<hosts::Record>, Option<String>) {
    match hosts::load(&directory.hosts()) {
        Ok(records) => (records, None),
        Err(error) => {
            // The records are only a cache: every host reports its state again with its next heartbeat.
            let damaged = directory.hosts().with_extension("json.damaged");
            let kept = match std::fs::rename(directory.hosts(), &damaged) {
                Ok(()) => format!("the file is kept as {}", damaged.display()),
                Err(error) => format!("the file cannot be renamed: {error}"),
            };
            (Vec::new(), Some(format!("the records of hosts from before this start are lost ({kept}): {error:#}")))
        }
    }
}

async fn keep_saving(path: PathBuf, shared: Arc<RequestContext>, mut stopped: watch::Receiver<bool>) {
    let mut pause = SAVE_INTERVAL;
    loop {
        tokio::select! {
            // Both are cancel-safe: changes of a lost notification are saved at the end.
            () = async { shared.touched.notified().await; tokio::time::sleep(pause).await } => {}
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
        let started = Instant::now();
        let work = save(&path, &shared).await;
        pause = SAVE_INTERVAL.max(work * MAX_SAVE_SHARE).max(started.elapsed());
    }
}

/// Writes the records of the hosts if they have changed; a failed write is retried. Returns how long it took without the sync.
async fn save(path: &Path, shared: &RequestContext) -> Duration {
    let Some(records) = shared.hosts.changed() else { return Duration::ZERO };
    let (file, started) = (path.to_owned(), Instant::now());
    match tokio::task::spawn_blocking(move || hosts::save(&file, &records)).await {
        Ok(Ok(work)) => {
            shared.set_problem("hosts", None);
            work
        }
        Ok(Err(error)) => {
            shared.set_problem("hosts", Some(format!("cannot save the records of the hosts: {error:#}; retrying")));
            shared.hosts.mark_changed();
            shared.touched.notify_one();
            // The share of the sync is unknown.
            started.elapsed()
        }
        Err(_) => started.elapsed(),
    }
}

async fn accept(listener: TcpListener, mut context: ConnectionContext, shared: Arc<RequestContext>) {
    let files = platform::raise_open_files().unwrap_or(1024);
    let max_connections =
        usize::try_from(files.saturating_sub(RESERVED_FILES).max(16) / 2).unwrap_or(usize::MAX).min(MAX_CONNECTIONS);
    let permits = Arc::new(Semaphore::new(max_connections));
    let router = routes::router(shared);
    loop {
        let accepted = tokio::select! {
            // Cancel-safe: a dropped permit is released, and `accept` loses no connection.
            accepted = async {
                let permit = permits.clone().acquire_owned().await;
                (listener.accept().await, permit)
            } => accepted,
            _ = context.stopped.wait_for(|stopped| *stopped) => break,
        };
        match accepted {
            (Ok((stream, peer)), Ok(permit)) => {
                let service = router.clone().layer(axum::Extension(routes::ClientAddress(peer.ip().to_canonical())));
                let context = context.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve_connection(stream, context, service).await {
                        tracing::debug!(%peer, error = %format!("{error:#}"), "a connection failed");
                    }
                    drop(permit);
                });
            }
            (Err(error), _) => {
                // Mostly the limit of open files, which accept would report again at once: give connections time to close.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            (_, Err(_)) => break,
        }
    }
    drop(listener);
    let all = u32::try_from(max_connections).unwrap_or(u32::MAX);
    if tokio::time::timeout(STOP_TIMEOUT, permits.acquire_many(all)).await.is_err() {
        tracing::warn!("requests were aborted at the stop timeout");
    }
}

async fn serve_connection(stream: TcpStream, mut context: ConnectionContext, service: axum::Router) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    // Before the handshake, during which the certificate may change.
    context.renewed.mark_unchanged();
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, context.acceptor.accept(Box::pin(stream)))
        .await
        .context("the TLS handshake timed out")??;
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // Cancel-safe: the connection is pinned outside and continues below.
        ended = connection.as_mut() => return Ok(ended?),
        _ = context.stopped.wait_for(|stopped| *stopped) => {}
        // Cancel-safe, as documented.
        _ = context.renewed.changed() => {}
    }
    connection.as_mut().graceful_shutdown();
    Ok(connection.await?)
}
