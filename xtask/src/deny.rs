//! `cargo xtask deny`: licences, bans and sources of the dependencies, by cargo-deny, which is built once.

use anyhow::Result;

use crate::command::{self, cargo, say};
use crate::workspace;

/// Pinned, so that what passed yesterday passes today.
const VERSION: &str = "0.20.2";

pub(crate) fn run() -> Result<()> {
    let tool = workspace::keep(&format!("cargo-deny-{VERSION}"), |unfinished| {
        say("building cargo-deny (once; some minutes)");
        let mut install = cargo();
        install.args(["install", "--locked", "--quiet", "cargo-deny", "--version", VERSION, "--root"]).arg(unfinished);
        // Speed of building counts here, not speed of running.
        install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1").env("CARGO_PROFILE_RELEASE_LTO", "off");
        let build = unfinished.join("build");
        command::run(install.env("CARGO_TARGET_DIR", &build))?;
        workspace::remove(&build)
    })?;
    // Licences are read from the sources of all targets' dependencies, of which a build fetches its own target's alone.
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
