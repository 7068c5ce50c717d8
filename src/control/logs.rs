//! `control logs`: the last lines of a log and, with `--follow`, the lines that are added to it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::core::model::AgentName;
use crate::home::Home;
use crate::platform;

/// Interval between two checks of a followed log.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The last lines are taken from at most so many bytes at the end of a log.
const TAIL_BYTES: u64 = 4 << 20;

/// The options of `control logs`.
#[derive(Debug, Clone, clap::Args)]
pub struct LogOptions {
    /// A sub-agent, or spm or spa [default: spm]
    agent: Option<AgentName>,
    /// Keep showing lines as they are added
    #[arg(short, long)]
    follow: bool,
    /// The number of lines to show, from the end
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    lines: usize,
}

pub(super) fn show(home: &Home, options: &LogOptions) -> Result<()> {
    let path = match &options.agent {
        None => home.role_log("spm"),
        Some(name) if matches!(name.as_str(), "spm" | "spa") && !home.agent_log(name).exists() => {
            home.role_log(name.as_str())
        }
        Some(name) => {
            if !home.agent_log(name).exists() && !home.agent(name).exists() {
                bail!("cannot show the log of {name}: there is no such sub-agent; `status` lists them");
            }
            home.agent_log(name)
        }
    };
    match show_path(&path, options) {
        // The reader of the pipe, such as `head`, has exited.
        Err(error)
            if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) =>
        {
            Ok(())
        }
        shown => shown.with_context(|| format!("cannot show {}", path.display())),
    }
}

fn show_path(path: &Path, options: &LogOptions) -> Result<()> {
    let mut output = io::stdout().lock();
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !options.follow => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            while !path.exists() {
                platform::pause(POLL_INTERVAL);
            }
            File::open(path)?
        }
        Err(error) => return Err(error.into()),
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut tail = vec![];
    file.read_to_end(&mut tail)?;
    output.write_all(last_lines(&tail, options.lines))?;
    output.flush()?;
    if !options.follow {
        return Ok(());
    }
    loop {
        if file.metadata()?.len() < file.stream_position()? {
            // The file was truncated.
            file.seek(SeekFrom::Start(0))?;
        }
        if io::copy(&mut file, &mut output)? > 0 {
            output.flush()?;
            continue;
        }
        // The log was rotated: the path names a new file.
        if !platform::is_same_file(&file, path)?
            && let Ok(new) = File::open(path)
        {
            file = new;
            continue;
        }
        platform::pause(POLL_INTERVAL);
    }
}

/// The last `count` lines of a text.
fn last_lines(text: &[u8], count: usize) -> &[u8] {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let breaks = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    match (count, breaks.map(|(at, _)| at).nth(count.saturating_sub(1))) {
        (0, _) => b"",
        (_, Some(at)) => &text[at + 1..],
        (_, None) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_complete_lines() {
        let text = b"one\ntwo\nthree\n";
        assert_eq!(last_lines(text, 2), b"two\nthree\n");
        assert_eq!(last_lines(text, 3), text);
        assert_eq!(last_lines(text, 9), text);
        assert_eq!(last_lines(text, 0), b"");
        assert_eq!(last_lines(b"one\ntwo", 1), b"two");
        assert_eq!(last_lines(b"", 5), b"");
    }
}
