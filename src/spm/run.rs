//! What takes time, done beside the manager's loop: starting a sub-agent, watching it, stopping it. Each reports with an [`Input`].

use anyhow::Result;
use tokio::task::AbortHandle;

use super::input::{Input, Inputs, Running};
use super::stage;
use crate::core::manifest::KillMode;
use crate::core::program::Program;
use crate::home::Home;
use crate::installation::guard::Unsound;
use crate::platform;
use crate::process::launch::{self, Start};
use crate::process::record::{self, Record};
use crate::process::script::{self, Said};
use crate::process::stop;
use crate::process::tree::{Ending, Target};

/// Starts a sub-agent, after ending what an earlier process of it left behind: `last`.
pub(super) fn start(inputs: &Inputs, serial: u64, start: Start, last: Target) {
    let inputs = inputs.clone();
    tokio::spawn(async move {
        let name = start.name.clone();
        let result = start_clean(start, last).await.map_err(|error| stage::refusal(&error));
        let _ = inputs.send(Input::Launched { name, serial, result: result.map(Box::new) });
    });
}

async fn start_clean(start: Start, last: Target) -> Result<Running> {
    let record = last.record.clone();
    end_leftovers(&start, last).await?;
    let (home, name) = (start.home.clone(), start.name.clone());
    let launched = launch(start, record).await;
    if launched.is_err() {
        // The child wrote its record before its program turned out not to run.
        off_loop(move || record::remove(&home, &name)).await??;
    }
    launched
}

async fn launch(start: Start, last: Option<Record>) -> Result<Running> {
    match start.program.clone() {
        Program::Native(manifest) => {
            let (child, record) = launch::start_native(&start, &manifest).await?;
            Ok(Running::Child(child, record))
        }
        Program::Script => {
            let of = start.clone();
            off_loop(move || script::forget(&of, last.as_ref())).await?;
            let record = script::start(&start).await?;
            Ok(Running::Script(Box::new(start), record))
        }
    }
}

/// What a dead main process left behind would keep its port or its files. Where the package says that it is somebody else's, it stays.
async fn end_leftovers(start: &Start, last: Target) -> Result<()> {
    if start.program.kill_mode() == KillMode::Process || !last.may_live() {
        return Ok(());
    }
    end(&start.home, last.at_once()).await
}

/// Ends what is left of a target, without holding up the manager's loop.
async fn end(home: &Home, target: Target) -> Result<()> {
    if target.is_scattered() || target.script_to_ask().is_some() {
        // Both take their time: every process of the host is looked at, a script is run.
        let home = home.clone();
        return off_loop(move || stop::end(&home, &[target])).await?;
    }
    let targets = [target];
    let mut ending = Ending::of(home, &targets);
    while let Some(pause) = ending.look()? {
        if targets[0].groups_are_empty() {
            // What is left lives outside of them.
            tokio::time::sleep(pause).await;
        } else {
            // It ends early when nothing is left.
            let _ = tokio::time::timeout(pause, targets[0].groups_emptied()).await;
        }
    }
    let [target] = targets;
    off_loop(move || target.remove_groups()).await
}

/// Does what may wait for a disk beside the loop, on whose thread tasks run too.
async fn off_loop<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    Ok(tokio::task::spawn_blocking(work).await?)
}

/// Watches a process and tells of its end. Who stops it ends the watch: a `control` script must not be asked while its files are removed.
pub(super) fn watch(inputs: &Inputs, serial: u64, running: Running) -> AbortHandle {
    let inputs = inputs.clone();
    let name = running.record().head.name.clone();
    let task = tokio::spawn(async move {
        let (success, how) = match running {
            Running::Child(mut child, _) => match child.wait().await {
                Ok(status) => (Some(status.success()), platform::how_it_ended(status)),
                Err(error) => (None, format!("ended; its exit status cannot be read: {error}")),
            },
            Running::Adopted(record) => {
                platform::ended(record.pid, record.start_time).await;
                (None, "ended; its exit status is not known, it was started by an earlier manager".to_owned())
            }
            Running::Script(start, record) => (None, watch_script(&inputs, serial, &start, record).await),
        };
        let _ = inputs.send(Input::Exited { name, serial, success, how });
    });
    task.abort_handle()
}

/// Watches the process that a `control` script put into the background, and the one that takes its place; says why it counts as ended.
async fn watch_script(inputs: &Inputs, serial: u64, start: &Start, mut record: Record) -> String {
    loop {
        let emptied = tokio::select! {
            // Both arms only wait, and are begun anew: nothing is lost when the other comes first.
            () = platform::ended(record.pid, record.start_time) => false,
            // A program that scrubs its environment and is nobody's by number is still in the group.
            () = emptied(&record) => true,
        };
        if emptied {
            if !record.is_alive() {
                return "nothing of it is left".to_owned();
            }
            // It was moved out of its group.
            platform::ended(record.pid, record.start_time).await;
        }
        platform::reap_orphan(record.pid);
        let ended = format!("its process {} ended", record.pid);
        // Where nothing of it is left, there is nothing to ask after.
        let Some(process) = script::find(start).await else { return ended };
        match script::status(start).await {
            // One that may not be asked is there, and is left alone.
            Err(error) if !error.is::<Unsound>() => return ended,
            Ok(Said::Stopped | Said::Unclear) => return ended,
            Ok(Said::Started) | Err(_) => {
                record = Record { pid: process.pid, start_time: process.start_time, ..record };
                let moved = Input::Moved { name: start.name.clone(), serial, record: Box::new(record.clone()) };
                let _ = inputs.send(moved);
            }
        }
    }
}

/// Resolves when the group of a process holds nobody any more; never where it has none.
async fn emptied(record: &Record) {
    match record.group() {
        Some(group) => group.emptied().await,
        None => std::future::pending().await,
    }
}

/// Ends a sub-agent with all that it started.
pub(super) fn stop(inputs: &Inputs, serial: u64, home: &Home, target: Target) {
    let (inputs, home, name) = (inputs.clone(), home.clone(), target.name.clone());
    tokio::spawn(async move {
        let ended = match end(&home, target.clone()).await {
            Ok(()) => {
                let (home, name) = (home.clone(), name.clone());
                off_loop(move || record::remove(&home, &name)).await.and_then(|removed| removed)
            }
            Err(error) => Err(error),
        };
        if let Some(record) = &target.record {
            platform::reap_orphan(record.pid);
        }
        let _ = inputs.send(Input::Ended { name, serial, result: ended.map_err(|error| format!("{error:#}")) });
    });
}
