//! The logs of the roles: one line an event, a constant sentence and fields, in a file that is capped, with one older piece beside it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// A role says little; so much is months of it.
const CAP_BYTES: u64 = 8 << 20;

/// Sends everything that is logged to the file at `path`, and what a panic says too.
pub fn to_file(path: &Path) -> Result<()> {
    let file = CappedFile::open(path).with_context(|| format!("cannot open the log {}", path.display()))?;
    let writer = Shared(Arc::new(Mutex::new(file)));
    tracing_subscriber::fmt().with_writer(writer).with_ansi(false).with_target(false).with_timer(Utc).init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, message = panic.payload_as_str().unwrap_or("?"), "the program panicked");
    }));
    Ok(())
}

/// Sends everything that is logged to the standard error output.
#[cfg(feature = "gateway")]
pub fn to_stderr() {
    let colours =
        io::IsTerminal::is_terminal(&io::stderr()) && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(colours).with_target(false).with_timer(Utc).init();
}

/// RFC 3339, UTC, to the millisecond.
#[derive(Debug)]
struct Utc;

impl FormatTime for Utc {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        write!(writer, "{:.3}", jiff::Timestamp::now())
    }
}

#[derive(Debug, Clone)]
struct Shared(Arc<Mutex<CappedFile>>);

impl<'a> MakeWriter<'a> for Shared {
    type Writer = Shared;

    fn make_writer(&'a self) -> Shared {
        self.clone()
    }
}

impl Write for Shared {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0.lock() {
            Ok(mut file) => file.write(line),
            Err(poisoned) => poisoned.into_inner().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is renamed to `.1` and begun anew when it is full.
#[derive(Debug)]
struct CappedFile {
    path: PathBuf,
    file: File,
    length: u64,
}

impl CappedFile {
    fn open(path: &Path) -> io::Result<CappedFile> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        Ok(CappedFile { path: path.to_owned(), file, length })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.length + line.len() as u64 > CAP_BYTES {
            // Where it cannot be renamed, it is emptied: a log must not fill the disk.
            if std::fs::rename(&self.path, self.path.with_extension("log.1")).is_err() {
                self.file.set_len(0)?;
            }
            *self = CappedFile::open(&self.path)?;
        }
        // A full disk must not take the program down: a line that cannot be written is lost.
        let written = self.file.write(line).unwrap_or(line.len());
        self.length += written as u64;
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_goes_on_in_a_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spm.log");
        let mut log = CappedFile::open(&path).unwrap();
        log.length = CAP_BYTES;
        log.write(b"first of the new\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"first of the new\n");
        assert!(path.with_extension("log.1").exists());
    }
}
