//! Runs other programs and prints progress.
#![allow(clippy::print_stderr, reason = "a task prints its progress")]

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Prints one line.
pub(crate) fn say(text: &str) {
    eprintln!("xtask: {text}");
}

/// Runs a command with its output passed through. An error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    say(&format!("$ {}", describe(command)));
    let status = command.status().with_context(|| format!("cannot run {}", program(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", describe(command));
    }
    Ok(())
}

/// Returns the trimmed output of a command. An error, with its stderr, if the command fails.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", program(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}: {}", describe(command), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Like [`run`], but shows the output only when the command fails.
pub(crate) fn run_quietly(command: &mut Command) -> Result<()> {
    say(&format!("$ {}", describe(command)));
    read(command).map(drop)
}

/// A command line with the environment variables set for it, as a user would type it.
pub(crate) fn describe(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        let value = value?.to_string_lossy().into_owned();
        let shown = if name == "PATH" { "…".to_owned() } else { value };
        Some(format!("{}={shown}", name.to_string_lossy()))
    });
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    variables.chain(words.map(|word| word.to_string_lossy().into_owned())).collect::<Vec<_>>().join(" ")
}

fn program(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// Whether a program is in `PATH` or in `/usr/sbin` and `/sbin`.
pub(crate) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.into_iter().any(|directory| directory.join(program).is_file())
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The cargo that runs this task.
///
/// Cargo's variables about this package are not passed on: build scripts that read them would see a change, and cargo would rebuild
/// everything that depends on them each time a task follows a plain `cargo build`.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let known = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|prefix| known.starts_with(prefix))
        {
            command.env_remove(&name);
        }
    }
    command
}

/// A path as text, for commands that take text.
pub(crate) fn text(path: &Path) -> String {
    path.display().to_string()
}
