//! An executable for Windows that can be killed at each of its steps: before a call that changes something outside of its memory.
//!
//! ```text
//! aops.exe ──imports──▶ kernel32.dll, ntdll.dll, advapi32.dll       as it is handed out
//! aops.exe ──imports──▶ aopsst32.dll, aopst.dll, aopsad32.dll       here: names of the same length in its import table
//!                           │  steps.c: counts the call, and perhaps ends the process
//!                           ╰──forwards──▶ kernel32.dll, ntdll.dll, advapi32.dll
//! ```
//!
//! Every function that the executable imports from these libraries is in one of the two lists below; one in neither fails the task. The other
//! libraries are about the network, certificates, memory, the user's folders and the C runtime, whose output is the console. What is found by
//! name at run time (`GetProcAddress`) is not seen: the standard library finds functions of newer systems so, and the helper that closes
//! windows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command::{read, run_quietly};
use crate::workspace;

/// The libraries, and what replaces their names.
const LIBRARIES: [(&str, &str); 3] =
    [("kernel32.dll", "aopsst32.dll"), ("ntdll.dll", "aopst.dll"), ("advapi32.dll", "aopsad32.dll")];
/// The one that has the hooks.
const HOOKS: &str = "aopsst32.dll";

/// Functions that change something: `hook_<name>` in steps.c. Of events, the hooks have to know those that other processes wait for.
const STEPS: &str = "\
    AssignProcessToJobObject ChangeServiceConfig2W ChangeServiceConfigW ControlService CopyFileExW CreateDirectoryW CreateEventW \
    CreateFileW CreateHardLinkW CreateProcessW CreateServiceW CreateSymbolicLinkW DeleteFileW DeleteService DuplicateHandle \
    ExitProcess GenerateConsoleCtrlEvent MoveFileExW NtWriteFile OpenEventW RegCreateKeyExW RegCreateKeyTransactedW \
    RegDeleteTreeW RegSetKeyValueW RemoveDirectoryW ResumeThread SetEvent SetFileAttributesW SetFileInformationByHandle \
    SetFileSecurityW SetFileTime SetInformationJobObject SetServiceStatus StartServiceW TerminateJobObject TerminateProcess \
";
/// Functions that change nothing that outlives the process: they read, wait, or change its own memory, handles, locks, pipes and console.
/// `FlushFileBuffers` matters at a power cut only, and Wine's files survive one; entries of the event log are for people.
const HARMLESS: &str = "\
    AcquireSRWLockExclusive AddVectoredExceptionHandler AttachConsole CancelIo CancelIoEx CheckTokenMembership CloseHandle \
    CloseServiceHandle CompareStringOrdinal ConnectNamedPipe ConvertSidToStringSidW \
    ConvertStringSecurityDescriptorToSecurityDescriptorW CreateConsoleScreenBuffer CreateIoCompletionPort CreateJobObjectW \
    CreateNamedPipeW CreatePipe CreateSemaphoreA CreateThread CreateToolhelp32Snapshot CreateWaitableTimerExW CreateWellKnownSid \
    DeleteCriticalSection DeleteProcThreadAttributeList DeregisterEventSource DeviceIoControl DisconnectNamedPipe \
    EnterCriticalSection EnumServicesStatusExW EqualSid FillConsoleOutputAttribute FillConsoleOutputCharacterA FindClose \
    FindFirstFileExW FindNextFileW FlushFileBuffers FormatMessageW FreeEnvironmentStringsW GetACP GetAce GetCommandLineW \
    GetComputerNameExW GetConsoleCursorInfo GetConsoleMode GetConsoleProcessList GetConsoleScreenBufferInfo \
    GetCurrentConsoleFont GetCurrentDirectoryW GetCurrentProcess GetCurrentProcessId GetCurrentThread GetCurrentThreadId \
    GetDiskFreeSpaceExW GetEnvironmentStringsW GetEnvironmentVariableW GetExitCodeProcess GetFileAttributesW \
    GetFileInformationByHandle GetFileInformationByHandleEx GetFileSizeEx GetFileType GetFinalPathNameByHandleW GetFullPathNameW \
    GetLargestConsoleWindowSize GetLastError GetModuleFileNameW GetModuleHandleA GetModuleHandleW GetNamedPipeInfo \
    GetNumberOfConsoleInputEvents GetOverlappedResult GetProcAddress GetProcessHeap GetProcessId GetProcessTimes \
    GetQueuedCompletionStatusEx GetSecurityInfo GetStartupInfoA GetStdHandle GetSystemDirectoryW GetSystemInfo \
    GetSystemTimeAsFileTime GetTempPathW GetTickCount64 GetTokenInformation GetWindowsDirectoryW HeapAlloc HeapFree HeapReAlloc \
    InitOnceBeginInitialize InitOnceComplete InitializeCriticalSection InitializeProcThreadAttributeList IsWellKnownSid \
    IsWow64Process LeaveCriticalSection LoadLibraryExA LoadLibraryExW LoadLibraryW LocalFree LockFileEx MultiByteToWideChar \
    NtCancelIoFileEx NtCreateFile NtCreateNamedPipeFile NtDeviceIoControlFile NtOpenDirectoryObject NtOpenFile \
    NtQueryDirectoryObject NtQuerySystemInformation NtReadFile OpenJobObjectW OpenProcess OpenProcessToken OpenSCManagerW \
    OpenServiceW OpenThread PostQueuedCompletionStatus Process32FirstW Process32NextW QueryFullProcessImageNameW \
    QueryInformationJobObject QueryPerformanceCounter QueryPerformanceFrequency QueryServiceConfig2W QueryServiceConfigW \
    QueryServiceStatusEx RaiseException ReOpenFile ReadConsoleInputW ReadConsoleW ReadFile ReadFileEx RegCloseKey RegEnumKeyExW \
    RegEnumValueW RegOpenKeyExW RegOpenKeyTransactedW RegQueryInfoKeyW RegQueryValueExW RegisterEventSourceW \
    RegisterServiceCtrlHandlerExW RegisterWaitForSingleObject ReleaseSRWLockExclusive ReleaseSemaphore ReportEventW ResetEvent \
    RtlCaptureContext RtlLookupFunctionEntry RtlNtStatusToDosError RtlUnwindEx RtlVirtualUnwind SetConsoleActiveScreenBuffer \
    SetConsoleCtrlHandler SetConsoleCursorInfo SetConsoleCursorPosition SetConsoleMode SetConsoleScreenBufferSize \
    SetConsoleTextAttribute SetConsoleWindowInfo SetCurrentDirectoryW SetEnvironmentVariableW SetFileCompletionNotificationModes \
    SetFilePointerEx SetHandleInformation SetLastError SetThreadStackGuarantee SetUnhandledExceptionFilter SetWaitableTimer \
    Sleep SleepConditionVariableSRW SleepEx StartServiceCtrlDispatcherW SwitchToThread SystemFunction036 Thread32First \
    Thread32Next TlsAlloc TlsFree TlsGetValue TlsSetValue TryAcquireSRWLockExclusive UnlockFile UnregisterWaitEx \
    UpdateProcThreadAttribute VirtualProtect VirtualQuery WaitForMultipleObjects WaitForSingleObject WaitNamedPipeW \
    WakeAllConditionVariable WakeConditionVariable WideCharToMultiByte WriteConsoleW WriteFile WriteFileEx __C_specific_handler \
    lstrlenW \
";

/// Compiles the libraries into `programs`, and changes the executable `aops.exe` there so that it imports from them.
pub(super) fn equip(programs: &Path) -> Result<()> {
    let executable = programs.join("aops.exe");
    let headers = read(Command::new("x86_64-w64-mingw32-objdump").arg("-p").arg(&executable))?;
    let imports = imports(&headers);
    let unknown: Vec<_> =
        imports.values().flatten().filter(|name| !is_listed(STEPS, name) && !is_listed(HARMLESS, name)).collect();
    ensure!(
        unknown.is_empty(),
        "cannot tell whether these functions change anything; add them to a list in xtask/src/test_windows/steps.rs: {unknown:?}"
    );
    for (library, substitute) in LIBRARIES {
        let functions = imports.get(library).with_context(|| format!("the executable does not import {library}"))?;
        let definition = programs.join(substitute).with_extension("def");
        fs::write(&definition, exports(library, substitute, functions)).context("cannot write a list of exports")?;
        let mut compiler = Command::new("x86_64-w64-mingw32-gcc");
        compiler
            .args(["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-static", "-o"])
            .arg(programs.join(substitute));
        if substitute == HOOKS {
            compiler.arg(workspace::root().join("xtask/src/test_windows/steps.c"));
        } else {
            compiler.arg("-nostdlib");
        }
        compiler.arg(&definition);
        if substitute == HOOKS {
            compiler.args(["-ladvapi32", "-lntdll"]);
        }
        run_quietly(&mut compiler)?;
    }
    let bytes = fs::read(&executable).with_context(|| format!("cannot read {}", executable.display()))?;
    fs::write(&executable, substituted(bytes)?).with_context(|| format!("cannot write {}", executable.display()))
}

/// The libraries in the import table that `objdump -p` prints, with their functions.
fn imports(headers: &str) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut found: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut library = None;
    for line in headers.lines() {
        if let Some(name) = line.trim().strip_prefix("DLL Name: ") {
            library = LIBRARIES.iter().map(|(library, _)| *library).find(|library| library.eq_ignore_ascii_case(name));
        }
        // Address, hint, name.
        if let (Some(library), [address, _, name]) = (library, line.split_whitespace().collect::<Vec<_>>().as_slice())
            && u64::from_str_radix(address, 16).is_ok()
        {
            found.entry(library).or_default().insert(name);
        }
    }
    found
}

fn is_listed(list: &str, name: &str) -> bool {
    list.split_whitespace().any(|listed| listed == name)
}

/// The exports of a substitute, for the linker: hooks, and what it forwards.
fn exports(library: &str, substitute: &str, functions: &BTreeSet<&str>) -> String {
    let module = |library: &str| library.trim_end_matches(".dll").to_owned();
    let hooks = module(HOOKS);
    let mut text = format!("LIBRARY {substitute}\nEXPORTS\n");
    for name in functions {
        text += &match (is_listed(STEPS, name), substitute == HOOKS) {
            (true, true) => format!("{name} = hook_{name}\n"),
            (true, false) => format!("{name} = {hooks}.hook_{name}\n"),
            (false, _) => format!("{name} = {}.{name}\n", module(library)),
        };
    }
    if substitute == HOOKS {
        // For the other substitutes.
        for name in STEPS.split_whitespace().filter(|name| !functions.contains(name)) {
            text += &format!("hook_{name}\n");
        }
    }
    text
}

/// The executable with the substitutes' names instead of the libraries'.
fn substituted(mut bytes: Vec<u8>) -> Result<Vec<u8>> {
    for (library, substitute) in LIBRARIES {
        // A name in the import table ends in a zero.
        let name = format!("{library}\0").into_bytes();
        let places: Vec<usize> = bytes
            .windows(name.len())
            .enumerate()
            .filter(|(_, window)| window.eq_ignore_ascii_case(&name))
            .map(|(place, _)| place)
            .collect();
        ensure!(!places.is_empty(), "the name {library} is not in the executable");
        for place in places {
            bytes.splice(place..place + substitute.len(), substitute.bytes());
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADERS: &str = "\tDLL Name: kernel32.dll\n\tvma:  Hint/Ord Member-Name Bound-To\n\t4942f0\t    0  MoveFileExW\n\
                           \t4942f4\t    0  GetACP\n\tDLL Name: ws2_32.dll\n\t4942f8\t    0  send\n";

    #[test]
    fn imports_are_hooked_or_forwarded() {
        let found = imports(HEADERS);
        let functions = &found["kernel32.dll"];
        assert_eq!((found.len(), functions.iter().copied().collect::<Vec<_>>()), (1, vec!["GetACP", "MoveFileExW"]));
        let text = exports("kernel32.dll", HOOKS, functions);
        assert!(
            text.contains("MoveFileExW = hook_MoveFileExW\n") && text.contains("GetACP = kernel32.GetACP\n"),
            "{text}"
        );
        assert!(text.contains("\nhook_NtWriteFile\n"), "{text}");
        let other = exports("ntdll.dll", "aopst.dll", &BTreeSet::from(["NtWriteFile", "NtReadFile"]));
        assert!(
            other.contains("NtWriteFile = aopsst32.hook_NtWriteFile\n") && other.contains("= ntdll.NtReadFile\n"),
            "{other}"
        );
    }

    #[test]
    fn each_function_is_in_one_list() {
        let twice: Vec<_> = STEPS.split_whitespace().filter(|name| is_listed(HARMLESS, name)).collect();
        assert!(twice.is_empty(), "{twice:?}");
    }

    #[test]
    fn the_names_of_libraries_are_replaced_in_place() {
        let before = b"kernel32.dll\0ntdll.dll\0KERNEL32.dll\0advapi32.dll\0kernel32.dlls".to_vec();
        let after = substituted(before).unwrap();
        assert_eq!(after, b"aopsst32.dll\0aopst.dll\0aopsst32.dll\0aopsad32.dll\0kernel32.dlls");
        assert!(substituted(b"kernel32.dll\0".to_vec()).is_err());
    }
}
