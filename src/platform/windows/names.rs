//! The names that are taken on this host: where jobs can be looked for of which nobody remembers the name.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use windows_sys::Wdk::Foundation::OBJECT_ATTRIBUTES;
use windows_sys::Wdk::Storage::FileSystem::{NtOpenDirectoryObject, NtQueryDirectoryObject};
use windows_sys::Win32::Foundation::{
    HANDLE, NTSTATUS, OBJ_CASE_INSENSITIVE, RtlNtStatusToDosError, STATUS_NO_MORE_ENTRIES, UNICODE_STRING,
};

/// Where names with `Global\` lead.
const DIRECTORY: &str = r"\BaseNamedObjects";
/// The right to list it (wdm.h).
const DIRECTORY_QUERY: u32 = 1;
/// More names than any host has.
const MOST_NAMES: usize = 1 << 20;
/// Room for one entry with its two texts, of which the name is at most 260 units long.
const ROOM: usize = 512;

/// What the system gives for each name (NtQueryDirectoryObject).
#[repr(C)]
struct ObjectEntry {
    name: UNICODE_STRING,
    _kind: UNICODE_STRING,
}

/// The names of the host's objects that begin so, without that beginning.
pub(super) fn beginning_with(prefix: &str) -> io::Result<Vec<String>> {
    let directory = open()?;
    let mut buffer = [0_u64; ROOM];
    let mut context = 0;
    let mut found = vec![];
    for count in 0..MOST_NAMES {
        // SAFETY: the handle is open, and the buffer, which has the length that is told, and the context outlive the call.
        let status = unsafe {
            let (buffer, length) = (buffer.as_mut_ptr().cast(), size_of_val(&buffer) as u32);
            let restart = count == 0;
            let nothing = std::ptr::null_mut();
            NtQueryDirectoryObject(directory.as_raw_handle(), buffer, length, true, restart, &mut context, nothing)
        };
        if status == STATUS_NO_MORE_ENTRIES {
            break;
        }
        check(status)?;
        // SAFETY: the system has written an entry there, whose texts lie behind it in the buffer.
        let name = unsafe {
            let entry = &*buffer.as_ptr().cast::<ObjectEntry>();
            std::slice::from_raw_parts(entry.name.Buffer, usize::from(entry.name.Length) / 2)
        };
        found.extend(String::from_utf16_lossy(name).strip_prefix(prefix).map(str::to_owned));
    }
    Ok(found)
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
    // SAFETY: a new handle, which is ours alone.
    Ok(unsafe { OwnedHandle::from_raw_handle(directory) })
}

fn check(status: NTSTATUS) -> io::Result<()> {
    if status >= 0 {
        return Ok(());
    }
    // SAFETY: takes and gives plain numbers.
    Err(io::Error::from_raw_os_error(unsafe { RtlNtStatusToDosError(status) } as i32))
}
