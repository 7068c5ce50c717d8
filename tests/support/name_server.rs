//! A slow name server in a network namespace: it answers every query for an IPv4 address with the same address, after a delay.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The length of a message's header.
const HEADER: usize = 12;

/// Answers until it is dropped.
#[derive(Debug)]
pub struct NameServer {
    delay: Arc<AtomicU64>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NameServer {
    /// Listens on port 53 of `address`, in the network namespace of the file `network`.
    pub fn start(network: &Path, address: Ipv4Addr) -> NameServer {
        let network = File::open(network).expect("the network namespace exists");
        let (delay, stopping) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (slow, stop) = (Arc::clone(&delay), Arc::clone(&stopping));
        let (ready, is_ready) = mpsc::channel();
        // A separate thread enters the namespace; the current one stays.
        let thread = thread::spawn(move || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).expect("we are root");
            let socket = UdpSocket::bind((address, 53)).expect("the address is free");
            socket.set_read_timeout(Some(POLL_INTERVAL)).expect("a socket can have a time limit");
            let _ = ready.send(());
            serve(&socket, address, &slow, &stop);
        });
        is_ready.recv().expect("the name server begins");
        NameServer { delay, stopping, thread: Some(thread) }
    }

    /// Sets the delay of every answer from now on.
    pub fn take(&self, delay: Duration) {
        self.delay.store(delay.as_millis() as u64, Ordering::SeqCst);
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, address: Ipv4Addr, delay: &AtomicU64, stopping: &AtomicBool) {
    let mut waiting = Vec::new();
    let mut question = [0; 512];
    while !stopping.load(Ordering::SeqCst) {
        match socket.recv_from(&mut question) {
            Ok((length, from)) => {
                let due = Instant::now() + Duration::from_millis(delay.load(Ordering::SeqCst));
                waiting.extend(answer(&question[..length], address).map(|answer| (due, answer, from)));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
        waiting.retain(|(due, answer, to)| {
            let is_due = *due <= Instant::now();
            if is_due {
                let _ = socket.send_to(answer, to);
            }
            !is_due
        });
    }
}

/// The answer to a message with one question (RFC 1035, section 4).
fn answer(question: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let name = question.get(HEADER..)?.iter().position(|byte| *byte == 0)?;
    let end = HEADER + name + 1 + 4;
    let is_for_ipv4 = question.get(end - 4..end - 2)? == [0, 1];
    let mut answer = question[..end].to_vec();
    // A response, recursion desired and available, no error; one question, and one answer or none.
    answer[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_for_ipv4), 0, 0, 0, 0]);
    if is_for_ipv4 {
        // The name of the question; type A, class IN, TTL 0, 4 bytes.
        answer.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
