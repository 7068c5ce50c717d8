//! Disposable containers: one with a real systemd as init, one without a service manager.
//!
//! A container has an overlay of a cached root file system, its own network with loopback only, and its own cgroups, so that a systemd in
//! it cannot affect the machine's processes. Its keeper (container.sh) runs in its own mount namespace, so no mount is visible outside. The
//! keeper lives as long as a pipe from this process: when the test ends in any way, the keeper ends and stops the container. A killed
//! keeper leaves two empty cgroups, which the next container removes.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use super::command::{self, LIMIT, Output};
use super::files::{self, Files};

/// The limit of a boot, for which the keeper itself allows 30 s, and of an orderly shutdown before it.
const BOOT: Duration = Duration::from_secs(100);
/// The time for the keeper to clean up.
const END: Duration = Duration::from_secs(20);
/// Not compared: files of the kernel and of systemd.
const NOT_COMPARED: &[&str] = &[
    "/proc",
    "/sys",
    "/run",
    "/tmp",
    "/dev",
    "/var/tmp",
    "/var/lib/systemd",
    "/var/log/journal",
    "/var/log/wtmp",
    "/var/log/btmp",
    "/var/log/lastlog",
    "/var/cache/ldconfig",
    "/etc/machine-id",
    "/etc/.updated",
    "/var/.updated",
    "/etc/hostname",
    "/etc/resolv.conf",
];

/// The keeper's program. It is compiled in, since xtask includes this file from another directory.
const KEEPER: &str = include_str!("container.sh");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Systemd,
    Bare,
}

/// A running container; dropping it removes it.
#[derive(Debug)]
pub struct Container {
    kind: Kind,
    keeper: Child,
    orders: Option<ChildStdin>,
    answers: Receiver<String>,
    /// The pid outside of the container's init.
    leader: u32,
    rootfs: PathBuf,
    spawned: AtomicU32,
}

impl Container {
    /// Boots systemd; returns when it has reached its default target.
    pub fn systemd() -> Container {
        Container::systemd_of(rootfs())
    }

    /// As [`Container::systemd`], with this root file system, which is not changed.
    pub fn systemd_of(rootfs: PathBuf) -> Container {
        Container::start(Kind::Systemd, rootfs)
    }

    /// Without a service manager and without `systemctl`; init only reaps orphans.
    pub fn bare() -> Container {
        Container::start(Kind::Bare, rootfs())
    }

    fn start(kind: Kind, rootfs: PathBuf) -> Container {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("aops-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut keeper = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--", "bash", "-c", KEEPER, "container.sh"])
            .arg(if kind == Kind::Systemd { "systemd" } else { "bare" })
            .arg(&name)
            .arg(&rootfs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is sent only to the test; the keeper notices its end and cleans up.
            .process_group(0)
            .spawn()
            .expect("cannot run unshare (package util-linux)");
        let orders = keeper.stdin.take();
        let answers = lines(keeper.stdout.take().expect("it is piped"));
        let mut container = Container { kind, keeper, orders, answers, leader: 0, rootfs, spawned: AtomicU32::new(0) };
        container.await_boot();
        container
    }

    fn await_boot(&mut self) {
        let answer = self.answers.recv_timeout(BOOT).unwrap_or_else(|_| "failed: its keeper ended".to_owned());
        match answer.strip_prefix("ready ").and_then(|leader| leader.parse().ok()) {
            Some(leader) => self.leader = leader,
            None => panic!("cannot boot a container: {answer}"),
        }
    }

    fn order(&mut self, order: &str) {
        let orders = self.orders.as_mut().expect("it is taken by drop alone");
        writeln!(orders, "{order}").expect("the container's keeper has ended");
        self.await_boot();
    }

    /// An orderly shutdown, and a boot with the same files.
    pub fn reboot(&mut self) {
        self.order("reboot");
    }

    /// Kills every process at once, as in a power cut, and boots with the same files.
    pub fn crash(&mut self) {
        self.order("crash");
    }

    /// The pid outside of the container's init.
    pub fn leader(&self) -> u32 {
        self.leader
    }

    /// The path outside of the container's files.
    pub fn root(&self) -> PathBuf {
        self.of_leader("root")
    }

    fn of_leader(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.leader.to_string()).join(name)
    }

    /// The path outside of a path inside.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        self.root().join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// Copies a file into the container, with that mode; directories are created as needed.
    pub fn copy_in(&self, source: impl AsRef<Path>, destination: impl AsRef<Path>, mode: u32) {
        let content = fs::read(&source);
        let content = content.unwrap_or_else(|error| panic!("cannot read {}: {error}", source.as_ref().display()));
        self.write(destination, &content, mode);
    }

    /// Writes a file of the container, with that mode; directories are created as needed.
    pub fn write(&self, destination: impl AsRef<Path>, content: impl AsRef<[u8]>, mode: u32) {
        let path = self.path(&destination);
        let write = || {
            fs::create_dir_all(path.parent().expect("a file lies in a directory"))?;
            let temporary = path.with_extension("new-from-outside");
            fs::write(&temporary, content)?;
            fs::set_permissions(&temporary, std::os::unix::fs::PermissionsExt::from_mode(mode))?;
            fs::rename(&temporary, &path)
        };
        write().unwrap_or_else(|error: std::io::Error| panic!("cannot write {}: {error}", path.display()));
    }

    /// Runs a command inside as root, to its end. Its leftover processes keep running, as after a login session.
    #[track_caller]
    pub fn run<S: AsRef<str>>(&self, words: &[S]) -> Output {
        self.run_within(LIMIT, words)
    }

    /// As [`Container::run`], with another time limit.
    #[track_caller]
    pub fn run_within<S: AsRef<str>>(&self, limit: Duration, words: &[S]) -> Output {
        let mut output = command::run(&mut self.command(None, words), limit);
        output.command = words.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ");
        output
    }

    /// Runs a shell script inside, with `set -eu`.
    #[track_caller]
    pub fn shell(&self, script: &str) -> Output {
        self.run(&["bash", "-euc", script])
    }

    /// Starts a command inside that runs until it is stopped, or the container is.
    pub fn spawn<S: AsRef<str>>(&self, words: &[S]) -> Running<'_> {
        let unit = format!("test-{}", self.spawned.fetch_add(1, Ordering::Relaxed));
        let mut command = self.command(Some(&unit), words);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("cannot run nsenter");
        let lines = lines(child.stdout.take().expect("it is piped"));
        Running { container: self, unit, child, lines }
    }

    /// The container's files, without those of systemd and the kernel.
    pub fn files(&self) -> Files {
        let keeper = Path::new("/proc").join(self.keeper.id().to_string()).join("root/run");
        files::snapshot_of_overlay(&keeper.join("root"), &keeper.join("upper"), &self.rootfs, NOT_COMPARED)
    }

    /// The command lines of the container's processes with their pids outside, without init and kernel threads.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let namespace = fs::read_link(self.of_leader("ns/pid")).expect("the container has ended");
        let pids = fs::read_dir("/proc").expect("/proc can be read").flatten();
        pids.filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            if pid == self.leader || fs::read_link(entry.path().join("ns/pid")).ok()? != namespace {
                return None;
            }
            let words = fs::read(entry.path().join("cmdline")).ok()?;
            let words = String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ");
            (!words.is_empty()).then_some((pid, words))
        })
        .collect()
    }

    /// A command that runs `words` inside: with systemd as a transient service (so in the right cgroup and with a clean environment),
    /// otherwise in the container's cgroup.
    fn command<S: AsRef<str>>(&self, unit: Option<&str>, words: &[S]) -> Command {
        const ENVIRONMENT: [&str; 6] = [
            "env",
            "-i",
            "--chdir=/root",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "LANG=C.UTF-8",
        ];
        let mut all: Vec<OsString> = Vec::new();
        let mut push = |word: &str| all.push(word.into());
        // Entering namespaces does not enter cgroups: without this, the command would run in our cgroup.
        push("bash");
        push("-c");
        push(r#"while [ "$1" != -- ]; do echo $$ >"$1"; shift; done; shift; exec "$@""#);
        push("enter");
        if self.kind == Kind::Bare {
            for procs in self.cgroups() {
                push(&procs);
            }
        }
        push("--");
        for word in ["nsenter", "-t", &self.leader.to_string(), "-m", "-u", "-i", "-n", "-p", "-C", "--"] {
            push(word);
        }
        ENVIRONMENT.iter().for_each(|word| push(word));
        match self.kind {
            Kind::Systemd => {
                for word in ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "-p", "KillMode=process"] {
                    push(word);
                }
                for word in ["-p", "WorkingDirectory=/root", "-E", "PATH", "-E", "HOME", "-E", "LANG"] {
                    push(word);
                }
                if let Some(unit) = unit {
                    push("--unit");
                    push(unit);
                }
                push("--");
                // systemd expands variables in a command line, but not in the path of the program.
                words.iter().take(1).for_each(|word| push(word.as_ref()));
                words.iter().skip(1).for_each(|word| push(&word.as_ref().replace('$', "$$")));
            }
            Kind::Bare => {
                if unit.is_some() {
                    // `systemd-run` can be stopped from here, and the command then stops too: its pid inside is not known outside.
                    ["setpriv", "--pdeathsig", "KILL", "--"].iter().for_each(|word| push(word));
                }
                words.iter().for_each(|word| push(word.as_ref()));
            }
        }
        let mut command = Command::new(&all[0]);
        command.args(&all[1..]);
        command
    }

    /// The `cgroup.procs` files, outside, of the cgroups of the container's init.
    fn cgroups(&self) -> Vec<String> {
        let memberships = fs::read_to_string(self.of_leader("cgroup")).expect("the container has ended");
        let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts can be read");
        let mounted = |kind: &str, option: &str| {
            mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find_map(|fields| {
                let found = fields[2] == kind && (option.is_empty() || fields[3].split(',').any(|one| one == option));
                found.then(|| fields[1].to_owned())
            })
        };
        let paths = memberships.lines().filter_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let tree = match controllers {
                "" => mounted("cgroup2", "")?,
                "name=systemd" => mounted("cgroup", controllers)?,
                _ => return None,
            };
            Some(format!("{tree}{path}/cgroup.procs"))
        });
        paths.collect()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.orders = None;
        if command::wait(&mut self.keeper, END).is_none() {
            let _ = self.keeper.kill();
            let _ = self.keeper.wait();
            if !thread::panicking() {
                panic!("a container's keeper did not end in {END:?}");
            }
        }
    }
}

/// A command that runs inside a container.
#[derive(Debug)]
pub struct Running<'a> {
    container: &'a Container,
    unit: String,
    child: Child,
    lines: Receiver<String>,
}

impl Running<'_> {
    /// The next line of its stdout; panics when it does not arrive in time.
    #[track_caller]
    pub fn line(&self) -> String {
        match self.lines.recv_timeout(LIMIT) {
            Ok(line) => line,
            Err(error) => panic!("no further line of a command that was started: {error}"),
        }
    }

    /// Stops it.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.container.kind == Kind::Systemd {
            let _ = self.container.command(None, &["systemctl", "kill", "--signal=KILL", &self.unit]).output();
        } else {
            let _ = self.child.kill();
        }
        if command::wait(&mut self.child, END).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Forwards a stream line by line, and reads it to its end even without a receiver.
fn lines(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

/// The root file system that `cargo xtask test` has created.
fn rootfs() -> PathBuf {
    let given = std::env::var_os("AOPS_TEST_ROOTFS").map(PathBuf::from);
    given.filter(|path| path.join("usr").is_dir()).unwrap_or_else(|| {
        panic!(
            "there is no root file system for containers (AOPS_TEST_ROOTFS): run `cargo xtask test`, which creates it"
        )
    })
}
