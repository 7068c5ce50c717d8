//! Waits for processes and events on the system's thread pool, instead of one thread each.

use std::io;
use std::os::windows::io::{AsRawHandle, OwnedHandle};
use std::sync::Arc;

use tokio::sync::Notify;
use windows_sys::Win32::Foundation::{HANDLE, INVALID_HANDLE_VALUE};
use windows_sys::Win32::System::Threading::{
    INFINITE, RegisterWaitForSingleObject, UnregisterWaitEx, WT_EXECUTEINWAITTHREAD, WT_EXECUTEONLYONCE,
};

struct WaitRegistration {
    wait: HANDLE,
    signalled: Arc<Notify>,
}

// SAFETY: the handle of a registration may be used by any thread.
unsafe impl Send for WaitRegistration {}
// SAFETY: as above; nothing is changed through a shared reference.
unsafe impl Sync for WaitRegistration {}

impl WaitRegistration {
    fn new(object: &OwnedHandle) -> io::Result<WaitRegistration> {
        let signalled = Arc::new(Notify::new());
        let mut wait: HANDLE = std::ptr::null_mut();
        // SAFETY: the object outlives the registration, since the caller waits for it by reference. So does the callback's context:
        // dropping the registration waits for a running callback.
        let done = unsafe {
            RegisterWaitForSingleObject(
                &mut wait,
                object.as_raw_handle(),
                Some(notify),
                Arc::as_ptr(&signalled).cast(),
                INFINITE,
                WT_EXECUTEINWAITTHREAD | WT_EXECUTEONLYONCE,
            )
        };
        if done == 0 { Err(io::Error::last_os_error()) } else { Ok(WaitRegistration { wait, signalled }) }
    }
}

impl Drop for WaitRegistration {
    fn drop(&mut self) {
        // SAFETY: the registration is ours and ends here; the call returns when no callback runs any more.
        unsafe { UnregisterWaitEx(self.wait, INVALID_HANDLE_VALUE) };
    }
}

unsafe extern "system" fn notify(context: *mut core::ffi::c_void, _timed_out: bool) {
    // SAFETY: the registration keeps it alive until no callback runs.
    unsafe { &*context.cast::<Notify>() }.notify_one();
}

/// Resolves when the object is signalled; a process is signalled when it has exited. Cancel-safe.
pub(super) async fn signalled(object: &OwnedHandle) -> io::Result<()> {
    let registration = WaitRegistration::new(object)?;
    registration.signalled.notified().await;
    Ok(())
}
