//! `cargo xtask ci`: every check that a change must pass before it is merged, or the named checks.
//!
//! ```text
//! foreground:  format, tidy, lints ... unit tests, scenarios ...   one after the other, with output as it is printed
//! background:  the checks that only build, at a lower priority    each with a log, printed if the check fails
//! set-up:      Debian packages and root file systems              likewise; a check that needs one of them waits for it
//! ```
//!
//! Scenarios mostly wait, so builds run in the background meanwhile. A check uses what an earlier one has built.
#![allow(clippy::print_stdout, reason = "the results of the checks are its output")]

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
use crate::{apt, check_windows, dist, fuzz, packages, power_cut, rootfs, test, wine, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The checks to run [default: all]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(CHECKS.iter().map(|check| check.name)))]
    names: Vec<String>,
}

/// One check.
struct Check {
    name: &'static str,
    is_background: bool,
    program: Program,
    words: &'static [&'static str],
    /// Further arguments if all checks run: they name what an earlier check has built.
    shared: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Cargo,
    /// One of the tasks of xtask.
    Task,
}

const CHECKS: &[Check] = &[
    foreground("format", Program::Cargo, &["fmt", "--all", "--check"]),
    foreground("tidy", Program::Task, &["tidy"]),
    foreground(
        "lints",
        Program::Cargo,
        &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"],
    ),
    foreground(
        "lints-without-gateway",
        Program::Cargo,
        &["clippy", "--locked", "-p", "aops", "--no-default-features", "--", "-D", "warnings"],
    ),
    foreground(
        "documentation",
        Program::Cargo,
        &["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"],
    ),
    foreground("unit-tests", Program::Cargo, &["test", "--locked", "--workspace", "--bins"]),
    foreground("scenarios", Program::Task, &["test", "--test", "suite"]),
    Check {
        shared: &["--executable", BUILT_BY_SCENARIOS],
        ..foreground("executables", Program::Task, &["dist", "--profile", "ci"])
    },
    Check {
        shared: &["--executable", BUILT_BY_SCENARIOS],
        ..foreground("packages", Program::Task, &["rpm", "--profile", "ci"])
    },
    foreground("installed-packages", Program::Task, &["test-packages", "--profile", "ci"]),
    Check { shared: &["--executable", BUILT_BY_SCENARIOS], ..foreground("demo", Program::Task, &["demo"]) },
    Check {
        shared: &["--executable", BUILT_BY_SCENARIOS],
        ..foreground("stranded", Program::Task, &["stranded", "--sample", "24", "--homes", "8"])
    },
    Check {
        shared: &["--executable", BUILT_BY_EXECUTABLES],
        ..foreground("power-cut", Program::Task, &["power-cut", "--cuts", "3", "--points", "10"])
    },
    foreground("tests-for-windows", Program::Task, &["test-windows"]),
    Check {
        shared: BUILT_FOR_WINDOWS,
        ..foreground("scenarios-for-windows", Program::Task, &["test-windows", "--scenarios"])
    },
    Check {
        shared: BUILT_FOR_WINDOWS,
        ..foreground(
            "scenarios-for-windows-386",
            Program::Task,
            &["test-windows", "--scenarios", "--target", "windows/386"],
        )
    },
    // For each platform; packed, and thereby tested, by `executables`.
    background("build-of-executables", &["dist", "--no-pack", "--profile", "ci"]),
    background("windows", &["check-windows"]),
    background("build-of-tests-for-windows", &["test-windows", "--no-run"]),
    background("dependencies", &["deny"]),
    background("fuzz-targets", &["fuzz", "--seconds", "5"]),
];

/// Relative to cargo's target directory.
const BUILT_BY_SCENARIOS: &str = "debug/aops";
/// By `executables`.
const BUILT_FOR_WINDOWS: &[&str] = &["--profile", "ci"];
/// Relative, too; static, with the gateway.
const BUILT_BY_EXECUTABLES: &str = "dist-ci/aops-gateway-linux-amd64";
/// The priority of background checks: the scenarios come first.
const NICE: &str = "15";

const fn foreground(name: &'static str, program: Program, words: &'static [&'static str]) -> Check {
    Check { name, is_background: false, program, words, shared: &[] }
}

const fn background(name: &'static str, words: &'static [&'static str]) -> Check {
    Check { name, is_background: true, program: Program::Task, words, shared: &[] }
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
        let path = |word: &&str| if word.contains('/') { target.join(word) } else { PathBuf::from(word) };
        let mut command = self.command();
        command.args(self.shared.iter().map(path));
        command
    }
}

/// The parts of the output that are repeated at the end.
#[derive(Default)]
pub(crate) struct Seen {
    /// The first and last lines of test programs.
    tested: Vec<String>,
    /// The last lines.
    last: VecDeque<String>,
    /// The places and messages of failed tests.
    panics: Vec<String>,
    /// The number of lines of the last panic message that are still kept.
    message: usize,
}

impl Seen {
    fn line(&mut self, line: &str) {
        const MESSAGE_LINES: usize = 12;
        const LINE: usize = 400;
        const LAST: usize = 12;
        self.last.push_back(line.chars().take(LINE).collect());
        if self.last.len() > LAST {
            self.last.pop_front();
        }
        if line.trim_start().starts_with("Running ") || line.starts_with("test result") {
            self.tested.push(line.to_owned());
        }
        let starts_panic = line.starts_with("thread '") && line.contains(" panicked at ");
        if starts_panic {
            self.message = MESSAGE_LINES;
        } else if line == "stack backtrace:" || line.starts_with("note: ") {
            self.message = 0;
        }
        if self.message > 0 {
            self.message -= 1;
            self.panics.push(line.chars().take(LINE).collect());
        }
    }

    /// What a report says of a command: the messages of failed tests, and its last lines.
    pub(crate) fn summary(&self) -> String {
        let lines = self.panics.iter().chain(&self.last);
        lines.map(|line| format!("  {line}\n")).collect()
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let mut seen = Seen::default();
    let outcome = match arguments.names.as_slice() {
        [] => all(CHECKS, ("set-up", task(&["set-up"])), &mut seen),
        names => {
            let mut named = CHECKS.iter().filter(|check| names.iter().any(|name| name == check.name));
            named.try_for_each(|check| in_foreground(check.name, &mut check.command(), &mut seen))
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

/// `cargo xtask set-up`: installs what the checks need, before or while they run.
pub(crate) fn set_up() -> Result<()> {
    let needs =
        [test::NEEDS, check_windows::NEEDS, wine::NEEDS, dist::NEEDS, fuzz::NEEDS, packages::NEEDS, power_cut::NEEDS];
    apt::install(&needs.concat())?;
    rootfs::get()?;
    power_cut::set_up()?;
    wine::get().map(drop)
}

/// Runs every check, even after one has failed: a run on another machine reports everything that is wrong.
fn all(checks: &[Check], set_up: (&str, Command), seen: &mut Seen) -> Result<()> {
    let (name, mut command) = set_up;
    thread::scope(|scope| {
        let set_up = scope.spawn(move || in_background(name, &mut command));
        let background_checks = scope.spawn(|| {
            let background_checks = checks.iter().filter(|check| check.is_background);
            background_checks.map(|check| in_background(check.name, &mut lower(&check.command()))).collect::<Vec<_>>()
        });
        let foreground_checks = checks.iter().filter(|check| !check.is_background);
        let mut outcomes: Vec<Result<()>> =
            foreground_checks.map(|check| in_foreground(check.name, &mut check.command_with_shared(), seen)).collect();
        outcomes.extend(
            background_checks
                .join()
                .unwrap_or_else(|_| vec![Err(anyhow!("the thread of the background checks panicked"))]),
        );
        outcomes.push(set_up.join().unwrap_or_else(|_| bail!("the thread of the set-up panicked")));
        let errors: Vec<String> =
            outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
        if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
    })
}

/// Runs a check and prints its output as it comes; keeps the summary lines of tests.
pub(crate) fn in_foreground(name: &str, command: &mut Command, seen: &mut Seen) -> Result<()> {
    let started = Instant::now();
    println!("\n==> {name}\n$ {}", describe(command));
    let status = shown(command.current_dir(workspace::root()), seen)?;
    verdict(name, status, started)
}

/// The poll interval for the end of a command that prints nothing.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Runs a command, prints each line of its output, and keeps what is repeated at the end.
fn shown(command: &mut Command, seen: &mut Seen) -> Result<ExitStatus> {
    let (reader, writer) = std::io::pipe().context("cannot create a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("cannot create a pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    // Drop the command's copy of the writing end: otherwise the lines never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
    let mut ended = None;
    loop {
        match lines.recv_timeout(POLL_INTERVAL) {
            Ok(line) => {
                println!("{line}");
                seen.line(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            // A process that a check left running may keep the pipe open.
            Err(RecvTimeoutError::Timeout) if ended.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {
                ended = child.try_wait().with_context(|| format!("cannot wait for {}", describe(command)))?;
            }
        }
    }
    child.wait().with_context(|| format!("cannot wait for {}", describe(command)))
}

/// Runs a command with its output in a log file. Prints the end of the log if the command fails.
fn in_background(name: &str, command: &mut Command) -> Result<()> {
    const LINES: usize = 200;
    let started = Instant::now();
    let path = workspace::cache_path(&format!("ci-{name}.log"));
    fs::create_dir_all(workspace::cache_path("")).context("cannot create the directory of the logs")?;
    let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let again = log.try_clone().context("cannot write a log")?;
    println!("==> {name}: started in the background; log: {}", path.display());
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

/// A command that runs one of xtask's tasks with the current executable.
pub(crate) fn task(words: &[&str]) -> Command {
    let own = std::env::current_exe().unwrap_or_else(|_| "xtask".into());
    let mut command = Command::new(own);
    command.args(words);
    command
}

/// The same command at a lower priority.
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
    fn a_failed_check_fails_the_run_and_the_other_checks_still_run() {
        const GOOD: &[&str] = &["--version"];
        const BAD: &[&str] = &["no-such-subcommand"];
        let check = |name, is_background, words| Check { is_background, ..foreground(name, Program::Cargo, words) };
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
    fn test_summaries_panics_and_the_exit_status_are_kept() {
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
