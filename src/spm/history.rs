//! What came of each change of release (`state/history.json`): capped, kept for the operator at the host, whether or not the gateway has
//! seen the events.

use super::disk::StateFile;
use super::input::{Inputs, StateFileName};
use crate::core::model::Version;
use crate::core::status::{History, HistoryEntry};
use crate::home::Home;
use crate::store;

/// Beyond this the oldest are forgotten.
const MAX_CHANGES: usize = 200;

/// The history of one home.
#[derive(Debug)]
pub(super) struct UpgradeHistory {
    file: StateFile<History>,
    kept: History,
}

impl UpgradeHistory {
    /// What earlier managers left. An unreadable file is begun anew, which the log says.
    pub(super) fn load(home: &Home) -> UpgradeHistory {
        let path = home.history();
        let kept = store::load(&path).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the history of upgrades cannot be read and begins anew");
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

    /// Whether this change of a package's release, which began then, is in it.
    pub(super) fn has(&self, package: &str, kind: &str, to: &Version, began: Option<String>) -> bool {
        self.kept.history.iter().any(|changed| {
            let is_it = changed.agent.as_str() == package && changed.kind == kind && changed.to == *to;
            is_it && changed.began.is_some() && changed.began == began
        })
    }

    /// Takes in that a write has ended.
    pub(super) fn saved(&mut self, result: Result<(), String>, inputs: &Inputs) {
        self.file.saved(inputs);
        if let Err(error) = result {
            tracing::warn!(error, "the history of upgrades cannot be written; its newest entries are in memory alone");
        }
    }

    /// Writes what is not written yet, at the end of the process.
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
    async fn the_newest_are_kept_across_managers() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        std::fs::create_dir(home.state()).unwrap();
        let (inputs, mut words) = mpsc::unbounded_channel();
        std::fs::write(home.history(), r#"{"history":[],"later":{"of":1}}"#).unwrap();
        let mut changes = UpgradeHistory::load(&home);
        for seconds in 0..250 {
            let text = format!(
                r#"{{"time":"","kind":"upgrade","agent":"a","from":null,"to":"1","outcome":"ok","seconds":{seconds},"later":1}}"#
            );
            changes.add(serde_json::from_str(&text).unwrap(), &inputs);
        }
        while let Some(Input::Saved { revision, result, .. }) = words.recv().await {
            changes.saved(result, &inputs);
            if revision == 250 {
                break;
            }
        }
        let wanted: Version = "1".parse().unwrap();
        let began = Some("2026-11-29T12:00:00Z".to_owned());
        assert!(!changes.has("a", "upgrade", &wanted, began.clone()) && !changes.has("a", "upgrade", &wanted, None));
        let mut last = changes.kept.history.pop().unwrap();
        last.began.clone_from(&began);
        changes.add(last, &inputs);
        changes.finish().await;
        let kept = UpgradeHistory::load(&home);
        assert!(kept.has("a", "upgrade", &wanted, began.clone()) && !kept.has("a", "rollback", &wanted, began));
        let seconds: Vec<u64> = kept.kept.history.iter().map(|changed| changed.seconds).collect();
        assert_eq!(seconds, (50..250).collect::<Vec<_>>());
        assert!(kept.kept.unknown.contains_key("later"));
    }
}
