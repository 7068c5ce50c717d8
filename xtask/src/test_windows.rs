//! `cargo xtask test-windows`: the unit tests, built for 64-bit Windows and run under Wine.
//!
//! Wine is not Windows: what it lacks (Ctrl-Break, for example) is not tested, and a test that passes here may still fail on Windows. But
//! wrong calls are found.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::command::{describe, is_root, say};
use crate::dist::Target;
use crate::toolchain::Toolchain;
use crate::{apt, check_windows, wine};

/// The one that is handed out.
const TARGET: Target = Target::WindowsAmd64;
/// Modules whose tests need no shell and nothing else that exists only on Unix.
const TESTED: &[&str] = &[
    "cli::",
    "config::",
    "control::",
    "core::",
    "endpoint::",
    "home::",
    "lock::",
    "logging::",
    "package::",
    "platform::",
    "process::log::",
    "process::record::",
    "store::",
];
/// Tests of these modules that do not apply to Windows, or do not pass there yet.
const SKIPPED: &[&str] = &[
    // Packages with links, and file modes.
    "package::unpack::tests::a_release_inherits_no_mode_bits_of_its_parent_directory",
    "package::unpack::tests::every_archive_format_gives_the_same_tree",
    "package::unpack::tests::unusual_but_valid_archives_are_accepted",
    // FIXME: these should pass there as well.
    "endpoint::tests::a_self_signed_certificate_in_the_file_is_accepted_even_when_marked_as_an_authority",
    "endpoint::tests::a_certificate_issued_by_an_authority_in_the_file_is_accepted",
    "package::tests::sharing::a_sweep_clears_staging_old_downloads_and_the_oldest_beyond_the_cap",
    // Wine does not wake a reader when its connection is shut down, so a cancelled download ends only at its stall limit.
    "package::tests::sharing::cancellation_interrupts_a_blocked_read",
];
/// They take a minute; more on a busy machine.
const LIMIT_SECONDS: u32 = 420;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Build the tests and install what they need, without running them
    #[arg(long)]
    no_run: bool,
    /// Arguments of the test program, instead of the default modules
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !is_root() {
        bail!("cannot run Wine in its root file system without root: run the task with sudo");
    }
    apt::install(&[wine::NEEDS, check_windows::NEEDS].concat())?;
    let toolchain = Toolchain::for_target(TARGET.triple())?;
    // Both take minutes the first time: one waits for the network, the other for the processors.
    let (root, program) = std::thread::scope(|scope| {
        let root = scope.spawn(wine::get);
        let program = build(&toolchain);
        (root.join().unwrap_or_else(|_| bail!("the thread that creates the root file system panicked")), program)
    });
    let (root, program) = (root?, program?);
    if arguments.no_run {
        return Ok(());
    }
    let (Some(directory), Some(name)) = (program.parent(), program.file_name().and_then(|name| name.to_str())) else {
        bail!("cannot run the test program: its path {} has no directory", program.display())
    };
    let mut tests = wine::command(&root, directory, name, LIMIT_SECONDS);
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

/// Builds the test program of the executable without the gateway, and returns its path.
fn build(toolchain: &Toolchain) -> Result<PathBuf> {
    let mut cargo = toolchain.cargo_for_tests("test", TARGET.triple());
    cargo.args(["-p", "aops", "--bin", "aops", "--no-default-features", "--no-run", "--message-format=json"]);
    say(&format!("$ {}", describe(&cargo)));
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cannot build the tests for {}: {}", TARGET.triple(), output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(Path::new(message.get("executable")?.as_str()?).to_owned())
    };
    messages.lines().find_map(executable).context("cargo reported no test program")
}
