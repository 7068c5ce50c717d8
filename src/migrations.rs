//! Changes that the installation of an earlier release needs for this release. They run after this release was committed; each step has a
//! file of its own.
//!
//! A step checks whether there is anything to do, so it is idempotent. The previous release must still work afterwards, because an operator
//! may return to it.

mod units;

use anyhow::Result;

use crate::home::Home;

/// The name for the log, and the step, which returns whether it changed anything.
type Migration = (&'static str, fn(&Home) -> Result<bool>);

const STEPS: &[Migration] = &[("units", units::migrate)];

/// Runs every step; returns the errors of all that failed.
pub fn run(home: &Home) -> Result<()> {
    let mut failures = Vec::new();
    for (name, step) in STEPS {
        match step(home) {
            Ok(true) => tracing::info!(step = *name, "the installation was migrated to this release"),
            Ok(false) => {}
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(anyhow::anyhow!(failures.join("; "))) }
}
