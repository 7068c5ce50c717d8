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
use crate::host_service::foreign::ForeignUnit;
use crate::installation::upgrade;
use crate::{platform, role};

/// Timeout of a request to the manager.
const YIELD_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for an exiting manager to be gone, or for a starting one to answer.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

pub fn can_register(_home: &Home, _replaced: &[ForeignUnit]) -> Result<()> {
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

/// Restarts both roles. One of them runs at any time, and the other one follows it even if this process is killed: the manager is asked to
/// exit when the next one is already waiting for its lock.
pub fn restart(home: &Home, _roles: &[Role]) -> Result<Option<Child>> {
    stop_watchdog(home)?;
    let before = role::living(home, Role::Spm);
    let mut next = spawn(home)?;
    let Some(manager) = before else { return Ok(next) };
    if !matches!(control_socket::request(home, &Request::Yield, YIELD_TIMEOUT), Ok(Some(_))) {
        manager.request_exit()?;
    }
    manager.wait_for_exit()?;
    // It does not wait longer for the lock than a manager takes to exit, unless that one hangs.
    let has_given_up = next.as_mut().is_some_and(|next| next.try_wait().is_ok_and(|status| status.is_some()));
    if has_given_up && !role::is_held(home, Role::Spm) { spawn(home) } else { Ok(next) }
}

pub fn standing(_home: &Home, _role: Role) -> Result<UnitCondition> {
    Ok(UnitCondition::Missing)
}

pub fn is_restarting(_home: &Home, _role: Role) -> Result<bool> {
    bail!("cannot determine whether this is a restart: no service manager found on this host")
}

/// Stops the watchdog. The manager starts another one after a delay, and is to be restarted or stopped within it.
pub fn stop_watchdog(home: &Home) -> Result<()> {
    if let Some(watchdog) = role::living(home, Role::Spa) {
        watchdog.request_exit()?;
        watchdog.wait_for_exit()?;
    }
    Ok(())
}
