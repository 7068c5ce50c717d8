//! Services that others have registered: their list, and settings of a service that the crate windows-service cannot read or clear.

use std::io;
use std::ptr::{null, null_mut};

use windows_sys::Win32::Foundation::ERROR_MORE_DATA;
use windows_sys::Win32::System::Services::{
    ChangeServiceConfigW, CloseServiceHandle, ENUM_SERVICE_STATUS_PROCESSW, EnumServicesStatusExW, OpenSCManagerW,
    OpenServiceW, QueryServiceConfig2W, SC_ENUM_PROCESS_INFO, SC_HANDLE, SC_MANAGER_CONNECT,
    SC_MANAGER_ENUMERATE_SERVICE, SERVICE_CHANGE_CONFIG, SERVICE_CONFIG, SERVICE_CONFIG_DELAYED_AUTO_START_INFO,
    SERVICE_CONFIG_DESCRIPTION, SERVICE_DELAYED_AUTO_START_INFO, SERVICE_DESCRIPTIONW, SERVICE_NO_CHANGE,
    SERVICE_QUERY_CONFIG, SERVICE_STATE_ALL, SERVICE_WIN32,
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

    fn service(name: &str, access: u32) -> io::Result<Handle> {
        let manager = Handle::manager(SC_MANAGER_CONNECT)?;
        let name = wide(name);
        // SAFETY: the handle is open, and the name ends in a zero.
        Handle::of(unsafe { OpenServiceW(manager.0, name.as_ptr(), access) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it afterwards.
        unsafe { CloseServiceHandle(self.0) };
    }
}

/// The names of the services that are programs.
pub(super) fn names() -> io::Result<Vec<String>> {
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
            found.push(unsafe { text_at(entry.lpServiceName) });
        }
        if !has_more || count == 0 {
            return Ok(found);
        }
    }
}

/// The description of a service; `None`: it has none, or it cannot be read.
pub(super) fn description(name: &str) -> Option<String> {
    let buffer = optional_settings(name, SERVICE_CONFIG_DESCRIPTION)?;
    // SAFETY: the system has written this structure at the start of the buffer, which is aligned for it, and its text behind it.
    unsafe {
        let text = (*buffer.as_ptr().cast::<SERVICE_DESCRIPTIONW>()).lpDescription;
        (!text.is_null()).then(|| text_at(text))
    }
}

/// Whether a service that starts at boot starts after the others; `None`: the system does not know this setting.
pub(super) fn is_delayed(name: &str) -> Option<bool> {
    let buffer = optional_settings(name, SERVICE_CONFIG_DELAYED_AUTO_START_INFO)?;
    // SAFETY: as above.
    Some(unsafe { (*buffer.as_ptr().cast::<SERVICE_DELAYED_AUTO_START_INFO>()).fDelayedAutostart != 0 })
}

fn optional_settings(name: &str, level: SERVICE_CONFIG) -> Option<Vec<u64>> {
    let service = Handle::service(name, SERVICE_QUERY_CONFIG).ok()?;
    // The maximum that the system needs; of words, for the alignment of every structure.
    let mut buffer = vec![0_u64; (8 << 10) / size_of::<u64>()];
    let mut needed = 0;
    let length = size_of_val(buffer.as_slice()) as u32;
    // SAFETY: the handle is open, and the buffer has the given length.
    let done = unsafe { QueryServiceConfig2W(service.0, level, buffer.as_mut_ptr().cast(), length, &mut needed) };
    (done != 0).then_some(buffer)
}

/// An empty text.
static NO_PASSWORD: [u16; 1] = [0];

/// What [`change`] changes; `None`: it stays.
#[derive(Debug, Default)]
pub(super) struct Change<'a> {
    pub service_type: Option<u32>,
    pub start_type: Option<u32>,
    pub error_control: Option<u32>,
    pub command: Option<&'a str>,
    pub dependencies: Option<&'a [String]>,
    /// One without a password.
    pub account: Option<&'a str>,
    pub display_name: Option<&'a str>,
}

/// Changes the registration of a service.
pub(super) fn change(name: &str, change: &Change<'_>) -> io::Result<()> {
    let service = Handle::service(name, SERVICE_CHANGE_CONFIG)?;
    let text = |text: Option<&str>| text.map(wide);
    let (command, account, display_name) = (text(change.command), text(change.account), text(change.display_name));
    // Each name ends in a zero, and their list in another one. No name is an empty text.
    let dependencies = change.dependencies.map(|names| {
        let names = names.iter().flat_map(|name| wide(name));
        names.chain([0, 0]).collect::<Vec<u16>>()
    });
    let start = |text: &Option<Vec<u16>>| text.as_ref().map_or(null(), |text| text.as_ptr());
    // SAFETY: the handle is open, the texts end in a zero and outlive the call; no text means no change.
    let done = unsafe {
        ChangeServiceConfigW(
            service.0,
            change.service_type.unwrap_or(SERVICE_NO_CHANGE),
            change.start_type.unwrap_or(SERVICE_NO_CHANGE),
            change.error_control.unwrap_or(SERVICE_NO_CHANGE),
            start(&command),
            null(),
            null_mut(),
            start(&dependencies),
            start(&account),
            // No password, unless the account stays.
            if account.is_some() { NO_PASSWORD.as_ptr() } else { null() },
            start(&display_name),
        )
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
