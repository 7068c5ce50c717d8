//! Effects on the disk beside the manager's loop, which waits for no disk and no lock: each is begun here and answered with an [`Input`].
//!
//! A state file is written whole, one write at a time, and of the contents that wait only the newest is written: a hundred changes while a
//! disk is busy are one more write.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use serde::Serialize;
use tokio::task::JoinHandle;

use super::input::{File, Input, Inputs};
use crate::store;

/// Does something that may wait for a disk or a lock, and tells what came of it.
pub(super) fn run(inputs: &Inputs, work: impl FnOnce() -> Input + Send + 'static) {
    let inputs = inputs.clone();
    tokio::task::spawn_blocking(move || {
        // Nobody hears it where the manager is ending.
        let _ = inputs.send(work());
    });
}

/// A state file of which only the newest content counts.
#[derive(Debug)]
pub(super) struct StateFile<T> {
    file: File,
    path: PathBuf,
    /// A write is under way.
    is_busy: bool,
    /// What is written after that.
    next: Option<T>,
    /// Of the newest content.
    revision: u64,
    /// The newest revision on disk; held while one is written.
    written: Arc<Mutex<u64>>,
}

impl<T: Serialize + Send + 'static> StateFile<T> {
    pub(super) fn new(file: File, path: PathBuf) -> StateFile<T> {
        StateFile { file, path, is_busy: false, next: None, revision: 0, written: Arc::default() }
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
        self.is_busy = false;
        self.begin(inputs);
    }

    fn begin(&mut self, inputs: &Inputs) {
        if self.is_busy {
            return;
        }
        let Some(content) = self.next.take() else { return };
        self.is_busy = true;
        let (file, revision, path, written) = (self.file, self.revision, self.path.clone(), self.written.clone());
        run(inputs, move || {
            let result = write(&path, &content, revision, &written).map_err(|error| format!("{error:#}"));
            Input::Saved { file, revision, result }
        });
    }

    /// Nothing is being written or waits for that.
    pub(super) fn is_settled(&self) -> bool {
        !self.is_busy
    }

    /// Begins to write a last content, beside a write that is under way: at the end of the process.
    pub(super) fn save_last(&mut self, content: T) -> JoinHandle<()> {
        self.revision += 1;
        self.next = None;
        let (revision, path, written) = (self.revision, self.path.clone(), self.written.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = write(&path, &content, revision, &written) {
                tracing::warn!(error = format!("{error:#}"), "what changed last is lost");
            }
        })
    }
}

/// Writes a content unless a newer one is on disk.
fn write<T: Serialize>(path: &std::path::Path, content: &T, revision: u64, written: &Mutex<u64>) -> Result<()> {
    let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
    if *written >= revision {
        return Ok(());
    }
    store::save(path, content)?;
    *written = revision;
    Ok(())
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
        let mut file = StateFile::new(File::Events, path.clone());
        let held = file.written.clone();
        let busy = held.lock().unwrap();
        let revisions: Vec<u64> = (0..100_u32).map(|number| file.save(&inputs, number)).collect();
        assert_eq!(revisions.last(), Some(&100));
        drop(busy);
        let mut told = vec![];
        while told.last() != Some(&100) {
            let Some(Input::Saved { revision, result, .. }) = words.recv().await else { panic!() };
            result.unwrap();
            told.push(revision);
            file.saved(&inputs);
        }
        assert_eq!(told, [1, 100]);
        assert_eq!(store::load::<u32>(&path).unwrap(), Some(99));
    }

    #[tokio::test]
    async fn an_older_content_never_replaces_a_newer_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let (inputs, mut words) = mpsc::unbounded_channel();
        let mut file = StateFile::new(File::Events, path.clone());
        let held = file.written.clone();
        let busy = held.lock().unwrap();
        file.save(&inputs, 1_u32);
        drop(busy);
        file.save_last(2).await.unwrap();
        words.recv().await.unwrap();
        assert_eq!(store::load::<u32>(&path).unwrap(), Some(2));
    }
}
