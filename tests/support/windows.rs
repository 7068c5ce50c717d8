//! A Windows host for a scenario: Wine in a disposable root file system, with processes of its own (see wine.sh).
//!
//! `cargo xtask test-windows` runs the scenarios that apply to Windows (tests/suite/windows.txt) with `AOPS_TEST_WINDOWS`, a directory:
//!
//! ```text
//! rootfs/         the root file system with Wine
//! <arch>/         aops.exe, the program under test; agent.exe, tests/support/windows.c, which is every other program; *.dll, further libraries
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use super::wait::wait_for;
use super::{command, processes};

/// The first start of Wine in a new root, on a busy machine.
const START: Duration = Duration::from_secs(120);
const WINE: &str = "/usr/lib/wine/wine";
/// With Wine, every program that another one starts also has its standard error output, which would then never end.
const WITHOUT_STDERR: &str = r#"file=$(mktemp); "$@" 2>"$file"; code=$?; cat "$file" >&2; rm "$file"; exit $code"#;

/// What the scenarios run on, if that is Windows.
#[derive(Debug, Clone)]
pub struct Windows {
    rootfs: PathBuf,
    programs: PathBuf,
    arch: String,
}

/// The system under test; `None`: the one of this machine.
pub fn under_test() -> Option<Windows> {
    let directory = PathBuf::from(std::env::var_os("AOPS_TEST_WINDOWS")?);
    let arch = std::env::var("AOPS_TEST_WINDOWS_ARCH").unwrap_or_else(|_| "amd64".to_owned());
    Some(Windows { rootfs: directory.join("rootfs"), programs: directory.join(&arch), arch })
}

impl Windows {
    /// In the words of package names.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// The program under test, as a file of this machine.
    pub fn aops(&self) -> PathBuf {
        self.programs.join("aops.exe")
    }

    /// The program that runs scripts and is the `control` of packages.
    pub fn agent(&self) -> PathBuf {
        self.programs.join("agent.exe")
    }
}

/// A running host; dropping it ends it with all of its processes.
#[derive(Debug)]
pub struct Wine {
    keeper: Child,
    /// The first process of the host's PID namespace.
    init: u32,
    /// The host's own directory.
    directory: PathBuf,
    /// A line for each boot.
    boots: Mutex<mpsc::Receiver<String>>,
}

impl Wine {
    /// A host with files of its own in `directory`, which is in the temporary directory of this machine.
    pub fn start(windows: &Windows, directory: &Path) -> Wine {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/wine.sh");
        let mut keeper = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--", "bash", script])
            .args([&windows.rootfs, &windows.programs])
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cannot run unshare");
        let receiver = command::lines(keeper.stdout.take().expect("it is piped"));
        wait_for_boot(&receiver);
        let init = wait_for("the host's first process", START, || processes::children(keeper.id()).first().copied());
        Wine { keeper, init, directory: directory.to_owned(), boots: Mutex::new(receiver) }
    }

    /// Ends every program and service, and boots again: files stay, and automatic services start.
    pub fn reboot(&mut self) {
        let input = self.keeper.stdin.as_mut().expect("it is piped");
        input.write_all(b"\n").expect("the host runs");
        wait_for_boot(&self.boots.lock().expect("no test has panicked with it"));
    }

    /// A path of this machine, as the host names it.
    pub fn path(&self, path: &Path) -> String {
        let (drive, below) = match path.strip_prefix(&self.directory) {
            Ok(below) => ("E", below),
            Err(_) => {
                let below = path.strip_prefix("/tmp");
                ("D", below.unwrap_or_else(|_| panic!("the host has no name for {}", path.display())))
            }
        };
        format!(r"{drive}:\{}", below.display().to_string().replace('/', r"\"))
    }

    /// A command that runs a Windows program (`Z:\program\aops.exe`) with these variables; its arguments follow.
    pub fn command(&self, program: &str, variables: &[(&str, &str)]) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.init.to_string(),
            "--mount",
            "--pid",
            "--",
            "chroot",
            "/run/root",
            "env",
            "-i",
        ]);
        command.args(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "WINEDEBUG=-all"]);
        command.arg("WINEDLLOVERRIDES=mscoree,mshtml=");
        command.args(variables.iter().map(|(name, value)| format!("{name}={value}")));
        command.args(["sh", "-c", WITHOUT_STDERR, "sh", WINE, program]);
        command
    }

    /// The pids of all its processes, as this machine counts them.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = vec![];
        let mut left = vec![self.init];
        while let Some(parent) = left.pop() {
            let children = processes::children(parent);
            left.extend(&children);
            pids.extend(children);
        }
        pids
    }
}

fn wait_for_boot(boots: &mpsc::Receiver<String>) {
    let line = boots.recv_timeout(START).expect("Wine starts");
    assert_eq!(line.trim(), "ready");
}

impl Drop for Wine {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
