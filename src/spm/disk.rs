//! Effects on the disk beside the manager's loop, which waits for no disk and no lock: each is begun here and answered with an [`Input`].
//!
//! A state file is written whole, one write at a time, and of the contents that wait only the newest is written: a hundred changes while a
//! disk is busy are one more write.

use std::path::PathBuf;

use serde::Serialize;
use tokio::task::JoinHandle;

use super::input::{Input, Inputs, StateFileName};
use crate::store;

/// Does something that may wait for a disk or a lock, and tells what came of it.
pub(super) fn run(inputs: &Inputs, work: impl FnOnce() -> Input + Send + 'static) -> JoinHandle<()> {
    let inputs = inputs.clone();
    tokio::task::spawn_blocking(move || {
        // Nobody hears it where the manager is ending.
        let _ = inputs.send(work());
    })
}

/// A state file of which only the newest content counts.
#[derive(Debug)]
pub(super) struct StateFile<T> {
    file: StateFileName,
    path: PathBuf,
    /// The write that is under way.
    busy: Option<JoinHandle<()>>,
    /// What is written after that.
    next: Option<T>,
    /// Of the newest content.
    revision: u64,
}

impl<T: Serialize + Send + 'static> StateFile<T> {
    pub(super) fn new(file: StateFileName, path: PathBuf) -> StateFile<T> {
        StateFile { file, path, busy: None, next: None, revision: 0 }
    }

    /// Begins to write a content, and gives its revision: it is durable when [`Input::Saved`] tells of this one or a later one.
    pub(super) fn save(&mut self, inputs: &Inputs, content: T) -> u64 {
        self.revision += 1;
        self.next = Some(content);
        self.begin(inputs);
        self.revision
    }

    /// Takes in that a write has ended, and begins the next.
    pub(super) fn saved(&mut self, inputs: &Inputs) {
        self.busy = None;
        self.begin(inputs);
    }

    fn begin(&mut self, inputs: &Inputs) {
        if self.busy.is_some() {
            return;
        }
        let Some(content) = self.next.take() else { return };
        let (file, revision, path) = (self.file, self.revision, self.path.clone());
        self.busy = Some(run(inputs, move || {
            let result = store::save(&path, &content).map_err(|error| format!("{error:#}"));
            Input::Saved { file, revision, result }
        }));
    }

    /// Nothing is being written or waits for that.
    pub(super) fn is_settled(&self) -> bool {
        self.busy.is_none()
    }

    /// Writes what is not written yet, or this as the newest content, at the end of the process.
    pub(super) async fn finish(self, last: Option<T>) {
        if let Some(busy) = self.busy {
            // It says itself what it could not write.
            let _ = busy.await;
        }
        let Some(content) = last.or(self.next) else { return };
        let written = tokio::task::spawn_blocking(move || store::save(&self.path, &content)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(error = format!("{error:#}"), "what changed last is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn of_the_contents_that_wait_the_newest_alone_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let (inputs, mut words) = mpsc::unbounded_channel();
        let mut file = StateFile::new(StateFileName::Events, path.clone());
        let revisions: Vec<u64> = (0..100_u32).map(|number| file.save(&inputs, number)).collect();
        assert_eq!(revisions.last(), Some(&100));
        let mut told = vec![];
        while told.last() != Some(&100) {
            let Some(Input::Saved { revision, result, .. }) = words.recv().await else { panic!() };
            result.unwrap();
            told.push(revision);
            file.saved(&inputs);
        }
        assert_eq!(told, [1, 100]);
        assert!(file.is_settled());
        assert_eq!(store::load::<u32>(&path).unwrap(), Some(99));
    }

    #[tokio::test]
    async fn nothing_that_waits_is_lost_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let (inputs, _words) = mpsc::unbounded_channel();
        for last in [1_u32, 2] {
            let mut file = StateFile::new(StateFileName::Events, path.clone());
            (1..=last).for_each(|number| {
                file.save(&inputs, number);
            });
            file.finish(None).await;
            assert_eq!(store::load::<u32>(&path).unwrap(), Some(last));
        }
        let mut file = StateFile::new(StateFileName::Events, path.clone());
        file.save(&inputs, 3);
        file.finish(Some(4)).await;
        assert_eq!(store::load::<u32>(&path).unwrap(), Some(4));
    }
}
