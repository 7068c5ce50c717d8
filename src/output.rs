//! What a program prints: results and reports on the standard output, messages on the standard error output. Only this module writes there.
//!
//! Output that cannot be written (a full disk, a closed pipe) does not stop the work in progress. If the output is the result, as of
//! `status`, its loss sets the exit code ([`exit_code`]). A closed pipe does not count as a loss: its reader has stopped reading.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

/// The first error when a result could not be written.
static LOST: Mutex<Option<io::Error>> = Mutex::new(None);

/// Prints a line of the result.
macro_rules! result {
    ($($text:tt)*) => { $crate::output::say($crate::output::LineKind::Result, format_args!($($text)*)) };
}

/// Prints a line about work done. The work counts as done even if the line cannot be written.
#[cfg(feature = "gateway")]
macro_rules! report {
    ($($text:tt)*) => { $crate::output::say($crate::output::LineKind::Report, format_args!($($text)*)) };
}

/// Prints a message to the operator.
macro_rules! message {
    ($($text:tt)*) => { $crate::output::say($crate::output::LineKind::Message, format_args!($($text)*)) };
}

pub(crate) use message;
#[cfg(feature = "gateway")]
pub(crate) use report;
pub(crate) use result;

/// The kind of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineKind {
    Result,
    #[cfg(feature = "gateway")]
    Report,
    Message,
}

/// Writes a line; see [`result!`] and the other macros.
pub fn say(kind: LineKind, line: Arguments<'_>) {
    // In one write, because other processes may write to the same file.
    let line = format!("{line}\n");
    let written = match kind {
        LineKind::Message => anstream::stderr().lock().write_all(line.as_bytes()),
        _ => write_out(&line),
    };
    if kind == LineKind::Result {
        note(written);
    }
}

/// Prints a question to the operator, whose answer is on the same line.
pub fn ask(question: Arguments<'_>) {
    let mut output = anstream::stderr().lock();
    let _ = output.write_all(question.to_string().as_bytes()).and_then(|()| output.flush());
}

/// Prints the help that was requested, or the error of the command line, and returns the exit code.
pub fn parser_exit(error: &clap::Error) -> ExitCode {
    let printed = error.print();
    if !error.use_stderr() {
        note(printed);
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
}

/// The exit code of the program: `code`, or a failure if a result could not be written.
pub fn exit_code(code: ExitCode) -> ExitCode {
    let lost = LOST.lock().unwrap_or_else(PoisonError::into_inner).take();
    match lost {
        Some(error) => {
            message!("error: cannot write the result to the standard output: {error}");
            ExitCode::FAILURE
        }
        None => code,
    }
}

fn write_out(line: &str) -> io::Result<()> {
    let mut output = anstream::stdout().lock();
    output.write_all(line.as_bytes())?;
    output.flush()
}

fn note(written: io::Result<()>) {
    if let Err(error) = written
        && error.kind() != ErrorKind::BrokenPipe
    {
        LOST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}
