//! The scenarios: whole programs, real processes, real files; one binary for all, one file for each theme.
#![allow(clippy::disallowed_macros, reason = "a test that cannot tell what it saw may end")]

mod adoption;
mod attacks;
mod busy_disk;
mod callers;
mod chaos;
mod disk;
mod downloads;
mod downloads_network;
mod gateway;
mod gateway_disk;
mod gateway_parts;
mod gateway_renewal;
mod harness;
mod health;
mod help;
mod homes;
mod homes_named;
mod install;
mod install_systemd;
mod joining;
mod leaving;
mod ledger;
mod output;
mod protocol;
mod refusals;
mod role_memory;
mod roles;
mod roles_systemd;
mod self_upgrades;
mod self_upgrades_bad;
mod self_upgrades_host;
mod state_versions;
mod sub_agents;
#[path = "../support/mod.rs"]
mod support;
mod trees;
mod trust;
mod unmarked;
mod upgrades;
mod upgrades_host;
