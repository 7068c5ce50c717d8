//! Writes a file in a background thread, so that a slow disk blocks no caller. Only the latest content is written; a failed write is retried.
//!
//! [`WriteBehind::put`] returns before the content is on disk; [`WriteBehind::flush`] waits for it. Dropping a [`WriteBehind`] waits until the
//! last content is written or has failed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// See [`WriteQueue::retry`].
const RETRY: Duration = Duration::from_secs(5);

/// The handle for one file.
pub(super) struct WriteBehind<T> {
    desk: Arc<WriteQueue<T>>,
    writer: Option<JoinHandle<()>>,
}

struct WriteQueue<T> {
    slot: Mutex<Slot<T>>,
    changed: Condvar,
    /// The time between two attempts to write the same content.
    retry: Duration,
}

struct Slot<T> {
    /// The error of the last write, if it failed.
    failure: Option<String>,
    /// The content to write next.
    next: Option<T>,
    /// Whether a write is under way.
    writing: bool,
    ended: bool,
}

impl<T: Send + 'static> WriteBehind<T> {
    /// Starts the writer thread, which calls `write` for each content. `what` names the file in the log.
    pub(super) fn start(
        what: &'static str,
        write: impl FnMut(&T) -> Result<()> + Send + 'static,
    ) -> Result<WriteBehind<T>> {
        WriteBehind::start_with(what, RETRY, write)
    }

    fn start_with(
        what: &'static str,
        retry: Duration,
        write: impl FnMut(&T) -> Result<()> + Send + 'static,
    ) -> Result<WriteBehind<T>> {
        let slot = Slot { failure: None, next: None, writing: false, ended: false };
        let desk = Arc::new(WriteQueue { slot: Mutex::new(slot), changed: Condvar::new(), retry });
        let of_writer = desk.clone();
        let writer = std::thread::Builder::new()
            .name(what.to_owned())
            .spawn(move || of_writer.keep_writing(what, write))
            .with_context(|| format!("cannot start the thread that writes {what}"))?;
        Ok(WriteBehind { desk, writer: Some(writer) })
    }

    /// Queues a content for writing; it replaces one that is still queued.
    pub(super) fn put(&self, content: T) {
        self.desk.lock().next = Some(content);
        self.desk.changed.notify_all();
    }

    /// The error of the last write, if it failed.
    pub(super) fn failure(&self) -> Option<String> {
        self.desk.lock().failure.clone()
    }

    /// Waits until the queued content is written or its first attempt has failed.
    pub(super) fn flush(&self) {
        let mut slot = self.desk.lock();
        while slot.next.is_some() || slot.writing {
            slot = self.desk.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Drop for WriteBehind<T> {
    fn drop(&mut self) {
        self.desk.lock().ended = true;
        self.desk.changed.notify_all();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl<T> WriteQueue<T> {
    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        // A poisoned lock is safe: each change is one assignment.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_writing(&self, what: &str, mut write: impl FnMut(&T) -> Result<()>) {
        let (mut failed, mut failing) = (None, false);
        while let Some(content) = self.next(failed.take()) {
            let outcome = write(&content);
            let mut slot = self.lock();
            slot.writing = false;
            slot.failure = outcome.as_ref().err().map(|error| format!("{error:#}"));
            self.changed.notify_all();
            let was_failing = std::mem::replace(&mut failing, outcome.is_err());
            let Err(error) = outcome else { continue };
            if !was_failing {
                let reason = format!("{error:#}");
                tracing::error!(%reason, file = what, "cannot write a file; the write is retried");
            }
            if slot.ended && slot.next.is_none() {
                return;
            }
            drop(slot);
            failed = Some(content);
        }
    }

    /// Waits for the next content to write: a new one or, after the retry interval, the failed one. `None` at the end.
    fn next(&self, failed: Option<T>) -> Option<T> {
        let waiting = |slot: &mut Slot<T>| slot.next.is_none() && !slot.ended;
        let slot = self.lock();
        let mut slot = match &failed {
            Some(_) => {
                self.changed.wait_timeout_while(slot, self.retry, waiting).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait_while(slot, waiting).unwrap_or_else(PoisonError::into_inner),
        };
        let content = slot.next.take().or(failed);
        slot.writing = content.is_some();
        content
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_latest_content_is_written_and_nobody_waits_for_it() {
        let (begun, beginning) = mpsc::channel();
        let (go, gone) = mpsc::channel::<()>();
        let behind = WriteBehind::start("a file", move |content: &u32| {
            begun.send(*content).unwrap();
            gone.recv().unwrap();
            Ok(())
        })
        .unwrap();
        behind.put(1);
        assert_eq!(beginning.recv(), Ok(1));
        // The writer is busy; `put` does not wait for it.
        behind.put(2);
        behind.put(3);
        go.send(()).unwrap();
        assert_eq!(beginning.recv(), Ok(3));
        go.send(()).unwrap();
        behind.flush();
        behind.put(4);
        go.send(()).unwrap();
        drop(behind);
        assert_eq!(beginning.try_iter().collect::<Vec<_>>(), [4], "the last content is written on drop");
    }

    #[test]
    fn a_failure_does_not_end_the_writer() {
        let (tell, told) = mpsc::channel();
        let behind = WriteBehind::start_with("a file", Duration::from_secs(3600), move |content: &u32| {
            tell.send(*content).unwrap();
            if *content == 1 { anyhow::bail!("the disk is full") } else { Ok(()) }
        })
        .unwrap();
        behind.put(1);
        behind.flush();
        assert_eq!(behind.failure().as_deref(), Some("the disk is full"));
        behind.put(2);
        behind.flush();
        assert_eq!(behind.failure(), None);
        drop(behind);
        assert_eq!(told.iter().collect::<Vec<_>>(), [1, 2]);
    }
}
