//! Runs a program of the host, or of this installation, to its exit: with a timeout, and a limit for its output.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::platform;

/// Limit for each of the two output streams, bytes; the rest is read and discarded, so that the program does not block.
const MAX_OUTPUT_BYTES: usize = 64 << 10;

/// Interval between two polls of a running program, and between two attempts to start a busy one.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Time to wait for the output of a program that has exited: a process that it left running may keep the pipe open forever.
const OUTPUT_TIMEOUT: Duration = Duration::from_millis(500);

/// Time for which a newly written executable may be busy: a child that another thread forked meanwhile keeps it open until its exec.
pub const BUSY: Duration = Duration::from_secs(2);

/// A program that has exited.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Fails unless the program succeeded; the error contains its last lines.
    pub fn success(self) -> Result<Finished> {
        if self.status.success() {
            return Ok(self);
        }
        let output = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        let lines: Vec<&str> = output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        match lines.as_slice() {
            [] => bail!("{}", self.status),
            lines => bail!("{}: {}", self.status, lines[lines.len().saturating_sub(5)..].join("; ")),
        }
    }
}

/// Runs `command` until it exits, and kills it at the deadline.
pub fn run(command: &mut Command, deadline: Duration) -> Result<Finished> {
    let shown = command.get_program().display().to_string();
    attempt(command, deadline).with_context(|| format!("cannot run {shown}"))
}

fn attempt(command: &mut Command, deadline: Duration) -> Result<Finished> {
    let started = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command)?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            bail!("it did not exit within {} seconds and was killed", deadline.as_secs());
        }
        platform::pause(POLL_INTERVAL);
    };
    let text = |stream: Receiver<Vec<u8>>| {
        let until = Instant::now() + OUTPUT_TIMEOUT;
        let mut bytes = Vec::new();
        while let Ok(more) = stream.recv_timeout(until.saturating_duration_since(Instant::now())) {
            bytes.extend(more);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ok(Finished { status, stdout: text(stdout), stderr: text(stderr) })
}

fn spawn(command: &mut Command) -> Result<Child> {
    let busy = Busy::within(BUSY);
    loop {
        match command.spawn() {
            Err(error) => platform::pause(busy.pause(&error).ok_or(error)?),
            Ok(child) => return Ok(child),
        }
    }
}

/// Retries a start that fails because the program is still open for writing (`ETXTBSY`).
#[derive(Debug)]
pub struct Busy {
    since: Instant,
    limit: Duration,
}

impl Busy {
    /// Retries for at most `limit` from now on.
    pub fn within(limit: Duration) -> Busy {
        Busy { since: Instant::now(), limit }
    }

    /// The delay before the next attempt; `None` for any other error, and after the limit.
    pub fn pause(&self, error: &io::Error) -> Option<Duration> {
        (platform::is_busy_text(error) && self.since.elapsed() < self.limit).then_some(POLL_INTERVAL)
    }
}

/// Starts a program, retried while its file is busy, for at most [`BUSY`].
pub async fn unless_busy<T, F>(mut start: impl FnMut() -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let busy = Busy::within(BUSY);
    loop {
        match start().await {
            Err(error) => tokio::time::sleep(busy.pause(&error).ok_or(error)?).await,
            started => return started,
        }
    }
}

/// Reads `stream` in a thread and sends its content in pieces, up to the limit; the channel closes at the end of the stream.
fn collect(stream: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let Some(mut stream) = stream else { return };
        let mut buffer = [0; 4096];
        let mut left = MAX_OUTPUT_BYTES;
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            let kept = read.min(left);
            left -= kept;
            if kept > 0 && sender.send(buffer[..kept].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
