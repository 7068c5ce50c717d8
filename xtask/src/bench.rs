//! `cargo xtask bench`: measurements of release builds, on this machine.
#![allow(clippy::print_stdout, reason = "the figures are its result")]

mod contestant;
mod door;
mod install;
mod leaks;
mod overall;
mod probe;
mod reports;
mod revival;
mod rivals;
mod statistics;
mod supervise;
mod trace;
mod upgrade;
mod verdicts;

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
    /// Supervision beside a floor written in C and the other supervisors that are installed: latency, CPU, memory, idle wake-ups
    Supervise(supervise::Arguments),
    /// Taking in packages beside a shell pipeline: CPU, wall time, memory, for real binaries and for many small files
    Install(install::Arguments),
    /// Whether the manager grows over thousands of restarts and heartbeats
    Leaks(leaks::Arguments),
    /// Upgrades of the manager in a row: how long no manager answers, and that the sub-agents keep their processes
    Upgrade(upgrade::Arguments),
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        None => overall::run(),
        Some(What::Supervise(arguments)) => supervise::run(arguments),
        Some(What::Install(arguments)) => install::run(arguments),
        Some(What::Leaks(arguments)) => leaks::run(arguments),
        Some(What::Upgrade(arguments)) => upgrade::run(arguments),
    }
}

/// Builds the release with these features, and keeps the executable under a name of its own.
fn build(features: &[&str], name: &str) -> Result<PathBuf> {
    command::run(
        cargo().current_dir(workspace::root()).args(["build", "--locked", "--release", "-p", "aops"]).args(features),
    )?;
    let kept = workspace::kept(name);
    fs::create_dir_all(workspace::kept(""))?;
    workspace::remove(&kept)?;
    fs::copy(workspace::target().join("release/aops"), &kept).context("cannot keep the executable")?;
    Ok(kept)
}

/// What was run where, above the figures.
fn heading(task: &str) -> Result<String> {
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

fn mebibytes(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}
