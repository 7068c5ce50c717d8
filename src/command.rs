//! Runs a program of the host, or one of ours, to its end: with a deadline, and with no more of its output than a person would read.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::platform;

/// Of each of the two streams; the rest is read and dropped, so that the program does not block.
const MAX_OUTPUT_BYTES: usize = 64 << 10;

/// Between two looks at a running program.
const LOOK: Duration = Duration::from_millis(10);

/// How long the output of a program that has ended may take: what it left running may hold the pipe open for ever.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long an executable just written may be busy: a child that another thread forked meanwhile holds it open until it execs.
pub const BUSY: Duration = Duration::from_secs(2);

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Fails unless the program succeeded, with what it said last.
    pub fn success(self) -> Result<Finished> {
        if self.status.success() {
            return Ok(self);
        }
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        match said.as_slice() {
            [] => bail!("{}", self.status),
            lines => bail!("{}: {}", self.status, lines[lines.len().saturating_sub(5)..].join("; ")),
        }
    }
}

/// Runs `command` until it ends, and kills it at the deadline.
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
            bail!("it has not ended within {} seconds", deadline.as_secs());
        }
        platform::pause(LOOK);
    };
    let text = |stream: Receiver<Vec<u8>>| {
        let until = Instant::now() + LAST_WORDS;
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

/// How a start is retried that fails because its program is still open for writing.
#[derive(Debug)]
pub struct Busy {
    since: Instant,
    limit: Duration,
}

impl Busy {
    /// From now on, for at most `limit`.
    pub fn within(limit: Duration) -> Busy {
        Busy { since: Instant::now(), limit }
    }

    /// How long to wait before the next try; `None` for any other error, and when the time is up.
    pub fn pause(&self, error: &io::Error) -> Option<Duration> {
        (platform::is_busy_text(error) && self.since.elapsed() < self.limit).then_some(LOOK)
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

/// What `stream` says, in pieces, up to the limit; the sender is gone at its end.
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
