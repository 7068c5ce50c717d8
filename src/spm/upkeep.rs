//! What the manager looks after once in a while: whether its home can be relied on, its settings, logs, and its own record. Each is done
//! beside the loop, one at a time: a disk that hangs holds up this and nothing else.

use std::time::SystemTime;

use anyhow::Result;

use super::disk;
use super::input::{Input, Inputs};
use crate::config::{Config, Loaded};
use crate::core::role::Role;
use crate::home::Home;
use crate::installation::guard;
use crate::installation::keyring::Keyring;
use crate::package::Keys;
use crate::process::log;
use crate::role::{self, Holder};

/// What is wrong with a home, by subject; `None`: nothing.
#[derive(Debug)]
pub(super) struct Looked {
    pub(super) home: Option<String>,
    pub(super) files: Option<String>,
    /// Not looked at where the home is not sound: its contents may be anybody's.
    pub(super) keys: Option<Option<String>>,
}

/// What housekeeping found.
#[derive(Debug)]
pub(super) struct Reloaded {
    /// When the settings were last changed, as far as that can be told.
    pub(super) seen: Option<SystemTime>,
    /// The settings, where they changed.
    pub(super) loaded: Option<Result<Loaded>>,
    /// Whether others can see by the record which process the manager is.
    pub(super) is_recorded: bool,
}

/// Begins to look at the home.
pub(super) fn begin_look(inputs: &Inputs, home: &Home, config: &Config) {
    let (home, config) = (home.clone(), config.clone());
    disk::run(inputs, move || Input::Looked(look(&home, &config)));
}

/// Whether the home can be relied on, and its keys.
pub(super) fn look(home: &Home, config: &Config) -> Looked {
    let found = guard::home(home).and_then(|()| guard::keys(home)).err();
    let found = found.map(|error| format!("{error:#}; no release is fetched or activated meanwhile"));
    let files = guard::files(home, config.certificates(home).as_deref()).err();
    let files = files.map(|error| format!("{error:#}; it counts all the same, as no release gets in by it"));
    let keys = found.is_none().then(|| {
        let ring = Keyring::load(home).and_then(|ring| Ok(ring.overruled(&Keys::load(&home.keys())?)));
        match ring {
            Ok(overruled) => (!overruled.is_empty()).then(|| overruled.join("; ")),
            Err(error) => Some(format!("{error:#}")),
        }
    });
    Looked { home: found, files, keys }
}

/// Begins the housekeeping. `seen`: when the settings in force were changed; `own`: the manager's record, where it is yet to be written.
pub(super) fn begin_housekeeping(
    inputs: &Inputs,
    home: &Home,
    log_limit: u64,
    seen: Option<SystemTime>,
    own: Option<Holder>,
) {
    let home = home.clone();
    disk::run(inputs, move || {
        log::rotate_all(&home, log_limit);
        let is_recorded = own.is_none_or(|own| {
            role::announce_again(&home, Role::Spm, &own);
            role::holder(&home, Role::Spm).as_ref() == Some(&own)
        });
        let now = modified(&home);
        let loaded = (now != seen).then(|| Config::load(&home));
        Input::Reloaded(Reloaded { seen: now, loaded, is_recorded })
    });
}

/// When the settings were last changed.
pub(super) fn modified(home: &Home) -> Option<SystemTime> {
    std::fs::metadata(home.config()).and_then(|metadata| metadata.modified()).ok()
}
