//! Asks sub-agents how they are: one question, one answer, and nothing of it left behind.
//!
//! `http` sends a GET and looks at the status line: 2xx and 3xx are healthy; no redirect is followed and no body read; no proxy is used,
//! whatever the environment says; a certificate is not judged, for such a server runs on this host and often has one that names another,
//! and neither is it told a secret nor is anything believed that it says. `tcp` is healthy when the connection is accepted. `exec` runs a
//! program of the package with the sub-agent's environment and user, its output in the sub-agent's log; it is healthy when it exits with 0,
//! and at the timeout all that it started is killed. A `control` script is asked for its `status`.
//!
//! Nothing is resident between two questions: no thread, no connection. That this process did not run, or the host has no more memory or
//! descriptors, says nothing about the sub-agent.

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
/// A timeout that comes so late was held up by a stop of this process or of the machine.
const NOT_SCHEDULED: Duration = Duration::from_secs(2);
/// Names are looked up by blocking threads, so many at once: a name server that is away must not take all of them.
static LOOKUPS: Semaphore = Semaphore::const_new(4);
/// A TLS connection takes some 50 KiB while it stands.
static HANDSHAKES: Semaphore = Semaphore::const_new(8);
/// Of a name's addresses, so many are tried.
const MAX_ADDRESSES: usize = 4;

/// What is to be asked.
#[derive(Debug)]
pub struct HealthQuery {
    timeout: Duration,
    of: QueryKind,
}

#[derive(Debug)]
enum QueryKind {
    Http(Url),
    Tcp(Address),
    Exec(Box<StartSpec>, Vec<String>),
    Script(Box<StartSpec>),
}

impl HealthQuery {
    /// After the health of what was started so; `None`: it gives no way to ask.
    pub fn of(start: StartSpec) -> Option<HealthQuery> {
        let health = match &start.program {
            Program::Script => {
                return Some(HealthQuery { timeout: SCRIPT_TIMEOUT, of: QueryKind::Script(Box::new(start)) });
            }
            Program::Native(manifest) => manifest.health.clone()?,
        };
        let of = match health.check {
            CheckTarget::Http(url) => QueryKind::Http(url),
            CheckTarget::Tcp(address) => QueryKind::Tcp(address),
            CheckTarget::Exec(words) => QueryKind::Exec(Box::new(start), words),
        };
        Some(HealthQuery { timeout: health.timeout, of })
    }
}

/// Asks, and takes no longer than the timeout, and what it takes to end a program that does not answer.
pub async fn ask(question: HealthQuery) -> CheckResult {
    let HealthQuery { timeout, of } = question;
    let result = match of {
        QueryKind::Tcp(address) => {
            let turn = turn_to_look_up(&address).await;
            within(timeout, async { connect(&address, turn).await.map(drop) }).await
        }
        QueryKind::Http(url) => {
            let _turn = if url.tls { HANDSHAKES.acquire().await.ok() } else { None };
            let turn = turn_to_look_up(&url.address).await;
            within(timeout, http::get(&url, turn)).await
        }
        QueryKind::Exec(start, words) => program::exec(*start, &words, timeout).await,
        QueryKind::Script(start) => program::status(*start, timeout).await,
    };
    result.err().unwrap_or(CheckResult::Healthy)
}

async fn within(timeout: Duration, asked: impl Future<Output = Result<(), CheckResult>>) -> Result<(), CheckResult> {
    let began = Instant::now();
    tokio::time::timeout(timeout, asked).await.unwrap_or_else(|_| Err(late(began, timeout)))
}

/// No answer in time.
fn late(began: Instant, timeout: Duration) -> CheckResult {
    if began.elapsed() > timeout + NOT_SCHEDULED {
        CheckResult::Unknown("the manager did not run in the meantime".to_owned())
    } else {
        CheckResult::Unhealthy(format!("no answer within {timeout:?}"))
    }
}

/// What it means that something could not be done.
fn failed(what: &str, error: &io::Error) -> CheckResult {
    let text = format!("{what}: {error}");
    if platform::is_shortage(error) { CheckResult::Unknown(text) } else { CheckResult::Unhealthy(text) }
}

type CheckPermit = Option<SemaphorePermit<'static>>;

/// To wait for others is not the sub-agent's fault, so this comes before its time begins.
async fn turn_to_look_up(address: &Address) -> CheckPermit {
    if at_hand(address).is_some() { None } else { LOOKUPS.acquire().await.ok() }
}

async fn connect(address: &Address, turn: CheckPermit) -> Result<TcpStream, CheckResult> {
    let what = || format!("cannot connect to {address}");
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in
        resolve(address, turn).await.map_err(|error| failed(&what(), &error))?.into_iter().take(MAX_ADDRESSES)
    {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(failed(&what(), &last))
}

async fn resolve(address: &Address, turn: CheckPermit) -> io::Result<Vec<SocketAddr>> {
    if let Some(addresses) = at_hand(address) {
        return Ok(addresses);
    }
    let Address { host, port } = address.clone();
    let looked_up = tokio::task::spawn_blocking(move || {
        // Held until the thread is free again, also when nobody waits for the answer any more.
        let _turn = turn;
        (host.as_str(), port).to_socket_addrs().map(Iterator::collect)
    });
    looked_up.await.map_err(io::Error::other)?
}

/// The addresses that nobody has to be asked for.
fn at_hand(address: &Address) -> Option<Vec<SocketAddr>> {
    let Address { host, port } = address;
    if host.eq_ignore_ascii_case("localhost") {
        return Some(vec![(Ipv4Addr::LOCALHOST, *port).into(), (Ipv6Addr::LOCALHOST, *port).into()]);
    }
    Some(vec![(host.parse::<IpAddr>().ok()?, *port).into()])
}

#[cfg(test)]
mod tests;
