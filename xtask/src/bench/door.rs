//! Asks the manager directly at its door, one connection for many requests: the `control` program would measure its own start.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// For an answer.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Door {
    reader: BufReader<UnixStream>,
}

impl Door {
    /// An error where no manager answers at the home's door.
    pub(super) fn open(home: &Path) -> Result<Door> {
        let path = home.join("run/spm.sock");
        let stream = UnixStream::connect(&path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Door { reader: BufReader::new(stream) })
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes()).context("cannot ask the manager")?;
        let mut line = String::new();
        self.reader.read_line(&mut line).context("cannot hear the manager")?;
        let reply: Value = serde_json::from_str(&line).with_context(|| format!("the manager answered {line:?}"))?;
        match reply.get("error").and_then(Value::as_str) {
            Some(error) => bail!("the manager cannot do {request}: {error}"),
            None => Ok(reply),
        }
    }

    pub(super) fn restart(&mut self, agent: &str) -> Result<()> {
        self.ask(&json!({"verb": "restart", "agent": agent})).map(drop)
    }

    /// Asks the manager to end itself; the watchdog starts another, and does not count it as a death.
    pub(super) fn give_way(&mut self) -> Result<()> {
        self.ask(&json!({"verb": "yield"})).map(drop)
    }

    pub(super) fn status(&mut self) -> Result<Value> {
        Ok(self.ask(&json!({"verb": "status"}))?["status"].take())
    }

    /// Waits until the manager ends this connection, as it does when it ends itself.
    pub(super) fn wait_for_end(mut self) -> Result<()> {
        match self.reader.read_to_end(&mut vec![]) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                Err(error).with_context(|| format!("the manager does not end within {PATIENCE:?}"))
            }
            _ => Ok(()),
        }
    }
}
