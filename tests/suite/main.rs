//! The scenarios: whole programs, real processes, real files; one binary for all, one file for each theme.

mod harness;
mod install;
mod install_systemd;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
