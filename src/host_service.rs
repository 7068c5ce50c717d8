//! The host's service manager: registers the two roles of a home, starts and stops them, and answers for their units.
//!
//! Every kind of service manager has a file here, and every file the same functions under the same names, [`none`] included. What is here
//! passes a call on to the file of its kind; nothing outside asks which kind it is. Whether a home is registered, and with which kind, is
//! in its `state/install.json`; what is here acts on the kind that it is given.

use std::process::Child;

use anyhow::Result;

use crate::core::role::Role;
use crate::core::service_manager::{ServiceManagerKind, UnitStanding};
use crate::home::Home;

mod none;
pub mod product;
mod systemd;

pub use none::end_roles;

/// Calls the function of that name in the file of its kind.
macro_rules! of {
    ($kind:expr, $name:ident($($argument:expr),*)) => {
        match $kind {
            ServiceManagerKind::Systemd => systemd::$name($($argument),*),
            ServiceManagerKind::None => none::$name($($argument),*),
        }
    };
}

/// The service manager that runs on this host.
pub fn detect() -> ServiceManagerKind {
    if systemd::runs() { ServiceManagerKind::Systemd } else { ServiceManagerKind::None }
}

/// The service manager that runs on this host, where the home is registered with it.
pub fn registered_with(home: &Home) -> ServiceManagerKind {
    let kind = detect();
    if is_registered(kind, home) { kind } else { ServiceManagerKind::None }
}

/// The service manager with which the home is registered, whether or not that one runs now.
pub fn registration_left(home: &Home) -> Option<ServiceManagerKind> {
    ServiceManagerKind::ALL.iter().copied().find(|kind| is_registered(*kind, home))
}

/// Whether it could run the roles of this home.
pub fn can_register(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, can_register(home))
}

/// Whether a registration of the home could be taken back.
pub fn can_unregister(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, can_unregister(home))
}

/// Registers the roles, to be started at boot. Twice is as good as once.
pub fn register(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, register(home))
}

/// Brings what an earlier release registered for this home under other names under its own; for an operator's start, not for a role's.
pub fn settle(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, settle(home))
}

/// Brings what an earlier release registered up to what this one registers; whether there was something to do.
pub fn refresh(kind: ServiceManagerKind, home: &Home) -> Result<bool> {
    of!(kind, refresh(home))
}

/// Takes back [`register`], also where a part of it is gone already. What an operator added stays for the next registration.
pub fn unregister(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, unregister(home))
}

/// [`unregister`] for good: what an operator added goes too.
pub fn purge(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, purge(home))
}

/// Whether anything stands of a registration of this home.
pub fn is_registered(kind: ServiceManagerKind, home: &Home) -> bool {
    of!(kind, is_registered(home))
}

/// Whether anything of this home is known to it: a registration, or what it remembers without one.
pub fn is_known(kind: ServiceManagerKind, home: &Home) -> bool {
    of!(kind, is_known(home))
}

/// Starts roles; one that runs is left as it is. The child is the manager, where no service manager is its parent.
pub fn start(kind: ServiceManagerKind, home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    of!(kind, start(home, roles))
}

/// Stops roles, which is a stop: the sub-agents go too.
pub fn stop(kind: ServiceManagerKind, home: &Home, roles: &[Role]) -> Result<()> {
    of!(kind, stop(home, roles))
}

/// Restarts roles; the sub-agents keep running. The child is the manager, where no service manager is its parent.
pub fn restart(kind: ServiceManagerKind, home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    of!(kind, restart(home, roles))
}

/// What it knows of a role's unit.
pub fn standing(kind: ServiceManagerKind, home: &Home, role: Role) -> Result<UnitStanding> {
    of!(kind, standing(home, role))
}

/// Whether a role's unit is being stopped only to be started again.
pub fn is_restarting(kind: ServiceManagerKind, home: &Home, role: Role) -> Result<bool> {
    of!(kind, is_restarting(home, role))
}
