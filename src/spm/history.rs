//! The history of release changes (`state/history.json`): limited in length, kept for the operator at the host, independent of what the
//! gateway has received.

use super::disk::StateFile;
use super::input::{Inputs, StateFileName};
use crate::core::model::Version;
use crate::core::status::{History, HistoryEntry};
use crate::home::Home;
use crate::store;

/// The oldest entries beyond this are dropped.
const MAX_CHANGES: usize = 200;

/// The history of one home.
#[derive(Debug)]
pub(super) struct UpgradeHistory {
    file: StateFile<History>,
    kept: History,
}

impl UpgradeHistory {
    /// Loads the history. An unreadable file is logged and replaced by an empty history.
    pub(super) fn load(home: &Home) -> UpgradeHistory {
        let path = home.history();
        let kept = store::load(&path).unwrap_or_else(|error| {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot read the history of upgrades; it is started from scratch"
            );
            None
        });
        UpgradeHistory { file: StateFile::new(StateFileName::History, path), kept: kept.unwrap_or_default() }
    }

    pub(super) fn add(&mut self, changed: HistoryEntry, inputs: &Inputs) {
        self.kept.history.push(changed);
        let surplus = self.kept.history.len().saturating_sub(MAX_CHANGES);
        self.kept.history.drain(..surplus);
        self.file.save(inputs, self.kept.clone());
    }

    /// Whether it has this change of a package's release with this start time.
    pub(super) fn has(&self, package: &str, kind: &str, to: &Version, began: Option<String>) -> bool {
        self.kept.history.iter().any(|changed| {
            let is_it = changed.agent.as_str() == package && changed.kind == kind && changed.to == *to;
            is_it && changed.began.is_some() && changed.began == began
        })
    }

    /// Handles the end of a write.
    pub(super) fn saved(&mut self, result: Result<(), String>, inputs: &Inputs) {
        self.file.saved(inputs);
        if let Err(error) = result {
            tracing::warn!(
                error,
                "cannot write the history of upgrades; its newest entries are lost if the manager exits"
            );
        }
    }

    /// Writes pending changes before the process exits.
    pub(super) async fn finish(self) {
        self.file.finish(None).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::super::input::Input;
    use super::*;

    #[tokio::test]
    async fn the_newest_entries_are_kept_across_restarts() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir(home.state()).unwrap();
        let (inputs, mut receiver) = mpsc::unbounded_channel();
        std::fs::write(home.history(), r#"{"history":[],"later":{"of":1}}"#).unwrap();
        let mut changes = UpgradeHistory::load(&home);
        for seconds in 0..250 {
            let text = format!(
                r#"{{"time":"","kind":"upgrade","agent":"a","from":null,"to":"1","outcome":"ok","seconds":{seconds},"later":1}}"#
            );
            changes.add(serde_json::from_str(&text).unwrap(), &inputs);
        }
        while let Some(Input::Saved { revision, result, .. }) = receiver.recv().await {
            changes.saved(result, &inputs);
            if revision == 250 {
                break;
            }
        }
        let version: Version = "1".parse().unwrap();
        let began = Some("2026-11-29T12:00:00Z".to_owned());
        assert!(!changes.has("a", "upgrade", &version, began.clone()) && !changes.has("a", "upgrade", &version, None));
        let mut last = changes.kept.history.pop().unwrap();
        last.began.clone_from(&began);
        changes.add(last, &inputs);
        changes.finish().await;
        let kept = UpgradeHistory::load(&home);
        assert!(kept.has("a", "upgrade", &version, began.clone()) && !kept.has("a", "rollback", &version, began));
        let seconds: Vec<u64> = kept.kept.history.iter().map(|changed| changed.seconds).collect();
        assert_eq!(seconds, (50..250).collect::<Vec<_>>());
        assert!(kept.kept.unknown.contains_key("later"));
    }
}
