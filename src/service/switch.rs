//! Installs a downloaded release and the settings: each file by a rename, with the previous file saved for a rollback.
//!
//! The records of the installation are written last: if they exist, the installation is complete.

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

pub(super) fn switch(
    plan: &InstallPlan,
    fetched: &FetchedManager,
    install_root: &mut InstallRoot,
    undo: &mut Undo,
) -> Result<()> {
    let home = &plan.home;
    for (directory, mode) in home.directories() {
        install_root.create_directory(&directory, mode)?;
    }
    write_settings(plan, fetched, undo)?;
    undo.save(&home.executable())?;
    executable::replace(home, &fetched.release.executable())?;
    for name in ExecutableName::ALL {
        undo.save(&name.path(home))?;
    }
    executable::point(home, ExecutableName::ALL, &home.executable())?;
    let linked = command_link(plan, undo);
    write_records(plan, fetched, install_root, linked, undo)
}

fn write_settings(plan: &InstallPlan, fetched: &FetchedManager, undo: &mut Undo) -> Result<()> {
    let home = &plan.home;
    undo.save(&home.agent_id())?;
    store::replace(&home.agent_id(), format!("{}\n", plan.agent_id).as_bytes(), Access::Public)?;
    if let Some(bytes) = &plan.ca_file {
        let path = home.ca_file();
        undo.save(&path)?;
        store::replace(&path, bytes, Access::Public)?;
    }
    write_config(plan, undo)?;
    undo.save(&home.last_good_config())?;
    Config::remember_good(home, &plan.config_text)?;

    if let Some(pins) = &fetched.pins {
        let path = home.pins();
        if !plan.keeps() {
            undo.save(&path)?;
            store::remove(&path)?;
        }
        // A running manager may have added pins meanwhile.
        endpoint::add_pins(pins, &path)?;
    }
    Ok(())
}

/// Writes `etc/conf.toml` if its content changes. If it is a link, its target is replaced. A file that others cannot read stays so.
fn write_config(plan: &InstallPlan, undo: &mut Undo) -> Result<()> {
    let path = plan.home.config();
    let path = std::fs::canonicalize(&path).unwrap_or(path);
    let is_open = std::fs::metadata(&path).is_ok_and(|metadata| platform::is_readable_by_others(&metadata));
    let exists = path.exists();
    let access = if exists && !is_open { Access::Private } else { plan.config.access() };
    let is_same = exists && config::text(&plan.home).is_ok_and(|text| text.as_ref() == Some(&plan.config_text));
    if is_same && (access == Access::Public || !is_open) {
        return Ok(());
    }
    undo.save(&path)?;
    store::replace(&path, plan.config_text.as_bytes(), access)
}

/// Writes the operator's keys, those of the bootstrap, and the changes of keys that the package brings.
fn write_keys(plan: &InstallPlan, fetched: &FetchedManager, undo: &mut Undo) -> Result<()> {
    let home = &plan.home;
    undo.save(&home.keys())?;
    if !plan.keeps() {
        undo.save(&home.keyring())?;
    }
    let (given, carried) = (&plan.trusted.given, &plan.trusted.carried);
    for remark in keyring::install(home, plan.keeps(), given, carried, &fetched.release.offer)? {
        progress::say(remark);
    }
    Ok(())
}

/// Links the executable into the path of all users, if the user is root, the home is the default one and the name is free. A failure is a
/// warning only. Returns the links that exist now.
fn command_link(plan: &InstallPlan, undo: &mut Undo) -> Vec<PathBuf> {
    let mut linked = match &plan.existing {
        ExistingInstallation::Aops(installed) => installed.linked.clone(),
        _ => Vec::new(),
    };
    let Some(link) = platform::COMMAND_LINK.map(PathBuf::from) else { return linked };
    // A package has its own link.
    if !platform::is_root() || !plan.home.is_default() || plan.packaged.is_some() {
        return linked;
    }
    let executable = plan.home.to_public(&plan.home.executable());
    let target = std::fs::read_link(&link).ok();
    let ours = target.as_ref().is_some_and(|target| platform::identity(target) == platform::identity(&executable));
    let free = link.symlink_metadata().is_err() && link.parent().is_some_and(Path::is_dir);
    if !free && !ours {
        return linked;
    }
    let outcome = if target.as_ref() == Some(&executable) { Ok(()) } else { create_link(&executable, &link, undo) };
    if let Err(error) = outcome {
        let control = plan.home.to_public(&plan.home.control_link());
        progress::warn(format_args!(
            "{error:#}; continuing without it: use {}, or create the link by hand",
            control.display()
        ));
        return linked;
    }
    if !linked.contains(&link) {
        linked.push(link);
    }
    linked
}

fn create_link(target: &Path, link: &Path, undo: &mut Undo) -> Result<()> {
    undo.save(link)?;
    platform::replace_link(target, link).with_context(|| format!("cannot create the link {}", link.display()))
}

fn write_records(
    plan: &InstallPlan,
    fetched: &FetchedManager,
    install_root: &InstallRoot,
    linked: Vec<PathBuf>,
    undo: &mut Undo,
) -> Result<()> {
    let home = &plan.home;
    write_keys(plan, fetched, undo)?;
    // The epochs of an existing home only grow and are not rolled back: its running manager may commit others meanwhile.
    let epoch = fetched.release.manager.epoch;
    if plan.keeps() {
        Epochs::commit(home, MANAGER_PACKAGE, epoch)?;
    } else {
        undo.save(&home.epochs())?;
        Epochs::create(home, [(MANAGER_PACKAGE, epoch)])?;
    }
    for path in [home.manager_record(), home.install_record()] {
        undo.save(&path)?;
    }
    fetched.release.manager.save(home)?;
    let mut installed = match &plan.existing {
        ExistingInstallation::Aops(installed) => installed.clone(),
        _ => InstallRecord::new(plan.kind),
    };
    installed.service = plan.kind;
    installed.product.clone_from(&plan.product);
    installed.created_directories.extend(install_root.created_for_home());
    if plan.existing == ExistingInstallation::Old {
        // The directory belongs to aops from now on.
        installed.created_directories.push(home.root().to_owned());
    }
    installed.linked = linked;
    installed.save(home)
}
