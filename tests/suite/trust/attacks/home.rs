//! Attacks from within the host: links, key files, the control socket.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use super::{Scene, wait_for_victim};
use crate::support::aops;
use crate::support::command::{self, LIMIT};
use crate::support::files::{difference, snapshot};

/// The user `nobody` of every host.
pub(super) const NOBODY: u32 = 65534;

pub(super) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
}

#[test]
fn a_link_instead_of_a_home_directory_is_rejected() {
    let scene = Scene::new();
    scene.victim();
    let home = scene.host.home();
    for (name, mode) in [("cache", 0o700), ("staging", 0o700), ("agents/victim", 0o755)] {
        let elsewhere = scene.host.beside("elsewhere");
        fs::create_dir_all(elsewhere.join("1.0.0")).expect("it is ours");
        for file in ["precious", "1.0.0/precious"] {
            let file = fs::File::create(elsewhere.join(file)).expect("it is ours");
            // Older than anything in a cache.
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1 << 30)).expect("it is ours");
        }
        let before = snapshot(&elsewhere, &[]);
        let place = home.join(name);
        let _ = fs::remove_dir_all(&place);
        symlink(&elsewhere, &place).expect("it is ours");
        scene.order_victim(json!({}));
        let shown = place.display().to_string();
        scene.assert_reported("stage", "refused", &[&shown, "symbolic link"]);
        scene.assert_native_runs();
        // A starting manager, which sweeps, does not follow the link either.
        let old = scene.host.role_pid("spm").expect("it runs");
        scene.host.control(&["restart"]).expect_code(0);
        scene.hostile.wait_for_heartbeat("the new manager", |heartbeat| heartbeat["manager"]["pid"] != old);
        scene.hostile.wait_for_heartbeat("it to have tried", |heartbeat| {
            heartbeat["agents"].to_string().contains("symbolic link")
        });
        if !name.contains('/') {
            scene.assert_reported("home", "refused", &[&shown, "symbolic link", "no release is fetched"]);
            let status = scene.host.status();
            assert!(status["problems"].to_string().contains(&shown), "{status:#}");
            let output = scene.host.install(&["--version", "1.0.0"]).expect_code(1);
            assert!(
                output.stderr.contains("symbolic link") && output.stderr.contains("nothing was changed"),
                "{output}"
            );
        }
        scene.assert_native_runs();
        // Nor does it remove anything there when the sub-agent is no longer ordered.
        scene.forget_victim();
        assert_eq!(difference(&before, &snapshot(&elsewhere, &[])), Vec::<String>::new());
        fs::remove_file(&place).expect("it is ours");
        if !name.contains('/') {
            fs::create_dir(&place).expect("it is ours");
            set_mode(&place, mode);
        }
    }
    // After the fix everything works.
    scene.order_victim(json!({}));
    wait_for_victim(&scene);
    scene.assert_native_runs();
}

#[test]
fn a_key_file_writable_by_others_is_rejected() {
    let scene = Scene::new();
    scene.victim();
    let keys = scene.host.home().join("etc/keys");
    let key = fs::read_dir(&keys).expect("it exists").flatten().next().expect("the operator's key").path();
    for (path, mode, good) in [(&key, 0o666, 0o644), (&keys, 0o777, 0o755)] {
        set_mode(path, mode);
        scene.order_victim(json!({}));
        scene.assert_reported(
            "stage",
            "refused",
            &[&path.display().to_string(), "others can write to it", "chmod go-w"],
        );
        let output = scene.host.install(&["--version", "1.0.0"]).expect_code(1);
        assert!(
            output.stderr.contains("others can write to it") && output.stderr.contains("nothing was changed"),
            "{output}"
        );
        scene.forget_victim();
        set_mode(path, good);
        scene.assert_unharmed();
    }
    // One that another user owns, and so can write.
    std::os::unix::fs::chown(&key, Some(NOBODY), None).expect("these tests run as root");
    scene.order_victim(json!({}));
    scene.assert_reported("stage", "refused", &[&key.display().to_string(), "belongs to the user 65534"]);
    scene.forget_victim();
    std::os::unix::fs::chown(&key, Some(0), None).expect("these tests run as root");
    scene.assert_unharmed();
    scene.order_victim(json!({}));
    wait_for_victim(&scene);
}

/// Sends a request to a socket as another user, and returns the reply.
fn as_nobody(script: &str) -> command::Output {
    let mut command = Command::new("perl");
    command.args(["-MIO::Socket::UNIX", "-e", script]).uid(NOBODY).gid(NOBODY).current_dir("/");
    command::run(&mut command, LIMIT)
}

#[test]
fn requests_of_another_user_at_the_control_socket_are_rejected() {
    let scene = Scene::new();
    let home = scene.host.home();
    let socket = home.join("run/spm.sock");
    let mode = |path: &Path| fs::metadata(path).expect("it exists").permissions().mode() & 0o7777;
    assert_eq!((mode(&socket), mode(&home.join("run")), mode(&home.join("state"))), (0o600, 0o700, 0o700));
    // With the default permissions no other user can connect.
    let request = format!(
        "$SIG{{PIPE}} = 'IGNORE'; my $s = IO::Socket::UNIX->new(Peer => '{}') or die \"cannot connect: $!\\n\"; \
         print $s \"{{\\\"verb\\\":\\\"stop\\\"}}\\n\"; $s->flush; print <$s>;",
        socket.display()
    );
    for directory in home.ancestors().take_while(|path| path.starts_with(scene.host.beside(""))) {
        set_mode(directory, 0o755);
    }
    let output = as_nobody(&request);
    assert!(!output.success() && output.stderr.contains("Permission denied"), "{output}");
    let program = scene.host.beside("aops");
    fs::copy(aops(), &program).expect("a copy");
    let mut control = Command::new(&program);
    control.args(["control", "stop", "--home"]).arg(&home).uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
    let output = command::run(control.current_dir("/"), LIMIT);
    assert!(!output.success() && output.stderr.contains("cannot"), "{output}");
    // A user without access does not get the answer that it is stopped.
    let mut control = Command::new(&program);
    control.args(["control", "status", "--home"]).arg(&home).uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
    let output = command::run(control.current_dir("/"), LIMIT).expect_code(1);
    assert!(output.stderr.contains("only its owner and root may"), "{output}");
    scene.assert_native_runs();

    // With open permissions, the manager itself checks the peer's user, and rejects the request.
    set_mode(&home.join("run"), 0o777);
    set_mode(&socket, 0o666);
    let output = as_nobody(&request);
    assert!(output.success(), "{output}");
    assert!(
        output.stdout.contains("cannot accept a connection of the user 65534") && output.stdout.contains("root alone"),
        "{output}"
    );
    scene.assert_reported("door", "refused", &["the user 65534", "control socket"]);
    // Many idle connections delay no one else.
    let crowd = format!(
        "$| = 1; my @all; for (1..200) {{ push @all, IO::Socket::UNIX->new(Peer => '{}'); }} print scalar(@all), \"\\n\"; sleep 60;",
        socket.display()
    );
    let mut command = Command::new("perl");
    command.args(["-MIO::Socket::UNIX", "-e", &crowd]).uid(NOBODY).gid(NOBODY).current_dir("/");
    let mut crowd = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("perl is installed");
    let mut said = [0; 1];
    let counted = crowd.stdout.as_mut().expect("it is piped").read_exact(&mut said);
    let status = scene.host.control(&["status", "--json"]);
    let _ = crowd.kill().and_then(|()| crowd.wait());
    counted.expect("the field is a number");
    assert!(status.json()["spm"]["pid"].is_u64(), "{status}");
    set_mode(&home.join("run"), 0o700);
    set_mode(&socket, 0o600);
    scene.assert_native_runs();
}
