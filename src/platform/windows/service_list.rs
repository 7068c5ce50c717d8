//! Services that others have registered: their list, and changes that leave what is not mentioned as it is.

use std::io;
use std::ptr::{null, null_mut};

use windows_sys::Win32::Foundation::ERROR_MORE_DATA;
use windows_sys::Win32::System::Services::{
    ChangeServiceConfigW, CloseServiceHandle, ENUM_SERVICE_STATUS_PROCESSW, EnumServicesStatusExW, OpenSCManagerW,
    OpenServiceW, SC_ENUM_PROCESS_INFO, SC_HANDLE, SC_MANAGER_CONNECT, SC_MANAGER_ENUMERATE_SERVICE,
    SERVICE_CHANGE_CONFIG, SERVICE_NO_CHANGE, SERVICE_STATE_ALL, SERVICE_STOPPED, SERVICE_WIN32,
};

/// An open manager or service, closed at the end.
struct Handle(SC_HANDLE);

impl Handle {
    fn of(handle: SC_HANDLE) -> io::Result<Handle> {
        if handle.is_null() { Err(io::Error::last_os_error()) } else { Ok(Handle(handle)) }
    }

    fn manager(access: u32) -> io::Result<Handle> {
        // SAFETY: no name means this computer, and the active database.
        Handle::of(unsafe { OpenSCManagerW(null(), null(), access) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it afterwards.
        unsafe { CloseServiceHandle(self.0) };
    }
}

/// The names of the services that are programs, and whether each runs.
pub(super) fn names() -> io::Result<Vec<(String, bool)>> {
    let manager = Handle::manager(SC_MANAGER_CONNECT | SC_MANAGER_ENUMERATE_SERVICE)?;
    let mut found = Vec::new();
    // Where the next call continues.
    let mut resume = 0;
    loop {
        const ENTRY: usize = size_of::<ENUM_SERVICE_STATUS_PROCESSW>();
        // Of entries, for their alignment; the texts of the entries are at the end.
        let mut buffer: Vec<ENUM_SERVICE_STATUS_PROCESSW> = Vec::with_capacity((64 << 10) / ENTRY);
        let (mut missing, mut count) = (0, 0);
        // SAFETY: the handle is open, and the buffer has the given number of bytes.
        let done = unsafe {
            EnumServicesStatusExW(
                manager.0,
                SC_ENUM_PROCESS_INFO,
                SERVICE_WIN32,
                SERVICE_STATE_ALL,
                buffer.as_mut_ptr().cast(),
                (buffer.capacity() * ENTRY) as u32,
                &mut missing,
                &mut count,
                &mut resume,
                null(),
            )
        };
        let error = io::Error::last_os_error();
        let has_more = done == 0 && error.raw_os_error() == Some(ERROR_MORE_DATA as i32);
        if done == 0 && !has_more {
            return Err(error);
        }
        // SAFETY: the call has written this number of entries at the start of the buffer.
        let entries = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), count as usize) };
        for entry in entries {
            // SAFETY: the name is in the buffer and ends in a zero.
            let name = unsafe { text_at(entry.lpServiceName) };
            found.push((name, entry.ServiceStatusProcess.dwCurrentState != SERVICE_STOPPED));
        }
        if !has_more || count == 0 {
            return Ok(found);
        }
    }
}

fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().chain([0]).collect()
}

/// # Safety
///
/// `start` is a text that ends in a zero.
unsafe fn text_at(start: *const u16) -> String {
    // SAFETY: every unit up to the zero belongs to the text.
    let units = unsafe {
        let length = (0..).take_while(|index| *start.add(*index) != 0).count();
        std::slice::from_raw_parts(start, length)
    };
    String::from_utf16_lossy(units)
}

/// Changes the start type of a service, and its command line and its shown name if they are given.
pub(super) fn change(name: &str, start_type: u32, command: Option<&str>, display_name: Option<&str>) -> io::Result<()> {
    let manager = Handle::manager(SC_MANAGER_CONNECT)?;
    let name = wide(name);
    // SAFETY: the handle is open, and the name ends in a zero.
    let service = Handle::of(unsafe { OpenServiceW(manager.0, name.as_ptr(), SERVICE_CHANGE_CONFIG) })?;
    let (command, display_name) = (command.map(wide), display_name.map(wide));
    let text = |text: &Option<Vec<u16>>| text.as_ref().map_or(null(), |text| text.as_ptr());
    // SAFETY: the handle is open, the texts end in a zero and outlive the call; no text means no change.
    let done = unsafe {
        ChangeServiceConfigW(
            service.0,
            SERVICE_NO_CHANGE,
            start_type,
            SERVICE_NO_CHANGE,
            text(&command),
            null(),
            null_mut(),
            null(),
            null(),
            null(),
            text(&display_name),
        )
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
