//! The local door's hinges: a named pipe of the home, which only its owner, administrators and the system may write to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::windows::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio::net::windows::named_pipe::{NamedPipeServer, ServerOptions};
use windows_sys::Win32::Foundation::ERROR_PIPE_BUSY;

const LOOK: Duration = Duration::from_millis(10);

/// What accepts connections.
#[derive(Debug)]
pub struct LocalListener {
    name: String,
    /// The instance that waits for the next one to connect.
    next: NamedPipeServer,
}

/// The manager's end of a connection.
pub type LocalStream = NamedPipeServer;

/// The other end, for programs that block. Its reads do not time out.
pub type LocalConnection = File;

/// Pipes have a name space of their own: the home's path stands in it as a hash.
fn pipe_name(path: &Path) -> String {
    let mut hash = Sha256::new();
    for unit in path.as_os_str().encode_wide() {
        hash.update(unit.to_le_bytes());
    }
    let digits: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!(r"\\.\pipe\aops-{digits}")
}

impl LocalListener {
    /// Listens under the name of `path`. Fails where somebody else does.
    pub fn bind(path: &Path) -> io::Result<LocalListener> {
        let name = pipe_name(path);
        let next = ServerOptions::new().first_pipe_instance(true).reject_remote_clients(true).create(&name)?;
        Ok(LocalListener { name, next })
    }

    /// The next connection.
    pub async fn accept(&mut self) -> io::Result<LocalStream> {
        self.next.connect().await?;
        let new = ServerOptions::new().reject_remote_clients(true).create(&self.name)?;
        Ok(std::mem::replace(&mut self.next, new))
    }
}

/// Connects to the door at `path`, within `timeout`.
pub fn connect_local(path: &Path, timeout: Duration) -> io::Result<LocalConnection> {
    let (name, began) = (pipe_name(path), Instant::now());
    loop {
        match OpenOptions::new().read(true).write(true).open(&name) {
            Err(error) if error.raw_os_error() == Some(ERROR_PIPE_BUSY as i32) && began.elapsed() < timeout => {
                crate::platform::pause(LOOK);
            }
            opened => return opened,
        }
    }
}

/// A second handle on the same connection.
pub fn clone_local(connection: &LocalConnection) -> io::Result<LocalConnection> {
    connection.try_clone()
}

/// They do already.
pub fn wait_for_ever(_connection: &LocalConnection) -> io::Result<()> {
    Ok(())
}

/// The connection ends when the last handle on it is closed, at the latest with this process.
pub fn hang_up(_connection: &LocalConnection) {}
