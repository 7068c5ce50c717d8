//! Builds the directories that are published as packages: native sub-agents, and those with a `control` script as for open-falcon.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

use super::windows;

/// A directory to publish; dropping it removes the directory.
#[derive(Debug)]
pub struct Package {
    directory: TempDir,
    name: String,
    version: String,
    is_native: bool,
}

impl Package {
    /// A native package whose manifest has `command`, and the tables and keys of `more` after those of `[run]`. Its probation is a second
    /// unless `more` sets it.
    pub fn native(name: &str, version: &str, command: &[&str], more: &str) -> Package {
        let package = Package::empty(name, version, true);
        let command = serde_json::to_string(command).expect("texts are JSON");
        let probation = if more.contains("probation = ") { "" } else { "probation = \"1s\"\n" };
        let manifest =
            format!("name = {name:?}\nversion = {version:?}\n\n[run]\ncommand = {command}\n{probation}{more}\n");
        package.with_file("agent.toml", manifest, 0o644)
    }

    /// A native sub-agent that only sleeps.
    pub fn sleeper(name: &str, version: &str) -> Package {
        Package::script(name, version, "exec sleep 1000000", "")
    }

    /// A native sub-agent that is a shell script.
    pub fn script(name: &str, version: &str, script: &str, more: &str) -> Package {
        Package::native(name, version, &["bin/run"], more).with_program("bin/run", script)
    }

    /// Adds a program that runs a script; on Windows, only the statements that windows.c knows.
    pub fn with_program(self, path: &str, script: &str) -> Package {
        let script = format!("#!/bin/sh\n{script}\n");
        match windows::under_test() {
            None => self.with_file(path, script, 0o755),
            Some(windows) => self
                .with_file(&format!("{path}.script"), script, 0o644)
                .with_copy(&format!("{path}.exe"), &windows.agent()),
        }
    }

    fn with_copy(self, path: &str, of: &Path) -> Package {
        self.with_file(path, fs::read(of).expect("a program of the tests can be read"), 0o755)
    }

    /// A package driven by its `control` script: start, stop, restart, status, pid, version. Its program runs `script`.
    pub fn control(name: &str, version: &str, script: &str) -> Package {
        let package = Package::empty(name, version, false).with_program(&format!("bin/{name}"), script);
        match windows::under_test() {
            None => package.with_file("control", CONTROL.replace("@NAME@", name).replace("@VERSION@", version), 0o755),
            Some(windows) => package.with_copy("control.exe", &windows.agent()),
        }
    }

    /// A package with a `control` script whose program only sleeps.
    pub fn control_sleeper(name: &str, version: &str) -> Package {
        Package::control(name, version, "exec sleep 1000000")
    }

    /// An empty package of that name and version, to which files are added.
    pub fn plain(name: &str, version: &str) -> Package {
        Package::empty(name, version, false)
    }

    fn empty(name: &str, version: &str, is_native: bool) -> Package {
        let directory = tempfile::Builder::new().prefix("aops-package-").tempdir().expect("a temporary directory");
        Package { directory, name: name.to_owned(), version: version.to_owned(), is_native }
    }

    /// Adds a file with that mode.
    pub fn with_file(self, path: &str, content: impl AsRef<[u8]>, mode: u32) -> Package {
        let path = self.path().join(path);
        let parent = path.parent().expect("a file lies in a directory");
        fs::create_dir_all(parent).expect("a temporary directory can be written");
        fs::write(&path, content).expect("a temporary directory can be written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("the file is ours");
        self
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    /// The arguments of `aops gateway publish` for it: a `control` package has no manifest with its name and version.
    pub fn arguments(&self) -> Vec<String> {
        let path = self.path().display().to_string();
        let mut arguments = Vec::new();
        if !self.is_native {
            arguments.extend(["--name", &self.name, "--version", &self.version]);
        }
        let windows = windows::under_test();
        if let Some(windows) = &windows {
            arguments.extend(["--os", "windows", "--arch", windows.arch()]);
        }
        arguments.push(&path);
        arguments.into_iter().map(str::to_owned).collect()
    }
}

/// The system and the architecture of the hosts under test, in the words of package names.
pub fn host_platform() -> (&'static str, String) {
    match windows::under_test() {
        None => ("linux", arch().to_owned()),
        Some(windows) => ("windows", windows.arch().to_owned()),
    }
}

/// The architecture of this machine, in the words of package names.
pub fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The file name of the installer for this machine.
pub fn bootstrap() -> String {
    format!("aops-agent-service-linux-{}", arch())
}

/// A typical script: a pid file beside it, output into its own file, `stoped` in that spelling.
const CONTROL: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 1
mkdir -p var
pidfile=var/app.pid

running() {
    [ -f "$pidfile" ] && kill -0 "$(cat "$pidfile")" 2>/dev/null
}

start() {
    if running; then
        echo "@NAME@ is running already, pid=$(cat "$pidfile")"
        return 0
    fi
    nohup "./bin/@NAME@" >>var/app.log 2>&1 </dev/null &
    echo $! >"$pidfile"
    echo "@NAME@ started..., pid=$!"
}

stop() {
    running && kill "$(cat "$pidfile")"
    rm -f "$pidfile"
    echo "@NAME@ stoped..."
}

case "$1" in
start) start ;;
stop) stop ;;
restart)
    stop
    start
    ;;
status) if running; then echo started; else echo stoped; fi ;;
pid) cat "$pidfile" ;;
version) echo "@VERSION@" ;;
*)
    echo "$0 start|stop|restart|status|pid|version"
    exit 1
    ;;
esac
"#;
