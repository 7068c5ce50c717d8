//! The manager killed with its sub-agents running, and no service manager: how soon the watchdog has started another, and how soon that
//! has them all in its charge.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::contestant::{Contestant, PATIENCE};
use super::door::Door;
use super::reports::Moment;
use super::statistics::Samples;
use super::verdicts::Verdicts;
use crate::command::say;
use crate::processes;
use crate::wait::try_for;

const ROUNDS: u32 = 10;
/// A look at a record that costs nobody much.
const LOOK: Duration = Duration::from_micros(500);

pub(super) fn measure(aops: &mut Contestant, verdicts: &mut Verdicts) -> Result<()> {
    let (mut revived, mut adopted) = (Samples::default(), Samples::default());
    for round in 1..=ROUNDS {
        say(&format!("killing the manager, {round} of {ROUNDS}"));
        renew(aops)?;
        let (started, ready) = kill(aops)?;
        revived.add(started);
        adopted.add(ready);
    }
    println!(
        "\naops, N = {}: manager killed until the next is there: {} ms; from then until it answers with all running: {} ms",
        aops.names.len(),
        revived.shown(),
        adopted.shown()
    );
    verdicts.at_most("manager killed until the watchdog has started the next, median", revived.median(), 50.0, "ms");
    verdicts.at_most("manager's start until all are adopted, median", adopted.median(), 300.0, "ms");
    Ok(())
}

/// A second death within a minute is put off: after a manager that gave way the next death is a first again.
fn renew(aops: &Contestant) -> Result<()> {
    let home = aops.home()?;
    let old = aops.role("spm")?;
    // The watchdog must be there to hear it.
    wait_until_watched(aops)?;
    Door::open(&home)?.give_way()?;
    try_for(PATIENCE, || aops.role("spm").ok().filter(|pid| *pid != old))
        .context("no manager follows one that gave way")?;
    aops.wait_until_all_run()?;
    wait_until_watched(aops)
}

/// The home runs whole when the watchdog holds its connection to the manager.
fn wait_until_watched(aops: &Contestant) -> Result<()> {
    let home = aops.home()?;
    let is_watched = || {
        let status = Door::open(&home).and_then(|mut door| door.status()).ok()?;
        (status["state"] == "running").then_some(())
    };
    try_for(PATIENCE, is_watched).context("the home does not come to run whole")
}

/// From the kill to the next one's record, and from there to its first answer that names them all as running.
fn kill(aops: &Contestant) -> Result<(f64, f64)> {
    let home = aops.home()?;
    let before: Vec<_> = aops.names.iter().map(|name| aops.reports.of(name).map(|start| start.pid)).collect();
    let old = aops.role("spm")?;
    let killed = Moment::now();
    processes::signal(old, Signal::KILL);
    let overdue = || Moment::now().since(killed) > PATIENCE.as_secs_f64() * 1e3;
    while aops.role("spm").is_ok_and(|pid| pid == old) {
        ensure!(!overdue(), "nobody starts another manager");
        std::thread::park_timeout(LOOK);
    }
    let started = Moment::now();
    loop {
        let status = Door::open(&home).and_then(|mut door| door.status());
        let running = |status: &serde_json::Value| {
            let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
            agents.iter().filter(|agent| agent["state"] == "running").count() == aops.names.len()
        };
        if status.is_ok_and(|status| running(&status)) {
            break;
        }
        ensure!(!overdue(), "the new manager does not take charge of all");
        std::thread::park_timeout(LOOK);
    }
    let ready = Moment::now();
    let after: Vec<_> = aops.names.iter().map(|name| aops.reports.of(name).map(|start| start.pid)).collect();
    ensure!(before == after, "the manager's death restarted sub-agents");
    Ok((started.since(killed), ready.since(started)))
}
