//! Access lists: of pipes and jobs, whose names every process of the host can see, and of files.
//!
//! The home's access list does not protect such names. So every named object is created with an access list for the user that we run as,
//! administrators and the system only, and an existing object of another user is not used. The access lists of files are only read.

use std::fs::File;
use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use windows_sys::Win32::Foundation::{ERROR_SUCCESS, HANDLE, LocalFree};
use windows_sys::Win32::Security::Authorization::{
    ConvertSidToStringSidW, ConvertStringSecurityDescriptorToSecurityDescriptorW, GetSecurityInfo, SDDL_REVISION_1,
    SE_FILE_OBJECT, SE_KERNEL_OBJECT, SE_OBJECT_TYPE,
};
use windows_sys::Win32::Security::{
    ACCESS_ALLOWED_ACE, ACE_HEADER, ACL, CheckTokenMembership, CreateWellKnownSid, DACL_SECURITY_INFORMATION, EqualSid,
    GetAce, GetTokenInformation, INHERIT_ONLY_ACE, IsWellKnownSid, OBJECT_SECURITY_INFORMATION,
    OWNER_SECURITY_INFORMATION, PSECURITY_DESCRIPTOR, PSID, SECURITY_ATTRIBUTES, TOKEN_QUERY, TOKEN_USER, TokenUser,
    WELL_KNOWN_SID_TYPE, WinAnonymousSid, WinAuthenticatedUserSid, WinBuiltinAdministratorsSid, WinBuiltinGuestsSid,
    WinBuiltinUsersSid, WinInteractiveSid, WinLocalSystemSid, WinNetworkSid, WinWorldSid,
};
use windows_sys::Win32::System::SystemServices::{ACCESS_ALLOWED_ACE_TYPE, ACCESS_ALLOWED_CALLBACK_ACE_TYPE};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};

/// The right to read the owner and the access list (winnt.h).
pub(super) const READ_CONTROL: u32 = 0x2_0000;

/// UTF-16 with a terminating zero.
pub(super) fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().chain([0]).collect()
}

/// Memory that the system allocated and that we free.
struct LocalAllocation(*mut core::ffi::c_void);

impl Drop for LocalAllocation {
    fn drop(&mut self) {
        // SAFETY: the system allocated it with `LocalAlloc`, and it is freed here alone.
        unsafe { LocalFree(self.0) };
    }
}

/// A text that the system allocated.
fn text_of(text: &LocalAllocation) -> String {
    let start: *const u16 = text.0.cast();
    // SAFETY: the text ends in a zero, and lives until the end of this function.
    let units = unsafe {
        let length = (0..).take_while(|at| *start.add(*at) != 0).count();
        std::slice::from_raw_parts(start, length)
    };
    String::from_utf16_lossy(units)
}

/// An access list for the user that we run as, administrators and the system.
pub(super) struct PrivateAcl(LocalAllocation);

impl PrivateAcl {
    pub(super) fn new() -> io::Result<PrivateAcl> {
        let us = OwnUser::get()?.as_text()?;
        descriptor_of(&wide(&format!("O:{us}D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;{us})"))).map(PrivateAcl)
    }

    /// For calls that create an object; the value must outlive them.
    pub(super) fn attributes(&self) -> SECURITY_ATTRIBUTES {
        let length = size_of::<SECURITY_ATTRIBUTES>() as u32;
        SECURITY_ATTRIBUTES { nLength: length, lpSecurityDescriptor: self.0.0, bInheritHandle: 0 }
    }
}

/// Parses a security descriptor in SDDL with a terminating zero.
fn descriptor_of(text: &[u16]) -> io::Result<LocalAllocation> {
    let mut descriptor: PSECURITY_DESCRIPTOR = std::ptr::null_mut();
    // SAFETY: the text ends in a zero and, like the result, outlives the call; the length is not requested.
    let done = unsafe {
        ConvertStringSecurityDescriptorToSecurityDescriptorW(
            text.as_ptr(),
            SDDL_REVISION_1,
            &mut descriptor,
            std::ptr::null_mut(),
        )
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(LocalAllocation(descriptor)) }
}

/// The user that we run as.
///
/// The structure points to the identifier behind it, so it stays where the system wrote it.
struct OwnUser(Box<[u64; 16]>);

impl OwnUser {
    fn get() -> io::Result<OwnUser> {
        let mut token: HANDLE = std::ptr::null_mut();
        // SAFETY: the own process's handle needs no closing, and the result outlives the call.
        if unsafe { OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, &mut token) } == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new handle, which only we own.
        let token = unsafe { OwnedHandle::from_raw_handle(token) };
        // The structure and the longest identifier need less.
        let mut user = OwnUser(Box::new([0; 16]));
        let mut length = 0;
        // SAFETY: the buffer has the given length and the alignment of the structure.
        let done = unsafe {
            GetTokenInformation(
                token.as_raw_handle(),
                TokenUser,
                user.0.as_mut_ptr().cast(),
                size_of::<[u64; 16]>() as u32,
                &mut length,
            )
        };
        if done == 0 { Err(io::Error::last_os_error()) } else { Ok(user) }
    }

    fn sid(&self) -> PSID {
        // SAFETY: the system has written the structure there.
        unsafe { (*self.0.as_ptr().cast::<TOKEN_USER>()).User.Sid }
    }

    fn as_text(&self) -> io::Result<String> {
        let mut text = std::ptr::null_mut();
        // SAFETY: the identifier is valid, and the result outlives the call.
        if unsafe { ConvertSidToStringSidW(self.sid(), &mut text) } == 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(text_of(&LocalAllocation(text.cast())))
    }
}

/// Whether this process has the rights of the group of administrators. In a process that was not started elevated, the group only denies.
pub(super) fn is_administrator() -> io::Result<bool> {
    let mut sid = [0_u64; 16];
    let mut length = size_of_val(&sid) as u32;
    let mut is_member = 0;
    // SAFETY: the buffer, which has the given length, and the results outlive the calls; no token means that of this thread.
    let done = unsafe {
        let (domain, token) = (std::ptr::null_mut(), std::ptr::null_mut());
        CreateWellKnownSid(WinBuiltinAdministratorsSid, domain, sid.as_mut_ptr().cast(), &mut length) != 0
            && CheckTokenMembership(token, sid.as_mut_ptr().cast(), &mut is_member) != 0
    };
    if done { Ok(is_member != 0) } else { Err(io::Error::last_os_error()) }
}

/// A well-known group that any user may be in.
pub(super) struct WellKnownGroup {
    pub(super) kind: WELL_KNOWN_SID_TYPE,
    pub(super) name: &'static str,
    pub(super) sid: &'static str,
}

/// The groups that count as other users.
pub(super) const OTHERS: &[WellKnownGroup] = &[
    WellKnownGroup { kind: WinWorldSid, name: "Everyone", sid: "S-1-1-0" },
    WellKnownGroup { kind: WinAuthenticatedUserSid, name: "Authenticated Users", sid: "S-1-5-11" },
    WellKnownGroup { kind: WinBuiltinUsersSid, name: "Users", sid: "S-1-5-32-545" },
    WellKnownGroup { kind: WinBuiltinGuestsSid, name: "Guests", sid: "S-1-5-32-546" },
    WellKnownGroup { kind: WinInteractiveSid, name: "INTERACTIVE", sid: "S-1-5-4" },
    WellKnownGroup { kind: WinNetworkSid, name: "NETWORK", sid: "S-1-5-2" },
    WellKnownGroup { kind: WinAnonymousSid, name: "ANONYMOUS LOGON", sid: "S-1-5-7" },
];

/// The owner and the access list of an object.
pub(super) struct AccessList {
    owner: PSID,
    /// Null: everybody has all rights, or it was not requested.
    list: *const ACL,
    /// The memory that both point into.
    _descriptor: LocalAllocation,
}

impl AccessList {
    pub(super) fn of_file(file: &File) -> io::Result<AccessList> {
        AccessList::of(file.as_raw_handle(), SE_FILE_OBJECT, OWNER_SECURITY_INFORMATION | DACL_SECURITY_INFORMATION)
    }

    /// The handle must be open.
    fn of(handle: HANDLE, kind: SE_OBJECT_TYPE, what: OBJECT_SECURITY_INFORMATION) -> io::Result<AccessList> {
        let (mut owner, mut descriptor): (PSID, PSECURITY_DESCRIPTOR) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut list: *mut ACL = std::ptr::null_mut();
        // SAFETY: the handle is open, and the results outlive the call; owner and list point into the descriptor, which is kept with them.
        let failed = unsafe {
            let nothing = std::ptr::null_mut();
            GetSecurityInfo(handle, kind, what, &mut owner, nothing, &mut list, std::ptr::null_mut(), &mut descriptor)
        };
        if failed != ERROR_SUCCESS {
            return Err(io::Error::from_raw_os_error(failed as i32));
        }
        Ok(AccessList { owner, list, _descriptor: LocalAllocation(descriptor) })
    }

    /// Whether the owner is the user that we run as, administrators or the system.
    pub(super) fn is_trusted(&self) -> io::Result<bool> {
        is_trusted_owner(self.owner)
    }

    /// Whether a group has any of these rights.
    pub(super) fn allows(&self, group: WELL_KNOWN_SID_TYPE, rights: u32) -> io::Result<bool> {
        if self.list.is_null() {
            return Ok(true);
        }
        // SAFETY: the list lives as long as the descriptor.
        let count = unsafe { (*self.list).AceCount };
        for index in 0..count {
            let mut entry = std::ptr::null_mut();
            // SAFETY: the list is valid, and the result outlives the call.
            if unsafe { GetAce(self.list, u32::from(index), &mut entry) } == 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: every entry starts with this header, and is part of the list.
            let header = unsafe { *entry.cast::<ACE_HEADER>() };
            let allows =
                [ACCESS_ALLOWED_ACE_TYPE, ACCESS_ALLOWED_CALLBACK_ACE_TYPE].contains(&u32::from(header.AceType));
            // An inherit-only entry does not apply to the object itself.
            if !allows || u32::from(header.AceFlags) & INHERIT_ONLY_ACE != 0 {
                continue;
            }
            let entry: *const ACCESS_ALLOWED_ACE = entry.cast();
            // SAFETY: entries of both kinds start like this; the identifier starts at its first word and is part of the list.
            let (mask, is_group) = unsafe {
                let sid = (&raw const (*entry).SidStart).cast_mut().cast();
                ((*entry).Mask, IsWellKnownSid(sid, group) != 0)
            };
            if is_group && mask & rights != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether a named object was created by the user that we run as, an administrator or the system.
pub(super) fn is_trusted(object: &OwnedHandle) -> io::Result<bool> {
    AccessList::of(object.as_raw_handle(), SE_KERNEL_OBJECT, OWNER_SECURITY_INFORMATION)?.is_trusted()
}

/// The identifier must be valid.
fn is_trusted_owner(owner: PSID) -> io::Result<bool> {
    let user = OwnUser::get()?;
    // SAFETY: both identifiers are valid and live until the end of this function.
    Ok(unsafe {
        EqualSid(owner, user.sid()) != 0
            || IsWellKnownSid(owner, WinBuiltinAdministratorsSid) != 0
            || IsWellKnownSid(owner, WinLocalSystemSid) != 0
    })
}

/// Sets the access list of a file or directory; `@US@` in it is the user that we run as.
pub(super) fn set_access_list(path: &std::path::Path, list: &str) -> io::Result<()> {
    use std::os::windows::ffi::OsStrExt;
    use windows_sys::Win32::Security::SetFileSecurityW;

    let text = wide(&list.replace("@US@", &OwnUser::get()?.as_text()?));
    let path: Vec<u16> = path.as_os_str().encode_wide().chain([0]).collect();
    let descriptor = descriptor_of(&text)?;
    // SAFETY: the path ends in a zero and, like the descriptor, outlives the call.
    let done = unsafe { SetFileSecurityW(path.as_ptr(), DACL_SECURITY_INFORMATION, descriptor.0) };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The access list of an object, as text.
#[cfg(test)]
pub(super) fn access_list(object: &OwnedHandle) -> io::Result<String> {
    use windows_sys::Win32::Security::Authorization::ConvertSecurityDescriptorToStringSecurityDescriptorW;

    let mut descriptor: PSECURITY_DESCRIPTOR = std::ptr::null_mut();
    let nothing = std::ptr::null_mut();
    // SAFETY: the handle is open, and the result, which is freed below, outlives the call.
    let failed = unsafe {
        let (handle, kind) = (object.as_raw_handle(), SE_KERNEL_OBJECT);
        let dacl = std::ptr::null_mut();
        GetSecurityInfo(
            handle,
            kind,
            DACL_SECURITY_INFORMATION,
            nothing,
            nothing,
            dacl,
            std::ptr::null_mut(),
            &mut descriptor,
        )
    };
    if failed != ERROR_SUCCESS {
        return Err(io::Error::from_raw_os_error(failed as i32));
    }
    let descriptor = LocalAllocation(descriptor);
    let mut text = std::ptr::null_mut();
    // SAFETY: the descriptor is valid, and the result, which is freed below, outlives the call.
    let done = unsafe {
        let (revision, what) = (SDDL_REVISION_1, DACL_SECURITY_INFORMATION);
        ConvertSecurityDescriptorToStringSecurityDescriptorW(
            descriptor.0,
            revision,
            what,
            &mut text,
            std::ptr::null_mut(),
        )
    };
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(text_of(&LocalAllocation(text.cast()))) }
}
