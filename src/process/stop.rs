//! Stops sub-agents with everything that they started: first by their `control` script, if they have one, then by signal.

use std::time::Duration;

use anyhow::{Result, bail};

use super::tree::{Census, StopProgress, StopTarget, members};
use super::{record, script};
use crate::core::model::{AgentName, Version};
use crate::home::Home;
use crate::platform;

/// Stops the targets in parallel, and returns when all of their processes are gone. Blocks.
pub fn end(home: &Home, targets: &[StopTarget]) -> Result<()> {
    let mut targets = targets.to_vec();
    let asked: Vec<Result<()>> = std::thread::scope(|scope| {
        let asks = targets.iter_mut().filter(|target| target.script_to_ask().is_some());
        let asked: Vec<_> = asks.map(|target| scope.spawn(|| script::stop(home, target))).collect();
        asked
            .into_iter()
            .map(|asked| asked.join().unwrap_or_else(|_| bail!("the thread that runs `control stop` panicked")))
            .collect()
    });
    let mut ending = StopProgress::of(home, &targets);
    while let Some(pause) = ending.look()? {
        platform::pause(pause);
    }
    targets.iter().for_each(StopTarget::remove_groups);
    let errors: Vec<String> = asked.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
}

/// Stops the program that a `control` script reports as running, even if none of its processes is found. Blocks.
pub fn end_unseen(home: &Home, name: &AgentName) -> Result<()> {
    let groups = super::groups(home);
    let of_it = |(installed, version): (AgentName, Version)| {
        (installed == *name).then(|| StopTarget::of(name, record::of(home, name), groups.as_ref()).asking(version))
    };
    let targets: Vec<StopTarget> = script::installed(home).into_iter().filter_map(of_it).collect();
    end(home, &targets)
}

/// Stops every sub-agent of a home and removes their records. Blocks.
pub fn end_all(home: &Home) -> Result<()> {
    end_all_within(home, Duration::MAX)
}

/// The same, with a limit for grace periods.
pub fn end_all_within(home: &Home, longest_grace: Duration) -> Result<()> {
    let groups = super::groups(home);
    let mut targets = Census::take(home, groups.as_ref()).targets;
    // A program may run although no process of it is found: its script knows.
    for (name, version) in script::installed(home) {
        match targets.iter().position(|target| target.name == name) {
            Some(place) => targets[place] = targets[place].clone().asking(version),
            None => targets.push(StopTarget::of(&name, None, groups.as_ref()).asking(version)),
        }
    }
    for target in &mut targets {
        target.grace = target.grace.min(longest_grace);
    }
    let ended = end(home, &targets);
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
    fn what_a_stop_starts_to_clean_up_is_not_told_to_stop() {
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
        end(&home, &[target]).unwrap();
        reaper.join().unwrap();
        assert_eq!(std::fs::read_to_string(directory.path().join("clean")).unwrap(), "clean\n");
    }

    #[test]
    fn a_tree_that_ignores_the_stop_signal_is_killed_after_its_grace() {
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
        end(&home, std::slice::from_ref(&stubborn)).unwrap();
        reaper.join().unwrap();
        assert_eq!(members(&home, &stubborn), []);
    }
}
