//! The processes of sub-agents: started, recorded, found again, stopped with all that they started.
//!
//! A sub-agent's process is known by its record (`run/agents/<name>.json`: pid, start time, boot), which is in place before the program
//! runs. Its tree is held together by a group of its own (a cgroup on Linux). Where no group could be made or entered, its session and what
//! descends from it count, and where a record could not be written, the mark in its environment (`AOPS_HOME`, `AOPS_AGENT_NAME`), which a
//! program may overwrite. Of a `control` script's program the script itself knows most. So any role, started at any time, finds and can end
//! what an earlier one started. Only the very processes meant are ever signalled.

use crate::home::Home;
use crate::platform::Groups;

pub mod claim;
pub mod health;
pub mod launch;
pub mod log;
pub mod pid_file;
pub mod record;
pub mod script;
pub mod stop;
pub mod tree;

/// Where the groups of a home's sub-agents are made; `None`: nowhere on this host.
pub fn groups(home: &Home) -> Option<Groups> {
    Groups::find(&home.agents_unit())
}
