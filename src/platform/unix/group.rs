//! The group that holds a sub-agent's whole process tree: a cgroup of its own, which no process leaves by forking, by a session of its own
//! or by a cleared environment.
//!
//! Where they are made:
//!
//! ```text
//! under systemd    <hierarchy>/system.slice/<key>.service/agent-<name>   a unit's cgroup, delegated to us
//! else             <hierarchy>/<key>/agent-<name>                        where we may write there
//! ```
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
use rustix::process::{Pid, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest file of a cgroup that is read: some 100,000 pids.
const MAX_BYTES: u64 = 1 << 20;
/// Cgroups within a sub-agent's own, made by the sub-agent itself, are looked for so deep.
const DEPTH: u32 = 8;
/// Rounds of killing where the kernel can neither kill nor freeze a cgroup whole.
const KILL_ROUNDS: u32 = 20;
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
struct Hierarchy {
    mount: PathBuf,
    /// Of v1, what it is for: `freezer`, `name=systemd`; `None`: v2.
    controller: Option<String>,
}

impl Groups {
    /// Where a home's groups may be made; `None`: this host has no place for them. `key` names the home: its unit is `<key>.service`.
    pub fn find(key: &str) -> Option<Groups> {
        let systemd = Path::new("/run/systemd/system").is_dir();
        let hierarchies = hierarchies(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
        // The cgroups of a container may be those of its host, where another has a home of the same path: each keeps to its own.
        let place = match fs::metadata("/proc/self/ns/pid") {
            Ok(namespace) if namespace.ino() != INITIAL_PID_NAMESPACE => format!("{key}-{:x}", namespace.ino()),
            _ => key.to_owned(),
        };
        candidates(&hierarchies, systemd.then_some(key), &place)
            .into_iter()
            .find(|base| is_usable(base))
            .map(|base| Groups { base })
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
        let name =
            |entry: io::Result<fs::DirEntry>| Some(entry.ok()?.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned());
        Ok(entries.filter_map(name).collect())
    }
}

/// Where groups may be looked for, best first.
fn candidates(hierarchies: &[Hierarchy], unit: Option<&str>, place: &str) -> Vec<PathBuf> {
    let of = |controller: Option<&str>| hierarchies.iter().find(|found| found.controller.as_deref() == controller);
    let mut found = vec![];
    if let Some(unit) = unit {
        let hierarchy = of(None).or_else(|| of(Some("name=systemd")));
        let unit = hierarchy.map(|hierarchy| hierarchy.mount.join("system.slice").join(format!("{unit}.service")));
        found.extend(unit.filter(|unit| unit.is_dir()));
    }
    // What systemd watches itself it has to itself.
    let v1 = ["freezer", "pids", "cpuacct", "name=systemd"]
        .into_iter()
        .filter(|name| unit.is_none() || *name != "name=systemd");
    let hierarchies = [None].into_iter().chain(v1.map(Some)).filter_map(of);
    found.extend(hierarchies.map(|hierarchy| hierarchy.mount.join(place)));
    found
}

/// Whether groups can be made in `base`, which is made itself where it is missing.
fn is_usable(base: &Path) -> bool {
    let place = if base.is_dir() { Some(base) } else { base.parent() };
    place.is_some_and(|place| access(place, Access::WRITE_OK | Access::EXEC_OK).is_ok())
}

/// The hierarchies that are mounted here (proc_pid_mountinfo(5)).
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let hierarchy = |line: &str| {
        let (fields, behind) = line.split_once(" - ")?;
        let mount = unescaped(fields.split(' ').nth(4)?);
        let mut behind = behind.split(' ');
        let (kind, options) = (behind.next()?, behind.nth(1)?);
        let controller = match kind {
            "cgroup2" => None,
            "cgroup" => {
                let is_controller =
                    |option: &&str| !matches!(*option, "rw" | "ro" | "xattr" | "noprefix" | "clone_children");
                Some(options.split(',').find(is_controller)?.to_owned())
            }
            _ => return None,
        };
        Some(Hierarchy { mount, controller })
    };
    mountinfo.lines().filter_map(hierarchy).collect()
}

/// A path of mountinfo, in which space, tab, line feed and backslash stand as octal numbers.
fn unescaped(path: &str) -> PathBuf {
    PathBuf::from(path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\"))
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
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(self.members()?.is_empty()),
            Err(error) => Err(error),
        }
    }

    /// Resolves when nothing lives in it. Where the kernel does not tell of that (v1), it is looked at now and then. Cancel-safe.
    pub async fn emptied(&self) {
        // SAFETY: the value owns its descriptor, which is closed with it and by nobody else.
        let watched = |file: fs::File| unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.ok();
        if let Some(events) = fs::File::open(self.path.join("cgroup.events")).ok().and_then(watched) {
            while !self.is_empty().unwrap_or(true) {
                match events.ready(Interest::PRIORITY).await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => break,
                }
            }
        }
        while !self.is_empty().unwrap_or(true) {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Kills all of it at once, forks in flight included.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.path.is_dir() => return Ok(()),
            // Before Linux 5.14, and of v1.
            Err(_) => {}
        }
        // What is frozen can be killed, but does not fork; thawed, it dies (in v2 at once).
        self.freeze(true);
        let killed = self.kill_each();
        self.freeze(false);
        killed
    }

    fn kill_each(&self) -> io::Result<()> {
        for _ in 0..KILL_ROUNDS {
            let members = self.members()?;
            if members.is_empty() {
                break;
            }
            for pid in members.iter().filter_map(|pid| Pid::from_raw(*pid as i32)) {
                match rustix::process::kill_process(pid, Signal::KILL) {
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn freeze(&self, freeze: bool) {
        let (v2, v1) = if freeze { ("1", "FROZEN") } else { ("0", "THAWED") };
        if fs::write(self.path.join("cgroup.freeze"), v2).is_err() {
            let _ = fs::write(self.path.join("freezer.state"), v1);
        }
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

fn members_below(path: &Path, depth: u32, pids: &mut Vec<u32>) -> io::Result<()> {
    match read(&path.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0)),
        // It has gone, or is one of threads.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == NO_DEVICE
                || error.raw_os_error() == NOT_HERE =>
        {
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    if depth > 0 {
        for child in children(path) {
            members_below(&child, depth - 1, pids)?;
        }
    }
    Ok(())
}

/// What reading a cgroup says that is being removed.
const NO_DEVICE: Option<i32> = Some(rustix::io::Errno::NODEV.raw_os_error());
/// What reading the processes of a cgroup of threads says.
const NOT_HERE: Option<i32> = Some(rustix::io::Errno::OPNOTSUPP.raw_os_error());

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn remove_below(path: &Path, depth: u32) -> io::Result<()> {
    let removed = fs::remove_dir(path);
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Perhaps cgroups of its own are in it.
        Err(error) if depth > 0 => {
            let children = children(path);
            if children.is_empty() {
                return Err(error);
            }
            children.iter().try_for_each(|child| remove_below(child, depth - 1))?;
            fs::remove_dir(path)
        }
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 23 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw
31 23 0:27 / /sys/fs/cgroup/systemd rw,nosuid shared:5 - cgroup cgroup rw,xattr,name=systemd
32 23 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:6 - cgroup cgroup rw,cpu,cpuacct
33 23 0:29 /docker/abc /sys/fs/cgroup/free\\040zer rw shared:7 - cgroup cgroup rw,freezer
40 23 0:30 / /proc rw - proc proc rw
";
    #[test]
    fn the_hierarchies_are_read() {
        let found = hierarchies(HYBRID);
        let named: Vec<_> = found.iter().map(|h| (h.mount.to_str().unwrap(), h.controller.as_deref())).collect();
        assert_eq!(
            named,
            [
                ("/sys/fs/cgroup/unified", None),
                ("/sys/fs/cgroup/systemd", Some("name=systemd")),
                ("/sys/fs/cgroup/cpu,cpuacct", Some("cpu")),
                ("/sys/fs/cgroup/free zer", Some("freezer")),
            ]
        );
    }

    #[test]
    fn without_a_service_manager_v2_comes_first() {
        let found = hierarchies(HYBRID);
        let expected = ["/sys/fs/cgroup/unified/k", "/sys/fs/cgroup/free zer/k", "/sys/fs/cgroup/systemd/k"];
        assert_eq!(candidates(&found, None, "k"), expected.map(PathBuf::from));
        // What systemd watches itself it has to itself; there is no unit of that name here.
        assert_eq!(candidates(&found, Some("no-such-unit"), "k").len(), 2);
    }
}
