//! Writes a file in a background thread, so that a slow disk blocks no caller. Only the latest content is written; a failed write is retried.
//!
//! [`WriteBehind::put`] returns before the content is on disk; [`WriteBehind::flush`] waits for it. Dropping a [`WriteBehind`] waits until the
//! last content is written or has failed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// See [`WriteQueue::retry_interval`].
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// The handle for one file.
pub(super) struct WriteBehind<T> {
    queue: Arc<WriteQueue<T>>,
    writer: Option<JoinHandle<()>>,
}

struct WriteQueue<T> {
    slot: Mutex<Slot<T>>,
    changed: Condvar,
    /// The time between two attempts to write the same content.
    retry_interval: Duration,
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
        WriteBehind::start_with(what, RETRY_INTERVAL, write)
    }

    fn start_with(
        what: &'static str,
        retry_interval: Duration,
        write: impl FnMut(&T) -> Result<()> + Send + 'static,
    ) -> Result<WriteBehind<T>> {
        let slot = Slot { failure: None, next: None, writing: false, ended: false };
        let queue = Arc::new(WriteQueue { slot: Mutex::new(slot), changed: Condvar::new(), retry_interval });
        let writer_queue = queue.clone();
        let writer = std::thread::Builder::new()
            .name(what.to_owned())
            .spawn(move || writer_queue.run_writer(what, write))
            .with_context(|| format!("cannot start the thread that writes {what}"))?;
        Ok(WriteBehind { queue, writer: Some(writer) })
    }

    /// Queues a content for writing; it replaces one that is still queued.
    pub(super) fn put(&self, content: T) {
        self.queue.lock().next = Some(content);
        self.queue.changed.notify_all();
    }

    /// The error of the last write, if it failed.
    pub(super) fn failure(&self) -> Option<String> {
        self.queue.lock().failure.clone()
    }

    /// Waits until the queued content is written or its first attempt has failed.
    pub(super) fn flush(&self) {
        let mut slot = self.queue.lock();
        while slot.next.is_some() || slot.writing {
            slot = self.queue.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Drop for WriteBehind<T> {
    fn drop(&mut self) {
        self.queue.lock().ended = true;
        self.queue.changed.notify_all();
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

    fn run_writer(&self, what: &str, mut write: impl FnMut(&T) -> Result<()>) {
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
                self.changed
                    .wait_timeout_while(slot, self.retry_interval, waiting)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
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
    fn the_latest_content_is_written_and_put_does_not_wait() {
        let (started_sender, started) = mpsc::channel();
        let (continue_sender, may_continue) = mpsc::channel::<()>();
        let file = WriteBehind::start("a file", move |content: &u32| {
            started_sender.send(*content).unwrap();
            may_continue.recv().unwrap();
            Ok(())
        })
        .unwrap();
        file.put(1);
        assert_eq!(started.recv(), Ok(1));
        // The writer is busy; `put` does not wait for it.
        file.put(2);
        file.put(3);
        continue_sender.send(()).unwrap();
        assert_eq!(started.recv(), Ok(3));
        continue_sender.send(()).unwrap();
        file.flush();
        file.put(4);
        continue_sender.send(()).unwrap();
        drop(file);
        assert_eq!(started.try_iter().collect::<Vec<_>>(), [4], "the last content is written on drop");
    }

    #[test]
    fn the_writer_continues_after_a_failure() {
        let (sender, written) = mpsc::channel();
        let file = WriteBehind::start_with("a file", Duration::from_secs(3600), move |content: &u32| {
            sender.send(*content).unwrap();
            if *content == 1 { anyhow::bail!("the disk is full") } else { Ok(()) }
        })
        .unwrap();
        file.put(1);
        file.flush();
        assert_eq!(file.failure().as_deref(), Some("the disk is full"));
        file.put(2);
        file.flush();
        assert_eq!(file.failure(), None);
        drop(file);
        assert_eq!(written.iter().collect::<Vec<_>>(), [1, 2]);
    }
}
