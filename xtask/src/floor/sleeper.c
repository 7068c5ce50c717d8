// The program that every supervisor of `cargo xtask bench` keeps running: it reports its start and then sleeps until it is stopped, and reports
// that. It reads the clock first, so that sending the report is not measured.
//
//   sleeper SOCKET NAME       or without arguments: BENCH_SOCKET, and the name of the working directory
//
// One datagram goes to the socket: name, pid, nanoseconds of the monotonic clock, `start` or `end`. A killed one reports no end.
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static struct sockaddr_un address = {.sun_family = AF_UNIX};
static const char *name;

static int report(struct timespec now, const char *what) {
    char text[256];
    long long nanoseconds = now.tv_sec * 1000000000LL + now.tv_nsec;
    int length = snprintf(text, sizeof text, "%s %d %lld %s", name, getpid(), nanoseconds, what);
    int out = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (length >= (int)sizeof text || sendto(out, text, length, 0, (struct sockaddr *)&address, sizeof address) != length)
        return 1;
    close(out);
    return 0;
}

int main(int count, char **arguments) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    char directory[4096] = "";
    const char *path = count > 2 ? arguments[1] : getenv("BENCH_SOCKET");
    name = arguments[count > 2 ? 2 : 0];
    if (count <= 2 && getcwd(directory, sizeof directory))
        name = strrchr(directory, '/') + 1;
    if (!path || strlen(path) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, path);
    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);
    if (report(now, "start"))
        return 1;
    int signal;
    while (sigwait(&stop, &signal)) {
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    return report(now, "end");
}
