//! What a host that runs an earlier release's installation needs changed for this release: once this one is committed, each step by a file of
//! its own.
//!
//! A step looks whether there is something to do, so it may be repeated, and leaves nothing that the release before could not work with: an
//! operator may return to that one.

mod units;

use anyhow::Result;

use crate::home::Home;

/// A name for the log, and the step; it answers whether there was something to do.
type Migration = (&'static str, fn(&Home) -> Result<bool>);

const STEPS: &[Migration] = &[("units", units::migrate)];

/// Takes every step; fails with what could not be done, when all were tried.
pub fn run(home: &Home) -> Result<()> {
    let mut failures = Vec::new();
    for (name, step) in STEPS {
        match step(home) {
            Ok(true) => tracing::info!(step = *name, "the installation was brought up to this release"),
            Ok(false) => {}
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(anyhow::anyhow!(failures.join("; "))) }
}
