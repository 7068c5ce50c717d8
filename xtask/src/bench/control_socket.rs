//! A client of the manager's control socket that sends many requests over one connection: the `control` program would add its own start-up
//! time.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The deadline of a reply.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct ControlSocket {
    reader: BufReader<UnixStream>,
}

impl ControlSocket {
    /// An error if no manager listens on the home's control socket.
    pub(crate) fn open(home: &Path) -> Result<ControlSocket> {
        let path = home.join("run/spm.sock");
        let stream = UnixStream::connect(&path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(ControlSocket { reader: BufReader::new(stream) })
    }

    fn request(&mut self, request: &Value) -> Result<Value> {
        self.reader
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .context("cannot send a request to the manager")?;
        let mut line = String::new();
        self.reader.read_line(&mut line).context("cannot read the manager's reply")?;
        let reply: Value =
            serde_json::from_str(&line).with_context(|| format!("invalid reply of the manager: {line:?}"))?;
        match reply.get("error").and_then(Value::as_str) {
            Some(error) => bail!("the manager rejected {request}: {error}"),
            None => Ok(reply),
        }
    }

    pub(crate) fn restart(&mut self, agent: &str) -> Result<()> {
        self.request(&json!({"verb": "restart", "agent": agent})).map(drop)
    }

    /// Stops the manager with `yield`; the watchdog starts the next one and does not count a death.
    pub(crate) fn stop_with_yield(&mut self) -> Result<()> {
        self.request(&json!({"verb": "yield"})).map(drop)
    }

    pub(crate) fn status(&mut self) -> Result<Value> {
        Ok(self.request(&json!({"verb": "status"}))?["status"].take())
    }

    /// Waits until the manager closes this connection, which it does when it exits.
    pub(crate) fn wait_for_end(mut self) -> Result<()> {
        match self.reader.read_to_end(&mut vec![]) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                Err(error).with_context(|| format!("the manager did not exit within {PATIENCE:?}"))
            }
            _ => Ok(()),
        }
    }
}
