//! The TLS connector for HTTP. It verifies certificates as [`super::Trust`] says, again for each connection.
//!
//! It replaces ureq's own connector, which can neither pin a certificate nor report why one was rejected. Sessions are not resumed:
//! connections are persistent instead, and a withdrawn certificate is noticed at the next connection.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, ClientConnection, OtherError, StreamOwned};
use ureq::http::Uri;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use super::pins::ServerIdentity;
use super::trust::{CertificateVerifier, Distrust, LoadedTrust, identity_of, pin_first_contact};
use super::{Fingerprint, end_of};

/// A TLS configuration that accepts any certificate. Only for requests that carry no secret and whose answer proves nothing: the health
/// check of a sub-agent, which runs on this host with a certificate that often has a different name.
pub fn unverified_tls() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    client_config(CertificateVerifier::new(String::new(), LoadedTrust::Insecure, Arc::clone(&provider)), provider)
}

fn client_config(verifier: CertificateVerifier, provider: Arc<CryptoProvider>) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Wraps connections to `https` addresses in TLS; leaves others unchanged.
pub(super) struct TlsConnector {
    trust: LoadedTrust,
    provider: Arc<CryptoProvider>,
    /// Host and port of proxies reached over TLS; the system's certificates verify them, not the gateway's trust.
    proxies: Vec<String>,
    system: OnceLock<LoadedTrust>,
    handshakes: SharedHandshakes,
}

/// Shared with the client.
pub(super) type SharedHandshakes = Arc<Mutex<Handshakes>>;

/// Results of handshakes.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    /// The public key pinned at a first contact in this process.
    pub(super) first_contact: Option<Fingerprint>,
    /// The last handshake of each origin.
    pub(super) last: BTreeMap<String, Handshake>,
}

/// A successful handshake.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handshake {
    pub(super) identity: ServerIdentity,
    /// Earliest expiry in the chain, seconds since 1970.
    pub(super) end: Option<u64>,
}

/// Limit of recorded origins.
const MAX_ORIGINS: usize = 100;

impl TlsConnector {
    pub(super) fn new(trust: LoadedTrust, proxies: Vec<String>, handshakes: SharedHandshakes) -> TlsConnector {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        TlsConnector { trust, provider, proxies, system: OnceLock::new(), handshakes }
    }

    fn trust_for(&self, uri: &Uri) -> &LoadedTrust {
        let is_proxy = |authority: &str| self.proxies.iter().any(|proxy| proxy == authority);
        match uri.authority() {
            Some(authority) if is_proxy(authority.as_str()) => self.system.get_or_init(LoadedTrust::system),
            _ => &self.trust,
        }
    }

    fn configuration(&self, origin: &str, trust: &LoadedTrust) -> Result<ClientConfig, rustls::Error> {
        let verifier = CertificateVerifier::new(origin.to_owned(), trust.clone(), Arc::clone(&self.provider));
        client_config(verifier, Arc::clone(&self.provider))
    }

    /// Runs after the handshake: a server is pinned only after it has proved that it holds the key.
    fn record(&self, origin: &str, trust: &LoadedTrust, chain: &[CertificateDer<'_>]) -> Result<()> {
        let leaf = chain.first().context("the server sent no certificate")?;
        let identity = identity_of(leaf);
        let is_first = match trust {
            LoadedTrust::FirstContact(pins) => pin_first_contact(pins, origin, identity)?,
            LoadedTrust::Authorities { .. } | LoadedTrust::Pins { .. } | LoadedTrust::Insecure => false,
        };
        let mut handshakes = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        if is_first {
            tracing::warn!(origin, key = %identity.pin(), "pinned the public key of the gateway at first contact");
            handshakes.first_contact = Some(identity.pin());
        }
        if handshakes.last.len() < MAX_ORIGINS || handshakes.last.contains_key(origin) {
            handshakes.last.insert(origin.to_owned(), Handshake { identity, end: end_of(chain) });
        }
        Ok(())
    }
}

impl std::fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConnector").field("trust", &self.trust).finish_non_exhaustive()
    }
}

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Either<In, TlsTransport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        let Some(plain) = chained else { return Ok(None) };
        if !details.needs_tls() || plain.is_tls() {
            return Ok(Some(Either::A(plain)));
        }
        let origin = origin_of(details.uri);
        let trust = self.trust_for(details.uri);
        let name = server_name(details.uri).map_err(|error| distrust_error(&origin, error))?;
        let config = self.configuration(&origin, trust).map_err(|error| distrust_error(&origin, error))?;
        let mut session =
            ClientConnection::new(Arc::new(config), name).map_err(|error| distrust_error(&origin, error))?;

        let mut socket = TransportAdapter::new(plain.boxed(), Arc::clone(&details.current_time));
        socket.set_timeout(details.timeout);
        session.complete_io(&mut socket).map_err(|error| handshake_error(&origin, error))?;

        let chain = session.peer_certificates().unwrap_or_default();
        self.record(&origin, trust, chain).map_err(|error| distrust_error(&origin, error))?;
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Either::B(TlsTransport { buffers, stream: StreamOwned::new(session, socket) })))
    }
}

fn origin_of(uri: &Uri) -> String {
    format!("https://{}:{}", uri.host().unwrap_or_default().to_ascii_lowercase(), uri.port_u16().unwrap_or(443))
}

fn server_name(uri: &Uri) -> Result<ServerName<'static>> {
    let host = uri.host().unwrap_or_default();
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(bare.to_owned()).with_context(|| format!("{bare} is not a valid host name or IP address"))
}

/// Converts any error to the connector's error type; keeps a [`Distrust`] as it is.
fn distrust_error(origin: &str, error: impl Into<anyhow::Error>) -> ureq::Error {
    let error = error.into();
    let distrust = match error.downcast::<Distrust>() {
        Ok(distrust) => distrust,
        Err(error) => Distrust::unusable(origin, None, format!("{error:#}")),
    };
    ureq::Error::Other(Box::new(distrust))
}

/// Extracts the cause of a failed handshake from its wrappers.
fn handshake_error(origin: &str, error: io::Error) -> ureq::Error {
    let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            let text = format!(
                "TLS handshake with {origin} failed: the server closed the connection; is it an http:// endpoint?"
            );
            return ureq::Error::Other(Box::new(HandshakeFailed(text)));
        }
        // A timeout or a broken connection; ureq unwraps its own errors.
        return error.into();
    };
    match inner {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(other))) => {
            match other.downcast_ref::<Distrust>() {
                Some(distrust) => ureq::Error::Other(Box::new(distrust.clone())),
                None => distrust_error(origin, inner.clone()),
            }
        }
        rustls::Error::InvalidMessage(_) => ureq::Error::Other(Box::new(HandshakeFailed(format!(
            "TLS handshake with {origin} failed: the answer is not TLS; is it an http:// endpoint?"
        )))),
        rustls::Error::InvalidCertificate(_) => distrust_error(origin, inner.clone()),
        other => ureq::Error::Other(Box::new(HandshakeFailed(format!("TLS handshake with {origin} failed: {other}")))),
    }
}

/// The handshake failed before a certificate was verified.
#[derive(Debug)]
pub(super) struct HandshakeFailed(String);

impl std::fmt::Display for HandshakeFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for HandshakeFailed {}

/// An established TLS connection, for ureq.
pub(super) struct TlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.stream.sock.set_timeout(timeout);
        let TlsTransport { buffers, stream } = self;
        stream.write_all(&buffers.output()[..amount])?;
        Ok(stream.flush()?)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.stream.sock.set_timeout(timeout);
        let TlsTransport { buffers, stream } = self;
        let amount = stream.read(buffers.input_append_buf())?;
        buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.sock.get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl std::fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsTransport").field("over", self.stream.sock.get_ref()).finish()
    }
}
