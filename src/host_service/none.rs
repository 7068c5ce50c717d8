//! No service manager: the manager is started in a session of its own and starts the watchdog; from then on each restarts the other.
//!
//! While a release of the manager is on trial, the watchdog is started together with it: a broken manager may fail to start one.
//!
//! Nothing is registered, so nothing starts the home at boot. A stop is recorded in the home, and both roles comply with it.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::control_socket::{self, Request};
use crate::core::role::Role;
use crate::core::service_manager::UnitCondition;
use crate::home::Home;
use crate::installation::upgrade;
use crate::{platform, role};

/// Timeout of a request to the manager.
const YIELD_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for an exiting manager to be gone, or for a starting one to answer.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

pub fn can_register(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn can_unregister(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn register(_home: &Home) -> Result<()> {
    Ok(())
}

pub fn rename_strays(_home: &Home) -> Result<()> {
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
    let deadline = Instant::now() + EXIT_TIMEOUT;
    while role::is_held(home, Role::Spm) {
        let answers = matches!(control_socket::request(home, &Request::Ping, YIELD_TIMEOUT), Ok(Some(_)));
        if answers || Instant::now() >= deadline {
            return start_watchdog_on_trial(home).map(|()| None);
        }
        // A killed manager holds the role for a moment, and no other process would start a new one.
        platform::pause(POLL);
    }
    spawn(home)
}

fn spawn(home: &Home) -> Result<Option<Child>> {
    let manager = role::spawn(home, Role::Spm)?;
    start_watchdog_on_trial(home)?;
    Ok(Some(manager))
}

/// Starts the watchdog if an upgrade of the manager is on trial and no watchdog evaluates it.
fn start_watchdog_on_trial(home: &Home) -> Result<()> {
    // If the record cannot be read, an additional watchdog does no harm: it exits, since the role is taken.
    let is_on_trial = upgrade::load(home).map_or(true, |record| record.trial().is_some());
    if is_on_trial && !role::is_held(home, Role::Spa) {
        role::spawn(home, Role::Spa)?;
    }
    Ok(())
}

pub fn stop(_home: &Home, _roles: &[Role]) -> Result<()> {
    Ok(())
}

pub fn restart(home: &Home, _roles: &[Role]) -> Result<Option<Child>> {
    stop_roles(home)?;
    spawn(home)
}

pub fn standing(_home: &Home, _role: Role) -> Result<UnitCondition> {
    Ok(UnitCondition::Missing)
}

pub fn is_restarting(_home: &Home, _role: Role) -> Result<bool> {
    bail!("cannot determine whether this is a restart: no service manager found on this host")
}

/// Stops both roles, the watchdog first, and leaves the sub-agents running. A service manager would restart its own roles. The manager
/// restarts the watchdog after a delay, and is stopped within it.
pub fn stop_roles(home: &Home) -> Result<()> {
    if let Some(watchdog) = role::living(home, Role::Spa) {
        watchdog.request_exit()?;
        watchdog.wait_for_exit()?;
    }
    if let Some(manager) = role::living(home, Role::Spm) {
        if !matches!(control_socket::request(home, &Request::Yield, YIELD_TIMEOUT), Ok(Some(_))) {
            manager.request_exit()?;
        }
        manager.wait_for_exit()?;
    }
    Ok(())
}
