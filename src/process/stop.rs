//! Stops sub-agents with everything that they started: first by their `control` script, if they have one, then by signal.

use std::time::Duration;

use anyhow::{Result, bail};

use super::tree::{Census, StopProgress, StopTarget, members};
use super::{record, script};
use crate::core::model::{AgentName, Version};
use crate::home::Home;
use crate::platform;

/// Stops the targets in parallel, and returns when all of their processes are gone. Blocks.
pub fn stop_targets(home: &Home, targets: &[StopTarget]) -> Result<()> {
    let mut targets = targets.to_vec();
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let targets_with_script = targets.iter_mut().filter(|target| target.script_to_ask().is_some());
        let results: Vec<_> = targets_with_script.map(|target| scope.spawn(|| script::stop(home, target))).collect();
        results
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("the thread that runs `control stop` panicked")))
            .collect()
    });
    let mut progress = StopProgress::of(home, &targets);
    while let Some(pause) = progress.poll()? {
        platform::pause(pause);
    }
    targets.iter().for_each(StopTarget::remove_groups);
    let errors: Vec<String> = results.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
}

/// Stops the program that a `control` script reports as running, even if none of its processes is found. Blocks.
pub fn stop_unseen(home: &Home, name: &AgentName) -> Result<()> {
    let groups = super::groups(home);
    let of_it = |(installed, version): (AgentName, Version)| {
        (installed == *name).then(|| StopTarget::of(name, record::of(home, name), groups.as_ref()).with_script(version))
    };
    let targets: Vec<StopTarget> = script::installed(home).into_iter().filter_map(of_it).collect();
    stop_targets(home, &targets)
}

/// Stops every sub-agent of a home and removes their records. Blocks.
pub fn stop_all(home: &Home) -> Result<()> {
    stop_all_within(home, Duration::MAX)
}

/// The same, with a limit for grace periods.
pub fn stop_all_within(home: &Home, longest_grace: Duration) -> Result<()> {
    let groups = super::groups(home);
    let mut targets = Census::take(home, groups.as_ref()).targets;
    // A program may run although no process of it is found: its script knows.
    for (name, version) in script::installed(home) {
        match targets.iter().position(|target| target.name == name) {
            Some(place) => targets[place] = targets[place].clone().with_script(version),
            None => targets.push(StopTarget::of(&name, None, groups.as_ref()).with_script(version)),
        }
    }
    for target in &mut targets {
        target.grace = target.grace.min(longest_grace);
    }
    let ended = stop_targets(home, &targets);
    // A program that could not be stopped, or whose exit could not be verified, keeps its record for the next attempt.
    let is_unseen = |target: &StopTarget| record::of(home, &target.name).is_some_and(|record| record.head.unseen);
    let is_gone = |target: &&StopTarget| ended.is_ok() || members(home, target).is_empty() && !is_unseen(target);
    for target in targets.iter().filter(is_gone) {
        record::discard(home, &target.name);
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_up_process_gets_no_stop_signal() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let mut command = std::process::Command::new("sh");
        // Its helper lives longer than several polls.
        command.args([
            "-c",
            "trap 'sleep 0.3 && echo clean >clean; exit 0' TERM; echo >ready; while :; do sleep 0.01; done",
        ]);
        command.current_dir(directory.path()).env("AOPS_HOME", home.root()).env("AOPS_AGENT_NAME", "tidy");
        platform::detach_from_caller(&mut command);
        let mut child = command.spawn().unwrap();
        while !directory.path().join("ready").exists() {
            platform::pause(Duration::from_millis(5));
        }
        let name: AgentName = "tidy".parse().unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        let mut target = StopTarget::of(&name, None, None);
        target.grace = Duration::from_secs(20);
        stop_targets(&home, &[target]).unwrap();
        reaper.join().unwrap();
        assert_eq!(std::fs::read_to_string(directory.path().join("clean")).unwrap(), "clean\n");
    }

    #[test]
    fn a_tree_that_ignores_the_stop_signal_is_killed_after_the_grace_period() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "trap '' TERM; (trap '' TERM; while :; do sleep 1; done) & while :; do sleep 1; done"]);
        command.env("AOPS_HOME", home.root()).env("AOPS_AGENT_NAME", "stubborn");
        platform::detach_from_caller(&mut command);
        let mut child = command.spawn().unwrap();
        let name: AgentName = "stubborn".parse().unwrap();
        let mut stubborn = StopTarget::of(&name, None, None);
        stubborn.grace = Duration::from_millis(300);
        while members(&home, &stubborn).len() < 2 {
            platform::pause(Duration::from_millis(5));
        }
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        stop_targets(&home, std::slice::from_ref(&stubborn)).unwrap();
        reaper.join().unwrap();
        assert_eq!(members(&home, &stubborn), []);
    }
}
