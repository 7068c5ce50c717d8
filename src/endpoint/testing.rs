//! An HTTP server on loopback for tests, with or without TLS, that breaks connections on demand.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::Endpoint;

pub struct ReceivedRequest {
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

#[derive(Default)]
pub struct CannedResponse {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Closes the connection after this many bytes of the body.
    pub cut_after: Option<usize>,
    /// Sends this many bytes of the body at once, then single bytes with a pause before each.
    pub drip: Option<(usize, std::time::Duration)>,
    /// Sends no content-length; the body ends with the connection.
    pub no_length: bool,
}

impl CannedResponse {
    pub fn ok(body: impl Into<Vec<u8>>) -> CannedResponse {
        CannedResponse { status: 200, body: body.into(), ..CannedResponse::default() }
    }

    pub fn status(status: u16) -> CannedResponse {
        CannedResponse { status, ..CannedResponse::default() }
    }
}

/// A server's certificate and private key.
pub struct TestIdentity {
    pub certificate: CertificateDer<'static>,
    pub key: Vec<u8>,
    pub pem: String,
}

pub fn self_signed(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> TestIdentity {
    self_signed_by(&KeyPair::generate().unwrap(), names, change)
}

pub fn self_signed_by(key: &KeyPair, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> TestIdentity {
    let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    change(&mut params);
    let certificate = params.self_signed(key).unwrap();
    TestIdentity { certificate: certificate.der().clone(), key: key.serialize_der(), pem: certificate.pem() }
}

/// The PEM of an authority, and a certificate that it has issued.
pub fn issued(names: &[&str]) -> (String, TestIdentity) {
    let (authority_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key).unwrap();
    let leaf = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    let leaf = leaf.signed_by(&key, &Issuer::new(params, authority_key)).unwrap();
    (authority.pem(), TestIdentity { certificate: leaf.der().clone(), key: key.serialize_der(), pem: leaf.pem() })
}

/// Serves until it is dropped.
pub struct Server {
    address: SocketAddr,
    tls: bool,
    stopping: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn plain(answer: impl Fn(&ReceivedRequest) -> CannedResponse + Send + Sync + 'static) -> Server {
        Server::start("127.0.0.1:0".parse().unwrap(), None, answer)
    }

    pub fn tls(
        identity: &TestIdentity,
        answer: impl Fn(&ReceivedRequest) -> CannedResponse + Send + Sync + 'static,
    ) -> Server {
        Server::tls_at("127.0.0.1:0".parse().unwrap(), identity, answer)
    }

    /// Presents the certificate even if the key does not belong to it.
    pub fn tls_with_resolver(
        identity: &TestIdentity,
        answer: impl Fn(&ReceivedRequest) -> CannedResponse + Send + Sync + 'static,
    ) -> Server {
        let key = PrivatePkcs8KeyDer::from(identity.key.clone()).into();
        let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
        let shown = CertifiedKey::new(vec![identity.certificate.clone()], key);
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
        Server::start("127.0.0.1:0".parse().unwrap(), Some(Arc::new(config)), answer)
    }

    pub fn tls_at(
        address: SocketAddr,
        identity: &TestIdentity,
        answer: impl Fn(&ReceivedRequest) -> CannedResponse + Send + Sync + 'static,
    ) -> Server {
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![identity.certificate.clone()], PrivatePkcs8KeyDer::from(identity.key.clone()).into())
            .unwrap();
        Server::start(address, Some(Arc::new(config)), answer)
    }

    fn start(
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
        answer: impl Fn(&ReceivedRequest) -> CannedResponse + Send + Sync + 'static,
    ) -> Server {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let stopping = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(AtomicUsize::new(0));
        let answer = Arc::new(answer);
        let (is_tls, stop, count) = (tls.is_some(), Arc::clone(&stopping), Arc::clone(&connections));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                count.fetch_add(1, Ordering::SeqCst);
                let (tls, answer) = (tls.clone(), Arc::clone(&answer));
                std::thread::spawn(move || match tls {
                    Some(tls) => serve(StreamOwned::new(ServerConnection::new(tls).unwrap(), stream), &*answer),
                    None => serve(stream, &*answer),
                });
            }
        });
        Server { address, tls: is_tls, stopping, connections, thread: Some(thread) }
    }

    pub fn endpoint(&self) -> Endpoint {
        self.endpoint_by("127.0.0.1")
    }

    pub fn endpoint_by(&self, host: &str) -> Endpoint {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{host}:{}", self.address.port()).parse().unwrap()
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(stream: impl Read + Write, answer: &dyn Fn(&ReceivedRequest) -> CannedResponse) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream) {
        let response = answer(&request);
        let mut head = match response.no_length {
            true => format!("HTTP/1.1 {} Status\r\nconnection: close\r\n", response.status),
            false => format!("HTTP/1.1 {} Status\r\ncontent-length: {}\r\n", response.status, response.body.len()),
        };
        for (name, value) in &response.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let sent = &response.body[..response.cut_after.unwrap_or(response.body.len())];
        let stream = stream.get_mut();
        let written = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(b"\r\n"));
        if let Some((at_once, pause)) = response.drip {
            let (first, rest) = sent.split_at(at_once);
            let mut dripped = written.and_then(|()| stream.write_all(first));
            for byte in rest.chunks(1) {
                dripped = dripped.and_then(|()| stream.flush()).and_then(|()| stream.write_all(byte));
                if dripped.is_err() {
                    return;
                }
                crate::platform::pause(pause);
            }
            continue;
        }
        if written.and_then(|()| stream.write_all(sent)).and_then(|()| stream.flush()).is_err() {
            return;
        }
        if response.cut_after.is_some() || response.no_length {
            return;
        }
    }
}

fn read(stream: &mut impl BufRead) -> Option<ReceivedRequest> {
    let mut line = String::new();
    stream.read_line(&mut line).ok().filter(|amount| *amount > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            None => break,
        };
    }
    let mut body = vec![0; headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    Some(ReceivedRequest { method, path, headers, body })
}
