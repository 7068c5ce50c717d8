//! Milestones of a service in the application log of Windows, where operators look first when a service fails.
//!
//! The log stores a number and texts; a file that the source names has the sentence for the number. The one of the system's own
//! `eventcreate` has a sentence that is nothing but the text, for every number up to 1000.

use std::io;
use std::os::windows::ffi::OsStrExt;

use windows_sys::Win32::Foundation::{ERROR_FILE_NOT_FOUND, ERROR_SUCCESS};
use windows_sys::Win32::System::EventLog::{
    DeregisterEventSource, EVENTLOG_ERROR_TYPE, EVENTLOG_INFORMATION_TYPE, RegisterEventSourceW, ReportEventW,
};
use windows_sys::Win32::System::Registry::{
    HKEY_LOCAL_MACHINE, REG_DWORD, REG_EXPAND_SZ, RegDeleteTreeW, RegSetKeyValueW,
};

use super::security::wide;

/// The key of all sources; the one of a service has the service's name.
const SOURCES: &str = r"SYSTEM\CurrentControlSet\Services\EventLog\Application";
/// The file with the sentences.
const SENTENCES: &str = r"%SystemRoot%\System32\EventCreate.exe";
/// Error, warning and information.
static KINDS: u32 = 7;
/// The number of every milestone.
const MILESTONE: u32 = 1;

/// Registers the source of a service; an existing one is not an error.
pub(super) fn register_source(service: &str) -> io::Result<()> {
    let file: Vec<u16> = std::ffi::OsStr::new(SENTENCES).encode_wide().chain([0]).collect();
    set(service, "EventMessageFile", REG_EXPAND_SZ, file.as_ptr().cast(), file.len() * 2)?;
    set(service, "TypesSupported", REG_DWORD, (&raw const KINDS).cast(), size_of_val(&KINDS))
}

fn set(service: &str, name: &str, kind: u32, value: *const core::ffi::c_void, bytes: usize) -> io::Result<()> {
    let (key, name) = (wide(&format!(r"{SOURCES}\{service}")), wide(name));
    // SAFETY: the names end in zeros and, like the value, which has the given size, outlive the call.
    let code = unsafe { RegSetKeyValueW(HKEY_LOCAL_MACHINE, key.as_ptr(), name.as_ptr(), kind, value, bytes as u32) };
    if code == ERROR_SUCCESS { Ok(()) } else { Err(io::Error::from_raw_os_error(code as i32)) }
}

/// Removes the source of a service, if it exists. What it has logged stays.
pub(super) fn remove_source(service: &str) -> io::Result<()> {
    let key = wide(&format!(r"{SOURCES}\{service}"));
    // SAFETY: the name ends in a zero and outlives the call.
    match unsafe { RegDeleteTreeW(HKEY_LOCAL_MACHINE, key.as_ptr()) } {
        ERROR_SUCCESS | ERROR_FILE_NOT_FOUND => Ok(()),
        code => Err(io::Error::from_raw_os_error(code as i32)),
    }
}

/// Logs a milestone of a service, without waiting for the log.
pub(super) fn log(service: &str, text: &str, is_failure: bool) {
    let (service, text) = (service.to_owned(), text.to_owned());
    let spawned =
        std::thread::Builder::new().name("event log".to_owned()).spawn(move || log_now(&service, &text, is_failure));
    if let Err(error) = spawned {
        tracing::debug!(error = %error, "cannot write to the event log");
    }
}

/// Logs a milestone before this process exits.
pub(super) fn log_now(service: &str, text: &str, is_failure: bool) {
    let (source, text) = (wide(service), wide(text));
    let kind = if is_failure { EVENTLOG_ERROR_TYPE } else { EVENTLOG_INFORMATION_TYPE };
    // SAFETY: the texts end in zeros and outlive the calls; the source is closed after its last use.
    unsafe {
        let log = RegisterEventSourceW(std::ptr::null(), source.as_ptr());
        if log.is_null() {
            tracing::debug!(error = %io::Error::last_os_error(), "cannot open the event log");
            return;
        }
        let (texts, nothing) = ([text.as_ptr()], std::ptr::null_mut());
        if ReportEventW(log, kind, 0, MILESTONE, nothing, 1, 0, texts.as_ptr(), std::ptr::null()) == 0 {
            tracing::debug!(error = %io::Error::last_os_error(), "cannot write to the event log");
        }
        DeregisterEventSource(log);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_can_be_registered_twice_and_removed_twice() {
        const SERVICE: &str = "aops-of-a-test";
        for _ in 0..2 {
            register_source(SERVICE).unwrap();
        }
        log_now(SERVICE, "a test", false);
        for _ in 0..2 {
            remove_source(SERVICE).unwrap();
        }
    }
}
