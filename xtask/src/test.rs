//! `cargo xtask test`: every test of the workspace; installs what the tests need first.

use anyhow::{Result, bail};

use crate::command::{self, cargo, is_root};
use crate::{apt, rootfs, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Passed on to `cargo test`: a filter, then `--` and options of the test programs
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// The variable for the number of tests that run in parallel.
const THREADS: &str = "RUST_TEST_THREADS";

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
    let mut command = cargo();
    command.current_dir(workspace::root()).args(["test", "--workspace", "--locked"]).args(&arguments.rest);
    command.env("AOPS_TEST_ROOTFS", rootfs);
    if std::env::var_os(THREADS).is_none() {
        // Scenarios wait most of the time, so twice the number of cores is used.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        command.env(THREADS, (cores * 2).to_string());
    }
    command::run(&mut command)
}
