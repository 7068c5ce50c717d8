//! The floor and other supervisors: how each is configured to keep N programs running with its default behaviour.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::contestant::{Contestant, Programs, Setting};
use crate::command::{is_installed, text};

/// A supervisor that may be installed.
pub(super) struct Rival {
    pub(super) name: &'static str,
    pub(super) program: &'static str,
    /// The Debian package that contains it.
    pub(super) package: &'static str,
    prepare: fn(&Programs, &Setting<'_>) -> Result<Command>,
}

pub(super) const RIVALS: &[Rival] = &[
    Rival { name: "runit", program: "runsvdir", package: "runit", prepare: runit },
    Rival { name: "s6", program: "s6-svscan", package: "s6", prepare: s6 },
    Rival { name: "monit", program: "monit", package: "monit", prepare: monit },
    Rival { name: "supervisord", program: "supervisord", package: "supervisor", prepare: supervisord },
];

impl Rival {
    pub(super) fn is_installed(&self) -> bool {
        is_installed(self.program)
    }

    pub(super) fn set_up(&self, programs: &Programs, count: usize) -> Result<Contestant> {
        Contestant::other(self.name, numbers(count), |setting| (self.prepare)(programs, setting))
    }
}

/// The names of supervisors that may be left out.
pub(super) fn names() -> clap::builder::PossibleValuesParser {
    RIVALS.iter().map(|rival| rival.name).collect::<Vec<_>>().into()
}

pub(super) fn floor(programs: &Programs, count: usize) -> Result<Contestant> {
    Contestant::other("floor", numbers(count), |setting| {
        let mut command = Command::new(&programs.floor);
        command.arg(count.to_string()).arg(&programs.sleeper).arg(setting.socket);
        Ok(command)
    })
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|number| number.to_string()).collect()
}

/// A directory for each program, whose `run` is the sleeper itself: a shell in between would be measured too.
fn run_directories(programs: &Programs, setting: &Setting<'_>) -> Result<std::path::PathBuf> {
    let services = setting.directory.join("services");
    for name in setting.names {
        fs::create_dir_all(services.join(name))?;
        fs::copy(&programs.sleeper, services.join(name).join("run"))?;
    }
    Ok(services)
}

fn runit(programs: &Programs, setting: &Setting<'_>) -> Result<Command> {
    let mut command = Command::new("runsvdir");
    command.arg("-P").arg(run_directories(programs, setting)?).env("BENCH_SOCKET", setting.socket);
    Ok(command)
}

fn s6(programs: &Programs, setting: &Setting<'_>) -> Result<Command> {
    let mut command = Command::new("s6-svscan");
    command.arg(run_directories(programs, setting)?).env("BENCH_SOCKET", setting.socket);
    Ok(command)
}

/// Monit polls pid files: every second here, every two minutes by default.
fn monit(programs: &Programs, setting: &Setting<'_>) -> Result<Command> {
    let at = |name: &str| text(&setting.directory.join(name));
    let start = setting.directory.join("start");
    let script = format!(
        "#!/bin/sh\n{} {} \"$1\" &\necho $! >{}/\"$1\".pid\n",
        text(&programs.sleeper),
        text(setting.socket),
        text(setting.directory)
    );
    write(&start, &script, 0o755)?;
    let mut lines = vec![
        "set daemon 1".to_owned(),
        format!("set log {}", at("log")),
        format!("set pidfile {}", at("pid")),
        format!("set idfile {}", at("id")),
        format!("set statefile {}", at("state")),
    ];
    for name in setting.names {
        lines.push(format!("check process p{name} with pidfile {}", at(&format!("{name}.pid"))));
        lines.push(format!("  start program = \"{} {name}\"", text(&start)));
    }
    let config = setting.directory.join("monitrc");
    write(&config, &(lines.join("\n") + "\n"), 0o600)?;
    let mut command = Command::new("monit");
    command.arg("-I").arg("-c").arg(config);
    Ok(command)
}

/// By default supervisord gives up on a program after three short runs.
fn supervisord(programs: &Programs, setting: &Setting<'_>) -> Result<Command> {
    let at = |name: &str| text(&setting.directory.join(name));
    let mut lines = vec![
        "[supervisord]".to_owned(),
        "nodaemon=true".to_owned(),
        format!("logfile={}", at("log")),
        format!("pidfile={}", at("pid")),
        format!("childlogdir={}", text(setting.directory)),
    ];
    for name in setting.names {
        lines.push(format!("[program:p{name}]"));
        lines.push(format!("command={} {} {name}", text(&programs.sleeper), text(setting.socket)));
        lines.push("autorestart=true\nstartretries=1000000".to_owned());
    }
    let config = setting.directory.join("supervisord.conf");
    write(&config, &(lines.join("\n") + "\n"), 0o600)?;
    let mut command = Command::new("supervisord");
    command.arg("-c").arg(config);
    Ok(command)
}

fn write(path: &Path, content: &str, mode: u32) -> Result<()> {
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}
