//! `aops install`, step by step: check, fetch, stop, switch, register, start, wait.
//!
//! ```text
//! check, fetch      the existing installation is not touched; a failure removes what was created
//! stop              only if everything is replaced: an installation of the old system, or --fresh
//! switch            bin/aops, links, etc, and the records last
//! register, start   an existing installation of aops: the roles restart; sub-agents keep their pids
//! wait              until the manager answers
//! ```
//!
//! A failure from `stop` on restores and restarts the previous installation. Committed epochs and revoked keys are kept nevertheless. A
//! first installation whose manager does not answer in time is kept if a service manager keeps restarting it: it is complete.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Error, Result, bail};

use super::fetch::{self, FetchedManager};
use super::install_root::InstallRoot;
use super::preflight::{self, ExistingInstallation, InstallPlan, UsageError};
use super::undo::Undo;
use super::{InstallOptions, ProcessContext, WRONG_USAGE, home_selection, legacy, progress, roles, switch, upgrade};
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::host_service;
use crate::installation::InstallRecord;
use crate::installation::keyring::{self, Keyring};
use crate::output::message;
use crate::platform;

/// The steps of an installation, in their order. Errors name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum InstallStep {
    Check,
    Fetch,
    Stop,
    Switch,
    Register,
    Start,
    Wait,
}

impl fmt::Display for InstallStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InstallStep::Check => "check",
            InstallStep::Fetch => "fetch",
            InstallStep::Stop => "stop",
            InstallStep::Switch => "switch",
            InstallStep::Register => "register",
            InstallStep::Start => "start",
            InstallStep::Wait => "wait",
        })
    }
}

/// A failure and the step in which it happened.
#[derive(Debug)]
struct InstallFailure {
    step: InstallStep,
    error: Error,
}

trait AtStep<T> {
    fn at(self, step: InstallStep) -> Result<T, InstallFailure>;
}

impl<T> AtStep<T> for Result<T> {
    fn at(self, step: InstallStep) -> Result<T, InstallFailure> {
        self.map_err(|error| InstallFailure { step, error })
    }
}

/// Runs `aops install`.
pub fn install(options: &InstallOptions, context: &ProcessContext) -> Result<ExitCode> {
    let (home, product) = match home_selection::home(options, context) {
        Ok(found) => found,
        Err(error) => return wrong_usage(error),
    };
    let outcome = InstallRoot::open(&home).at(InstallStep::Check).and_then(|mut install_root| {
        recover(&home, &context.executable).and_then(|()| install_root.record_created()).at(InstallStep::Check)?;
        let plan = preflight::plan(options, context, &home, &product).at(InstallStep::Check)?;
        let fetched = fetch::fetch(&plan, &install_root).at(InstallStep::Fetch)?;
        replace(&plan, &fetched, &mut install_root)?;
        install_root.commit();
        summary(&plan, &fetched);
        Ok(())
    });
    match outcome {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(InstallFailure { error, .. }) if error.is::<UsageError>() => wrong_usage(error),
        Err(failed) => Err(described(failed, &home)),
    }
}

/// Completes an installation whose files a package has put in place: settings, identity, keys and records. Registers and starts nothing.
pub(super) fn complete(options: &InstallOptions, context: &ProcessContext) -> Result<()> {
    let (home, product) = home_selection::home(options, context)?;
    let mut install_root = InstallRoot::open(&home)?;
    recover(&home, &context.executable)?;
    install_root.record_created()?;
    let plan = preflight::plan(options, context, &home, &product)?;
    let fetched = fetch::fetch(&plan, &install_root)?;
    let mut undo = Undo::begin(install_root.work().join("undo"))?;
    if let Err(error) = switch::switch(&plan, &fetched, &mut install_root, &mut undo) {
        undo.roll_back().context("cannot undo an incomplete enrolment")?;
        return Err(error);
    }
    install_root.commit();
    Ok(())
}

/// Prints a usage error with an example; returns any other error.
fn wrong_usage(error: Error) -> Result<ExitCode> {
    if !error.is::<UsageError>() {
        return Err(error);
    }
    message!(
        "error: {error}\n\nA new host needs its agent id, its gateway and the keys to trust:\n  aops install --agent-id ID \
         --endpoint https://GATEWAY:8888 \\\n    --trusted-key aops.pub --ca-cert cert.pem\n\nFor more information, try 'aops install \
         --help'."
    );
    Ok(ExitCode::from(WRONG_USAGE))
}

/// The error for the operator: the step, the state of the host, and what to do.
fn described(InstallFailure { step, error }: InstallFailure, home: &Home) -> Error {
    let state = if step < InstallStep::Stop { "; nothing was changed" } else { "" };
    let advice = advice(&error, home).map(|advice| format!("; {advice}, then repeat the command")).unwrap_or_default();
    error.context(format!("cannot install aops into {} (step {step}{state}{advice})", home.root().display()))
}

/// What to do about an I/O error of a file in the home; `None` for any other error.
fn advice(error: &Error, home: &Home) -> Option<String> {
    let home = home.root().display().to_string();
    if !error.chain().any(|cause| cause.to_string().contains(&home)) {
        return None;
    }
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind))?;
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(format!("free some space for {home}")),
        ErrorKind::ReadOnlyFilesystem => Some(format!("make {home} writable, or choose another --home")),
        ErrorKind::PermissionDenied => Some(format!(
            "run the command as {} or as the owner of {home}, or choose another --home",
            platform::ADMINISTRATOR
        )),
        _ => None,
    }
}

/// Cleans up after a killed installation: if the new installation was incomplete, restores the previous one, else removes what it had set
/// aside. An old installation that was stopped is started: this one may fail before it stops it again.
fn recover(home: &Home, executable: &Path) -> Result<()> {
    let is_complete = InstallRecord::load(home).ok().flatten().is_some();
    if is_complete && !legacy::is_part_aside(home) {
        return legacy::remove_aside(home);
    }
    if legacy::is_any_aside(home) {
        progress::say("restoring what an interrupted installation had set aside");
        legacy::restore(home, executable)?;
    }
    legacy::start_if_interrupted(home);
    Ok(())
}

/// Replaces the existing installation, and rolls back on a failure.
fn replace(plan: &InstallPlan, fetched: &FetchedManager, install_root: &mut InstallRoot) -> Result<(), InstallFailure> {
    let mut undo = Undo::begin(install_root.work().join("undo")).at(InstallStep::Fetch)?;
    let was_running = roles::any_running(&plan.home);
    let ring = plan.keeps().then(|| Keyring::load(&plan.home)).transpose().at(InstallStep::Fetch)?;
    let Err(failed) = carry_out(plan, fetched, install_root, &mut undo) else {
        // A replaced installation that cannot be removed does no harm.
        if let Err(error) = legacy::remove_aside(&plan.home) {
            progress::warn(format_args!("{error:#}"));
        }
        return Ok(());
    };
    if plan.existing == ExistingInstallation::Nothing && failed.step == InstallStep::Wait && plan.kind.is_some() {
        install_root.keep_created();
        let stays = format!(
            "the new installation is kept, and {} keeps restarting it; check its log, then repeat the command",
            plan.kind
        );
        return Err(InstallFailure { step: failed.step, error: failed.error.context(stays) });
    }
    progress::say(format_args!("step {} failed; rolling back", failed.step));
    let undone = match roll_back(plan, failed.step, was_running, ring.as_ref(), install_root, undo) {
        Ok(()) if plan.existing == ExistingInstallation::Nothing => {
            "everything was rolled back; the command can be repeated".to_owned()
        }
        Ok(()) => {
            "the previous installation is restored (new epochs and revoked keys are kept); the command can be repeated"
                .to_owned()
        }
        Err(error) => format!("the previous installation cannot be restored ({error:#}); repeat the command"),
    };
    Err(InstallFailure { step: failed.step, error: failed.error.context(undone) })
}

fn carry_out(
    plan: &InstallPlan,
    fetched: &FetchedManager,
    install_root: &mut InstallRoot,
    undo: &mut Undo,
) -> Result<(), InstallFailure> {
    let home = &plan.home;
    let before = roles::manager_pid(home);
    if plan.replaces_all() {
        progress::say("stopping the existing installation");
        match plan.existing {
            ExistingInstallation::Old => legacy::stop(home, plan.kind),
            _ => roles::stop_all(home),
        }
        .and_then(|()| legacy::set_aside(home, plan.backup_owner(), &plan.executable))
        .at(InstallStep::Stop)?;
    }
    let session = plan.keeps().then(|| upgrade::finish(home)).transpose().at(InstallStep::Switch)?;
    progress::say(format_args!("installing version {} in {}", fetched.release.manager.version, home.root().display()));
    switch::switch(plan, fetched, install_root, undo).at(InstallStep::Switch)?;
    if let Some(mut session) = session {
        upgrade::replaced(&mut session, &fetched.release.manager.version).at(InstallStep::Switch)?;
    }
    if plan.kind.is_some() {
        progress::say(format_args!("registering with {}", plan.kind));
    }
    roles::register(home, plan.kind).at(InstallStep::Register)?;
    progress::say("starting the manager and the watchdog");
    let child = roles::start(home, plan.kind, was_registered(plan)).at(InstallStep::Start)?;
    roles::wait(home, before, child).at(InstallStep::Wait)
}

fn was_registered(plan: &InstallPlan) -> bool {
    matches!(&plan.existing, ExistingInstallation::Aops(installed) if installed.service.is_some())
}

/// Undoes the steps up to `step` in the opposite order. A step that cannot be undone does not prevent the others; the error lists all of
/// them. `was_running`: whether the previous roles were running, and are restarted. `ring`: its keyring.
fn roll_back(
    plan: &InstallPlan,
    step: InstallStep,
    was_running: bool,
    ring: Option<&Keyring>,
    install_root: &mut InstallRoot,
    undo: Undo,
) -> Result<()> {
    let home = &plan.home;
    let mut failures = Vec::new();
    let mut done = |outcome: Result<()>| failures.extend(outcome.err().map(|error| format!("{error:#}")));
    if !plan.keeps() && step >= InstallStep::Register {
        done(roles::stop_all(home));
    }
    if step >= InstallStep::Register && plan.kind.is_some() && !was_registered(plan) {
        if plan.existing == ExistingInstallation::Old {
            done(legacy::give_names_back(home));
        }
        done(roles::register(home, ServiceManagerKind::None));
        if plan.packaged.is_some() {
            // As the package left them.
            done(host_service::enable_package_units(home));
        }
    }
    // Before the key files are restored.
    done(ring.map_or(Ok(()), |ring| keyring::keep_after_failure(home, ring)));
    done(undo.roll_back());
    if plan.replaces_all() {
        install_root.forget_inside();
        done(legacy::restore(home, &plan.executable));
    }
    if let ExistingInstallation::Aops(_) = plan.existing {
        // Keep the directories that were missing and were created: the restarted roles use them.
        install_root.forget_all();
    }
    done(match &plan.existing {
        ExistingInstallation::Nothing => Ok(()),
        ExistingInstallation::Old => legacy::start(home),
        // The roles were not touched yet and are running.
        ExistingInstallation::Aops(_) if plan.keeps() && step < InstallStep::Register => Ok(()),
        ExistingInstallation::Aops(_) if !was_running => roles::stop_all(home),
        ExistingInstallation::Aops(installed) => roles::restart_previous(home, installed.service),
    });
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}

fn summary(plan: &InstallPlan, fetched: &FetchedManager) {
    let home = plan.home.root().display();
    let endpoints: Vec<String> = plan.config.heartbeat_srv.iter().map(ToString::to_string).collect();
    progress::say(format_args!("version {} is installed in {home} and running", fetched.release.manager.version));
    progress::say(format_args!("agent id {}, endpoint {}", plan.agent_id, endpoints.join(", ")));
    progress::say(format_args!("show its status with `{} status`", plan.home.control_link().display()));
    if let Some(advice) = &plan.boot_advice {
        progress::say(format_args!("nothing starts it at boot: {advice}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_step_the_state_of_the_host_and_the_remedy() {
        let home = Home::new("/srv/a");
        let full = Error::from(std::io::Error::from(ErrorKind::StorageFull)).context("cannot write /srv/a/x");
        let text = format!("{:#}", described(InstallFailure { step: InstallStep::Fetch, error: full }, &home));
        assert!(text.starts_with(
            "cannot install aops into /srv/a (step fetch; nothing was changed; free some space for /srv/a, then repeat the command): \
             cannot write /srv/a/x"
        ), "{text}");
        let elsewhere = Error::from(std::io::Error::from(ErrorKind::ReadOnlyFilesystem)).context("cannot write /etc/x");
        let text = format!("{:#}", described(InstallFailure { step: InstallStep::Register, error: elsewhere }, &home));
        assert!(text.starts_with("cannot install aops into /srv/a (step register): cannot write /etc/x"), "{text}");
        let text =
            format!("{:#}", described(InstallFailure { step: InstallStep::Start, error: Error::msg("x") }, &home));
        assert_eq!(text, "cannot install aops into /srv/a (step start): x");
    }
}
