//! What the scenarios of the suite are built of: hosts in a temporary home, gateways, packages, containers.
//!
//! Everything here panics when it cannot do its work: it runs in tests. What a test starts or makes is gone when it ends, also when it
//! fails or is killed.

#![allow(dead_code, unreachable_pub, reason = "a box of tools for scenarios, each of which uses some")]

pub mod archives;
pub mod chaos;
pub mod command;
pub mod connect_proxy;
pub mod container;
pub mod fault_proxy;
pub mod files;
pub mod gateway;
pub mod host;
pub mod hostile;
pub mod https;
pub mod inside;
pub mod name_server;
pub mod package;
pub mod processes;
pub mod release;
pub mod wait;

use std::path::PathBuf;

/// The program under test: the one of this build, or the one that `AOPS_TEST_EXECUTABLE` names.
pub fn aops() -> PathBuf {
    std::env::var_os("AOPS_TEST_EXECUTABLE").map_or_else(|| env!("CARGO_BIN_EXE_aops").into(), PathBuf::from)
}
