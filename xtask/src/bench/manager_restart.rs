//! Kills the manager while its sub-agents run, without a service manager: measures the time until the watchdog has started the next one,
//! and until that one has adopted all sub-agents.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::contestant::{Contestant, PATIENCE};
use super::control_socket::ControlSocket;
use super::reports::Moment;
use super::statistics::Samples;
use super::verdicts::Verdicts;
use crate::command::say;
use crate::processes;
use crate::wait::try_for;

const ROUNDS: u32 = 10;
/// The poll interval of a record, which is cheap to read.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

pub(super) fn measure(aops: &mut Contestant, verdicts: &mut Verdicts) -> Result<()> {
    let (mut restarted, mut adopted) = (Samples::default(), Samples::default());
    for round in 1..=ROUNDS {
        say(&format!("killing the manager, {round} of {ROUNDS}"));
        renew(aops)?;
        let (started, ready) = kill(aops)?;
        restarted.add(started);
        adopted.add(ready);
    }
    println!(
        "\naops, N = {}: manager killed until the next is recorded: {} ms; from then until its status has all sub-agents running: {} ms",
        aops.names.len(),
        restarted.shown(),
        adopted.shown()
    );
    verdicts.at_most("manager killed until the watchdog has started the next, median", restarted.median(), 50.0, "ms");
    verdicts.at_most("manager's start until all are adopted, median", adopted.median(), 300.0, "ms");
    Ok(())
}

/// Restarts after a second death within a minute are delayed. A `yield` resets that count.
fn renew(aops: &Contestant) -> Result<()> {
    let home = aops.home()?;
    let old = aops.role("spm")?;
    // The watchdog must be connected to receive the goodbye.
    wait_until_watched(aops)?;
    ControlSocket::open(&home)?.stop_with_yield()?;
    try_for(PATIENCE, || aops.role("spm").ok().filter(|pid| *pid != old))
        .context("no manager starts after one that yielded")?;
    aops.wait_until_all_run()?;
    wait_until_watched(aops)
}

/// The home is `running` once the watchdog is connected to the manager.
fn wait_until_watched(aops: &Contestant) -> Result<()> {
    let home = aops.home()?;
    let is_watched = || {
        let status = ControlSocket::open(&home).and_then(|mut socket| socket.status()).ok()?;
        (status["state"] == "running").then_some(())
    };
    try_for(PATIENCE, is_watched).context("the home does not reach the state running")
}

/// The time from the kill to the next manager's record, and from there to its first status that has all sub-agents running.
fn kill(aops: &Contestant) -> Result<(f64, f64)> {
    let home = aops.home()?;
    let before: Vec<_> = aops.names.iter().map(|name| aops.reports.of(name).map(|start| start.pid)).collect();
    let old = aops.role("spm")?;
    let killed = Moment::now();
    processes::signal(old, Signal::KILL);
    let overdue = || Moment::now().since(killed) > PATIENCE.as_secs_f64() * 1e3;
    while aops.role("spm").is_ok_and(|pid| pid == old) {
        ensure!(!overdue(), "no manager is started");
        std::thread::park_timeout(POLL_INTERVAL);
    }
    let started = Moment::now();
    loop {
        let status = ControlSocket::open(&home).and_then(|mut socket| socket.status());
        let running = |status: &serde_json::Value| {
            let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
            agents.iter().filter(|agent| agent["state"] == "running").count() == aops.names.len()
        };
        if status.is_ok_and(|status| running(&status)) {
            break;
        }
        ensure!(!overdue(), "the new manager does not adopt all sub-agents");
        std::thread::park_timeout(POLL_INTERVAL);
    }
    let ready = Moment::now();
    let after: Vec<_> = aops.names.iter().map(|name| aops.reports.of(name).map(|start| start.pid)).collect();
    ensure!(before == after, "the manager's death restarted sub-agents");
    Ok((started.since(killed), ready.since(started)))
}
