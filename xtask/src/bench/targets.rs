//! What `dist` has built, for each platform: the size of its files and, where it runs on this machine, the memory of an idle host.
#![allow(clippy::print_stdout, reason = "the figures are its output")]

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::overall::proportional_memory;
use super::{heading, mebibytes};
use crate::command::say;
use crate::dist::{self, Target};
use crate::fleet::{Fleet, pid, quietly};
use crate::package::Package;
use crate::packages;
use crate::wait::try_for;

/// As many as the memory of `cargo xtask bench` is measured with.
const SUB_AGENTS: usize = super::overall::SUB_AGENTS;

pub(super) fn run() -> Result<()> {
    let built = dist::directory(dist::RELEASE);
    let gateway = built.join(Target::Gateway.executable());
    ensure!(gateway.is_file(), "{} is missing: run `cargo xtask dist` first", gateway.display());
    let size = |name: &str| built.join(name).metadata().map_or_else(|_| "-".to_owned(), |file| mebibytes(file.len()));
    let mut table = format!(
        "{:<22} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}\n",
        "", "executable", "tar.zst", "rpm", "deb", "manager", "watchdog"
    );
    for target in Target::ALL {
        let (os, arch) = target.words();
        let archive = if target.is_agent() {
            size(&format!("aops-spm-{}_{os}_{arch}.tar.zst", dist::VERSION))
        } else {
            "-".to_owned()
        };
        let runs = matches!(target, Target::LinuxAmd64 | Target::Linux386);
        let package = |is_rpm| {
            if runs { size(&packages::file_name(target, dist::VERSION, is_rpm)) } else { "-".to_owned() }
        };
        let [manager, watchdog] = if runs {
            say(&format!("an idle host of {os}/{arch} with {SUB_AGENTS} sub-agents"));
            memory(&built.join(target.executable()), &gateway, arch)?
        } else {
            ["-", "-"].map(str::to_owned)
        };
        let name = if target.is_agent() { format!("{os}/{arch}") } else { format!("{os}/{arch}, with gateway") };
        table += &format!(
            "{name:<22} {:>10} {archive:>10} {:>10} {:>10} {manager:>10} {watchdog:>10}\n",
            size(&target.executable()),
            package(true),
            package(false)
        );
    }
    println!(
        "\n{}\n\n{table}\nmanager, watchdog: PSS, idle, {SUB_AGENTS} sub-agents",
        heading("cargo xtask bench targets")?
    );
    Ok(())
}

/// Of the manager and of the watchdog.
fn memory(executable: &Path, gateway: &Path, arch: &str) -> Result<[String; 2]> {
    let mut fleet = Fleet::new(gateway)?;
    quietly(&mut fleet.gateway("init"))?;
    let publish = |package: &Package| -> Result<()> {
        let mut command = fleet.gateway("publish");
        quietly(command.args(["--os", "linux", "--arch", arch]).args(package.arguments()))
    };
    let program = std::fs::read(executable).with_context(|| format!("cannot read {}", executable.display()))?;
    publish(&Package::plain("aops-spm", dist::VERSION).with_file("bin/aops", program, 0o755))?;
    let mut wanted = "heartbeatInterval = \"1s\"\n".to_owned();
    for number in 0..SUB_AGENTS {
        let name = format!("sleeper-{number:02}");
        publish(&Package::sleeper(&name, "1"))?;
        wanted += &format!("[agents.{name}]\nversion = \"1\"\n");
    }
    fleet.write_fleet(&wanted)?;
    fleet.start_gateway()?;
    quietly(&mut fleet.install(executable))?;
    let status = fleet.wait_for("all sub-agents", |status: &Value| {
        let agents = status["agents"].as_array().map(Vec::as_slice).unwrap_or_default();
        agents.len() == SUB_AGENTS && agents.iter().all(|agent| agent["state"] == "running")
    })?;
    try_for(super::overall::IDLE, || None::<()>);
    let of = |role: &str| {
        proportional_memory(pid(&status[role]["pid"]).with_context(|| format!("the status has no pid of {role}"))?)
    };
    Ok([of("spm")?, of("spa")?])
}
