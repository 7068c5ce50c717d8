//! `cargo xtask test`: every test of the workspace; installs what the tests need first.
//!
//! With `--target`, the tests and the program are built as static executables for that platform. With `--old-kernel`, both run as on a host
//! with Linux 3.10.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{self, cargo, is_root, run_quietly};
use crate::dist::Target;
use crate::toolchain::Toolchain;
use crate::{apt, dist, rootfs, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Build the tests and the program as static executables for this platform [default: for this machine]
    #[arg(long, value_enum)]
    target: Option<Target>,
    /// Fail each system call that is newer than Linux 3.10, and hide cgroup v2; without further arguments, runs the scenarios of
    /// installation, supervision and upgrades
    #[arg(long, requires = "target")]
    old_kernel: bool,
    /// Passed on to `cargo test`: a filter, then `--` and options of the test programs
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// The variable for the number of tests that run in parallel.
pub(crate) const THREADS: &str = "RUST_TEST_THREADS";

pub(crate) const NEEDS: &[apt::Need] = &[
    ("debootstrap", "debootstrap"),
    ("systemd-nspawn", "systemd-container"),
    ("unshare", "util-linux"),
    ("pgrep", "procps"),
    ("minisign", "minisign"),
    ("strace", "strace"),
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !is_root() {
        bail!(
            "cannot run the tests: some boot containers, which needs root; run `sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask test`, or the unit \
             tests alone: `cargo test --workspace --bins`"
        );
    }
    apt::install(NEEDS)?;
    let rootfs = rootfs::get()?;
    let mut command = match arguments.target {
        None => {
            let mut command = cargo();
            command.current_dir(workspace::root()).args(["test", "--workspace", "--locked"]);
            command
        }
        Some(target) => command_for(target, arguments.old_kernel)?,
    };
    command.args(&arguments.rest);
    if arguments.old_kernel && arguments.rest.is_empty() {
        command.args(["--test", "suite", "--"]).args(OLD_KERNEL_SCENARIOS);
    } else if !arguments.rest.iter().any(|word| word == "--") {
        command.arg("--");
    }
    command.args(["--skip", WINDOWS_SCENARIOS]);
    if arguments.old_kernel {
        command.args(NEWER_KERNEL_SCENARIOS.iter().flat_map(|name| ["--skip", name]));
    }
    command.env("AOPS_TEST_ROOTFS", rootfs);
    if std::env::var_os(THREADS).is_none() {
        // Scenarios wait most of the time, so twice the number of cores is used.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        command.env(THREADS, (cores * 2).to_string());
    }
    command::run(&mut command)
}

/// They run by `cargo xtask test-windows`.
const WINDOWS_SCENARIOS: &str = "on_windows::";
/// Installation, supervision and upgrades.
const OLD_KERNEL_SCENARIOS: &[&str] = &[
    "install::",
    "roles::without_systemd::",
    "sub_agents::",
    "upgrades::ledger::",
    "upgrades::self_upgrades::",
    "upgrades::self_upgrades_bad::",
    "upgrades::state_versions::",
    "upgrades::sub_agents::",
];
/// What needs newer calls itself: they download with the curl of today, which needs `getrandom`, or are about cgroup v2.
const NEWER_KERNEL_SCENARIOS: &[&str] = &[
    "install::canonical_path::",
    "install::joining::the_old_command_installs_with",
    "install::replace_and_remove::a_read_only_home_and_a_full_disk",
    "install::replace_and_remove::mounts_below_a_home",
    "install::replace_and_remove::units_survive_a_reboot",
    "install::systemd::programs_started_by_a_deployment_agent",
    "install::systemd::reinstalling_keeps_the_sub_agents",
    "install::systemd::the_link_to_the_command",
    "install::systemd::the_platforms_command",
    "install::systemd::two_homes",
    "install::systemd::uninstalling_works",
    "sub_agents::process_trees::a_process_tree_in_a_v2_cgroup",
];

/// `cargo test` for a platform whose executables run on this machine.
fn command_for(target: Target, old_kernel: bool) -> Result<Command> {
    ensure!(
        matches!(target, Target::LinuxAmd64 | Target::Linux386),
        "cannot run the tests for another platform than linux/amd64 and linux/386; for Windows, use `cargo xtask test-windows`"
    );
    apt::install(dist::NEEDS)?;
    let triple = target.triple();
    let mut command = Toolchain::for_target(triple)?.cargo_for_scenarios(triple);
    command.args(["-p", "aops"]);
    if old_kernel {
        ensure!(
            Path::new("/sys/fs/cgroup/systemd").is_dir(),
            "cannot hide cgroup v2 from containers: this machine has no cgroup v1 hierarchy of systemd; mount one with `mount -t cgroup -o \
             none,name=systemd systemd /sys/fs/cgroup/systemd`"
        );
        let runner = format!("CARGO_TARGET_{}_RUNNER", triple.replace('-', "_").to_uppercase());
        command.env(runner, launcher()?);
    }
    Ok(command)
}

/// The program that runs another one as on an old kernel.
fn launcher() -> Result<PathBuf> {
    let source = workspace::root().join("xtask/src/test/old_kernel.c");
    let program = workspace::cache_path("old_kernel");
    run_quietly(Command::new("cc").args(["-O2", "-Wall", "-Wextra", "-o"]).arg(&program).arg(&source))
        .with_context(|| format!("cannot compile {}", source.display()))?;
    Ok(program)
}
