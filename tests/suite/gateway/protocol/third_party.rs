//! A third-party gateway: written from the protocol's description only, and sharing no type with ours.
//!
//! Plain HTTP, one thread for each connection, unstructured JSON; packages are packed by `tar` and `zstd` and signed by `minisign`. It is
//! minimal on purpose: what it omits is not required of any gateway.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use minisign::{KeyPair, SecretKey};
use serde_json::{Value, json};

use crate::support::wait::wait_for;

/// The reply to a heartbeat.
#[derive(Clone)]
pub enum Reply {
    /// A 200 with this document, in which a missing `agentId` is added.
    Json(Value),
    /// A raw reply: the status with further header lines, and the body.
    Raw(String, Vec<u8>),
}

/// A received heartbeat.
#[derive(Clone)]
pub struct ReceivedHeartbeat {
    pub at: Instant,
    pub body: Value,
}

#[derive(Default)]
struct Shared {
    files: BTreeMap<String, Vec<u8>>,
    /// By package: version, file.
    offers: BTreeMap<String, (String, String)>,
    reply: Option<Reply>,
    heartbeats: Vec<ReceivedHeartbeat>,
}

pub struct ThirdParty {
    pub url: String,
    public_key: String,
    secret_key: SecretKey,
    shared: Arc<Mutex<Shared>>,
}

impl ThirdParty {
    pub fn start() -> ThirdParty {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let shared = Arc::new(Mutex::new(Shared::default()));
        let for_all = shared.clone();
        // It ends with the test program: a host's connection may outlive the test.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = for_all.clone();
                thread::spawn(move || while serve(&stream, &shared).is_some() {});
            }
        });
        let KeyPair { pk, sk } = KeyPair::generate_unencrypted_keypair().expect("a key can be created");
        let public_key = pk.to_box().expect("a key has a text").to_string();
        ThirdParty { url, public_key, secret_key: sk, shared }
    }

    /// Packs, signs and serves `files` (path, mode, content) as the release `name` `version`; returns the file's name and bytes.
    pub fn publish(&self, name: &str, version: &str, files: &[(&str, u32, &[u8])]) -> (String, Vec<u8>) {
        let mut tar = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).expect("zstd works"));
        for (path, mode, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(*mode);
            tar.append_data(&mut header, path, *content).expect("it goes into memory");
        }
        let package = tar.into_inner().and_then(zstd::Encoder::finish).expect("it goes into memory");
        let arch = if cfg!(target_arch = "x86") { "386" } else { "amd64" };
        let binding = format!("name={name} version={version} os=linux arch={arch} epoch=1");
        let signature = minisign::sign(None, &self.secret_key, Cursor::new(&package), Some(&binding), None);
        let file = format!("{name}-{version}_linux_{arch}.tar.zst");
        let mut shared = self.shared.lock().expect("no thread panicked");
        shared.files.insert(format!("{file}.minisig"), signature.expect("the key signs").to_string().into_bytes());
        shared.files.insert(file.clone(), package.clone());
        shared.offers.insert(name.to_owned(), (version.to_owned(), file.clone()));
        (file, package)
    }

    /// The reply to every heartbeat from now on.
    pub fn reply(&self, reply: Reply) {
        self.shared.lock().expect("no thread panicked").reply = Some(reply);
    }

    pub fn answer(&self, answer: Value) {
        self.reply(Reply::Json(answer));
    }

    /// All heartbeats so far.
    pub fn heartbeats(&self) -> Vec<ReceivedHeartbeat> {
        self.shared.lock().expect("no thread panicked").heartbeats.clone()
    }

    /// Waits for a new heartbeat that `wanted` accepts.
    #[track_caller]
    pub fn wait_for_heartbeat(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let seen = self.heartbeats().len();
        wait_for(what, Duration::from_secs(30), || {
            self.heartbeats()[seen..].iter().map(|heartbeats| &heartbeats.body).find(|body| wanted(body)).cloned()
        })
    }

    /// Writes the public key to a file, and returns its path.
    pub fn public_key(&self, file: &Path) -> String {
        std::fs::write(file, &self.public_key).expect("a temporary directory can be written");
        file.display().to_string()
    }

    /// The bytes of a served file.
    pub fn file(&self, name: &str) -> Vec<u8> {
        self.shared.lock().expect("no thread panicked").files[name].clone()
    }
}

/// Handles one request; `None` if the connection is to be closed.
fn serve(mut stream: &TcpStream, shared: &Mutex<Shared>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let (method, path) = (line.split(' ').next()?.to_owned(), line.split(' ').nth(1)?.to_owned());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        match header.trim_end().to_ascii_lowercase().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().ok()?,
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;

    let mut shared = shared.lock().ok()?;
    let (status, content) = match (method.as_str(), path.split('?').next()?) {
        ("POST", "/api/heartbeat") => {
            let heartbeat: Value = serde_json::from_slice(&body).ok()?;
            let id = heartbeat["agentId"].clone();
            shared.heartbeats.push(ReceivedHeartbeat { at: Instant::now(), body: heartbeat });
            match shared.reply.clone().unwrap_or_else(|| Reply::Json(json!({ "interval": 1 }))) {
                Reply::Raw(status, content) => (status, content),
                Reply::Json(mut answer) => {
                    answer.as_object_mut()?.entry("agentId").or_insert(id);
                    ("200 OK".to_owned(), answer.to_string().into_bytes())
                }
            }
        }
        ("GET", path) => {
            let offer = path.strip_prefix("/api/releases/").and_then(|name| shared.offers.get(name)).map(|offer| {
                let package = &shared.files[&offer.1];
                let digest = <sha2::Sha256 as sha2::Digest>::digest(package);
                let sha256: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
                let (version, file) = offer;
                json!({ "version": version, "file": file, "sha256": sha256, "size": package.len() })
                    .to_string()
                    .into_bytes()
            });
            let file = || shared.files.get(path.strip_prefix("/api/download/")?).cloned();
            match offer.or_else(file) {
                Some(content) => ("200 OK".to_owned(), content),
                None => ("404 Not Found".to_owned(), vec![]),
            }
        }
        _ => ("405 Method Not Allowed".to_owned(), vec![]),
    };
    drop(shared);
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", content.len());
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content)).ok()
}
