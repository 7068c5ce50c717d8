//! Asks programs with windows to exit. The library for windows is loaded only by the helper process that needs it: it costs every process
//! memory.

use windows_sys::Win32::Foundation::{HWND, LPARAM, WPARAM};
use windows_sys::Win32::System::LibraryLoader::{
    GetProcAddress, LOAD_LIBRARY_SEARCH_SYSTEM32, LoadLibraryExW, LoadLibraryW,
};
use windows_sys::core::BOOL;

use super::security::wide;

/// The message that a click on a window's close button sends (winuser.h).
const WM_CLOSE: u32 = 0x0010;

/// What `GetProcAddress` returns for any function.
type Found = unsafe extern "system" fn() -> isize;
type Visit = unsafe extern "system" fn(HWND, LPARAM) -> BOOL;
type EnumWindows = unsafe extern "system" fn(Visit, LPARAM) -> BOOL;
type GetWindowThreadProcessId = unsafe extern "system" fn(HWND, *mut u32) -> u32;
type PostMessageW = unsafe extern "system" fn(HWND, u32, WPARAM, LPARAM) -> BOOL;

/// The functions of user32.dll that are used here.
struct User32 {
    enumerate: EnumWindows,
    owner: GetWindowThreadProcessId,
    post: PostMessageW,
}

impl User32 {
    fn load() -> Option<User32> {
        let name = wide("user32.dll");
        // SAFETY: the name ends in a zero and outlives the calls; the library stays loaded. The types are those of the documented functions.
        unsafe {
            let nothing = std::ptr::null_mut();
            let mut library = LoadLibraryExW(name.as_ptr(), nothing, LOAD_LIBRARY_SEARCH_SYSTEM32);
            if library.is_null() {
                // Windows 7 without its updates does not know the flag.
                library = LoadLibraryW(name.as_ptr());
            }
            if library.is_null() {
                return None;
            }
            Some(User32 {
                enumerate: std::mem::transmute::<Found, EnumWindows>(GetProcAddress(
                    library,
                    c"EnumWindows".as_ptr().cast(),
                )?),
                owner: std::mem::transmute::<Found, GetWindowThreadProcessId>(GetProcAddress(
                    library,
                    c"GetWindowThreadProcessId".as_ptr().cast(),
                )?),
                post: std::mem::transmute::<Found, PostMessageW>(GetProcAddress(
                    library,
                    c"PostMessageW".as_ptr().cast(),
                )?),
            })
        }
    }
}

/// What a visit of all windows needs.
struct Search {
    user32: User32,
    pid: u32,
    found: bool,
}

/// Asks the top-level windows of a process to close; `false`: it has none on our desktop.
pub(super) fn close(pid: u32) -> bool {
    let Some(user32) = User32::load() else { return false };
    let enumerate = user32.enumerate;
    let mut search = Search { user32, pid, found: false };
    // SAFETY: the search outlives the call, which visits every window before it returns.
    unsafe { enumerate(visit, (&raw mut search) as LPARAM) };
    search.found
}

unsafe extern "system" fn visit(window: HWND, search: LPARAM) -> BOOL {
    // SAFETY: `close` passes it, and nothing else uses it meanwhile.
    let search = unsafe { &mut *(search as *mut Search) };
    let mut owner = 0;
    // SAFETY: a window that is gone is an error of the calls; the result outlives them.
    unsafe {
        (search.user32.owner)(window, &mut owner);
        if owner == search.pid {
            search.found |= (search.user32.post)(window, WM_CLOSE, 0, 0) != 0;
        }
    }
    1
}
