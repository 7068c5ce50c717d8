//! What an installation knows of itself, and how its parts are changed: what `install`, the manager and the watchdog share.
//!
//! ```text
//! identity      etc/agent-id, state/instance.json             which host and which machine this is
//! records       state/install.json, state/manager.json        what is installed, and what was done outside the home
//! epochs        state/epochs.json                             which releases were withdrawn
//! keyring       etc/keys, state/keys.json                     which keys packages are trusted by
//! executable    bin/aops and the links to it                  which executable each role runs
//! release       an unpacked package of the manager            whether it can be put in place
//! upgrade       state/upgrade.json, bin/aops.prev                the upgrade of the manager that is under way
//! guard                                                       whether the home can be relied on
//! ```
//!
//! Each writes its own files alone. What was there before is the caller's to keep.

mod epochs;
pub mod executable;
mod identity;
pub mod keyring;
pub mod permissions;
mod records;
pub mod release;
mod trust;
pub mod upgrade;

pub use epochs::Epochs;
pub use identity::{agent_id, instance_id};
pub use records::{InstallRecord, ManagerRecord, exists};
