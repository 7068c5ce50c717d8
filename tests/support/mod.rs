//! The parts that scenarios are built from: hosts in a temporary home, gateways, packages, containers.
//!
//! Functions panic when they fail, since they run in tests. Whatever a test starts or creates is removed when the test ends, even if it
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
pub mod windows;

use std::path::PathBuf;

/// The program under test: the one of this build, or the one in `AOPS_TEST_EXECUTABLE`.
pub fn aops() -> PathBuf {
    std::env::var_os("AOPS_TEST_EXECUTABLE").map_or_else(|| env!("CARGO_BIN_EXE_aops").into(), PathBuf::from)
}
