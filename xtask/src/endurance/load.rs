//! Load on this machine: processes that spin, twice as many as there are cores, and a thread that writes and syncs a file over and over.
//!
//! A spinning process is killed when this is dropped, and by the kernel when this task ends in any other way.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

/// Spinning processes for each core.
const PER_CORE: usize = 2;
/// The file that is written, synced and replaced.
const FILE_BYTES: usize = 32 << 20;

pub(super) struct Load {
    spinning: Vec<Child>,
    directory: PathBuf,
    writer: Option<JoinHandle<std::io::Result<()>>>,
    is_over: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
}

impl Load {
    /// To be called by the main thread: the kernel kills the spinning processes when the thread that started them ends.
    pub(super) fn start() -> Result<Load> {
        let directory = tempfile::Builder::new().prefix("aops-load-").tempdir()?.keep();
        crate::fleet::clean_up_when_interrupted(&directory)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let mut load = Load { spinning: vec![], directory, writer: None, is_over, written };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores * PER_CORE {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--", "sh", "-c", "while :; do :; done"]).stdin(Stdio::null());
            load.spinning.push(command.spawn().context("cannot run setpriv (package util-linux)")?);
        }
        let (file, is_over, written) = (load.directory.join("file"), load.is_over.clone(), load.written.clone());
        load.writer = Some(std::thread::Builder::new().name("load".to_owned()).spawn(move || {
            let content = vec![b'x'; FILE_BYTES];
            while !is_over.load(Ordering::Relaxed) {
                write(&file, &content)?;
                written.fetch_add(FILE_BYTES as u64, Ordering::Relaxed);
            }
            Ok(())
        })?);
        Ok(load)
    }

    /// Ends it; returns what it was. An error if it did not last until now.
    pub(super) fn end(mut self) -> Result<String> {
        for child in &mut self.spinning {
            let ended = child.try_wait().context("cannot query a spinning process")?;
            anyhow::ensure!(ended.is_none(), "a spinning process ended early: {ended:?}");
        }
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let outcome = writer.join().map_err(|_| anyhow::anyhow!("the thread that writes has panicked"))?;
            outcome.with_context(|| format!("cannot write in {}", self.directory.display()))?;
        }
        let mebibytes = self.written.load(Ordering::Relaxed) >> 20;
        Ok(format!("{} spinning processes, {mebibytes} MiB written and synced", self.spinning.len()))
    }
}

fn write(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::remove_file(path)
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.spinning {
            // An error means that it has exited already.
            let _ = child.kill();
            let _ = child.wait();
        }
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        crate::fleet::clean_up(&self.directory);
    }
}
