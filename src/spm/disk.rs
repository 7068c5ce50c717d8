//! Disk operations off the manager's event loop, which never waits for a disk or a lock: each reports its end with an [`Input`].
//!
//! A state file is written whole, one write at a time. Of the contents that queue up, only the newest is written: a hundred changes while
//! the disk is busy result in one more write.

use std::path::PathBuf;

use serde::Serialize;
use tokio::task::JoinHandle;

use super::input::{Input, Inputs, StateFileName};
use crate::store;

/// Runs work that may block on a disk or a lock on a blocking thread, and sends the result.
pub(super) fn run(inputs: &Inputs, work: impl FnOnce() -> Input + Send + 'static) -> JoinHandle<()> {
    let inputs = inputs.clone();
    tokio::task::spawn_blocking(move || {
        // Fails only while the manager exits.
        let _ = inputs.send(work());
    })
}

/// A state file of which only the newest content is written.
#[derive(Debug)]
pub(super) struct StateFile<T> {
    file: StateFileName,
    path: PathBuf,
    /// The running write.
    busy: Option<JoinHandle<()>>,
    /// The content to write next.
    next: Option<T>,
    /// Revision of the newest content.
    revision: u64,
}

impl<T: Serialize + Send + 'static> StateFile<T> {
    pub(super) fn new(file: StateFileName, path: PathBuf) -> StateFile<T> {
        StateFile { file, path, busy: None, next: None, revision: 0 }
    }

    /// Queues a write and returns its revision. The content is durable when [`Input::Saved`] reports this revision or a later one.
    pub(super) fn save(&mut self, inputs: &Inputs, content: T) -> u64 {
        self.revision += 1;
        self.next = Some(content);
        self.begin(inputs);
        self.revision
    }

    /// Handles the end of a write, and starts the next.
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

    /// Whether no write is running or queued.
    pub(super) fn is_settled(&self) -> bool {
        self.busy.is_none()
    }

    /// Writes the queued content, or `last` instead, before the process exits.
    pub(super) async fn finish(self, last: Option<T>) {
        if let Some(busy) = self.busy {
            // A failed write is logged where its result is handled.
            let _ = busy.await;
        }
        let Some(content) = last.or(self.next) else { return };
        let written = tokio::task::spawn_blocking(move || store::save(&self.path, &content)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot write the last changes of a state file; they are lost"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn only_the_newest_queued_content_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let (inputs, mut receiver) = mpsc::unbounded_channel();
        let mut file = StateFile::new(StateFileName::Events, path.clone());
        let revisions: Vec<u64> = (0..100_u32).map(|number| file.save(&inputs, number)).collect();
        assert_eq!(revisions.last(), Some(&100));
        let mut written = vec![];
        while written.last() != Some(&100) {
            let Some(Input::Saved { revision, result, .. }) = receiver.recv().await else { panic!() };
            result.unwrap();
            written.push(revision);
            file.saved(&inputs);
        }
        assert_eq!(written, [1, 100]);
        assert!(file.is_settled());
        assert_eq!(store::load::<u32>(&path).unwrap(), Some(99));
    }

    #[tokio::test]
    async fn queued_content_is_written_at_exit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let (inputs, _receiver) = mpsc::unbounded_channel();
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
