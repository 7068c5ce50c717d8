//! `aops`: one executable with several commands, chosen by the program's name or the subcommand.
//!
//! `main` prints the error chain, once, and returns the exit code. The module of each command describes it.

mod core;
mod home;
mod lock;
mod platform;
mod store;

// The commands, and the command lines that lead to them.
mod cli;
mod control;
#[cfg(feature = "gateway")]
mod gateway;
mod service;
mod spa;
mod spm;

// Modules that the commands share.
mod command;
mod config;
mod control_socket;
mod endpoint;
mod fetching;
mod host_service;
mod installation;
mod lifecycle;
mod logging;
mod migrations;
mod output;
mod package;
mod process;
mod role;
mod uplink;

use std::process::ExitCode;

fn main() -> ExitCode {
    platform::begin();
    if let Some(code) = platform::errand() {
        return code;
    }
    let code = cli::run(std::env::args_os()).unwrap_or_else(|error| {
        output::message!("error: {error:#}");
        ExitCode::FAILURE
    });
    output::exit_code(code)
}
