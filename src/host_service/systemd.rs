//! systemd: the units of a home, and their state.
//!
//! The whole content of a unit is ours (`assets/aops-*.service`); operators change it with drop-ins. Every `systemctl` call has a timeout:
//! a hung PID 1 must not block us.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use service_manager::{RestartPolicy, ServiceInstallCtx, ServiceLabel, ServiceManager, SystemdServiceManager};

use crate::command;
use crate::core::role::Role;
use crate::core::service_manager::UnitCondition;
use crate::home::Home;
use crate::host_service::foreign::ForeignUnit;
use crate::store::{self, Access};

pub mod foreign;
mod units;

/// Timeout of calls that only query or write.
const QUERY_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of calls that wait until a role is up (`TimeoutStartSec=60`).
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// Timeout of calls that wait until both roles have stopped (`TimeoutStopSec=900`, for the longest grace period of a sub-agent) and are up
/// again.
const STOP_TIMEOUT: Duration = Duration::from_secs(1000);

/// The state of a unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct UnitState {
    /// `loaded`, `not-found`, `masked`, `bad-setting`, `error`.
    load_state: String,
    /// `active`, `activating`, `deactivating`, `inactive`, `failed`, `reloading`.
    active_state: String,
    /// `enabled`, `disabled`, `masked`, …; empty if there is no unit file.
    unit_file_state: String,
    /// The type of the unit's pending job: `start`, `stop`, `restart`, …
    job: Option<String>,
}

impl UnitState {
    /// Whether an operator masked or disabled it.
    fn is_forbidden(&self) -> bool {
        self.load_state == "masked" || matches!(self.unit_file_state.as_str(), "masked" | "masked-runtime" | "disabled")
    }

    fn standing(&self) -> UnitCondition {
        match self.active_state.as_str() {
            "active" | "activating" | "reloading" | "deactivating" => UnitCondition::Active,
            // The result of the job is visible at the next check.
            _ if self.job.is_some() => UnitCondition::Active,
            _ if self.is_forbidden() => UnitCondition::Forbidden,
            _ if self.load_state == "not-found" => UnitCondition::Missing,
            // Independent of the last result: a failure that is not a stop is `failed`, or in the delay before an automatic restart. A stop
            // during that delay keeps the result of the failed run.
            "inactive" => UnitCondition::Stopped,
            _ => UnitCondition::Dead,
        }
    }

    /// Whether it runs, or has a pending job.
    fn is_active(&self) -> bool {
        self.job.is_some() || !matches!(self.active_state.as_str(), "inactive" | "failed")
    }
}

/// Whether systemd runs on this host and `systemctl` is available.
pub fn runs() -> bool {
    Path::new("/run/systemd/system").is_dir() && SystemdServiceManager::system().available().unwrap_or(false)
}

/// Writes the units, reloads systemd, and enables the units of the roles. Units of this home with another name are replaced. Registering
/// twice is not an error.
pub fn register(home: &Home) -> Result<()> {
    write(home, true)
}

/// Enables the units of a package by their links, so that it works without a running systemd.
pub fn enable_package_units(home: &Home) -> Result<()> {
    for unit in units::of_roles(home, Role::BOTH) {
        let Some(file) = units::package_file(&unit) else { continue };
        let link = units::enabling_link(&unit);
        let attempt = || -> Result<()> {
            fs::create_dir_all(link.parent().context("it has a parent")?)?;
            Ok(crate::platform::replace_link(&file, &link)?)
        };
        attempt().with_context(|| format!("cannot enable {unit}: cannot create {}", link.display()))?;
    }
    if runs() { reload() } else { Ok(()) }
}

/// The units of a package of the host.
#[cfg(feature = "documents")]
pub fn package_units() -> Result<Vec<(String, String)>> {
    let files = units::files(&Home::new(crate::home::default_root()))?;
    Ok(files.into_iter().map(|file| (file.unit.clone(), file.of_package())).collect())
}

/// Has systemd read the unit files again.
pub fn reload() -> Result<()> {
    systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)
}

/// Renames units of this home that have another name, enabled or not as before. Does nothing if there are none. Not for a role: a role that
/// runs in such a unit would be stopped with it.
pub fn rename_strays(home: &Home) -> Result<()> {
    let strays = units::strays(home);
    if strays.is_empty() {
        return Ok(());
    }
    let mut known = strays
        .iter()
        .chain(units::of_roles(home, Role::BOTH).iter())
        .map(|unit| units::enabling_link(unit))
        .collect::<Vec<_>>();
    known.retain(|link| link.symlink_metadata().is_ok());
    write(home, !known.is_empty())
}

fn write(home: &Home, enable: bool) -> Result<()> {
    let strays = units::strays(home);
    units::move_drop_ins(home, &strays)?;
    for file in units::files(home)? {
        let attempt = || -> Result<()> {
            if !file.is_current()? {
                SystemdServiceManager::system().install(context(&file))?;
            }
            Ok(())
        };
        attempt().with_context(|| format!("cannot write the unit {}", units::own_path(&file.unit).display()))?;
    }
    systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)?;
    if enable {
        systemctl(&["enable"], &units::of_roles(home, Role::BOTH), QUERY_TIMEOUT)?;
    }
    retire(&strays)
}

/// Stops the processes of these units, except for the sub-agents, and removes the units.
fn retire(strays: &[String]) -> Result<()> {
    if strays.is_empty() {
        return Ok(());
    }
    for stray in strays {
        if let Some(contents) = units::without_hooks(stray)? {
            store::replace(&units::own_path(stray), contents.as_bytes(), Access::Public)?;
        }
    }
    systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)?;
    // One by one: the watchdog first, which would restart the manager.
    for stray in strays {
        systemctl(&["stop"], std::slice::from_ref(stray), STOP_TIMEOUT)?;
    }
    remove(strays)
}

/// Removes unit files, also if some are already gone.
fn remove(units: &[String]) -> Result<()> {
    for unit in units {
        // Not with `systemctl disable`, which fails if the file is gone, and then leaves its link.
        let link = units::enabling_link(unit);
        store::remove(&link)?;
        store::remove(&units::own_path(unit))?;
        let _ = link.parent().map(fs::remove_dir);
    }
    systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)?;
    // Removes a failed unit from systemd's list; the error for an unknown unit is ignored.
    let _ = systemctl(&["reset-failed"], units, QUERY_TIMEOUT);
    Ok(())
}

/// Updates units that an earlier release wrote; whether there were any. Units that are missing, masked, written by an operator, or named
/// differently are not changed. Running roles are not restarted.
pub fn refresh(home: &Home) -> Result<bool> {
    let mut has_outdated = false;
    for file in units::files(home)? {
        has_outdated |= file.refresh()?;
    }
    if has_outdated {
        systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT)?;
    }
    Ok(has_outdated)
}

/// Removes the units, whatever their names, also if some are already gone.
pub fn unregister(home: &Home) -> Result<()> {
    retire(&units::strays(home))?;
    let agents = home.agents_unit();
    if units::exists(&agents) {
        // This stops nothing of ours: it may only contain processes that a sub-agent started and that are not ours.
        systemctl(&["stop"], std::slice::from_ref(&agents), QUERY_TIMEOUT)?;
    }
    remove(&units::all(home))
}

/// Removes the units permanently, with the drop-ins that an operator added (`systemctl edit`).
pub fn purge(home: &Home) -> Result<()> {
    let units = [units::strays(home), units::all(home)].concat();
    unregister(home)?;
    let directories = units.iter().map(|unit| units::drop_ins(unit));
    let existing: Vec<_> = directories.filter(|directory| directory.exists()).collect();
    existing.iter().try_for_each(|directory| store::remove_tree(directory))?;
    if existing.is_empty() { Ok(()) } else { systemctl(&["daemon-reload"], &[], QUERY_TIMEOUT) }
}

/// Whether the units of this home can be removed.
pub fn can_unregister(_home: &Home) -> Result<()> {
    if let Some((directory, error)) = units::unwritable() {
        bail!("cannot remove the units: {} is not writable ({error}); make it writable", directory.display());
    }
    Ok(())
}

/// Whether systemd can run the roles of this home: it responds, and the units can be written.
pub fn can_register(home: &Home, _replaced: &[ForeignUnit]) -> Result<()> {
    units::files(home)?;
    if let Some((directory, error)) = units::unwritable() {
        bail!(
            "cannot register with systemd: {} is not writable ({error}); make it writable, or use --service none",
            directory.display()
        );
    }
    for role in Role::BOTH {
        let unit = home.unit(*role);
        if state(&unit)?.load_state == "masked" {
            bail!(
                "cannot register the unit {unit}: it is masked; run `systemctl unmask {unit}`, or use --service none"
            );
        }
    }
    Ok(())
}

/// Whether systemd knows this home: a unit file, or a unit that it remembers without one.
pub fn is_known(home: &Home) -> bool {
    let remembered = |role: &Role| state(&home.unit(*role)).is_ok_and(|unit| unit.active_state != "inactive");
    is_registered(home) || Role::BOTH.iter().any(remembered)
}

/// Whether a unit file of this home exists, whatever its name.
pub fn is_registered(home: &Home) -> bool {
    units::of_roles(home, Role::BOTH).iter().any(|unit| units::is_registered(unit)) || !units::strays(home).is_empty()
}

/// Starts the units of the roles and waits until they are up.
pub fn start(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    systemctl(&["start"], &in_use(home, roles), START_TIMEOUT).map(|()| None)
}

/// Stops the units of the roles with the sub-agents, as `control stop` does. A unit without a file, or with a bad one, may still run.
/// Inactive units are skipped.
pub fn stop(home: &Home, roles: &[Role]) -> Result<()> {
    let mut active = Vec::new();
    for unit in units::of_roles(home, roles).into_iter().chain(units::strays_of(home, roles)) {
        if state(&unit)?.is_active() {
            active.push(unit);
        }
    }
    if active.is_empty() {
        return Ok(());
    }
    systemctl(&["stop"], &active, STOP_TIMEOUT)
}

/// Restarts the units of the roles; the sub-agents keep running.
pub fn restart(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    systemctl(&["restart"], &in_use(home, roles), STOP_TIMEOUT).map(|()| None)
}

/// The state of a role's unit.
pub fn standing(home: &Home, role: Role) -> Result<UnitCondition> {
    Ok(state(&units::in_use(home, role))?.standing())
}

/// Whether a role's unit is being stopped as part of a restart.
pub fn is_restarting(home: &Home, role: Role) -> Result<bool> {
    Ok(matches!(state(&units::in_use(home, role))?.job.as_deref(), Some("restart" | "try-restart")))
}

fn in_use(home: &Home, roles: &[Role]) -> Vec<String> {
    roles.iter().map(|role| units::in_use(home, *role)).collect()
}

/// Queries the state of a unit.
fn state(unit: &str) -> Result<UnitState> {
    let properties = "--property=LoadState,ActiveState,UnitFileState,Job";
    let (mut state, job) = parse_show(&query(&["show", properties, &format!("{unit}.service")])?);
    if let Some(id) = job {
        // If the job ended between the two queries, the first answer is outdated: a job was pending then.
        let kind = query(&["show", "--property=JobType", &id]).ok().and_then(|shown| property(&shown, "JobType"));
        state.job = Some(kind.unwrap_or_else(|| "ended".to_owned()));
    }
    Ok(state)
}

/// Returns the number of the job too, if there is one.
fn parse_show(shown: &str) -> (UnitState, Option<String>) {
    let text = |name| property(shown, name).unwrap_or_default();
    let state = UnitState {
        load_state: text("LoadState"),
        active_state: text("ActiveState"),
        unit_file_state: text("UnitFileState"),
        job: None,
    };
    let job = property(shown, "Job").and_then(|job| job.split_whitespace().next().map(str::to_owned));
    (state, job.filter(|job| job != "0" && job.bytes().all(|byte| byte.is_ascii_digit())))
}

fn property(shown: &str, name: &str) -> Option<String> {
    let value = shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

fn context(file: &units::UnitFile) -> ServiceInstallCtx {
    ServiceInstallCtx {
        label: ServiceLabel { qualifier: None, organization: None, application: file.unit.clone() },
        program: file.program.clone(),
        args: Vec::new(),
        contents: Some(file.contents.clone()),
        username: None,
        working_directory: None,
        environment: None,
        // It would enable the unit before systemd has loaded it.
        autostart: false,
        restart_policy: RestartPolicy::default(),
    }
}

fn systemctl(verb: &[&str], units: &[String], deadline: Duration) -> Result<()> {
    let mut command = command();
    command.args(verb).args(units);
    let shown = || format!("cannot run `systemctl {}`", [verb.join(" "), units.join(" ")].join(" ").trim());
    let finished = command::run(&mut command, deadline).with_context(shown)?;
    finished.success().map(drop).with_context(shown)
}

fn query(arguments: &[&str]) -> Result<String> {
    let shown = || format!("cannot run `systemctl {}`", arguments.join(" "));
    let finished = command::run(command().args(arguments), QUERY_TIMEOUT).with_context(shown)?;
    Ok(finished.success().with_context(shown)?.stdout)
}

fn command() -> Command {
    let mut command = Command::new("systemctl");
    command.args(["--no-pager", "--no-ask-password"]).env("LC_ALL", "C").env("SYSTEMD_COLORS", "0");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_inactive_unit_counts_as_stopped() {
        let unit = |load: &str, active: &str, file: &str, job: Option<&str>| {
            let unit = UnitState {
                load_state: load.into(),
                active_state: active.into(),
                unit_file_state: file.into(),
                job: job.map(Into::into),
            };
            unit.standing()
        };
        assert_eq!(unit("loaded", "inactive", "enabled", None), UnitCondition::Stopped);
        let failed_before = "LoadState=loaded\nActiveState=inactive\nResult=signal\nUnitFileState=enabled\n";
        assert_eq!(parse_show(failed_before).0.standing(), UnitCondition::Stopped);
        assert_eq!(unit("loaded", "inactive", "enabled", Some("start")), UnitCondition::Active);
        assert_eq!(unit("loaded", "inactive", "enabled", Some("ended")), UnitCondition::Active);
        assert_eq!(unit("loaded", "activating", "enabled", None), UnitCondition::Active);
        assert_eq!(unit("loaded", "failed", "enabled", None), UnitCondition::Dead);
        assert_eq!(unit("masked", "failed", "masked", None), UnitCondition::Forbidden);
        assert_eq!(unit("loaded", "inactive", "disabled", None), UnitCondition::Forbidden);
        assert_eq!(unit("not-found", "inactive", "", None), UnitCondition::Missing);
    }

    #[test]
    fn the_output_of_systemctl_show_is_parsed() {
        let (state, job) = parse_show(
            "Job=4711\nLoadState=loaded\nActiveState=deactivating\nSubState=stop\nResult=success\nMainPID=42\nUnitFileState=enabled\n",
        );
        assert_eq!((state.active_state.as_str(), job.as_deref()), ("deactivating", Some("4711")));
        assert!(!state.is_forbidden());

        let (state, job) = parse_show(
            "MainPID=0\nLoadState=not-found\nActiveState=inactive\nSubState=dead\nResult=success\nUnitFileState=\nJob=\n",
        );
        assert_eq!((job, state.is_forbidden()), (None, false));
        assert!(parse_show("LoadState=masked\n").0.is_forbidden());
        assert!(parse_show("LoadState=loaded\nUnitFileState=disabled\nJob=0\n").0.is_forbidden());
    }
}
