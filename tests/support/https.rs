//! Hand-written requests over TLS: exactly these bytes are sent to a gateway, and any response is accepted.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::gateway::Gateway;

/// The limit of one request.
const LIMIT: Duration = Duration::from_secs(30);

/// A received response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Header lines as `name: value`, names in lower case.
    pub head: String,
    pub body: Vec<u8>,
}

impl Response {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_slice(&self.body) {
            Ok(value) => value,
            Err(error) => panic!("expected JSON ({error}): {} {:?}", self.head, String::from_utf8_lossy(&self.body)),
        }
    }
}

/// A client that trusts one gateway's certificate only.
#[derive(Clone)]
pub struct Https {
    address: String,
    config: Arc<ClientConfig>,
}

impl Https {
    pub fn to(gateway: &Gateway) -> Https {
        let certificate =
            CertificateDer::from_pem_file(gateway.path("tls/cert.pem")).expect("the gateway's certificate");
        let mut roots = RootCertStore::empty();
        roots.add(certificate).expect("a certificate can be a root");
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("there are such versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Https { address: gateway.url().trim_start_matches("https://").to_owned(), config: Arc::new(config) }
    }

    /// A request without body: a method, a path exactly as it is to be sent, further header lines.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, headers: &[&str]) -> Response {
        self.send(method, path, headers, b"")
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        self.ask("GET", path, &[])
    }

    /// A heartbeat, with the header that names the host.
    #[track_caller]
    pub fn heartbeat(&self, heartbeat: &serde_json::Value) -> Response {
        let id = format!("x-agent-id: {}", heartbeat["agentId"].as_str().unwrap_or_default());
        self.send("POST", "/api/heartbeat", &[&id], heartbeat.to_string().as_bytes())
    }

    /// A raw connection.
    pub fn connect(
        &self,
    ) -> Result<StreamOwned<ClientConnection, TcpStream>, Box<dyn std::error::Error + Send + Sync>> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let connection = ClientConnection::new(self.config.clone(), ServerName::try_from("127.0.0.1")?)?;
        Ok(StreamOwned::new(connection, stream))
    }

    #[track_caller]
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Response {
        let attempt = || -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
            let mut stream = self.connect()?;
            let mut request = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
            for header in headers {
                request += &format!("{header}\r\n");
            }
            request += &format!("content-length: {}\r\n\r\n", body.len());
            stream.write_all(request.as_bytes())?;
            stream.write_all(body)?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        };
        let answer = attempt().unwrap_or_else(|error| panic!("cannot ask {method} {path}: {error}"));
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("an answer has a head");
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("an answer has a status");
        let mut body = answer[end + 4..].to_vec();
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            body = unchunked(&body);
        }
        Response { status, head, body }
    }
}

fn unchunked(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|two| two == b"\r\n") {
        let size = usize::from_str_radix(String::from_utf8_lossy(&rest[..end]).trim(), 16).expect("a chunk has a size");
        if size == 0 {
            break;
        }
        body.extend(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 2 + size + 2..];
    }
    body
}
