//! What a person sees of an installation at work: a line for each step, and a bar for the download on a terminal, on standard error.

use std::io::{IsTerminal, stderr};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::message;

/// Of a download without a terminal: one line each time that so many hundredths more have arrived.
const PLAIN_STEP: u64 = 25;

/// Tells that a step begins, or what it found.
pub(super) fn say(line: impl std::fmt::Display) {
    message!("aops: {line}");
}

/// Tells what the operator should look at.
pub(super) fn warn(line: impl std::fmt::Display) {
    message!("aops: warning: {line}");
}

/// The progress of one download.
#[derive(Debug)]
pub(super) enum DownloadDisplay {
    Bar(ProgressBar),
    Lines { told: u64 },
}

impl DownloadDisplay {
    pub(super) fn begin() -> DownloadDisplay {
        if !stderr().is_terminal() {
            return DownloadDisplay::Lines { told: 0 };
        }
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template("  {bar:30} {bytes}/{total_bytes} {bytes_per_sec}") {
            bar.set_style(style.progress_chars("=> "));
        }
        DownloadDisplay::Bar(bar)
    }

    /// `done` bytes are there, of `total` where that is known.
    pub(super) fn at(&mut self, done: u64, total: Option<u64>) {
        match self {
            DownloadDisplay::Bar(bar) => {
                if let Some(total) = total {
                    bar.set_length(total);
                }
                bar.set_position(done);
            }
            DownloadDisplay::Lines { told } => {
                let Some(total) = total.filter(|total| *total > 0) else { return };
                let hundredths = done.saturating_mul(100) / total;
                // It may begin anew, from another endpoint.
                if hundredths < *told {
                    *told = 0;
                }
                if hundredths >= *told + PLAIN_STEP {
                    *told = hundredths - hundredths % PLAIN_STEP;
                    say(format_args!("downloaded {hundredths}% of {} kB", total / 1_000));
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
