//! The logs of the roles: one line per event, a constant sentence and fields, in a file that is rotated at a size limit; one older file is
//! kept.
//!
//! While the file cannot be opened, as on a read-only disk, lines go to the standard error output, which the service manager collects.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// Size limit of a log file, bytes: months of a role's log.
const CAP_BYTES: u64 = 8 << 20;

/// Sends all log lines, and panics, to the file at `path`.
pub fn to_file(path: &Path) {
    let writer = SharedFile(Arc::new(Mutex::new(CappedFile::new(path))));
    // Internal errors would be printed to the standard error output, and a failure of that would panic.
    let format = tracing_subscriber::fmt().log_internal_errors(false).with_writer(writer);
    format.with_ansi(false).with_target(false).with_timer(Utc).init();
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(location, message = panic.payload_as_str().unwrap_or("?"), "the program panicked");
    }));
}

/// Sends all log lines to the standard error output.
#[cfg(feature = "gateway")]
pub fn to_stderr() {
    let colours =
        io::IsTerminal::is_terminal(&io::stderr()) && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // See `to_file`.
    let format = tracing_subscriber::fmt().log_internal_errors(false).with_writer(io::stderr);
    format.with_ansi(colours).with_target(false).with_timer(Utc).init();
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
struct SharedFile(Arc<Mutex<CappedFile>>);

impl<'a> MakeWriter<'a> for SharedFile {
    type Writer = SharedFile;

    fn make_writer(&'a self) -> SharedFile {
        self.clone()
    }
}

impl Write for SharedFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is renamed to `.1` and replaced by an empty one when it is full.
#[derive(Debug)]
struct CappedFile {
    path: PathBuf,
    /// `None`: it could not be opened, which is retried with each line.
    open: Option<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    length: u64,
}

impl OpenFile {
    fn at(path: &Path) -> io::Result<OpenFile> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        Ok(OpenFile { file, length })
    }
}

impl CappedFile {
    fn new(path: &Path) -> CappedFile {
        CappedFile { path: path.to_owned(), open: None }
    }

    /// A line that cannot be written is dropped: a failure here must not stop the program.
    fn write(&mut self, line: &[u8]) {
        if let Err(error) = self.make_room(line.len() as u64) {
            let path = self.path.display();
            let _ = write!(io::stderr(), "cannot open the log {path}: {error}: {}", String::from_utf8_lossy(line));
        }
        if let Some(open) = &mut self.open {
            let written = open.file.write(line).unwrap_or(line.len());
            open.length += written as u64;
        }
    }

    /// Opens the file if it is not open, and starts a new one if it is full.
    fn make_room(&mut self, bytes: u64) -> io::Result<()> {
        let open = match &mut self.open {
            Some(open) => open,
            closed => closed.insert(OpenFile::at(&self.path)?),
        };
        if open.length + bytes > CAP_BYTES {
            // If it cannot be renamed, it is truncated: a log must not fill the disk.
            if std::fs::rename(&self.path, self.path.with_extension("log.1")).is_err() {
                open.file.set_len(0)?;
            }
            self.open = None;
            self.open = Some(OpenFile::at(&self.path)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_rotated() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spm.log");
        let mut log = CappedFile::new(&path);
        log.write(b"old\n");
        log.open.as_mut().unwrap().length = CAP_BYTES;
        log.write(b"first of the new\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"first of the new\n");
        assert_eq!(std::fs::read(path.with_extension("log.1")).unwrap(), b"old\n");
    }

    #[test]
    fn a_log_that_could_not_be_opened_is_retried() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log/spm.log");
        let mut log = CappedFile::new(&path);
        log.write(b"lost\n");
        std::fs::create_dir(directory.path().join("log")).unwrap();
        log.write(b"kept\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"kept\n");
    }
}
