/*
 * Windows programs for scenarios, in one executable:
 *
 *   PROGRAM.exe                         runs PROGRAM.script, which lies beside it: a few statements of the shell, see `run`
 *   control.exe VERB                    the `control` of a package: NAME.exe of its `bin` in the background, its pid in var\app.pid
 *   PROGRAM.exe service NAME            a service, which runs until it is stopped
 *   tool.exe kill PID                   as `kill -KILL`
 *   tool.exe alive PID                  exit code 0: it runs
 *   tool.exe hold FILE                  keeps a file open, as a virus scanner does, until its input ends
 *   tool.exe wait                       runs until its input ends
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

static char script[65536];
static int ignores_stop;

static BOOL WINAPI on_event(DWORD event)
{
    (void)event;
    if (!ignores_stop)
        ExitProcess(0);
    return TRUE;
}

/* Waits for that many seconds, or until the stop event of the sub-agent is set. */
static void sleep_seconds(double seconds)
{
    char name[512];
    HANDLE event = NULL;
    DWORD left = seconds > 4e6 ? INFINITE : (DWORD)(seconds * 1000);
    if (!ignores_stop && GetEnvironmentVariableA("AOPS_STOP_EVENT", name, sizeof name) > 0)
        event = OpenEventA(SYNCHRONIZE, FALSE, name);
    if (event == NULL)
        Sleep(left);
    else if (WaitForSingleObject(event, left) == WAIT_OBJECT_0)
        ExitProcess(0);
}

static char *next_statement(char **rest)
{
    char *start = *rest;
    while (*start == ' ' || *start == ';' || *start == '\n' || *start == '\r')
        start++;
    if (*start == 0)
        return NULL;
    char *end = start + strcspn(start, ";\n");
    *rest = *end ? end + 1 : end;
    *end = 0;
    return start;
}

/* `sleep N`, `exec sleep N`, `exit N`, `echo TEXT`, `trap '' TERM`, `while :` (the rest for ever). Anything else is an error. */
static int run(char *text)
{
    char *rest = text, *statement, *loop = NULL, copy[65536];
    while ((statement = next_statement(&rest)) != NULL || loop != NULL) {
        if (statement == NULL) {
            strcpy(copy, loop);
            rest = copy;
            continue;
        }
        if (strncmp(statement, "do ", 3) == 0)
            statement += 3;
        if (strncmp(statement, "exec ", 5) == 0)
            statement += 5;
        if (strncmp(statement, "#!", 2) == 0 || strcmp(statement, "done") == 0)
            continue;
        if (strncmp(statement, "sleep ", 6) == 0) {
            sleep_seconds(atof(statement + 6));
        } else if (strncmp(statement, "exit ", 5) == 0) {
            return atoi(statement + 5);
        } else if (strncmp(statement, "echo ", 5) == 0) {
            puts(statement + 5);
            fflush(stdout);
        } else if (strcmp(statement, "trap '' TERM") == 0) {
            ignores_stop = 1;
        } else if (strcmp(statement, "while :") == 0) {
            loop = _strdup(rest);
        } else {
            fprintf(stderr, "cannot run this statement: %s\n", statement);
            return 127;
        }
    }
    return 0;
}

static int run_script(const char *path)
{
    char name[MAX_PATH * 2];
    snprintf(name, sizeof name, "%s", path);
    strcpy(strrchr(name, '.'), ".script");
    FILE *file = fopen(name, "rb");
    if (file == NULL) {
        fprintf(stderr, "cannot open %s\n", name);
        return 126;
    }
    script[fread(script, 1, sizeof script - 1, file)] = 0;
    fclose(file);
    SetConsoleCtrlHandler(on_event, TRUE);
    return run(script);
}

static DWORD read_pid(void)
{
    unsigned long pid = 0;
    FILE *file = fopen("var\\app.pid", "r");
    if (file == NULL)
        return 0;
    if (fscanf(file, "%lu", &pid) != 1)
        pid = 0;
    fclose(file);
    return pid;
}

static int is_alive(DWORD pid)
{
    HANDLE process = pid ? OpenProcess(SYNCHRONIZE, FALSE, pid) : NULL;
    int alive = process != NULL && WaitForSingleObject(process, 0) == WAIT_TIMEOUT;
    if (process != NULL)
        CloseHandle(process);
    return alive;
}

static int end(DWORD pid)
{
    HANDLE process = pid ? OpenProcess(PROCESS_TERMINATE | SYNCHRONIZE, FALSE, pid) : NULL;
    if (process == NULL)
        return 1;
    int done = TerminateProcess(process, 137);
    WaitForSingleObject(process, 10000);
    CloseHandle(process);
    return !done;
}

static int start(void)
{
    WIN32_FIND_DATAA found;
    char path[MAX_PATH], line[2 * MAX_PATH];
    STARTUPINFOA startup = {.cb = sizeof startup};
    PROCESS_INFORMATION process;
    if (is_alive(read_pid())) {
        puts("it is running already");
        return 0;
    }
    HANDLE search = FindFirstFileA("bin\\*.exe", &found);
    if (search == INVALID_HANDLE_VALUE)
        return 1;
    FindClose(search);
    GetFullPathNameA("bin", sizeof path, path, NULL);
    snprintf(line, sizeof line, "%s\\%s", path, found.cFileName);
    if (!CreateProcessA(NULL, line, NULL, NULL, FALSE, CREATE_NO_WINDOW, NULL, NULL, &startup, &process)) {
        fprintf(stderr, "cannot start %s: %lu\n", line, GetLastError());
        return 1;
    }
    CreateDirectoryA("var", NULL);
    FILE *file = fopen("var\\app.pid", "w");
    fprintf(file, "%lu", process.dwProcessId);
    fclose(file);
    puts("started...");
    return 0;
}

static int stop(void)
{
    end(read_pid());
    DeleteFileA("var\\app.pid");
    puts("stoped...");
    return 0;
}

static int control(const char *verb)
{
    if (strcmp(verb, "start") == 0)
        return start();
    if (strcmp(verb, "stop") == 0)
        return stop();
    if (strcmp(verb, "restart") == 0)
        return stop() || start();
    if (strcmp(verb, "status") == 0)
        return puts(is_alive(read_pid()) ? "started" : "stoped") < 0;
    if (strcmp(verb, "pid") == 0)
        return printf("%lu\n", read_pid()) < 0;
    fprintf(stderr, "control start|stop|restart|status|pid\n");
    return 1;
}

static const char *service_name;
static HANDLE service_stop;
static SERVICE_STATUS_HANDLE service_handle;

static void report(DWORD state)
{
    SERVICE_STATUS status = {
        .dwServiceType = SERVICE_WIN32_OWN_PROCESS,
        .dwCurrentState = state,
        .dwControlsAccepted = state == SERVICE_RUNNING ? SERVICE_ACCEPT_STOP : 0,
    };
    SetServiceStatus(service_handle, &status);
}

static DWORD WINAPI on_control(DWORD control, DWORD type, LPVOID data, LPVOID context)
{
    (void)type;
    (void)data;
    (void)context;
    if (control == SERVICE_CONTROL_STOP)
        SetEvent(service_stop);
    return NO_ERROR;
}

static void WINAPI service_main(DWORD count, LPSTR *words)
{
    (void)count;
    (void)words;
    service_handle = RegisterServiceCtrlHandlerExA(service_name, on_control, NULL);
    report(SERVICE_RUNNING);
    WaitForSingleObject(service_stop, INFINITE);
    report(SERVICE_STOPPED);
}

static int run_service(char *name)
{
    SERVICE_TABLE_ENTRYA table[] = { { name, service_main }, { NULL, NULL } };
    service_name = name;
    service_stop = CreateEventA(NULL, TRUE, FALSE, NULL);
    return !StartServiceCtrlDispatcherA(table);
}

int main(int argc, char **argv)
{
    char path[MAX_PATH];
    GetModuleFileNameA(NULL, path, sizeof path);
    const char *name = strrchr(path, '\\') + 1;
    if (_stricmp(name, "control.exe") == 0)
        return control(argc > 1 ? argv[1] : "");
    if (_stricmp(name, "tool.exe") != 0 && argc == 3 && strcmp(argv[1], "service") == 0)
        return run_service(argv[2]);
    if (_stricmp(name, "tool.exe") != 0)
        return run_script(path);
    if (argc == 3 && strcmp(argv[1], "kill") == 0)
        return end(strtoul(argv[2], NULL, 10));
    if (argc == 3 && strcmp(argv[1], "alive") == 0)
        return !is_alive(strtoul(argv[2], NULL, 10));
    if (argc == 3 && strcmp(argv[1], "hold") == 0) {
        HANDLE file = CreateFileA(argv[2], GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, 0, NULL);
        if (file == INVALID_HANDLE_VALUE)
            return 1;
        puts("holding");
    } else if (argc == 2 && strcmp(argv[1], "wait") == 0) {
        puts("ready");
    } else {
        return 2;
    }
    fflush(stdout);
    while (getchar() != EOF)
        continue;
    return 0;
}
