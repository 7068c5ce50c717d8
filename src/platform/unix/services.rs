//! The service control manager of Windows: there is none here.

use std::io;
use std::process::ExitCode;

use crate::platform::{RegisteredService, ServiceDefinition, ServiceState};

fn unsupported() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "this system has no service control manager")
}

/// Always false.
pub fn has_service_manager() -> bool {
    false
}

/// Always an error.
pub fn can_register_services() -> io::Result<()> {
    Err(unsupported())
}

/// Always an error.
pub fn register_service(_definition: &ServiceDefinition) -> io::Result<()> {
    Err(unsupported())
}

/// Always false.
pub fn is_service_current(_definition: &ServiceDefinition) -> io::Result<bool> {
    Ok(false)
}

/// No service exists.
pub fn service_state(_name: &str) -> io::Result<Option<ServiceState>> {
    Ok(None)
}

/// No service exists.
pub fn registered_service(_name: &str) -> io::Result<Option<RegisteredService>> {
    Ok(None)
}

/// There are none.
pub fn registered_services() -> io::Result<Vec<RegisteredService>> {
    Ok(Vec::new())
}

/// Always an error.
pub fn can_change_service(_name: &str) -> io::Result<()> {
    Err(unsupported())
}

/// Never.
pub fn may_stop_later(_error: &io::Error) -> bool {
    false
}

/// Always an error.
pub fn disable_service(_name: &str) -> io::Result<()> {
    Err(unsupported())
}

/// Always an error.
pub fn restore_service(_service: &RegisteredService) -> io::Result<()> {
    Err(unsupported())
}

/// Always an error.
pub fn start_service(_name: &str) -> io::Result<()> {
    Err(unsupported())
}

/// Nothing to do.
pub fn stop_service(_name: &str) -> io::Result<()> {
    Ok(())
}

/// Nothing to do.
pub fn remove_service(_name: &str) -> io::Result<()> {
    Ok(())
}

/// Nothing to do: the log of a role has it.
pub fn log_milestone(_text: &str, _is_failure: bool) {}

/// Always an error.
pub fn run_as_service(
    _name: &str,
    _on_purpose: &'static [u8],
    _on_stop: impl FnOnce() + Send + 'static,
    _main: impl FnOnce() -> ExitCode + Send + 'static,
) -> io::Result<ExitCode> {
    Err(unsupported())
}
