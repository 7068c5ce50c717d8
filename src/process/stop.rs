//! Stops sub-agents with all that they started: a `control` script of theirs is asked first, what is left is ended by signal.

use std::time::Duration;

use anyhow::Result;

use super::tree::{Census, Ending, Target, members};
use super::{record, script};
use crate::home::Home;
use crate::platform;

/// Ends the targets, all at the same time, and returns when nothing of any of them is left. Blocks.
pub fn end(home: &Home, targets: &[Target]) -> Result<()> {
    std::thread::scope(|scope| {
        for target in targets {
            if let Some(record) = target.script_to_ask() {
                scope.spawn(|| script::stop(home, record));
            }
        }
    });
    let mut ending = Ending::of(home, targets);
    while let Some(pause) = ending.look()? {
        platform::pause(pause);
    }
    targets.iter().for_each(Target::remove_groups);
    Ok(())
}

/// Ends every sub-agent of a home and forgets it. Blocks.
pub fn end_all(home: &Home) -> Result<()> {
    end_all_within(home, Duration::MAX)
}

/// The same, with no grace period longer than that.
pub fn end_all_within(home: &Home, longest_grace: Duration) -> Result<()> {
    let groups = super::groups(home);
    let mut targets = Census::take(home, groups.as_ref()).targets;
    for target in &mut targets {
        target.grace = target.grace.min(longest_grace);
    }
    let ended = end(home, &targets);
    // What could not be ended keeps its record, for whoever tries again.
    for target in targets.iter().filter(|target| ended.is_ok() || members(home, target).is_empty()) {
        record::discard(home, &target.name);
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::model::AgentName;

    #[test]
    fn what_a_stop_starts_to_clean_up_is_not_told_to_stop() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let mut command = std::process::Command::new("sh");
        // Its helper is met by several looks.
        command.args([
            "-c",
            "trap 'sleep 0.3 && echo clean >clean; exit 0' TERM; echo >ready; while :; do sleep 0.01; done",
        ]);
        command.current_dir(directory.path()).env("AOPS_HOME", home.root()).env("AOPS_AGENT_NAME", "tidy");
        platform::leave_caller(&mut command);
        let mut child = command.spawn().unwrap();
        while !directory.path().join("ready").exists() {
            platform::pause(Duration::from_millis(5));
        }
        let name: AgentName = "tidy".parse().unwrap();
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        let mut target = Target::of(&name, None, None);
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
        platform::leave_caller(&mut command);
        let mut child = command.spawn().unwrap();
        let name: AgentName = "stubborn".parse().unwrap();
        let mut stubborn = Target::of(&name, None, None);
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
