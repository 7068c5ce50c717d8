//! The service control manager of Windows: a service for each role, and its state.
//!
//! ```text
//! service <unit>     bin\aops.exe spm --home … --service scm; automatic, delayed; restarted whatever its exit code, except 0
//! sc stop            the manager: stops the sub-agents, too. The watchdog: stops alone
//! control restart    asks each role to exit, which leaves the sub-agents running, and starts its service
//! ```

pub mod foreign;

use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::core::role::Role;
use crate::core::service_manager::{ServiceManagerKind, UnitCondition};
use crate::home::Home;
use crate::host_service::foreign::ForeignUnit;
use crate::platform::{self, ServiceDefinition, ServiceRun, ServiceState};
use crate::role;

/// Timeout until a service that was started runs.
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// Timeout until a service that was stopped has stopped: for the longest grace period of a sub-agent.
const STOP_TIMEOUT: Duration = Duration::from_secs(1000);
/// Timeout until the name of a removed service is free.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the host waits for a role at its shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(900);
const POLL: Duration = Duration::from_millis(50);

/// Whether this host has a service control manager.
pub fn runs() -> bool {
    platform::has_service_manager()
}

/// Runs a role as a service. A start of the manager's service also starts the watchdog's.
pub fn run(
    home: &Home,
    role: Role,
    on_stop: impl FnOnce() + Send + 'static,
    main: impl FnOnce() -> ExitCode + Send + 'static,
) -> Result<ExitCode> {
    let name = home.unit(role);
    let watchdog = home.unit(Role::Spa);
    let main = move || {
        // The service control manager may wait for this service before it starts another one.
        let start = move || platform::start_service(&watchdog);
        if role == Role::Spm && std::thread::Builder::new().spawn(start).is_err() {
            tracing::warn!("cannot start the service of the watchdog; the manager starts the watchdog");
        }
        main()
    };
    platform::run_as_service(&name, &[role::STOPPED_ON_PURPOSE], on_stop, main).with_context(|| {
        format!(
            "cannot run as the service {name}: only the service control manager can start it; run `sc start {name}`"
        )
    })
}

fn definition(home: &Home, role: Role) -> ServiceDefinition {
    let (program, subcommand) = home.role_program(role);
    let (what, does) = match role {
        Role::Spm => ("manager", "Keeps the agents of this host installed, at the right version, running and reported"),
        Role::Spa => ("watchdog", "Keeps the manager of this host's agents running"),
    };
    let shown = home.public_path();
    let options =
        ["--home".into(), shown.clone().into(), "--service".into(), ServiceManagerKind::Scm.to_string().into()];
    ServiceDefinition {
        name: home.unit(role),
        display_name: format!("aops {what} ({})", shown.display()),
        description: does.to_owned(),
        program: home.to_public(&program),
        arguments: subcommand.map(Into::into).into_iter().chain(options).collect(),
        stop_timeout: SHUTDOWN_TIMEOUT,
    }
}

/// The state of a role's service. One that somebody else registered under its name does not count.
fn state(home: &Home, role: Role) -> Result<Option<ServiceState>> {
    let name = home.unit(role);
    let state = platform::service_state(&name).with_context(|| format!("cannot query the service {name}"))?;
    Ok(state.filter(|state| is_ours(&state.command)))
}

/// Whether aops has registered a service with this command line, in this release or another one.
fn is_ours(command: &str) -> bool {
    let option = format!(" --service {}", ServiceManagerKind::Scm);
    let is_next = |rest: &str| rest.is_empty() || rest.starts_with(' ');
    command.contains(" --home ") && command.split(&option).skip(1).any(is_next)
}

/// Whether a service runs: the state of one whose process was killed may be out of date.
fn is_up(state: &ServiceState) -> bool {
    let lives = || state.pid.is_none_or(|pid| platform::start_time(pid).is_some());
    state.run.has_process() && lives()
}

pub fn can_register(home: &Home, replaced: &[ForeignUnit]) -> Result<()> {
    platform::can_register_services().context(
        "cannot register services: run the command as an administrator, in an elevated command prompt, or use --service none",
    )?;
    for role in Role::BOTH {
        let name = home.unit(*role);
        let what = || format!("cannot register the service {name}");
        let Some(there) = platform::registered_service(&name).with_context(what)? else { continue };
        if is_ours(&there.command) {
            continue;
        }
        if !replaced.iter().any(|unit| unit.name() == name) {
            bail!(
                "{}: another service has this name and runs {}; remove it with `sc delete {name}` if nothing needs it, or use another --home",
                what(),
                there.command
            );
        }
        if there.has_password() {
            bail!(
                "{}: the service of this name runs as {}, whose password could not be put back; have it run as LocalSystem, or remove it \
                 with `sc delete {name}`",
                what(),
                there.account.unwrap_or_default()
            );
        }
    }
    Ok(())
}

pub fn can_unregister(home: &Home) -> Result<()> {
    if is_registered(home) && !platform::is_root() {
        bail!("cannot remove the services of {}: run the command in an elevated command prompt", home.root().display());
    }
    Ok(())
}

pub fn register(home: &Home) -> Result<()> {
    for role in Role::BOTH {
        let definition = definition(home, *role);
        platform::register_service(&definition)
            .with_context(|| format!("cannot register the service {}", definition.name))?;
    }
    Ok(())
}

pub fn rename_strays(_home: &Home) -> Result<()> {
    Ok(())
}

/// Updates services that an earlier release registered. One that an operator disabled stays as it is.
pub fn refresh(home: &Home) -> Result<bool> {
    let mut has_outdated = false;
    for role in Role::BOTH {
        let definition = definition(home, *role);
        let is_ours_to_change = state(home, *role)?.is_some_and(|state| !state.is_disabled);
        if is_ours_to_change && !platform::is_service_current(&definition)? {
            platform::register_service(&definition)?;
            has_outdated = true;
        }
    }
    Ok(has_outdated)
}

/// Removes the services, also if one is already gone. What somebody else registered under the name of one stays.
pub fn unregister(home: &Home) -> Result<()> {
    for role in Role::BOTH {
        let name = home.unit(*role);
        if state(home, *role)?.is_none() {
            continue;
        }
        platform::remove_service(&name).with_context(|| format!("cannot remove the service {name}"))?;
        let deadline = Instant::now() + REMOVAL_TIMEOUT;
        // Until every program has closed it, the name is taken.
        while platform::service_state(&name).is_ok_and(|state| state.is_some()) && Instant::now() < deadline {
            platform::pause(POLL);
        }
    }
    Ok(())
}

pub fn purge(home: &Home) -> Result<()> {
    unregister(home)
}

pub fn is_registered(home: &Home) -> bool {
    Role::BOTH.iter().any(|role| matches!(state(home, *role), Ok(Some(_))))
}

pub fn is_known(home: &Home) -> bool {
    is_registered(home)
}

/// Starts the services of the roles and waits until they run.
pub fn start(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    for role in roles {
        start_one(home, *role)?;
    }
    Ok(None)
}

fn start_one(home: &Home, role: Role) -> Result<()> {
    let name = home.unit(role);
    let what = || format!("cannot start the service {name}");
    platform::start_service(&name).with_context(what)?;
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let state = state(home, role)?;
        if state.as_ref().is_some_and(|state| state.run.has_process() && !is_up(state)) {
            // The service control manager has not noticed the end of its process. A service that it starts later takes over.
            return role::spawn(home, role).map(drop);
        }
        match state.map(|state| state.run) {
            Some(ServiceRun::Running) => return Ok(()),
            Some(ServiceRun::Changing) if Instant::now() < deadline => platform::pause(POLL),
            Some(ServiceRun::Changing) => bail!("{}: it did not start within {START_TIMEOUT:?}", what()),
            Some(ServiceRun::Stopped) => bail!("{}: it stopped at once; see {}", what(), log(home, role).display()),
            // It is restarted soon.
            Some(ServiceRun::Failed) => return Ok(()),
            None => bail!("{}: it does not exist", what()),
        }
    }
}

fn log(home: &Home, role: Role) -> std::path::PathBuf {
    home.role_log(role.name())
}

/// Stops the services of the roles, with the sub-agents.
pub fn stop(home: &Home, roles: &[Role]) -> Result<()> {
    for role in roles {
        let name = home.unit(*role);
        let what = || format!("cannot stop the service {name}");
        if !state(home, *role)?.is_some_and(|state| is_up(&state)) {
            continue;
        }
        platform::stop_service(&name).with_context(what)?;
        wait_until_stopped(home, *role, STOP_TIMEOUT).with_context(what)?;
    }
    Ok(())
}

fn wait_until_stopped(home: &Home, role: Role, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    while state(home, role)?.is_some_and(|state| is_up(&state)) {
        if Instant::now() >= deadline {
            bail!("it is still running after {timeout:?}");
        }
        platform::pause(POLL);
    }
    Ok(())
}

/// Restarts the services of the roles, one after the other, so that one of them always runs and restarts the other if this process is
/// killed. The sub-agents keep running: a role that exits when it is asked to does not stop them.
pub fn restart(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    for role in roles {
        if let Some(holder) = role::living(home, *role) {
            holder.request_exit()?;
            holder.wait_for_exit()?;
        }
        start_one(home, *role)?;
    }
    Ok(None)
}

/// The state of a role's service.
pub fn standing(home: &Home, role: Role) -> Result<UnitCondition> {
    Ok(match state(home, role)? {
        None => UnitCondition::Missing,
        Some(state) if is_up(&state) => UnitCondition::Active,
        Some(state) if state.is_disabled => UnitCondition::Forbidden,
        Some(state) if state.run == ServiceRun::Stopped => UnitCondition::Stopped,
        Some(_) => UnitCondition::Dead,
    })
}

/// Never: a restart does not stop the service, but asks its process to exit.
pub fn is_restarting(_home: &Home, _role: Role) -> Result<bool> {
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::is_ours;
    use crate::platform::RegisteredService;

    #[test]
    fn our_services_are_recognized_by_their_command_line() {
        for (command, expected) in [
            (r#""C:\Program Files\aops\bin\aops.exe" spm --home "C:\Program Files\aops" --service scm"#, true),
            (r"D:\ops\bin\aops-spa.exe --home D:\ops --service scm --later option", true),
            (r"D:\ops\bin\aops-spa.exe --home D:\ops --service scmx", false),
            (r"D:\ops\bin\aops-spm.exe --service scm", false),
            (r"D:\ops\bin\aops-spm.exe -c D:\ops\etc\conf.yml", false),
        ] {
            assert_eq!(is_ours(command), expected, "{command}");
        }
    }

    #[test]
    fn only_accounts_of_people_have_a_password() {
        for (account, expected) in [
            (None, false),
            (Some("LocalSystem"), false),
            (Some(r".\LocalSystem"), false),
            (Some(r"NT AUTHORITY\NetworkService"), false),
            (Some(r"NT Service\aops-spm"), false),
            (Some(r"CORP\monitor$"), false),
            (Some(r".\monitor"), true),
            (Some(r"CORP\monitor"), true),
        ] {
            let service = RegisteredService {
                name: "aops-spm".to_owned(),
                display_name: String::new(),
                description: None,
                command: String::new(),
                service_type: 0x10,
                start_type: 2,
                error_control: 1,
                is_delayed: None,
                dependencies: vec![],
                account: account.map(str::to_owned),
                failure: None,
                is_running: false,
            };
            assert_eq!(service.has_password(), expected, "{account:?}");
        }
    }
}
