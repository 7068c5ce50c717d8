//! `cargo xtask test-windows`: the unit tests, or the scenarios that apply to Windows, built for Windows and run under Wine.
//!
//! Wine is not Windows: what it lacks (Ctrl-Break, for example) is not tested, and a test that passes here may still fail on Windows. But
//! wrong calls are found.
//!
//! A scenario runs on this machine as on Linux, with its gateway; its hosts run Wine (tests/support/windows.rs). With `--kill-steps`, it is
//! the one that kills upgrades at each of their steps (tests/suite/on_windows/steps.rs).

mod steps;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::command::{self, cargo, describe, is_root, run_quietly, say};
use crate::dist::Target;
use crate::toolchain::Toolchain;
use crate::{apt, check_windows, dist, rootfs, test, wine, workspace};

/// Modules whose tests need no shell and nothing else that exists only on Unix.
const TESTED: &[&str] = &[
    "cli::",
    "config::",
    "control::",
    "core::",
    "endpoint::",
    "home::",
    "host_service::scm::",
    "lock::",
    "logging::",
    "package::",
    "platform::",
    "process::log::",
    "process::record::",
    "store::",
];
/// Tests of these modules that do not apply to Windows, or cannot pass with Wine.
const SKIPPED: &[&str] = &[
    // Packages with links, and file modes.
    "package::unpack::tests::a_release_inherits_no_mode_bits_of_its_parent_directory",
    "package::unpack::tests::every_archive_format_gives_the_same_tree",
    "package::unpack::tests::unusual_but_valid_archives_are_accepted",
    // Wine does not wake a reader when its connection is shut down, so a cancelled download ends only at its stall limit.
    "package::tests::sharing::cancellation_interrupts_a_blocked_read",
];
/// They take a minute; more on a busy machine.
const LIMIT_SECONDS: u32 = 420;
/// The scenarios that apply to Windows, a line each.
const SCENARIOS: &str = "tests/suite/windows.txt";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Build the tests and install what they need, without running them
    #[arg(long)]
    no_run: bool,
    /// Run the scenarios that tests/suite/windows.txt lists, instead of the unit tests
    #[arg(long)]
    scenarios: bool,
    /// With the scenarios that take longest, too
    #[arg(long, requires = "scenarios")]
    whole: bool,
    /// Kill upgrades of the manager at each of their steps, instead of running the unit tests
    #[arg(long, conflicts_with = "scenarios", requires = "profile")]
    kill_steps: bool,
    /// The number of kills, drawn at random [default: each step in each way]
    #[arg(long, value_name = "N", requires = "kill_steps")]
    sample: Option<usize>,
    /// Draws the sample [default: another one each time]
    #[arg(long, value_name = "N", requires = "kill_steps")]
    seed: Option<u64>,
    /// Use what `dist` has built with this profile, instead of building the executable without optimization
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// The platform to build for
    #[arg(long, value_enum, default_value = "windows/amd64")]
    target: Target,
    /// Arguments of the test program, instead of the default modules or scenarios
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

impl Arguments {
    /// Whether the executable is tested on hosts.
    fn has_hosts(&self) -> bool {
        self.scenarios || self.kill_steps
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !is_root() {
        bail!("cannot run Wine in its root file system without root: run the task with sudo");
    }
    if arguments.target.words().0 != "windows" {
        bail!("cannot run the tests for another platform than Windows; for Linux, use `cargo xtask test --target`");
    }
    ensure!(
        arguments.profile.is_none() || arguments.has_hosts(),
        "--profile is for --scenarios and --kill-steps: the unit tests are a program of their own"
    );
    ensure!(
        !arguments.kill_steps || arguments.target == Target::WindowsAmd64,
        "cannot count the steps of a 32-bit executable; leave out --target"
    );
    apt::install(&[wine::NEEDS, check_windows::NEEDS].concat())?;
    let toolchain = Toolchain::for_target(arguments.target.triple())?;
    // Both take minutes the first time: one waits for the network, the other for the processors.
    let (root, program) = std::thread::scope(|scope| {
        let root = scope.spawn(wine::get);
        let program = match &arguments.profile {
            Some(profile) if arguments.has_hosts() => built_by_dist(arguments.target, profile),
            _ => build(&toolchain, arguments),
        };
        (root.join().unwrap_or_else(|_| bail!("the thread that creates the root file system panicked")), program)
    });
    let (root, program) = (root?, program?);
    if arguments.has_hosts() { scenarios(&root, &program, arguments) } else { unit_tests(&root, &program, arguments) }
}

fn unit_tests(root: &Path, program: &Path, arguments: &Arguments) -> Result<()> {
    if arguments.no_run {
        return Ok(());
    }
    let (Some(directory), Some(name)) = (program.parent(), program.file_name().and_then(|name| name.to_str())) else {
        bail!("cannot run the test program: its path {} has no directory", program.display())
    };
    let mut tests = wine::command(root, directory, name, LIMIT_SECONDS);
    match arguments.rest.as_slice() {
        [] => tests.args(TESTED).args(SKIPPED.iter().flat_map(|test| ["--skip", test])),
        rest => tests.args(rest),
    };
    say("running the tests under Wine");
    let status = tests.stdin(Stdio::null()).status().context("cannot run timeout")?;
    if !status.success() {
        bail!("the tests under Wine failed or exceeded {LIMIT_SECONDS} s: {status}");
    }
    Ok(())
}

fn scenarios(root: &Path, program: &Path, arguments: &Arguments) -> Result<()> {
    let directory = workspace::cache_path(if arguments.kill_steps { "windows-steps" } else { "windows" });
    let programs = lay_out(&directory, root, program, arguments.target)?;
    if arguments.kill_steps {
        steps::equip(&programs)?;
    }
    if arguments.no_run {
        return Ok(());
    }
    let mut suite = cargo();
    // As `cargo xtask test` builds it: otherwise the program under test would be built again, with other features of its libraries.
    suite.current_dir(workspace::root()).args(["test", "--workspace", "--locked", "--test", "suite", "--"]);
    match arguments.rest.as_slice() {
        [] if arguments.kill_steps => suite.args(["on_windows::steps::", "--nocapture"]),
        [] => {
            let list = workspace::root().join(SCENARIOS);
            let text = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
            suite.arg("--exact").args(listed(&text, arguments.target.words().1, arguments.whole))
        }
        rest => suite.args(rest),
    };
    if std::env::var_os(test::THREADS).is_none() {
        // Fewer than on Linux: programs start slowly under Wine, and upgrades have time limits.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        suite.env(test::THREADS, (cores * 3).div_ceil(2).to_string());
    }
    if let Some(sample) = arguments.sample {
        suite.env("AOPS_KILLS", sample.to_string());
    }
    if let Some(seed) = arguments.seed {
        suite.env("AOPS_UPGRADE_SEED", seed.to_string());
    }
    suite.env("AOPS_TEST_WINDOWS", directory).env("AOPS_TEST_WINDOWS_ARCH", arguments.target.words().1);
    suite.env("AOPS_TEST_ROOTFS", rootfs::get()?);
    command::run(&mut suite)
}

/// The names in the list for an architecture: a line has a name, and perhaps another architecture than amd64, or `whole`.
fn listed(text: &str, arch: &str, whole: bool) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let names = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let words: Vec<_> = words.collect();
        let is_chosen = (arch == "amd64" || words.contains(&arch)) && (whole || !words.contains(&"whole"));
        is_chosen.then(|| name.to_owned())
    });
    names.collect()
}

/// Makes `directory` what tests/support/windows.rs describes, and returns the directory of the programs.
fn lay_out(directory: &Path, root: &Path, program: &Path, target: Target) -> Result<PathBuf> {
    let (arch, prefix) = match target.words().1 {
        "386" => ("386", "i686"),
        arch => (arch, "x86_64"),
    };
    let programs = directory.join(arch);
    fs::create_dir_all(&programs).with_context(|| format!("cannot create {}", programs.display()))?;
    let link = directory.join("rootfs");
    workspace::remove(&link)?;
    std::os::unix::fs::symlink(root, &link).context("cannot create a link")?;
    // Its symbols, which nothing uses, are half of it.
    let mut strip = Command::new(format!("{prefix}-w64-mingw32-strip"));
    run_quietly(strip.arg("-o").arg(programs.join("aops.exe")).arg(program))?;
    let source = workspace::root().join("tests/support/windows.c");
    for name in ["agent.exe", "tool.exe"] {
        let mut compiler = Command::new(format!("{prefix}-w64-mingw32-gcc"));
        compiler.args(["-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o"]).arg(programs.join(name)).arg(&source);
        compiler.arg("-ladvapi32");
        run_quietly(&mut compiler)?;
    }
    Ok(programs)
}

/// The executable that `cargo xtask dist` has built.
fn built_by_dist(target: Target, profile: &str) -> Result<PathBuf> {
    let path = dist::directory(profile).join(target.executable());
    let (os, arch) = target.words();
    ensure!(
        path.exists(),
        "cannot find {}; run `cargo xtask dist --target {os}/{arch} --profile {profile}` first",
        path.display()
    );
    Ok(path)
}

/// Builds the test program of the executable without the gateway, or the executable itself for scenarios, and returns its path.
fn build(toolchain: &Toolchain, arguments: &Arguments) -> Result<PathBuf> {
    let target = arguments.target.triple();
    let subcommand = if arguments.has_hosts() { "build" } else { "test" };
    let mut cargo = toolchain.cargo_for_tests(subcommand, target);
    cargo.args(["-p", "aops", "--bin", "aops", "--no-default-features", "--message-format=json"]);
    if !arguments.has_hosts() {
        cargo.arg("--no-run");
    }
    say(&format!("$ {}", describe(&cargo)));
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cannot build the tests for {target}: {}", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(Path::new(message.get("executable")?.as_str()?).to_owned())
    };
    messages.lines().find_map(executable).context("cargo reported no program")
}

#[cfg(test)]
mod tests {
    use super::listed;

    #[test]
    fn the_list_has_the_scenarios_of_each_architecture() {
        let list = "# a 386\n\nb::c\nd::e 386\nf::g whole\n";
        assert_eq!(listed(list, "amd64", true), ["b::c", "d::e", "f::g"]);
        assert_eq!(listed(list, "amd64", false), ["b::c", "d::e"]);
        assert_eq!(listed(list, "386", true), ["d::e"]);
    }
}
