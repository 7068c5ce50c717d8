//! Processes: who is there, who belongs together, how one begins and how its end is seen.

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

/// Where the kernel offers no pidfd, a process that is not our child is looked at so often.
const POLL: Duration = Duration::from_millis(250);
/// An environment is read up to here: the mark is among the first.
const ENVIRON_LIMIT: u64 = 256 << 10;
/// So is a command line, of which the first words count.
const COMMAND_LIMIT: u64 = 64 << 10;

/// When a live process started, in clock ticks since boot; `None`: there is none of that number, or only its remains.
pub fn start_time(pid: u32) -> Option<u64> {
    stat(pid).map(|stat| stat.start_time)
}

/// Whether that process lives. Where it cannot be looked at, for want of a descriptor or of memory, that there is one of that number counts:
/// a shortage is no death.
pub fn lives(pid: u32, start_time: u64) -> bool {
    match stat_text(pid) {
        Ok(text) => parse_stat(&text).is_some_and(|stat| !stat.is_remains && stat.start_time == start_time),
        Err(error) if error.kind() == io::ErrorKind::NotFound || is_no_process(&error) => false,
        Err(_) => Pid::from_raw(pid as i32)
            .is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)),
    }
}

fn is_no_process(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::SRCH)
}

pub(super) struct Stat {
    parent: u32,
    session: u32,
    pub(super) start_time: u64,
    /// It has ended, and its parent has not taken note of that yet.
    is_remains: bool,
}

/// Of a live process.
fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&stat_text(pid).ok()?).filter(|stat| !stat.is_remains)
}

fn stat_text(pid: u32) -> io::Result<Vec<u8>> {
    let mut buffer = [0; 1024];
    let mut file = File::open(format!("/proc/{pid}/stat"))?;
    let length = file.read(&mut buffer)?;
    Ok(buffer[..length].to_vec())
}

/// Whether a process has ended and its parent has not taken note of that yet: `kill -0` still finds it.
pub fn remains(pid: u32) -> bool {
    stat_text(pid).ok().and_then(|text| parse_stat(&text)).is_some_and(|stat| stat.is_remains)
}

/// Fields of `/proc/PID/stat` (proc(5)), counted behind the last `)`: the name before it may hold anything.
pub(super) fn parse_stat(text: &[u8]) -> Option<Stat> {
    let behind = text.iter().rposition(|byte| *byte == b')')? + 1;
    let mut fields = text[behind..].split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    let state = fields.next()?;
    let parent = number(fields.next()?)? as u32;
    let session = number(fields.nth(1)?)? as u32;
    let threads = number(fields.nth(13)?)?;
    let start_time = number(fields.nth(1)?)?;
    let is_remains = match state {
        // A first thread that has ended looks like that for as long as other threads of the process live on.
        b"Z" => threads <= 1,
        b"X" | b"x" => return None,
        _ => false,
    };
    Some(Stat { parent, session, start_time, is_remains })
}

fn number(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// Names this boot of the machine: a pid and start time mean nothing in another.
pub fn boot_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    let read = || fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned());
    ID.get_or_init(|| read().unwrap_or_default())
}

/// How long the machine has been up.
pub fn uptime() -> Option<Duration> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    Some(Duration::from_secs_f64(text.split_whitespace().next()?.parse().ok()?))
}

/// How long a process has been running, from its start time.
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

/// Where a process works, where we may know it.
pub fn working_directory(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/cwd")).ok()
}

/// The executable that a process runs, where we may know it.
pub fn executable_of(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// The program that a process runs, also when its file was replaced or removed since.
pub fn program_of(pid: u32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/exe"))
}

/// Goes on as another program, in the same process. Returns only where that fails.
pub fn become_program(command: &mut Command) -> io::Error {
    command.exec()
}

/// The first words of a process's command line: of a script the interpreter and the script.
pub fn first_words(pid: u32, count: usize) -> Vec<PathBuf> {
    let mut text = vec![];
    let read =
        File::open(format!("/proc/{pid}/cmdline")).and_then(|file| file.take(COMMAND_LIMIT).read_to_end(&mut text));
    match read {
        Ok(_) => text.split(|byte| *byte == 0).take(count).map(|word| OsStr::from_bytes(word).into()).collect(),
        Err(_) => vec![],
    }
}

/// Every process of the host that we can see, with the marks of those that belong to the home.
pub fn processes(home: &Path) -> Vec<ProcessInfo> {
    let Ok(entries) = fs::read_dir("/proc") else { return vec![] };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| seen(pid, home))
        .collect()
}

/// One process, if it lives, with its mark if it belongs to the home.
pub fn seen(pid: u32, home: &Path) -> Option<ProcessInfo> {
    let stat = stat(pid)?;
    Some(ProcessInfo {
        pid,
        start_time: stat.start_time,
        session: stat.session,
        parent: stat.parent,
        mark: mark(pid, home),
    })
}

fn mark(pid: u32, home: &Path) -> Option<ProcessMarker> {
    let mut environ = vec![];
    File::open(format!("/proc/{pid}/environ")).ok()?.take(ENVIRON_LIMIT).read_to_end(&mut environ).ok()?;
    let find = |key: &[u8]| environ.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(key));
    let text = |key: &[u8]| Some(String::from_utf8_lossy(find(key)?).into_owned());
    let (named, name) = (Path::new(OsStr::from_bytes(find(b"AOPS_HOME=")?)), text(b"AOPS_AGENT_NAME=")?);
    // An earlier release marked them with the spelling that it was given.
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

/// Sends a signal to the very process meant: nothing happens to another that has its number now. `false`: it is gone.
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
    // The pidfd is held before the start time is looked at, so the number cannot change hands in between.
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

/// Resolves when a process that need not be our child has ended: by pidfd, by looking where there is none.
pub async fn ended(pid: u32, start_time: u64) {
    if let Some(pidfd) = watched(pid)
        && lives(pid, start_time)
        && pidfd.ready(Interest::READABLE).await.is_ok()
    {
        return;
    }
    while lives(pid, start_time) {
        tokio::time::sleep(POLL).await;
    }
}

fn watched(pid: u32) -> Option<AsyncFd<OwnedFd>> {
    let pidfd = rustix::process::pidfd_open(Pid::from_raw(pid as i32)?, PidfdFlags::NONBLOCK).ok()?;
    // SAFETY: the value owns its descriptor, which is closed with it and by nobody else.
    unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.ok()
}

/// How an ended child ended, in words.
pub fn how_it_ended(status: ExitStatus) -> String {
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

/// Whom a sub-agent runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub home: String,
    pub name: String,
}

/// Looks a user up in `/etc/passwd` and `/etc/group`: a static executable has no other name service.
pub fn find_user(name: &str) -> io::Result<User> {
    let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("there is no user {name:?} in /etc/passwd"));
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

/// Kills what is left of the group that a child of ours leads or led that left its caller. The child must not have been waited for yet: until then
/// its number is nobody else's.
pub fn kill_group(child: u32) {
    if let Some(group) = Pid::from_raw(child as i32) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
}

/// Whether something failed because this host, or this process, has no more of what it needs, whatever was to be done.
pub fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let shortages = [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    error.raw_os_error().is_some_and(|code| shortages.iter().any(|errno| errno.raw_os_error() == code))
}

/// Makes what our sub-agents orphan ours instead of init's, so that the dead among them can be reaped at once: a `control` script that asks
/// after its program by number takes a zombie for alive, and not every init reaps.
pub fn adopt_orphans() -> io::Result<()> {
    // Any process may stand for "yes"; the attribute is cleared by none.
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Reaps the orphans among our children that are dead and of which `known` were dead already the last time, and says which are dead now.
/// Whoever waits for a child of his own does so before a second time comes.
pub fn reap_orphans(known: &[u32]) -> Vec<u32> {
    use rustix::process::{WaitId, WaitIdOptions, WaitOptions, waitid, waitpid};
    let any = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT);
    if !matches!(any, Ok(Some(_))) {
        return vec![];
    }
    let (old, new): (Vec<u32>, Vec<u32>) = dead_children().into_iter().partition(|pid| known.contains(pid));
    for pid in old {
        let _ = waitpid(Pid::from_raw(pid as i32), WaitOptions::NOHANG);
    }
    new
}

/// Reaps one orphan of ours, if it is dead.
pub fn reap_orphan(pid: u32) {
    use rustix::process::{WaitOptions, waitpid};
    let _ = waitpid(Pid::from_raw(pid as i32), WaitOptions::NOHANG);
}

fn dead_children() -> Vec<u32> {
    let is_ours = |pid: &u32| {
        let stat = stat_text(*pid).ok().and_then(|text| parse_stat(&text));
        stat.is_some_and(|stat| stat.is_remains && stat.parent == std::process::id())
    };
    let Ok(entries) = fs::read_dir("/proc") else { return vec![] };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
}

/// Whether a failed start is worth a short wait: the program's file is still open for writing in a child of ours that has not come to
/// its own exec yet.
pub fn is_busy_text(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::TXTBSY.raw_os_error())
}

/// The variables that any program expects, from a clean start: a sub-agent must not depend on whose shell started the manager.
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
        assert!(!stat.is_remains);
        assert!(parse_stat(b"").is_none());
    }

    #[test]
    fn a_process_whose_first_thread_has_ended_lives_while_others_do() {
        let remains = |state: &str, threads: u32| {
            let text = format!("42 (a) {state} 1 40 41 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 {threads} 0 987654 0 0\n");
            parse_stat(text.as_bytes()).map(|stat| stat.is_remains)
        };
        assert_eq!(remains("Z", 1), Some(true));
        // Its threads cannot be counted any more.
        assert_eq!(remains("Z", 0), Some(true));
        assert_eq!(remains("Z", 2), Some(false));
        assert_eq!(remains("S", 1), Some(false));
        assert_eq!(remains("X", 1), None);
    }

    #[test]
    fn another_process_with_the_same_number_gets_no_signal() {
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
    #[allow(clippy::zombie_processes, reason = "what is tested reaps it")]
    fn a_dead_child_is_reaped_the_second_time_it_is_seen() {
        let child = Command::new("true").spawn().unwrap();
        let pid = child.id();
        while start_time(pid).is_some() {
            std::thread::yield_now();
        }
        let seen = reap_orphans(&[]);
        assert!(seen.contains(&pid));
        assert!(fs::exists(format!("/proc/{pid}")).unwrap());
        assert!(!reap_orphans(&[pid]).contains(&pid));
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    }

    #[tokio::test]
    async fn the_end_of_a_process_that_is_no_child_of_ours_is_seen() {
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
