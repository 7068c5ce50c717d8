//! What the scripts of a package (rpm, deb) run: `aops service packaged configure|remove`.
//!
//! ```text
//! configure --first    the files are in place: the units are enabled; started if the host can be enrolled
//! configure            the files were replaced: the release is recorded, the roles restart; sub-agents keep running
//! enrol                by the manager of a host that is not enrolled, when its unit starts
//! remove               before the files are removed: everything stops, and what does not belong to the package is removed
//! ```
//!
//! In the root file system of an image, nothing runs: units are enabled, nothing is started.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{InstallOptions, ProcessContext, install, progress, roles, uninstall};
use crate::core::model::MANAGER_PACKAGE;
use crate::core::role::Role;
use crate::home::Home;
use crate::installation::executable::{self, ExecutableName};
use crate::installation::packaged::{PackageRecord, is_unenrolled};
use crate::installation::upgrade::UpgradeSession;
use crate::installation::{Epochs, enrolment};
use crate::{host_service, lifecycle, platform, role};

/// Timeout for the lock on the record of upgrades. A role holds it for one step.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// A command of a package's scripts.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum PackagedCommand {
    /// After the package has put its files in place
    Configure {
        /// It was not installed before
        #[arg(long)]
        first: bool,
    },
    /// Complete the installation with /etc/aops/enrol.toml, if it exists
    Enrol,
    /// Before the package removes its files
    Remove,
}

pub fn packaged(home: &Home, command: PackagedCommand) -> Result<ExitCode> {
    let Some(record) = PackageRecord::load(home)? else {
        bail!(
            "cannot run a script of a package for {}: {} is missing; install the package again",
            home.root().display(),
            home.package_record().display()
        );
    };
    match command {
        PackagedCommand::Configure { .. } if !is_unenrolled(home) => {
            replaced(home, &record).with_context(|| {
                format!("cannot take over version {} in {}", record.release.version, home.root().display())
            })?;
        }
        PackagedCommand::Configure { first } => configure(home, first)?,
        PackagedCommand::Enrol => enrol(home)?,
        PackagedCommand::Remove => uninstall::remove_before_package(home)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Of a host that is not enrolled.
fn configure(home: &Home, first: bool) -> Result<()> {
    let kind = host_service::detect();
    if first {
        host_service::enable_package_units(home)?;
    }
    let Some(advice) = enrolment::advice(home) else { return Ok(()) };
    if kind.is_some() && enrolment::read().is_ok_and(|enrolment| enrolment.is_some()) {
        // The manager enrols the host. A failure is no failure of the package: `status` shows it.
        if let Err(error) = host_service::start(kind, home, Role::BOTH) {
            progress::warn(format_args!("{error:#}"));
        }
    } else {
        progress::say(advice);
    }
    Ok(())
}

/// Starts nothing: the manager does, which runs this.
fn enrol(home: &Home) -> Result<()> {
    let Some(enrolment) = enrolment::read()? else { return Ok(()) };
    let options = InstallOptions {
        agent_id: Some(enrolment.agent_id),
        endpoint: enrolment.endpoints,
        trusted_key: enrolment.trusted_keys,
        ca_cert: enrolment.ca_cert,
        pin: enrolment.pins,
        pin_first_contact: enrolment.pin_first_contact,
        insecure: enrolment.insecure,
        product: enrolment.product,
        ..InstallOptions::default()
    };
    let executable = platform::own_executable().unwrap_or_default();
    let context = ProcessContext { home: Some(home.clone()), product: None, executable };
    install::complete(&options, &context).context("cannot enrol this host")
}

/// Of an installation, after the package manager has replaced its executable: with a newer one, or with an older one than that of the last
/// self-upgrade. The operator has decided that.
fn replaced(home: &Home, record: &PackageRecord) -> Result<()> {
    let release = &record.release;
    {
        let session = UpgradeSession::open(home, LOCK_TIMEOUT)?;
        let mut session = session
            .context("the record of the manager's upgrades is in use by another process; install the package again")?;
        session.change(|upgrade| upgrade.overwritten(&release.version))?;
        release.save(home)?;
        Epochs::commit(home, MANAGER_PACKAGE, release.epoch)?;
        // During a trial, some names pointed to the previous executable.
        executable::point(home, ExecutableName::ALL, &home.executable())?;
    }
    let service = lifecycle::service(home);
    if service.is_some() && host_service::detect() == service {
        host_service::refresh(service, home)?;
        host_service::reload_package_units()?;
    }
    let Some(before) = roles::manager_pid(home).filter(|_| !role::is_stop_recorded(home)) else { return Ok(()) };
    progress::say(format_args!("restarting the manager and the watchdog; sub-agents keep running"));
    let child = host_service::restart(service, home, Role::BOTH)?;
    if let Err(error) = roles::wait(home, Some(before), child) {
        progress::warn(format_args!("{error:#}"));
    }
    Ok(())
}
