//! `aops install`, step by step: check, fetch, stop, switch, register, start, wait.
//!
//! ```text
//! check, fetch      nothing of what stands is touched; what was made is removed again
//! stop              only where all of it is replaced: an installation of the old system, or --fresh
//! switch            bin/aops, links, etc, and the records last
//! register, start   renewing an installation of aops restarts the roles; sub-agents keep their pids
//! wait              until the manager answers
//! ```
//!
//! A failure from `stop` on puts back what stood there and starts it again, but for the epochs that were committed and the keys that were
//! revoked: these stay. On a host where nothing stood, an installation whose manager
//! does not answer in time stays where a service manager goes on starting it: it is whole.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Error, Result, bail};

use super::fetch::{self, FetchedManager};
use super::install_root::InstallRoot;
use super::preflight::{self, ExistingInstallation, InstallPlan, UsageError};
use super::undo::Undo;
use super::{InstallOptions, ProcessContext, WRONG_USAGE, home_selection, legacy, progress, roles, switch, upgrade};
use crate::core::service_manager::ServiceManagerKind;
use crate::home::Home;
use crate::installation::InstallRecord;
use crate::installation::keyring::{self, Keyring};
use crate::output::message;
use crate::store;

/// Where an installation is, as an operator is told.
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

/// A failure, and where it happened.
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

/// Installs, or renews, what the options say.
pub fn install(options: &InstallOptions, surroundings: &ProcessContext) -> Result<ExitCode> {
    let (home, product) = match home_selection::home(options, surroundings) {
        Ok(found) => found,
        Err(error) => return wrong_usage(error),
    };
    let outcome = InstallRoot::open(&home).at(InstallStep::Check).and_then(|mut site| {
        recover(&home, &surroundings.executable).and_then(|()| site.note()).at(InstallStep::Check)?;
        let plan = preflight::plan(options, surroundings, &home, &product).at(InstallStep::Check)?;
        let fetched = fetch::fetch(&plan, &site).at(InstallStep::Fetch)?;
        replace(&plan, &fetched, &mut site)?;
        site.keep();
        summary(&plan, &fetched);
        Ok(())
    });
    match outcome {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(InstallFailure { error, .. }) if error.is::<UsageError>() => wrong_usage(error),
        Err(failed) => Err(told(failed, &home)),
    }
}

/// Tells what the command line lacks, where that is what is wrong.
fn wrong_usage(error: Error) -> Result<ExitCode> {
    if !error.is::<UsageError>() {
        return Err(error);
    }
    message!(
        "error: {error}\n\nA new host is given who it is, where its gateway is, and whom to trust:\n  aops install --agent-id ID \
         --endpoint https://GATEWAY:8888 \\\n    --trusted-key aops.pub --ca-cert cert.pem\n\nFor more information, try 'aops install \
         --help'."
    );
    Ok(ExitCode::from(WRONG_USAGE))
}

/// The failure as an operator reads it: the step, what became of the host, and what to do.
fn told(InstallFailure { step, error }: InstallFailure, home: &Home) -> Error {
    let state = if step < InstallStep::Stop { "; nothing was changed" } else { "" };
    let advice = advice(&error, home).map(|advice| format!("; {advice}, then repeat the command")).unwrap_or_default();
    error.context(format!("cannot install aops into {} (step {step}{state}{advice})", home.root().display()))
}

/// What to do about a failure that the system told in its own words; `None`: it was not about a file of the home.
fn advice(error: &Error, home: &Home) -> Option<String> {
    let home = home.root().display().to_string();
    if !error.chain().any(|cause| cause.to_string().contains(&home)) {
        return None;
    }
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind))?;
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(format!("free some space for {home}")),
        ErrorKind::ReadOnlyFilesystem => Some(format!("make {home} writable, or choose another --home")),
        ErrorKind::PermissionDenied => Some(format!("run it as root, or as who owns {home}, or choose another --home")),
        _ => None,
    }
}

/// Finishes what an installation that was killed had begun: one killed before the new one was whole is undone, and what a later one had
/// replaced is needed no more.
fn recover(home: &Home, executable: &Path) -> Result<()> {
    let is_whole = || InstallRecord::load(home).ok().flatten().is_some();
    if !legacy::is_any_aside(home) {
        Ok(())
    } else if !legacy::is_under_way(home) && is_whole() {
        store::remove_tree(&legacy::aside(home))
    } else {
        progress::say("bringing back what an interrupted installation had set aside");
        legacy::bring_back(home, executable)
    }
}

/// From here on what stood there is touched.
fn replace(plan: &InstallPlan, fetched: &FetchedManager, site: &mut InstallRoot) -> Result<(), InstallFailure> {
    let mut undo = Undo::begin(site.work().join("undo")).at(InstallStep::Fetch)?;
    let ran = roles::run(&plan.home);
    let ring = plan.keeps().then(|| Keyring::load(&plan.home)).transpose().at(InstallStep::Fetch)?;
    let Err(failed) = carry_out(plan, fetched, site, &mut undo) else {
        // What was replaced is needed no more. Where it can't be removed, it is in nobody's way.
        if let Err(error) = store::remove_tree(&legacy::aside(&plan.home)) {
            progress::warn(format_args!("{error:#}"));
        }
        return Ok(());
    };
    if plan.standing == ExistingInstallation::Nothing && failed.step == InstallStep::Wait && plan.kind.is_some() {
        site.stay();
        let stays = format!(
            "what was installed stays, and {} goes on starting it; look at its log, and repeat the command",
            plan.kind
        );
        return Err(InstallFailure { step: failed.step, error: failed.error.context(stays) });
    }
    progress::say(format_args!("step {} failed; putting back what was there", failed.step));
    let undone = match take_back(plan, failed.step, ran, ring.as_ref(), site, undo) {
        Ok(()) if plan.standing == ExistingInstallation::Nothing => {
            "everything was taken back; the command can be repeated".to_owned()
        }
        Ok(()) => {
            "what was there before is back as it was (epochs and revoked keys only grow); the command can be repeated"
                .to_owned()
        }
        Err(error) => format!("what was there before could not be put back ({error:#}); repeat the command"),
    };
    Err(InstallFailure { step: failed.step, error: failed.error.context(undone) })
}

fn carry_out(
    plan: &InstallPlan,
    fetched: &FetchedManager,
    site: &mut InstallRoot,
    undo: &mut Undo,
) -> Result<(), InstallFailure> {
    let home = &plan.home;
    let before = roles::manager_pid(home);
    if plan.replaces_all() {
        progress::say("stopping the older installation");
        match plan.standing {
            ExistingInstallation::Old => legacy::stop(home),
            _ => roles::stop_all(home),
        }
        .and_then(|()| legacy::set_aside(home, plan.whose(), &plan.executable))
        .at(InstallStep::Stop)?;
    }
    let session = plan.keeps().then(|| upgrade::end(home)).transpose().at(InstallStep::Switch)?;
    progress::say(format_args!("putting version {} into {}", fetched.release.manager.version, home.root().display()));
    switch::switch(plan, fetched, site, undo).at(InstallStep::Switch)?;
    if let Some(mut session) = session {
        upgrade::replaced(&mut session, &fetched.release.manager.version).at(InstallStep::Switch)?;
    }
    if plan.kind.is_some() {
        progress::say(format_args!("registering with {}", plan.kind));
    }
    roles::register(home, plan.kind).at(InstallStep::Register)?;
    progress::say("starting");
    let child = roles::start(home, plan.kind, was_registered(plan)).at(InstallStep::Start)?;
    roles::wait(home, before, child).at(InstallStep::Wait)
}

fn was_registered(plan: &InstallPlan) -> bool {
    matches!(&plan.standing, ExistingInstallation::Aops(installed) if installed.service.is_some())
}

/// Undoes what was done up to `step`, in the opposite order, as far as each of it can be undone; fails with all that could not. What `ran`
/// before runs again; `ring` is the keyring from before.
fn take_back(
    plan: &InstallPlan,
    step: InstallStep,
    ran: bool,
    ring: Option<&Keyring>,
    site: &mut InstallRoot,
    undo: Undo,
) -> Result<()> {
    let home = &plan.home;
    let mut failures = Vec::new();
    let mut done = |outcome: Result<()>| failures.extend(outcome.err().map(|error| format!("{error:#}")));
    if !plan.keeps() && step >= InstallStep::Register {
        done(roles::stop_all(home));
    }
    if step >= InstallStep::Register && plan.kind.is_some() && !was_registered(plan) {
        done(roles::register(home, ServiceManagerKind::None));
    }
    // Before the files of keys are back.
    done(ring.map_or(Ok(()), |ring| keyring::keep_after_failure(home, ring)));
    done(undo.roll_back());
    if plan.replaces_all() {
        site.forget_inside();
        done(legacy::bring_back(home, &plan.executable));
    }
    if let ExistingInstallation::Aops(_) = plan.standing {
        // Whatever was missing there and was made: those who run again use it.
        site.forget_all();
    }
    done(match &plan.standing {
        ExistingInstallation::Nothing => Ok(()),
        ExistingInstallation::Old => legacy::start(home),
        // Renewed, and nothing of the roles touched yet: they run.
        ExistingInstallation::Aops(_) if plan.keeps() && step < InstallStep::Register => Ok(()),
        ExistingInstallation::Aops(_) if !ran => roles::stop_all(home),
        ExistingInstallation::Aops(installed) => roles::start_again(home, installed.service),
    });
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}

fn summary(plan: &InstallPlan, fetched: &FetchedManager) {
    let home = plan.home.root().display();
    let endpoints: Vec<String> = plan.config.heartbeat_srv.iter().map(ToString::to_string).collect();
    progress::say(format_args!("version {} is installed in {home} and runs", fetched.release.manager.version));
    progress::say(format_args!("agent id {}, endpoint {}", plan.agent_id, endpoints.join(", ")));
    progress::say(format_args!("see how it is: {} status", plan.home.control_link().display()));
    if let Some(advice) = &plan.boot_advice {
        progress::say(format_args!("nothing starts it when the host boots: {advice}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_the_step_what_became_of_the_host_and_what_to_do() {
        let home = Home::new("/srv/a");
        let full = Error::from(std::io::Error::from(ErrorKind::StorageFull)).context("cannot write /srv/a/x");
        let text = format!("{:#}", told(InstallFailure { step: InstallStep::Fetch, error: full }, &home));
        assert!(text.starts_with(
            "cannot install aops into /srv/a (step fetch; nothing was changed; free some space for /srv/a, then repeat the command): \
             cannot write /srv/a/x"
        ), "{text}");
        let elsewhere = Error::from(std::io::Error::from(ErrorKind::ReadOnlyFilesystem)).context("cannot write /etc/x");
        let text = format!("{:#}", told(InstallFailure { step: InstallStep::Register, error: elsewhere }, &home));
        assert!(text.starts_with("cannot install aops into /srv/a (step register): cannot write /etc/x"), "{text}");
        let text = format!("{:#}", told(InstallFailure { step: InstallStep::Start, error: Error::msg("x") }, &home));
        assert_eq!(text, "cannot install aops into /srv/a (step start): x");
    }
}
