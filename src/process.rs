//! The processes of sub-agents: starting them, recording them, finding them again, and stopping them with everything that they started.
//!
//! A sub-agent's process is identified by its record (`run/agents/<name>.json`: pid, start time, boot), which is written before the program
//! runs. Its process tree is held by a group of its own (a cgroup on Linux). If no group could be created or entered, its session and its
//! descendants count instead. If the record could not be written, the marker in its environment counts (`AOPS_HOME`, `AOPS_AGENT_NAME`),
//! which a program may overwrite. The program of a `control` script is identified by the script first. So any role, started at any time,
//! can find and stop what a previous one started. Only these exact processes are ever signalled.

use crate::home::Home;
use crate::platform::{self, Groups};

pub mod claim;
pub mod health;
pub mod launch;
pub mod log;
pub mod pid_file;
pub mod record;
pub mod script;
pub mod stop;
pub mod tree;

/// Keeps the groups of a home's sub-agents open in this process, if a group is lost with the last process that has it open.
pub fn hold_groups(home: &Home) {
    platform::hold_groups(&home.agents_unit());
}

/// The location of the groups of a home's sub-agents; `None`: this host has none.
pub fn groups(home: &Home) -> Option<Groups> {
    Groups::find(&home.agents_unit())
}
