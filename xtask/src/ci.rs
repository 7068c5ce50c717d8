//! `cargo xtask ci`: everything that must hold before a change is merged; with a name, that check alone.
//!
//! ```text
//! in front:  format, tidy, lints ... unit tests, scenarios ...     one after the other, shown as they run
//! beside:    the checks that only build, at a lower priority       each into a log of its own, shown where it fails
//! set-up:    Debian packages and root file systems                 likewise; who needs one of them waits for it
//! ```
//!
//! The scenarios mostly wait, so what only builds goes on meanwhile. What one check has built the next ones use.
#![allow(clippy::print_stdout, reason = "the course of the checks is its result")]

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::command::{cargo, describe};
use crate::{apt, check_windows, dist, fuzz, rootfs, test, wine, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The checks to run [default: all]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(CHECKS.iter().map(|check| check.name)))]
    names: Vec<String>,
}

/// One check.
struct Check {
    name: &'static str,
    is_beside: bool,
    program: Program,
    words: &'static [&'static str],
    /// More words where all checks run: what an earlier one has built is used.
    shared: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Cargo,
    /// One of our own tasks.
    Task,
}

const CHECKS: &[Check] = &[
    front("format", Program::Cargo, &["fmt", "--all", "--check"]),
    front("tidy", Program::Task, &["tidy"]),
    front("lints", Program::Cargo, &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    front(
        "lints-without-gateway",
        Program::Cargo,
        &["clippy", "--locked", "-p", "aops", "--no-default-features", "--", "-D", "warnings"],
    ),
    front("unit-tests", Program::Cargo, &["test", "--locked", "--workspace", "--bins"]),
    front("scenarios", Program::Task, &["test", "--test", "suite"]),
    Check {
        shared: &["--executable", BUILT_BY_SCENARIOS],
        ..front("static-executable", Program::Task, &["dist", "--target", "linux/amd64", "--profile", "ci"])
    },
    Check { shared: &["--executable", BUILT_BY_SCENARIOS], ..front("demo", Program::Task, &["demo"]) },
    front("tests-for-windows", Program::Task, &["test-windows"]),
    beside("windows", &["check-windows"]),
    beside("build-of-tests-for-windows", &["test-windows", "--no-run"]),
    beside("dependencies", &["deny"]),
    beside("fuzz-targets", &["fuzz", "--seconds", "5"]),
];

/// Below the directory that cargo builds into.
const BUILT_BY_SCENARIOS: &str = "debug/aops";
/// The priority of what runs beside: the scenarios go first.
const NICE: &str = "15";

const fn front(name: &'static str, program: Program, words: &'static [&'static str]) -> Check {
    Check { name, is_beside: false, program, words, shared: &[] }
}

const fn beside(name: &'static str, words: &'static [&'static str]) -> Check {
    Check { name, is_beside: true, program: Program::Task, words, shared: &[] }
}

impl Check {
    fn command(&self) -> Command {
        let mut command = match self.program {
            Program::Cargo => cargo(),
            Program::Task => task(&[]),
        };
        command.args(self.words);
        command
    }

    fn command_with_shared(&self) -> Command {
        let target = workspace::target();
        let path = |word: &&str| if word.starts_with('-') { PathBuf::from(word) } else { target.join(word) };
        let mut command = self.command();
        command.args(self.shared.iter().map(path));
        command
    }
}

/// What is said once more at the end.
#[derive(Default)]
struct Seen {
    /// The lines with which test programs begin and end.
    tested: Vec<String>,
    /// Where and why tests failed.
    panics: Vec<String>,
    /// So many lines of the last panic's message are still to come, at most.
    message: usize,
}

impl Seen {
    fn line(&mut self, line: &str) {
        const MESSAGE_LINES: usize = 12;
        const LINE: usize = 400;
        if line.trim_start().starts_with("Running ") || line.starts_with("test result") {
            self.tested.push(line.to_owned());
        }
        let begins = line.starts_with("thread '") && line.contains(" panicked at ");
        if begins {
            self.message = MESSAGE_LINES;
        } else if line == "stack backtrace:" || line.starts_with("note: ") {
            self.message = 0;
        }
        if self.message > 0 {
            self.message -= 1;
            self.panics.push(line.chars().take(LINE).collect());
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let mut seen = Seen::default();
    let outcome = match arguments.names.as_slice() {
        [] => all(CHECKS, ("set-up", task(&["set-up"])), &mut seen),
        names => {
            let mut named = CHECKS.iter().filter(|check| names.iter().any(|name| name == check.name));
            named.try_for_each(|check| in_front(check.name, &mut check.command(), &mut seen))
        }
    };
    if !seen.panics.is_empty() {
        println!("\nFailed:\n{}", seen.panics.join("\n"));
    }
    outcome?;
    if !seen.tested.is_empty() {
        println!("\nTests:\n{}", seen.tested.join("\n"));
    }
    println!("\nAll passed in {} s.", started.elapsed().as_secs());
    Ok(())
}

/// `cargo xtask set-up`: what the checks need of the machine, all of it before or beside them.
pub(crate) fn set_up() -> Result<()> {
    let needs = [test::NEEDS, check_windows::NEEDS, wine::NEEDS, dist::NEEDS, fuzz::NEEDS];
    apt::install(&needs.concat())?;
    rootfs::get()?;
    wine::get().map(drop)
}

/// Runs every check, also after one has failed: a run on another machine is to say all that is wrong.
fn all(checks: &[Check], set_up: (&str, Command), seen: &mut Seen) -> Result<()> {
    let (name, mut command) = set_up;
    thread::scope(|scope| {
        let set_up = scope.spawn(move || aside(name, &mut command));
        let beside = scope.spawn(|| {
            let beside = checks.iter().filter(|check| check.is_beside);
            beside.map(|check| aside(check.name, &mut lower(&check.command()))).collect::<Vec<_>>()
        });
        let front = checks.iter().filter(|check| !check.is_beside);
        let mut outcomes: Vec<Result<()>> =
            front.map(|check| in_front(check.name, &mut check.command_with_shared(), seen)).collect();
        outcomes.extend(beside.join().unwrap_or_else(|_| vec![Err(anyhow!("a thread of the checks has panicked"))]));
        outcomes.push(set_up.join().unwrap_or_else(|_| bail!("the thread of the set-up has panicked")));
        let errors: Vec<String> =
            outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
        if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
    })
}

/// Runs a check with its output shown as it comes; of tests the closing lines are kept.
fn in_front(name: &str, command: &mut Command, seen: &mut Seen) -> Result<()> {
    let started = Instant::now();
    println!("\n==> {name}\n$ {}", describe(command));
    let status = shown(command.current_dir(workspace::root()), seen)?;
    verdict(name, status, started)
}

/// Whether a command has ended is looked at so often while it prints nothing.
const LOOK: Duration = Duration::from_secs(2);

/// Runs a command, shows each line of its output, and keeps what is said once more at the end.
fn shown(command: &mut Command, seen: &mut Seen) -> Result<ExitStatus> {
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("cannot make a pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    // The pipe's other end stays in the command otherwise, and the lines never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
    let mut ended = None;
    loop {
        match lines.recv_timeout(LOOK) {
            Ok(line) => {
                println!("{line}");
                seen.line(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            // A process that a check left behind may keep the pipe open.
            Err(RecvTimeoutError::Timeout) if ended.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {
                ended = child.try_wait().with_context(|| format!("cannot wait for {}", describe(command)))?;
            }
        }
    }
    child.wait().with_context(|| format!("cannot wait for {}", describe(command)))
}

/// Runs a command with its output in a log, of which the end is shown where it fails.
fn aside(name: &str, command: &mut Command) -> Result<()> {
    const LINES: usize = 200;
    let started = Instant::now();
    let path = workspace::kept(&format!("ci-{name}.log"));
    fs::create_dir_all(workspace::kept("")).context("cannot make the directory of the logs")?;
    let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let again = log.try_clone().context("cannot write a log")?;
    println!("==> {name}: begins, beside the others; log: {}", path.display());
    let status = command.current_dir(workspace::root()).stdin(Stdio::null()).stdout(again).stderr(log).status();
    let status = status.with_context(|| format!("cannot run {}", describe(command)))?;
    if !status.success() {
        let text = fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut last: VecDeque<&str> = text.lines().rev().take(LINES).collect();
        last.make_contiguous().reverse();
        println!("\n==> {name}: the end of its log\n{}", Vec::from(last).join("\n"));
    }
    verdict(name, status, started)
}

fn verdict(name: &str, status: ExitStatus, started: Instant) -> Result<()> {
    let seconds = started.elapsed().as_secs();
    if !status.success() {
        println!("==> {name}: FAILED after {seconds} s");
        bail!("{name} failed: {status}");
    }
    println!("==> {name}: passed in {seconds} s");
    Ok(())
}

/// One of our own tasks, by the program that runs.
fn task(words: &[&str]) -> Command {
    let own = std::env::current_exe().unwrap_or_else(|_| "xtask".into());
    let mut command = Command::new(own);
    command.args(words);
    command
}

/// The same at a lower priority.
fn lower(command: &Command) -> Command {
    let mut lower = Command::new("nice");
    lower.args(["-n", NICE]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => lower.env(name, value),
            None => lower.env_remove(name),
        };
    }
    lower
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_fails_the_whole_and_every_check_runs_all_the_same() {
        const GOOD: &[&str] = &["--version"];
        const BAD: &[&str] = &["no-such-subcommand"];
        let check = |name, is_beside, words| Check { is_beside, ..front(name, Program::Cargo, words) };
        let outcome = |first, second, other| {
            let checks = [
                check("of-tests-1", false, first),
                check("of-tests-2", false, second),
                check("of-tests-3", true, other),
            ];
            let mut set_up = cargo();
            set_up.arg("--version");
            all(&checks, ("of-tests-0", set_up), &mut Seen::default()).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(outcome(GOOD, GOOD, GOOD), Ok(()));
        let error = outcome(BAD, BAD, GOOD).unwrap_err();
        assert!(error.contains("of-tests-1 failed") && error.contains("of-tests-2 failed"), "{error}");
        let error = outcome(GOOD, GOOD, BAD).unwrap_err();
        assert!(error.contains("of-tests-3 failed"), "{error}");
    }

    #[test]
    fn the_closing_lines_of_tests_are_kept_and_why_one_failed_and_the_exit_status_too() {
        let mut seen = Seen::default();
        let script = "echo '     Running unittests a' >&2; echo test b ... ok
            echo \"thread 'c' (12) panicked at tests/c.rs:1:2:\"; echo why; echo 'stack backtrace:'; echo 0: d
            echo 'test result: ok. 1 passed'; exit 3";
        let status = shown(Command::new("sh").args(["-c", script]), &mut seen).unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(seen.tested, ["     Running unittests a", "test result: ok. 1 passed"]);
        assert_eq!(seen.panics, ["thread 'c' (12) panicked at tests/c.rs:1:2:", "why"]);
    }
}
