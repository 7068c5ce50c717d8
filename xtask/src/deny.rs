//! `cargo xtask deny`: checks licences, bans and sources of the dependencies with cargo-deny, which is built once.

use anyhow::Result;

use crate::command::{self, cargo, say};
use crate::workspace;

/// Pinned, so that the result depends only on the project.
const VERSION: &str = "0.20.2";

pub(crate) fn run() -> Result<()> {
    let tool = workspace::cached(&format!("cargo-deny-{VERSION}"), |unfinished| {
        say("building cargo-deny (once; takes minutes)");
        let mut install = cargo();
        install.args(["install", "--locked", "--quiet", "cargo-deny", "--version", VERSION, "--root"]).arg(unfinished);
        // Build time matters here, not run time.
        install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1").env("CARGO_PROFILE_RELEASE_LTO", "off");
        let build = unfinished.join("build");
        command::run(install.env("CARGO_TARGET_DIR", &build))?;
        workspace::remove(&build)
    })?;
    // cargo-deny reads licences from the sources of every target's dependencies; a build fetches only those of its own target.
    command::run(cargo().current_dir(workspace::root()).args(["fetch", "--locked"]))?;
    let deny = tool.join("bin/cargo-deny");
    command::run(std::process::Command::new(deny).current_dir(workspace::root()).args([
        "--offline",
        "--locked",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))
}
