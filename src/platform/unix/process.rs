//! Processes: listing them, their sub-agents, signalling them and waiting for their exit.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::core::manifest::StopSignal;
use crate::platform::{ProcessInfo, ProcessMarker};

/// Poll interval for the exit of a process that is not our child, where the kernel has no pidfd.
const POLL: Duration = Duration::from_millis(250);
/// Bytes of an environment that are read: the marker is among the first variables.
const ENVIRON_LIMIT: u64 = 256 << 10;
/// Bytes of a command line that are read: only its first words are used.
const COMMAND_LIMIT: u64 = 64 << 10;

/// Start time of a live process, in clock ticks since boot; `None`: no process has this pid, or only a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    stat(pid).map(|stat| stat.start_time)
}

/// Whether the process is alive. If it cannot be inspected for lack of descriptors or memory, any process with this pid counts: a shortage
/// does not mean that it has exited.
pub fn is_alive(pid: u32, start_time: u64) -> bool {
    match stat_text(pid) {
        Ok(text) => parse_stat(&text).is_some_and(|stat| !stat.is_zombie && stat.start_time == start_time),
        Err(error) if error.kind() == io::ErrorKind::NotFound || is_gone(&error) => false,
        Err(_) => Pid::from_raw(pid as i32)
            .is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)),
    }
}

fn is_gone(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::SRCH)
}

pub(super) struct Stat {
    parent: u32,
    session: u32,
    pub(super) start_time: u64,
    /// A zombie: it has exited, and its parent has not reaped it yet.
    is_zombie: bool,
}

/// Only of a live process.
fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&stat_text(pid).ok()?).filter(|stat| !stat.is_zombie)
}

fn stat_text(pid: u32) -> io::Result<Vec<u8>> {
    let mut buffer = [0; 1024];
    let mut file = File::open(format!("/proc/{pid}/stat"))?;
    let length = file.read(&mut buffer)?;
    Ok(buffer[..length].to_vec())
}

/// Whether a process is a zombie, which `kill -0` still finds.
pub fn is_zombie(pid: u32) -> bool {
    stat_text(pid).ok().and_then(|text| parse_stat(&text)).is_some_and(|stat| stat.is_zombie)
}

/// Fields of `/proc/PID/stat` (proc(5)), counted from the last `)`: the name before it may contain any character.
pub(super) fn parse_stat(text: &[u8]) -> Option<Stat> {
    let behind = text.iter().rposition(|byte| *byte == b')')? + 1;
    let mut fields = text[behind..].split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    let state = fields.next()?;
    let parent = number(fields.next()?)? as u32;
    let session = number(fields.nth(1)?)? as u32;
    let threads = number(fields.nth(13)?)?;
    let start_time = number(fields.nth(1)?)?;
    let is_zombie = match state {
        // A main thread that has exited looks like a zombie while other threads of the process run.
        b"Z" => threads <= 1,
        b"X" | b"x" => return None,
        _ => false,
    };
    Some(Stat { parent, session, start_time, is_zombie })
}

fn number(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// Identifies the current boot: a pid and start time are only valid within it.
pub fn boot_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    let read = || fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned());
    ID.get_or_init(|| read().unwrap_or_default())
}

/// Time since boot.
pub fn uptime() -> Option<Duration> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    Some(Duration::from_secs_f64(text.split_whitespace().next()?.parse().ok()?))
}

/// Time since a process started.
pub fn age(start_time: u64) -> Option<Duration> {
    let since_boot = Duration::from_secs_f64(start_time as f64 / rustix::param::clock_ticks_per_second() as f64);
    Some(uptime()?.saturating_sub(since_boot))
}

/// Resident memory of a process, bytes.
pub fn memory_bytes(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// The working directory of a process, if readable.
pub fn working_directory(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/cwd")).ok()
}

/// The executable of a process, if readable.
pub fn executable_of(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Nothing to do: the kernel keeps it.
pub fn begin() {}

/// Opens the executable of a process, even if its file was replaced or removed.
pub fn program_of(pid: u32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/exe"))
}

/// Replaces this process with another program (exec). Returns only on failure.
pub fn become_program(command: &mut Command) -> io::Error {
    command.exec()
}

/// The first words of a process's command line: for a script, the interpreter and the script.
pub fn first_words(pid: u32, count: usize) -> Vec<PathBuf> {
    let mut text = vec![];
    let read =
        File::open(format!("/proc/{pid}/cmdline")).and_then(|file| file.take(COMMAND_LIMIT).read_to_end(&mut text));
    match read {
        Ok(_) => text.split(|byte| *byte == 0).take(count).map(|word| OsStr::from_bytes(word).into()).collect(),
        Err(_) => vec![],
    }
}

/// Every process of the host that is visible to us, with the markers of those that belong to the home.
pub fn processes(home: &Path) -> Vec<ProcessInfo> {
    let Ok(entries) = fs::read_dir("/proc") else { return vec![] };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| process_info(pid, home))
        .collect()
}

/// One live process, with its marker if it belongs to the home.
pub fn process_info(pid: u32, home: &Path) -> Option<ProcessInfo> {
    let stat = stat(pid)?;
    Some(ProcessInfo {
        pid,
        start_time: stat.start_time,
        session: stat.session,
        parent: stat.parent,
        marker: marker(pid, home),
    })
}

fn marker(pid: u32, home: &Path) -> Option<ProcessMarker> {
    let mut environ = vec![];
    File::open(format!("/proc/{pid}/environ")).ok()?.take(ENVIRON_LIMIT).read_to_end(&mut environ).ok()?;
    let find = |key: &[u8]| environ.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(key));
    let text = |key: &[u8]| Some(String::from_utf8_lossy(find(key)?).into_owned());
    let (named, name) = (Path::new(OsStr::from_bytes(find(b"AOPS_HOME=")?)), text(b"AOPS_AGENT_NAME=")?);
    // A previous release wrote the path as it was given.
    if named != home && crate::platform::identity(named) != home {
        return None;
    }
    Some(ProcessMarker {
        name,
        version: text(b"AOPS_AGENT_VERSION=").unwrap_or_default(),
        main_only: find(crate::platform::MAIN_ONLY.as_bytes()) == Some(b"=process"),
        is_check: find(crate::platform::CHECK.as_bytes()).is_some(),
    })
}

/// Sends a signal to exactly this process, never to another one that has the same pid now. `false`: it has exited.
pub fn signal(pid: u32, start_time: u64, signal: StopSignal) -> io::Result<bool> {
    let Some(target) = Pid::from_raw(pid as i32) else { return Ok(false) };
    let signal = match signal {
        StopSignal::Term => Signal::TERM,
        StopSignal::Int => Signal::INT,
        StopSignal::Quit => Signal::QUIT,
        StopSignal::Hup => Signal::HUP,
        StopSignal::Usr1 => Signal::USR1,
        StopSignal::Usr2 => Signal::USR2,
        StopSignal::Kill => Signal::KILL,
    };
    // The pidfd is opened before the start time is checked, so the pid cannot be reused in between.
    let sent = match rustix::process::pidfd_open(target, PidfdFlags::empty()) {
        Ok(_) | Err(rustix::io::Errno::SRCH) if self::start_time(pid) != Some(start_time) => return Ok(false),
        Ok(pidfd) => rustix::process::pidfd_send_signal(&pidfd, signal),
        Err(_) if self::start_time(pid) != Some(start_time) => return Ok(false),
        Err(_) => rustix::process::kill_process(target, signal),
    };
    match sent {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Resolves when a process, not necessarily our child, has exited: by pidfd, or by polling where there is none.
pub async fn ended(pid: u32, start_time: u64) {
    if let Some(pidfd) = watched(pid)
        && is_alive(pid, start_time)
        && pidfd.ready(Interest::READABLE).await.is_ok()
    {
        return;
    }
    while is_alive(pid, start_time) {
        tokio::time::sleep(POLL).await;
    }
}

fn watched(pid: u32) -> Option<AsyncFd<OwnedFd>> {
    let pidfd = rustix::process::pidfd_open(Pid::from_raw(pid as i32)?, PidfdFlags::NONBLOCK).ok()?;
    // SAFETY: the value owns its descriptor, which is closed with it and nowhere else.
    unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.ok()
}

/// Describes the exit of a child.
pub fn describe_exit(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => {
            let name = match signal {
                1 => " (HUP)",
                2 => " (INT)",
                3 => " (QUIT)",
                4 => " (ILL)",
                6 => " (ABRT)",
                7 => " (BUS)",
                8 => " (FPE)",
                9 => " (KILL)",
                11 => " (SEGV)",
                13 => " (PIPE)",
                15 => " (TERM)",
                31 => " (SYS)",
                _ => "",
            };
            format!("killed by signal {signal}{name}")
        }
        (None, None) => "ended".to_owned(),
    }
}

/// The user that a sub-agent runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub home: String,
    pub name: String,
}

/// Reads a user from `/etc/passwd` and `/etc/group`: a static executable has no other name service.
pub fn find_user(name: &str) -> io::Result<User> {
    let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("user {name:?} not found in /etc/passwd"));
    let passwd = fs::read_to_string("/etc/passwd")?;
    let fields: Vec<&str> = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name))
        .ok_or_else(unknown)?;
    let &[_, _, uid, gid, _, home, ..] = fields.as_slice() else { return Err(unknown()) };
    let (uid, gid) = (uid.parse().map_err(|_| unknown())?, gid.parse().map_err(|_| unknown())?);
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    let mut groups: Vec<u32> = group
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':').skip(2);
            let gid = fields.next()?.parse().ok()?;
            fields.next()?.split(',').any(|member| member == name).then_some(gid)
        })
        .collect();
    groups.push(gid);
    Ok(User { uid, gid, groups, home: home.to_owned(), name: name.to_owned() })
}

/// Kills the remaining processes of the process group that a child of ours leads or led after [`super::detach_from_caller`]. The child must
/// not have been reaped yet: until then its pid is not reused.
pub fn kill_group(child: u32) {
    if let Some(group) = Pid::from_raw(child as i32) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
}

/// Whether an operation failed because this host or this process is out of a resource, independent of the operation.
pub fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let shortages = [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    error.raw_os_error().is_some_and(|code| shortages.iter().any(|errno| errno.raw_os_error() == code))
}

/// Makes this process the reaper of its orphaned descendants instead of init, so that zombies are reaped at once: a `control` script that
/// checks its program by pid takes a zombie for a live process, and some inits do not reap.
pub fn adopt_orphans() -> io::Result<()> {
    // Any pid enables the attribute; only none clears it.
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Reaps our zombie children that are in `known`, and returns the other zombies for the next call. Code that waits for a child of its own
/// reaps it before the second call.
pub fn reap_orphans(known: &[u32]) -> Vec<u32> {
    use rustix::process::{WaitId, WaitIdOptions, WaitOptions, waitid, waitpid};
    let any = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT);
    if !matches!(any, Ok(Some(_))) {
        return vec![];
    }
    let (old, new): (Vec<u32>, Vec<u32>) = zombie_children().into_iter().partition(|pid| known.contains(pid));
    for pid in old {
        let _ = waitpid(Pid::from_raw(pid as i32), WaitOptions::NOHANG);
    }
    new
}

/// Reaps one child that no other code waits for, if it has exited. Returns whether it is no longer a child of this process.
pub fn reap_orphan(pid: u32) -> bool {
    use rustix::process::{WaitOptions, waitpid};
    !matches!(waitpid(Pid::from_raw(pid as i32), WaitOptions::NOHANG), Ok(None))
}

fn zombie_children() -> Vec<u32> {
    children_that(|stat| stat.is_zombie)
}

/// The children of this process, zombies included. Before it has started any, they are those of the program that it ran before
/// [`become_program`].
pub fn children() -> Vec<u32> {
    children_that(|_| true)
}

fn children_that(wanted: impl Fn(&Stat) -> bool) -> Vec<u32> {
    let is_ours = |pid: &u32| {
        let stat = stat_text(*pid).ok().and_then(|text| parse_stat(&text));
        stat.is_some_and(|stat| stat.parent == std::process::id() && wanted(&stat))
    };
    let Ok(entries) = fs::read_dir("/proc") else { return vec![] };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
}

/// Whether a failed start is worth a short retry: the program's file is still open for writing in a child of ours that has not called exec
/// yet.
pub fn is_busy_text(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::TXTBSY.raw_os_error())
}

/// The basic environment variables of every program. A sub-agent must not depend on the shell that started the manager.
pub fn base_environment(user: Option<&User>) -> Vec<(String, String)> {
    let inherited = |name: &str| std::env::var(name).ok();
    let root = || ("root".to_owned(), "/root".to_owned());
    let (name, home) = match user {
        Some(user) => (user.name.clone(), user.home.clone()),
        None => match (inherited("USER"), inherited("HOME")) {
            (Some(name), Some(home)) if !is_root() => (name, home),
            (_, Some(home)) if !is_root() => (String::new(), home),
            _ => root(),
        },
    };
    let mut variables = vec![
        ("PATH".to_owned(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("HOME".to_owned(), home),
    ];
    if !name.is_empty() {
        variables.extend([("USER".to_owned(), name.clone()), ("LOGNAME".to_owned(), name)]);
    }
    variables.extend(["LANG", "TZ"].into_iter().filter_map(|name| Some((name.to_owned(), inherited(name)?))));
    variables
}

use super::is_root;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_shift_the_fields() {
        let text = b"42 (a) b (c)) S 1 40 41 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 100 200\n";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.session, stat.start_time), (41, 987_654));
        assert!(!stat.is_zombie);
        assert!(parse_stat(b"").is_none());
    }

    #[test]
    fn a_process_is_alive_while_any_thread_runs() {
        let is_zombie = |state: &str, threads: u32| {
            let text = format!("42 (a) {state} 1 40 41 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 {threads} 0 987654 0 0\n");
            parse_stat(text.as_bytes()).map(|stat| stat.is_zombie)
        };
        assert_eq!(is_zombie("Z", 1), Some(true));
        // Its threads cannot be counted any more.
        assert_eq!(is_zombie("Z", 0), Some(true));
        assert_eq!(is_zombie("Z", 2), Some(false));
        assert_eq!(is_zombie("S", 1), Some(false));
        assert_eq!(is_zombie("X", 1), None);
    }

    #[test]
    fn a_process_with_a_reused_pid_gets_no_signal() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let started = start_time(child.id()).unwrap();
        assert!(!signal(child.id(), started + 1, StopSignal::Kill).unwrap());
        assert!(child.try_wait().unwrap().is_none());
        assert!(signal(child.id(), started, StopSignal::Kill).unwrap());
        child.wait().unwrap();
        assert_eq!(start_time(child.id()), None);
        assert!(!signal(child.id(), started, StopSignal::Kill).unwrap());
    }

    #[test]
    #[allow(clippy::zombie_processes, reason = "the tested function reaps it")]
    fn a_zombie_is_reaped_by_the_second_call() {
        let child = Command::new("true").spawn().unwrap();
        let pid = child.id();
        while start_time(pid).is_some() {
            std::thread::yield_now();
        }
        let zombies = reap_orphans(&[]);
        assert!(zombies.contains(&pid));
        assert!(fs::exists(format!("/proc/{pid}")).unwrap());
        assert!(!reap_orphans(&[pid]).contains(&pid));
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    }

    #[test]
    fn a_child_is_listed_until_it_is_reaped() {
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        assert!(children().contains(&pid));
        assert!(!reap_orphan(pid), "it runs");
        drop(child.stdin.take());
        let reaped = std::iter::from_fn(|| Some(reap_orphan(pid)));
        assert!(reaped.inspect(|_| std::thread::yield_now()).any(|reaped| reaped));
        assert!(!children().contains(&pid) && reap_orphan(pid));
        assert!(child.try_wait().is_err(), "nothing is left to wait for");
    }

    #[tokio::test]
    async fn the_exit_of_a_process_that_is_not_our_child_is_detected() {
        let mut child =
            Command::new("sh").args(["-c", "sleep 60 & echo $!"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut text = [0; 16];
        let length = child.stdout.take().unwrap().read(&mut text).unwrap();
        let pid: u32 = std::str::from_utf8(&text[..length]).unwrap().trim().parse().unwrap();
        child.wait().unwrap();
        let started = start_time(pid).unwrap();
        let ended = tokio::spawn(ended(pid, started));
        signal(pid, started, StopSignal::Kill).unwrap();
        tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap().unwrap();
    }
}
