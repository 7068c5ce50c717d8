//! A faulty network on loopback: a proxy between a host and its gateway that uses the gateway's certificate, forwards requests, and
//! manipulates the responses.
//!
//! It terminates TLS on both sides, so that it can also change the HTTP content. A plan decides the fault of each request; it is a function
//! of the request and of the number of earlier requests for its path. [`random`] creates a plan from a seed, the same for the same seed.
//! The proxy counts what it sent for each path.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::gateway::Gateway;
use super::https::Https;

/// A small socket buffer, so that a reset loses little data.
const SEND_BUFFER_BYTES: usize = 32 << 10;
const CHUNK_BYTES: usize = 16 << 10;
/// The poll interval of a waiting connection.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The limit of a connection that sends nothing.
const MUTE: Duration = Duration::from_secs(120);

/// The fault of one response. Offsets are counted in the sent body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// None: the response is forwarded unchanged.
    None,
    /// The connection is closed orderly in the middle of the body.
    Cut { after: u64 },
    /// The connection is reset.
    Reset { after: u64 },
    /// The proxy shuts down its sending side without the end of TLS; the other direction stays open.
    HalfClose { after: u64 },
    /// Nothing more is sent, and the connection stays open.
    Stall { after: u64 },
    /// Not even a head is sent.
    Mute,
    /// The body is sent at this rate, up to that offset.
    Throttle { per_second: u64, up_to: u64 },
    /// One byte of the body is changed.
    Corrupt { at: u64 },
    /// The head announces this many bytes more (or less) than the body has.
    WrongLength { by: i64 },
    /// The gateway gets no request; the response has another status, perhaps with a `retry-after` in seconds.
    Status { code: u16, retry_after: Option<u32> },
    /// The page of a captive portal instead of the response.
    Portal,
    /// This head and body instead of the response; an endless body is repeated.
    Instead { head: String, body: Vec<u8>, endless: bool },
}

/// A received request.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// When it was completely received.
    pub at: Instant,
    head: String,
    body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.trim().eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// Whether it is for a package itself, not for a signature or a heartbeat.
    pub fn is_for_package(&self) -> bool {
        self.path.starts_with("/api/download/") && !self.path.ends_with(".minisig")
    }
}

/// The requests and responses of one path.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    pub requests: Vec<Request>,
    /// The fault of each response.
    pub faults: Vec<Fault>,
    /// The bytes of all bodies, as handed to the network.
    pub bytes: u64,
    /// The number of changed bytes.
    pub damaged: u32,
}

type Plan = dyn Fn(&Request, usize) -> Fault + Send + Sync;

struct Shared {
    upstream: Https,
    plan: Box<Plan>,
    tls: Arc<ServerConfig>,
    tallies: Mutex<BTreeMap<String, Tally>>,
    /// The downloads in progress, with the number of connections of each, and the maximum number of concurrent downloads.
    packages: Mutex<BTreeMap<String, usize>>,
    most_packages: AtomicUsize,
    stopping: AtomicBool,
}

/// Forwards until it is dropped.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// A proxy in front of that gateway. `plan` gets the request and the number of earlier requests for its path.
    pub fn before(gateway: &Gateway, plan: impl Fn(&Request, usize) -> Fault + Send + Sync + 'static) -> FaultProxy {
        let certificate =
            CertificateDer::from_pem_file(gateway.path("tls/cert.pem")).expect("the gateway's certificate");
        let key = PrivateKeyDer::from_pem_file(gateway.path("tls/key.pem")).expect("the gateway's key");
        let tls = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate], key))
            .expect("the gateway's certificate and key fit together");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            upstream: Https::to(gateway),
            plan: Box::new(plan),
            tls: Arc::new(tls),
            tallies: Mutex::default(),
            packages: Mutex::default(),
            most_packages: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), shared) = (stream, Arc::clone(&serving)) else { continue };
                // Broken connections are the purpose of this proxy.
                thread::spawn(move || drop(serve(&shared, stream)));
            }
        });
        FaultProxy { address, shared, thread: Some(thread) }
    }

    /// `https://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The maximum number of packages downloaded at the same time.
    pub fn most_at_once(&self) -> usize {
        self.shared.most_packages.load(Ordering::SeqCst)
    }

    /// The sum of the tallies of the paths that contain `part`.
    pub fn tally(&self, part: &str) -> Tally {
        let mut all = Tally::default();
        for (_, tally) in self.shared.tallies().iter().filter(|(path, _)| path.contains(part)) {
            all.requests.extend(tally.requests.iter().cloned());
            all.faults.extend(tally.faults.iter().cloned());
            all.bytes += tally.bytes;
            all.damaged += tally.damaged;
        }
        all
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A plan that breaks the first responses of each download in one to four ways and forwards the rest: the same for the same seed. A package
/// is damaged at most once.
pub fn random(seed: u64, size: u64) -> impl Fn(&Request, usize) -> Fault + Send + Sync + 'static {
    move |request, before| {
        // An installation has one attempt only, and fails if it gets a portal's page instead of a signature.
        if !request.path.starts_with("/api/download/") || request.path.contains("/aops-spm-") {
            return Fault::None;
        }
        let digits =
            request.path.bytes().fold(seed, |hash, byte| hash.wrapping_mul(0x0100_0000_01b3) ^ u64::from(byte));
        let mut random = fastrand::Rng::with_seed(digits);
        let mut faults: Vec<Fault> = (0..random.usize(1..=4)).map(|_| one_of(&mut random, size)).collect();
        let mut corrupt = false;
        faults.retain(|fault| !matches!(fault, Fault::Corrupt { .. }) || !std::mem::replace(&mut corrupt, true));
        faults.get(before).cloned().unwrap_or(Fault::None)
    }
}

fn one_of(random: &mut fastrand::Rng, size: u64) -> Fault {
    let after = random.u64(0..size * 3 / 4);
    match random.u32(0..13) {
        0 | 1 => Fault::Cut { after },
        2 | 3 => Fault::Reset { after },
        4 => Fault::HalfClose { after },
        5 => Fault::Stall { after },
        6 => Fault::Mute,
        7 => Fault::Throttle { per_second: 8 << 20, up_to: after },
        8 => Fault::Corrupt { at: after },
        9 => Fault::WrongLength { by: if random.bool() { 1000 } else { -1000 } },
        10 => Fault::Status { code: 500, retry_after: None },
        11 => Fault::Status { code: 429, retry_after: Some(1) },
        _ => Fault::Portal,
    }
}

impl Shared {
    fn tallies(&self) -> MutexGuard<'_, BTreeMap<String, Tally>> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, request: &Request, begins: bool) {
        if !request.is_for_package() {
            return;
        }
        let mut packages = self.packages.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = packages.entry(request.path.clone()).or_default();
        *connections = if begins { *connections + 1 } else { *connections - 1 };
        packages.retain(|_, connections| *connections > 0);
        self.most_packages.fetch_max(packages.len(), Ordering::SeqCst);
    }

    fn is_over(&self) -> io::Result<()> {
        match self.stopping.load(Ordering::SeqCst) {
            true => Err(ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    }
}

type Stream = StreamOwned<ServerConnection, TcpStream>;

fn serve(shared: &Shared, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(POLL_INTERVAL))?;
    stream.set_write_timeout(Some(MUTE))?;
    sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER_BYTES)?;
    let connection = ServerConnection::new(Arc::clone(&shared.tls)).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    while let Some(request) = read_request(shared, &mut stream)? {
        let fault = {
            let mut tallies = shared.tallies();
            let tally = tallies.entry(request.path.clone()).or_default();
            let fault = (shared.plan)(&request, tally.requests.len());
            tally.requests.push(request.clone());
            tally.faults.push(fault.clone());
            fault
        };
        shared.count(&request, true);
        let goes_on = answer(shared, &mut stream, &request, &fault);
        shared.count(&request, false);
        if !goes_on? {
            return Ok(());
        }
    }
    Ok(())
}

/// Sends a response; returns whether the connection stays open.
fn answer(shared: &Shared, stream: &mut Stream, request: &Request, fault: &Fault) -> io::Result<bool> {
    match fault {
        Fault::Mute => return wait_for_its_end(shared, stream),
        Fault::Status { code, retry_after } => {
            let retry_after_line = retry_after.map(|seconds| format!("retry-after: {seconds}\r\n")).unwrap_or_default();
            write!(stream, "HTTP/1.1 {code} Fault\r\n{retry_after_line}content-length: 0\r\n\r\n")?;
            return stream.flush().map(|()| true);
        }
        Fault::Portal => {
            const PAGE: &str = "<!doctype html><title>Welcome</title><p>Log in to use this network.";
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\netag: \"portal\"\r\n";
            write!(stream, "{head}content-length: {}\r\n\r\n{PAGE}", PAGE.len())?;
            return stream.flush().map(|()| true);
        }
        Fault::Instead { head, body, endless } => {
            stream.write_all(head.as_bytes())?;
            loop {
                send(shared, stream, request, body)?;
                if !endless {
                    return Ok(false);
                }
                shared.is_over()?;
            }
        }
        _ => {}
    }
    let mut upstream = shared.upstream.connect().map_err(io::Error::other)?;
    upstream.write_all(request.onward().as_bytes())?;
    upstream.write_all(&request.body)?;
    upstream.flush()?;
    let (head, first) = read_head(&mut upstream)?;
    let length = content_length(&head).unwrap_or(0);
    let shown = match fault {
        Fault::WrongLength { by } => length.saturating_add_signed(*by),
        _ => length,
    };
    stream.write_all(forwarded(&head, shown).as_bytes())?;
    stream.flush()?;
    relay(shared, stream, request, fault, length, &first, &mut upstream)
}

fn relay(
    shared: &Shared,
    stream: &mut Stream,
    request: &Request,
    fault: &Fault,
    length: u64,
    first: &[u8],
    upstream: &mut dyn Read,
) -> io::Result<bool> {
    let mut body = first.chain(upstream);
    let (mut done, began) = (0_u64, Instant::now());
    let mut chunk = vec![0; CHUNK_BYTES];
    while done < length {
        shared.is_over()?;
        let stop = match fault {
            Fault::Cut { after } | Fault::Reset { after } | Fault::HalfClose { after } | Fault::Stall { after } => {
                *after
            }
            _ => u64::MAX,
        };
        if done >= stop {
            return broken(shared, stream, fault);
        }
        let most = (length - done).min(stop - done).min(CHUNK_BYTES as u64) as usize;
        let amount = body.read(&mut chunk[..most])?;
        if amount == 0 {
            return Ok(false);
        }
        if let Fault::Corrupt { at } = fault
            && (done..done + amount as u64).contains(at)
        {
            chunk[(at - done) as usize] ^= 0x20;
            if let Some(tally) = shared.tallies().get_mut(&request.path) {
                tally.damaged += 1;
            }
        }
        send(shared, stream, request, &chunk[..amount])?;
        done += amount as u64;
        if let Fault::Throttle { per_second, up_to } = fault
            && done < *up_to
        {
            let due = Duration::from_secs_f64(done as f64 / *per_second as f64);
            while began.elapsed() < due {
                shared.is_over()?;
                thread::park_timeout((due - began.elapsed().min(due)).min(POLL_INTERVAL));
            }
        }
    }
    Ok(!matches!(fault, Fault::WrongLength { .. }))
}

fn send(shared: &Shared, stream: &mut Stream, request: &Request, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()?;
    if let Some(tally) = shared.tallies().get_mut(&request.path) {
        tally.bytes += bytes.len() as u64;
    }
    Ok(())
}

fn broken(shared: &Shared, stream: &mut Stream, fault: &Fault) -> io::Result<bool> {
    match fault {
        Fault::Reset { .. } => sockopt::set_socket_linger(&stream.sock, Some(Duration::ZERO))?,
        Fault::HalfClose { .. } => {
            stream.sock.shutdown(Shutdown::Write)?;
            return wait_for_its_end(shared, stream);
        }
        Fault::Stall { .. } => return wait_for_its_end(shared, stream),
        _ => {
            stream.conn.send_close_notify();
            stream.flush()?;
        }
    }
    Ok(false)
}

/// Sends nothing more until the other side closes the connection.
fn wait_for_its_end(shared: &Shared, stream: &mut Stream) -> io::Result<bool> {
    let began = Instant::now();
    while began.elapsed() < MUTE {
        shared.is_over()?;
        match stream.sock.read(&mut [0; 512]) {
            Ok(0) => break,
            Err(error) if !is_timeout(&error) => break,
            _ => {}
        }
    }
    Ok(false)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// The next request; `None` at the end of the connection.
fn read_request(shared: &Shared, stream: &mut Stream) -> io::Result<Option<Request>> {
    let mut bytes = Vec::new();
    let mut more = |bytes: &mut Vec<u8>| -> io::Result<bool> {
        let mut chunk = [0; 4096];
        loop {
            shared.is_over()?;
            match stream.read(&mut chunk) {
                Ok(amount) => {
                    bytes.extend_from_slice(&chunk[..amount]);
                    return Ok(amount > 0);
                }
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error),
            }
        }
    };
    let end = loop {
        match bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            Some(end) => break end + 4,
            None if more(&mut bytes)? => {}
            None => return Ok(None),
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let length = content_length(&head).unwrap_or(0) as usize;
    while bytes.len() < end + length {
        if !more(&mut bytes)? {
            return Ok(None);
        }
    }
    let mut words = head.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    Ok(Some(Request { method, path, at: Instant::now(), head, body: bytes[end..end + length].to_vec() }))
}

impl Request {
    /// The request as it is forwarded to the gateway, on its own connection.
    fn onward(&self) -> String {
        let mut lines = self.head.trim_end().lines();
        let mut onward = format!("{}\r\nconnection: close\r\n", lines.next().unwrap_or_default());
        for line in lines.filter(|line| !is_header(line, "connection")) {
            let _ = write!(onward, "{line}\r\n");
        }
        onward + "\r\n"
    }
}

/// The head of a response as it is forwarded.
fn forwarded(head: &str, length: u64) -> String {
    let mut forwarded = String::new();
    for line in head.trim_end().lines().filter(|line| !is_header(line, "connection")) {
        match is_header(line, "content-length") {
            true => drop(write!(forwarded, "content-length: {length}\r\n")),
            false => drop(write!(forwarded, "{line}\r\n")),
        }
    }
    forwarded + "\r\n"
}

fn is_header(line: &str, name: &str) -> bool {
    line.split_once(':').is_some_and(|(key, _)| key.trim().eq_ignore_ascii_case(name))
}

fn content_length(head: &str) -> Option<u64> {
    let line = head.lines().find(|line| is_header(line, "content-length"))?;
    line.split_once(':')?.1.trim().parse().ok()
}

/// The head of a response, and the part of its body that was read with it.
fn read_head(stream: &mut impl Read) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let body = bytes.split_off(end + 4);
            return Ok((String::from_utf8_lossy(&bytes).into_owned(), body));
        }
        match stream.read(&mut chunk)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            amount => bytes.extend_from_slice(&chunk[..amount]),
        }
    }
}
