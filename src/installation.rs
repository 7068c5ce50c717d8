//! The records and the executable of an installation, which `install`, the manager and the watchdog share.
//!
//! ```text
//! identity      etc/agent-id, state/instance.json             the ids of the host and of the machine
//! records       state/install.json, state/manager.json        the installed release, and the changes outside the home
//! epochs        state/epochs.json                             the withdrawn releases
//! keyring       etc/keys, state/keys.json                     the keys that packages are verified with
//! executable    bin/aops and the links to it                  the executable that each role runs
//! release       an unpacked package of the manager            checks that it can be installed
//! upgrade       state/upgrade.json, bin/aops.prev             the upgrade of the manager that is under way
//! temporaries   .new-*                                        what killed processes left
//! packaged      package.json                                  the files that belong to a package of the host
//! enrolment     /etc/aops/enrol.toml                          completes such an installation unattended
//! permissions                                                 checks that only the owner can change the home
//! ```
//!
//! Each module writes its own files only. A caller that may roll back saves the previous files.

pub mod enrolment;
mod epochs;
pub mod executable;
mod identity;
pub mod keyring;
pub mod packaged;
pub mod permissions;
mod records;
pub mod release;
pub mod temporaries;
mod trust;
pub mod upgrade;

pub use epochs::Epochs;
pub use identity::{agent_id, instance_id};
pub use records::{InstallRecord, ManagerRecord, exists};
