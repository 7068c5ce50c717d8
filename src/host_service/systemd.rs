//! systemd: the units of a home, and what systemd says of them.
//!
//! A unit's whole content is ours (`assets/aops-*.service`); operators change it in drop-ins. Every call of `systemctl` has a deadline:
//! a hung PID 1 must not hang us.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use service_manager::{
    RestartPolicy, ServiceInstallCtx, ServiceLabel, ServiceManager, SystemdServiceManager, systemd_global_dir_path,
};

use crate::command;
use crate::core::role::Role;
use crate::core::service_manager::UnitStanding;
use crate::home::Home;
use crate::store::{self, Access};

const SPM_UNIT: &str = include_str!("../../assets/aops-spm.service");
const SPA_UNIT: &str = include_str!("../../assets/aops-spa.service");
/// Holds the sub-agents' cgroups. It is wanted by the manager's unit and needs no enabling.
const AGENTS_UNIT: &str = include_str!("../../assets/aops-agents.service");

/// For what only asks or writes.
const QUICK: Duration = Duration::from_secs(30);
/// For what waits until a role is up (`TimeoutStartSec=60`).
const STARTING: Duration = Duration::from_secs(90);
/// For what waits until both roles have ended (`TimeoutStopSec=900`, for the slowest sub-agent's grace period) and are up again.
const STOPPING: Duration = Duration::from_secs(1000);

/// How a unit file begins that `install` wrote.
const OURS: &str = "# Written by `aops install`";
/// A unit file of ours has less than 2 KiB.
const MAX_UNIT_BYTES: u64 = 64 << 10;

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

/// Writes the units, makes systemd read them, and enables those of the roles. Twice is as good as once.
pub fn register(home: &Home) -> Result<()> {
    for (unit, program, contents) in files(home)? {
        let path = unit_path(&unit);
        let attempt = || -> Result<()> {
            if store::read(&path, MAX_UNIT_BYTES)?.as_deref() != Some(contents.as_bytes()) {
                SystemdServiceManager::system().install(context(&unit, program, &contents))?;
            }
            Ok(())
        };
        attempt().with_context(|| format!("cannot write the unit {}", path.display()))?;
    }
    systemctl(&["daemon-reload"], &[], QUICK)?;
    systemctl(&["enable"], &units(home, Role::BOTH), QUICK)
}

/// Brings units that an earlier release wrote up to what this one writes; whether there were any. What is missing, masked or an operator's
/// own is left as it is, and what runs goes on.
pub fn refresh(home: &Home) -> Result<bool> {
    let mut is_any = false;
    for (unit, _, contents) in files(home)? {
        let path = unit_path(&unit);
        if !path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            continue;
        }
        let standing = store::read(&path, MAX_UNIT_BYTES)?.unwrap_or_default();
        if standing != contents.as_bytes() && standing.starts_with(OURS.as_bytes()) {
            store::replace(&path, contents.as_bytes(), Access::Public)?;
            is_any = true;
        }
    }
    if is_any {
        systemctl(&["daemon-reload"], &[], QUICK)?;
    }
    Ok(is_any)
}

/// Takes the units away, also where some are gone already.
pub fn unregister(home: &Home) -> Result<()> {
    let agents = home.agents_unit();
    if unit_path(&agents).symlink_metadata().is_ok() {
        // It ends nothing: nobody is left in it but what a sub-agent started for somebody else.
        systemctl(&["stop"], std::slice::from_ref(&agents), QUICK)?;
    }
    let units = [units(home, Role::BOTH), vec![agents]].concat();
    for unit in &units {
        let path = unit_path(unit);
        let directory = systemd_global_dir_path();
        // By hand: `systemctl disable` fails where the file is gone, and then leaves its link behind.
        store::remove(&directory.join("multi-user.target.wants").join(format!("{unit}.service")))?;
        store::remove(&path)?;
        let _ = fs::remove_dir(directory.join("multi-user.target.wants"));
    }
    systemctl(&["daemon-reload"], &[], QUICK)?;
    // Forgets a failed unit, which would otherwise be listed for ever; one that is not known is an error that means nothing.
    let _ = systemctl(&["reset-failed"], &units, QUICK);
    Ok(())
}

/// Takes the units away for good, and with them what an operator has added to them (`systemctl edit`).
pub fn purge(home: &Home) -> Result<()> {
    unregister(home)?;
    let units = [units(home, Role::BOTH), vec![home.agents_unit()]].concat();
    let directories = units.iter().map(|unit| systemd_global_dir_path().join(format!("{unit}.service.d")));
    let there: Vec<_> = directories.filter(|directory| directory.exists()).collect();
    there.iter().try_for_each(|directory| store::remove_tree(directory))?;
    if there.is_empty() { Ok(()) } else { systemctl(&["daemon-reload"], &[], QUICK) }
}

/// Whether systemd could run the roles of this home.
pub fn can_register(home: &Home) -> Result<()> {
    files(home)?;
    for role in Role::BOTH {
        if state(home, *role)?.load_state == "masked" {
            let unit = home.unit(*role);
            bail!(
                "cannot register the unit {unit}: it is masked; run `systemctl unmask {unit}`, or say --service none"
            );
        }
    }
    Ok(())
}

/// Whether there is anything of this home in systemd: a unit file, or a unit that it remembers without one.
pub fn is_known(home: &Home) -> bool {
    let remembered = |role: &Role| state(home, *role).is_ok_and(|unit| unit.active_state != "inactive");
    is_registered(home) || Role::BOTH.iter().any(remembered)
}

/// Whether a unit file of this home stands.
pub fn is_registered(home: &Home) -> bool {
    units(home, Role::BOTH).iter().any(|unit| unit_path(unit).symlink_metadata().is_ok())
}

/// Starts the units of the roles and waits until they are up.
pub fn start(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    systemctl(&["start"], &units(home, roles), STARTING).map(|()| None)
}

/// Stops the units of the roles, which is a stop: the sub-agents go too. A unit whose file is gone, or is bad, may be at work all the
/// same; one that is not at work is stopped.
pub fn stop(home: &Home, roles: &[Role]) -> Result<()> {
    let mut at_work = Vec::new();
    for role in roles {
        if state(home, *role)?.is_at_work() {
            at_work.push(home.unit(*role));
        }
    }
    if at_work.is_empty() {
        return Ok(());
    }
    systemctl(&["stop"], &at_work, STOPPING)
}

/// Restarts the units of the roles; the sub-agents keep running.
pub fn restart(home: &Home, roles: &[Role]) -> Result<Option<Child>> {
    systemctl(&["restart"], &units(home, roles), STOPPING).map(|()| None)
}

/// What systemd knows of a role's unit.
pub fn standing(home: &Home, role: Role) -> Result<UnitStanding> {
    Ok(state(home, role)?.standing())
}

/// Whether a role's unit is being stopped only to be started again.
pub fn is_restarting(home: &Home, role: Role) -> Result<bool> {
    Ok(matches!(state(home, role)?.job.as_deref(), Some("restart" | "try-restart")))
}

/// What systemd says of a role's unit.
fn state(home: &Home, role: Role) -> Result<UnitState> {
    let unit = home.unit(role);
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

fn units(home: &Home, roles: &[Role]) -> Vec<String> {
    roles.iter().map(|role| home.unit(*role)).collect()
}

fn unit_path(unit: &str) -> PathBuf {
    systemd_global_dir_path().join(format!("{unit}.service"))
}

/// The units of a home: name, program, contents.
fn files(home: &Home) -> Result<[(String, PathBuf, String); 3]> {
    let role = |role: Role, template| -> Result<_> {
        let program = home.role_link(role.program());
        Ok((home.unit(role), program.clone(), contents(home, template, program)?))
    };
    let executable = home.executable();
    Ok([
        (home.agents_unit(), executable.clone(), contents(home, AGENTS_UNIT, executable)?),
        role(Role::Spm, SPM_UNIT)?,
        role(Role::Spa, SPA_UNIT)?,
    ])
}

fn context(unit: &str, program: PathBuf, contents: &str) -> ServiceInstallCtx {
    ServiceInstallCtx {
        label: ServiceLabel { qualifier: None, organization: None, application: unit.to_owned() },
        program,
        args: Vec::new(),
        contents: Some(contents.to_owned()),
        username: None,
        working_directory: None,
        environment: None,
        // It would enable the unit before systemd has read it.
        autostart: false,
        restart_policy: RestartPolicy::default(),
    }
}

/// A unit of a home that runs `program`. Refuses a home whose path cannot stand in a unit file.
fn contents(home: &Home, template: &str, executable: PathBuf) -> Result<String> {
    let program = |path: PathBuf| {
        if path.to_string_lossy().contains(['"', '\'', '\\']) {
            bail!(
                "cannot register {} with systemd: it takes no program whose path has a quote or a backslash; choose another --home, or say \
                 --service none",
                home.root().display()
            );
        }
        quoted(&path, false)
    };
    let root = home.root();
    // A description has specifiers, but neither quotes nor variables.
    let shown = root.display().to_string().replace('%', "%%");
    Ok(template
        .replace("@EXECUTABLE@", &program(executable)?)
        .replace("@HOME@", &quoted(root, true)?)
        .replace("@HOME_SHOWN@", &shown)
        .replace("@AGENTS@", &home.agents_unit())
        .replace("@SPM@", &home.unit(Role::Spm))
        .replace("@SPA@", &home.unit(Role::Spa)))
}

/// A path as one word of a command line in a unit: `%` begins a specifier, `\` and `"` are quoted, and `$` begins a variable in
/// everything but the program's own path.
fn quoted(path: &Path, variables: bool) -> Result<String> {
    let Some(text) = path.to_str() else { bail!("cannot write {} into a unit: it is not UTF-8", path.display()) };
    if text.chars().any(char::is_control) {
        bail!("cannot write {text:?} into a unit: it has a control character");
    }
    let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    let text = if variables { text.replace('$', "$$") } else { text };
    Ok(format!("\"{text}\""))
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
    fn the_units_of_the_default_home_name_its_roles() {
        let home = Home::new("/opt/aops");
        let [agents, spm, spa] = files(&home).unwrap().map(|(_, _, contents)| contents);
        for line in [
            "ExecStart=\"/opt/aops/bin/aops-spm\" --home \"/opt/aops\" --service systemd",
            "ExecStop=\"/opt/aops/bin/aops-spm\" --home \"/opt/aops\" --service systemd stop-hook",
            "Type=notify",
            "Restart=always",
            "StartLimitIntervalSec=0",
            "KillMode=process",
            "Wants=aops-agents.service aops-spa.service",
            "WantedBy=multi-user.target",
            "SuccessExitStatus=100",
            "RestartPreventExitStatus=100",
        ] {
            assert!(spm.lines().any(|found| found == line), "{line}\n{spm}");
        }
        for line in
            ["ExecStart=\"/opt/aops/bin/aops-spa\" --home \"/opt/aops\" --service systemd", "After=aops-spm.service"]
        {
            assert!(spa.lines().any(|found| found == line), "{line}\n{spa}");
        }
        assert!(!spa.contains("ExecStop"));
        assert!(agents.lines().any(|found| found == "Before=aops-spm.service aops-spa.service"), "{agents}");
        for unit in [agents, spm, spa] {
            assert!(!unit.contains('@'), "{unit}");
        }
    }

    #[test]
    fn another_home_has_units_of_its_own_and_is_quoted() {
        let home = Home::new("/srv/my home/100%/a$b");
        let [_, spm, _] = files(&home).unwrap().map(|(_, _, contents)| contents);
        assert!(spm.contains(
            r#"ExecStart="/srv/my home/100%%/a$b/bin/aops-spm" --home "/srv/my home/100%%/a$$b" --service systemd"#
        ));
        for refused in ["/srv/a\"b", "/srv/a'b", "/srv/a\\b"] {
            assert!(can_register(&Home::new(refused)).unwrap_err().to_string().contains("--service none"));
        }
        assert!(spm.contains(&format!("Wants={}.service {}.service", home.agents_unit(), home.unit(Role::Spa))));
        assert!(files(&Home::new("/srv/a\nb")).is_err());
    }

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
