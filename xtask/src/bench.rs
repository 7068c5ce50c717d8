//! `cargo xtask bench`: measures release builds on this machine.
#![allow(clippy::print_stdout, reason = "the figures are its output")]

mod contestant;
pub(crate) mod control_socket;
mod install;
mod leaks;
mod manager_restart;
mod overall;
pub(crate) mod probe;
mod reports;
mod rivals;
pub(crate) mod spent;
pub(crate) mod statistics;
mod supervise;
mod targets;
mod trace;
mod upgrade;
pub(crate) mod verdicts;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{self, cargo, read};
use crate::workspace;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(clap::Subcommand)]
enum What {
    /// Compare supervision with a minimal supervisor in C and the installed supervisors: latency, CPU, memory, idle wake-ups
    Supervise(supervise::Arguments),
    /// Compare the installation of packages with a shell pipeline: CPU, wall time, memory, for large binaries and many small files
    Install(install::Arguments),
    /// Check that the manager does not grow over thousands of restarts and heartbeats
    Leaks(leaks::Arguments),
    /// Upgrade the manager repeatedly: measure the time without a manager, check that sub-agents keep their processes
    Upgrade(upgrade::Arguments),
    /// Show the sizes of what `dist` and `rpm` have built for each platform, and the memory of an idle host where it runs here
    Targets,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        None => overall::run(),
        Some(What::Supervise(arguments)) => supervise::run(arguments),
        Some(What::Install(arguments)) => install::run(arguments),
        Some(What::Leaks(arguments)) => leaks::run(arguments),
        Some(What::Upgrade(arguments)) => upgrade::run(arguments),
        Some(What::Targets) => targets::run(),
    }
}

/// Builds the release with these features, and copies the executable to `name`.
pub(crate) fn build(features: &[&str], name: &str) -> Result<PathBuf> {
    command::run(
        cargo().current_dir(workspace::root()).args(["build", "--locked", "--release", "-p", "aops"]).args(features),
    )?;
    let kept = workspace::cache_path(name);
    fs::create_dir_all(workspace::cache_path(""))?;
    workspace::remove(&kept)?;
    fs::copy(workspace::target().join("release/aops"), &kept).context("cannot copy the executable")?;
    Ok(kept)
}

/// The heading of the figures: command, machine, versions.
pub(crate) fn heading(task: &str) -> Result<String> {
    let fact = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let value = text.lines().find(|line| line.starts_with(name)).and_then(|line| line.split_once(':'));
        value.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(format!(
        "`{task}` on {}, {cores} cores, {} of memory, Linux {}, {}",
        fact("/proc/cpuinfo", "model name"),
        fact("/proc/meminfo", "MemTotal"),
        kernel.trim(),
        read(Command::new("rustc").arg("-V"))?,
    ))
}

pub(crate) fn mebibytes(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}
