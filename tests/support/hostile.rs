//! A hostile gateway: it has the certificate and the depot of a gateway that a host has joined, and sends whatever a test defines.
//!
//! Other paths are served from the depot, and every heartbeat gets the last defined answer. Every request is recorded with all headers.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use super::gateway::Gateway;
use super::host::SOON;
use super::wait::wait_for;

/// The limit of a connection that sends nothing.
const IDLE: Duration = Duration::from_secs(120);
/// The chunk size and the total of endless data: a host that accepts all of it has failed its test.
const CHUNK: usize = 64 << 10;
const ENDLESS: u64 = 1 << 30;

/// A received request.
#[derive(Debug, Clone)]
pub struct HostileRequest {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// A reply.
#[derive(Debug, Clone)]
pub struct HostileReply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Body,
}

#[derive(Debug, Clone)]
pub enum Body {
    Whole(Vec<u8>),
    /// These bytes under another length, then the end of the connection.
    Lying {
        length: u64,
        bytes: Vec<u8>,
    },
    /// Never ends, and has no length.
    Endless,
}

impl HostileReply {
    pub fn ok(body: impl Into<Vec<u8>>) -> HostileReply {
        HostileReply { status: 200, headers: Vec::new(), body: Body::Whole(body.into()) }
    }

    pub fn status(status: u16) -> HostileReply {
        HostileReply { status, ..HostileReply::ok("") }
    }

    pub fn redirect(to: String) -> HostileReply {
        HostileReply { headers: vec![("location", to)], ..HostileReply::status(302) }
    }
}

type Route = Arc<dyn Fn(&HostileRequest) -> HostileReply + Send + Sync>;

#[derive(Default)]
struct Shared {
    depot: PathBuf,
    routes: BTreeMap<String, Route>,
    generation: u64,
    answer: Value,
    answer_headers: Vec<(&'static str, String)>,
    requests: Vec<HostileRequest>,
}

/// It ends with the test program: a host's connection may outlive the test.
pub struct Hostile {
    url: String,
    shared: Arc<Mutex<Shared>>,
}

impl Hostile {
    /// Starts it with the gateway's certificate on its own port; it orders nothing yet.
    pub fn in_place_of(gateway: &Gateway) -> Hostile {
        let certificate =
            CertificateDer::from_pem_file(gateway.path("tls/cert.pem")).expect("the gateway's certificate");
        let key = PrivateKeyDer::from_pem_file(gateway.path("tls/key.pem")).expect("the gateway's key");
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("there are such versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("the key is the certificate's");
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let url = format!("https://{}", listener.local_addr().expect("it is bound"));
        let depot = gateway.path("depot");
        let shared = Arc::new(Mutex::new(Shared { depot, answer: json!({"interval": 1}), ..Shared::default() }));
        let for_all = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, shared) = (Arc::clone(&config), Arc::clone(&for_all));
                thread::spawn(move || {
                    let _ = stream.set_read_timeout(Some(IDLE));
                    let Ok(session) = ServerConnection::new(config) else { return };
                    let mut stream = BufReader::new(StreamOwned::new(session, stream));
                    while serve(&mut stream, &shared).is_some() {}
                });
            }
        });
        Hostile { url, shared }
    }

    /// `https://127.0.0.1:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Sets a new generation of the desired state, and returns it.
    pub fn want(&self, agents: Value, complete: bool) -> u64 {
        let mut shared = lock(&self.shared);
        shared.generation += 1;
        shared.answer = json!({
            "lineage": "hostile", "generation": shared.generation, "interval": 1, "removalDelay": 0, "complete": complete,
            "agents": agents,
        });
        shared.generation
    }

    /// The answer to every heartbeat from now on; a missing agent id is added.
    pub fn answer(&self, answer: Value, headers: Vec<(&'static str, String)>) {
        let mut shared = lock(&self.shared);
        (shared.answer, shared.answer_headers) = (answer, headers);
    }

    /// The reply for a path from now on.
    pub fn on(&self, path: &str, answer: impl Fn(&HostileRequest) -> HostileReply + Send + Sync + 'static) {
        lock(&self.shared).routes.insert(path.to_owned(), Arc::new(answer));
    }

    /// Serves this package and signature instead of those of the depot.
    pub fn serve(&self, file: &str, package: &[u8], signature: &str) {
        for (name, content) in [(file.to_owned(), package), (format!("{file}.minisig"), signature.as_bytes())] {
            let content = content.to_vec();
            self.on(&format!("/api/download/{name}"), move |_| HostileReply::ok(content.clone()));
        }
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<HostileRequest> {
        lock(&self.shared).requests.clone()
    }

    /// The bodies of all heartbeats so far.
    pub fn heartbeats(&self) -> Vec<Value> {
        let requests = self.requests();
        let heartbeats = requests.iter().filter(|request| request.path == "/api/heartbeat");
        heartbeats.map(|request| serde_json::from_slice(&request.body).expect("a heartbeat is JSON")).collect()
    }

    /// Waits for an event, in any past or future heartbeat, that `wanted` accepts.
    #[track_caller]
    pub fn wait_for_event(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(what, SOON, || {
            let heartbeats = self.heartbeats();
            let mut events =
                heartbeats.iter().flat_map(|heartbeat| heartbeat["events"].as_array().into_iter().flatten());
            events.find(|event| wanted(event)).cloned()
        })
    }

    /// Waits for a new heartbeat that `wanted` accepts.
    #[track_caller]
    pub fn wait_for_heartbeat(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let seen = self.heartbeats().len();
        wait_for(what, SOON, || self.heartbeats().into_iter().skip(seen).find(|heartbeat| wanted(heartbeat)))
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().expect("no thread panicked")
}

type Stream = BufReader<StreamOwned<ServerConnection, TcpStream>>;

/// Handles one request; `None` if the connection ends.
fn serve(stream: &mut Stream, shared: &Mutex<Shared>) -> Option<()> {
    let request = read(stream)?;
    let reply = reply(&request, shared);
    let length = match &reply.body {
        Body::Whole(bytes) => Some(bytes.len() as u64),
        Body::Lying { length, .. } => Some(*length),
        Body::Endless => None,
    };
    let mut head = format!("HTTP/1.1 {} Told\r\n", reply.status);
    if let Some(length) = length {
        head += &format!("content-length: {length}\r\n");
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let stream = stream.get_mut();
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    match reply.body {
        Body::Whole(bytes) => stream.write_all(&bytes).and_then(|()| stream.flush()).ok(),
        Body::Lying { bytes, .. } => {
            stream.write_all(&bytes).and_then(|()| stream.flush()).ok()?;
            None
        }
        Body::Endless => {
            let chunk = vec![b'x'; CHUNK];
            for _ in 0..ENDLESS / CHUNK as u64 {
                stream.write_all(&chunk).ok()?;
            }
            None
        }
    }
}

fn reply(request: &HostileRequest, shared: &Mutex<Shared>) -> HostileReply {
    let route = {
        let mut shared = lock(shared);
        shared.requests.push(request.clone());
        shared.routes.get(&request.path).cloned()
    };
    if let Some(route) = route {
        return route(request);
    }
    let shared = lock(shared);
    if request.path == "/api/heartbeat" {
        let mut answer = shared.answer.clone();
        if answer.get("agentId").is_none() {
            answer["agentId"] = request.headers.get("x-agent-id").cloned().unwrap_or_default().into();
        }
        return HostileReply { headers: shared.answer_headers.clone(), ..HostileReply::ok(answer.to_string()) };
    }
    let file = request.path.strip_prefix("/api/download/").map(|name| fs::read(shared.depot.join(name)));
    match file {
        Some(Ok(bytes)) => HostileReply::ok(bytes),
        _ => HostileReply::status(404),
    }
}

fn read(stream: &mut Stream) -> Option<HostileRequest> {
    let mut line = String::new();
    stream.read_line(&mut line).ok().filter(|amount| *amount > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = vec![0; headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    Some(HostileRequest { method, path, headers, body })
}
