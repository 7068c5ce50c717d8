/*
 * Kills a program at one of its steps: before a call that changes something outside of its memory.
 *
 * The executable under test imports these functions instead of those of kernel32, ntdll and advapi32, whose other functions are forwarded
 * (steps.rs writes the lists of exports). Each hook is called `hook_` and the function's name; it counts the call, and passes it on.
 *
 *   E:\steps        shared with the test, see `struct shared`; a host without it runs as usual
 *   E:\steps.log    while `recording` is set, a line for each step: role, number, function, path
 */
#include <stdio.h>
#include <string.h>
#include <wchar.h>
#include <windows.h>
#include <winternl.h>

enum { MANAGER, WATCHDOG, OTHER, ROLES };

/* Little-endian 32-bit words; tests/suite/on_windows/steps.rs has the same list. */
struct shared {
    volatile LONG recording;
    /* The process to kill: its role, and the number of its step from 1; 0: none. */
    volatile LONG target_role, target_number;
    /* Kills every other process of the program, too. */
    volatile LONG together;
    /* Set by the process that is killed. */
    volatile LONG has_fired;
    /* While it is set, each process of the program ends at its next step. */
    volatile LONG halted;
    volatile LONG counts[ROLES];
    volatile LONG pids[ROLES];
};

static struct shared *shared;
static HANDLE steps_log = INVALID_HANDLE_VALUE;
static HANDLE log_lock;
static int role = OTHER;
static const char *const role_names[] = { "spm", "spa", "other" };

/* Handles of events that other processes wait for. */
static HANDLE named_events[64];
static volatile LONG event_count;

/* Of the writes to a file only the first two count: the others are alike. */
static wchar_t last_written[512];
static volatile LONG written;

static void kill_process(DWORD pid)
{
    HANDLE process = OpenProcess(PROCESS_TERMINATE, FALSE, pid);
    if (process != NULL) {
        TerminateProcess(process, 137);
        CloseHandle(process);
    }
}

static void step(const char *function, const wchar_t *path)
{
    if (shared == NULL)
        return;
    DWORD error = GetLastError();
    if (shared->halted)
        TerminateProcess(GetCurrentProcess(), 137);
    if (!shared->recording && shared->target_number == 0) {
        SetLastError(error);
        return;
    }
    shared->pids[role] = (LONG)GetCurrentProcessId();
    LONG number = InterlockedIncrement(&shared->counts[role]);
    char line[1024];
    int length = snprintf(line, sizeof line, "%s %ld %s %ls\n", role_names[role], number, function, path ? path : L"");
    if (length > 0 && length < (int)sizeof line && steps_log != INVALID_HANDLE_VALUE) {
        /* With Wine, processes that append at the same time overwrite each other. */
        WaitForSingleObject(log_lock, INFINITE);
        WriteFile(steps_log, line, (DWORD)length, &(DWORD){ 0 }, NULL);
        ReleaseMutex(log_lock);
    }
    if (shared->target_role == role && shared->target_number == number) {
        shared->target_number = 0;
        if (shared->together) {
            shared->halted = 1;
            for (int other = 0; other < ROLES; other++)
                if (other != role && shared->pids[other] != 0)
                    kill_process((DWORD)shared->pids[other]);
        }
        shared->has_fired = 1;
        TerminateProcess(GetCurrentProcess(), 137);
    }
    SetLastError(error);
}

/* The path of a file on a disk; empty: it is something else. */
static const wchar_t *path_of(HANDLE file, wchar_t *path, DWORD length)
{
    DWORD error = GetLastError();
    path[0] = 0;
    if (GetFileType(file) == FILE_TYPE_DISK && GetFinalPathNameByHandleW(file, path, length, 0) >= length)
        path[0] = 0;
    SetLastError(error);
    return path;
}

static int is_log(const wchar_t *path)
{
    return wcsstr(path, L"\\log\\") != NULL || wcsstr(path, L"steps.log") != NULL;
}

BOOL WINAPI DllMain(HINSTANCE instance, DWORD reason, LPVOID reserved)
{
    (void)instance;
    (void)reserved;
    if (reason != DLL_PROCESS_ATTACH)
        return TRUE;
    const wchar_t *words = GetCommandLineW();
    if (wcsstr(words, L"aops-spa.exe") != NULL || wcsstr(words, L" spa ") != NULL)
        role = WATCHDOG;
    else if (wcsstr(words, L"aops-spm.exe") != NULL || wcsstr(words, L" spm ") != NULL)
        role = MANAGER;
    DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    HANDLE file = CreateFileW(L"E:\\steps", GENERIC_READ | GENERIC_WRITE, share, NULL, OPEN_EXISTING, 0, NULL);
    if (file == INVALID_HANDLE_VALUE)
        return TRUE;
    HANDLE mapping = CreateFileMappingW(file, NULL, PAGE_READWRITE, 0, sizeof *shared, NULL);
    if (mapping != NULL)
        shared = MapViewOfFile(mapping, FILE_MAP_READ | FILE_MAP_WRITE, 0, 0, sizeof *shared);
    CloseHandle(file);
    log_lock = CreateMutexW(NULL, FALSE, L"Global\\steps-of-test");
    steps_log = CreateFileW(L"E:\\steps.log", FILE_APPEND_DATA, share, NULL, OPEN_ALWAYS, 0, NULL);
    return TRUE;
}

BOOL WINAPI hook_AssignProcessToJobObject(HANDLE job, HANDLE process)
{
    step("AssignProcessToJobObject", NULL);
    return AssignProcessToJobObject(job, process);
}

BOOL WINAPI hook_CopyFileExW(LPCWSTR from, LPCWSTR to, LPPROGRESS_ROUTINE progress, LPVOID data, LPBOOL cancel, DWORD flags)
{
    step("CopyFileExW", to);
    return CopyFileExW(from, to, progress, data, cancel, flags);
}

BOOL WINAPI hook_CreateDirectoryW(LPCWSTR path, LPSECURITY_ATTRIBUTES attributes)
{
    step("CreateDirectoryW", path);
    return CreateDirectoryW(path, attributes);
}

HANDLE WINAPI hook_CreateEventW(LPSECURITY_ATTRIBUTES attributes, BOOL manual, BOOL initial, LPCWSTR name)
{
    HANDLE event = CreateEventW(attributes, manual, initial, name);
    if (event != NULL && name != NULL)
        named_events[InterlockedIncrement(&event_count) % 64] = event;
    return event;
}

HANDLE WINAPI hook_OpenEventW(DWORD access, BOOL inherit, LPCWSTR name)
{
    HANDLE event = OpenEventW(access, inherit, name);
    if (event != NULL)
        named_events[InterlockedIncrement(&event_count) % 64] = event;
    return event;
}

BOOL WINAPI hook_SetEvent(HANDLE event)
{
    for (int i = 0; i < 64; i++)
        if (named_events[i] == event) {
            step("SetEvent", NULL);
            break;
        }
    return SetEvent(event);
}

HANDLE WINAPI hook_CreateFileW(LPCWSTR path, DWORD access, DWORD share, LPSECURITY_ATTRIBUTES attributes, DWORD creation,
                               DWORD flags, HANDLE template)
{
    DWORD error = GetLastError();
    int creates = creation == CREATE_NEW || creation == CREATE_ALWAYS || creation == TRUNCATE_EXISTING ||
                  (creation == OPEN_ALWAYS && GetFileAttributesW(path) == INVALID_FILE_ATTRIBUTES);
    SetLastError(error);
    if (creates && wcsncmp(path, L"\\\\.\\", 4) != 0 && !is_log(path))
        step("CreateFileW", path);
    return CreateFileW(path, access, share, attributes, creation, flags, template);
}

BOOL WINAPI hook_CreateHardLinkW(LPCWSTR link, LPCWSTR file, LPSECURITY_ATTRIBUTES attributes)
{
    step("CreateHardLinkW", link);
    return CreateHardLinkW(link, file, attributes);
}

BOOL WINAPI hook_CreateProcessW(LPCWSTR program, LPWSTR words, LPSECURITY_ATTRIBUTES process, LPSECURITY_ATTRIBUTES thread,
                                BOOL inherit, DWORD flags, LPVOID environment, LPCWSTR directory, LPSTARTUPINFOW startup,
                                LPPROCESS_INFORMATION started)
{
    step("CreateProcessW", program != NULL ? program : words);
    return CreateProcessW(program, words, process, thread, inherit, flags, environment, directory, startup, started);
}

BOOL WINAPI hook_DeleteFileW(LPCWSTR path)
{
    step("DeleteFileW", path);
    return DeleteFileW(path);
}

BOOL WINAPI hook_DuplicateHandle(HANDLE from, HANDLE handle, HANDLE to, LPHANDLE copy, DWORD access, BOOL inherit, DWORD options)
{
    if (to != GetCurrentProcess() && GetProcessId(to) != GetCurrentProcessId())
        step("DuplicateHandle", NULL);
    return DuplicateHandle(from, handle, to, copy, access, inherit, options);
}

VOID WINAPI hook_ExitProcess(UINT code)
{
    step("ExitProcess", NULL);
    ExitProcess(code);
}

BOOL WINAPI hook_GenerateConsoleCtrlEvent(DWORD event, DWORD group)
{
    step("GenerateConsoleCtrlEvent", NULL);
    return GenerateConsoleCtrlEvent(event, group);
}

BOOL WINAPI hook_MoveFileExW(LPCWSTR from, LPCWSTR to, DWORD flags)
{
    step("MoveFileExW", to);
    return MoveFileExW(from, to, flags);
}

BOOL WINAPI hook_RemoveDirectoryW(LPCWSTR path)
{
    step("RemoveDirectoryW", path);
    return RemoveDirectoryW(path);
}

DWORD WINAPI hook_ResumeThread(HANDLE thread)
{
    step("ResumeThread", NULL);
    return ResumeThread(thread);
}

BOOL WINAPI hook_SetFileAttributesW(LPCWSTR path, DWORD attributes)
{
    step("SetFileAttributesW", path);
    return SetFileAttributesW(path, attributes);
}

BOOL WINAPI hook_SetFileInformationByHandle(HANDLE file, FILE_INFO_BY_HANDLE_CLASS class, LPVOID information, DWORD size)
{
    wchar_t path[512];
    path_of(file, path, 512);
    if (!is_log(path)) {
        char name[64];
        snprintf(name, sizeof name, "SetFileInformationByHandle(%d)", (int)class);
        step(name, path);
    }
    return SetFileInformationByHandle(file, class, information, size);
}

BOOL WINAPI hook_SetFileTime(HANDLE file, const FILETIME *created, const FILETIME *read, const FILETIME *changed)
{
    wchar_t path[512];
    step("SetFileTime", path_of(file, path, 512));
    return SetFileTime(file, created, read, changed);
}

BOOL WINAPI hook_SetInformationJobObject(HANDLE job, JOBOBJECTINFOCLASS class, LPVOID information, DWORD size)
{
    step("SetInformationJobObject", NULL);
    return SetInformationJobObject(job, class, information, size);
}

BOOL WINAPI hook_TerminateJobObject(HANDLE job, UINT code)
{
    step("TerminateJobObject", NULL);
    return TerminateJobObject(job, code);
}

BOOL WINAPI hook_TerminateProcess(HANDLE process, UINT code)
{
    step("TerminateProcess", NULL);
    return TerminateProcess(process, code);
}

NTSTATUS NTAPI NtWriteFile(HANDLE, HANDLE, PIO_APC_ROUTINE, PVOID, PIO_STATUS_BLOCK, PVOID, ULONG, PLARGE_INTEGER, PULONG);

NTSTATUS NTAPI hook_NtWriteFile(HANDLE file, HANDLE event, PIO_APC_ROUTINE routine, PVOID context, PIO_STATUS_BLOCK status,
                                PVOID buffer, ULONG length, PLARGE_INTEGER offset, PULONG key)
{
    wchar_t path[512];
    path_of(file, path, 512);
    if (path[0] != 0 && !is_log(path)) {
        if (wcscmp(path, last_written) != 0) {
            wcscpy(last_written, path);
            written = 0;
        }
        if (InterlockedIncrement(&written) <= 2)
            step("NtWriteFile", path);
    }
    return NtWriteFile(file, event, routine, context, status, buffer, length, offset, key);
}

BOOL WINAPI hook_ChangeServiceConfigW(SC_HANDLE service, DWORD type, DWORD start, DWORD errors, LPCWSTR program, LPCWSTR group,
                                      LPDWORD tag, LPCWSTR needs, LPCWSTR user, LPCWSTR password, LPCWSTR name)
{
    step("ChangeServiceConfigW", NULL);
    return ChangeServiceConfigW(service, type, start, errors, program, group, tag, needs, user, password, name);
}

BOOL WINAPI hook_ChangeServiceConfig2W(SC_HANDLE service, DWORD level, LPVOID information)
{
    step("ChangeServiceConfig2W", NULL);
    return ChangeServiceConfig2W(service, level, information);
}

BOOL WINAPI hook_ControlService(SC_HANDLE service, DWORD control, LPSERVICE_STATUS status)
{
    step("ControlService", NULL);
    return ControlService(service, control, status);
}

SC_HANDLE WINAPI hook_CreateServiceW(SC_HANDLE manager, LPCWSTR name, LPCWSTR shown, DWORD access, DWORD type, DWORD start,
                                     DWORD errors, LPCWSTR program, LPCWSTR group, LPDWORD tag, LPCWSTR needs, LPCWSTR user,
                                     LPCWSTR password)
{
    step("CreateServiceW", name);
    return CreateServiceW(manager, name, shown, access, type, start, errors, program, group, tag, needs, user, password);
}

BOOL WINAPI hook_DeleteService(SC_HANDLE service)
{
    step("DeleteService", NULL);
    return DeleteService(service);
}

BOOL WINAPI hook_SetServiceStatus(SERVICE_STATUS_HANDLE service, LPSERVICE_STATUS status)
{
    step("SetServiceStatus", NULL);
    return SetServiceStatus(service, status);
}

BOOL WINAPI hook_StartServiceW(SC_HANDLE service, DWORD count, LPCWSTR *words)
{
    step("StartServiceW", NULL);
    return StartServiceW(service, count, words);
}

BOOLEAN WINAPI hook_CreateSymbolicLinkW(LPCWSTR link, LPCWSTR target, DWORD flags)
{
    step("CreateSymbolicLinkW", link);
    return CreateSymbolicLinkW(link, target, flags);
}

BOOL WINAPI hook_SetFileSecurityW(LPCWSTR path, SECURITY_INFORMATION which, PSECURITY_DESCRIPTOR security)
{
    step("SetFileSecurityW", path);
    return SetFileSecurityW(path, which, security);
}

LSTATUS WINAPI hook_RegCreateKeyExW(HKEY parent, LPCWSTR key, DWORD reserved, LPWSTR class, DWORD options, REGSAM access,
                                    LPSECURITY_ATTRIBUTES attributes, PHKEY created, LPDWORD outcome)
{
    step("RegCreateKeyExW", key);
    return RegCreateKeyExW(parent, key, reserved, class, options, access, attributes, created, outcome);
}

LSTATUS WINAPI hook_RegCreateKeyTransactedW(HKEY parent, LPCWSTR key, DWORD reserved, LPWSTR class, DWORD options,
                                            REGSAM access, LPSECURITY_ATTRIBUTES attributes, PHKEY created, LPDWORD outcome,
                                            HANDLE transaction, PVOID more)
{
    step("RegCreateKeyTransactedW", key);
    return RegCreateKeyTransactedW(parent, key, reserved, class, options, access, attributes, created, outcome, transaction,
                                   more);
}

LSTATUS WINAPI hook_RegDeleteTreeW(HKEY parent, LPCWSTR key)
{
    step("RegDeleteTreeW", key);
    return RegDeleteTreeW(parent, key);
}

LSTATUS WINAPI hook_RegSetKeyValueW(HKEY parent, LPCWSTR key, LPCWSTR name, DWORD kind, LPCVOID data, DWORD size)
{
    step("RegSetKeyValueW", key);
    return RegSetKeyValueW(parent, key, name, kind, data, size);
}
