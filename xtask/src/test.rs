//! `cargo xtask test`: every test of the workspace, with all that they need set up first.

use anyhow::{Result, bail};

use crate::command::{self, cargo, is_root};
use crate::{apt, rootfs, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Passed on to `cargo test`: a filter, and after a further `--` options of the test programs
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

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
            "some tests boot containers, which needs root: run `sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask test`, or the unit \
             tests alone: `cargo test --workspace --bins`"
        );
    }
    apt::install(NEEDS)?;
    let rootfs = rootfs::get()?;
    command::run(
        cargo()
            .current_dir(workspace::root())
            .args(["test", "--workspace", "--locked"])
            .args(&arguments.rest)
            .env("AOPS_TEST_ROOTFS", rootfs),
    )
}
