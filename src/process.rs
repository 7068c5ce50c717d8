//! The processes of sub-agents: started, recorded, found again, stopped with all that they started.
//!
//! A sub-agent's process is known by its record (`run/agents/<name>.json`: pid, start time, boot), which is in place before the program
//! runs, and by the mark in its environment (`AOPS_HOME`, `AOPS_AGENT_NAME`), which stands in where a record could not be written. So any
//! role, started at any time, finds and can end what an earlier one started. Only the very processes meant are ever signalled.

pub mod health;
pub mod launch;
pub mod log;
pub mod record;
pub mod script;
pub mod tree;
