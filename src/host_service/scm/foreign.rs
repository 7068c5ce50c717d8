//! Services that somebody else registered for the programs in a home. A service is set aside by disabling it. Its settings are recorded: ours
//! may get its name, and with it its place.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{POLL, START_TIMEOUT, is_ours, is_up};
use crate::home::Home;
use crate::host_service::foreign::ForeignUnit;
use crate::platform::{self, RegisteredService, ServiceRun, ServiceState};

/// After that the processes of a service are stopped without it.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// The services that run a program in the home and were not registered by aops.
pub fn find(home: &Home) -> Result<Vec<ForeignUnit>> {
    let services = platform::registered_services().context("cannot list the services of this host")?;
    let is_foreign = |service: &RegisteredService| runs_from(home, &service.command) && !is_ours(&service.command);
    let unit = |service: RegisteredService| ForeignUnit {
        name: service.name.clone(),
        is_active: service.is_running,
        paths: vec![],
        registration: Some(service),
    };
    Ok(services.into_iter().filter(is_foreign).map(unit).collect())
}

/// Whether a service with this command line runs a program in the home.
fn runs_from(home: &Home, command: &str) -> bool {
    program_in(command).ancestors().skip(1).any(|path| home.is_at(path))
}

/// Checks that they can be set aside.
pub fn can_set_aside(units: &[ForeignUnit]) -> Result<()> {
    for unit in units {
        platform::can_change_service(&unit.name).with_context(|| {
            format!(
                "cannot remove the service {} of the old installation: run the command in an elevated command prompt",
                unit.name
            )
        })?;
    }
    Ok(())
}

/// Stops and disables them: one may start another again, and Windows one that has failed.
pub fn stop(units: &[ForeignUnit]) -> Result<()> {
    set_aside(units)?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    loop {
        let mut running = Vec::new();
        for unit in units {
            if state(unit)?.is_some_and(|state| is_up(&state)) {
                running.push(unit.name());
                stop_one(unit)?;
            }
        }
        if running.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            tracing::warn!(services = ?running, "services do not stop; their processes are stopped");
            return Ok(());
        }
        platform::pause(POLL);
    }
}

fn stop_one(unit: &ForeignUnit) -> Result<()> {
    match platform::stop_service(&unit.name) {
        Err(error) if !platform::may_stop_later(&error) => {
            Err(error).with_context(|| format!("cannot stop the service {}", unit.name))
        }
        _ => Ok(()),
    }
}

fn state(unit: &ForeignUnit) -> Result<Option<ServiceState>> {
    platform::service_state(&unit.name).with_context(|| format!("cannot query the service {}", unit.name))
}

/// Whether a service has the recorded command: the name may belong to ours or to another one meanwhile.
fn is_as_recorded(unit: &ForeignUnit) -> Result<bool> {
    let command = unit.registration.as_ref().map(|service| service.command.as_str());
    Ok(state(unit)?.is_some_and(|state| Some(state.command.as_str()) == command))
}

/// Disables them, except where ours has the name already.
pub fn set_aside(units: &[ForeignUnit]) -> Result<()> {
    each(units, |unit| {
        if is_as_recorded(unit)? {
            platform::disable_service(&unit.name)
                .with_context(|| format!("cannot disable the service {}", unit.name))?;
        }
        Ok(())
    })
}

/// Registers them as before, also if some are in place already. Starts nothing.
pub fn put_back(units: &[ForeignUnit]) -> Result<()> {
    each(units, |unit| {
        let there = state(unit)?;
        let is_of_another = there.is_some_and(|there| !is_ours(&there.command)) && !is_as_recorded(unit)?;
        let restored = match &unit.registration {
            Some(service) if !is_of_another => platform::restore_service(service),
            _ => Ok(()),
        };
        restored.with_context(|| format!("cannot register the service {} as before", unit.name))
    })
}

/// Removes those that aops has not replaced by its own.
pub fn remove(units: &[ForeignUnit]) -> Result<()> {
    each(units, |unit| {
        if is_as_recorded(unit)? {
            platform::remove_service(&unit.name).with_context(|| format!("cannot remove the service {}", unit.name))?;
        }
        Ok(())
    })
}

/// Starts those that were active, and has them start at boot as before.
pub fn start(units: &[ForeignUnit]) -> Result<()> {
    let restored = put_back(units);
    let active: Vec<ForeignUnit> = units.iter().filter(|unit| unit.is_active).cloned().collect();
    // All at once: one may need another.
    let outcome = each(&active, |unit| platform::start_service(&unit.name).with_context(|| cannot_start(unit)));
    restored.and(outcome).and(each(&active, wait_until_started))
}

fn cannot_start(unit: &ForeignUnit) -> String {
    format!("cannot start the service {}", unit.name)
}

fn wait_until_started(unit: &ForeignUnit) -> Result<()> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        match state(unit)?.map(|state| state.run) {
            Some(ServiceRun::Running) => return Ok(()),
            Some(ServiceRun::Changing) if Instant::now() < deadline => platform::pause(POLL),
            Some(ServiceRun::Changing) => bail!("{}: it did not start within {START_TIMEOUT:?}", cannot_start(unit)),
            Some(ServiceRun::Stopped | ServiceRun::Failed) => bail!("{}: it stopped at once", cannot_start(unit)),
            None => bail!("{}: it does not exist", cannot_start(unit)),
        }
    }
}

/// Does it for each, also after a failure; the error lists all failures.
fn each(units: &[ForeignUnit], work: impl Fn(&ForeignUnit) -> Result<()>) -> Result<()> {
    let failures: Vec<String> =
        units.iter().filter_map(|unit| work(unit).err()).map(|error| format!("{error:#}")).collect();
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}

/// The program in the command line of a service. Without quotation marks, its path may have spaces: it ends with the first `.exe`.
fn program_in(command: &str) -> PathBuf {
    let command = command.trim_start();
    let program = match command.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next().unwrap_or_default(),
        None => {
            let end = command.to_ascii_lowercase().find(".exe").map(|start| start + ".exe".len());
            &command[..end.unwrap_or_else(|| command.find(' ').unwrap_or(command.len()))]
        }
    };
    Path::new(program).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_a_service_is_found_in_its_command_line() {
        for (command, program) in [
            (r#""C:\Program Files\aops\bin\spm.exe" -c etc\conf.yml"#, r"C:\Program Files\aops\bin\spm.exe"),
            (r"C:\Program Files\aops\bin\spm.EXE --service", r"C:\Program Files\aops\bin\spm.EXE"),
            (r"C:\aops\spm start", r"C:\aops\spm"),
            (r"C:\aops\spm", r"C:\aops\spm"),
        ] {
            assert_eq!(program_in(command), Path::new(program), "{command}");
        }
    }
}
