//! An HTTP CONNECT proxy with a password, in a network namespace; it records the requested destinations.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The limit of a request, and of the connection that it requests.
const LIMIT: Duration = Duration::from_secs(30);
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Runs until the test program ends: its network namespace is removed with the container.
#[derive(Debug)]
pub struct ConnectProxy {
    asked: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    /// Listens on this address in the network namespace of the file `network`, for this user and password (`user:password`).
    pub fn start(network: &Path, address: (Ipv4Addr, u16), secret: &str) -> ConnectProxy {
        let network = OwnedFd::from(File::open(network).expect("the network namespace exists"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (noted, wanted) = (Arc::clone(&asked), format!("Basic {}", BASE64_STANDARD.encode(secret)));
        let (ready, is_ready) = mpsc::channel();
        thread::spawn(move || {
            // Threads that this one starts are in the namespace too.
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).expect("we are root");
            let listener = TcpListener::bind(address).expect("the address is free");
            let _ = ready.send(());
            for stream in listener.incoming().flatten() {
                let (noted, wanted) = (Arc::clone(&noted), wanted.clone());
                thread::spawn(move || drop(serve(stream, &wanted, &noted)));
            }
        });
        is_ready.recv().expect("the proxy begins");
        ConnectProxy { asked }
    }

    /// The destinations, as `host:port`; `407` for a request without the password.
    pub fn requests(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn serve(mut client: TcpStream, wanted: &str, asked: &Mutex<Vec<String>>) -> io::Result<()> {
    client.set_read_timeout(Some(LIMIT))?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < MAX_HEAD_BYTES {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let target = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap_or_default().to_owned();
    let shown = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .any(|(key, value)| key.eq_ignore_ascii_case("proxy-authorization") && value.trim() == wanted);
    let note = |what: &str| asked.lock().unwrap_or_else(PoisonError::into_inner).push(what.to_owned());
    if !shown {
        note("407");
        return client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n");
    }
    note(&target);
    let server = TcpStream::connect(&target)?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    client.set_read_timeout(None)?;
    let (mut up, mut down) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let _ = io::copy(&mut up, &mut down);
        let _ = down.shutdown(Shutdown::Both);
    });
    let copied = io::copy(&mut &server, &mut client);
    let _ = client.shutdown(Shutdown::Both);
    copied.map(drop)
}
