//! What takes time, done beside the manager's loop: starting a sub-agent, watching it, stopping it. Each reports with an [`Input`].

use anyhow::Result;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::Input;
use crate::core::manifest::KillMode;
use crate::core::model::AgentName;
use crate::home::Home;
use crate::platform;
use crate::process::launch::{self, Program, Start};
use crate::process::record::{self, Record};
use crate::process::script::{self, Said};
use crate::process::tree::{self, Target};

/// Where a task sends what came of it.
pub(super) type Inputs = mpsc::UnboundedSender<Input>;

/// A process that runs: started by us, so that its exit status comes to us, or adopted.
#[derive(Debug)]
pub(super) enum Running {
    Child(Box<tokio::process::Child>, Record),
    Adopted(Record),
    Script(Box<Start>, Record),
}

impl Running {
    pub(super) fn record(&self) -> &Record {
        match self {
            Running::Child(_, record) | Running::Adopted(record) | Running::Script(_, record) => record,
        }
    }
}

/// Starts a sub-agent, after ending what an earlier process of it left behind.
pub(super) fn start(inputs: &Inputs, serial: u64, start: Start) {
    let inputs = inputs.clone();
    tokio::spawn(async move {
        let name = start.name.clone();
        let result = start_clean(start).await.map_err(|error| format!("{error:#}"));
        let _ = inputs.send(Input::Launched { name, serial, result: result.map(Box::new) });
    });
}

async fn start_clean(start: Start) -> Result<Running> {
    let (home, name, kill_mode) = (start.home.clone(), start.name.clone(), start.head().kill_mode);
    tokio::task::spawn_blocking(move || end_leftovers(&home, &name, kill_mode)).await??;
    match start.program.clone() {
        Program::Native(manifest) => {
            let (child, record) = launch::start_native(&start, &manifest).await?;
            Ok(Running::Child(Box::new(child), record))
        }
        Program::Script => {
            let of = start.clone();
            tokio::task::spawn_blocking(move || script::forget(&of, record::load(&of.home, &of.name).as_ref())).await?;
            let record = script::start(&start).await?;
            Ok(Running::Script(Box::new(start), record))
        }
    }
}

/// What a dead main process left behind would keep its port or its files. Where the package says that it is somebody else's, it stays.
fn end_leftovers(home: &Home, name: &AgentName, kill_mode: KillMode) -> Result<()> {
    if kill_mode == KillMode::Process {
        return Ok(());
    }
    let target = Target::of(name, record::load(home, name)).at_once();
    if tree::members(home, &target).is_empty() { Ok(()) } else { tree::end(home, &[target]) }
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
        platform::ended(record.pid, record.start_time).await;
        platform::reap_orphan(record.pid);
        let ended = format!("its process {} ended", record.pid);
        // Where nothing of it is left, there is nothing to ask after.
        let Some(process) = script::find(start).await else { return ended };
        match script::status(start).await {
            Ok(Said::Started) => {
                record = Record { pid: process.pid, start_time: process.start_time, ..record };
                let moved = Input::Moved { name: start.name.clone(), serial, record: Box::new(record.clone()) };
                let _ = inputs.send(moved);
            }
            _ => return ended,
        }
    }
}

/// Ends a sub-agent with all that it started.
pub(super) fn stop(inputs: &Inputs, serial: u64, home: &Home, target: Target) {
    let (inputs, home, name) = (inputs.clone(), home.clone(), target.name.clone());
    tokio::spawn(async move {
        let ended = tokio::task::spawn_blocking(move || {
            tree::end(&home, std::slice::from_ref(&target))?;
            record::remove(&home, &target.name)
        });
        let result = match ended.await {
            Ok(result) => result.map_err(|error| format!("{error:#}")),
            Err(error) => Err(format!("cannot stop it: {error}")),
        };
        let _ = inputs.send(Input::Ended { name, serial, result });
    });
}
