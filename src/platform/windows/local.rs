//! The control socket's transport: a named pipe, which only its owner, administrators and the system may open.
//!
//! Pipe names are global to the host, and any process can take any name. So each listener's pipe has a random name, which is stored in the
//! file where a Unix socket would be: in the home, where no other user may write. A new listener replaces that file, even while ends of the
//! old pipe are still open.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::windows::fs::OpenOptionsExt;
use std::os::windows::io::{FromRawHandle, OwnedHandle};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::net::windows::named_pipe::{NamedPipeServer, ServerOptions};
use uuid::Uuid;
use windows_sys::Win32::Foundation::{
    ERROR_BROKEN_PIPE, ERROR_HANDLE_EOF, ERROR_IO_PENDING, ERROR_NO_DATA, ERROR_PIPE_BUSY, ERROR_PIPE_NOT_CONNECTED,
    ERROR_SEM_TIMEOUT, HANDLE, WAIT_FAILED, WAIT_OBJECT_0,
};
use windows_sys::Win32::Storage::FileSystem::{FILE_FLAG_OVERLAPPED, ReadFile, SECURITY_IDENTIFICATION, WriteFile};
use windows_sys::Win32::System::IO::{CancelIoEx, GetOverlappedResult, OVERLAPPED};
use windows_sys::Win32::System::Pipes::WaitNamedPipeW;
use windows_sys::Win32::System::Threading::{CreateEventW, INFINITE, SetEvent, WaitForMultipleObjects};

use super::process::raw;
use super::security::{PrivateAcl, is_trusted, wide};
use crate::platform::SocketPeer;

/// Prefix of a pipe's name.
const PREFIX: &str = r"\\.\pipe\aops-";
/// Maximum length of a pipe's name.
const MAX_NAME_BYTES: u64 = 128;

/// The listening pipe.
#[derive(Debug)]
pub struct LocalListener {
    name: String,
    /// The instance that waits for the next client.
    next: NamedPipeServer,
}

/// The manager's end of a connection.
pub type LocalStream = NamedPipeServer;

impl LocalListener {
    /// Listens at `path` and replaces a previous listener. The caller holds the role's lock.
    pub fn bind(path: &Path) -> io::Result<LocalListener> {
        let name = format!("{PREFIX}{}", Uuid::new_v4().simple());
        let next = instance(&name, true)?;
        super::replace_file(path, name.as_bytes())?;
        Ok(LocalListener { name, next })
    }

    /// Accepts the next connection. The access list admits only clients that may command this home. Cancel-safe.
    pub async fn accept(&mut self) -> io::Result<SocketPeer> {
        self.accept_stream().await.map(SocketPeer::Allowed)
    }

    async fn accept_stream(&mut self) -> io::Result<LocalStream> {
        let connected = self.next.connect().await;
        // Also needed if the client has already disconnected: its instance cannot be connected to again.
        let new = instance(&self.name, false)?;
        let old = std::mem::replace(&mut self.next, new);
        connected.map(|()| old)
    }
}

fn instance(name: &str, first: bool) -> io::Result<NamedPipeServer> {
    let ours = PrivateAcl::new()?;
    let mut attributes = ours.attributes();
    let mut options = ServerOptions::new();
    options.first_pipe_instance(first).reject_remote_clients(true);
    // SAFETY: the attributes and the access list that they point to outlive the call.
    unsafe { options.create_with_security_attributes_raw(name, (&raw mut attributes).cast()) }
}

/// The client's end, for blocking programs. Two threads can read and write it at the same time, each with a handle of its own.
#[derive(Debug)]
pub struct LocalConnection {
    shared: Arc<PipeState>,
    /// Signalled when a transfer of this handle is done.
    done: OwnedHandle,
}

#[derive(Debug)]
struct PipeState {
    pipe: OwnedHandle,
    /// Signalled once, when one of the handles shuts the connection down.
    shutdown: OwnedHandle,
    /// Milliseconds.
    read_timeout: AtomicU32,
    write_timeout: u32,
}

fn event() -> io::Result<OwnedHandle> {
    // SAFETY: it has no name and the default access list; a handle that is not null is ours to close.
    let event = unsafe { CreateEventW(std::ptr::null(), 1, 0, std::ptr::null()) };
    // SAFETY: as above.
    if event.is_null() { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedHandle::from_raw_handle(event) }) }
}

fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX).clamp(1, INFINITE - 1)
}

/// Connects to the control socket at `path`. Reads and writes fail after `timeout`.
pub fn connect_local(path: &Path, timeout: Duration) -> io::Result<LocalConnection> {
    let mut name = String::new();
    File::open(path)?.take(MAX_NAME_BYTES).read_to_string(&mut name)?;
    if !name.starts_with(PREFIX) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file does not contain the name of a pipe of aops"));
    }
    let pipe = open(&name, timeout)?;
    // The listener with this name may have exited, and another process may have taken the name.
    if !is_trusted(&pipe)? {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "another user has taken the name of the pipe"));
    }
    let timeout = milliseconds(timeout);
    let shared = PipeState { pipe, shutdown: event()?, read_timeout: AtomicU32::new(timeout), write_timeout: timeout };
    Ok(LocalConnection { shared: Arc::new(shared), done: event()? })
}

/// Opens a pipe; while every instance is in use, waits for the next one.
fn open(name: &str, timeout: Duration) -> io::Result<OwnedHandle> {
    let began = Instant::now();
    let mut options = OpenOptions::new();
    // The server may identify us, but not impersonate us.
    options.read(true).write(true).custom_flags(FILE_FLAG_OVERLAPPED).security_qos_flags(SECURITY_IDENTIFICATION);
    loop {
        match options.open(name) {
            Err(error) if error.raw_os_error() == Some(ERROR_PIPE_BUSY as i32) => {
                let left = timeout.saturating_sub(began.elapsed());
                if left.is_zero() {
                    return Err(error);
                }
                // SAFETY: the name ends in a zero and outlives the call.
                if unsafe { WaitNamedPipeW(wide(name).as_ptr(), milliseconds(left)) } == 0 {
                    match io::Error::last_os_error() {
                        error if error.raw_os_error() == Some(ERROR_SEM_TIMEOUT as i32) => {}
                        error => return Err(error),
                    }
                }
            }
            opened => return opened.map(OwnedHandle::from),
        }
    }
}

/// A second handle for the same connection, for another thread.
pub fn clone_local(connection: &LocalConnection) -> io::Result<LocalConnection> {
    Ok(LocalConnection { shared: connection.shared.clone(), done: event()? })
}

/// Removes the read timeout of a connection.
pub fn remove_read_timeout(connection: &LocalConnection) -> io::Result<()> {
    connection.shared.read_timeout.store(INFINITE, Ordering::Relaxed);
    Ok(())
}

/// Shuts the connection down for all handles, which wakes a blocked reader. The other side sees it when the handles are closed.
pub fn shut_down(connection: &LocalConnection) {
    // SAFETY: the handle is open.
    unsafe { SetEvent(raw(&connection.shared.shutdown)) };
}

/// The result of a transfer.
enum TransferResult {
    Moved(usize),
    /// The other end is closed, or we shut the connection down.
    Ended,
}

impl LocalConnection {
    /// Starts a transfer with `start` and waits until it is done, times out, or the connection is shut down.
    fn transfer(
        &self,
        timeout: u32,
        start: impl FnOnce(HANDLE, *mut OVERLAPPED) -> windows_sys::core::BOOL,
    ) -> io::Result<TransferResult> {
        let pipe = raw(&self.shared.pipe);
        let mut state = OVERLAPPED { hEvent: raw(&self.done), ..Default::default() };
        if start(pipe, &mut state) == 0 {
            match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(ERROR_IO_PENDING as i32) => {}
                error => return ended(error),
            }
        }
        let events = [raw(&self.done), raw(&self.shared.shutdown)];
        // SAFETY: the handles are open, and the count is right.
        let waited = unsafe { WaitForMultipleObjects(events.len() as u32, events.as_ptr(), 0, timeout) };
        let waiting = if waited == WAIT_FAILED { Some(io::Error::last_os_error()) } else { None };
        if waited != WAIT_OBJECT_0 {
            // SAFETY: the transfer was started with this structure.
            unsafe { CancelIoEx(pipe, &state) };
        }
        let mut moved = 0;
        // Also after a cancellation: until this returns, the system may still write into the structure and the buffer.
        // SAFETY: as above, and the result outlives the call.
        if unsafe { GetOverlappedResult(pipe, &state, &mut moved, 1) } != 0 {
            return Ok(TransferResult::Moved(moved as usize));
        }
        let error = io::Error::last_os_error();
        match waited {
            WAIT_OBJECT_0 => ended(error),
            waited if waited == WAIT_OBJECT_0 + 1 => Ok(TransferResult::Ended),
            _ => Err(waiting.unwrap_or_else(|| io::ErrorKind::TimedOut.into())),
        }
    }
}

fn ended(error: io::Error) -> io::Result<TransferResult> {
    const ENDS: [u32; 4] = [ERROR_BROKEN_PIPE, ERROR_PIPE_NOT_CONNECTED, ERROR_HANDLE_EOF, ERROR_NO_DATA];
    let is_end = error.raw_os_error().is_some_and(|number| ENDS.contains(&(number as u32)));
    if is_end { Ok(TransferResult::Ended) } else { Err(error) }
}

impl Read for LocalConnection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let timeout = self.shared.read_timeout.load(Ordering::Relaxed);
        let outcome = self.transfer(timeout, |pipe, state| {
            // SAFETY: the buffer has the given length and, like the structure, outlives the transfer.
            unsafe { ReadFile(pipe, buffer.as_mut_ptr(), length, std::ptr::null_mut(), state) }
        })?;
        match outcome {
            TransferResult::Moved(count) => Ok(count),
            TransferResult::Ended => Ok(0),
        }
    }
}

impl Write for LocalConnection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let outcome = self.transfer(self.shared.write_timeout, |pipe, state| {
            // SAFETY: as for reading.
            unsafe { WriteFile(pipe, buffer.as_ptr(), length, std::ptr::null_mut(), state) }
        })?;
        match outcome {
            TransferResult::Moved(count) => Ok(count),
            TransferResult::Ended => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Nothing to do: the system has everything that was written.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::mpsc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::platform::testing::{self, OtherProcess, PATIENCE, wait_for};

    const CALLER: &str = "platform::windows::local::tests::a_caller";
    const LISTENER: &str = "platform::windows::local::tests::a_listener";

    /// Connects to the control socket, sends hello, and blocks.
    #[test]
    fn a_caller() {
        let Some(path) = testing::part(CALLER) else { return };
        let mut connection = connect_local(Path::new(&path), PATIENCE).unwrap();
        connection.write_all(b"hello\n").unwrap();
        testing::block();
    }

    /// Listens, answers one hello, and blocks.
    #[tokio::test]
    async fn a_listener() {
        let Some(path) = testing::part(LISTENER) else { return };
        let mut listener = LocalListener::bind(Path::new(&path)).unwrap();
        testing::report("ready");
        let mut stream = listener.accept_stream().await.unwrap();
        assert_eq!(hello(&mut stream).await, *b"hello\n");
        stream.write_all(b"welcome\n").await.unwrap();
        testing::block();
    }

    async fn hello(stream: &mut LocalStream) -> [u8; 6] {
        let mut word = [0; 6];
        tokio::time::timeout(PATIENCE, stream.read_exact(&mut word)).await.unwrap().unwrap();
        word
    }

    fn socket_path() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spm.sock");
        (directory, path)
    }

    async fn connected(path: &Path) -> (LocalListener, LocalStream, LocalConnection) {
        let mut listener = LocalListener::bind(path).unwrap();
        let connection = connect_local(path, PATIENCE).unwrap();
        let stream = listener.accept_stream().await.unwrap();
        (listener, stream, connection)
    }

    /// Runs a blocking function in a background thread; panics at the timeout.
    async fn in_thread<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || drop(sender.send(what())));
        tokio::time::timeout(PATIENCE, receiver).await.expect("the function returns in time").unwrap()
    }

    #[tokio::test]
    async fn one_thread_writes_while_another_waits_to_read() {
        let (_directory, path) = socket_path();
        let (_listener, mut stream, mut reader) = connected(&path).await;
        let mut writer = clone_local(&reader).unwrap();
        remove_read_timeout(&reader).unwrap();
        let (began, beginning) = mpsc::channel();
        let reading = std::thread::spawn(move || {
            began.send(()).unwrap();
            let mut word = [0; 8];
            reader.read_exact(&mut word).unwrap();
            word
        });
        beginning.recv().unwrap();
        for _ in 0..100 {
            writer = in_thread(move || {
                writer.write_all(b"hello\n").unwrap();
                writer
            })
            .await;
            assert_eq!(hello(&mut stream).await, *b"hello\n");
        }
        stream.write_all(b"welcome\n").await.unwrap();
        assert_eq!(in_thread(|| reading.join().unwrap()).await, *b"welcome\n");
    }

    #[tokio::test]
    async fn a_read_times_out_and_can_be_retried() {
        let (_directory, path) = socket_path();
        let mut listener = LocalListener::bind(&path).unwrap();
        let mut connection = connect_local(&path, Duration::from_millis(50)).unwrap();
        let mut stream = listener.accept_stream().await.unwrap();
        let mut connection = in_thread(move || {
            let error = connection.read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            connection
        })
        .await;
        stream.write_all(b"late").await.unwrap();
        let text = in_thread(move || {
            let mut text = [0; 4];
            connection.read_exact(&mut text).map(|()| text)
        })
        .await;
        assert_eq!(text.unwrap(), *b"late");
    }

    #[tokio::test]
    async fn a_write_to_a_client_that_does_not_read_times_out() {
        let (_directory, path) = socket_path();
        let mut listener = LocalListener::bind(&path).unwrap();
        let mut connection = connect_local(&path, Duration::from_millis(50)).unwrap();
        let _stream = listener.accept_stream().await.unwrap();
        let error = in_thread(move || connection.write_all(&vec![0; 16 << 20]).unwrap_err()).await;
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_shutdown_wakes_the_reader_and_closes_the_other_side() {
        let (_directory, path) = socket_path();
        let (_listener, mut stream, mut reader) = connected(&path).await;
        remove_read_timeout(&reader).unwrap();
        let writer = clone_local(&reader).unwrap();
        let reading = std::thread::spawn(move || reader.read(&mut [0; 8]).unwrap());
        shut_down(&writer);
        drop(writer);
        assert_eq!(in_thread(move || reading.join().unwrap()).await, 0);
        assert_eq!(end(&mut stream).await, 0);
    }

    /// Bytes read at the end of a connection: 0, also for a broken pipe.
    async fn end(stream: &mut LocalStream) -> usize {
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 8])).await.expect("the end is reported in time");
        read.or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(0) } else { Err(error) }).unwrap()
    }

    #[tokio::test]
    async fn a_killed_client_is_detected_at_once() {
        let (_directory, path) = socket_path();
        let mut listener = LocalListener::bind(&path).unwrap();
        let mut caller = OtherProcess::start(CALLER, &path);
        let mut stream = tokio::time::timeout(PATIENCE, listener.accept_stream()).await.unwrap().unwrap();
        assert_eq!(hello(&mut stream).await, *b"hello\n");
        caller.kill();
        assert_eq!(end(&mut stream).await, 0);
    }

    #[test]
    fn a_killed_listener_is_detected_at_once_and_replaced_by_the_next() {
        let (_directory, path) = socket_path();
        let mut first = OtherProcess::start(LISTENER, &path);
        assert_eq!(first.line(), "ready");
        let mut connection = connect_local(&path, PATIENCE).unwrap();
        connection.write_all(b"hello\n").unwrap();
        let mut word = [0; 8];
        connection.read_exact(&mut word).unwrap();
        assert_eq!(word, *b"welcome\n");
        first.kill();
        assert_eq!(connection.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(connect_local(&path, PATIENCE).unwrap_err().kind(), io::ErrorKind::NotFound);
        // The old connection is still open.
        let second = OtherProcess::start(LISTENER, &path);
        assert_eq!(second.line(), "ready");
        assert_eq!(connection.write_all(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let mut connection = wait_for("the new listener", || connect_local(&path, PATIENCE).ok());
        connection.write_all(b"hello\n").unwrap();
        connection.read_exact(&mut word).unwrap();
    }

    #[tokio::test]
    async fn a_client_waits_for_a_free_instance() {
        let (_directory, path) = socket_path();
        let mut listener = LocalListener::bind(&path).unwrap();
        let _first = connect_local(&path, PATIENCE).unwrap();
        let (began, short) = (Instant::now(), Duration::from_millis(50));
        assert_eq!(connect_local(&path, short).unwrap_err().raw_os_error(), Some(ERROR_PIPE_BUSY as i32));
        assert!(began.elapsed() >= short);
        let second = std::thread::spawn(move || connect_local(&path, PATIENCE).map(drop));
        listener.accept_stream().await.unwrap();
        in_thread(|| second.join().unwrap()).await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_disconnects_early_does_not_stop_the_listener() {
        let (_directory, path) = socket_path();
        let mut listener = LocalListener::bind(&path).unwrap();
        connect_local(&path, PATIENCE).unwrap().write_all(b"hello\n").unwrap();
        // The first client may still be accepted, or be reported as an error.
        let first = listener.accept_stream().await;
        let _second = in_thread({
            let path = path.clone();
            move || connect_local(&path, PATIENCE).unwrap()
        })
        .await;
        tokio::time::timeout(PATIENCE, listener.accept_stream()).await.unwrap().unwrap();
        drop(first);
    }

    #[tokio::test]
    async fn only_the_owner_administrators_and_the_system_may_connect() {
        let (_directory, path) = socket_path();
        let (_listener, _stream, connection) = connected(&path).await;
        let list = super::super::security::access_list(&connection.shared.pipe).unwrap();
        let (flags, entries) = list.split_once('(').unwrap();
        assert!(flags.starts_with("D:P"), "{list}");
        assert_eq!(entries.matches("(").count(), 2, "{list}");
        for who in [";SY)", ";BA)"] {
            assert!(list.contains(who), "{list}");
        }
    }
}
