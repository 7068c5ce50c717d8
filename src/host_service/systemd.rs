//! systemd: the units of a home, and what systemd says of them.
//!
//! A unit's whole content is ours (`assets/aops-*.service`); operators change it in drop-ins. Every call of `systemctl` has a deadline:
//! a hung PID 1 must not hang us.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use service_manager::{RestartPolicy, ServiceInstallCtx, ServiceLabel, ServiceManager, SystemdServiceManager};

use crate::command;
use crate::core::role::Role;
use crate::core::service_manager::UnitStanding;
use crate::home::Home;
use crate::store::{self, Access};

mod units;

/// For what only asks or writes.
const QUICK: Duration = Duration::from_secs(30);
/// For what waits until a role is up (`TimeoutStartSec=60`).
const STARTING: Duration = Duration::from_secs(90);
/// For what waits until both roles have ended (`TimeoutStopSec=900`, for the slowest sub-agent's grace period) and are up again.
const STOPPING: Duration = Duration::from_secs(1000);

/// What systemd says of a unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct UnitState {
    /// `loaded`, `not-found`, `masked`, `bad-setting`, `error`.
    load_state: String,
    /// `active`, `activating`, `deactivating`, `inactive`, `failed`, `reloading`.
    active_state: String,
    /// `enabled`, `disabled`, `masked`, …; empty where there is no file.
    unit_file_state: String,
    /// The kind of the job that is at work on the unit: `start`, `stop`, `restart`, …
    job: Option<String>,
}

impl UnitState {
    /// Whether nobody is to start it: an operator masked or disabled it.
    fn is_forbidden(&self) -> bool {
        self.load_state == "masked" || matches!(self.unit_file_state.as_str(), "masked" | "masked-runtime" | "disabled")
    }

    fn standing(&self) -> UnitStanding {
        match self.active_state.as_str() {
            "active" | "activating" | "reloading" | "deactivating" => UnitStanding::Coming,
            // Whatever is at work on it, what comes of that is seen at the next look.
            _ if self.job.is_some() => UnitStanding::Coming,
            _ if self.is_forbidden() => UnitStanding::Forbidden,
            _ if self.load_state == "not-found" => UnitStanding::Missing,
            // Whatever its last run's result: a failure that nobody stopped is `failed`, or about to be restarted. A stop in the pause before
            // an automatic restart leaves the result of the run that failed.
            "inactive" => UnitStanding::Stopped,
            _ => UnitStanding::Dead,
        }
    }

    /// Whether it runs, or systemd is about to start or stop it.
    fn is_at_work(&self) -> bool {
        self.job.is_some() || !matches!(self.active_state.as_str(), "inactive" | "failed")
    }
}

/// Whether this host runs under systemd, and can be told so.
pub fn runs() -> bool {
    Path::new("/run/systemd/system").is_dir() && SystemdServiceManager::system().available().unwrap_or(false)
}

/// Writes the units, makes systemd read them, and enables those of the roles; those of this home that bear another name are replaced by
/// them. Twice is as good as once.
pub fn register(home: &Home) -> Result<()> {
    write(home, true)
}

/// Brings what this home has under other names under its own, enabled or not as it was; nothing happens where there is no such unit.
/// Not for a role: it may be run by one of them, and would be stopped with it.
pub fn settle(home: &Home) -> Result<()> {
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
            if !file.stands()? {
                SystemdServiceManager::system().install(context(&file))?;
            }
            Ok(())
        };
        attempt().with_context(|| format!("cannot write the unit {}", units::path(&file.unit).display()))?;
    }
    systemctl(&["daemon-reload"], &[], QUICK)?;
    if enable {
        systemctl(&["enable"], &units::of_roles(home, Role::BOTH), QUICK)?;
    }
    retire(&strays)
}

/// Ends what runs under these units, the sub-agents excepted, and takes the units away.
fn retire(strays: &[String]) -> Result<()> {
    if strays.is_empty() {
        return Ok(());
    }
    for stray in strays {
        if let Some(quiet) = units::without_hooks(stray)? {
            store::replace(&units::path(stray), quiet.as_bytes(), Access::Public)?;
        }
    }
    systemctl(&["daemon-reload"], &[], QUICK)?;
    // One by one: the watchdog first, which would revive the manager.
    for stray in strays {
        systemctl(&["stop"], std::slice::from_ref(stray), STOPPING)?;
    }
    remove(strays)
}

/// Takes unit files away, also where some are gone already.
fn remove(units: &[String]) -> Result<()> {
    for unit in units {
        // By hand: `systemctl disable` fails where the file is gone, and then leaves its link behind.
        let link = units::enabling_link(unit);
        store::remove(&link)?;
        store::remove(&units::path(unit))?;
        let _ = link.parent().map(fs::remove_dir);
    }
    systemctl(&["daemon-reload"], &[], QUICK)?;
    // Forgets a failed unit, which would otherwise be listed for ever; one that is not known is an error that means nothing.
    let _ = systemctl(&["reset-failed"], units, QUICK);
    Ok(())
}

/// Brings units that an earlier release wrote up to what this one writes; whether there were any. What is missing, masked, an operator's
/// own, or called by another name is left as it is, and what runs goes on.
pub fn refresh(home: &Home) -> Result<bool> {
    let mut is_any = false;
    for file in units::files(home)? {
        is_any |= file.refresh()?;
    }
    if is_any {
        systemctl(&["daemon-reload"], &[], QUICK)?;
    }
    Ok(is_any)
}

/// Takes the units away, whatever they are called, also where some are gone already.
pub fn unregister(home: &Home) -> Result<()> {
    retire(&units::strays(home))?;
    let agents = home.agents_unit();
    if units::is_there(&agents) {
        // It ends nothing: nobody is left in it but what a sub-agent started for somebody else.
        systemctl(&["stop"], std::slice::from_ref(&agents), QUICK)?;
    }
    remove(&units::all(home))
}

/// Takes the units away for good, and with them what an operator has added to them (`systemctl edit`).
pub fn purge(home: &Home) -> Result<()> {
    let units = [units::strays(home), units::all(home)].concat();
    unregister(home)?;
    let directories = units.iter().map(|unit| units::drop_ins(unit));
    let there: Vec<_> = directories.filter(|directory| directory.exists()).collect();
    there.iter().try_for_each(|directory| store::remove_tree(directory))?;
    if there.is_empty() { Ok(()) } else { systemctl(&["daemon-reload"], &[], QUICK) }
}

/// Whether the units of this home could be taken away.
pub fn can_unregister(_home: &Home) -> Result<()> {
    if let Some((directory, error)) = units::closed() {
        bail!("cannot take the units away: {} cannot be written ({error}); make it writable", directory.display());
    }
    Ok(())
}

/// Whether systemd could run the roles of this home: it answers, and the units can be written.
pub fn can_register(home: &Home) -> Result<()> {
    units::files(home)?;
    if let Some((directory, error)) = units::closed() {
        bail!(
            "cannot register with systemd: {} cannot be written ({error}); make it writable, or say --service none",
            directory.display()
        );
    }
    for role in Role::BOTH {
        let unit = home.unit(*role);
        if state(&unit)?.load_state == "masked" {
            bail!(
                "cannot register the unit {unit}: it is masked; run `systemctl unmask {unit}`, or say --service none"
            );
        }
    }
    Ok(())
}

/// Whether there is anything of this home in systemd: a unit file, or a unit that it remembers without one.
pub fn is_known(home: &Home) -> bool {
    let remembered = |role: &Role| state(&home.unit(*role)).is_ok_and(|unit| unit.active_state != "inactive");
    is_registered(home) || Role::BOTH.iter().any(remembered)
}

/// Whether a unit file of this home stands, whatever it is called.
pub fn is_registered(home: &Home) -> bool {
    units::of_roles(home, Role::BOTH).iter().any(|unit| units::is_there(unit)) || !units::strays(home).is_empty()
}

/// Starts the units of the roles and waits until they are up.
pub fn start(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    systemctl(&["start"], &in_use(home, roles), STARTING).map(|()| None)
}

/// Stops the units of the roles, which is a stop: the sub-agents go too. A unit whose file is gone, or is bad, may be at work all the
/// same; one that is not at work is stopped.
pub fn stop(home: &Home, roles: &[Role]) -> Result<()> {
    let mut at_work = Vec::new();
    for unit in units::of_roles(home, roles).into_iter().chain(units::strays_of(home, roles)) {
        if state(&unit)?.is_at_work() {
            at_work.push(unit);
        }
    }
    if at_work.is_empty() {
        return Ok(());
    }
    systemctl(&["stop"], &at_work, STOPPING)
}

/// Restarts the units of the roles; the sub-agents keep running.
pub fn restart(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    systemctl(&["restart"], &in_use(home, roles), STOPPING).map(|()| None)
}

/// What systemd knows of a role's unit.
pub fn standing(home: &Home, role: Role) -> Result<UnitStanding> {
    Ok(state(&units::in_use(home, role))?.standing())
}

/// Whether a role's unit is being stopped only to be started again.
pub fn is_restarting(home: &Home, role: Role) -> Result<bool> {
    Ok(matches!(state(&units::in_use(home, role))?.job.as_deref(), Some("restart" | "try-restart")))
}

fn in_use(home: &Home, roles: &[Role]) -> Vec<String> {
    roles.iter().map(|role| units::in_use(home, *role)).collect()
}

/// What systemd says of a unit.
fn state(unit: &str) -> Result<UnitState> {
    let properties = "--property=LoadState,ActiveState,UnitFileState,Job";
    let (mut state, job) = parse_show(&ask(&["show", properties, &format!("{unit}.service")])?);
    if let Some(id) = job {
        // Where the job ended between the two questions, the rest of the answer is outdated: something was at work then.
        let kind = ask(&["show", "--property=JobType", &id]).ok().and_then(|shown| property(&shown, "JobType"));
        state.job = Some(kind.unwrap_or_else(|| "ended".to_owned()));
    }
    Ok(state)
}

/// Also the job's number, where there is one.
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
        // It would enable the unit before systemd has read it.
        autostart: false,
        restart_policy: RestartPolicy::default(),
    }
}

fn systemctl(verb: &[&str], units: &[String], deadline: Duration) -> Result<()> {
    let mut command = command();
    command.args(verb).args(units);
    let shown = || format!("cannot have systemd do `{}`", [verb.join(" "), units.join(" ")].join(" ").trim());
    let finished = command::run(&mut command, deadline).with_context(shown)?;
    finished.success().map(drop).with_context(shown)
}

fn ask(arguments: &[&str]) -> Result<String> {
    let shown = || format!("cannot ask systemd to `{}`", arguments.join(" "));
    let finished = command::run(command().args(arguments), QUICK).with_context(shown)?;
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
    fn only_a_unit_that_is_inactive_was_stopped() {
        let unit = |load: &str, active: &str, file: &str, job: Option<&str>| {
            let unit = UnitState {
                load_state: load.into(),
                active_state: active.into(),
                unit_file_state: file.into(),
                job: job.map(Into::into),
            };
            unit.standing()
        };
        assert_eq!(unit("loaded", "inactive", "enabled", None), UnitStanding::Stopped);
        let failed_before = "LoadState=loaded\nActiveState=inactive\nResult=signal\nUnitFileState=enabled\n";
        assert_eq!(parse_show(failed_before).0.standing(), UnitStanding::Stopped);
        assert_eq!(unit("loaded", "inactive", "enabled", Some("start")), UnitStanding::Coming);
        assert_eq!(unit("loaded", "inactive", "enabled", Some("ended")), UnitStanding::Coming);
        assert_eq!(unit("loaded", "activating", "enabled", None), UnitStanding::Coming);
        assert_eq!(unit("loaded", "failed", "enabled", None), UnitStanding::Dead);
        assert_eq!(unit("masked", "failed", "masked", None), UnitStanding::Forbidden);
        assert_eq!(unit("loaded", "inactive", "disabled", None), UnitStanding::Forbidden);
        assert_eq!(unit("not-found", "inactive", "", None), UnitStanding::Missing);
    }

    #[test]
    fn what_systemd_shows_is_read() {
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
