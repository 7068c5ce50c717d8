//! Rewrites the units of the roles as this release defines them. Releases differ only in options that the programs of both support.

use anyhow::Result;

use crate::home::Home;
use crate::host_service;
use crate::installation::InstallRecord;

pub(super) fn migrate(home: &Home) -> Result<bool> {
    let Some(installed) = InstallRecord::load(home)? else { return Ok(false) };
    host_service::refresh(installed.service, home)
}
