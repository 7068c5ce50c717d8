//! Starting, watching and stopping a sub-agent, off the event loop. Each reports with an [`Input`].

use anyhow::Result;
use tokio::task::AbortHandle;

use super::input::{Input, Inputs, RunningProcess, StartedProcess};
use super::stage;
use crate::core::manifest::KillMode;
use crate::core::program::Program;
use crate::home::Home;
use crate::installation::permissions::UnsafeHome;
use crate::platform;
use crate::process::launch::{self, StartSpec};
use crate::process::record::{self, ProcessRecord};
use crate::process::script::{self, ScriptFindings, ScriptStatus, UnseenProgram};
use crate::process::stop;
use crate::process::tree::{StopProgress, StopTarget};

/// Starts a sub-agent, after stopping `last`, the leftovers of its previous process.
pub(super) fn start(inputs: &Inputs, serial: u64, start: StartSpec, last: StopTarget) {
    let inputs = inputs.clone();
    tokio::spawn(async move {
        let name = start.name.clone();
        let result = start_after_cleanup(start, last).await.map_err(|error| stage::release_error(&error));
        let _ = inputs.send(Input::Launched { name, serial, result: result.map(Box::new) });
    });
}

async fn start_after_cleanup(start: StartSpec, last: StopTarget) -> Result<StartedProcess> {
    let record = last.record.clone();
    stop_leftovers(&start, last).await?;
    let (home, name) = (start.home.clone(), start.name.clone());
    let launched = launch(start, record).await;
    if launched.as_ref().is_err_and(|error| !error.is::<UnseenProgram>()) {
        // The child writes its record before it executes its program; the program did not run.
        off_loop(move || record::discard(&home, &name)).await?;
    }
    launched
}

async fn launch(start: StartSpec, last: Option<ProcessRecord>) -> Result<StartedProcess> {
    // Creates no file in an unsafe home.
    start.check_permissions()?;
    let output = start.output()?;
    let running = match start.program.clone() {
        Program::Native(manifest) => {
            let (child, record) = launch::start_native(&start, &manifest, output.file).await?;
            RunningProcess::Child(child, record)
        }
        Program::Script => {
            let of = start.clone();
            off_loop(move || script::remove_leftovers(&of, last.as_ref())).await?;
            let record = match script::probe(&start).await? {
                ScriptFindings::Up(record) => record,
                ScriptFindings::Down => script::start(&start, output.file).await?,
                ScriptFindings::Other(record) => {
                    tracing::warn!(agent = %start.name, pid = record.pid, "the control script names a process that is running already; that process is stopped first");
                    stop_target(&start.home, StopTarget::of(&start.name, Some(record), start.groups.as_ref())).await?;
                    script::start(&start, output.file).await?
                }
            };
            RunningProcess::Script(Box::new(start), record)
        }
    };
    Ok(StartedProcess { running, output_lost: output.lost })
}

/// Leftovers of a dead main process may hold its port or its files. With `killMode = "process"` they do not belong to the sub-agent and
/// stay.
async fn stop_leftovers(start: &StartSpec, last: StopTarget) -> Result<()> {
    if start.program.kill_mode() == KillMode::Process || !last.may_run() {
        return Ok(());
    }
    stop_target(&start.home, last.at_once()).await
}

/// Stops what is left of a target, without blocking the event loop.
async fn stop_target(home: &Home, target: StopTarget) -> Result<()> {
    if target.is_scattered() || target.script_to_ask().is_some() {
        // Both are slow: all processes of the host are inspected, or a script is run.
        let home = home.clone();
        return off_loop(move || stop::stop_targets(&home, &[target])).await?;
    }
    let targets = [target];
    let mut progress = StopProgress::of(home, &targets);
    while let Some(pause) = progress.poll()? {
        if targets[0].groups_are_empty() {
            // The remaining processes are outside the cgroups.
            tokio::time::sleep(pause).await;
        } else {
            // Returns early when the cgroups are empty.
            let _ = tokio::time::timeout(pause, targets[0].groups_emptied()).await;
        }
    }
    let [target] = targets;
    off_loop(move || target.remove_groups()).await
}

/// Runs work that may block on a disk on a blocking thread: the event loop's thread runs tasks, too.
async fn off_loop<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    Ok(tokio::task::spawn_blocking(work).await?)
}

/// Watches a process and reports its exit. The handle aborts the watch when the sub-agent is stopped: its `control` script must not be run
/// while its files are removed.
pub(super) fn watch(inputs: &Inputs, serial: u64, running: RunningProcess) -> AbortHandle {
    let inputs = inputs.clone();
    let name = running.record().head.name.clone();
    let task = tokio::spawn(async move {
        let (success, how) = match running {
            RunningProcess::Child(mut child, _) => match child.wait().await {
                Ok(status) => (Some(status.success()), platform::describe_exit(status)),
                Err(error) => (None, format!("exited; cannot read its exit status: {error}")),
            },
            RunningProcess::Adopted(record) => {
                platform::ended(record.pid, record.start_time).await;
                (None, "exited; its exit status is unknown, because an earlier manager started it".to_owned())
            }
            RunningProcess::Script(start, record) => (None, watch_script(&inputs, serial, &start, record).await),
        };
        let _ = inputs.send(Input::Exited { name, serial, success, how });
    });
    task.abort_handle()
}

/// Watches the background process of a `control` script and any process that replaces it. Returns why it counts as exited.
async fn watch_script(inputs: &Inputs, serial: u64, start: &StartSpec, mut record: ProcessRecord) -> String {
    loop {
        let emptied = tokio::select! {
            // Both arms only wait and can be restarted: no event is lost.
            () = platform::ended(record.pid, record.start_time) => false,
            // A program without our environment marker and with another pid is still in the cgroup.
            () = emptied(&record) => true,
        };
        if emptied {
            if !record.is_alive() {
                return "none of its processes is left".to_owned();
            }
            // The process was moved out of its cgroup.
            platform::ended(record.pid, record.start_time).await;
        }
        platform::reap_orphan(record.pid);
        let ended = format!("its process {} exited", record.pid);
        // Without any process left, the script is not queried.
        let Some(process) = script::find_main(start, &record, None).await else { return ended };
        match script::status(start).await {
            // In an unsafe home the script must not be run: its process was found, and is kept.
            Err(error) if !error.is::<UnsafeHome>() => return ended,
            Ok(ScriptStatus::Stopped | ScriptStatus::Unclear) => return ended,
            Ok(ScriptStatus::Started) | Err(_) => {
                let session = record.session.filter(|session| *session == process.session);
                record = ProcessRecord { session, head: record.head, ..start.record_of(&process) };
                let moved = Input::Moved { name: start.name.clone(), serial, record: Box::new(record.clone()) };
                let _ = inputs.send(moved);
            }
        }
    }
}

/// Resolves when the cgroup of a process is empty; never resolves without a cgroup.
async fn emptied(record: &ProcessRecord) {
    match record.group() {
        Some(group) => group.emptied().await,
        None => std::future::pending().await,
    }
}

/// Stops a sub-agent with all of its processes.
pub(super) fn stop(inputs: &Inputs, serial: u64, home: &Home, target: StopTarget) {
    let (inputs, home, name) = (inputs.clone(), home.clone(), target.name.clone());
    tokio::spawn(async move {
        let mut ended = stop_target(&home, target.clone()).await;
        if ended.is_ok() {
            let (home, name) = (home.clone(), name.clone());
            ended = off_loop(move || record::discard(&home, &name)).await;
        }
        if let Some(record) = &target.record {
            platform::reap_orphan(record.pid);
        }
        let _ = inputs.send(Input::Stopped { name, serial, result: ended.map_err(|error| format!("{error:#}")) });
    });
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::sync::mpsc;

    use super::*;
    use crate::core::model::AgentName;
    use crate::home::Home;
    use crate::process::launch;

    /// A home with a release of a long-running sub-agent, and without a log directory.
    fn prepare(directory: &Path) -> StartSpec {
        let home = Home::new(directory);
        let (name, version): (AgentName, _) = ("a".parse().unwrap(), "1".parse().unwrap());
        let program = home.release(&name, &version).join("run");
        std::fs::create_dir_all(program.parent().unwrap()).unwrap();
        std::fs::write(&program, "#!/bin/sh\nexec sleep 1000000\n").unwrap();
        platform::set_mode(&program, 0o755).unwrap();
        let manifest = launch::parse("name = \"a\"\nversion = \"1\"\n[run]\ncommand = [\"run\"]\n").unwrap();
        StartSpec {
            home,
            name,
            version,
            program: Program::Native(Box::new(manifest)),
            spec: Default::default(),
            agent_id: "1".parse().unwrap(),
            endpoint: String::new(),
            restarts: 0,
            groups: None,
        }
    }

    #[tokio::test]
    async fn a_sub_agent_is_started_and_stopped_without_a_writable_record_or_log() {
        let directory = tempfile::tempdir().unwrap();
        let start_of_it = prepare(directory.path());
        let (home, name) = (start_of_it.home.clone(), start_of_it.name.clone());
        // Neither can a file be created there, nor can the directory be removed.
        let record = home.process_record(&name);
        for path in [record.clone(), record.with_extension("json.old")] {
            std::fs::create_dir_all(path.join("in the way")).unwrap();
        }
        let (inputs, mut receiver) = mpsc::unbounded_channel();
        start(&inputs, 1, start_of_it.clone(), StopTarget::of(&name, None, None));
        let Some(Input::Launched { result, .. }) = receiver.recv().await else { panic!("no result was sent") };
        let started = result.unwrap();
        let lost = started.output_lost.as_ref().unwrap();
        assert!(lost.starts_with("cannot open the log ") && lost.contains("a.log: "), "{lost}");
        let last = started.running.record().clone();
        assert!(last.is_alive());
        stop(&inputs, 1, &home, StopTarget::of(&name, Some(last.clone()), None));
        let Some(Input::Stopped { result, .. }) = receiver.recv().await else { panic!("no result was sent") };
        assert_eq!(result, Ok(()));
        assert!(!last.is_alive());

        // Once the log can be opened, it is written.
        std::fs::create_dir_all(home.agent_logs()).unwrap();
        assert_eq!(start_of_it.output().unwrap().lost, None);
    }

    #[tokio::test]
    async fn the_reason_why_a_program_cannot_run_is_reported_even_if_its_record_cannot_be_removed() {
        let directory = tempfile::tempdir().unwrap();
        let start = prepare(directory.path());
        std::fs::create_dir_all(start.home.process_record(&start.name).join("in the way")).unwrap();
        std::fs::remove_file(start.directory().join("run")).unwrap();
        let target = StopTarget::of(&start.name, None, None);
        let error = format!("{:#}", start_after_cleanup(start, target).await.unwrap_err());
        assert!(error.contains("cannot run ") && !error.contains("cannot remove"), "{error}");
    }
}
