/* Runs a program as on Linux 3.10: each system call that was added later fails with ENOSYS, for it and everything that it starts, 64-bit
 * and 32-bit; and there is no cgroup v2.
 *
 *   old_kernel PROGRAM ARGUMENT...
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <unistd.h>

/* The numbers grow with time; finit_module was the last one before 3.10. */
#define LAST_64 313
#define LAST_32 350
/* Calls of the x32 ABI have this bit, as does the number of a call that a tracer has skipped. */
#define X32_BIT 0x40000000

static void fail(const char *what) {
    fprintf(stderr, "old_kernel: cannot %s: %s\n", what, strerror(errno));
    exit(125);
}

static void detach_cgroup2(void) {
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    char line[4096], target[4096];
    if (!mounts) fail("read the mounts");
    while (fgets(line, sizeof line, mounts)) {
        const char *type = strstr(line, " - ");
        if (type && !strncmp(type, " - cgroup2 ", 11) && sscanf(line, "%*s %*s %*s %*s %4095s", target) == 1 && umount2(target, MNT_DETACH))
            fail("detach cgroup v2");
    }
    fclose(mounts);
}

int main(int count, char **words) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_I386, 0, 2),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, LAST_32, 2, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, LAST_64, 0, 2),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof code / sizeof *code, code};
    if (count < 2) {
        fprintf(stderr, "usage: old_kernel PROGRAM ARGUMENT...\n");
        return 125;
    }
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) fail("create a mount namespace");
    detach_cgroup2();
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) fail("filter system calls");
    execvp(words[1], words + 1);
    fail("run the program");
}
