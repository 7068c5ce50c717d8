//! Helper processes for tests: this test program is run again, and executes the part of one test function only.
//!
//! A test function with such a part calls [`part`] first, and returns at once when it runs as a normal test.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Timeout for steps that take no time on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

const PART: &str = "AOPS_TEST_PART";
const ARGUMENT: &str = "AOPS_TEST_ARGUMENT";
/// Prefix of the lines that a part prints; the test program prints lines of its own.
const REPORT_PREFIX: &str = "part: ";

/// A command that runs the part of the test function with this full name.
pub fn part_command(name: &str, argument: impl AsRef<OsStr>) -> Command {
    part_command_from(&std::env::current_exe().expect("this program has a file"), name, argument)
}

fn part_command_from(executable: &Path, name: &str, argument: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(executable);
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(PART, name).env(ARGUMENT, argument);
    command
}

/// The argument of the part; `None`: this process is the test program itself.
pub fn part(name: &str) -> Option<OsString> {
    let name_of_part = std::env::var_os(PART)?;
    (name_of_part == name).then(|| std::env::var_os(ARGUMENT).unwrap_or_default())
}

/// Prints a line for the test to read.
#[allow(clippy::print_stdout, reason = "the test reads standard output")]
pub fn report(text: impl std::fmt::Display) {
    // The test program may have printed an unfinished line.
    println!("\n{REPORT_PREFIX}{text}");
    let _ = std::io::stdout().flush();
}

/// The lines that parts printed into a file.
pub fn reports(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    text.lines().filter_map(|line| line.strip_prefix(REPORT_PREFIX)).map(str::to_owned).collect()
}

/// Blocks until the process is killed.
pub fn block() -> ! {
    loop {
        std::thread::park();
    }
}

/// Polls until `attempt` returns a value; panics at the timeout.
#[track_caller]
pub fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "timed out waiting for {what}");
        super::pause(POLL);
    }
}

/// A process that runs a part. It is killed on drop.
#[derive(Debug)]
pub struct OtherProcess {
    child: Child,
    lines: Receiver<String>,
}

impl OtherProcess {
    pub fn start(name: &str, argument: impl AsRef<OsStr>) -> OtherProcess {
        OtherProcess::start_by(part_command(name, argument))
    }

    /// Like [`OtherProcess::start`], from a copy of this program.
    pub fn start_from(executable: &Path, name: &str, argument: impl AsRef<OsStr>) -> OtherProcess {
        OtherProcess::start_by(part_command_from(executable, name, argument))
    }

    fn start_by(mut command: Command) -> OtherProcess {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("this program can be run");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(text) = line.strip_prefix(REPORT_PREFIX) {
                    let _ = sender.send(text.to_owned());
                }
            }
        });
        OtherProcess { child, lines }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints.
    #[track_caller]
    pub fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("the other process prints a line")
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for OtherProcess {
    fn drop(&mut self) {
        self.kill();
    }
}
