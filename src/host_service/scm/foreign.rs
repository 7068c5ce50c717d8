//! Services that somebody else registered for the programs in a home. A service is set aside by disabling it; its settings are recorded,
//! since ours may get its name.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{POLL, START_TIMEOUT, is_ours};
use crate::home::Home;
use crate::host_service::foreign::{ForeignUnit, Registration};
use crate::platform::{self, RegisteredService, ServiceRun};

/// After that the processes of a service are stopped without it.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// The services that run a program in the home and were not registered by aops.
pub fn find(home: &Home) -> Result<Vec<ForeignUnit>> {
    let services = platform::registered_services().context("cannot list the services of this host")?;
    let is_foreign = |service: &RegisteredService| {
        let is_inside = program_in(&service.command).ancestors().skip(1).any(|path| home.is_at(path));
        is_inside && !is_ours(&service.command)
    };
    let unit = |service: RegisteredService| ForeignUnit {
        is_active: service.is_running,
        name: service.name,
        paths: vec![],
        registration: Some(Registration {
            display_name: service.display_name,
            command: service.command,
            start_type: service.start_type,
            account: service.account,
        }),
    };
    Ok(services.into_iter().filter(is_foreign).map(unit).collect())
}

/// Checks that they can be set aside.
pub fn can_set_aside(units: &[ForeignUnit]) -> Result<()> {
    if !units.is_empty() && !platform::is_root() {
        bail!("cannot remove the services of the old installation: run the command in an elevated command prompt");
    }
    Ok(())
}

/// Stops them; they still start at boot.
pub fn stop(units: &[ForeignUnit]) -> Result<()> {
    for unit in units {
        platform::stop_service(&unit.name).with_context(|| format!("cannot stop the service {}", unit.name))?;
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    for unit in units {
        while is_up(unit)? && Instant::now() < deadline {
            platform::pause(POLL);
        }
    }
    Ok(())
}

/// Whether a process of it runs.
fn is_up(unit: &ForeignUnit) -> Result<bool> {
    let state = platform::service_state(&unit.name);
    let state = state.with_context(|| format!("cannot query the service {}", unit.name))?;
    Ok(state.is_some_and(|state| super::is_up(&state)))
}

/// Disables them.
pub fn set_aside(units: &[ForeignUnit]) -> Result<()> {
    for unit in units {
        platform::disable_service(&unit.name).with_context(|| format!("cannot disable the service {}", unit.name))?;
    }
    Ok(())
}

/// Registers them as before, also if some are in place already. Starts nothing.
pub fn put_back(units: &[ForeignUnit]) -> Result<()> {
    for unit in units {
        let Some(registration) = &unit.registration else { continue };
        let service = RegisteredService {
            name: unit.name.clone(),
            display_name: registration.display_name.clone(),
            command: registration.command.clone(),
            start_type: registration.start_type,
            account: registration.account.clone(),
            is_running: false,
        };
        platform::restore_service(&service).with_context(|| format!("cannot register the service {}", unit.name))?;
    }
    Ok(())
}

/// Removes those that aops has not replaced by its own.
pub fn remove(units: &[ForeignUnit]) -> Result<()> {
    for unit in units {
        let state = platform::service_state(&unit.name);
        let state = state.with_context(|| format!("cannot query the service {}", unit.name))?;
        if state.is_some_and(|state| !is_ours(&state.command)) {
            platform::remove_service(&unit.name).with_context(|| format!("cannot remove the service {}", unit.name))?;
        }
    }
    Ok(())
}

/// Starts those that were active.
pub fn start(units: &[ForeignUnit]) -> Result<()> {
    for unit in units.iter().filter(|unit| unit.is_active) {
        let what = || format!("cannot start the service {}", unit.name);
        platform::start_service(&unit.name).with_context(what)?;
        let deadline = Instant::now() + START_TIMEOUT;
        while platform::service_state(&unit.name)
            .with_context(what)?
            .is_some_and(|state| state.run == ServiceRun::Changing)
        {
            if Instant::now() >= deadline {
                bail!("{}: it did not start within {START_TIMEOUT:?}", what());
            }
            platform::pause(POLL);
        }
    }
    Ok(())
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
