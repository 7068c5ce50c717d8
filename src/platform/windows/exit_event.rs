//! A named event of each role, which asks it to exit.
//!
//! A service has no console to send Ctrl-Break to, and an operator is in another session than a service. The name contains the pid and the
//! start time of the process, so the event is that of exactly this process.

use std::io;
use std::os::windows::io::{AsRawHandle, OwnedHandle};
use std::sync::{Mutex, PoisonError};

use windows_sys::Win32::Foundation::WAIT_OBJECT_0;
use windows_sys::Win32::System::Threading::{INFINITE, WaitForSingleObject};

use super::{event, process};

/// The event of this process.
static OWN: Mutex<Option<OwnedHandle>> = Mutex::new(None);

fn name(pid: u32, start_time: u64) -> String {
    format!(r"Global\aops-exit-{pid}-{start_time}")
}

/// The event of this process, created at the first call.
pub(super) fn own() -> io::Result<OwnedHandle> {
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(event) = &*own {
        return event.try_clone();
    }
    let pid = std::process::id();
    let start_time = process::start_time(pid).ok_or(io::ErrorKind::NotFound)?;
    own.insert(event::create(&name(pid, start_time))?).try_clone()
}

/// Asks a process to exit; `false`: it has no such event.
pub(super) fn request(pid: u32, start_time: u64) -> io::Result<bool> {
    let Some(event) = event::open(&name(pid, start_time))? else { return Ok(false) };
    event::set(&event).map(|()| true)
}

/// Asks this process to exit.
pub(super) fn request_own() -> io::Result<()> {
    event::set(&own()?)
}

/// Calls `handler` once, in a thread of its own, when this process is asked to exit.
pub fn on_exit_request(handler: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let event = own()?;
    std::thread::Builder::new().name("exit".to_owned()).spawn(move || {
        // SAFETY: the handle is open.
        if unsafe { WaitForSingleObject(event.as_raw_handle(), INFINITE) } == WAIT_OBJECT_0 {
            handler();
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::platform::testing::{self, OtherProcess, PATIENCE};

    const ASKED: &str = "platform::windows::exit_event::tests::a_role";

    /// Exits when it is asked to.
    #[test]
    fn a_role() {
        if testing::part(ASKED).is_some() {
            let (sender, receiver) = mpsc::channel();
            on_exit_request(move || sender.send(()).unwrap()).unwrap();
            testing::report("ready");
            receiver.recv_timeout(PATIENCE).unwrap();
            testing::report("asked");
        }
    }

    #[test]
    fn exactly_this_process_is_asked() {
        let role = OtherProcess::start(ASKED, "");
        assert_eq!(role.line(), "ready");
        let start_time = process::start_time(role.pid()).unwrap();
        assert!(!request(role.pid(), start_time + 1).unwrap());
        assert!(request(role.pid(), start_time).unwrap());
        assert_eq!(role.line(), "asked");
    }
}
