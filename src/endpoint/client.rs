//! The HTTP client: blocking, with limits on time and size, and with errors that say what the operator can do.
//!
//! The agent id is sent only to endpoints, never to other servers. Plain http requires `--insecure`. Redirects are followed within the
//! origin only, and never for a POST. Stalled and slow connections are aborted.

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use ureq::http::{HeaderMap, Response, header};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectProxyConnector, Connector, TcpConnector};
use ureq::{Agent, Body, Timeout};

use super::proxy::{Proxies, ProxyUrl};
use super::stall::{LEAST_PER_SECOND, StallConnector, TooSlow};
use super::tls::{Handshake, HandshakeFailed, SharedHandshakes, TlsConnector};
use super::trust::{Distrust, LoadedTrust};
use super::{Endpoint, Fingerprint, Trust};
use crate::core::model::AgentId;
use crate::core::protocol::{AGENT_ID_HEADER, MAX_PINS, TrustReport};
use crate::core::throughput::MinimumRate;

/// Heartbeats at the usual intervals share a connection. A firewall may have dropped the state of a connection that was idle for longer,
/// and then silently discards what is sent on it.
const MAX_IDLE_AGE: Duration = Duration::from_secs(90);
/// Limit for the status line and all headers of an answer.
const MAX_HEADER_BYTES: usize = 8 << 10;
const MAX_REDIRECTS: usize = 5;
/// Idle connections kept for each host.
const MAX_IDLE_CONNECTIONS: usize = 2;
/// The window in which the minimum rate is measured, as a multiple of the stall timeout.
const SLOW_STALLS: u32 = 4;

/// The timeouts of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For connecting, TLS included; the same again for resolving the host's name.
    pub connect: Duration,
    /// For the next byte.
    pub stall: Duration,
    /// For a whole exchange. A client with this limit transfers little, and gets small buffers.
    pub total: Option<Duration>,
}

impl Timeouts {
    /// For heartbeats and other small requests.
    pub fn exchange() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            total: Some(Duration::from_secs(60)),
        }
    }

    /// For packages: each request sets its total; something must arrive every `stall` (usually 30 s).
    pub fn download(stall: Duration) -> Timeouts {
        Timeouts { connect: Duration::from_secs(10), stall, total: None }
    }
}

/// An HTTP client for gateways and package servers, with persistent connections. Shared between threads by reference.
#[derive(Debug)]
pub struct Client {
    agent: Agent,
    agent_id: Option<AgentId>,
    insecure: bool,
    proxies: Proxies,
    timeouts: Timeouts,
    trust: LoadedTrust,
    /// How certificates are verified, as a word for reports.
    trust_name: &'static str,
    handshakes: SharedHandshakes,
    /// Number of connections started.
    connections: Arc<AtomicU64>,
}

/// On whose behalf a request is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requester {
    /// This host: the server is one of our endpoints and receives the agent id.
    Host,
    /// No one: the server is not one of our endpoints.
    Anonymous,
}

impl Client {
    /// Like [`Client::with_proxies`], without a proxy.
    #[cfg(test)]
    pub fn new(trust: &Trust, agent_id: Option<&AgentId>, timeouts: Timeouts) -> Result<Client> {
        Client::with_proxies(&Proxies::default(), trust, agent_id, timeouts)
    }

    /// Loads the files that `trust` names. `agent_id` is sent to endpoints.
    pub fn with_proxies(
        proxies: &Proxies,
        trust: &Trust,
        agent_id: Option<&AgentId>,
        timeouts: Timeouts,
    ) -> Result<Client> {
        let insecure = *trust == Trust::Insecure;
        if insecure {
            tracing::warn!("TLS certificates are not verified, and plain http is allowed (--insecure)");
        }
        let (handshakes, connections) = (SharedHandshakes::default(), Arc::new(AtomicU64::new(0)));
        let trust_name = trust.name();
        let trust = LoadedTrust::new(trust)?;
        let (input, output) = if timeouts.total.is_some() { (8 << 10, 4 << 10) } else { (64 << 10, 4 << 10) };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("aops/", env!("CARGO_PKG_VERSION")))
            .max_response_header_size(MAX_HEADER_BYTES)
            .input_buffer_size(input)
            .output_buffer_size(output)
            .max_idle_connections(4)
            .max_idle_connections_per_host(MAX_IDLE_CONNECTIONS)
            .max_idle_age(MAX_IDLE_AGE)
            .timeout_resolve(Some(timeouts.connect))
            .timeout_connect(Some(timeouts.connect))
            .timeout_per_read(Some(timeouts.stall))
            .timeout_per_write(Some(timeouts.stall))
            .timeout_global(timeouts.total)
            .build();
        let connector =
            ().chain(ConnectProxyConnector::default())
                .chain(TcpConnector::default())
                .chain(StallConnector { window: timeouts.stall * SLOW_STALLS, connections: Arc::clone(&connections) })
                .chain(TlsConnector::new(trust.clone(), proxies.tls_authorities(), Arc::clone(&handshakes)));
        let agent = Agent::with_parts(config, connector, DefaultResolver::default());
        let (agent_id, proxies) = (agent_id.cloned(), proxies.clone());
        Ok(Client { agent, agent_id, insecure, proxies, timeouts, trust, trust_name, handshakes, connections })
    }

    /// A handle with which another thread aborts the requests of this client.
    pub fn disconnector(&self) -> Disconnector {
        Disconnector(self.agent.clone())
    }

    /// The public key that this client pinned at a first contact, under [`Trust::FirstContact`].
    pub fn first_contact(&self) -> Option<Fingerprint> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner).first_contact
    }

    fn last_handshake(&self, endpoint: &Endpoint) -> Option<Handshake> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner).last.get(&endpoint.origin()).copied()
    }

    /// The earliest expiry in the endpoint's last certificate chain, seconds since 1970.
    pub fn certificate_end(&self, endpoint: &Endpoint) -> Option<u64> {
        self.last_handshake(endpoint)?.end
    }

    /// How the endpoint's certificate is verified, for the heartbeat.
    pub fn trust_report(&self, endpoint: &Endpoint) -> TrustReport {
        let end = self.certificate_end(endpoint).and_then(|end| i64::try_from(end).ok());
        let end = end.and_then(|end| jiff::Timestamp::from_second(end).ok());
        TrustReport {
            by: self.trust_name.to_owned(),
            pins: self.trust.accepted(&endpoint.origin()).iter().map(ToString::to_string).collect(),
            certificate_end: end.map(|end| end.to_string()),
        }
    }

    /// Stores the public keys that an endpoint has announced in an answer: the present one and future ones. The connection passed the
    /// present pins. Invalid fingerprints are skipped. An endpoint without pins gets none.
    pub fn learn(&self, endpoint: &Endpoint, announced: &[String]) -> Result<()> {
        let Some(Handshake { identity, .. }) = self.last_handshake(endpoint) else { return Ok(()) };
        let announced: Vec<Fingerprint> = announced.iter().filter_map(|pin| pin.parse().ok()).take(MAX_PINS).collect();
        self.trust.learn(&endpoint.origin(), identity, &announced)
    }

    /// Sends a GET for `path` (starts with a slash, may have a query) to an endpoint, with the agent id.
    pub fn get(&self, endpoint: &Endpoint, path: &str, headers: &[(&str, &str)]) -> Result<HttpResponse> {
        self.get_with(endpoint, path, headers, Requester::Host, None)
    }

    /// Downloads a file, or a range of it. The limit covers the whole transfer and all redirects.
    pub fn download(
        &self,
        from: &Endpoint,
        path: &str,
        headers: &[(&str, &str)],
        requester: Requester,
        timeout: Duration,
    ) -> Result<HttpResponse> {
        self.get_with(from, path, headers, requester, Some(timeout))
    }

    /// Posts JSON to an endpoint.
    pub fn post_json(&self, endpoint: &Endpoint, path: &str, json: &[u8]) -> Result<HttpResponse> {
        let proxy = self.proxy_for(endpoint)?;
        let response = self.send(|| {
            let mut request = self.agent.post(endpoint.url(path)).header(header::CONTENT_TYPE, "application/json");
            if let Some(id) = &self.agent_id {
                request = request.header(AGENT_ID_HEADER, id.as_str());
            }
            request.config().proxy(proxy.map(|proxy| proxy.proxy().clone())).build().send(json)
        });
        let response = response.map_err(|error| self.explain(endpoint, proxy, error))?;
        Ok(HttpResponse::new(endpoint, self.timeouts.stall, response))
    }

    /// Sends a request, and retries it if a reused connection turns out to be closed by the server or dropped by a firewall, which shows
    /// only on sending. A new connection is tried once.
    ///
    /// Such a request was most likely not processed. All requests sent here are idempotent, so a repetition does no harm.
    fn send(&self, request: impl Fn() -> Result<Response<Body>, ureq::Error>) -> Result<Response<Body>, ureq::Error> {
        for _ in 0..MAX_IDLE_CONNECTIONS {
            let connections = self.connections.load(Ordering::SeqCst);
            match request() {
                Err(error) if is_closed(&error) && connections == self.connections.load(Ordering::SeqCst) => {
                    tracing::debug!(%error, "a reused connection is closed; reconnecting");
                }
                outcome => return outcome,
            }
        }
        request()
    }

    fn get_with(
        &self,
        from: &Endpoint,
        path: &str,
        headers: &[(&str, &str)],
        requester: Requester,
        timeout: Option<Duration>,
    ) -> Result<HttpResponse> {
        let proxy = self.proxy_for(from)?;
        let start = Instant::now();
        let mut url = from.url(path);
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(|| {
                let mut request = self.agent.get(&url);
                for (name, value) in headers {
                    request = request.header(*name, *value);
                }
                if let Some(id) = self.agent_id.as_ref().filter(|_| requester == Requester::Host) {
                    request = request.header(AGENT_ID_HEADER, id.as_str());
                }
                let total = timeout.map(|timeout| timeout.saturating_sub(start.elapsed())).or(self.timeouts.total);
                let proxy = proxy.map(|proxy| proxy.proxy().clone());
                request.config().proxy(proxy).timeout_global(total).build().call()
            });
            let response = response.map_err(|error| self.explain(from, proxy, error))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(HttpResponse::new(from, self.timeouts.stall, response));
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            url = redirected(from, location.context("cannot follow a redirect without a Location header")?)?;
        }
        bail!("cannot follow more than {MAX_REDIRECTS} redirects of {}", from.origin())
    }

    /// Rejects plain http without `--insecure`; returns the proxy to use.
    fn proxy_for(&self, endpoint: &Endpoint) -> Result<Option<&ProxyUrl>> {
        if !endpoint.is_https() && !self.insecure {
            bail!(
                "cannot use {endpoint}: plain http is neither encrypted nor authenticated; use an https:// address, or `--insecure` to \
                 allow it"
            );
        }
        self.proxies.of(endpoint)
    }

    /// Converts an error of the HTTP library to one for the operator.
    fn explain(&self, endpoint: &Endpoint, proxy: Option<&ProxyUrl>, error: ureq::Error) -> anyhow::Error {
        let origin = match proxy {
            Some(proxy) => format!("{} (through the proxy {proxy})", endpoint.origin()),
            None => endpoint.origin(),
        };
        let text = match error {
            ureq::Error::Other(inner) => match inner.downcast::<Distrust>() {
                Ok(distrust) => return anyhow::Error::new(*distrust),
                Err(inner) => match inner.downcast::<HandshakeFailed>() {
                    Ok(failed) => failed.to_string(),
                    Err(inner) => format!("cannot reach {origin}: {inner}"),
                },
            },
            ureq::Error::HostNotFound => format!(
                "cannot reach {origin}: cannot resolve the name {}; check {} and this host's name servers",
                proxy.map_or(endpoint.host(), |proxy| proxy.proxy().host()),
                if proxy.is_some() { "the proxy" } else { "the endpoint" }
            ),
            ureq::Error::ConnectProxyFailed(reason) => format!(
                "cannot reach {origin}: the proxy refused to connect ({reason}){}; ask its operator, or list {} in noProxy",
                if reason.contains("407") {
                    ": it requires a user and a password, as in proxy = \"http://user:password@host:port\""
                } else {
                    ""
                },
                endpoint.host()
            ),
            ureq::Error::Timeout(Timeout::Resolve) => {
                format!("cannot reach {origin}: no name server answered within {:?}", self.timeouts.connect)
            }
            ureq::Error::Timeout(Timeout::Connect) => {
                format!("cannot reach {origin}: no connection within {:?}", self.timeouts.connect)
            }
            ureq::Error::Timeout(Timeout::Global) => match self.timeouts.total {
                Some(total) => format!("cannot get an answer from {origin} within {total:?}"),
                None => format!("cannot get an answer from {origin} in time"),
            },
            ureq::Error::Timeout(_) => {
                format!("cannot get an answer from {origin}: nothing was received for {:?}", self.timeouts.stall)
            }
            // The C library of a static executable gives up earlier than our timeout.
            ureq::Error::Io(error) if is_unanswered_lookup(&error) => {
                format!("cannot reach {origin}: no name server answered; check this host's name servers")
            }
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => match proxy {
                Some(_) => format!("cannot reach {origin}: the proxy refused the connection; is it running there?"),
                None => format!("cannot reach {origin}: the connection was refused; is the gateway running there?"),
            },
            ureq::Error::Protocol(error) => {
                format!(
                    "cannot parse the answer of {origin}: {error}; check that it is the address of a gateway, and whether it must begin with https://"
                )
            }
            other => format!("cannot reach {origin}: {other}"),
        };
        anyhow::Error::new(NoResponse(text))
    }
}

/// Whether a name could not be looked up because no name server answered: the words of musl and of glibc for `EAI_AGAIN`, which has no
/// kind of its own.
pub(super) fn is_unanswered_lookup(error: &io::Error) -> bool {
    let text = error.to_string();
    let again = ["Try again", "Temporary failure in name resolution"];
    text.starts_with("failed to lookup address information") && again.iter().any(|words| text.ends_with(words))
}

/// Whether the connection was closed before any answer arrived.
fn is_closed(error: &ureq::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let kinds = [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof];
    matches!(error, ureq::Error::Io(error) if kinds.contains(&error.kind()))
}

/// Aborts all connections of a client, also while they wait; the client opens no new ones.
#[derive(Debug)]
pub struct Disconnector(Agent);

impl Disconnector {
    pub fn now(self) {
        self.0.shutdown();
    }
}

/// A redirect to an untrusted server.
#[derive(Debug)]
pub struct ForeignRedirect {
    from: String,
    to: String,
    why: &'static str,
}

impl std::fmt::Display for ForeignRedirect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot follow the redirect from {} to {}: {}", self.from, self.to, self.why)
    }
}

impl std::error::Error for ForeignRedirect {}

/// No answer, or an unintelligible one; a retry may succeed.
#[derive(Debug)]
struct NoResponse(String);

impl std::fmt::Display for NoResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoResponse {}

/// Whether an error may be temporary: a network failure, not a faulty request or an untrusted server.
pub fn is_transient(error: &anyhow::Error) -> bool {
    error.downcast_ref::<NoResponse>().is_some()
}

/// The target URL of a redirect, which must stay within the origin.
pub(super) fn redirected(from: &Endpoint, location: &str) -> Result<String> {
    let url = if location.starts_with('/') && !location.starts_with("//") {
        format!("{}{location}", from.origin())
    } else {
        location.to_owned()
    };
    let without_query = url.split(['?', '#']).next().unwrap_or_default();
    let target: Endpoint = without_query.parse().with_context(|| format!("cannot follow the redirect from {from}"))?;
    if from.is_https() && !target.is_https() {
        return Err(
            ForeignRedirect { from: from.origin(), to: target.origin(), why: "the target is plain http" }.into()
        );
    }
    if target.origin() != from.origin() {
        return Err(ForeignRedirect {
            from: from.origin(),
            to: target.origin(),
            why: "the target is a different host",
        }
        .into());
    }
    Ok(url)
}

/// An answer with an unread body.
#[derive(Debug)]
pub struct HttpResponse {
    origin: String,
    status: u16,
    headers: HeaderMap,
    body: Body,
    stall: Duration,
}

impl HttpResponse {
    fn new(from: &Endpoint, stall: Duration, response: Response<Body>) -> HttpResponse {
        let (parts, body) = response.into_parts();
        HttpResponse { origin: from.origin(), status: parts.status.as_u16(), headers: parts.headers, body, stall }
    }

    /// Whether the body is an HTML page; no gateway sends one for a file.
    pub fn is_html(&self) -> bool {
        let kind = self.header("content-type").unwrap_or_default().trim_start().to_ascii_lowercase();
        kind.starts_with("text/html") || kind.starts_with("application/xhtml")
    }

    pub fn status(&self) -> u16 {
        self.status
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// `Content-Length`, if sent.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length")?.trim().parse().ok()
    }

    /// The server's clock (`Date`).
    pub fn date(&self) -> Option<SystemTime> {
        httpdate::parse_http_date(self.header("date")?).ok()
    }

    /// `Retry-After`, at most an hour.
    pub fn retry_after(&self) -> Option<Duration> {
        let text = self.header("retry-after")?.trim();
        let wait = match text.parse() {
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).ok()?,
        };
        Some(wait.min(Duration::from_secs(3600)))
    }

    /// Reads the body; fails if it has more than `limit` bytes.
    pub fn bytes(self, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut reader = self.body.into_with_config().limit(u64::MAX).reader().take(limit + 1);
        reader.read_to_end(&mut bytes).with_context(|| format!("cannot read the answer of {}", self.origin))?;
        if bytes.len() as u64 > limit {
            bail!("cannot accept the answer of {}: it has more than {limit} bytes", self.origin);
        }
        Ok(bytes)
    }

    /// Reads the body as a stream; the caller limits its size.
    pub fn reader(self) -> impl Read {
        let window = self.stall * SLOW_STALLS;
        let body = self.body.into_with_config().limit(u64::MAX).reader();
        BodyReader { stall: self.stall, window, pace: MinimumRate::new(window, LEAST_PER_SECOND), body }
    }

    /// Converts an unexpected answer to an error with the status and the server's message.
    pub fn into_error(self) -> anyhow::Error {
        let (origin, status) = (self.origin.clone(), self.status);
        let message = self.bytes(4096).unwrap_or_default();
        let message = match serde_json::from_slice::<serde_json::Value>(&message) {
            Ok(json) => json.get("errorMessage").and_then(|text| text.as_str()).unwrap_or_default().to_owned(),
            Err(_) => String::from_utf8_lossy(&message).into_owned(),
        };
        let message: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
        match message.trim() {
            "" => anyhow!("{origin} answered {status}"),
            message => anyhow!("{origin} answered {status}: {message}"),
        }
    }
}

/// A body with a minimum rate and errors in plain words. TLS overhead of small records hides a low rate from the check below TLS.
struct BodyReader<R> {
    stall: Duration,
    window: Duration,
    pace: MinimumRate,
    body: R,
}

impl<R: Read> Read for BodyReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let why = match self.body.read(buffer) {
            Ok(amount) if amount == 0 || self.pace.is_fast_enough(amount as u64, Instant::now()) => return Ok(amount),
            Ok(_) => TooSlow { window: self.window }.to_string(),
            Err(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
                Some(ureq::Error::Timeout(Timeout::PerRead)) => format!("nothing was received for {:?}", self.stall),
                Some(ureq::Error::Timeout(_)) => "the time limit was exceeded".to_owned(),
                Some(ureq::Error::Other(inner)) if inner.is::<TooSlow>() => inner.to_string(),
                _ => return Err(error),
            },
        };
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    }
}
