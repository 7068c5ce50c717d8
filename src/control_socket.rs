//! The local door: the manager's control socket, at which the operator asks and on which the watchdog holds the control connection.
//!
//! One JSON document a line each way, a [`ControlReply`] for a [`Request`]. A connection that said [`Request::Hello`] is the watch between the
//! two roles: its end is the other's death, at once and without polling. Before it ends on purpose the manager says so with a
//! [`Goodbye`].

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

/// A request is refused beyond this.
const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// A reply is refused beyond this: a status of thousands of sub-agents is far smaller.
const MAX_REPLY_BYTES: u64 = 16 << 20;
/// A manager that works answers at once.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two looks at a manager that is coming up.
const LOOK: Duration = Duration::from_millis(50);
/// One who may not come in gets so long to hear why.
const REFUSAL: Duration = Duration::from_secs(1);
/// So many may hold the door open at the same time.
const MAX_CONNECTIONS: usize = 64;

/// What may be asked of the manager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "camelCase")]
pub enum Request {
    /// This connection is the other role's: watch it as it watches you.
    Hello {
        role: Role,
        pid: u32,
    },
    /// Are you still working?
    Ping,
    Status,
    /// Stop every sub-agent, then yourself, and stay stopped.
    Stop,
    /// End yourself and leave the sub-agents running.
    Yield,
    /// As `Yield`, and report this reason.
    Renew {
        why: String,
    },
    /// Stop and start one sub-agent.
    Restart {
        agent: AgentName,
    },
    /// Return to the release before the current one, and keep that until another release is ordered.
    RollBack {
        agent: AgentName,
    },
    /// Try again what is skipped or held back; of `aops-spm` the manager's own releases.
    Retry {
        agent: AgentName,
    },
    /// Send a heartbeat now.
    Heartbeat,
    /// Follow the gateway's orders now, also where an operator's change holds; or upgrade to the release in this package.
    Upgrade {
        package: Option<PathBuf>,
    },
    /// Return the manager to the release before the current one.
    RollBackManager,
}

/// What the manager answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControlReply {
    /// Why it could not be done.
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

/// The last line on every connection before the manager ends on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "farewell", rename_all = "camelCase")]
pub enum Goodbye {
    /// The home stops.
    Stop,
    /// The manager gives way to another.
    Yield,
}

/// What comes through the door to the manager.
#[derive(Debug)]
pub enum ControlRequest {
    Asked(Request, oneshot::Sender<ControlReply>),
    /// Somebody came who may not, and was turned away.
    Stranger {
        why: String,
    },
    /// The other role's connection ended: it is dead, or has left.
    PeerGone {
        role: Role,
        pid: u32,
    },
}

/// Lets everybody in until the task is dropped. Each connection is a task; what is asked goes to `knocks`.
pub async fn serve(
    mut listener: LocalListener,
    knocks: mpsc::Sender<ControlRequest>,
    farewell: watch::Receiver<Option<Goodbye>>,
) {
    let seats = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(seat) = seats.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok(SocketPeer::Rejected { stream, peer, allowed }) => {
                let why = format!("cannot let {peer} in at the control socket: it is for {allowed}");
                // Somebody who knocks again and again must hold up nobody; the log hears of him from the manager.
                let _ = knocks.try_send(ControlRequest::Stranger { why: why.clone() });
                tokio::spawn(async move {
                    let _seat = seat;
                    let _ = tokio::time::timeout(REFUSAL, turn_away(stream, &why)).await;
                });
            }
            Ok(SocketPeer::Allowed(stream)) => {
                let (knocks, farewell) = (knocks.clone(), farewell.clone());
                tokio::spawn(async move {
                    let _seat = seat;
                    if let Err(error) = converse(stream, knocks, farewell).await {
                        tracing::debug!(error = format!("{error:#}"), "a connection at the local door ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(error = %error, "a connection at the local door cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Says why he is not heard. Nothing that he says is read.
async fn turn_away(mut stream: LocalStream, why: &str) -> Result<()> {
    stream.write_all(&as_line(&ControlReply::failed(why))?).await?;
    Ok(stream.shutdown().await?)
}

async fn converse(
    stream: LocalStream,
    knocks: mpsc::Sender<ControlRequest>,
    mut farewell: watch::Receiver<Option<Goodbye>>,
) -> Result<()> {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut lines = tokio::io::BufReader::new(reader);
    let mut peer = None;
    let ended = loop {
        let mut line = vec![];
        let mut limited = (&mut lines).take(MAX_REQUEST_BYTES);
        // `read_until` is not cancel-safe; the other arm ends the conversation, so nothing that was read is missed.
        let read = tokio::select! {
            read = limited.read_until(b'\n', &mut line) => read,
            word = told(&mut farewell) => {
                let _ = writer.write_all(&as_line(&word)?).await;
                break Ok(());
            }
        };
        match read {
            Ok(0) => break Ok(()),
            Ok(_) if !line.ends_with(b"\n") => break Err(anyhow::anyhow!("a request without an end")),
            Ok(_) => {}
            Err(error) => break Err(error.into()),
        }
        let reply = match serde_json::from_slice::<Request>(&line) {
            Err(error) => ControlReply::failed(format!("cannot understand the request: {error}")),
            Ok(request) => {
                if let Request::Hello { role, pid } = request {
                    peer = Some((role, pid));
                }
                let (sender, receiver) = oneshot::channel();
                if knocks.send(ControlRequest::Asked(request, sender)).await.is_err() {
                    break Ok(());
                }
                receiver.await.unwrap_or_else(|_| ControlReply::failed("the manager is ending"))
            }
        };
        if let Err(error) = writer.write_all(&as_line(&reply)?).await {
            break Err(error.into());
        }
    };
    if let Some((role, pid)) = peer {
        let _ = knocks.send(ControlRequest::PeerGone { role, pid }).await;
    }
    ended
}

/// Resolves when the manager ends on purpose.
async fn told(farewell: &mut watch::Receiver<Option<Goodbye>>) -> Goodbye {
    match farewell.wait_for(Option::is_some).await.map(|word| *word) {
        Ok(Some(word)) => word,
        _ => std::future::pending().await,
    }
}

fn as_line<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// The asking side of a connection. Blocks.
#[derive(Debug)]
pub struct ControlClient {
    reader: BufReader<LocalConnection>,
    writer: LocalConnection,
}

/// What came over a connection.
#[derive(Debug, Clone, PartialEq)]
pub enum ControlMessage {
    Reply(Box<ControlReply>),
    Farewell(Goodbye),
    /// The connection ended without a word.
    End,
    /// Nothing within the time that the connection was opened with.
    Silence,
}

/// The door is there for others.
#[derive(Debug)]
pub struct AccessDenied(PathBuf);

impl std::fmt::Display for AccessDenied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.0.display();
        write!(f, "cannot open the control socket {path}: only its owner and root may; run this as one of them")
    }
}

impl std::error::Error for AccessDenied {}

impl ControlClient {
    /// Opens the manager's door; `None`: nobody answers there. Every later wait gives up after `timeout`.
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
        self.writer.write_all(&as_line(request)?).context("cannot ask the manager")
    }

    /// Waits for what comes next.
    pub fn hear(&mut self) -> Result<ControlMessage> {
        hear(&mut self.reader)
    }

    /// Asks and waits for the reply.
    pub fn ask(&mut self, request: &Request) -> Result<ControlReply> {
        if let Err(error) = self.send(request) {
            // One who is turned away is told why before he has asked.
            return match self.hear() {
                Ok(ControlMessage::Reply(reply)) => Ok(*reply),
                _ => Err(error),
            };
        }
        match self.hear()? {
            ControlMessage::Reply(reply) => Ok(*reply),
            ControlMessage::Silence => bail!("the manager does not answer in time"),
            ControlMessage::Farewell(_) | ControlMessage::End => bail!("the manager ended before it answered"),
        }
    }

    /// Splits into the end that asks and the end that hears, which then waits for ever.
    pub fn split(self) -> Result<(LocalConnection, BufReader<LocalConnection>)> {
        platform::remove_read_timeout(self.reader.get_ref())?;
        Ok((self.writer, self.reader))
    }
}

/// Waits for what comes next on a connection.
pub fn hear(reader: &mut BufReader<LocalConnection>) -> Result<ControlMessage> {
    let mut line = vec![];
    let mut limited = std::io::Read::take(reader, MAX_REPLY_BYTES);
    match limited.read_until(b'\n', &mut line) {
        Ok(0) => return Ok(ControlMessage::End),
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            return Ok(ControlMessage::Silence);
        }
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
            return Ok(ControlMessage::End);
        }
        Err(error) => return Err(error).context("cannot hear the manager"),
    }
    if let Ok(word) = serde_json::from_slice(&line) {
        return Ok(ControlMessage::Farewell(word));
    }
    let reply = serde_json::from_slice(&line).context("cannot understand the manager's reply")?;
    Ok(ControlMessage::Reply(Box::new(reply)))
}

/// Sends a request on the asking end of a split connection.
pub fn send(writer: &mut LocalConnection, request: &Request) -> Result<()> {
    writer.write_all(&as_line(request)?).context("cannot ask the manager")
}

/// Opens the door, asks one thing and waits for the reply; `None`: nobody answers there.
pub fn ask(home: &Home, request: &Request, timeout: Duration) -> Result<Option<ControlReply>> {
    match ControlClient::open(home, timeout)? {
        Some(mut door) => door.ask(request).map(Some),
        None => Ok(None),
    }
}

/// Asks for a stop and waits for its end, as long as the manager shows that it is at it; `None`: nobody answers there.
pub fn ask_to_stop(home: &Home, patience: Duration) -> Result<Option<ControlReply>> {
    let Some(mut door) = ControlClient::open(home, ANSWER)? else { return Ok(None) };
    door.send(&Request::Stop)?;
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        match door.hear()? {
            ControlMessage::Reply(reply) => return Ok(Some(*reply)),
            ControlMessage::Farewell(_) => return Ok(Some(ControlReply::done())),
            ControlMessage::End => bail!("the manager ended before every sub-agent was stopped"),
            // It takes its time, or it hangs: then it does not answer this either, twice.
            ControlMessage::Silence => {
                drop(ask(home, &Request::Ping, ANSWER).or_else(|_| ask(home, &Request::Ping, ANSWER))?)
            }
        }
    }
    bail!("not every sub-agent was stopped within {patience:?}")
}

/// Waits until the manager answers and the watchdog is there.
pub fn wait_until_it_answers(home: &Home, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let asked = ask(home, &Request::Status, ANSWER);
        if let Ok(Some(reply)) = &asked
            && reply.status.as_ref().is_some_and(|status| status.spa.pid.is_some())
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let why = match asked {
                Ok(Some(_)) => "the watchdog does not come up".to_owned(),
                Ok(None) => "the manager does not come up".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            let (spm, spa) = (home.role_log("spm"), home.role_log("spa"));
            bail!("{why} within {patience:?}; see {} and {}", spm.display(), spa.display());
        }
        platform::pause(LOOK);
    }
}
