//! Who may touch what bears a name that every process of the host can see: pipes and jobs.
//!
//! Such names are not protected by the home's access list. So whatever is made under one lets in whoever we run as, administrators and
//! the system, and nobody else; and what somebody else made under it before us is not used.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use windows_sys::Win32::Foundation::{ERROR_SUCCESS, HANDLE, LocalFree};
use windows_sys::Win32::Security::Authorization::{
    ConvertSidToStringSidW, ConvertStringSecurityDescriptorToSecurityDescriptorW, GetSecurityInfo, SDDL_REVISION_1,
    SE_KERNEL_OBJECT,
};
use windows_sys::Win32::Security::{
    EqualSid, GetTokenInformation, IsWellKnownSid, OWNER_SECURITY_INFORMATION, PSECURITY_DESCRIPTOR, PSID,
    SECURITY_ATTRIBUTES, TOKEN_QUERY, TOKEN_USER, TokenUser, WinBuiltinAdministratorsSid, WinLocalSystemSid,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};

/// Text as the system takes it.
pub(super) fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().chain([0]).collect()
}

/// What the system allocated for us and is ours to free.
struct Local(*mut core::ffi::c_void);

impl Drop for Local {
    fn drop(&mut self) {
        // SAFETY: the system allocated it with `LocalAlloc`, and it is freed here alone.
        unsafe { LocalFree(self.0) };
    }
}

/// Text that the system allocated.
fn text_of(text: &Local) -> String {
    let start: *const u16 = text.0.cast();
    // SAFETY: the text ends in a zero, and lives until the end of this function.
    let units = unsafe {
        let length = (0..).take_while(|at| *start.add(*at) != 0).count();
        std::slice::from_raw_parts(start, length)
    };
    String::from_utf16_lossy(units)
}

/// An access list for us, administrators and the system.
pub(super) struct OnlyOurs(Local);

impl OnlyOurs {
    pub(super) fn new() -> io::Result<OnlyOurs> {
        let us = OwnUser::get()?.as_text()?;
        let text = wide(&format!("O:{us}D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;{us})"));
        let mut descriptor: PSECURITY_DESCRIPTOR = std::ptr::null_mut();
        // SAFETY: the text ends in a zero and, like the result, outlives the call; the length is not asked for.
        let done = unsafe {
            ConvertStringSecurityDescriptorToSecurityDescriptorW(
                text.as_ptr(),
                SDDL_REVISION_1,
                &mut descriptor,
                std::ptr::null_mut(),
            )
        };
        if done == 0 { Err(io::Error::last_os_error()) } else { Ok(OnlyOurs(Local(descriptor))) }
    }

    /// For the calls that make something; the value must outlive them.
    pub(super) fn attributes(&self) -> SECURITY_ATTRIBUTES {
        let length = size_of::<SECURITY_ATTRIBUTES>() as u32;
        SECURITY_ATTRIBUTES { nLength: length, lpSecurityDescriptor: self.0.0, bInheritHandle: 0 }
    }
}

/// Whom we run as.
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
        // SAFETY: a new handle, which is ours alone.
        let token = unsafe { OwnedHandle::from_raw_handle(token) };
        // The structure and the longest identifier behind it take less.
        let mut user = OwnUser(Box::new([0; 16]));
        let mut length = 0;
        // SAFETY: the buffer has the length that is told and the alignment of the structure.
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
        Ok(text_of(&Local(text.cast())))
    }
}

/// Whether something that bears a name was made by us, an administrator or the system.
pub(super) fn is_trusted(object: &OwnedHandle) -> io::Result<bool> {
    let (mut owner, mut descriptor): (PSID, PSECURITY_DESCRIPTOR) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the handle is open, and the results outlive the call; the owner points into the descriptor, which is freed below.
    let failed = unsafe {
        GetSecurityInfo(
            object.as_raw_handle(),
            SE_KERNEL_OBJECT,
            OWNER_SECURITY_INFORMATION,
            &mut owner,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            &mut descriptor,
        )
    };
    if failed != ERROR_SUCCESS {
        return Err(io::Error::from_raw_os_error(failed as i32));
    }
    let _descriptor = Local(descriptor);
    let user = OwnUser::get()?;
    // SAFETY: both identifiers are valid and live until the end of this function.
    Ok(unsafe {
        EqualSid(owner, user.sid()) != 0
            || IsWellKnownSid(owner, WinBuiltinAdministratorsSid) != 0
            || IsWellKnownSid(owner, WinLocalSystemSid) != 0
    })
}

/// The access list of something, as text.
#[cfg(test)]
pub(super) fn access_list(object: &OwnedHandle) -> io::Result<String> {
    use windows_sys::Win32::Security::Authorization::ConvertSecurityDescriptorToStringSecurityDescriptorW;
    use windows_sys::Win32::Security::DACL_SECURITY_INFORMATION;

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
    let descriptor = Local(descriptor);
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
    if done == 0 { Err(io::Error::last_os_error()) } else { Ok(text_of(&Local(text.cast()))) }
}
