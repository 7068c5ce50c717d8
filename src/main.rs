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
mod command;
mod config;
mod door;
mod endpoint;
mod host_service;
mod installation;
mod logging;
mod package;
mod process;
mod uplink;

fn main() {}
