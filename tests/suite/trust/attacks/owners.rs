//! Attacks by users that own, or can write, a part of a home that root runs; and by special files instead of regular ones.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;

use rustix::fs::{CWD, FileType, mknodat};
use serde_json::json;

use super::home::{NOBODY, set_mode};
use super::{Scene, wait_for_victim};
use crate::support::aops;
use crate::support::command::{self, LIMIT};
use crate::support::files::snapshot;
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::package::Package;
use crate::support::wait::wait_for;

/// An ordinary user of the host.
const USER: u32 = 54321;

/// The command that creates the problem, the command that fixes it, and the reported words.
type Harm<'a> = (&'a dyn Fn(bool), [&'a str; 2]);

fn give_to(path: &Path, user: u32) {
    std::os::unix::fs::lchown(path, Some(user), None).expect("these tests run as root");
}

fn make_pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, 0o600.into(), 0).expect("a pipe can be created");
}

#[test]
fn a_home_that_another_user_owns_or_can_replace_is_rejected() {
    let scene = Scene::new();
    scene.victim();
    let home = scene.host.home();
    let above = scene.host.beside("");
    let roles = || ["spm", "spa"].map(|role| scene.host.role_pid(role));
    let before = roles();
    let owned = |bad: bool| give_to(&home, if bad { NOBODY } else { 0 });
    let open = |bad: bool| set_mode(&home, if bad { 0o777 } else { 0o755 });
    let cases: [Harm<'_>; 2] = [
        (&owned, ["belongs to the user 65534", "who is not root"]),
        (&open, ["others can write to it (mode 0777)", "chmod go-w"]),
    ];
    let mut pid = scene.pid;
    for (make, words) in cases {
        make(true);
        scene.order_victim(json!({}));
        scene.assert_reported("stage", "refused", &words);
        scene.assert_reported("home", "refused", &[words[0], words[1], "no release is fetched"]);
        for arguments in
            [&["install", "--service", "none", "--version", "1.0.0"][..], &["control", "uninstall", "--yes"]]
        {
            let output = scene.host.aops(arguments).expect_code(1);
            assert!(words.iter().all(|word| output.stderr.contains(word)), "{output}");
        }
        let output = scene.host.control(&["restart"]).expect_code(1);
        assert!(words.iter().all(|word| output.stderr.contains(word)), "{output}");
        assert_eq!(roles(), before);
        assert_eq!(scene.host.wait_for_agent("native"), pid);
        // A process that exits is not restarted from files of another user.
        scene.host.kill(pid);
        scene.assert_reported("start", "refused", &words);
        // Otherwise it is staged as soon as the problem is fixed, and the next case has nothing to reject.
        scene.forget_victim();
        make(false);
        pid = scene.host.wait_for_new_pid("native", pid);
    }
    // A directory above the home belongs to the host: it is reported only.
    set_mode(&above, 0o777);
    scene.assert_reported("files", "failed", &["which leads to", "mode 0777"]);
    scene.order_victim(json!({}));
    wait_for_victim(&scene);
    assert_eq!(scene.host.wait_for_agent("native"), pid);
}

#[test]
fn an_installation_over_files_that_another_user_can_change_is_rejected() {
    let host = TestHost::new();
    let (above, home) = (host.beside("above"), host.beside("above/home"));
    let (work, control) = (home.join(".install"), home.join("control"));
    fs::create_dir_all(home.join("etc")).expect("it is ours");
    fs::write(home.join("etc/agentId"), "5402\n").expect("it is ours");
    fs::write(&control, "#!/bin/sh\necho \"$1\" >>\"$(dirname \"$0\")/ran\"\n").expect("it is ours");
    set_mode(&control, 0o755);
    let elsewhere = host.beside("elsewhere");
    fs::create_dir_all(elsewhere.join("precious/aside")).expect("it is ours");
    fs::write(elsewhere.join("precious/file"), "precious").expect("it is ours");
    let install = || {
        let home = home.display().to_string();
        host.aops(&["install", "--service", "none", "--endpoint", "https://127.0.0.1:1", "--home", &home])
            .expect_code(1)
    };
    let at_first = snapshot(&host.beside(""), &[]);
    let trap = |path: &Path| {
        fs::create_dir(path).expect("it is ours");
        fs::write(path.join("precious"), "precious").expect("it is ours");
    };
    type Case<'a> = (&'a dyn Fn(), &'a dyn Fn(), &'a [&'a str]);
    let cases: [Case<'_>; 5] = [
        (&|| give_to(&home, NOBODY), &|| give_to(&home, 0), &["above/home: it belongs to the user 65534"]),
        (&|| give_to(&control, NOBODY), &|| give_to(&control, 0), &["home/control: it belongs to the user 65534"]),
        (&|| set_mode(&control, 0o777), &|| set_mode(&control, 0o755), &["home/control: others can write to it"]),
        (
            &|| symlink(&elsewhere, &work).expect("it is ours"),
            &|| fs::remove_file(&work).expect("it is ours"),
            &["home/.install: it is a symbolic link"],
        ),
        (
            &|| {
                trap(&work);
                chown(&work, Some(NOBODY), None).expect("these tests run as root");
            },
            &|| fs::remove_dir_all(&work).expect("it is ours"),
            &["home/.install: it belongs to the user 65534"],
        ),
    ];
    for (harm, fix, words) in cases {
        harm();
        let before = snapshot(&host.beside(""), &[]);
        let output = install();
        assert!(words.iter().all(|word| output.stderr.contains(word)), "{words:?}: {output}");
        assert!(output.stderr.contains("nothing was changed"), "{output}");
        assert_eq!(snapshot(&host.beside(""), &[]), before);
        fix();
        assert_eq!(snapshot(&host.beside(""), &[]), at_first);
    }
    // After the fix the installation fails for another reason.
    let output = install();
    assert!(!output.stderr.contains("cannot trust") && output.stderr.contains("--trusted-key"), "{output}");
    // A directory above the home belongs to the host: it is reported, and is not the reason of the failure.
    set_mode(&above, 0o777);
    let output = install();
    assert!(output.stderr.contains("above, which leads to") && output.stderr.contains("mode 0777"), "{output}");
    assert!(output.stderr.contains("--trusted-key"), "{output}");
}

#[test]
fn a_sub_agent_that_another_user_can_change_is_not_started_and_a_running_one_continues() {
    let scene = Scene::new();
    let agent = scene.host.home().join("agents/native");
    let owned = |bad: bool| give_to(&agent, if bad { NOBODY } else { 0 });
    let agents = scene.host.home().join("agents");
    let open = |bad: bool| set_mode(&agents, if bad { 0o777 } else { 0o755 });
    let cases: [Harm<'_>; 2] = [
        (&owned, ["agents/native: it belongs", "the user 65534"]),
        (&open, ["home/agents: others can write to it", "mode 0777"]),
    ];
    let mut pid = scene.pid;
    for (number, (make, words)) in cases.into_iter().enumerate() {
        make(true);
        let output = scene.host.control(&["restart", "native"]).expect_code(1);
        assert!(words.iter().all(|word| output.stderr.contains(word)), "{output}");
        // Neither a changed environment nor a new manager ends it.
        let env = json!({"CASE": number.to_string()});
        scene.hostile.want(json!([{"name": "native", "version": "1.0.0", "env": env}]), true);
        scene.assert_reported("env", "refused", &words);
        let old = scene.host.role_pid("spm").expect("it runs");
        scene.host.control(&["restart"]).expect_code(0);
        scene.hostile.wait_for_heartbeat("the new manager", |heartbeat| {
            let known = heartbeat["agents"].to_string().contains(words[0]);
            heartbeat["manager"]["pid"] != old && known
        });
        assert_eq!(scene.host.wait_for_agent("native"), pid);
        scene.host.kill(pid);
        scene.assert_reported("start", "refused", &words);
        make(false);
        pid = scene.host.wait_for_new_pid("native", pid);
        let environment = fs::read(format!("/proc/{pid}/environ")).expect("it runs");
        let wanted = format!("CASE={number}");
        assert!(environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes()));
    }
    // Files inside a release may have any owner.
    give_to(&agent.join("1.0.0"), NOBODY);
    scene.host.kill(pid);
    scene.host.wait_for_new_pid("native", pid);
    let log = fs::read_to_string(scene.host.home().join("log/spm.log")).expect("the manager has a log");
    let told = |line: &str| line.contains("agents/native/1.0.0: it belongs") && line.contains("the user 65534");
    assert!(log.lines().any(told), "{log}");
}

#[test]
fn an_executable_writable_by_others_is_not_run_as_a_role() {
    let scene = Scene::new();
    scene.victim();
    let executable = scene.host.home().join("bin/aops");
    let words = ["bin/aops: others can write to it", "mode 0777"];
    set_mode(&executable, 0o777);
    scene.order_victim(json!({}));
    scene.assert_reported("stage", "refused", &words);
    scene.assert_reported("home", "refused", &words);
    assert!(scene.host.status()["problems"].to_string().contains(words[0]));
    let manager = scene.host.role_pid("spm");
    let output = scene.host.control(&["restart"]).expect_code(1);
    assert!(words.iter().all(|word| output.stderr.contains(word)), "{output}");
    let watchdog = scene.host.role_pid("spa").expect("it runs");
    scene.host.kill(watchdog);
    wait_for("the manager to try, and not to start it", SOON, || {
        let log = fs::read_to_string(scene.host.home().join("log/spm.log")).expect("the manager has a log");
        log.lines().any(|line| line.contains("cannot start the watchdog") && line.contains(words[0])).then_some(())
    });
    assert_eq!(scene.host.role_pid("spa"), None);
    set_mode(&executable, 0o755);
    wait_for("a watchdog", SOON, || scene.host.role_pid("spa").filter(|pid| *pid != watchdog));
    assert_eq!(scene.host.role_pid("spm"), manager);
    scene.assert_native_runs();
}

#[test]
fn settings_and_state_writable_by_others_are_reported_and_stop_nothing() {
    let scene = Scene::new();
    scene.victim();
    let (config, state) = (scene.host.home().join("etc/conf.toml"), scene.host.home().join("state/manager.json"));
    set_mode(&config, 0o666);
    give_to(&state, NOBODY);
    let words =
        ["etc/conf.toml: others can write to it (mode 0666)", "state/manager.json: it belongs to the user 65534"];
    scene.assert_reported("files", "failed", &words);
    let problems = scene.host.status()["problems"].to_string();
    assert!(words.iter().all(|word| problems.contains(word)), "{problems}");
    scene.order_victim(json!({}));
    wait_for_victim(&scene);
    set_mode(&config, 0o644);
    give_to(&state, 0);
    scene.assert_reported("files", "ok", &["resolved"]);
    scene.assert_native_runs();
}

#[test]
fn a_named_pipe_instead_of_a_file_blocks_nothing() {
    let scene = Scene::new();
    scene.victim();
    let home = scene.host.home();
    let restart = || {
        let old = scene.host.role_pid("spm").expect("it runs");
        scene.host.control(&["restart"]).expect_code(0);
        scene.hostile.wait_for_heartbeat("the new manager", |heartbeat| heartbeat["manager"]["pid"] != old);
        scene.assert_native_runs();
    };
    let key = home.join("etc/keys/trap.pub");
    make_pipe(&key);
    restart();
    scene.assert_reported("home", "refused", &["etc/keys/trap.pub", "it is not a file"]);
    scene.order_victim(json!({}));
    scene.assert_reported("stage", "refused", &["etc/keys/trap.pub", "it is not a file"]);
    fs::remove_file(&key).expect("it is ours");

    let (config, aside) = (home.join("etc/conf.toml"), scene.host.beside("conf.toml"));
    fs::rename(&config, &aside).expect("it is ours");
    for path in
        [&config, &home.join("state/desired.json"), &home.join("state/events.json"), &home.join("state/pins.json")]
    {
        let _ = fs::remove_file(path);
        make_pipe(path);
    }
    restart();
    scene.assert_reported("config", "failed", &["etc/conf.toml", "it is not a file", "last good settings"]);
    scene.assert_reported("config", "failed", &["state/desired.json", "it is not a file"]);
    fs::remove_file(&config).and_then(|()| fs::rename(&aside, &config)).expect("it is ours");
    fs::remove_file(home.join("state/pins.json")).expect("it is ours");
    scene.order_victim(json!({}));
    wait_for_victim(&scene);
    scene.assert_native_runs();
}

#[test]
fn a_users_own_home_is_accepted_whatever_the_umask() {
    let gateway = Gateway::with(&[&Package::sleeper("native", "1.0.0")], &[("native", "1.0.0", "")]);
    let host = TestHost::new();
    let own = host.beside("");
    for (name, copy) in [("keys/aops.pub", "aops.pub"), ("tls/cert.pem", "cert.pem")] {
        fs::copy(gateway.path(name), own.join(copy)).expect("a copy");
        set_mode(&own.join(copy), 0o644);
    }
    give_to(&own, USER);
    let as_user = |arguments: &[&str]| {
        let mut shell = host.command(Path::new("sh"));
        shell.args(["-c", "umask 002; exec \"$@\"", "sh"]).arg(aops()).args(arguments);
        command::run(shell.uid(USER).gid(USER).env("HOME", &own), LIMIT)
    };
    let home = host.home().display().to_string();
    let install = ["install", "--service", "none", "--home", &home, "--agent-id", "5402", "--endpoint", gateway.url()];
    let trust = ["--trusted-key", "aops.pub", "--ca-cert", "cert.pem"];
    as_user(&[&install[..], &trust[..]].concat()).expect_code(0);
    let pid = host.wait_for_agent("native");
    host.kill(pid);
    let pid = host.wait_for_new_pid("native", pid);
    // As created by an earlier version.
    let agent = host.home().join("agents/native");
    set_mode(&agent, 0o775);
    as_user(&["control", "restart"]).expect_code(0);
    assert_eq!(host.wait_for_agent("native"), pid);
    assert_eq!(fs::metadata(&agent).expect("it exists").permissions().mode() & 0o7777, 0o755);
    let status = host.status();
    assert_eq!(status["problems"], json!([]), "{status:#}");
    // For root it belongs to another user.
    let output = host.control(&["restart"]).expect_code(1);
    assert!(output.stderr.contains(&format!("belongs to the user {USER}, who is not root")), "{output}");
    as_user(&["control", "uninstall", "--yes"]).expect_code(0);
    assert!(!host.home().exists());
}
