//! The command line for a newcomer: help texts, usage errors, and the names of the program.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::support::aops;
use crate::support::command::{LIMIT, Output, run};
use crate::support::host::TestHost;

/// Runs the program outside of any home.
fn say(arguments: &[&str]) -> Output {
    say_as(&aops(), arguments)
}

fn say_as(program: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    // Wider than the promised width.
    run(command.args(arguments).env_remove("AOPS_HOME").env("COLUMNS", "200").env("NO_COLOR", "1"), LIMIT)
}

/// The subcommands that a help text lists.
fn listed(help: &str) -> Vec<&str> {
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = commands.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect()
}

/// Checks each subcommand's help, recursively.
fn check(path: &[&str], checked: &mut Vec<String>) {
    for flag in ["--help", "-h"] {
        let output = say(&[path, &[flag]].concat());
        let help = output.clone().expect_success();
        assert_eq!(output.stderr, "", "{output}");
        let wide: Vec<_> = help.lines().filter(|line| line.chars().count() > 80).collect();
        assert!(wide.is_empty(), "{path:?}: {wide:?}");
        assert!(help.contains(&format!("Usage: aops {}", path.join(" ")).trim_end().to_owned()), "{output}");
        if flag == "--help" {
            checked.push(path.join(" "));
            for name in listed(&help) {
                check(&[path, &[name]].concat(), checked);
            }
        }
    }
}

#[test]
fn every_subcommand_has_a_help_of_80_columns() {
    let mut checked = vec![];
    check(&[], &mut checked);
    for expected in [
        "",
        "install",
        "control",
        "control status",
        "control start",
        "control stop",
        "control restart",
        "control upgrade",
        "control rollback",
        "control retry",
        "control logs",
        "control uninstall",
        "gateway",
        "gateway fleet",
        "gateway fleet apply",
        "gateway init",
        "gateway publish",
        "gateway run",
        "gateway schema",
        "gateway status",
        "service",
        "spm",
        "spa",
    ] {
        assert!(checked.iter().any(|path| path == expected), "{expected:?} is not listed: {checked:?}");
    }
    // Verbs that are not implemented are not listed.
    for later in ["reload", "diagnose"] {
        assert!(!checked.iter().any(|path| path.ends_with(later)), "{later}");
        say(&["control", later]).expect_code(2);
    }
}

#[test]
fn the_help_shows_the_first_commands() {
    for (path, words) in [
        (
            &["--help"][..],
            &[
                "aops gateway init",
                "aops gateway publish --dir ./gw --self",
                "aops install --agent-id",
                "control status",
            ][..],
        ),
        (&["install", "--help"], &["--trusted-key aops.pub", "--ca-cert", "--service none", "--package"]),
        (&["gateway", "publish", "--help"], &["agent.toml", "[run]", "command = ", "[agents.hello]"]),
        (&["control", "status", "--help"], &["3 stopped, 4 nothing installed"]),
    ] {
        let help = say(path).expect_success();
        for word in words {
            assert!(help.contains(word), "{path:?} does not say {word:?}: {help}");
        }
    }
}

#[test]
fn wrong_usage_exits_with_2_and_names_what_is_missing() {
    for (arguments, words) in [
        (&[][..], &["Usage: aops"][..]),
        (&["nonsense"], &["nonsense"]),
        (&["control"], &["Usage: aops control"]),
        (&["control", "nonsense"], &["nonsense"]),
        (&["control", "status", "--nonsense"], &["--nonsense"]),
        (&["gateway", "publish", "--dir", "/nonexistent"], &["PATH"]),
        (&["gateway", "run"], &["--dir"]),
        (&["gateway", "run", "--dir", "/nonexistent", "--listen", "8888"], &["8888"]),
        (&["install", "--endpoint", "gateway:8888"], &["https://"]),
        (&["install", "--agent-id", "../1"], &["an agent id"]),
        (&["install", "--pin", "abc"], &["64 hexadecimal digits"]),
        (&["--control", "fly", "--agentId", "1"], &["fly"]),
    ] {
        let output = say(arguments).expect_code(2);
        assert_eq!(output.stdout, "", "{output}");
        for word in words {
            assert!(output.stderr.contains(word), "no {word:?} in {output}");
        }
    }
    let host = TestHost::new();
    let nothing = host.install(&[]).expect_code(2);
    for word in ["--agent-id and --endpoint are missing", "--trusted-key", "--ca-cert", "aops install --help"] {
        assert!(nothing.stderr.contains(word), "no {word:?} in {nothing}");
    }
    assert!(!host.home().exists());
}

#[test]
fn without_an_installation_every_control_verb_exits_with_4() {
    let host = TestHost::new();
    for verb in [
        &["status"][..],
        &["status", "--json"],
        &["start"],
        &["stop"],
        &["restart"],
        &["restart", "x"],
        &["logs"],
        &["logs", "x"],
        &["uninstall", "--yes"],
        &["uninstall"],
    ] {
        let output = host.control(verb).expect_code(4);
        if verb.contains(&"--json") {
            let status = output.json();
            assert_eq!((&status["state"], &status["spm"]["pid"]), (&"notInstalled".into(), &serde_json::Value::Null));
        } else {
            assert!(output.text().contains("nothing is installed in"), "{output}");
        }
    }
    let old = host.aops(&["--control", "status"]).expect_code(4);
    assert!(old.text().contains("nothing is installed in"), "{old}");
    assert!(!host.home().exists());
}

#[test]
fn the_program_name_selects_the_role_and_unknown_names_are_aops() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let named = |name: &str, hard: bool| {
        let path = directory.path().join(name);
        match hard {
            // A copy works too if the program is on another file system.
            true => {
                fs::hard_link(aops(), &path).or_else(|_| fs::copy(aops(), &path).map(drop)).expect("it can be written")
            }
            false => symlink(aops(), &path).expect("a temporary directory can be written"),
        }
        path
    };
    let home = directory.path().join("home").display().to_string();
    for (name, expected) in [
        ("aops-spm", "Usage: aops spm"),
        ("aops-spm.exe", "Usage: aops spm"),
        ("aops-spa", "Usage: aops spa"),
        ("control", "Usage: aops control"),
        ("control.exe", "Usage: aops control"),
        ("control.EXE", "Usage: aops control"),
        ("aops-agent-service", "Usage: aops service"),
        ("aops-agent-service.exe", "Usage: aops service"),
        ("aops-agent-service-linux-amd64", "Usage: aops service"),
        ("aops-agent-service-windows-386.exe", "Usage: aops service"),
        ("aops", "Usage: aops [OPTIONS]"),
        ("aops.exe", "Usage: aops [OPTIONS]"),
        ("renamed-by-somebody", "Usage: aops [OPTIONS]"),
        ("aops-spm.prev", "Usage: aops [OPTIONS]"),
    ] {
        let program = named(name, name.len() % 2 == 0);
        let help = say_as(&program, &["--help"]).expect_success();
        assert!(help.contains(expected), "{name}: {help}");
        assert!(say_as(&program, &["--version"]).expect_success().starts_with("aops "), "{name}");
    }
    // Under a role's name the program behaves as that role, with its exit codes.
    say_as(&directory.path().join("control"), &["status", "--home", &home]).expect_code(4);
    say_as(&directory.path().join("aops-agent-service-linux-amd64"), &["--control", "frobnicate"]).expect_code(2);
    say_as(&directory.path().join("aops-agent-service"), &["status", "--home", &home]).expect_code(4);
    say_as(&directory.path().join("renamed-by-somebody"), &["control", "status", "--home", &home]).expect_code(4);
    for role in ["aops-spm", "aops-spa"] {
        let output = say_as(&directory.path().join(role), &["--home", &home]);
        assert!(!output.success() && output.stderr.contains("install"), "{output}");
    }
    assert!(!directory.path().join("home").exists());
}
