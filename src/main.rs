//! `aops`: one executable, several personalities, chosen by the program's name or the subcommand.

mod core;
mod home;
mod lock;
mod platform;
mod store;

// Personalities.
mod control;
#[cfg(feature = "gateway")]
mod gateway;
mod service;
mod spa;
mod spm;

// Mechanisms.
mod config;
mod door;
mod endpoint;
mod host_service;
mod logging;
mod package;
mod process;
mod uplink;

use clap::Parser;

#[derive(Parser)]
#[command(name = "aops")]
enum Cli {
    /// Serve packages and answer heartbeats
    #[command(subcommand)]
    Gateway(gateway::Command),
}

fn main() -> std::process::ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let Cli::Gateway(command) = Cli::parse();
    gateway::main(command).unwrap_or_else(|error| {
        anstream::eprintln!("error: {error:#}");
        std::process::ExitCode::FAILURE
    })
}
