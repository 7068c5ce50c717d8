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

use super::launch::Start;
use crate::core::health::{Address, Check, Url};
use crate::core::program::Program;
use crate::core::supervise::Answer;
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
pub struct Question {
    timeout: Duration,
    of: Of,
}

#[derive(Debug)]
enum Of {
    Http(Url),
    Tcp(Address),
    Exec(Box<Start>, Vec<String>),
    Script(Box<Start>),
}

impl Question {
    /// After the health of what was started so; `None`: it gives no way to ask.
    pub fn of(start: Start) -> Option<Question> {
        let health = match &start.program {
            Program::Script => return Some(Question { timeout: SCRIPT_TIMEOUT, of: Of::Script(Box::new(start)) }),
            Program::Native(manifest) => manifest.health.clone()?,
        };
        let of = match health.check {
            Check::Http(url) => Of::Http(url),
            Check::Tcp(address) => Of::Tcp(address),
            Check::Exec(words) => Of::Exec(Box::new(start), words),
        };
        Some(Question { timeout: health.timeout, of })
    }
}

/// Asks, and takes no longer than the timeout, and what it takes to end a program that does not answer.
pub async fn ask(question: Question) -> Answer {
    let Question { timeout, of } = question;
    let result = match of {
        Of::Tcp(address) => {
            let turn = turn_to_look_up(&address).await;
            within(timeout, async { connect(&address, turn).await.map(drop) }).await
        }
        Of::Http(url) => {
            let _turn = if url.tls { HANDSHAKES.acquire().await.ok() } else { None };
            let turn = turn_to_look_up(&url.address).await;
            within(timeout, http::get(&url, turn)).await
        }
        Of::Exec(start, words) => program::exec(*start, &words, timeout).await,
        Of::Script(start) => program::status(*start, timeout).await,
    };
    result.err().unwrap_or(Answer::Healthy)
}

async fn within(timeout: Duration, asked: impl Future<Output = Result<(), Answer>>) -> Result<(), Answer> {
    let began = Instant::now();
    tokio::time::timeout(timeout, asked).await.unwrap_or_else(|_| Err(late(began, timeout)))
}

/// No answer in time.
fn late(began: Instant, timeout: Duration) -> Answer {
    if began.elapsed() > timeout + NOT_SCHEDULED {
        Answer::Unknown("the manager did not run in the meantime".to_owned())
    } else {
        Answer::Unhealthy(format!("no answer within {timeout:?}"))
    }
}

/// What it means that something could not be done.
fn failed(what: &str, error: &io::Error) -> Answer {
    let text = format!("{what}: {error}");
    if platform::is_shortage(error) { Answer::Unknown(text) } else { Answer::Unhealthy(text) }
}

type Turn = Option<SemaphorePermit<'static>>;

/// To wait for others is not the sub-agent's fault, so this comes before its time begins.
async fn turn_to_look_up(address: &Address) -> Turn {
    if at_hand(address).is_some() { None } else { LOOKUPS.acquire().await.ok() }
}

async fn connect(address: &Address, turn: Turn) -> Result<TcpStream, Answer> {
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

async fn resolve(address: &Address, turn: Turn) -> io::Result<Vec<SocketAddr>> {
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
