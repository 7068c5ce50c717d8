//! The group that holds a sub-agent's process tree: a cgroup of its own, which no process leaves by forking, by starting a session or by
//! clearing its environment.
//!
//! Location:
//!
//! ```text
//! under systemd    <hierarchy>/system.slice/<key>.service/agent-<name>   a unit's cgroup, delegated to us, if systemd keeps it
//! otherwise        <hierarchy>/<key>/agent-<name>                        if writable
//! ```
//!
//! Since version 247, systemd removes the empty cgroup of a unit without processes. Then the second location is used under systemd, too;
//! systemd leaves it alone.
//!
//! If only the main process of the sub-agent is ours, the group is `apart-<name>`: the processes that it starts are not ours, and stay.
//!
//! The hierarchy is cgroup v2 if mounted, with or without controllers; else systemd's own v1 hierarchy, or that of a v1 controller that can
//! group processes. We mount nothing and enable no controller.

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

/// Bytes of a cgroup file that are read: some 100,000 pids.
const MAX_BYTES: u64 = 1 << 20;
/// Depth to which cgroups are searched that a sub-agent created within its own.
const DEPTH: u32 = 8;
/// Rounds of killing, where the kernel can neither kill nor freeze a whole cgroup.
const KILL_ROUNDS: u32 = 20;
/// Pidfds that are open at a time while killing. A process may have at least 1024 descriptors.
const MAX_PIDFDS: usize = 64;
/// Poll interval where the kernel does not report that a cgroup is empty (v1).
const POLL: Duration = Duration::from_secs(5);
/// The host's own pid namespace (`PROC_PID_INIT_INO` in include/linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
/// Keeps a sub-agent's name from being mistaken for one of the kernel's files.
const PREFIX: &str = "agent-";
const APART: &str = "apart-";

/// Where the groups of a home are created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    base: PathBuf,
}

/// Holds the process tree of one sub-agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    path: PathBuf,
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) mount: PathBuf,
    /// The cgroup that is mounted there.
    pub(super) root: PathBuf,
    /// For v1, its mount options, which include its controllers or name: `cpu` and `cpuacct`, `name=systemd`; `None`: v2.
    pub(super) options: Option<Vec<String>>,
}

/// The mounted, writable hierarchies, best first.
pub(super) fn mounted() -> Vec<Hierarchy> {
    hierarchies(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// Directory name of a home's groups, outside of systemd's units.
pub(super) fn location_name(key: &str) -> String {
    // A container may share the cgroups of its host, which may have a home with the same path: each gets its own name.
    match fs::metadata("/proc/self/ns/pid") {
        Ok(namespace) if namespace.ino() != INITIAL_PID_NAMESPACE => format!("{key}-{:x}", namespace.ino()),
        _ => key.to_owned(),
    }
}

impl Groups {
    /// Finds the location for a home's groups; `None`: this host has none. `key` names the home: its unit is `<key>.service`.
    pub fn find(key: &str) -> Option<Groups> {
        let systemd = Path::new("/run/systemd/system").is_dir();
        candidates(&mounted(), systemd.then_some(key), &location_name(key))
            .into_iter()
            .find(|base| is_usable(base))
            .map(|base| Groups { base })
    }

    /// The location, for display.
    pub fn location(&self) -> String {
        self.base.display().to_string()
    }

    /// Moves this process out of a sub-agent's group that it was started in: it would be killed with that group. Returns whether it was in
    /// one.
    pub fn leave(&self) -> io::Result<bool> {
        let Some(own) = self.base.file_name().and_then(OsStr::to_str) else { return Ok(false) };
        let inside = [PREFIX, APART].map(|prefix| format!("/{own}/{prefix}"));
        // `hierarchy:controllers:path` (cgroups(7)).
        let ours = read("/proc/self/cgroup".as_ref())?;
        if !ours.lines().any(|line| inside.iter().any(|inside| line.contains(inside))) {
            return Ok(false);
        }
        // A cgroup whose controllers are enabled for its children cannot have processes itself. In our own location none are enabled.
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

    /// The group of a sub-agent, whether or not it exists.
    pub fn group(&self, agent: &str) -> Group {
        Group { path: self.base.join(format!("{PREFIX}{agent}")) }
    }

    /// The group of a sub-agent whose main process alone is ours: it is not listed by [`Groups::all`], and never killed as a whole.
    pub fn main_only(&self, agent: &str) -> Group {
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

/// Nothing to do: a cgroup exists until it is removed.
pub fn hold_groups(_key: &str) {}

/// The possible locations, best first.
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
    // The hierarchy that systemd tracks services by belongs to systemd.
    let v1 = ["freezer", "pids", "cpuacct", "name=systemd"]
        .into_iter()
        .filter(|name| unit.is_none() || *name != "name=systemd");
    let mounts = [None].into_iter().chain(v1.map(Some)).flat_map(of);
    found.extend(mounts.map(|mount| mount.join(place)));
    found
}

/// Whether groups can be created in `base`, or `base` itself if it does not exist. A path with another file system mounted over it has no
/// `cgroup.procs`.
fn is_usable(base: &Path) -> bool {
    let place = if base.is_dir() { Some(base) } else { base.parent() };
    place.is_some_and(|place| {
        place.join("cgroup.procs").exists() && access(place, Access::WRITE_OK | Access::EXEC_OK).is_ok()
    })
}

/// Parses the mounted, writable hierarchies (proc_pid_mountinfo(5)). Those mounted from their root, or from the root of our cgroup
/// namespace, come first.
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
            // Controllers are listed among other mount options (`seclabel`, `release_agent=/x`, `cpuset_v2_mode`).
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
    /// The group with the name that a record stores.
    pub fn named(name: &str) -> Group {
        Group { path: PathBuf::from(name) }
    }

    /// Its name, permanent within this boot.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Creates it; an existing group is not an error.
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

    /// The pids in it.
    pub fn members(&self) -> io::Result<Vec<u32>> {
        let mut pids = vec![];
        members_below(&self.path, DEPTH, &mut pids)?;
        Ok(pids)
    }

    /// Whether it has no processes.
    pub fn is_empty(&self) -> io::Result<bool> {
        match read(&self.path.join("cgroup.events")) {
            Ok(events) => Ok(!events.lines().any(|line| line == "populated 1")),
            // It is v1, or was removed.
            Err(error) if is_gone(&error) => Ok(self.members()?.is_empty()),
            Err(error) => Err(error),
        }
    }

    /// Resolves when the group has no processes. Polls where the kernel does not report it (v1). Cancel-safe.
    pub async fn emptied(&self) {
        self.emptied_polling(POLL).await;
    }

    /// The same, with a poll interval. A group that cannot be read now (a shortage) does not count as empty.
    async fn emptied_polling(&self, poll: Duration) {
        // SAFETY: the value owns its descriptor, which is closed with it and nowhere else.
        let register = |file: fs::File| unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.ok();
        let mut events = fs::File::open(self.path.join("cgroup.events")).ok().and_then(register);
        loop {
            match (self.is_empty(), &events) {
                (Ok(true), _) => return,
                (Ok(false), Some(fd)) => match fd.ready(Interest::PRIORITY).await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => events = None,
                },
                (Ok(false), None) | (Err(_), _) => tokio::time::sleep(poll).await,
            }
        }
    }

    /// Nothing to do: its processes are asked by signals.
    pub fn request_stop(&self) {}

    /// Kills all processes in it at once, including forks in progress.
    pub fn kill(&self) -> io::Result<()> {
        match write(&self.path.join("cgroup.kill"), "1") {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) && !self.path.is_dir() => return Ok(()),
            // The kernel is older than 5.14, or it is v1.
            Err(_) => {}
        }
        // Frozen processes do not fork; they die when killed (v2) or when thawed (v1).
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
            for some in members.chunks(MAX_PIDFDS) {
                self.kill_some(some)?;
            }
        }
        Ok(())
    }

    /// Kills those of the processes that are in the group. Their pidfds are opened before the members are read again, so a reused pid is
    /// never killed. Without a pidfd, the pid is used.
    fn kill_some(&self, pids: &[u32]) -> io::Result<()> {
        let pids = pids.iter().filter_map(|pid| Pid::from_raw(*pid as i32));
        let pidfds: Vec<_> = pids.map(|pid| (pid, rustix::process::pidfd_open(pid, PidfdFlags::empty()))).collect();
        let members = self.members()?;
        for (pid, pidfd) in pidfds {
            if !members.contains(&(pid.as_raw_nonzero().get() as u32)) {
                continue;
            }
            let killed = match pidfd {
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

    /// A removed cgroup, or a hierarchy that cannot freeze, is not an error.
    fn freeze(&self, freeze: bool) -> io::Result<()> {
        let (v2, v1) = if freeze { ("1", "FROZEN") } else { ("0", "THAWED") };
        let done = match write(&self.path.join("cgroup.freeze"), v2) {
            Err(error) if is_gone(&error) => write(&self.path.join("freezer.state"), v1),
            done => done,
        };
        done.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })
    }

    /// Thaws the group, so that a process that starts in it runs. Returns whether it may still be frozen, because a cgroup above it is or
    /// the state cannot be read.
    pub(super) fn thaw(&self) -> bool {
        self.is_frozen() && (self.freeze(false).is_err() || self.is_frozen())
    }

    fn is_frozen(&self) -> bool {
        let frozen = match read(&self.path.join("cgroup.events")) {
            // Before Linux 5.2 there is no `frozen` line.
            Ok(events) => Ok(events.lines().any(|line| line == "frozen 1")),
            Err(error) if is_gone(&error) => {
                read(&self.path.join("freezer.state")).map(|state| state.trim_ascii() != "THAWED")
            }
            Err(error) => Err(error),
        };
        frozen.unwrap_or_else(|error| !is_gone(&error))
    }

    /// Removes it if it is empty, and then the location if that is empty and not a unit's cgroup. A missing group is not an error.
    pub fn remove(&self) -> io::Result<()> {
        remove_below(&self.path, DEPTH)?;
        if let Some(base) = self.path.parent().filter(|base| base.extension() != Some(OsStr::new("service"))) {
            // Fails if other groups exist.
            let _ = fs::remove_dir(base);
        }
        Ok(())
    }

    /// The file that a new process writes itself into.
    pub(super) fn procs_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// The same for v1: it moves one thread without blocking the whole host. v2 has no such file.
    pub(super) fn tasks_file(&self) -> PathBuf {
        self.path.join("tasks")
    }

    /// Opens the directory, created if it does not exist, for a process to start in (v2).
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

/// Writes to a file of the kernel; never creates one.
fn write(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

/// Whether an error means that a cgroup or one of its files does not exist or is being removed. A shortage or a denied access does not.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NODEV | Errno::SRCH))
}

fn members_below(path: &Path, depth: u32, pids: &mut Vec<u32>) -> io::Result<()> {
    match read(&path.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0)),
        // It was removed, or is a threaded cgroup, whose processes its parent lists.
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
        // It may have child cgroups.
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
    fn without_systemd_v2_comes_first() {
        let expected = [
            "/sys/fs/cgroup/unified/k",
            "/sys/fs/cgroup/free zer/k",
            "/sys/fs/cgroup/cpu,cpuacct/k",
            "/sys/fs/cgroup/systemd/k",
        ];
        assert_eq!(places(HYBRID, None), expected);
        // Without a unit of this name, systemd's hierarchy is not a candidate.
        assert_eq!(places(HYBRID, Some("no-such-unit")), &expected[..3]);
    }

    #[test]
    fn whole_hierarchies_come_before_parts_and_read_only_ones_are_skipped() {
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

    /// A cgroup whose file exists but cannot be read: a link to itself.
    fn unreadable(file: &str) -> (tempfile::TempDir, Group) {
        let directory = tempfile::tempdir().unwrap();
        let group = Group { path: directory.path().join("agent-a") };
        fs::create_dir(&group.path).unwrap();
        std::os::unix::fs::symlink(file, group.path.join(file)).unwrap();
        (directory, group)
    }

    #[test]
    fn an_unreadable_group_is_not_empty() {
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
    fn only_a_missing_cgroup_counts_as_gone() {
        let is_gone = |errno: Errno| is_gone(&errno.into());
        assert!([Errno::NOENT, Errno::NODEV, Errno::SRCH].into_iter().all(is_gone));
        let others = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS, Errno::OPNOTSUPP];
        assert!(!others.into_iter().any(is_gone));
    }

    #[tokio::test]
    async fn an_unreadable_group_is_polled_again() {
        let (_directory, group) = unreadable("cgroup.events");
        let emptied = group.emptied_polling(Duration::from_millis(1));
        tokio::pin!(emptied);
        let early = tokio::time::timeout(Duration::from_millis(50), &mut emptied).await;
        assert!(early.is_err());
        fs::remove_file(group.path.join("cgroup.events")).unwrap();
        fs::write(group.path.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        tokio::time::timeout(Duration::from_secs(10), emptied).await.unwrap();
    }

    #[test]
    fn only_members_of_the_group_are_killed() {
        let directory = tempfile::tempdir().unwrap();
        let group = Group { path: directory.path().join("agent-a") };
        fs::create_dir(&group.path).unwrap();
        let mut members: Vec<_> =
            (0..2).map(|_| std::process::Command::new("sleep").arg("60").spawn().unwrap()).collect();
        let mut outsider = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pids: Vec<u32> = members.iter().map(std::process::Child::id).collect();
        fs::write(group.path.join("cgroup.procs"), format!("{}\n{}\n", pids[0], pids[1])).unwrap();
        group.kill_some(&[pids[0], pids[1], outsider.id()]).unwrap();
        for member in &mut members {
            assert!(!member.wait().unwrap().success());
        }
        assert!(outsider.try_wait().unwrap().is_none());
        outsider.kill().unwrap();
        outsider.wait().unwrap();
    }

    #[test]
    fn a_group_of_ours_is_thawed() {
        let directory = tempfile::tempdir().unwrap();
        let group = Group { path: directory.path().to_owned() };
        assert!(!group.thaw(), "a hierarchy without freezer is not frozen");
        // v1: the kernel returns at once what was written.
        fs::write(directory.path().join("freezer.state"), "FROZEN\n").unwrap();
        assert!(!group.thaw());
        assert_eq!(fs::read_to_string(directory.path().join("freezer.state")).unwrap(), "THAWED\n");
        // v2, below a frozen cgroup.
        fs::write(directory.path().join("cgroup.events"), "populated 0\nfrozen 1\n").unwrap();
        fs::write(directory.path().join("cgroup.freeze"), "1").unwrap();
        assert!(group.thaw());
        assert_eq!(fs::read_to_string(directory.path().join("cgroup.freeze")).unwrap(), "0");
    }
}
