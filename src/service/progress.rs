//! The progress of an installation on standard error: a line for each step and, on a terminal, a bar for the download.

use std::io::{IsTerminal, stderr};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::message;

/// Percentage points between two lines about a download if there is no terminal.
const PLAIN_STEP: u64 = 25;

/// Prints the start or the result of a step.
pub(super) fn say(line: impl std::fmt::Display) {
    message!("aops: {line}");
}

/// Prints a warning.
pub(super) fn warn(line: impl std::fmt::Display) {
    message!("aops: warning: {line}");
}

/// The progress of one download.
#[derive(Debug)]
pub(super) enum DownloadDisplay {
    Bar(ProgressBar),
    /// `reported`: the percentage of the last line.
    Lines {
        reported: u64,
    },
}

impl DownloadDisplay {
    pub(super) fn begin() -> DownloadDisplay {
        if !stderr().is_terminal() {
            return DownloadDisplay::Lines { reported: 0 };
        }
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template("  {bar:30} {bytes}/{total_bytes} {bytes_per_sec}") {
            bar.set_style(style.progress_chars("=> "));
        }
        DownloadDisplay::Bar(bar)
    }

    /// Shows that `done` bytes are downloaded, of `total` if that is known.
    pub(super) fn at(&mut self, done: u64, total: Option<u64>) {
        match self {
            DownloadDisplay::Bar(bar) => {
                if let Some(total) = total {
                    bar.set_length(total);
                }
                bar.set_position(done);
            }
            DownloadDisplay::Lines { reported } => {
                let Some(total) = total.filter(|total| *total > 0) else { return };
                let percent = done.saturating_mul(100) / total;
                // A download from the next endpoint may start from scratch.
                if percent < *reported {
                    *reported = 0;
                }
                if percent >= *reported + PLAIN_STEP {
                    *reported = percent - percent % PLAIN_STEP;
                    say(format_args!("downloaded {percent}% of {} kB", total / 1_000));
                }
            }
        }
    }
}

impl Drop for DownloadDisplay {
    fn drop(&mut self) {
        if let DownloadDisplay::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
