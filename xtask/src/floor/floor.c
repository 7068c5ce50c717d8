// The floor for `cargo xtask bench supervise`: a minimal supervisor that starts a program N times and restarts each at once when it exits.
// No logs, no records, no policy, no back-off, one thread, no heap.
//
//   floor N PROGRAM SOCKET        runs `PROGRAM SOCKET 0`, `PROGRAM SOCKET 1`, ...
//
// Needs Linux 5.3 or later (pidfd).
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

enum { MOST = 1000, AT_ONCE = 64 };

// A child: its pid, and the descriptor that becomes readable when it exits.
struct child {
    pid_t pid;
    int pidfd;
    char number[8];
};

static struct child children[MOST];
static int epoll;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

// vfork: the child borrows the memory until it execs, so nothing is copied.
static pid_t run(const char *program, const char *socket, char *number) {
    char *const arguments[] = {(char *)program, (char *)socket, number, NULL};
    char *const environment[] = {NULL};
    pid_t pid = vfork();
    if (pid == 0) {
        execve(program, arguments, environment);
        _exit(127);
    }
    return pid;
}

static void start(const char *program, const char *socket, int index) {
    struct child *child = &children[index];
    child->pid = run(program, socket, child->number);
    if (child->pid < 0)
        fail("vfork");
    child->pidfd = syscall(SYS_pidfd_open, child->pid, 0);
    if (child->pidfd < 0)
        fail("pidfd_open");
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = index};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, child->pidfd, &event) < 0)
        fail("epoll_ctl");
}

// Waits for the child first. Closing the descriptor removes it from the epoll set.
static void take_leave(int index) {
    struct child *child = &children[index];
    while (waitpid(child->pid, NULL, 0) < 0 && errno == EINTR) {
    }
    close(child->pidfd);
}

int main(int count, char **arguments) {
    if (count != 4) {
        fprintf(stderr, "usage: floor N PROGRAM SOCKET\n");
        return 2;
    }
    int wanted = atoi(arguments[1]);
    const char *program = arguments[2], *socket = arguments[3];
    if (wanted < 1 || wanted > MOST) {
        fprintf(stderr, "floor: N is from 1 to %d\n", MOST);
        return 2;
    }
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        fail("epoll_create1");
    for (int index = 0; index < wanted; index++) {
        snprintf(children[index].number, sizeof children[index].number, "%d", index);
        start(program, socket, index);
    }
    for (;;) {
        struct epoll_event ended[AT_ONCE];
        int found = epoll_wait(epoll, ended, AT_ONCE, -1);
        if (found < 0 && errno != EINTR)
            fail("epoll_wait");
        for (int at = 0; at < found; at++) {
            take_leave(ended[at].data.u32);
            start(program, socket, ended[at].data.u32);
        }
    }
}
