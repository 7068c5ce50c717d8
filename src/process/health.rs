//! Health checks of sub-agents: one request, one result, and nothing left behind.
//!
//! `http` sends a GET and reads the status line: 2xx and 3xx are healthy. It follows no redirect, reads no body and uses no proxy, whatever
//! the environment says. The certificate is not verified: such a server runs on this host and often has one for another name, it is sent no
//! secret, and nothing that it returns is trusted. `tcp` is healthy when the connection is accepted. `exec` runs a program of the package
//! with the sub-agent's environment and user, with its output in the sub-agent's log; exit code 0 is healthy, and at the timeout everything
//! that it started is killed. A `control` script is run with `status`.
//!
//! Between two checks nothing is resident: no thread, no connection. A check is discarded if it fails because the manager was not scheduled,
//! or because the host is out of memory or descriptors.

mod http;
mod program;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::launch::StartSpec;
use crate::core::health::{Address, CheckTarget, Url};
use crate::core::program::Program;
use crate::core::supervise::CheckResult;
use crate::platform;

const SCRIPT_TIMEOUT: Duration = Duration::from_secs(10);
/// A timeout that is this late means that this process or the machine was suspended.
const SUSPENSION: Duration = Duration::from_secs(2);
/// Concurrent name lookups, each in a blocking thread: an unreachable name server must not use all of them.
static LOOKUPS: Semaphore = Semaphore::const_new(4);
/// Concurrent TLS connections: each takes some 50 KiB.
static HANDSHAKES: Semaphore = Semaphore::const_new(8);
/// Addresses of a name that are tried.
const MAX_ADDRESSES: usize = 4;

/// A health check.
#[derive(Debug)]
pub struct HealthQuery {
    timeout: Duration,
    kind: QueryKind,
}

#[derive(Debug)]
enum QueryKind {
    Http(Url),
    Tcp(Address),
    Exec(Box<StartSpec>, Vec<String>),
    Script(Box<StartSpec>),
}

impl HealthQuery {
    /// The check of a sub-agent that was started like this; `None`: it has none.
    pub fn of(start: StartSpec) -> Option<HealthQuery> {
        let health = match &start.program {
            Program::Script => {
                return Some(HealthQuery { timeout: SCRIPT_TIMEOUT, kind: QueryKind::Script(Box::new(start)) });
            }
            Program::Native(manifest) => manifest.health.clone()?,
        };
        let kind = match health.check {
            CheckTarget::Http(url) => QueryKind::Http(url),
            CheckTarget::Tcp(address) => QueryKind::Tcp(address),
            CheckTarget::Exec(words) => QueryKind::Exec(Box::new(start), words),
        };
        Some(HealthQuery { timeout: health.timeout, kind })
    }
}

/// Runs a check. Takes at most the timeout, plus the time to kill a program that does not answer.
pub async fn run_check(query: HealthQuery) -> CheckResult {
    let HealthQuery { timeout, kind } = query;
    let result = match kind {
        QueryKind::Tcp(address) => {
            let permit = lookup_permit(&address).await;
            within(timeout, async { connect(&address, permit).await.map(drop) }).await
        }
        QueryKind::Http(url) => {
            let _permit = if url.tls { HANDSHAKES.acquire().await.ok() } else { None };
            let permit = lookup_permit(&url.address).await;
            within(timeout, http::get(&url, permit)).await
        }
        QueryKind::Exec(start, words) => program::exec(*start, &words, timeout).await,
        QueryKind::Script(start) => program::status(*start, timeout).await,
    };
    result.err().unwrap_or(CheckResult::Healthy)
}

async fn within(timeout: Duration, request: impl Future<Output = Result<(), CheckResult>>) -> Result<(), CheckResult> {
    let started = Instant::now();
    tokio::time::timeout(timeout, request).await.unwrap_or_else(|_| Err(timed_out(started, timeout)))
}

/// The result of a timeout.
fn timed_out(started: Instant, timeout: Duration) -> CheckResult {
    if started.elapsed() > timeout + SUSPENSION {
        CheckResult::Unknown("the manager was suspended during the check".to_owned())
    } else {
        CheckResult::Unhealthy(format!("no answer within {timeout:?}"))
    }
}

/// The result of a failed operation: a shortage of this host is not the sub-agent's failure.
fn failed(what: &str, error: &io::Error) -> CheckResult {
    let text = format!("{what}: {error}");
    if platform::is_shortage(error) { CheckResult::Unknown(text) } else { CheckResult::Unhealthy(text) }
}

type CheckPermit = Option<SemaphorePermit<'static>>;

/// Waiting for other lookups is not the sub-agent's fault, so it comes before the timeout starts.
async fn lookup_permit(address: &Address) -> CheckPermit {
    if literal_addresses(address).is_some() { None } else { LOOKUPS.acquire().await.ok() }
}

async fn connect(address: &Address, permit: CheckPermit) -> Result<TcpStream, CheckResult> {
    let what = || format!("cannot connect to {address}");
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in
        resolve(address, permit).await.map_err(|error| failed(&what(), &error))?.into_iter().take(MAX_ADDRESSES)
    {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(failed(&what(), &last))
}

async fn resolve(address: &Address, permit: CheckPermit) -> io::Result<Vec<SocketAddr>> {
    if let Some(addresses) = literal_addresses(address) {
        return Ok(addresses);
    }
    let Address { host, port } = address.clone();
    let lookup = tokio::task::spawn_blocking(move || {
        // Held until the thread is free again, even if the caller stopped waiting.
        let _permit = permit;
        (host.as_str(), port).to_socket_addrs().map(Iterator::collect)
    });
    lookup.await.map_err(io::Error::other)?
}

/// The addresses of a host that needs no lookup.
fn literal_addresses(address: &Address) -> Option<Vec<SocketAddr>> {
    let Address { host, port } = address;
    if host.eq_ignore_ascii_case("localhost") {
        return Some(vec![(Ipv4Addr::LOCALHOST, *port).into(), (Ipv6Addr::LOCALHOST, *port).into()]);
    }
    Some(vec![(host.parse::<IpAddr>().ok()?, *port).into()])
}

#[cfg(test)]
mod tests;
