//! Completions for shells and manual pages, generated from the command line, and the units of a package.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap_complete::Shell;

use crate::host_service;

/// Writes `completions/*`, `man/*.1` and `units/*.service` into `directory`.
pub(super) fn write(command: clap::Command, directory: &Path) -> Result<ExitCode> {
    let mut command = without_help_command(command);
    let [completions, manual] = ["completions", "man"].map(|part| directory.join(part));
    for part in [&completions, &manual] {
        fs::create_dir_all(part).with_context(|| format!("cannot create the directory {}", part.display()))?;
    }
    let units = directory.join("units");
    fs::create_dir_all(&units).with_context(|| format!("cannot create the directory {}", units.display()))?;
    for (name, text) in host_service::package_units()? {
        let path = units.join(format!("{name}.service"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    command.build();
    clap_mangen::generate_to(command.clone(), &manual).context("cannot write the manual pages")?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::PowerShell] {
        clap_complete::generate_to(shell, &mut command, "aops", &completions)
            .with_context(|| format!("cannot write the completions for {shell}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `aops help COMMAND` prints what `aops COMMAND --help` prints.
fn without_help_command(command: clap::Command) -> clap::Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help_command)
}
