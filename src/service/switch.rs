//! Puts a fetched release and its settings into place: each file by a rename, what stood there kept for the case of a failure.
//!
//! The records of the installation are written last: where they stand, everything else does.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::fetch::FetchedManager;
use super::install_root::InstallRoot;
use super::preflight::{ExistingInstallation, InstallPlan};
use super::progress;
use super::undo::Undo;
use crate::config::{self, Config};
use crate::core::model::MANAGER_PACKAGE;
use crate::endpoint;
use crate::installation::executable::{self, ExecutableName};
use crate::installation::{Epochs, InstallRecord, keyring};
use crate::platform;
use crate::store::{self, Access};

/// Where the command is put for everybody, for the default home alone.
const COMMAND_LINK: &str = "/usr/local/bin/aops";

pub(super) fn switch(
    plan: &InstallPlan,
    fetched: &FetchedManager,
    site: &mut InstallRoot,
    undo: &mut Undo,
) -> Result<()> {
    let home = &plan.home;
    for (directory, mode) in home.directories() {
        site.make(&directory, mode)?;
    }
    settings(plan, fetched, undo)?;
    undo.keep(&home.executable())?;
    executable::replace(home, &fetched.release.executable())?;
    for name in ExecutableName::ALL {
        undo.keep(&name.path(home))?;
    }
    executable::point(home, ExecutableName::ALL, &home.executable())?;
    let linked = command_link(plan, undo);
    records(plan, fetched, site, linked, undo)
}

fn settings(plan: &InstallPlan, fetched: &FetchedManager, undo: &mut Undo) -> Result<()> {
    let home = &plan.home;
    undo.keep(&home.agent_id())?;
    store::replace(&home.agent_id(), format!("{}\n", plan.agent_id).as_bytes(), Access::Public)?;
    if let Some(bytes) = &plan.ca_file {
        let path = home.ca_file();
        undo.keep(&path)?;
        store::replace(&path, bytes, Access::Public)?;
    }
    configuration(plan, undo)?;
    undo.keep(&home.last_good_config())?;
    Config::remember_good(home, &plan.config_text)?;

    if let Some(pins) = &fetched.pins {
        let path = home.pins();
        if !plan.keeps() {
            undo.keep(&path)?;
            store::remove(&path)?;
        }
        // A manager that runs may have had further first contacts meanwhile.
        endpoint::add_pins(pins, &path)?;
    }
    Ok(())
}

/// Writes `etc/conf.toml` where it is to say something else. Where it is a link, what that leads to is the operator's settings; what he
/// has closed to others stays closed.
fn configuration(plan: &InstallPlan, undo: &mut Undo) -> Result<()> {
    let path = plan.home.config();
    let path = std::fs::canonicalize(&path).unwrap_or(path);
    let is_open = std::fs::metadata(&path).is_ok_and(|metadata| platform::is_readable_by_others(&metadata));
    let is_there = path.exists();
    let access = if is_there && !is_open { Access::Private } else { plan.config.access() };
    let stands = is_there && config::text(&plan.home).is_ok_and(|text| text.as_ref() == Some(&plan.config_text));
    if stands && (access == Access::Public || !is_open) {
        return Ok(());
    }
    undo.keep(&path)?;
    store::replace(&path, plan.config_text.as_bytes(), access)
}

/// The operator's keys, those of the bootstrap, and what the package says about keys.
fn keys(plan: &InstallPlan, fetched: &FetchedManager, undo: &mut Undo) -> Result<()> {
    let home = &plan.home;
    undo.keep(&home.keys())?;
    if !plan.keeps() {
        undo.keep(&home.keyring())?;
    }
    let (given, carried) = (&plan.trusted.given, &plan.trusted.carried);
    for remark in keyring::install(home, plan.keeps(), given, carried, &fetched.release.offer)? {
        progress::say(remark);
    }
    Ok(())
}

/// Links the command into everybody's path: by root, for the default home, and where the name is free. It is a convenience: where it cannot
/// be had, that is told. Answers what is linked now.
fn command_link(plan: &InstallPlan, undo: &mut Undo) -> Vec<PathBuf> {
    let mut linked = match &plan.standing {
        ExistingInstallation::Aops(installed) => installed.linked.clone(),
        _ => Vec::new(),
    };
    let link = PathBuf::from(COMMAND_LINK);
    if !platform::is_root() || !plan.home.is_default() {
        return linked;
    }
    let executable = plan.home.as_known(&plan.home.executable());
    let standing = std::fs::read_link(&link).ok();
    let ours = standing.as_ref().is_some_and(|target| platform::identity(target) == platform::identity(&executable));
    let free = link.symlink_metadata().is_err() && link.parent().is_some_and(Path::is_dir);
    if !free && !ours {
        return linked;
    }
    let made = if standing.as_ref() == Some(&executable) { Ok(()) } else { make_link(&executable, &link, undo) };
    if let Err(error) = made {
        let control = plan.home.as_known(&plan.home.control_link());
        progress::warn(format_args!(
            "{error:#}; the installation goes on without it: use {}, or make the link by hand",
            control.display()
        ));
        return linked;
    }
    if !linked.contains(&link) {
        linked.push(link);
    }
    linked
}

fn make_link(target: &Path, link: &Path, undo: &mut Undo) -> Result<()> {
    undo.keep(link)?;
    platform::replace_link(target, link).with_context(|| format!("cannot make the link {}", link.display()))
}

fn records(
    plan: &InstallPlan,
    fetched: &FetchedManager,
    site: &InstallRoot,
    linked: Vec<PathBuf>,
    undo: &mut Undo,
) -> Result<()> {
    let home = &plan.home;
    keys(plan, fetched, undo)?;
    // Those of a home that stands only grow, whatever becomes of this installation; a manager that runs commits others meanwhile.
    if !plan.keeps() {
        undo.keep(&home.epochs())?;
        Epochs::begin(home)?;
    }
    Epochs::commit(home, MANAGER_PACKAGE, fetched.release.manager.epoch)?;
    for path in [home.manager_record(), home.install_record()] {
        undo.keep(&path)?;
    }
    fetched.release.manager.save(home)?;
    let mut installed = match &plan.standing {
        ExistingInstallation::Aops(installed) => installed.clone(),
        _ => InstallRecord::by(plan.kind),
    };
    installed.service = plan.kind;
    installed.product.clone_from(&plan.product);
    installed.created_directories.extend(site.created_for_home());
    if plan.standing == ExistingInstallation::Old {
        // Nobody else's any more.
        installed.created_directories.push(home.root().to_owned());
    }
    installed.linked = linked;
    installed.save(home)
}
