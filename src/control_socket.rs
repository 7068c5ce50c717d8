//! The manager's control socket: receives operators' requests, and holds the control connection of the watchdog.
//!
//! Each line is a JSON document, a [`ControlReply`] for a [`Request`]. On a connection that sent [`Request::Hello`] the two roles supervise
//! each other: its end is the peer's death, detected at once and without polling. Before an intended exit, the manager sends a [`Goodbye`].

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};

use crate::core::model::AgentName;
use crate::core::role::Role;
use crate::core::status::Status;
use crate::home::Home;
use crate::platform::{self, LocalConnection, LocalListener, LocalStream, SocketPeer};

/// Maximum size of a request.
const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// Maximum size of a reply; a status of thousands of sub-agents is far smaller.
const MAX_REPLY_BYTES: u64 = 16 << 20;
/// Timeout for a reply; a working manager replies at once.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval for polling a manager that is starting.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Timeout for sending the reason to a rejected client.
const REJECTION_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of simultaneous connections.
const MAX_CONNECTIONS: usize = 64;

/// A request to the manager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "camelCase")]
pub enum Request {
    /// The client is the other role: both supervise each other over this connection.
    Hello {
        role: Role,
        pid: u32,
    },
    /// Checks that the manager responds.
    Ping,
    Status,
    /// Stop every sub-agent, then the manager, and stay stopped.
    Stop,
    /// Exit and leave the sub-agents running.
    Yield,
    /// As `Yield`, and report this reason.
    Renew {
        why: String,
    },
    /// Stop and start one sub-agent.
    Restart {
        agent: AgentName,
    },
    /// Roll back to the previous release, and keep it until another release is ordered.
    RollBack {
        agent: AgentName,
    },
    /// Retry releases that are skipped or held back; for `aops-spm`, those of the manager.
    Retry {
        agent: AgentName,
    },
    /// Send a heartbeat now.
    Heartbeat,
    /// Follow the gateway's orders now, even against an operator's hold; with a package, upgrade to its release.
    Upgrade {
        package: Option<PathBuf>,
    },
    /// Roll the manager back to its previous release.
    RollBackManager,
}

/// The manager's reply.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControlReply {
    /// Why the request failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Box<Status>>,
}

impl ControlReply {
    pub fn done() -> ControlReply {
        ControlReply::default()
    }

    pub fn failed(error: impl Into<String>) -> ControlReply {
        ControlReply { error: Some(error.into()), status: None }
    }
}

/// The last line on every connection before an intended exit of the manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "farewell", rename_all = "camelCase")]
pub enum Goodbye {
    /// The home stops.
    Stop,
    /// Another manager follows.
    Yield,
}

/// An event at the control socket.
#[derive(Debug)]
pub enum ControlRequest {
    Request(Request, oneshot::Sender<ControlReply>),
    /// A client without permission was rejected.
    Rejected {
        why: String,
    },
    /// The other role's connection ended: it crashed or exited.
    PeerGone {
        role: Role,
        pid: u32,
    },
}

/// Accepts connections until the task is dropped. Each connection is a task; its requests are sent to `requests`.
pub async fn serve(
    mut listener: LocalListener,
    requests: mpsc::Sender<ControlRequest>,
    goodbye: watch::Receiver<Option<Goodbye>>,
) {
    let permits = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok(SocketPeer::Rejected { stream, peer, allowed }) => {
                let why = format!(
                    "cannot accept a connection of {peer} to the control socket: it is restricted to {allowed}"
                );
                // Without waiting: repeated attempts must not delay other clients. The manager logs the rejection.
                let _ = requests.try_send(ControlRequest::Rejected { why: why.clone() });
                tokio::spawn(async move {
                    let _permit = permit;
                    let _ = tokio::time::timeout(REJECTION_TIMEOUT, send_rejection(stream, &why)).await;
                });
            }
            Ok(SocketPeer::Allowed(stream)) => {
                let (requests, goodbye) = (requests.clone(), goodbye.clone());
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Err(error) = handle_connection(stream, requests, goodbye).await {
                        tracing::debug!(error = format!("{error:#}"), "a connection to the control socket failed");
                    }
                });
            }
            Err(error) => {
                // Mostly the limit of open files, which accept would report again at once: give connections time to close.
                tracing::warn!(error = %error, "cannot accept a connection to the control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Sends the reason of a rejection. Nothing is read from the client.
async fn send_rejection(mut stream: LocalStream, why: &str) -> Result<()> {
    stream.write_all(&as_line(&ControlReply::failed(why))?).await?;
    Ok(stream.shutdown().await?)
}

async fn handle_connection(
    stream: LocalStream,
    requests: mpsc::Sender<ControlRequest>,
    mut goodbye: watch::Receiver<Option<Goodbye>>,
) -> Result<()> {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut lines = tokio::io::BufReader::new(reader);
    let mut peer = None;
    let result = loop {
        let mut line = vec![];
        let mut limited = (&mut lines).take(MAX_REQUEST_BYTES);
        // `read_until` is not cancel-safe; the other arm ends the connection, so a lost partial read does not matter.
        let read = tokio::select! {
            read = limited.read_until(b'\n', &mut line) => read,
            goodbye = wait_for_goodbye(&mut goodbye) => {
                let _ = writer.write_all(&as_line(&goodbye)?).await;
                break Ok(());
            }
        };
        match read {
            Ok(0) => break Ok(()),
            Ok(_) if !line.ends_with(b"\n") => break Err(anyhow::anyhow!("a request is incomplete or too large")),
            Ok(_) => {}
            Err(error) => break Err(error.into()),
        }
        let reply = match serde_json::from_slice::<Request>(&line) {
            Err(error) => ControlReply::failed(format!("cannot parse the request: {error}")),
            Ok(request) => {
                if let Request::Hello { role, pid } = request {
                    peer = Some((role, pid));
                }
                let (sender, receiver) = oneshot::channel();
                if requests.send(ControlRequest::Request(request, sender)).await.is_err() {
                    break Ok(());
                }
                receiver.await.unwrap_or_else(|_| ControlReply::failed("the manager is exiting"))
            }
        };
        if let Err(error) = writer.write_all(&as_line(&reply)?).await {
            break Err(error.into());
        }
    };
    if let Some((role, pid)) = peer {
        let _ = requests.send(ControlRequest::PeerGone { role, pid }).await;
    }
    result
}

/// Resolves when the manager exits on purpose.
async fn wait_for_goodbye(goodbye: &mut watch::Receiver<Option<Goodbye>>) -> Goodbye {
    match goodbye.wait_for(Option::is_some).await.map(|goodbye| *goodbye) {
        Ok(Some(goodbye)) => goodbye,
        _ => std::future::pending().await,
    }
}

fn as_line<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// A client of the control socket. Blocks.
#[derive(Debug)]
pub struct ControlClient {
    reader: BufReader<LocalConnection>,
    writer: LocalConnection,
}

/// A message received by a client.
#[derive(Debug, Clone, PartialEq)]
pub enum ControlMessage {
    Reply(Box<ControlReply>),
    Goodbye(Goodbye),
    /// The connection ended without a goodbye.
    Closed,
    /// Nothing was received within the timeout of the connection.
    Timeout,
}

/// The control socket belongs to other users.
#[derive(Debug)]
pub struct AccessDenied(PathBuf);

impl std::fmt::Display for AccessDenied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.0.display();
        let administrator = platform::ADMINISTRATOR;
        write!(
            f,
            "cannot open the control socket {path}: only its owner and {administrator} may; run this as one of them"
        )
    }
}

impl std::error::Error for AccessDenied {}

impl ControlClient {
    /// Connects to the manager; `None`: no manager accepts connections. `timeout` applies to every later operation.
    pub fn open(home: &Home, timeout: Duration) -> Result<Option<ControlClient>> {
        let path = home.control_socket();
        let connection = match platform::connect_local(&path, timeout) {
            Ok(connection) => connection,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(AccessDenied(path).into()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot open the control socket {}", path.display()));
            }
        };
        let writer = platform::clone_local(&connection)?;
        Ok(Some(ControlClient { reader: BufReader::new(connection), writer }))
    }

    pub fn send(&mut self, request: &Request) -> Result<()> {
        self.writer.write_all(&as_line(request)?).context("cannot send a request to the manager")
    }

    /// Waits for the next message.
    pub fn receive(&mut self) -> Result<ControlMessage> {
        receive(&mut self.reader)
    }

    /// Sends a request and waits for the reply.
    pub fn request(&mut self, request: &Request) -> Result<ControlReply> {
        if let Err(error) = self.send(request) {
            // A rejected client receives the reason before it has sent a request.
            return match self.receive() {
                Ok(ControlMessage::Reply(reply)) => Ok(*reply),
                _ => Err(error),
            };
        }
        match self.receive()? {
            ControlMessage::Reply(reply) => Ok(*reply),
            ControlMessage::Timeout => bail!("the manager did not answer in time"),
            ControlMessage::Goodbye(_) | ControlMessage::Closed => bail!("the manager exited before it answered"),
        }
    }

    /// Splits into the writing and the reading end; the reading end then waits without a timeout.
    pub fn split(self) -> Result<(LocalConnection, BufReader<LocalConnection>)> {
        platform::remove_read_timeout(self.reader.get_ref())?;
        Ok((self.writer, self.reader))
    }
}

/// Waits for the next message on a connection.
pub fn receive(reader: &mut BufReader<LocalConnection>) -> Result<ControlMessage> {
    let mut line = vec![];
    let mut limited = std::io::Read::take(reader, MAX_REPLY_BYTES);
    match limited.read_until(b'\n', &mut line) {
        Ok(0) => return Ok(ControlMessage::Closed),
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            return Ok(ControlMessage::Timeout);
        }
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
            return Ok(ControlMessage::Closed);
        }
        Err(error) => return Err(error).context("cannot read from the manager"),
    }
    if let Ok(goodbye) = serde_json::from_slice(&line) {
        return Ok(ControlMessage::Goodbye(goodbye));
    }
    let reply = serde_json::from_slice(&line).context("cannot parse the manager's reply")?;
    Ok(ControlMessage::Reply(Box::new(reply)))
}

/// Sends a request on the writing end of a split connection.
pub fn send(writer: &mut LocalConnection, request: &Request) -> Result<()> {
    writer.write_all(&as_line(request)?).context("cannot send a request to the manager")
}

/// Connects, sends one request and waits for the reply; `None`: no manager accepts connections.
pub fn request(home: &Home, request: &Request, timeout: Duration) -> Result<Option<ControlReply>> {
    match ControlClient::open(home, timeout)? {
        Some(mut client) => client.request(request).map(Some),
        None => Ok(None),
    }
}

/// Requests a stop and waits until it completes, while the manager responds; `None`: no manager accepts connections.
pub fn request_stop(home: &Home, timeout: Duration) -> Result<Option<ControlReply>> {
    let Some(mut client) = ControlClient::open(home, REPLY_TIMEOUT)? else { return Ok(None) };
    client.send(&Request::Stop)?;
    let deadline = Instant::now() + timeout;
    while Instant::now() < deadline {
        match client.receive()? {
            ControlMessage::Reply(reply) => return Ok(Some(*reply)),
            ControlMessage::Goodbye(_) => return Ok(Some(ControlReply::done())),
            ControlMessage::Closed => bail!("the manager exited before every sub-agent was stopped"),
            // The stop takes longer, or the manager hangs: then it does not answer two pings either.
            ControlMessage::Timeout => drop(
                request(home, &Request::Ping, REPLY_TIMEOUT)
                    .or_else(|_| request(home, &Request::Ping, REPLY_TIMEOUT))?,
            ),
        }
    }
    bail!("not every sub-agent was stopped within {timeout:?}")
}

/// Waits until the manager answers and the watchdog is running.
pub fn wait_until_ready(home: &Home, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let asked = request(home, &Request::Status, REPLY_TIMEOUT);
        if let Ok(Some(reply)) = &asked
            && reply.status.as_ref().is_some_and(|status| status.spa.pid.is_some())
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let why = match asked {
                Ok(Some(_)) => "the watchdog did not start".to_owned(),
                Ok(None) => "the manager did not start".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            let (spm, spa) = (home.role_log("spm"), home.role_log("spa"));
            bail!("{why} within {timeout:?}; see {} and {}", spm.display(), spa.display());
        }
        platform::pause(POLL_INTERVAL);
    }
}
