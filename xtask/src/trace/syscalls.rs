//! The system calls of x86-64 Linux, sorted by one question: can a process that is killed before this call leave the host in another state
//! than one that is killed after it?
//!
//! Locks, messages and waits change nothing that lasts, and are listed for the order of what does.
//!
//! [`kind`] knows every call that aops makes. An unknown one is an error of the run and not taken for harmless, so the enumeration of steps
//! cannot miss a call that somebody adds later.

use std::os::raw::c_long;

use nix::libc;

use self::Place::{At, Path};

/// The arguments that name a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A path in this argument, relative to the working directory.
    Path(usize),
    /// A directory's descriptor and a path, beginning with this argument.
    At(usize),
}

/// What a call does, and the arguments that name what it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Reads, waits, or changes memory and descriptors of the process itself.
    Harmless,
    /// Opens a path: a step if it may write. The arguments are a directory's descriptor, a path, flags.
    Open,
    /// `openat2`: the flags are behind a pointer.
    Open2,
    /// Creates a file.
    Create(Place),
    /// Creates a directory.
    Directory(Place),
    /// Removes a name.
    Remove(Place),
    /// From the first to the second.
    Rename(Place, Place),
    /// A second name of the first.
    Link(Place, Place),
    /// A link with the target in this argument.
    SymbolicLink(usize, Place),
    /// Changes mode, owner, size, times or attributes of a path.
    Metadata(Place),
    /// The content or the metadata of the file behind the descriptor in this argument.
    Write(usize),
    /// Syncs the file behind the descriptor in this argument, or its file system.
    Sync(usize),
    SyncFileSystem(usize),
    /// Locks the file behind the descriptor in this argument: gone with its process.
    Lock(usize),
    /// Sends through the socket in this argument.
    Message(usize),
    /// Waits for another thread, or wakes one.
    Futex,
    /// Creates a process, unless the flags ask for a thread.
    Clone,
    Clone3,
    Fork,
    /// Replaces the program.
    Execute(usize),
    /// Sends a signal.
    Signal,
    /// The process exits.
    Exit,
}

/// What a system call does; `None` if it is not in the lists.
pub(super) fn kind(number: c_long) -> Option<Kind> {
    if HARMLESS.contains(&number) {
        return Some(Kind::Harmless);
    }
    STEPS.iter().find(|(step, ..)| *step == number).map(|(_, _, kind)| *kind)
}

/// The name of a call.
pub(super) fn name(number: c_long) -> &'static str {
    STEPS.iter().find(|(step, ..)| *step == number).map_or("?", |(_, name, _)| *name)
}

macro_rules! steps {
    ($($call:ident $name:literal $kind:expr;)*) => {
        const STEPS: &[(c_long, &str, Kind)] = &[$((libc::$call, $name, $kind),)*];
    };
}

steps! {
    SYS_open "open" Kind::Open;
    SYS_openat "openat" Kind::Open;
    SYS_openat2 "openat2" Kind::Open2;
    SYS_creat "creat" Kind::Create(Path(0));
    SYS_mkdir "mkdir" Kind::Directory(Path(0));
    SYS_mkdirat "mkdirat" Kind::Directory(At(0));
    SYS_mknod "mknod" Kind::Create(Path(0));
    SYS_mknodat "mknodat" Kind::Create(At(0));
    SYS_rmdir "rmdir" Kind::Remove(Path(0));
    SYS_unlink "unlink" Kind::Remove(Path(0));
    SYS_unlinkat "unlinkat" Kind::Remove(At(0));
    SYS_rename "rename" Kind::Rename(Path(0), Path(1));
    SYS_renameat "renameat" Kind::Rename(At(0), At(2));
    SYS_renameat2 "renameat2" Kind::Rename(At(0), At(2));
    SYS_link "link" Kind::Link(Path(0), Path(1));
    SYS_linkat "linkat" Kind::Link(At(0), At(2));
    SYS_symlink "symlink" Kind::SymbolicLink(0, Path(1));
    SYS_symlinkat "symlinkat" Kind::SymbolicLink(0, At(1));
    SYS_chmod "chmod" Kind::Metadata(Path(0));
    SYS_fchmodat "fchmodat" Kind::Metadata(At(0));
    SYS_chown "chown" Kind::Metadata(Path(0));
    SYS_lchown "lchown" Kind::Metadata(Path(0));
    SYS_fchownat "fchownat" Kind::Metadata(At(0));
    SYS_truncate "truncate" Kind::Metadata(Path(0));
    SYS_utimensat "utimensat" Kind::Metadata(At(0));
    SYS_setxattr "setxattr" Kind::Metadata(Path(0));
    SYS_lsetxattr "lsetxattr" Kind::Metadata(Path(0));
    SYS_write "write" Kind::Write(0);
    SYS_writev "writev" Kind::Write(0);
    SYS_pwrite64 "pwrite64" Kind::Write(0);
    SYS_pwritev "pwritev" Kind::Write(0);
    SYS_pwritev2 "pwritev2" Kind::Write(0);
    SYS_sendfile "sendfile" Kind::Write(0);
    SYS_copy_file_range "copy_file_range" Kind::Write(2);
    SYS_ftruncate "ftruncate" Kind::Write(0);
    SYS_fallocate "fallocate" Kind::Write(0);
    SYS_fchmod "fchmod" Kind::Write(0);
    SYS_fchown "fchown" Kind::Write(0);
    SYS_fsetxattr "fsetxattr" Kind::Write(0);
    SYS_fsync "fsync" Kind::Sync(0);
    SYS_fdatasync "fdatasync" Kind::Sync(0);
    SYS_syncfs "syncfs" Kind::SyncFileSystem(0);
    SYS_sync_file_range "sync_file_range" Kind::Sync(0);
    SYS_clone "clone" Kind::Clone;
    SYS_clone3 "clone3" Kind::Clone3;
    SYS_fork "fork" Kind::Fork;
    SYS_vfork "vfork" Kind::Fork;
    SYS_execve "execve" Kind::Execute(0);
    SYS_execveat "execveat" Kind::Execute(1);
    SYS_kill "kill" Kind::Signal;
    SYS_tkill "tkill" Kind::Signal;
    SYS_tgkill "tgkill" Kind::Signal;
    SYS_pidfd_send_signal "pidfd_send_signal" Kind::Signal;
    SYS_exit_group "exit_group" Kind::Exit;
    SYS_flock "flock" Kind::Lock(0);
    SYS_sendto "sendto" Kind::Message(0);
    SYS_sendmsg "sendmsg" Kind::Message(0);
    SYS_sendmmsg "sendmmsg" Kind::Message(0);
    SYS_futex "futex" Kind::Futex;
}

const HARMLESS: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_stat,
    libc::SYS_fstat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getdents,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_lseek,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_listxattr,
    libc::SYS_name_to_handle_at,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_mincore,
    libc::SYS_memfd_create,
    libc::SYS_membarrier,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigpending,
    libc::SYS_sigaltstack,
    libc::SYS_pause,
    // Requests to devices and sockets; aops clones no file by ioctl.
    libc::SYS_ioctl,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_getparam,
    libc::SYS_sched_setparam,
    libc::SYS_sched_getattr,
    libc::SYS_sched_setattr,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_getpriority,
    libc::SYS_setpriority,
    libc::SYS_ioprio_get,
    libc::SYS_ioprio_set,
    libc::SYS_set_mempolicy,
    libc::SYS_get_mempolicy,
    libc::SYS_getcpu,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_times,
    libc::SYS_getitimer,
    libc::SYS_setitimer,
    libc::SYS_alarm,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setpgid,
    libc::SYS_getpgid,
    libc::SYS_getpgrp,
    libc::SYS_setsid,
    libc::SYS_getsid,
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrlimit,
    libc::SYS_setrlimit,
    libc::SYS_prlimit64,
    libc::SYS_getrusage,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_prctl,
    libc::SYS_arch_prctl,
    libc::SYS_seccomp,
    libc::SYS_keyctl,
    libc::SYS_personality,
    libc::SYS_getrandom,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_restart_syscall,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_vm_readv,
    // The end of one thread; a process ends by exit_group.
    libc::SYS_exit,
    // To bind a Unix socket creates a file, in the home's run/: listed with its name as the unlink before it is.
    libc::SYS_bind,
];
