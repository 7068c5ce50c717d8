//! The control socket's transport: a Unix socket in the home, accessible only to its owner and root.
//!
//! Where none can be created there (a read-only disk), a socket in the abstract namespace is used instead (unix(7)). Any process can bind
//! such a name or connect to it, so each end checks the user of the other.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::platform::SocketPeer;

/// The listening socket.
#[derive(Debug)]
pub struct LocalListener(tokio::net::UnixListener);

/// The manager's end of a connection.
pub type LocalStream = tokio::net::UnixStream;

/// The client's end, for blocking programs.
pub type LocalConnection = UnixStream;

/// A socket address holds 108 bytes (unix(7)). A longer path is reached through a descriptor of its directory.
const LONGEST_ADDRESS: usize = 100;

fn address(path: &Path) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    if path.as_os_str().len() <= LONGEST_ADDRESS {
        return Ok((path.to_owned(), None));
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name), Some(directory)))
}

impl LocalListener {
    /// Listens at `path` and replaces the socket of a previous manager. The caller holds the role's lock.
    pub fn bind(path: &Path) -> io::Result<LocalListener> {
        match LocalListener::bind_in_home(path) {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => LocalListener::bind_fallback(path),
            bound => bound,
        }
    }

    fn bind_fallback(path: &Path) -> io::Result<LocalListener> {
        let listener = std::os::unix::net::UnixListener::bind_addr(&fallback_address(path)?)?;
        listener.set_nonblocking(true)?;
        Ok(LocalListener(tokio::net::UnixListener::from_std(listener)?))
    }

    fn bind_in_home(path: &Path) -> io::Result<LocalListener> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let (address, _directory) = address(path)?;
        let listener = tokio::net::UnixListener::bind(address)?;
        super::set_mode(path, 0o600)?;
        Ok(LocalListener(listener))
    }

    /// Accepts the next connection, and checks that its user may command this home: root, or the user that we run as. Cancel-safe.
    pub async fn accept(&mut self) -> io::Result<SocketPeer> {
        let (stream, _) = self.0.accept().await?;
        let (peer, own) = (stream.peer_cred()?.uid(), rustix::process::geteuid().as_raw());
        if peer == 0 || peer == own {
            return Ok(SocketPeer::Allowed(stream));
        }
        let peer = format!("the user {peer}");
        let allowed = if own == 0 { "root alone".to_owned() } else { format!("root and the user {own}") };
        Ok(SocketPeer::Rejected { stream, peer, allowed })
    }
}

/// Connects to the control socket at `path`. Reads and writes fail after `timeout`.
pub fn connect_local(path: &Path, timeout: Duration) -> io::Result<LocalConnection> {
    let (address, _directory) = address(path)?;
    let stream = match UnixStream::connect(address) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            connect_fallback(path).ok_or(error)?
        }
        connected => connected?,
    };
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

/// Connects to the fallback socket of `path`, if it belongs to a user that may run the home.
fn connect_fallback(path: &Path) -> Option<UnixStream> {
    let stream = UnixStream::connect_addr(&fallback_address(path).ok()?).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?.uid.as_raw();
    let owner = path.parent()?.metadata().ok()?.uid();
    [0, owner, rustix::process::geteuid().as_raw()].contains(&peer).then_some(stream)
}

/// The abstract name for `path`. It names the directory by device and inode, since another mount namespace may have another home at the
/// same path.
fn fallback_address(path: &Path) -> io::Result<SocketAddr> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = parent.metadata()?;
    let name = format!("aops:{:x}:{:x}:{}", directory.dev(), directory.ino(), name.display());
    SocketAddr::from_abstract_name(name)
}

/// A second handle for the same connection.
pub fn clone_local(connection: &LocalConnection) -> io::Result<LocalConnection> {
    connection.try_clone()
}

/// Removes the read timeout of a connection.
pub fn remove_read_timeout(connection: &LocalConnection) -> io::Result<()> {
    connection.set_read_timeout(None)
}

/// Shuts the connection down for all handles, which wakes a blocked reader.
pub fn shut_down(connection: &LocalConnection) {
    let _ = connection.shutdown(std::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_socket_with_a_long_path_accepts_connections() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("spm.sock");
        exchange(LocalListener::bind(&path).unwrap(), path).await;
    }

    #[tokio::test]
    async fn the_fallback_socket_accepts_connections() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spm.sock");
        // Left behind by a previous manager.
        drop(LocalListener::bind(&path).unwrap());
        exchange(LocalListener::bind_fallback(&path).unwrap(), path.clone()).await;
        assert_eq!(connect_local(&path, Duration::from_secs(1)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    async fn exchange(mut listener: LocalListener, path: PathBuf) {
        let client = std::thread::spawn(move || {
            let mut connection = connect_local(&path, Duration::from_secs(10)).unwrap();
            connection.write_all(b"x").unwrap();
            let mut text = String::new();
            connection.read_to_string(&mut text).unwrap();
            text
        });
        let SocketPeer::Allowed(mut stream) = listener.accept().await.unwrap() else { panic!("the client is allowed") };
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        stream.write_all(b"hello").await.unwrap();
        drop(stream);
        assert_eq!(client.join().unwrap(), "hello");
    }
}
