//! What a program says to whoever started it: results and reports on the standard output, messages on the standard error.
//!
//! The only place that writes there. Output that cannot be written (a full disk, a closed pipe) ends nothing: work that is under way goes on.
//! Where the output is the result, as of `status`, the exit code tells at last that it was lost ([`code`]). Who closes a pipe has seen
//! enough, and nothing is lost.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

/// Why a result could not be written, the first time.
static LOST: Mutex<Option<io::Error>> = Mutex::new(None);

/// A line of what the program was asked for.
macro_rules! result {
    ($($text:tt)*) => { $crate::output::say($crate::output::LineKind::Result, format_args!($($text)*)) };
}

/// A line about what was done, for whoever looks on: that it is done does not depend on whether this is read.
#[cfg(feature = "gateway")]
macro_rules! report {
    ($($text:tt)*) => { $crate::output::say($crate::output::LineKind::Report, format_args!($($text)*)) };
}

/// A line to the operator.
macro_rules! message {
    ($($text:tt)*) => { $crate::output::say($crate::output::LineKind::Message, format_args!($($text)*)) };
}

pub(crate) use message;
#[cfg(feature = "gateway")]
pub(crate) use report;
pub(crate) use result;

/// What a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineKind {
    Result,
    #[cfg(feature = "gateway")]
    Report,
    Message,
}

/// Writes a line; see [`result!`] and the others.
pub fn say(kind: LineKind, line: Arguments<'_>) {
    // In one piece: others may write to the same file.
    let line = format!("{line}\n");
    let written = match kind {
        LineKind::Message => anstream::stderr().lock().write_all(line.as_bytes()),
        _ => write_out(&line),
    };
    if kind == LineKind::Result {
        note(written);
    }
}

/// Asks something of the operator, on the same line as the answer.
pub fn ask(question: Arguments<'_>) {
    let mut output = anstream::stderr().lock();
    let _ = output.write_all(question.to_string().as_bytes()).and_then(|()| output.flush());
}

/// What the command line's parser has to say: a help that was asked for, or what is wrong. Answers the exit code.
pub fn of_parser(error: &clap::Error) -> ExitCode {
    let printed = error.print();
    if !error.use_stderr() {
        note(printed);
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
}

/// The exit code of a program that ends with `code`: another one where a result was lost.
pub fn code(code: ExitCode) -> ExitCode {
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
