//! Running other programs, and telling what is done.
#![allow(clippy::print_stderr, reason = "a task talks to who started it")]

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Says one line.
pub(crate) fn say(text: &str) {
    eprintln!("xtask: {text}");
}

/// Runs a command with its output passed through; fails if it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    say(&format!("$ {}", describe(command)));
    let status = command.status().with_context(|| format!("cannot run {}", program(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", describe(command));
    }
    Ok(())
}

/// What a command prints, trimmed; fails if it does, with what it said.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", program(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}: {}", describe(command), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// As [`run`], but its output is shown only when it fails.
pub(crate) fn run_quietly(command: &mut Command) -> Result<()> {
    say(&format!("$ {}", describe(command)));
    read(command).map(drop)
}

/// A command as one would type it, the variables set for it included.
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

/// Whether a program of that name can be found, also where only root's path leads.
pub(crate) fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.into_iter().any(|directory| directory.join(program).is_file())
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The cargo that runs us.
///
/// What cargo told us about our own package is not passed on: build scripts that look at it would take it for a change, and everything
/// behind them would be built anew each time that a task follows a plain `cargo build`.
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

/// A path as an argument, for the commands that take text.
pub(crate) fn text(path: &Path) -> String {
    path.display().to_string()
}
