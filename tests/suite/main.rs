//! The scenarios: whole programs, real processes, real files; one binary for all, one file for each theme.

mod gateway;
mod harness;
mod help;
mod homes;
mod install;
mod install_systemd;
mod joining;
mod protocol;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
