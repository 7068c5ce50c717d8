//! Named events, which every process of the host can see: those of another user are not used.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use windows_sys::Win32::Foundation::{ERROR_ALREADY_EXISTS, ERROR_FILE_NOT_FOUND, GetLastError};
use windows_sys::Win32::Storage::FileSystem::SYNCHRONIZE;
use windows_sys::Win32::System::Threading::{CreateEventW, EVENT_MODIFY_STATE, OpenEventW, ResetEvent, SetEvent};

use super::security::{self, PrivateAcl, READ_CONTROL, wide};

/// Creates an event, or opens it if it exists. It stays signalled once it is set. Administrators, the system and our user may set it.
pub(super) fn create(name: &str) -> io::Result<OwnedHandle> {
    let (wide, acl) = (wide(name), PrivateAcl::new()?);
    // SAFETY: the name ends in a zero and, like the access list, outlives the call.
    let (event, error) = unsafe { (CreateEventW(&acl.attributes(), 1, 0, wide.as_ptr()), GetLastError()) };
    if event.is_null() {
        return Err(io::Error::from_raw_os_error(error as i32));
    }
    // SAFETY: a new handle, which only we own.
    let event = unsafe { OwnedHandle::from_raw_handle(event) };
    if error == ERROR_ALREADY_EXISTS && !security::is_trusted(&event)? {
        let message = format!("another user has created the event {name}; find and stop the program that holds it");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    Ok(event)
}

/// Opens an event of ours; `None`: there is none.
pub(super) fn open(name: &str) -> io::Result<Option<OwnedHandle>> {
    let wide = wide(name);
    // SAFETY: the name ends in a zero and outlives the call.
    let event = unsafe { OpenEventW(EVENT_MODIFY_STATE | SYNCHRONIZE | READ_CONTROL, 0, wide.as_ptr()) };
    if event.is_null() {
        return match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(ERROR_FILE_NOT_FOUND as i32) => Ok(None),
            error => Err(error),
        };
    }
    // SAFETY: a new handle, which only we own.
    let event = unsafe { OwnedHandle::from_raw_handle(event) };
    Ok(if security::is_trusted(&event)? { Some(event) } else { None })
}

pub(super) fn set(event: &OwnedHandle) -> io::Result<()> {
    // SAFETY: the handle is open.
    if unsafe { SetEvent(event.as_raw_handle()) } == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(super) fn reset(event: &OwnedHandle) -> io::Result<()> {
    // SAFETY: the handle is open.
    if unsafe { ResetEvent(event.as_raw_handle()) } == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
