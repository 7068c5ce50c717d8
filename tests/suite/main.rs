//! The scenarios: whole programs, real processes, real files; one binary for all, one file for each theme.

mod harness;
mod install;
mod joining;
mod roles;
mod roles_systemd;
mod sub_agents;
#[path = "../support/mod.rs"]
mod support;
