//! The host's service manager: registers the two roles of a home, starts and stops them, and reports the state of their units.
//!
//! Each kind of service manager has a file here, and each file has the same functions, including [`none`]. This module dispatches to the
//! file of the given kind; code outside never branches on the kind. Whether a home is registered, and with which kind, is stored in its
//! `state/install.json`.

use std::process::{Child, ExitCode};

use anyhow::Result;

use crate::core::role::Role;
use crate::core::service_manager::{ServiceManagerKind, UnitCondition};
use crate::home::Home;

mod foreign;
mod none;
pub mod product;
mod scm;
mod systemd;

pub use foreign::ForeignUnit;
pub use none::stop_watchdog;

/// Calls the function of that name in the file of the kind.
macro_rules! of {
    ($kind:expr, $name:ident($($argument:expr),*)) => {
        match $kind {
            ServiceManagerKind::Systemd => systemd::$name($($argument),*),
            ServiceManagerKind::Scm => scm::$name($($argument),*),
            ServiceManagerKind::None => none::$name($($argument),*),
        }
    };
}

/// Calls the function of that name for foreign units, which belong to the service manager that runs on this host.
macro_rules! of_foreign {
    ($name:ident($units:expr)) => {
        if scm::runs() { scm::foreign::$name($units) } else { systemd::foreign::$name($units) }
    };
}

/// The service manager that runs on this host.
pub fn detect() -> ServiceManagerKind {
    if systemd::runs() {
        ServiceManagerKind::Systemd
    } else if scm::runs() {
        ServiceManagerKind::Scm
    } else {
        ServiceManagerKind::None
    }
}

/// The service manager that runs on this host, if the home is registered with it.
pub fn registered_with(home: &Home) -> ServiceManagerKind {
    let kind = detect();
    if is_registered(kind, home) { kind } else { ServiceManagerKind::None }
}

/// The service manager with which the home is registered, whether or not that one runs now.
pub fn find_registration(home: &Home) -> Option<ServiceManagerKind> {
    ServiceManagerKind::ALL.iter().copied().find(|kind| is_registered(*kind, home))
}

/// Runs a role in the way in which its service manager starts it. A service manager that tells the process itself to stop makes it call
/// `on_stop`, in another thread, before the role is asked to exit.
pub fn run(
    kind: ServiceManagerKind,
    home: &Home,
    role: Role,
    on_stop: impl FnOnce() + Send + 'static,
    main: impl FnOnce() -> Result<ExitCode> + Send + 'static,
) -> Result<ExitCode> {
    if kind != ServiceManagerKind::Scm {
        return main();
    }
    scm::run(home, role, on_stop, || {
        main().unwrap_or_else(|error| {
            tracing::error!(error = format!("{error:#}"), "the role has failed");
            ExitCode::FAILURE
        })
    })
}

/// Whether a role that the service manager started may continue as another program: the process that it watches stays the same.
pub fn can_replace_program(kind: ServiceManagerKind) -> bool {
    kind != ServiceManagerKind::Scm
}

/// Checks that the roles of this home can be registered. `replaced`: the units that are set aside before.
pub fn can_register(kind: ServiceManagerKind, home: &Home, replaced: &[ForeignUnit]) -> Result<()> {
    of!(kind, can_register(home, replaced))
}

/// Checks that the registration of the home can be removed.
pub fn can_unregister(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, can_unregister(home))
}

/// Registers the roles, to be started at boot. Registering twice is not an error.
pub fn register(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, register(home))
}

/// Renames units that an earlier release registered for this home under other names. For an operator's start, not for a role's.
pub fn rename_strays(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, rename_strays(home))
}

/// Updates the units that an earlier release registered; whether there was anything to update.
pub fn refresh(kind: ServiceManagerKind, home: &Home) -> Result<bool> {
    of!(kind, refresh(home))
}

/// Enables the units that a package of the host brings, also in the root file system of an image. Does nothing without units.
pub fn enable_package_units(home: &Home) -> Result<()> {
    systemd::enable_package_units(home)
}

/// The units of a package of the host, by their names: those of the default home.
#[cfg(feature = "documents")]
pub fn package_units() -> Result<Vec<(String, String)>> {
    systemd::package_units()
}

/// Has the service manager read the units that a package has replaced.
pub fn reload_package_units() -> Result<()> {
    if systemd::runs() { systemd::reload() } else { Ok(()) }
}

/// Reverts [`register`], also if parts of it are already gone. An operator's additions stay for the next registration.
pub fn unregister(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, unregister(home))
}

/// Like [`unregister`], but permanently: an operator's additions are removed too.
pub fn purge(kind: ServiceManagerKind, home: &Home) -> Result<()> {
    of!(kind, purge(home))
}

/// Whether any part of a registration of this home exists.
pub fn is_registered(kind: ServiceManagerKind, home: &Home) -> bool {
    of!(kind, is_registered(home))
}

/// Whether the service manager knows this home: a registration, or state that remains without one.
pub fn is_known(kind: ServiceManagerKind, home: &Home) -> bool {
    of!(kind, is_known(home))
}

/// The units that somebody else wrote for the programs in the home: those of the system that aops replaces. Without a service manager
/// (`kind`), those that run the home's `control` stay, because they start the home at boot.
pub fn foreign_units(kind: ServiceManagerKind, home: &Home) -> Result<Vec<ForeignUnit>> {
    match detect() {
        ServiceManagerKind::Systemd => systemd::foreign::find(home, !kind.is_some()),
        ServiceManagerKind::Scm => scm::foreign::find(home),
        ServiceManagerKind::None => Ok(Vec::new()),
    }
}

/// Checks that foreign units can be set aside.
pub fn can_set_foreign_aside(units: &[ForeignUnit]) -> Result<()> {
    of_foreign!(can_set_aside(units))
}

/// Stops foreign units. Those of systemd stay enabled.
pub fn stop_foreign(units: &[ForeignUnit]) -> Result<()> {
    of_foreign!(stop(units))
}

/// Sets foreign units aside, also if some are already.
pub fn set_foreign_aside(units: &[ForeignUnit]) -> Result<()> {
    of_foreign!(set_aside(units))
}

/// Puts foreign units back, enabled as before; starts nothing.
pub fn put_foreign_back(units: &[ForeignUnit]) -> Result<()> {
    of_foreign!(put_back(units))
}

/// Gives foreign units the names back that ours have taken over with their place. Elsewhere, [`put_foreign_back`] does, after ours are gone.
pub fn give_foreign_names_back(units: &[ForeignUnit]) -> Result<()> {
    if scm::runs() { scm::foreign::put_back(units) } else { Ok(()) }
}

/// Removes foreign units that were set aside.
pub fn remove_foreign(units: &[ForeignUnit]) -> Result<()> {
    of_foreign!(remove(units))
}

/// Starts the foreign units that were active.
pub fn start_foreign(units: &[ForeignUnit]) -> Result<()> {
    of_foreign!(start(units))
}

/// Starts roles; a running one is not restarted. Returns the manager's process if no service manager is its parent.
pub fn start(kind: ServiceManagerKind, home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    of!(kind, start(home, roles))
}

/// Stops roles with the sub-agents, as `control stop` does.
pub fn stop(kind: ServiceManagerKind, home: &Home, roles: &[Role]) -> Result<()> {
    of!(kind, stop(home, roles))
}

/// Restarts roles; the sub-agents keep running. Returns the manager's process if no service manager is its parent.
pub fn restart(kind: ServiceManagerKind, home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    of!(kind, restart(home, roles))
}

/// The state of a role's unit.
pub fn standing(kind: ServiceManagerKind, home: &Home, role: Role) -> Result<UnitCondition> {
    of!(kind, standing(home, role))
}

/// Whether a role's unit is being stopped as part of a restart.
pub fn is_restarting(kind: ServiceManagerKind, home: &Home, role: Role) -> Result<bool> {
    of!(kind, is_restarting(home, role))
}
