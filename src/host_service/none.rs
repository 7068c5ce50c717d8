//! No service manager: the manager is started in a session of its own, starts the watchdog, and the two start each other from then on.
//!
//! While a release of the manager is on trial, the watchdog is started with it: a bad manager may not come to start one.
//!
//! Nothing is registered, so nothing starts the home at boot. A stop is the recorded one, which both roles honour by themselves.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::control_socket::{self, Request};
use crate::core::role::Role;
use crate::core::service_manager::UnitStanding;
use crate::home::Home;
use crate::installation::upgrade;
use crate::{platform, role};

/// For the manager to give way.
const YIELD: Duration = Duration::from_secs(5);
/// For one that is dying to be gone, or for one that comes up to answer.
const DIES: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);

pub fn can_register(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn can_unregister(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn register(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn settle(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn refresh(_home: &Home) -> Result<bool> {
    Ok(false)
}

pub fn unregister(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn purge(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn is_registered(_home: &Home) -> bool {
    false
}

pub fn is_known(_home: &Home) -> bool {
    false
}

/// Starts the manager, which starts the watchdog.
pub fn start(home: &Home, _roles: &[Role]) -> Result<Option<Child>> {
    let deadline = Instant::now() + DIES;
    while role::is_held(home, Role::Spm) {
        let answers = matches!(control_socket::request(home, &Request::Ping, YIELD), Ok(Some(_)));
        if answers || Instant::now() >= deadline {
            return start_judge(home).map(|()| None);
        }
        // One that was killed has the role for a moment more, and nobody to start another.
        platform::pause(LOOK);
    }
    spawn(home)
}

fn spawn(home: &Home) -> Result<Option<Child>> {
    let manager = role::spawn(home, Role::Spm)?;
    start_judge(home)?;
    Ok(Some(manager))
}

/// Starts the watchdog where an upgrade of the manager is under way and nobody judges it.
fn start_judge(home: &Home) -> Result<()> {
    // Where the record cannot be read, a watchdog more does no harm: it gives up for want of the role.
    let is_under_way = upgrade::load(home).map_or(true, |record| record.trial().is_some());
    if is_under_way && !role::is_held(home, Role::Spa) {
        role::spawn(home, Role::Spa)?;
    }
    Ok(())
}

pub fn stop(_home: &Home, _roles: &[Role]) -> Result<()> {
    Ok(())
}

pub fn restart(home: &Home, _roles: &[Role]) -> Result<Option<Child>> {
    end_roles(home)?;
    spawn(home)
}

pub fn standing(_home: &Home, _role: Role) -> Result<UnitStanding> {
    Ok(UnitStanding::Missing)
}

pub fn is_restarting(_home: &Home, _role: Role) -> Result<bool> {
    bail!("cannot tell whether this is a restart: no service manager is found on this host")
}

/// Ends both roles, the watchdog first, and leaves the sub-agents running. A service manager would start its own again; the manager
/// starts a watchdog again after a moment, within which it ends itself.
pub fn end_roles(home: &Home) -> Result<()> {
    if let Some(watchdog) = role::living(home, Role::Spa) {
        watchdog.request_exit()?;
        watchdog.wait_for_exit()?;
    }
    if let Some(manager) = role::living(home, Role::Spm) {
        if !matches!(control_socket::request(home, &Request::Yield, YIELD), Ok(Some(_))) {
            manager.request_exit()?;
        }
        manager.wait_for_exit()?;
    }
    Ok(())
}
