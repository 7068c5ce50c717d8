//! The only way that this program speaks HTTP: blocking, with limits on time and size, and with errors an operator can act upon.
//!
//! The agent id goes to whom the caller calls an endpoint, never to another host; plain http goes nowhere unless the operator said
//! `--insecure`; a redirect is followed within its own origin only, and none is for a POST. One who says nothing, or next to nothing, is
//! given up.

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

/// Heartbeats at the usual intervals share a connection. One that was idle for longer may have been forgotten by a firewall in between, which
/// lets what is sent on it go nowhere.
const MAX_IDLE_AGE: Duration = Duration::from_secs(90);
/// The status line and all headers of an answer.
const MAX_HEADER_BYTES: usize = 8 << 10;
const MAX_REDIRECTS: usize = 5;
/// Connections to one host that are kept for the next request.
const MAX_KEPT: usize = 2;
/// So many times as long as it is waited for the next byte, it is waited for bytes that drip.
const DRIP_STALLS: u32 = 4;

/// How long is waited for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection to stand, TLS included; as long again for the host's name to be resolved.
    pub connect: Duration,
    /// For the next byte.
    pub stall: Duration,
    /// For the whole of an exchange. Who limits it exchanges little, and gets small buffers.
    pub total: Option<Duration>,
}

impl Timeouts {
    /// For heartbeats and other small questions.
    pub fn exchange() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            total: Some(Duration::from_secs(60)),
        }
    }

    /// For packages: as long as the single request allows, if only something arrives every `stall` (30 s is usual).
    pub fn download(stall: Duration) -> Timeouts {
        Timeouts { connect: Duration::from_secs(10), stall, total: None }
    }
}

/// Speaks to gateways and to hosts of packages; keeps connections open. Cheap to share between threads by reference.
#[derive(Debug)]
pub struct Client {
    agent: Agent,
    agent_id: Option<AgentId>,
    insecure: bool,
    proxies: Proxies,
    timeouts: Timeouts,
    judge: LoadedTrust,
    /// As certificates are checked, in a word for reports.
    by: &'static str,
    seen: SharedHandshakes,
    /// Connections that were begun.
    made: Arc<AtomicU64>,
}

/// Who asks, towards the one who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requester {
    /// This host: the other end is an endpoint of ours, and is told the agent id.
    Host,
    /// Nobody in particular: it is somebody else's server.
    Nobody,
}

impl Client {
    /// As [`Client::through`], without any proxy.
    #[cfg(test)]
    pub fn new(trust: &Trust, agent_id: Option<&AgentId>, timeouts: Timeouts) -> Result<Client> {
        Client::through(&Proxies::default(), trust, agent_id, timeouts)
    }

    /// Reads what `trust` names. `agent_id` is what the host calls itself towards its endpoints.
    pub fn through(proxies: &Proxies, trust: &Trust, agent_id: Option<&AgentId>, timeouts: Timeouts) -> Result<Client> {
        let insecure = *trust == Trust::Insecure;
        if insecure {
            tracing::warn!("certificates are not checked, and plain http is allowed (--insecure)");
        }
        let (seen, made) = (SharedHandshakes::default(), Arc::new(AtomicU64::new(0)));
        let judge = LoadedTrust::new(trust)?;
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
            .max_idle_connections_per_host(MAX_KEPT)
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
                .chain(StallConnector { window: timeouts.stall * DRIP_STALLS, made: Arc::clone(&made) })
                .chain(TlsConnector::new(judge.clone(), proxies.tls_authorities(), Arc::clone(&seen)));
        let agent = Agent::with_parts(config, connector, DefaultResolver::default());
        let (agent_id, proxies, by) = (agent_id.cloned(), proxies.clone(), trust.word());
        Ok(Client { agent, agent_id, insecure, proxies, timeouts, judge, by, seen, made })
    }

    /// By which somebody else ends what this client waits for.
    pub fn end(&self) -> Disconnector {
        Disconnector(self.agent.clone())
    }

    /// The public key that this client was the first to see and has recorded, under [`Trust::FirstContact`].
    pub fn first_contact(&self) -> Option<Fingerprint> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).first_contact
    }

    fn last_handshake(&self, endpoint: &Endpoint) -> Option<Handshake> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).last.get(&endpoint.origin()).copied()
    }

    /// When the chain of certificates ends that the endpoint has shown last, seconds since 1970.
    pub fn certificate_end(&self, endpoint: &Endpoint) -> Option<u64> {
        self.last_handshake(endpoint)?.end
    }

    /// How the endpoint's certificate is checked, as hosts report it.
    pub fn trust_report(&self, endpoint: &Endpoint) -> TrustReport {
        let end = self.certificate_end(endpoint).and_then(|end| i64::try_from(end).ok());
        let end = end.and_then(|end| jiff::Timestamp::from_second(end).ok());
        TrustReport {
            by: self.by.to_owned(),
            pins: self.judge.accepted(&endpoint.origin()).iter().map(ToString::to_string).collect(),
            certificate_end: end.map(|end| end.to_string()),
        }
    }

    /// Keeps what an endpoint has announced in an answer, which came over a connection that passed what is pinned: its public keys, the
    /// present one and those to come. What is no fingerprint is left out. Nothing is pinned that was not.
    pub fn learn(&self, endpoint: &Endpoint, announced: &[String]) -> Result<()> {
        let Some(Handshake { shown, .. }) = self.last_handshake(endpoint) else { return Ok(()) };
        let announced: Vec<Fingerprint> = announced.iter().filter_map(|pin| pin.parse().ok()).take(MAX_PINS).collect();
        self.judge.learn(&endpoint.origin(), shown, &announced)
    }

    /// Gets `path` (beginning with a slash, perhaps with a query) from an endpoint, to which the agent id is told.
    pub fn get(&self, endpoint: &Endpoint, path: &str, headers: &[(&str, &str)]) -> Result<HttpResponse> {
        self.got(endpoint, path, headers, Requester::Host, None)
    }

    /// Gets a file, or a part of it, the whole of it and all redirects within that time.
    pub fn download(
        &self,
        from: &Endpoint,
        path: &str,
        headers: &[(&str, &str)],
        asker: Requester,
        within: Duration,
    ) -> Result<HttpResponse> {
        self.got(from, path, headers, asker, Some(within))
    }

    /// Posts a JSON text to an endpoint.
    pub fn post_json(&self, endpoint: &Endpoint, path: &str, json: &[u8]) -> Result<HttpResponse> {
        let proxy = self.proxy_for(endpoint)?;
        let response = self.asked(|| {
            let mut request = self.agent.post(endpoint.url(path)).header(header::CONTENT_TYPE, "application/json");
            if let Some(id) = &self.agent_id {
                request = request.header(AGENT_ID_HEADER, id.as_str());
            }
            request.config().proxy(proxy.map(|proxy| proxy.proxy().clone())).build().send(json)
        });
        let response = response.map_err(|error| self.explain(endpoint, proxy, error))?;
        Ok(HttpResponse::new(endpoint, self.timeouts.stall, response))
    }

    /// Asks, and asks again where a connection that was kept turns out to be dead: the other end closed it meanwhile, or whatever lies
    /// in between forgot it, which shows only when something is sent on it. A new connection is tried once.
    ///
    /// Such a request was most likely not processed; where it was, nothing is lost: all that is asked so may be asked twice, and a
    /// heartbeat that came twice says the same.
    fn asked(&self, ask: impl Fn() -> Result<Response<Body>, ureq::Error>) -> Result<Response<Body>, ureq::Error> {
        for _ in 0..MAX_KEPT {
            let made = self.made.load(Ordering::SeqCst);
            match ask() {
                Err(error) if is_dead(&error) && made == self.made.load(Ordering::SeqCst) => {
                    tracing::debug!(%error, "a connection that was kept is dead; a new one is made");
                }
                outcome => return outcome,
            }
        }
        ask()
    }

    fn got(
        &self,
        from: &Endpoint,
        path: &str,
        headers: &[(&str, &str)],
        asker: Requester,
        within: Option<Duration>,
    ) -> Result<HttpResponse> {
        let proxy = self.proxy_for(from)?;
        let began = Instant::now();
        let mut url = from.url(path);
        for _ in 0..=MAX_REDIRECTS {
            let response = self.asked(|| {
                let mut request = self.agent.get(&url);
                for (name, value) in headers {
                    request = request.header(*name, *value);
                }
                if let Some(id) = self.agent_id.as_ref().filter(|_| asker == Requester::Host) {
                    request = request.header(AGENT_ID_HEADER, id.as_str());
                }
                let total = within.map(|within| within.saturating_sub(began.elapsed())).or(self.timeouts.total);
                let proxy = proxy.map(|proxy| proxy.proxy().clone());
                request.config().proxy(proxy).timeout_global(total).build().call()
            });
            let response = response.map_err(|error| self.explain(from, proxy, error))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(HttpResponse::new(from, self.timeouts.stall, response));
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            url = redirected(from, location.context("cannot follow a redirect that does not say where to")?)?;
        }
        bail!("cannot follow more than {MAX_REDIRECTS} redirects of {}", from.origin())
    }

    /// Refuses plain http, and says which proxy is used.
    fn proxy_for(&self, endpoint: &Endpoint) -> Result<Option<&ProxyUrl>> {
        if !endpoint.is_https() && !self.insecure {
            bail!(
                "cannot use {endpoint}: plain http shows and lets anyone change what is said; give an https:// address, or \
                 `--insecure` to use it all the same"
            );
        }
        self.proxies.of(endpoint)
    }

    /// What went wrong, in words for an operator.
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
                "cannot reach {origin}: the name {} is not known; check {} and this host's name servers",
                proxy.map_or(endpoint.host(), |proxy| proxy.proxy().host()),
                if proxy.is_some() { "the proxy" } else { "the endpoint" }
            ),
            ureq::Error::ConnectProxyFailed(reason) => format!(
                "cannot reach {origin}: the proxy does not connect ({reason}){}; ask who runs it, or list {} in noProxy",
                if reason.contains("407") {
                    ": it wants a user and a password, as in proxy = \"http://user:password@host:port\""
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
                format!("cannot get an answer from {origin}: nothing came for {:?}", self.timeouts.stall)
            }
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => match proxy {
                Some(_) => format!("cannot reach {origin}: the proxy refused the connection; does it run there?"),
                None => format!("cannot reach {origin}: the connection was refused; is the gateway running there?"),
            },
            ureq::Error::Protocol(error) => format!(
                "cannot understand the answer of {origin}: {error}; is it an https:// endpoint, or no gateway at all?"
            ),
            other => format!("cannot reach {origin}: {other}"),
        };
        anyhow::Error::new(NoResponse(text))
    }
}

/// Whether an error says that the connection has ended, before any answer came on it.
fn is_dead(error: &ureq::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let kinds = [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof];
    matches!(error, ureq::Error::Io(error) if kinds.contains(&error.kind()))
}

/// Ends all connections of a client, in the middle of what they wait for; it makes no new ones.
#[derive(Debug)]
pub struct Disconnector(Agent);

impl Disconnector {
    pub fn now(self) {
        self.0.shutdown();
    }
}

/// A redirect to somebody else, whom nobody told us to trust.
#[derive(Debug)]
pub struct ForeignRedirect {
    from: String,
    to: String,
    why: &'static str,
}

impl std::fmt::Display for ForeignRedirect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot follow a redirect of {} to {}: {}", self.from, self.to, self.why)
    }
}

impl std::error::Error for ForeignRedirect {}

/// No answer came, or none that could be understood; another time one may.
#[derive(Debug)]
struct NoResponse(String);

impl std::fmt::Display for NoResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoResponse {}

/// Whether a failure to get an answer may pass by itself: it lies in the network, not in what was asked or in who was not trusted.
pub fn may_pass(error: &anyhow::Error) -> bool {
    error.downcast_ref::<NoResponse>().is_some()
}

/// Where a redirect leads, if it stays within the origin.
pub(super) fn redirected(from: &Endpoint, location: &str) -> Result<String> {
    let url = if location.starts_with('/') && !location.starts_with("//") {
        format!("{}{location}", from.origin())
    } else {
        location.to_owned()
    };
    let without_query = url.split(['?', '#']).next().unwrap_or_default();
    let target: Endpoint = without_query.parse().with_context(|| format!("cannot follow a redirect of {from}"))?;
    if from.is_https() && !target.is_https() {
        return Err(ForeignRedirect { from: from.origin(), to: target.origin(), why: "it is plain http" }.into());
    }
    if target.origin() != from.origin() {
        return Err(ForeignRedirect { from: from.origin(), to: target.origin(), why: "it is another host" }.into());
    }
    Ok(url)
}

/// An answer whose body has not been read yet.
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

    /// Whether it is a page for people, which no gateway sends where a file was asked for.
    pub fn is_page(&self) -> bool {
        let kind = self.header("content-type").unwrap_or_default().trim_start().to_ascii_lowercase();
        kind.starts_with("text/html") || kind.starts_with("application/xhtml")
    }

    pub fn status(&self) -> u16 {
        self.status
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Bytes of the body, where the other end says so.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length")?.trim().parse().ok()
    }

    /// What the other end's clock said.
    pub fn date(&self) -> Option<SystemTime> {
        httpdate::parse_http_date(self.header("date")?).ok()
    }

    /// How long the other end asks to be left alone, at most an hour.
    pub fn retry_after(&self) -> Option<Duration> {
        let text = self.header("retry-after")?.trim();
        let asked = match text.parse() {
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).ok()?,
        };
        Some(asked.min(Duration::from_secs(3600)))
    }

    /// The body, of at most `limit` bytes.
    pub fn bytes(self, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut reader = self.body.into_with_config().limit(u64::MAX).reader().take(limit + 1);
        reader.read_to_end(&mut bytes).with_context(|| format!("cannot read the answer of {}", self.origin))?;
        if bytes.len() as u64 > limit {
            bail!("cannot take the answer of {}: it has more than {limit} bytes", self.origin);
        }
        Ok(bytes)
    }

    /// The body as it comes; the caller limits it.
    pub fn reader(self) -> impl Read {
        let window = self.stall * DRIP_STALLS;
        let body = self.body.into_with_config().limit(u64::MAX).reader();
        BodyReader { stall: self.stall, window, pace: MinimumRate::new(window, LEAST_PER_SECOND), body }
    }

    /// For an answer that is not what was asked for: the status, and what the other end says about it.
    pub fn refused(self) -> anyhow::Error {
        let (origin, status) = (self.origin.clone(), self.status);
        let said = self.bytes(4096).unwrap_or_default();
        let said = match serde_json::from_slice::<serde_json::Value>(&said) {
            Ok(json) => json.get("errorMessage").and_then(|text| text.as_str()).unwrap_or_default().to_owned(),
            Err(_) => String::from_utf8_lossy(&said).into_owned(),
        };
        let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
        match said.trim() {
            "" => anyhow!("{origin} answered {status}"),
            said => anyhow!("{origin} answered {status}: {said}"),
        }
    }
}

/// A body whose errors are told plainly, and that must keep its pace: small records make a trickle look like more below TLS.
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
                Some(ureq::Error::Timeout(Timeout::PerRead)) => format!("nothing came for {:?}", self.stall),
                Some(ureq::Error::Timeout(_)) => "the time for it is over".to_owned(),
                Some(ureq::Error::Other(inner)) if inner.is::<TooSlow>() => inner.to_string(),
                _ => return Err(error),
            },
        };
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    }
}
