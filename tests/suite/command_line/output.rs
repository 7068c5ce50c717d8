//! Unwritable output stops no work; if the output is the result, the exit code reports its loss.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::support::aops;
use crate::support::command::{self, LIMIT};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};

/// A device without free space.
fn full() -> Stdio {
    Stdio::from(File::options().write(true).open("/dev/full").expect("it exists"))
}

/// A pipe without a reader.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    Stdio::from(writer)
}

/// The exit code after the command has exited.
#[track_caller]
fn code(command: &mut Command) -> i32 {
    let mut child = command.stdin(Stdio::null()).spawn().expect("it can be run");
    command::wait(&mut child, LIMIT).unwrap_or_else(|| panic!("`{}` does not end", command::describe(command)))
}

/// A gateway whose log cannot be written; dropping it kills the gateway.
struct Silent(Child);

impl Silent {
    fn run(directory: &Path) -> (Silent, String) {
        let mut command = Command::new(aops());
        command.args(["gateway", "run", "--listen", "127.0.0.1:0", "--dir"]).arg(directory);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(full()).spawn();
        let mut silent = Silent(child.expect("it can be run"));
        let output = silent.0.stdout.take().expect("it is piped");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("a line");
        let url = line.trim().strip_prefix("listening on ").expect("it listens").to_owned();
        (silent, url)
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn unwritable_output_stops_no_work_and_a_lost_result_sets_the_exit_code() {
    let gateway = Gateway::stopped();
    let again = |arguments: &[&str]| {
        let mut command = Command::new(aops());
        command.arg("gateway").args(arguments).stdout(full()).stderr(full());
        code(&mut command)
    };
    let directory = gateway.path("").display().to_string();
    assert_eq!(again(&["init", "--dir", &directory]), 0);
    assert_eq!(again(&["publish", "--dir", &directory, "--self", "--version", "1.0.0"]), 0);
    assert_eq!(again(&["schema"]), 1);
    let (_running, url) = Silent::run(&gateway.path(""));

    let host = TestHost::new();
    let home = host.home().display().to_string();
    let trust = gateway.trust();
    let install = || {
        let mut command = host.command(&aops());
        command
            .args(["install", "--service", "none", "--home", &home, "--agent-id", "1", "--endpoint", &url])
            .args(&trust);
        command
    };
    for fresh in [&[][..], &["--fresh"]] {
        assert_eq!(code(install().args(fresh).stdout(closed()).stderr(full())), 0);
        host.wait_for_status("it to run", SOON, |status| {
            status["state"] == "running" && status["gateway"]["connected"] == true
        });
    }
    assert_eq!(code(install().arg("--version").arg("9.9.9").stdout(full()).stderr(closed())), 1);

    let control = |arguments: &[&str]| {
        let mut command = host.command(&aops());
        command.arg("control").args(arguments);
        command
    };
    for verb in [&["status"][..], &["status", "--json"], &["status", "--history"], &["logs"], &["--help"]] {
        assert_eq!(code(control(verb).stdout(full()).stderr(full())), 1, "{verb:?}");
        // A reader that closes the pipe does not want more: no error.
        assert_eq!(code(control(verb).stdout(closed()).stderr(closed())), 0, "{verb:?}");
    }
    let told = control(&["status"]).stdout(full()).stderr(Stdio::piped()).output().expect("it can be run");
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("cannot write the result") && told.contains("No space left"), "{told}");
    for verb in ["restart", "stop", "start"] {
        assert_eq!(code(control(&[verb]).stdout(full()).stderr(full())), 0, "{verb}");
    }
    assert_eq!(code(control(&["nonsense"]).stdout(full()).stderr(full())), 2);
    assert_eq!(code(control(&["uninstall", "--yes"]).stdout(full()).stderr(full())), 0);
    assert!(!host.home().exists());
    assert_eq!(code(control(&["status"]).stdout(full()).stderr(full())), 4);
}
