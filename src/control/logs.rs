//! Shows the end of a log and, if asked to, what comes after it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::core::model::AgentName;
use crate::home::Home;
use crate::platform;

/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(200);
/// The end of a log is looked for in its last part alone.
const TAIL_BYTES: u64 = 4 << 20;

/// Which log, and how much of it.
#[derive(Debug, Clone, clap::Args)]
pub struct LogOptions {
    /// A sub-agent, or spm or spa [default: spm]
    agent: Option<AgentName>,
    /// Go on showing what is added
    #[arg(short, long)]
    follow: bool,
    /// How many of the last lines to show
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
        // Whoever reads us has seen enough.
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
                platform::pause(LOOK);
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
            // Emptied in place.
            file.seek(SeekFrom::Start(0))?;
        }
        if io::copy(&mut file, &mut output)? > 0 {
            output.flush()?;
            continue;
        }
        // Renamed away, and begun anew under its name.
        if !platform::is_same_file(&file, path)?
            && let Ok(new) = File::open(path)
        {
            file = new;
            continue;
        }
        platform::pause(LOOK);
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
    fn the_last_lines_are_whole_lines() {
        let text = b"one\ntwo\nthree\n";
        assert_eq!(last_lines(text, 2), b"two\nthree\n");
        assert_eq!(last_lines(text, 3), text);
        assert_eq!(last_lines(text, 9), text);
        assert_eq!(last_lines(text, 0), b"");
        assert_eq!(last_lines(b"one\ntwo", 1), b"two");
        assert_eq!(last_lines(b"", 5), b"");
    }
}
