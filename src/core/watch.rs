//! How one role watches the other: detection of a hang, restart of a role that exited, restart of a role that uses too much memory.

pub mod memory;
pub mod restart_delay;
pub mod restarter;
pub mod silence;
