//! Resets everything that a new process inherits from its starter and from us, before its program runs.
//!
//! ```text
//! session               a new one, without a terminal
//! signals               none ignored, none blocked
//! umask                 022
//! descriptors           the three standard streams
//! limits (setrlimit)    those of the host's first process, which has no caller; open files 1024, at most 524288; no core files
//! priority              policy `other`, nice 0, no I/O priority of its own, every CPU and memory node that its cgroup allows
//! OOM score adjustment  0
//! others                timer slack 50 µs; randomized addresses; transparent huge pages; a session keyring of its own
//! ```
//!
//! A value that needs privileges to change (a higher priority, a higher hard limit) stays if we lack them, which is not an error. Some
//! attributes cannot be reset: user and groups, capabilities, `no_new_privs`, seccomp filters, namespaces, the security label.
//!
//! The drop-ins of `aops-spm` (`LimitNOFILE=`, `Nice=`, `OOMScoreAdjust=`) apply to the manager only; a sub-agent does not inherit them.

use std::io;
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::FdFlags;
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use super::process::User;

/// Open files. A higher soft limit harms programs that use select(2) or loop over all descriptors. Programs that need more raise it
/// themselves, up to the hard limit.
const OPEN_FILES: u64 = 1024;
/// The highest hard limit that systemd gives to services; its own is 2048 times that.
const MAX_OPEN_FILES: u64 = 512 << 10;
/// The kernel's default, nanoseconds.
const TIMER_SLACK: NonZeroU64 = NonZeroU64::new(50_000).unwrap();
/// The highest signal number of the kernel.
const LAST_SIGNAL: libc::c_int = 64;
/// personality(2): return the current value.
const QUERY: libc::c_ulong = 0xFFFF_FFFF;
/// The emulated kind of system, which a container of another word size needs. The other bits are flags for debuggers.
const KIND_MASK: libc::c_ulong = 0xFF;

/// The limits by their names in the kernel (proc_pid_limits(5)).
const LIMITS: [(&str, Resource); 16] = [
    ("Max cpu time", Resource::Cpu),
    ("Max file size", Resource::Fsize),
    ("Max data size", Resource::Data),
    ("Max stack size", Resource::Stack),
    ("Max core file size", Resource::Core),
    ("Max resident set", Resource::Rss),
    ("Max processes", Resource::Nproc),
    ("Max open files", Resource::Nofile),
    ("Max locked memory", Resource::Memlock),
    ("Max address space", Resource::As),
    ("Max file locks", Resource::Locks),
    ("Max pending signals", Resource::Sigpending),
    ("Max msgqueue size", Resource::Msgqueue),
    ("Max nice priority", Resource::Nice),
    ("Max realtime priority", Resource::Rtprio),
    ("Max realtime timeout", Resource::Rttime),
];

/// Makes a command independent of its starter: it outlives us and our terminal, and inherits only the environment, directory and standard
/// streams that the command specifies.
pub fn detach_from_caller(command: &mut Command) {
    detach(command, None);
}

/// The same, optionally as another user.
pub fn detach_from_caller_as(command: &mut Command, user: Option<User>) -> io::Result<()> {
    detach(command, user);
    Ok(())
}

fn detach(command: &mut Command, user: Option<User>) {
    let reset = InheritedReset::prepare();
    let user = user.map(|user| {
        let groups: Vec<_> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        (groups, Gid::from_raw(user.gid), Uid::from_raw(user.uid))
    });
    let in_child = move || {
        rustix::process::setsid()?;
        reset.apply();
        if let Some((groups, gid, uid)) = &user {
            set_thread_groups(groups)?;
            set_thread_gid(*gid)?;
            set_thread_uid(*uid)?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child and makes raw system calls only; everything that it uses was allocated before the fork.
    unsafe { command.pre_exec(in_child) };
}

/// The values that a child needs for the reset, prepared before it is created.
#[derive(Debug, Clone, Copy)]
pub(super) struct InheritedReset {
    limits: &'static [(Resource, Rlimit)],
}

impl InheritedReset {
    pub(super) fn prepare() -> InheritedReset {
        static LIMITS: OnceLock<Vec<(Resource, Rlimit)>> = OnceLock::new();
        // If they cannot be read, the limits are not changed.
        let read = || usual_limits(&std::fs::read_to_string("/proc/1/limits").unwrap_or_default());
        InheritedReset { limits: LIMITS.get_or_init(read) }
    }

    /// Runs in the child, after setsid, before it executes its program and before it changes its user. It allocates nothing, takes no lock,
    /// and may run in its parent's memory. A setting that is refused stays as it is.
    pub(super) fn apply(self) {
        rustix::process::umask(Mode::from_raw_mode(0o022));
        close_on_exec();
        set_priority();
        join_new_keyring();
        let _ = rustix::thread::set_current_timer_slack(Some(TIMER_SLACK));
        // SAFETY: takes and returns integers.
        unsafe {
            let personality = libc::personality(QUERY);
            if personality != -1 && personality as libc::c_ulong & !KIND_MASK != 0 {
                libc::personality(personality as libc::c_ulong & KIND_MASK);
            }
            libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0);
        }
        for (resource, limit) in self.limits {
            set_limit(*resource, *limit);
        }
        reset_signals();
    }
}

/// Sets close-on-exec on every descriptor but the standard streams. They are not closed now, since some are needed until exec.
fn close_on_exec() {
    /// close_range(2), Linux 5.11.
    const CLOEXEC: libc::c_uint = 4;
    // SAFETY: takes integers, and changes flags of our own descriptors.
    if unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, CLOEXEC) } == 0 {
        return;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(c"/proc/self/fd", flags, Mode::empty()) else { return };
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(&directory, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        let number = entry.file_name().to_bytes().iter().try_fold(0_i32, |number, digit| match digit {
            b'0'..=b'9' => number.checked_mul(10)?.checked_add(i32::from(digit - b'0')),
            _ => None,
        });
        if let Some(number) = number.filter(|number| *number > 2) {
            // SAFETY: it stays open until its flag is set; this process has no other threads.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            let _ = rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC);
        }
    }
}

/// Resets CPU, I/O and memory priority, and allows every CPU and memory node.
fn set_priority() {
    /// ioprio_set(2): this process.
    const PROCESS: libc::c_int = 1;
    let (normal, every): (libc::c_int, [usize; 128]) = (0, [usize::MAX; 128]);
    // SAFETY: takes integers, and local arrays with their sizes, which are only read.
    unsafe {
        libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_OTHER, &raw const normal);
        libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(&every), every.as_ptr());
        libc::syscall(libc::SYS_ioprio_set, PROCESS, 0, 0);
        libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_DEFAULT, std::ptr::null::<libc::c_ulong>(), 0);
    }
    let _ = rustix::process::setpriority_process(None, 0);
    if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::io::write(&file, b"0");
    }
}

/// Starts a new session keyring: the keys of a login session are not passed on.
fn join_new_keyring() {
    /// keyctl(2).
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: without a name, the kernel creates a new keyring for this process.
    unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>()) };
}

/// Raises the hard limit where permitted; otherwise keeps it, with the soft limit at or below it.
fn set_limit(resource: Resource, wanted: Rlimit) {
    if setrlimit(resource, wanted).is_ok() {
        return;
    }
    let maximum = least(wanted.maximum, getrlimit(resource).maximum);
    let _ = setrlimit(resource, Rlimit { current: least(wanted.current, maximum), maximum });
}

/// The lower of two limits; `None` is unlimited.
fn least(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}

/// Sets every signal to its default action and unblocks it.
fn reset_signals() {
    /// Size of the kernel's signal set, bytes.
    const SET: usize = 8;
    // The C libraries reserve some signals, so the kernel is called directly; for it, all zero is the default action (`SIG_DFL`).
    let (default, none) = ([0_u64; 8], [0_u64; SET / 8]);
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: the action is larger than any of the kernel's, and only read; the call fails for KILL and STOP.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), SET);
        }
    }
    // SAFETY: a local set, which is only read.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut::<u64>(), SET);
    }
}

/// Derives the limits from those of the host's first process. It raises its own (systemd) to values that do not suit every program.
fn usual_limits(of_first: &str) -> Vec<(Resource, Rlimit)> {
    let limit = |text: &str| match text {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    let parse = |line: &str| {
        let (name, resource) = LIMITS.into_iter().find(|(name, _)| line.starts_with(name))?;
        let mut words = line[name.len()..].split_whitespace();
        let (current, maximum) = (limit(words.next()?)?, limit(words.next()?)?);
        let usual = match resource {
            Resource::Core => Rlimit { current: Some(0), maximum },
            Resource::Nofile => {
                let maximum = least(maximum, Some(MAX_OPEN_FILES));
                Rlimit { current: least(current, least(maximum, Some(OPEN_FILES))), maximum }
            }
            _ => Rlimit { current, maximum },
        };
        Some((resource, usual))
    };
    of_first.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    /// As a shell leaves it after `nohup`, `nice`, `taskset`, `ulimit`, `setarch -R` and the like.
    fn change_settings() -> io::Result<()> {
        rustix::process::umask(Mode::from_raw_mode(0o077));
        let _ = rustix::process::setpriority_process(None, 7);
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1_000_000_000));
        let small = Rlimit { current: Some(128), maximum: Some(128) };
        let file_size = Rlimit { current: Some(1 << 30), maximum: getrlimit(Resource::Fsize).maximum };
        setrlimit(Resource::Nofile, small)?;
        setrlimit(Resource::Fsize, file_size)?;
        let mut first = [0_usize; 128];
        first[0] = 1;
        // SAFETY: integers and local arrays.
        unsafe {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            libc::signal(libc::SIGQUIT, libc::SIG_IGN);
            let blocked = [1_u64 << (libc::SIGUSR1 - 1)];
            libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, blocked.as_ptr(), std::ptr::null_mut::<u64>(), 8);
            libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(&first), first.as_ptr());
            libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | 7);
            libc::personality(0x004_0000);
            // It stays open in the program.
            libc::dup2(0, 77);
        }
        std::fs::write("/proc/self/oom_score_adj", "700")
    }

    /// The output of a program that was started like this.
    fn output_of(words: &[&str], prepare: impl FnOnce(&mut Command)) -> String {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped());
        // SAFETY: the child makes system calls; no other thread of it needs the memory that it allocates.
        unsafe { command.pre_exec(change_settings) };
        prepare(&mut command);
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    fn field<'a>(text: &'a str, name: &str) -> &'a str {
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim()
    }

    fn words(text: &str, name: &str, count: usize) -> Vec<String> {
        field(text, name).split_whitespace().take(count).map(str::to_owned).collect()
    }

    #[test]
    fn nothing_of_the_caller_is_inherited() {
        let of_self = ["status", "oom_score_adj", "timerslack_ns", "personality", "limits"];
        let paths = of_self.map(|name| format!("/proc/self/{name}"));
        let command_line: Vec<&str> = ["cat"].into_iter().chain(paths.iter().map(String::as_str)).collect();
        let (inherited, clean) = (output_of(&command_line, |_| {}), output_of(&command_line, detach_from_caller));
        // The settings are visible without the reset.
        let bits = |text: &str, name: &str| u64::from_str_radix(field(text, name), 16).unwrap();
        assert_eq!((bits(&inherited, "SigIgn:") & 5, bits(&inherited, "SigBlk:") & 0x200), (5, 0x200));
        assert_eq!((bits(&clean, "SigIgn:"), bits(&clean, "SigBlk:")), (0, 0));
        let of_first = std::fs::read_to_string("/proc/1/status").unwrap();
        assert_eq!(field(&inherited, "Cpus_allowed_list:"), "0");
        assert_eq!(field(&clean, "Cpus_allowed_list:"), field(&of_first, "Cpus_allowed_list:"));
        let has = |text: &str, line: &str| text.lines().any(|found| found == line);
        for (left, reset) in
            [("Umask:\t0077", "Umask:\t0022"), ("700", "0"), ("1000000000", "50000"), ("00040000", "00000000")]
        {
            assert!(has(&inherited, left) && !has(&inherited, reset), "{left}: {inherited}");
            assert!(has(&clean, reset) && !has(&clean, left), "{reset}: {clean}");
        }
        let limits = std::fs::read_to_string("/proc/1/limits").unwrap();
        let size = |text: &str| words(text, "Max file size", 1);
        assert_eq!((size(&inherited) == size(&limits), size(&clean)), (false, size(&limits)));
        assert_eq!(words(&clean, "Max core file size", 1), ["0"]);
        let usual = usual_limits(&limits).into_iter().find(|(resource, _)| *resource == Resource::Nofile).unwrap().1;
        let usual = [usual.current, usual.maximum].map(|limit| limit.unwrap().to_string());
        // Raising it needs this capability, which root may lack (capabilities(7)).
        let may_raise = bits(&clean, "CapEff:") & 1 << 24 != 0;
        let expected = if may_raise { usual } else { ["128", "128"].map(str::to_owned) };
        assert_eq!(words(&clean, "Max open files", 2), expected);
        if bits(&clean, "CapEff:") & 1 << 23 != 0 {
            let nice = |prepare: fn(&mut Command)| output_of(&["nice"], prepare).trim().to_owned();
            assert_eq!((nice(|_| {}), nice(detach_from_caller)), ("7".to_owned(), "0".to_owned()));
        }
        let open = |prepare: fn(&mut Command)| has(&output_of(&["ls", "/proc/self/fd"], prepare), "77");
        assert_eq!((open(|_| {}), open(detach_from_caller)), (true, false));
    }

    #[test]
    fn limits_are_those_of_the_first_process_with_open_files_capped() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max file size             unlimited            unlimited            bytes     \n\
                    Max stack size            8388608              unlimited            bytes     \n\
                    Max core file size        unlimited            unlimited            bytes     \n\
                    Max open files            1073741816           1073741816           files     \n\
                    Max unknown               1                    2                    \n";
        let limit = |current, maximum| Rlimit { current, maximum };
        let expected = [
            (Resource::Fsize, limit(None, None)),
            (Resource::Stack, limit(Some(8 << 20), None)),
            (Resource::Core, limit(Some(0), None)),
            (Resource::Nofile, limit(Some(1024), Some(512 << 10))),
        ];
        assert_eq!(usual_limits(text), expected);
        let container = "Max open files            200                  300                  files     \n";
        assert_eq!(usual_limits(container), [(Resource::Nofile, limit(Some(200), Some(300)))]);
    }
}
