//! Runs a command to its end, with a time limit, and captures its output.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use super::wait::try_for;

/// More than any command of a test takes on a busy machine with two cores.
pub const LIMIT: Duration = Duration::from_secs(120);
/// The time to read the pipes after the command has exited.
const DRAIN: Duration = Duration::from_secs(5);

/// The time until no process has a new program open for writing.
const NOT_BUSY: Duration = Duration::from_secs(10);

/// The exit code and output of a command.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// The exit code; 128 plus the signal number if a signal killed it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// Its stdout; panics if it failed.
    #[track_caller]
    pub fn expect_success(self) -> String {
        self.expect_code(0).stdout
    }

    /// Panics unless it exited with `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Output {
        assert!(self.code == code, "expected exit code {code} of {self}");
        self
    }

    /// Both streams, to search for a message.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Its stdout as one JSON document.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("expected JSON ({error}) of {self}"),
        }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: exit code {}", self.command, self.code)?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.is_empty() {
                write!(f, "\n--- {name}\n{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// Runs `command` to its end; panics after `limit`, or if another process keeps its output open afterwards.
#[track_caller]
pub fn run(command: &mut Command, limit: Duration) -> Output {
    run_with_input(command, &[], limit)
}

/// Starts a command. A program that was just written may still be open for writing in a child that another test has forked and that has not
/// executed its own program yet: then the start is retried.
fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut last = None;
    let started = try_for(NOT_BUSY, || match command.spawn() {
        Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
            last = Some(error);
            None
        }
        outcome => Some(outcome),
    });
    started.unwrap_or_else(|| Err(last.unwrap_or_else(|| io::ErrorKind::ExecutableFileBusy.into())))
}

/// As [`run`], with `input` on stdin.
#[track_caller]
pub fn run_with_input(command: &mut Command, input: &[u8], limit: Duration) -> Output {
    let described = describe(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command).unwrap_or_else(|error| panic!("cannot run `{described}`: {error}"));
    let mut stdin = child.stdin.take().expect("it is piped");
    let input = input.to_owned();
    // A command that does not read its stdin is no error.
    thread::spawn(move || drop(stdin.write_all(&input)));
    let stdout = collect(child.stdout.take().expect("it is piped"));
    let stderr = collect(child.stderr.take().expect("it is piped"));
    let code = match wait(&mut child, limit) {
        Some(code) => code,
        None => {
            let _ = child.kill();
            let _ = child.wait();
            panic!("`{described}` took longer than {limit:?}\n{}{}", gather(&stdout).0, gather(&stderr).0);
        }
    };
    let (stdout, stderr) = (gather(&stdout), gather(&stderr));
    let output = Output { command: described, code, stdout: stdout.0, stderr: stderr.0 };
    assert!(stdout.1 && stderr.1, "something that was started keeps the output open after the end of {output}");
    output
}

/// The exit code after the process has exited; `None` after `limit`.
pub fn wait(child: &mut Child, limit: Duration) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let status = try_for(limit, || child.try_wait().expect("it is our child"))?;
    Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}

/// The lines of a stream, read in a thread as they come.
pub fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

/// Reads a stream to its end in a thread.
fn collect(mut stream: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if sender.send(buffer[..count].to_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The received bytes, and whether the stream ended.
fn gather(stream: &Receiver<Vec<u8>>) -> (String, bool) {
    let started = Instant::now();
    let mut bytes = Vec::new();
    let ended = loop {
        match stream.recv_timeout(DRAIN.saturating_sub(started.elapsed())) {
            Ok(more) => bytes.extend(more),
            Err(mpsc::RecvTimeoutError::Disconnected) => break true,
            Err(mpsc::RecvTimeoutError::Timeout) => break false,
        }
    };
    (String::from_utf8_lossy(&bytes).into_owned(), ended)
}

/// A command line as a user would type it.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
