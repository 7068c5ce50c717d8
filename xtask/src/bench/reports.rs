//! Reports that the supervised programs send when they start and when they are stopped. They are the same for all supervisors and use the program's own clock, so no
//! polling interval is measured.

use std::collections::HashMap;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

/// A time of the monotonic clock, which all processes share.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub(super) struct Moment(f64);

impl Moment {
    pub(super) fn now() -> Moment {
        let now = clock_gettime(ClockId::Monotonic);
        Moment(now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6)
    }

    /// Milliseconds from an earlier one.
    pub(super) fn since(self, earlier: Moment) -> f64 {
        self.0 - earlier.0
    }
}

/// A program's last report: its pid, and when its `main` started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    pub(super) pid: u32,
    pub(super) at: Moment,
}

/// The last start and the last end of each program of one supervisor, by name.
#[derive(Debug, Default)]
struct Received {
    starts: HashMap<String, Start>,
    ends: HashMap<String, Start>,
}

#[derive(Debug, Clone)]
pub(super) struct Reports {
    shared: Arc<(Mutex<Received>, Condvar)>,
}

impl Reports {
    /// Receives reports on `socket` from now on, in a thread that lives as long as this process.
    pub(super) fn listen(socket: &Path) -> Result<Reports> {
        let inbox =
            UnixDatagram::bind(socket).with_context(|| format!("cannot create the socket {}", socket.display()))?;
        let reports = Reports { shared: Arc::default() };
        let receiver = reports.clone();
        std::thread::Builder::new().name("reports".to_owned()).spawn(move || receiver.receive(&inbox))?;
        Ok(reports)
    }

    fn receive(&self, inbox: &UnixDatagram) {
        let mut buffer = [0; 512];
        while let Ok(length) = inbox.recv(&mut buffer) {
            if let Some((name, start, is_end)) = parse(&buffer[..length]) {
                let mut received = self.received();
                let last = if is_end { &mut received.ends } else { &mut received.starts };
                last.insert(name, start);
                self.shared.1.notify_all();
            }
        }
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn of(&self, name: &str) -> Option<Start> {
        self.received().starts.get(name).copied()
    }

    /// When the program with this pid was stopped; `None`: it runs, or was killed. A successor's start is received later.
    pub(super) fn end(&self, name: &str, pid: u32) -> Option<Moment> {
        self.received().ends.get(name).filter(|end| end.pid == pid).map(|end| end.at)
    }

    /// Waits until the program of that name has a pid other than `old`.
    pub(super) fn successor(&self, name: &str, old: u32, patience: Duration) -> Option<Start> {
        let deadline = Instant::now() + patience;
        let mut received = self.received();
        loop {
            if let Some(start) = received.starts.get(name).filter(|start| start.pid != old) {
                return Some(*start);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            received = self.shared.1.wait_timeout(received, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until `count` programs have reported.
    pub(super) fn wait_for(&self, count: usize, patience: Duration) -> bool {
        crate::wait::try_for(patience, || (self.received().starts.len() >= count).then_some(())).is_some()
    }
}

/// `name pid nanoseconds start|end`; true: its end.
fn parse(text: &[u8]) -> Option<(String, Start, bool)> {
    let text = std::str::from_utf8(text).ok()?;
    let mut words = text.split(' ');
    let name = words.next()?.to_owned();
    let pid = words.next()?.parse().ok()?;
    let nanoseconds: f64 = words.next()?.parse().ok()?;
    let is_end = match words.next()? {
        "start" => false,
        "end" => true,
        _ => return None,
    };
    Some((name, Start { pid, at: Moment(nanoseconds / 1e6) }, is_end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_has_the_same_name_and_a_new_pid() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("reports");
        let reports = Reports::listen(&socket).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        let say = |text: &str| assert_eq!(sender.send_to(text.as_bytes(), &socket).unwrap(), text.len());
        say("a 7 1000000 start");
        assert!(reports.wait_for(1, Duration::from_secs(10)));
        assert!(reports.successor("a", 7, Duration::ZERO).is_none());
        say("nonsense");
        say("a 7 2000000 end");
        say("a 8 3500000 start");
        let start = reports.successor("a", 7, Duration::from_secs(10)).unwrap();
        assert_eq!((start.pid, start.at.since(Moment(1.0))), (8, 2.5));
        assert_eq!((reports.end("a", 7), reports.end("a", 8)), (Some(Moment(2.0)), None));
    }
}
