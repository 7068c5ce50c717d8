//! The named objects of this host: finds jobs whose names are not recorded.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use windows_sys::Wdk::Foundation::OBJECT_ATTRIBUTES;
use windows_sys::Wdk::Storage::FileSystem::{NtOpenDirectoryObject, NtQueryDirectoryObject};
use windows_sys::Win32::Foundation::{
    HANDLE, NTSTATUS, OBJ_CASE_INSENSITIVE, RtlNtStatusToDosError, STATUS_NO_MORE_ENTRIES, UNICODE_STRING,
};

/// The object directory of names with `Global\`.
const DIRECTORY: &str = r"\BaseNamedObjects";
/// The right to list it (wdm.h).
const DIRECTORY_QUERY: u32 = 1;
/// An upper bound for the names of a host.
const MAX_NAMES: usize = 1 << 20;
/// Room for one entry with its two texts, of at most 64 KiB each, in words.
const ROOM: usize = (2 * (64 << 10) + 256) / size_of::<u64>();

/// An entry of NtQueryDirectoryObject.
#[repr(C)]
struct ObjectEntry {
    name: UNICODE_STRING,
    kind: UNICODE_STRING,
}

/// The kind of a job object.
const JOB: &str = "Job";

/// The names of the host's jobs with this prefix, without the prefix.
pub(super) fn with_prefix(prefix: &str) -> io::Result<Vec<String>> {
    let directory = open()?;
    let mut buffer = vec![0_u64; ROOM];
    let mut context = 0;
    let mut found = vec![];
    for count in 0..MAX_NAMES {
        // SAFETY: the handle is open; the buffer, which has the given length, and the context outlive the call.
        let status = unsafe {
            let (buffer, length) = (buffer.as_mut_ptr().cast(), size_of_val(buffer.as_slice()) as u32);
            let restart = count == 0;
            let nothing = std::ptr::null_mut();
            NtQueryDirectoryObject(directory.as_raw_handle(), buffer, length, true, restart, &mut context, nothing)
        };
        if status == STATUS_NO_MORE_ENTRIES {
            break;
        }
        check(status)?;
        // SAFETY: the system has written an entry there, whose texts follow it in the buffer.
        let (name, kind) = unsafe {
            let entry = &*buffer.as_ptr().cast::<ObjectEntry>();
            (text(&entry.name), text(&entry.kind))
        };
        if kind == JOB {
            found.extend(name.strip_prefix(prefix).map(str::to_owned));
        }
    }
    Ok(found)
}

/// The text must be one that the system has written.
unsafe fn text(text: &UNICODE_STRING) -> String {
    // SAFETY: the caller's promise; the length is in bytes.
    String::from_utf16_lossy(unsafe { std::slice::from_raw_parts(text.Buffer, usize::from(text.Length) / 2) })
}

fn open() -> io::Result<OwnedHandle> {
    let mut text: Vec<u16> = DIRECTORY.encode_utf16().collect();
    let length = (text.len() * 2) as u16;
    let name = UNICODE_STRING { Length: length, MaximumLength: length, Buffer: text.as_mut_ptr() };
    let attributes = OBJECT_ATTRIBUTES {
        Length: size_of::<OBJECT_ATTRIBUTES>() as u32,
        ObjectName: &name,
        Attributes: OBJ_CASE_INSENSITIVE,
        ..Default::default()
    };
    let mut directory: HANDLE = std::ptr::null_mut();
    // SAFETY: the attributes, the name that they point to and the result outlive the call.
    check(unsafe { NtOpenDirectoryObject(&mut directory, DIRECTORY_QUERY, &attributes) })?;
    // SAFETY: a new handle, which only we own.
    Ok(unsafe { OwnedHandle::from_raw_handle(directory) })
}

fn check(status: NTSTATUS) -> io::Result<()> {
    if status >= 0 {
        return Ok(());
    }
    // SAFETY: takes and returns integers.
    Err(io::Error::from_raw_os_error(unsafe { RtlNtStatusToDosError(status) } as i32))
}
