//! Periodic checks of the manager: the safety of its home, its settings, logs, and its own record. Each runs off the event loop, one at a
//! time, so that a hanging disk delays nothing else.

use std::time::SystemTime;

use super::disk;
use super::input::{HomeProblems, Input, Inputs, MaintenanceResult};
use crate::config::Config;
use crate::core::role::Role;
use crate::home::Home;
use crate::installation::keyring::Keyring;
use crate::installation::permissions;
use crate::package::Keys;
use crate::process::log;
use crate::role::{self, RoleHolder};

/// Starts a check of the home.
pub(super) fn start_home_check(inputs: &Inputs, home: &Home, config: &Config) {
    let (home, config) = (home.clone(), config.clone());
    disk::run(inputs, move || Input::HomeChecked(check_home(&home, &config)));
}

/// Checks whether the home and its keys are safe.
pub(super) fn check_home(home: &Home, config: &Config) -> HomeProblems {
    let unsafe_home = permissions::home(home).and_then(|()| permissions::keys(home)).err();
    let unsafe_home =
        unsafe_home.map(|error| format!("{error:#}; no release is fetched or activated until this is resolved"));
    let files = permissions::files(home, config.certificates(home).as_deref()).err();
    let files = files
        .map(|error| format!("{error:#}; the files are used nevertheless, as releases are not verified with them"));
    let keys = unsafe_home.is_none().then(|| {
        let ring = Keyring::load(home).and_then(|ring| Ok(ring.overruled(&Keys::load(&home.keys())?)));
        match ring {
            Ok(overruled) => (!overruled.is_empty()).then(|| overruled.join("; ")),
            Err(error) => Some(format!("{error:#}")),
        }
    });
    HomeProblems { home: unsafe_home, files, keys }
}

/// Starts the housekeeping. `modified_before`: modification time of the settings in use; `own`: the manager's record, if it is not written yet.
pub(super) fn start_housekeeping(
    inputs: &Inputs,
    home: &Home,
    log_limit: u64,
    modified_before: Option<SystemTime>,
    own: Option<RoleHolder>,
) {
    let home = home.clone();
    disk::run(inputs, move || {
        log::rotate_all(&home, log_limit);
        let is_recorded = own.is_none_or(|own| {
            role::retry_announce(&home, Role::Spm, &own);
            role::recorded_holder(&home, Role::Spm).as_ref() == Some(&own)
        });
        let now = modified(&home);
        let loaded = (now != modified_before).then(|| Config::load(&home));
        Input::MaintenanceDone(MaintenanceResult { modified: now, loaded, is_recorded })
    });
}

/// Modification time of the settings.
pub(super) fn modified(home: &Home) -> Option<SystemTime> {
    std::fs::metadata(home.config()).and_then(|metadata| metadata.modified()).ok()
}
