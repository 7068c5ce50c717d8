//! The group that holds a sub-agent's whole process tree: a cgroup of its own, which no process leaves by forking, by a session of its own
//! or by a cleared environment.
//!
//! Where they are made:
//!
//! ```text
//! under systemd    <hierarchy>/system.slice/<key>.service/agent-<name>   a unit's cgroup, delegated to us, where systemd keeps it
//! else             <hierarchy>/<key>/agent-<name>                        where we may write there
//! ```
//!
//! Since version 247 systemd takes the empty cgroup of a unit without a process away; then it is the place of our own there, too, which
//! systemd leaves alone.
//!
//! Of a sub-agent whose main process alone is ours it is `apart-<name>`: what it starts is somebody else's, and stays.
//!
//! The hierarchy is cgroup v2 where it is mounted, with or without controllers; else systemd's own of v1, or a v1 controller that serves
//! to hold processes together. Nothing is mounted by us and no controller is turned on.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::mounts::unescaped;

/// Longest file of a cgroup that is read: some 100,000 pids.
const MAX_BYTES: u64 = 1 << 20;
/// Cgroups within a sub-agent's own, made by the sub-agent itself, are looked for so deep.
const DEPTH: u32 = 8;
/// Rounds of killing where the kernel can neither kill nor freeze a cgroup whole.
const KILL_ROUNDS: u32 = 20;
/// So many processes are held at a time to be killed: each takes a descriptor, of which a process has 1024 at least.
const HELD: usize = 64;
/// Where the kernel does not tell that a cgroup is empty, it is looked at so often.
const POLL: Duration = Duration::from_secs(5);
/// The pid namespace of a host itself (`PROC_PID_INIT_INO` in include/linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
/// A sub-agent's name must not be taken for one of the kernel's files.
const PREFIX: &str = "agent-";
const APART: &str = "apart-";

/// Where a home's groups are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    base: PathBuf,
}

/// Holds the process tree of one sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    path: PathBuf,
}

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) mount: PathBuf,
    /// What of it is mounted there.
    pub(super) root: PathBuf,
    /// Of v1, the options that it was mounted with, what it is for among them: `cpu` and `cpuacct`, `name=systemd`; `None`: v2.
    pub(super) options: Option<Vec<String>>,
}

/// The hierarchies that are mounted here and may be written to, best first.
pub(super) fn mounted() -> Vec<Hierarchy> {
    hierarchies(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// What a place of our own for a home's groups is called.
pub(super) fn place(key: &str) -> String {
    // The cgroups of a container may be those of its host, where another has a home of the same path: each keeps to its own.
    match fs::metadata("/proc/self/ns/pid") {
        Ok(namespace) if namespace.ino() != INITIAL_PID_NAMESPACE => format!("{key}-{:x}", namespace.ino()),
        _ => key.to_owned(),
    }
}

impl Groups {
    /// Where a home's groups may be made; `None`: this host has no place for them. `key` names the home: its unit is `<key>.service`.
    pub fn find(key: &str) -> Option<Groups> {
        let systemd = Path::new("/run/systemd/system").is_dir();
        candidates(&mounted(), systemd.then_some(key), &place(key))
            .into_iter()
            .find(|base| is_usable(base))
            .map(|base| Groups { base })
    }

    /// Where that is, for people.
    pub fn place(&self) -> String {
        self.base.display().to_string()
    }

    /// Takes this process out of any group of a sub-agent, in which it was started: it would be ended with that. Whether it was in one.
    pub fn leave(&self) -> io::Result<bool> {
        let Some(own) = self.base.file_name().and_then(OsStr::to_str) else { return Ok(false) };
        let inside = [PREFIX, APART].map(|prefix| format!("/{own}/{prefix}"));
        // `hierarchy:controllers:path` (cgroups(7)).
        let ours = read("/proc/self/cgroup".as_ref())?;
        if !ours.lines().any(|line| inside.iter().any(|inside| line.contains(inside))) {
            return Ok(false);
        }
        // Where controllers are turned on for what lies below, no process may live beside it; in our own place none are.
        let places = [self.base.parent(), Some(&self.base)].into_iter().flatten();
        let mut outcome = Ok(true);
        for place in places {
            outcome = write(&place.join("cgroup.procs"), &std::process::id().to_string()).map(|()| true);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    /// The group of one sub-agent, made or not.
    pub fn group(&self, agent: &str) -> Group {
        Group { path: self.base.join(format!("{PREFIX}{agent}")) }
    }

    /// Where a sub-agent lives of which the main process alone is ours: apart from ours, and never listed or killed whole.
    pub fn apart(&self, agent: &str) -> Group {
        Group { path: self.base.join(format!("{APART}{agent}")) }
    }

    /// The sub-agents whose groups exist.
    pub fn all(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        let name = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned());
        entries.filter_map(|entry| entry.map(name).transpose()).collect()
    }
}

/// Where groups may be looked for, best first.
fn candidates(hierarchies: &[Hierarchy], unit: Option<&str>, place: &str) -> Vec<PathBuf> {
    let of = |wanted: Option<&str>| {
        let serves = |found: &&Hierarchy| match (&found.options, wanted) {
            (Some(options), Some(wanted)) => options.iter().any(|option| option == wanted),
            (options, wanted) => options.is_none() && wanted.is_none(),
        };
        hierarchies.iter().filter(serves).map(|found| found.mount.as_path()).collect::<Vec<_>>()
    };
    let mut found = vec![];
    if let Some(unit) = unit {
        let v2 = of(None);
        let watched = if v2.is_empty() { of(Some("name=systemd")) } else { v2 };
        let units = watched.into_iter().map(|mount| mount.join("system.slice").join(format!("{unit}.service")));
        found.extend(units.filter(|unit| unit.is_dir()));
    }
    // What systemd watches itself it has to itself.
    let v1 = ["freezer", "pids", "cpuacct", "name=systemd"]
        .into_iter()
        .filter(|name| unit.is_none() || *name != "name=systemd");
    let mounts = [None].into_iter().chain(v1.map(Some)).flat_map(of);
    found.extend(mounts.map(|mount| mount.join(place)));
    found
}

/// Whether groups can be made in `base`, which is made itself where it is missing. What was mounted over a hierarchy has none of its files.
fn is_usable(base: &Path) -> bool {
    let place = if base.is_dir() { Some(base) } else { base.parent() };
    place.is_some_and(|place| {
        place.join("cgroup.procs").exists() && access(place, Access::WRITE_OK | Access::EXEC_OK).is_ok()
    })
}

/// The hierarchies that are mounted here and may be written to (proc_pid_mountinfo(5)): those mounted whole, or from where our namespace
/// of them begins, before those of which a part is mounted.
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let hierarchy = |line: &str| {
        let (fields, behind) = line.split_once(" - ")?;
        let mut fields = fields.split(' ');
        let (root, mount, mount_options) = (fields.nth(3)?, unescaped(fields.next()?.as_bytes()), fields.next()?);
        let mut behind = behind.split(' ');
        let (kind, options) = (behind.next()?, behind.nth(1)?);
        if mount_options.split(',').chain(options.split(',')).any(|option| option == "ro") {
            return None;
        }
        let options = match kind {
            "cgroup2" => None,
            // Controllers stand among whatever else the mount was given (`seclabel`, `release_agent=/x`, `cpuset_v2_mode`).
            "cgroup" => Some(options.split(',').map(str::to_owned).collect()),
            _ => return None,
        };
        Some((root != "/", Hierarchy { mount, root: unescaped(root.as_bytes()), options }))
    };
    let mut found: Vec<_> = mountinfo.lines().filter_map(hierarchy).collect();
    found.sort_by_key(|(is_part, _)| *is_part);
    found.into_iter().map(|(_, hierarchy)| hierarchy).collect()
}

impl Group {
    /// The group of that name, as a record keeps it.
    pub fn named(name: &str) -> Group {
        Group { path: PathBuf::from(name) }
    }

    /// Its name for good, as long as this boot lasts.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Makes it. Twice is as good as once.
    pub fn make(&self) -> io::Result<()> {
        let made = |path: &Path| match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        match made(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(base) = self.path.parent() {
                    made(base)?;
                }
                made(&self.path)
            }
            done => done,
        }
    }

    /// The pids of what lives in it.
    pub fn members(&self) -> io::Result<Vec<u32>> {
        let mut pids = vec![];
        members_below(&self.path, DEPTH, &mut pids)?;
        Ok(pids)
    }

    /// Whether nothing lives in it.
    pub fn is_empty(&self) -> io::Result<bool> {
        match read(&self.path.join("cgroup.events")) {
            Ok(events) => Ok(!events.lines().any(|line| line == "populated 1")),
            // Of v1, or gone.
            Err(error) if is_gone(&error) => Ok(self.members()?.is_empty()),
            Err(error) => Err(error),
        }
    }

    /// Resolves when nothing lives in it. Where the kernel does not tell of that (v1), it is looked at now and then. Cancel-safe.
    pub async fn emptied(&self) {
        self.emptied_seen(POLL).await;
    }

    /// The same, with a look every `poll` where it has to be looked at: what cannot be read now (a shortage) is not known to be empty.
    async fn emptied_seen(&self, poll: Duration) {
        // SAFETY: the value owns its descriptor, which is closed with it and by nobody else.
        let watched = |file: fs::File| unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.ok();
        let mut events = fs::File::open(self.path.join("cgroup.events")).ok().and_then(watched);
        loop {
            match (self.is_empty(), &events) {
                (Ok(true), _) => return,
                (Ok(false), Some(told)) => match told.ready(Interest::PRIORITY).await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => events = None,
                },
                (Ok(false), None) | (Err(_), _) => tokio::time::sleep(poll).await,
            }
        }
    }

    /// Kills all of it at once, forks in flight included.
    pub fn kill(&self) -> io::Result<()> {
        match write(&self.path.join("cgroup.kill"), "1") {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) && !self.path.is_dir() => return Ok(()),
            // Before Linux 5.14, and of v1.
            Err(_) => {}
        }
        // What is frozen can be killed, but does not fork; thawed, it dies (in v2 at once).
        let _ = self.freeze(true);
        let killed = self.kill_each();
        let thawed = self.freeze(false);
        killed.and(thawed)
    }

    fn kill_each(&self) -> io::Result<()> {
        for _ in 0..KILL_ROUNDS {
            let members = self.members()?;
            if members.is_empty() {
                break;
            }
            for some in members.chunks(HELD) {
                self.kill_some(some)?;
            }
        }
        Ok(())
    }

    /// Kills those of the processes that live in it. They are held before they are looked for once more, so none can be meant that was
    /// given the number of one in between; where there is no pidfd, or no more of them, the number has to do.
    fn kill_some(&self, pids: &[u32]) -> io::Result<()> {
        let pids = pids.iter().filter_map(|pid| Pid::from_raw(*pid as i32));
        let held: Vec<_> = pids.map(|pid| (pid, rustix::process::pidfd_open(pid, PidfdFlags::empty()))).collect();
        let members = self.members()?;
        for (pid, held) in held {
            if !members.contains(&(pid.as_raw_nonzero().get() as u32)) {
                continue;
            }
            let killed = match held {
                Ok(process) => rustix::process::pidfd_send_signal(process, Signal::KILL),
                Err(Errno::SRCH) => continue,
                Err(_) => rustix::process::kill_process(pid, Signal::KILL),
            };
            match killed {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// That it is gone, or that its hierarchy cannot freeze, is no error.
    fn freeze(&self, freeze: bool) -> io::Result<()> {
        let (v2, v1) = if freeze { ("1", "FROZEN") } else { ("0", "THAWED") };
        let done = match write(&self.path.join("cgroup.freeze"), v2) {
            Err(error) if is_gone(&error) => write(&self.path.join("freezer.state"), v1),
            done => done,
        };
        done.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })
    }

    /// Lets what begins in it run: it is ours, and nobody else has to freeze it. Gives whether it stays frozen all the same, since a
    /// cgroup above it is, or whether that cannot be known.
    pub(super) fn thaw(&self) -> bool {
        self.is_frozen() && (self.freeze(false).is_err() || self.is_frozen())
    }

    fn is_frozen(&self) -> bool {
        let frozen = match read(&self.path.join("cgroup.events")) {
            // Before Linux 5.2 it says nothing of it.
            Ok(events) => Ok(events.lines().any(|line| line == "frozen 1")),
            Err(error) if is_gone(&error) => {
                read(&self.path.join("freezer.state")).map(|state| state.trim_ascii() != "THAWED")
            }
            Err(error) => Err(error),
        };
        frozen.unwrap_or_else(|error| !is_gone(&error))
    }

    /// Removes it when it is empty, and with the last one their place, unless that is a unit's own; that it is not there is no error.
    pub fn remove(&self) -> io::Result<()> {
        remove_below(&self.path, DEPTH)?;
        if let Some(base) = self.path.parent().filter(|base| base.extension() != Some(OsStr::new("service"))) {
            // The others are in it.
            let _ = fs::remove_dir(base);
        }
        Ok(())
    }

    /// What a new process of ours writes itself into.
    pub(super) fn door(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// The same of v1, which moves one thread without holding up the whole host; v2 has none.
    pub(super) fn door_v1(&self) -> PathBuf {
        self.path.join("tasks")
    }

    /// The directory itself, made where it is missing, for a process to begin in (of v2).
    pub(super) fn open(&self) -> io::Result<fs::File> {
        match fs::File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make()?;
                fs::File::open(&self.path)
            }
            opened => opened,
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes to a file of the kernel's; where there is none, none is made.
fn write(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

/// Whether an error says that a cgroup, or a file of it, is not there or is just being removed. A shortage of ours or a refusal says nothing
/// of the kind.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NODEV | Errno::SRCH))
}

fn members_below(path: &Path, depth: u32, pids: &mut Vec<u32>) -> io::Result<()> {
    match read(&path.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0)),
        // It has gone, or is one of threads, whose processes the one above it names.
        Err(error) if is_gone(&error) || Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error),
    }
    if depth > 0 {
        for child in children(path)? {
            members_below(&child, depth - 1, pids)?;
        }
    }
    Ok(())
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Err(error) if is_gone(&error) => return Ok(vec![]),
        entries => entries?,
    };
    let directory = |entry: fs::DirEntry| Ok(entry.file_type()?.is_dir().then(|| entry.path()));
    entries.filter_map(|entry| entry.and_then(directory).transpose()).collect()
}

fn remove_below(path: &Path, depth: u32) -> io::Result<()> {
    let removed = fs::remove_dir(path);
    match removed {
        Err(error) if is_gone(&error) => Ok(()),
        // Perhaps cgroups of its own are in it.
        Err(error) if depth > 0 => {
            let children = children(path)?;
            if children.is_empty() {
                return Err(error);
            }
            children.iter().try_for_each(|child| remove_below(child, depth - 1))?;
            remove_below(path, 0)
        }
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 23 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw
31 23 0:27 / /sys/fs/cgroup/systemd rw,nosuid shared:5 - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
32 23 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:6 - cgroup cgroup rw,seclabel,cpu,cpuacct
33 23 0:29 /docker/abc /sys/fs/cgroup/free\\040zer rw shared:7 - cgroup cgroup rw,freezer
40 23 0:30 / /proc rw - proc proc rw
";

    fn places(mountinfo: &str, unit: Option<&str>) -> Vec<String> {
        let found = candidates(&hierarchies(mountinfo), unit, "k");
        found.into_iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn without_a_service_manager_v2_comes_first() {
        let expected = [
            "/sys/fs/cgroup/unified/k",
            "/sys/fs/cgroup/free zer/k",
            "/sys/fs/cgroup/cpu,cpuacct/k",
            "/sys/fs/cgroup/systemd/k",
        ];
        assert_eq!(places(HYBRID, None), expected);
        // What systemd watches itself it has to itself; there is no unit of that name here.
        assert_eq!(places(HYBRID, Some("no-such-unit")), &expected[..3]);
    }

    #[test]
    fn a_hierarchy_that_is_mounted_whole_comes_before_a_part_of_it_and_one_that_cannot_be_written_to_never() {
        let mounts = "\
30 23 0:26 /part /a rw - cgroup2 cgroup2 rw
31 23 0:26 / /b ro,nosuid - cgroup2 cgroup2 rw
32 23 0:26 / /c rw,nosuid shared:4 master:2 - cgroup2 cgroup2 rw,nsdelegate
33 23 0:29 / /d rw - cgroup cgroup ro,freezer
34 23 0:30 / /e rw - cgroup cgroup rw,cpuset,cpuset_v2_mode
35 23 0:31 / /f rw - cgroup cgroup rw,noprefix,pids
";
        assert_eq!(places(mounts, None), ["/c/k", "/a/k", "/f/k"]);
    }

    /// A cgroup whose file cannot be read, nor is it missing: a link to itself.
    fn unreadable(file: &str) -> (tempfile::TempDir, Group) {
        let directory = tempfile::tempdir().unwrap();
        let group = Group { path: directory.path().join("agent-a") };
        fs::create_dir(&group.path).unwrap();
        std::os::unix::fs::symlink(file, group.path.join(file)).unwrap();
        (directory, group)
    }

    #[test]
    fn what_cannot_be_read_is_not_taken_for_empty() {
        for file in ["cgroup.events", "cgroup.procs"] {
            let (_directory, group) = unreadable(file);
            assert!(group.is_empty().is_err(), "{file}");
        }
        let (_directory, group) = unreadable("cgroup.procs");
        assert!(group.members().is_err());
        assert!(group.kill().is_err());
        fs::remove_file(group.path.join("cgroup.procs")).unwrap();
        assert_eq!((group.is_empty().unwrap(), group.members().unwrap()), (true, vec![]));
        fs::remove_dir(&group.path).unwrap();
        assert_eq!((group.is_empty().unwrap(), group.members().unwrap()), (true, vec![]));
        group.kill().unwrap();
        group.remove().unwrap();
    }

    #[test]
    fn only_what_says_that_it_is_not_there_counts_as_gone() {
        let is_gone = |errno: Errno| is_gone(&errno.into());
        assert!([Errno::NOENT, Errno::NODEV, Errno::SRCH].into_iter().all(is_gone));
        let others = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS, Errno::OPNOTSUPP];
        assert!(!others.into_iter().any(is_gone));
    }

    #[tokio::test]
    async fn what_could_not_be_read_is_looked_at_again() {
        let (_directory, group) = unreadable("cgroup.events");
        let emptied = group.emptied_seen(Duration::from_millis(1));
        tokio::pin!(emptied);
        let early = tokio::time::timeout(Duration::from_millis(50), &mut emptied).await;
        assert!(early.is_err());
        fs::remove_file(group.path.join("cgroup.events")).unwrap();
        fs::write(group.path.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        tokio::time::timeout(Duration::from_secs(10), emptied).await.unwrap();
    }

    #[test]
    fn what_is_killed_one_by_one_lives_in_the_group() {
        let directory = tempfile::tempdir().unwrap();
        let group = Group { path: directory.path().join("agent-a") };
        fs::create_dir(&group.path).unwrap();
        let mut members: Vec<_> =
            (0..2).map(|_| std::process::Command::new("sleep").arg("60").spawn().unwrap()).collect();
        let mut stranger = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pids: Vec<u32> = members.iter().map(std::process::Child::id).collect();
        fs::write(group.path.join("cgroup.procs"), format!("{}\n{}\n", pids[0], pids[1])).unwrap();
        group.kill_some(&[pids[0], pids[1], stranger.id()]).unwrap();
        for member in &mut members {
            assert!(!member.wait().unwrap().success());
        }
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn a_group_of_ours_is_thawed() {
        let directory = tempfile::tempdir().unwrap();
        let group = Group { path: directory.path().to_owned() };
        assert!(!group.thaw(), "one that cannot be frozen is not");
        // Of v1, where the kernel says at once what was written.
        fs::write(directory.path().join("freezer.state"), "FROZEN\n").unwrap();
        assert!(!group.thaw());
        assert_eq!(fs::read_to_string(directory.path().join("freezer.state")).unwrap(), "THAWED\n");
        // Of v2, where a cgroup above it is frozen, too.
        fs::write(directory.path().join("cgroup.events"), "populated 0\nfrozen 1\n").unwrap();
        fs::write(directory.path().join("cgroup.freeze"), "1").unwrap();
        assert!(group.thaw());
        assert_eq!(fs::read_to_string(directory.path().join("cgroup.freeze")).unwrap(), "0");
    }
}
